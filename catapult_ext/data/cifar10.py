"""CIFAR-10, from the batches of its "python version" (pickle) or its "binary version".

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from catapult_ext.data.files import find_one, form_of, parsing, record, require
from catapult_ext.data.image_set import Download, ImageSet, Pool, Reading
from catapult_ext.data.restricted_pickle import PickledArray, load_plain

__all__ = ["CIFAR10", "CLASS_NAMES", "STATISTICS"]

_PICKLED, _BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_ROWS = 10_000  # images of each official file
_ROW_BYTES = 1 + 3072  # of the binary version: class, then red, green, blue, row by row

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
    f"put {_PICKLED}/ with data_batch_1 ... data_batch_5 and test_batch there, as unpacked from "
    "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, or "
    f"{_BINARY}/ from cifar-10-binary.tar.gz"
)

CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

STATISTICS = (
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),
    "constants in wide use for the CIFAR-10 training set: mean over all pixels, and the mean over the "
    "images of the standard deviation within an image",
)


def _read(root: Path) -> Reading:
    folder = find_one(root, _PICKLED, _BINARY, layout=_LAYOUT)
    binary = folder.name == _BINARY
    ending = ".bin" if binary else ""
    require(folder, [name + ending for name, _, _ in (*_TRAIN, _TEST)], _LAYOUT)
    files: list[dict[str, Any]] = []
    pools: list[Pool] = []
    for name, label, md5 in (*_TRAIN, _TEST):
        path = folder / (name + ending)
        with parsing(path, "CIFAR-10 batch", _LAYOUT):
            pool = _parse_binary(path) if binary else _parse_pickle(path.read_bytes(), label)
        # The binary version has a published sum for its archive only.
        files.append(record(root, path, None if binary else md5, rows=len(pool.labels)))
        pools.append(pool)
    train = Pool(_joined(pools[:-1], lambda pool: pool.images), _joined(pools[:-1], lambda pool: pool.labels))
    complete = all(file["rows"] == _ROWS for file in files)
    return Reading(form_of(files, complete), files, train, pools[-1])


def _joined(pools: list[Pool], part: Callable[[Pool], Any]) -> np.ndarray:
    return np.concatenate([part(pool) for pool in pools])


def _parse_binary(path: Path) -> Pool:
    """The images and classes of one batch of the binary version.

    Raises:
        ValueError: with the reason, without the file's name.
    """
    size = path.stat().st_size
    rows, rest = divmod(size, _ROW_BYTES)
    if rest or not 1 <= rows <= _ROWS:
        raise ValueError(
            f"it has {size} bytes, expected N x {_ROW_BYTES} (class, then 3072 pixel values) "
            f"with N from 1 to {_ROWS}"
        )
    table = np.fromfile(path, np.uint8).reshape(rows, _ROW_BYTES)
    labels = table[:, 0].astype(np.int64)
    _check_labels(labels.tolist())
    return Pool(table[:, 1:].reshape(-1, 3, 32, 32), labels)


def _parse_pickle(content: bytes, label: str) -> Pool:
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
    _check_labels(labels)
    return Pool(pixels.reshape(-1, 3, 32, 32), np.array(labels))


def _check_labels(labels: list[Any]) -> None:
    for row, value in enumerate(labels):
        if type(value) is not int or not 0 <= value <= 9:
            raise ValueError(f"label {row} is {value!r}, expected a class from 0 to 9")


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


CIFAR10 = ImageSet(
    name="cifar10",
    class_names=CLASS_NAMES,
    pair=(7, 9),
    white=255,
    statistics=STATISTICS,
    read=_read,
    layout=_LAYOUT,
    downloads=(
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar10",
            unpack=tuple(
                f"{_PICKLED}/{name}" for name in (*(n for n, _, _ in (*_TRAIN, _TEST)), "batches.meta")
            ),
        ),
    ),
)
