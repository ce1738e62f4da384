"""SVHN, cropped digits (format 2), from MATLAB v5 files.

Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS workshop 2011.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from catapult_ext.data.files import find_one, form_of, parsing, record
from catapult_ext.data.image_set import Download, ImageSet, Pool, Reading

__all__ = ["SVHN"]

_URL = "http://ufldl.stanford.edu/housenumbers/"
# File, rows of the official one, its published MD5 sum.
_FILES = (
    ("train_32x32.mat", 73_257, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    ("test_32x32.mat", 26_032, "eb5a983be6a315427106f1b164d9cef3"),
)
_LAYOUT = f"put train_32x32.mat and test_32x32.mat (cropped digits) of {_URL} there"

# A house number of the set has at most 6 digits, and its crops follow one another.
_DIGITS_OF_A_PHOTO = 6

_NUMBERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "single", "double")


def _read(root: Path) -> Reading:
    pools, files = [], []
    for name, rows, md5 in _FILES:
        path = find_one(root, name, layout=_LAYOUT)
        with parsing(path, "file of SVHN digits", _LAYOUT):
            pool = _parse(path, rows)
        files.append(record(root, path, md5, rows=len(pool.labels)))
        pools.append(pool)
    complete = [file["rows"] for file in files] == [rows for _, rows, _ in _FILES]
    return Reading(form_of(files, complete), files, pools[0], pools[1])


def _parse(path: Path, most_rows: int) -> Pool:
    """The images, a view of the uint8 array in the file, and their digits.

    Raises:
        ValueError: with the reason.
    """
    from scipy.io import loadmat, whosmat  # slow to import, needed here only

    try:
        listed = whosmat(path)
    except NotImplementedError:
        raise ValueError("it is a MATLAB v7.3 file, expected v5 (save with -v7)") from None
    variables = {name: (shape, kind) for name, shape, kind in listed}
    if not {"X", "y"} <= set(variables) or len(variables) < len(listed):
        raise ValueError(
            f"it has the variables {', '.join(n for n, _, _ in listed) or 'none'}, expected X and y"
        )
    (shape, kind), (label_shape, label_kind) = variables["X"], variables["y"]
    rows = shape[-1] if shape else 0
    if kind != "uint8" or len(shape) != 4 or shape[:3] != (32, 32, 3) or not 1 <= rows <= most_rows:
        raise ValueError(
            f"X is {kind} of shape {shape}, expected uint8 of shape (32, 32, 3, N) with N from 1 to {most_rows}"
        )
    if label_kind not in _NUMBERS or label_shape != (rows, 1):
        raise ValueError(f"y is {label_kind} of shape {label_shape}, expected numbers of shape ({rows}, 1)")
    _check_size(path, limit=(3072 + 8) * rows + (1 << 20))

    arrays = loadmat(path, variable_names=["X", "y"])
    digits = arrays["y"][:, 0].astype(np.float64)  # [N], 10 stands for the digit 0
    wrong = ~np.isin(digits, np.arange(1, 11))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"label {row} is {digits[row]:g}, expected a digit from 1 to 10 (10 stands for 0)")
    if arrays["X"].dtype != np.uint8:
        raise ValueError(f"X is {arrays['X'].dtype}, expected uint8")
    images = arrays["X"].transpose(3, 2, 0, 1)  # [N, 3, 32, 32]
    return Pool(images, digits.astype(np.int64) % 10)


def _check_size(path: Path, limit: int) -> None:
    """Raise where the file unpacks to more bytes than its arrays need; unpacks piece by piece and keeps none.

    Source: "Level 5 MAT-File Format", MathWorks: 128 bytes of header, then elements, each with its type and
    size first; type 15 is a zlib stream.
    """
    size = 0
    with path.open("rb") as file:
        order = "<" if file.read(128)[126:128] == b"IM" else ">"
        while len(tag := file.read(8)) == 8:
            kind, left = struct.unpack(order + "II", tag)
            if kind != 15:
                size += left
            else:
                unpacker = zlib.decompressobj()
                while left and size <= limit and not unpacker.eof:
                    piece = file.read(min(left, 1 << 16))
                    if not piece:
                        raise ValueError("it is cut short")
                    left -= len(piece)
                    while piece and size <= limit:
                        size += len(unpacker.decompress(piece, 1 << 20))
                        piece = unpacker.unconsumed_tail
            if size > limit:
                raise ValueError(f"it unpacks to more than {limit} bytes, which X and y do not need")
            file.seek(left, 1)


SVHN = ImageSet(
    name="svhn",
    class_names=tuple("0123456789"),
    pair=(0, 2),
    white=255,
    statistics=None,
    read=_read,
    neighbours=_DIGITS_OF_A_PHOTO,
    layout=_LAYOUT,
    downloads=tuple(Download(_URL + name, md5, "svhn") for name, _, md5 in _FILES),
)
