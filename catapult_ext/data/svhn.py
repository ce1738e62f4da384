"""SVHN, cropped digits (format 2), from MATLAB v5 files.

Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS workshop 2011.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    from scipy.io import loadmat  # slow to import, needed here only

    variables = [_describe(order, head) for order, head in _elements(path)]
    if sorted(variable.name for variable in variables) != ["X", "y"]:
        names = ", ".join(variable.name for variable in variables) or "none"
        raise ValueError(f"it has the variables {names}; expected X and y")
    x, y = sorted(variables, key=lambda variable: variable.name)
    rows = x.shape[-1]
    if x.kind != "uint8" or x.shape[:-1] != (32, 32, 3) or not 1 <= rows <= most_rows:
        raise ValueError(
            f"X is {x.kind} of shape {x.shape}, expected uint8 of shape (32, 32, 3, N) "
            f"with N from 1 to {most_rows}"
        )
    if y.kind not in _NUMBERS or y.shape != (rows, 1):
        raise ValueError(f"y is {y.kind} of shape {y.shape}, expected numbers of shape ({rows}, 1)")
    for variable in (x, y):
        size = math.prod(variable.shape) * _BYTES.get(variable.stored_as, 0)
        if size == 0 or variable.size != size or (variable is x and variable.stored_as != 2):
            raise ValueError(f"{variable.name} is not stored as numbers of its shape {variable.shape}")

    arrays = loadmat(path, variable_names=["X", "y"])
    digits = arrays["y"][:, 0].astype(np.float64)  # [N], 10 stands for the digit 0
    wrong = ~np.isin(digits, np.arange(1, 11))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"label {row} is {digits[row]:g}, expected a digit from 1 to 10 (10 stands for 0)")
    images = arrays["X"].transpose(3, 2, 0, 1)  # [N, 3, 32, 32]
    return Pool(images, digits.astype(np.int64) % 10)


# SciPy's reader looks up the stored types of a file in tables without a check and fetches as many bytes as the file
# tells, so that a damaged file can crash it or fill the memory. What it relies on is therefore read here first.
# Source: "MAT-File Level 5 File Format", MathWorks.

_KINDS = dict(
    enumerate(
        (
            *("cell", "struct", "object", "char", "sparse", "double", "single", "int8"),
            *("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        ),
        start=1,
    )
)
_NUMBERS = ("double", "single", "int8", "uint8", "int16", "uint16", "int32", "uint32")
_BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8}  # of one number of each stored type
_HEAD = 128  # bytes of an element that hold all but its values, where dimensions and name are few


@dataclass(frozen=True)
class _Variable:
    """What an element says about its array: `size` bytes of the type `stored_as`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    stored_as: int
    size: int


def _elements(path: Path) -> Iterator[tuple[str, bytes]]:
    """Byte order and the first bytes of each element, unpacked."""
    with path.open("rb") as file:
        header = file.read(128)
        order = {b"IM": "<", b"MI": ">"}.get(header[126:])
        if order is None:
            raise ValueError("it is no MATLAB file")
        (version,) = struct.unpack(order + "H", header[124:126])
        if version != 0x100:
            which = "v7.3" if version == 0x200 else "of another version"
            raise ValueError(f"it is a MATLAB file {which}, expected v5 (save with -v7)")
        while tag := file.read(8):
            kind, size = struct.unpack(order + "II", tag)
            end = file.tell() + size
            start = file.read(min(size, 4096))
            packed = kind == 15
            yield order, zlib.decompressobj().decompress(start, _HEAD) if packed else (tag + start)[:_HEAD]
            file.seek(end)


def _describe(order: str, head: bytes) -> _Variable:
    """What the head of an element says.

    Raises:
        ValueError: where it is not that of an array.
    """
    words = struct.unpack_from(order + "8I", head)
    flags, dimensions = words[4], words[7] // 4
    if (words[0], *words[2:4], words[6]) != (14, 6, 8, 5) or words[7] not in (8, 12, 16) or flags & 0x800:
        raise ValueError("it holds something else than real arrays of at most 4 dimensions")
    shape = struct.unpack_from(f"{order}{dimensions}i", head, 32)
    kind, size, at, after = _tag(order, head, 32 + 8 * -(-dimensions // 2))
    name = head[at : at + size]
    if kind != 1 or after > _HEAD - 8 or min(shape) < 0:
        raise ValueError("it holds an array with a name or a shape that cannot be")
    stored_as, size, _, _ = _tag(order, head, after)
    own_kind = _KINDS.get(flags & 0xFF, "of an unknown kind")
    return _Variable(name.decode("ascii", "replace"), own_kind, shape, stored_as, size)


def _tag(order: str, head: bytes, at: int) -> tuple[int, int, int, int]:
    """Type and size of the part that begins at `at`, and where its values and the next part begin."""
    kind, size = struct.unpack_from(order + "II", head, at)
    if kind >> 16:  # small: size and type share a word, and up to four bytes of values follow
        return kind & 0xFFFF, kind >> 16, at + 4, at + 8
    return kind, size, at + 8, at + 8 + 8 * -(-size // 8)


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
