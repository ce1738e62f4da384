"""Reads pickles of plain values and byte arrays without ever running anything that they name.

A pickle is a program: `pickle.load` calls whatever function the file asks for. The reader here knows only the
instructions that the CIFAR-10 files (and re-saved parts of them) need, and the names it answers to, those of
numpy's array and dtype, stand for inert records that are checked and turned into an array afterwards.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

__all__ = ["PickledArray", "load_plain"]


class PickledArray:
    """What the file says about one array; `numpy()` checks it."""

    state: Any = None

    def __init__(self, *args: object) -> None:
        """Takes what `numpy.core.multiarray._reconstruct` takes, and ignores it: `state` has it all."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        """The array, uint8, read-only.

        Raises:
            ValueError: where shape, dtype and bytes do not describe such an array.
        """
        match self.state:
            case (1, tuple(shape), _PickledDtype(code=b"u1" | "u1"), bool(fortran), bytes(values)):
                pass
            case _:
                raise ValueError("the array in it is not one of uint8")
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("the array in it has no valid shape")
        if math.prod(shape) != len(values):
            raise ValueError(f"the array in it has {len(values)} bytes for shape {shape}")
        return np.frombuffer(values, np.uint8).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    """What the file says about one dtype."""

    code: Any = None

    def __init__(self, code: object = None, *flags: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and field names: one byte has neither."""


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _PickledDtype,
}

_INSTRUCTIONS = (
    # Protocol 2, as Python 2 wrote the official files.
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("SHORT_BINSTRING", "BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "REDUCE", "BUILD"),
    # Protocols 3 and 4, in which Python 3 saves parts of them.
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "STACK_GLOBAL", "MEMOIZE", "FRAME"),
)


class _Refused(ValueError):
    """What the file asks for is not given."""


class _Unpickler(pickle._Unpickler):
    # The Python version, not the C one: its table of instructions can be cut down, and its memo is a dict,
    # which a file cannot blow up.
    dispatch = {  # noqa: RUF012  same kind of attribute as in the base class
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _INSTRUCTIONS
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, which no batch needs; nothing was run") from None


def load_plain(data: bytes) -> Any:
    """The value in a pickle of dicts, lists, tuples, strings, integers and uint8 arrays.

    Strings of Python 2 come as bytes, arrays as `PickledArray`.

    Raises:
        ValueError: for anything else, with the reason.
    """
    try:
        return _Unpickler(io.BytesIO(data), fix_imports=False, encoding="bytes").load()
    except _Refused:
        raise
    except Exception as error:  # a damaged file can fail in any way; what it said is data, not our bug
        reason = str(error) or type(error).__name__
        raise ValueError(f"it is cut short, damaged or no such pickle ({reason})") from error
