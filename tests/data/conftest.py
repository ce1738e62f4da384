"""CIFAR-10 batches as Python 2 wrote the official ones (pickle protocol 2, strings of bytes), and a server."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import Server, serving

BATCHES = {f"data_batch_{i}": f"training batch {i} of 5" for i in range(1, 6)}
BATCHES["test_batch"] = "testing batch 1 of 1"


def python2_pickle(value: Any) -> bytes:
    """A pickle with the instructions of the official files."""
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value: Any) -> bytes:
    match value:
        case dict():
            body = b"".join(_encode(k.encode()) + _encode(v) for k, v in value.items())
            return b"}(" + body + b"u"
        case list():  # cPickle appends in groups of 1000
            groups = [value[i : i + 1000] for i in range(0, len(value), 1000)]
            return b"]" + b"".join(b"(" + b"".join(map(_encode, group)) + b"e" for group in groups)
        case bytes() if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case int() if 0 <= value < 256:
            return b"K" + bytes([value])
        case int() if 0 <= value < 65536:
            return b"M" + struct.pack("<H", value)
        case int():
            return b"J" + struct.pack("<i", value)
        case np.ndarray():
            shape = b"(" + b"".join(map(_encode, value.shape)) + b"t"
            code = value.dtype.str[1:].encode()
            dtype = b"cnumpy\ndtype\n" + _encode(code) + b"K\0K\x01\x87R"  # dtype(code, 0, 1)
            dtype += b"(K\x03" + _encode(value.dtype.str[:1].encode()) + b"NNN" + _encode(-1) * 2 + b"K\0tb"
            array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\0\x85U\x01b\x87R"
            return array + b"(K\x01" + shape + dtype + b"\x89" + _encode(value.tobytes()) + b"tb"
    raise TypeError(type(value))


def batch_entries(name: str, rows: int, seed: int = 0) -> dict[str, Any]:
    """A batch of random images; classes 0 ... 9 in turn, so that every class has rows / 10 of them."""
    random = np.random.default_rng([seed, list(BATCHES).index(name)])
    return {
        "batch_label": BATCHES[name].encode(),
        "labels": [row % 10 for row in range(rows)],
        "data": random.integers(0, 256, (rows, 3072), dtype=np.uint8),
        "filenames": [f"{name}_{row:06d}.png".encode() for row in range(rows)],
    }


@pytest.fixture
def write_cifar(tmp_path: Path) -> Callable[..., Path]:
    """`write_cifar(rows=20, below="")` writes all six batches and returns the root that holds them."""

    def write(rows: int = 20, below: str = "") -> Path:
        folder = tmp_path / "root" / below / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        for name in BATCHES:
            (folder / name).write_bytes(python2_pickle(batch_entries(name, rows)))
        return tmp_path / "root"

    return write


@pytest.fixture
def cifar_batch() -> Callable[..., dict[str, Any]]:
    """`batch_entries`."""
    return batch_entries


@pytest.fixture
def as_python2() -> Callable[[Any], bytes]:
    """`python2_pickle`."""
    return python2_pickle


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on the loopback address, reached without any proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as state:
        yield state
