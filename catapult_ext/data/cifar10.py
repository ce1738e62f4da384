"""CIFAR-10, from the pickled batches of its "python version".

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from catapult_ext.data.image_set import ImageSet, Pool, Reading, find_folder
from catapult_ext.data.restricted_pickle import PickledArray, load_plain

__all__ = ["CIFAR10"]

_FOLDER = "cifar-10-batches-py"
_ROWS = 10_000  # images of each official file

# File, the batch_label inside, and the published MD5 sum.
_TRAIN = (
    ("data_batch_1", "training batch 1 of 5", "c99cafc152244af753f735de768cd75f"),
    ("data_batch_2", "training batch 2 of 5", "d4bba439e000b95fd0a9bffe97cbabec"),
    ("data_batch_3", "training batch 3 of 5", "54ebc095f3ab1f0389bbae665268c751"),
    ("data_batch_4", "training batch 4 of 5", "634d18415352ddfa80567beed471001a"),
    ("data_batch_5", "training batch 5 of 5", "482c414d41f54cd18b22e5b47cb7c3cb"),
)
_TEST = ("test_batch", "testing batch 1 of 1", "40351d587109b95175f43aff81a1287e")

_LAYOUT = (
    f"put {_FOLDER}/ with data_batch_1 ... data_batch_5 and test_batch there, as unpacked from "
    "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html"
)


def _read(root: Path) -> Reading:
    folder = find_folder(root, _FOLDER, _LAYOUT)
    missing = [name for name, _, _ in (*_TRAIN, _TEST) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: {_LAYOUT}")
    files: list[dict[str, Any]] = []
    pools: list[Pool] = []
    official = True
    for name, label, md5 in (*_TRAIN, _TEST):
        path = folder / name
        content = path.read_bytes()
        try:
            pool = _parse(content, label)
        except ValueError as error:
            raise ValueError(f"{path} is no CIFAR-10 batch: {error}; {_LAYOUT}") from error
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        official &= digest == md5
        files.append({"path": path.relative_to(root).as_posix(), "rows": len(pool.labels), "md5": digest})
        pools.append(pool)
    partial = any(file["rows"] < _ROWS for file in files)
    form = "official" if official else "partial" if partial else "unverified"
    train = Pool(
        np.concatenate([pool.images for pool in pools[:-1]]),
        np.concatenate([pool.labels for pool in pools[:-1]]),
    )
    return Reading(form, files, train, pools[-1])


def _parse(content: bytes, label: str) -> Pool:
    """The images and classes of one batch, which must call itself `label` if it says what it is.

    Raises:
        ValueError: with the reason, without the file's name.
    """
    entries = load_plain(content)
    if not isinstance(entries, dict):
        raise ValueError(f"it holds a {type(entries).__name__}, expected a dict with data and labels")
    named = {_text(key): value for key, value in entries.items()}
    own_label = named.get("batch_label")
    if own_label is not None and _text(own_label) != label:
        raise ValueError(f"it says that it is {_text(own_label)!r}, expected {label!r}")

    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, PickledArray):
        raise ValueError("it has no array called data")
    pixels = data.numpy()  # [N, 3072]
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not 1 <= len(pixels) <= _ROWS:
        raise ValueError(f"data has shape {pixels.shape}, expected (N, 3072) with N from 1 to {_ROWS}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        what = f"{len(labels)} labels" if isinstance(labels, list) else "no list of labels"
        raise ValueError(f"it has {what} for {len(pixels)} images")
    for row, value in enumerate(labels):
        if type(value) is not int or not 0 <= value <= 9:
            raise ValueError(f"label {row} is {value!r}, expected a class from 0 to 9")
    return Pool(pixels.reshape(-1, 3, 32, 32), np.array(labels))


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


CIFAR10 = ImageSet(
    name="cifar10",
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    white=255,
    statistics=(
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        "constants in wide use for the CIFAR-10 training set: mean over all pixels, and the mean over the "
        "images of the standard deviation within an image",
    ),
    read=_read,
    layout=_LAYOUT,
)
