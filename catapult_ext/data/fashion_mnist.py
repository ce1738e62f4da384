"""Fashion-MNIST, from its four idx.gz files.

H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, arXiv:1708.07747.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from catapult_ext.data.files import find, form_of, parsing, record, require
from catapult_ext.data.image_set import Download, ImageSet, Pool, Reading

__all__ = ["FASHION_MNIST"]

_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_ROWS = (60_000, 10_000)
_FILES = (
    ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
    ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
)
_NAMES = [name for name, _ in _FILES]
_LAYOUT = (
    f"put {', '.join(_NAMES)} of https://github.com/zalandoresearch/fashion-mnist there, in a folder whose path "
    "says fashion (MNIST has files of the same names)"
)


def _read(root: Path) -> Reading:
    folders = {path.parent for path in find(root, *_NAMES) if "fashion" in path.as_posix().lower()}
    if not folders:
        raise FileNotFoundError(f"no {_NAMES[0]} of Fashion-MNIST under {root}: {_LAYOUT}")
    if len(folders) > 1:
        places = ", ".join(sorted(folder.relative_to(root).as_posix() for folder in folders))
        raise ValueError(
            f"Fashion-MNIST is in several folders under {root} ({places}): "
            "point the data root at the one that is meant"
        )
    paths = require(folders.pop(), _NAMES, _LAYOUT)
    pools, files = [], []
    for split, rows in enumerate(_ROWS):
        for_images, for_labels = paths[2 * split : 2 * split + 2]
        with parsing(for_images, "idx file of images", _LAYOUT):
            images = _idx(for_images, (28, 28), rows)[:, None]  # [N, 1, 28, 28]
        with parsing(for_labels, "idx file of labels", _LAYOUT):
            labels = _idx(for_labels, (), rows)
            if len(labels) != len(images):
                raise ValueError(f"it has {len(labels)} labels for {len(images)} images")
            if labels.max() > 9:
                row = int(np.argmax(labels > 9))
                raise ValueError(f"label {row} is {labels[row]}, expected a class from 0 to 9")
        for path, (_, md5) in zip((for_images, for_labels), _FILES[2 * split :], strict=False):
            files.append(record(root, path, md5, rows=len(labels)))
        pools.append(Pool(images, labels.astype(np.int64)))
    complete = tuple(len(pool.labels) for pool in pools) == _ROWS
    return Reading(form_of(files, complete), files, pools[0], pools[1])


def _idx(path: Path, shape: tuple[int, ...], rows: int) -> np.ndarray:
    """(N, *shape) uint8 with N from 1 to `rows`: what the file holds, of which no more is unpacked than that.

    Raises:
        ValueError: with the reason.
    """
    dimensions = 1 + len(shape)
    with gzip.open(path) as file:
        header = np.frombuffer(file.read(4 + 4 * dimensions), ">i4")
        if len(header) < 1 + dimensions or header[0] != 0x800 + dimensions:
            start = f"0x{header[0]:08x}" if len(header) else "nothing"
            raise ValueError(f"it starts with {start}, expected 0x{0x800 + dimensions:08x}")
        own_shape = tuple(header[1:].tolist())
        if own_shape[1:] != shape or not 1 <= own_shape[0] <= rows:
            expected = "(" + ", ".join(["N", *map(str, shape)]) + ")"
            raise ValueError(f"it has shape {own_shape}, expected {expected} with N from 1 to {rows}")
        size = math.prod(own_shape)
        values = file.read(size + 1)
    if len(values) != size:
        how_many = f"more than {size}" if len(values) > size else f"{len(values)}"
        raise ValueError(f"it has {how_many} values, expected {size} for shape {own_shape}")
    return np.frombuffer(values, np.uint8).reshape(own_shape)


FASHION_MNIST = ImageSet(
    name="fashion-mnist",
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    pair=(0, 2),
    white=255,
    statistics=None,
    read=_read,
    layout=_LAYOUT,
    downloads=tuple(Download(_URL + name, md5, "fashion-mnist") for name, md5 in _FILES),
)
