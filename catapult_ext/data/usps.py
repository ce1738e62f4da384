"""USPS, 16x16 grey digits, from one HDF5 file or from the two bz2 files of LIBSVM.

J. J. Hull, A database for handwritten text recognition research, IEEE TPAMI 16(5), 1994. The releases hold the same
digits in the same order, but LIBSVM's are smoothed: what is trained on one must not be tested on the other.
"""

from __future__ import annotations

import bz2
import io
from pathlib import Path
from typing import Any

import numpy as np

from catapult_ext.data.files import find, find_one, form_of, parsing, record, require
from catapult_ext.data.image_set import Download, ImageSet, Pool, Reading

__all__ = ["USPS"]

_URL = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/"
_ROWS = (7291, 2007)
_LIBSVM = (
    ("usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197"),
    ("usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118"),
)
_LAYOUT = (
    "put usps.h5 (groups train and test, each with data, float in [0, 1] of shape (N, 256), and target) there, "
    f"or usps.bz2 and usps.t.bz2 of {_URL[:-11]}multiclass.html"
)
_TEXT_ROW = 256 * 24  # bytes of a row of text, at most: index, colon, value


def _read(root: Path) -> Reading:
    if find(root, "usps.h5"):
        if find(root, "usps.bz2"):
            raise ValueError(
                f"both usps.h5 and usps.bz2 are under {root}, with different pixels: "
                "point the data root at the one that is meant"
            )
        path = find_one(root, "usps.h5", layout=_LAYOUT)
        with parsing(path, "file of USPS digits", _LAYOUT):
            pools = _hdf5(path)
        files = [record(root, path, None, train_rows=len(pools[0].labels), test_rows=len(pools[1].labels))]
    else:
        folder = find_one(root, "usps.bz2", layout=_LAYOUT).parent
        pools, files = [], []
        for path, rows, (_, md5) in zip(
            require(folder, [name for name, _ in _LIBSVM], _LAYOUT), _ROWS, _LIBSVM, strict=True
        ):
            with parsing(path, "file of USPS digits", _LAYOUT):
                pools.append(_libsvm(path, rows))
            files.append(record(root, path, md5, rows=len(pools[-1].labels)))
    complete = tuple(len(pool.labels) for pool in pools) == _ROWS
    return Reading(form_of(files, complete), files, pools[0], pools[1])


def _libsvm(path: Path, most_rows: int) -> Pool:
    """Digits of a file "label index:value ..." with labels 1 ... 10 and values -1 ... 1; what is left out is 0.

    Raises:
        ValueError: with the reason.
    """
    from sklearn.datasets import load_svmlight_file  # slow to import, needed here only

    limit = most_rows * _TEXT_ROW
    with bz2.open(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"it unpacks to more than the {limit} bytes that {most_rows} rows need")
    values, labels = load_svmlight_file(io.BytesIO(text), n_features=256, zero_based=False)
    return _pool(
        (values.toarray() + 1) / 2, labels - 1, most_rows, "values from -1 to 1", "labels from 1 to 10"
    )


def _hdf5(path: Path) -> list[Pool]:
    """Both splits.

    Raises:
        ValueError: with the reason.
    """
    import h5py  # needed here only

    with h5py.File(path, "r") as file:
        return [
            _pool(
                _array(h5py, file, f"{split}/data", (256,), rows),
                _array(h5py, file, f"{split}/target", (), rows),
                rows,
                f"{split}/data from 0 to 1",
                f"{split}/target from 0 to 9",
            )
            for split, rows in zip(("train", "test"), _ROWS, strict=True)
        ]


def _array(h5py: Any, file: Any, name: str, shape: tuple[int, ...], most_rows: int) -> np.ndarray:
    """A plain array of numbers that lies in the file itself: no link to another, no plug-in to unpack it."""
    place = file
    for part in name.split("/"):
        is_group = isinstance(place, h5py.Group)
        if not is_group or not isinstance(place.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"it has no array {name} of its own")
        place = place[part]
    if not isinstance(place, h5py.Dataset) or place.is_virtual or place.external:
        raise ValueError(f"it has no array {name} of its own")
    if place.dtype.kind not in "iuf" or place.shape[1:] != shape or not 1 <= place.shape[0] <= most_rows:
        expected = "(" + ", ".join(["N", *map(str, shape)]) + ")"
        raise ValueError(
            f"{name} is {place.dtype} of shape {place.shape}, expected numbers of shape {expected} "
            f"with N from 1 to {most_rows}"
        )
    settings = place.id.get_create_plist()
    filters = {settings.get_filter(i)[0] for i in range(settings.get_nfilters())}
    chunk = int(np.prod(place.chunks)) if place.chunks else 0
    if not filters <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}:
        raise ValueError(f"{name} is packed in another way than gzip")
    if chunk > most_rows * 256:
        raise ValueError(f"{name} lies in pieces of {chunk} numbers, which {most_rows} rows do not need")
    return place[()]


def _pool(pixels: np.ndarray, digits: np.ndarray, most_rows: int, scale: str, names: str) -> Pool:
    """Images (N, 1, 16, 16) in [0, 1] and their digits, checked."""
    if len(digits) != len(pixels):
        raise ValueError(f"it has {len(digits)} labels for {len(pixels)} images")
    if not 1 <= len(pixels) <= most_rows:
        raise ValueError(f"it has {len(pixels)} rows, expected 1 to {most_rows}")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"expected {scale}, got others")
    wrong = ~np.isin(digits, np.arange(10))
    if wrong.any():
        raise ValueError(f"expected {names}, got another in row {int(np.argmax(wrong))}")
    return Pool(pixels.reshape(-1, 1, 16, 16), digits.astype(np.int64))


USPS = ImageSet(
    name="usps",
    class_names=tuple("0123456789"),
    pair=(0, 2),
    white=1,
    statistics=None,
    read=_read,
    layout=_LAYOUT,
    downloads=tuple(Download(_URL + name, md5, "usps") for name, md5 in _LIBSVM),
)
