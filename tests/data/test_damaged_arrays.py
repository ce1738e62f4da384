"""Damaged files of arrays: MATLAB (SVHN), LIBSVM's text and HDF5 (USPS)."""

from __future__ import annotations

import bz2
import struct
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import FORMATS, outcome

import catapult_ext as cx

X, Y = np.zeros((32, 32, 3, 30), np.uint8), np.ones((30, 1), np.uint8)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"X": X}, "it has the variables X; expected X and y"),
        ({}, "it has the variables none; expected X and y"),
        ({"X": X.astype(float), "y": Y}, "X is double of shape"),
        (
            {"X": X[:31], "y": Y},
            r"X is uint8 of shape (31, 32, 3, 30), expected uint8 of shape (32, 32, 3, N)",
        ),
        ({"X": np.moveaxis(X, 3, 0), "y": Y}, "X is uint8 of shape (30, 32, 32, 3)"),
        ({"X": X, "y": Y[:29]}, "y is uint8 of shape (29, 1), expected numbers of shape (30, 1)"),
        ({"X": X, "y": Y * 11}, "label 0 is 11, expected a digit from 1 to 10 (10 stands for 0)"),
        ({"X": X, "y": Y * 0}, "label 0 is 0, expected a digit from 1 to 10"),
        ({"X": X, "y": Y * 1.5}, "label 0 is 1.5, expected a digit"),
        ({"X": X, "y": Y * np.nan}, "label 0 is nan, expected a digit"),
        ({"X": X, "y": Y.astype(object)}, "y is cell of shape (30, 1), expected numbers"),
        ({"X": {"a": X}, "y": Y}, "X is struct of shape"),
        ({"X": X, "y": Y, "more": X}, "it has the variables X, y, more; expected X and y"),
        ({"X": X, "y": Y * 1j}, "it holds something else than real arrays of at most 4 dimensions"),
        ({"X": X[..., None], "y": Y}, "it holds something else than real arrays of at most 4 dimensions"),
    ],
)
def test_wrong_svhn_variables_are_named(tmp_path, variables, reason):
    FORMATS["svhn"][1](tmp_path)
    scipy.io.savemat(tmp_path / "train_32x32.mat", variables, do_compression=True)
    said = outcome("svhn", tmp_path)
    assert "train_32x32.mat is no file of SVHN digits" in said
    assert reason in said


def test_svhn_of_more_rows_than_there_are(tmp_path):
    FORMATS["svhn"][1](tmp_path)
    shape = (32, 32, 3, 26_033)
    scipy.io.savemat(
        tmp_path / "test_32x32.mat",
        {"X": np.zeros(shape, np.uint8), "y": np.ones((shape[-1], 1), np.uint8)},
        do_compression=True,
    )
    assert (
        f"X is uint8 of shape {shape}, expected uint8 of shape (32, 32, 3, N) with N from 1 to 26032"
        in outcome("svhn", tmp_path)
    )


def packed_again(path, change, more=b""):
    """The first variable of a file of SciPy's, changed and packed with more behind it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<I", content[132:136])
    array = bytearray(zlib.decompress(content[136 : 136 + size]))
    at = bytes(array).index(struct.pack("<II", 2, X.size))  # type (uint8) and size of the pixels
    change(array, at)
    packed = zlib.compress(bytes(array) + more, 9)
    path.write_bytes(content[:128] + struct.pack("<II", 15, len(packed)) + packed + content[136 + size :])


def tells_of_2_gb(array, at):
    array[at + 4 : at + 8] = struct.pack("<I", 2_000_000_000)


def tells_of_no_type(array, at):
    array[at : at + 4] = struct.pack("<I", 35_330)


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        (tells_of_2_gb, bytes(60_000_000), "X is not stored as numbers of its shape (32, 32, 3, 30)"),
        (tells_of_no_type, b"", "X is not stored as numbers of its shape (32, 32, 3, 30)"),
        (lambda array, at: None, bytes(1_000_000), "Did not fully consume"),
    ],
)
def test_svhn_bombs_and_lies_are_found_out_before_they_are_unpacked(tmp_path, change, more, reason):
    FORMATS["svhn"][1](tmp_path)
    path = tmp_path / "train_32x32.mat"
    scipy.io.savemat(path, {"X": X, "y": Y}, do_compression=True)
    packed_again(path, change, more)
    tracemalloc.start()
    said = outcome("svhn", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason in said
    assert peak < 20_000_000


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_svhn_headers_crash_nothing(svhn_parts, data):
    """The heads of both variables, not packed, so that every change arrives at the reader."""
    root, good = svhn_parts
    changed = bytearray(good)
    heads = [*range(100, 260), *range(len(good) - 120, len(good))]
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.sampled_from(heads))] = data.draw(st.integers(0, 255))
    (root / "train_32x32.mat").write_bytes(changed)
    said = outcome("svhn", root)
    assert said == "images" or "train_32x32.mat is no file of SVHN digits" in said


@pytest.fixture(scope="module")
def svhn_parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("svhn")
    FORMATS["svhn"][1](root)
    parts = scipy.io.loadmat(root / "train_32x32.mat")
    scipy.io.savemat(root / "train_32x32.mat", {"X": parts["X"], "y": parts["y"]})
    return root, (root / "train_32x32.mat").read_bytes()


def test_matlab_7_3_is_named(tmp_path):
    FORMATS["svhn"][1](tmp_path)
    with h5py.File(tmp_path / "train_32x32.mat", "w", userblock_size=512) as file:
        file["X"] = np.zeros((2, 3, 32, 32), np.uint8)
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    content = (tmp_path / "train_32x32.mat").read_bytes()
    (tmp_path / "train_32x32.mat").write_bytes(header + content[128:])
    assert "it is a MATLAB file v7.3, expected v5" in outcome("svhn", tmp_path)


ROW = " ".join(f"{i}:0.5" for i in range(1, 257))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([f"11 {ROW}"] * 9, "expected labels from 1 to 10, got another in row 0"),
        ([f"1 {ROW}", f"1.5 {ROW}"], "expected labels from 1 to 10, got another in row 1"),
        ([f"1 {ROW} 257:0.5"], "256"),
        (["1 0:0.5"], "nvalid index 0"),
        (["1 1:1.5"], "expected values from -1 to 1"),
        (["1 1:nan"], "expected values from -1 to 1"),
        (["1 1:x"], "is no file of USPS digits"),
        (["1 1:0.5"] * 7292, "it has 7292 rows, expected 1 to 7291"),
        (["1 1:0.5 " + " " * 50_000_000], "it unpacks to more than the 44795904 bytes"),
        ([], "is no file of USPS digits"),
    ],
)
def test_wrong_libsvm_files_are_named(tmp_path, lines, reason):
    FORMATS["usps-libsvm"][1](tmp_path)
    (tmp_path / "usps.bz2").write_bytes(bz2.compress("\n".join(lines).encode(), 1))
    said = outcome("usps", tmp_path)
    assert "usps.bz2 is no file of USPS digits" in said
    assert reason in said


def hdf5(change):
    """A file of USPS digits after `change(file)`, which may delete and add."""

    def write(path):
        with h5py.File(path, "a") as file:
            change(file)

    return write


def replace(name, **options):
    def change(file):
        del file[name]
        if options:
            file.create_dataset(name, **options)

    return hdf5(change)


def linked(link):
    def change(file):
        del file["train/data"]
        file["train/data"] = link

    return hdf5(change)


@hdf5
def virtual(file):
    del file["train/data"]
    layout = h5py.VirtualLayout((40, 256), np.float32)
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (40, 256))
    file.create_virtual_dataset("train/data", layout)


FLOATS = np.zeros((40, 256), np.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace("train/data"), "it has no array train/data of its own"),
        (replace("test"), "it has no array test/data of its own"),
        (linked(h5py.ExternalLink("/etc/other.h5", "x")), "it has no array train/data of its own"),
        (linked(h5py.SoftLink("/test/data")), "it has no array train/data of its own"),
        (virtual, "it has no array train/data of its own"),
        (
            replace("train/data", data=FLOATS[:, :255]),
            "train/data is float32 of shape (40, 255), expected numbers",
        ),
        (replace("train/data", data=FLOATS[:30]), "it has 40 labels for 30 images"),
        (replace("train/data", data=FLOATS + 2), "expected train/data from 0 to 1"),
        (replace("train/data", data=FLOATS * np.nan), "expected train/data from 0 to 1"),
        (replace("train/data", shape=(40, 256), dtype=h5py.string_dtype()), "train/data is object of shape"),
        (replace("train/data", shape=(10**9, 256), dtype="f4", chunks=(9, 9)), "with N from 1 to 7291"),
        (
            replace("train/data", shape=(40, 256), dtype="f4", maxshape=(None, 256), chunks=(10**6, 256)),
            "train/data lies in pieces of 256000000 numbers",
        ),
        (
            replace("train/data", data=FLOATS, compression="lzf"),
            "train/data is packed in another way than gzip",
        ),
        (
            replace("train/target", data=np.full(40, 10)),
            "expected train/target from 0 to 9, got another in row 0",
        ),
        (replace("train/target", data=np.full(40, 0.5)), "expected train/target from 0 to 9"),
    ],
)
def test_wrong_hdf5_files_are_named(tmp_path, change, reason):
    FORMATS["usps-h5"][1](tmp_path)
    change(tmp_path / "usps.h5")
    said = outcome("usps", tmp_path)
    assert "usps.h5 is no file of USPS digits" in said
    assert reason in said


def test_hdf5_values_in_another_file_are_not_read(tmp_path):
    FORMATS["usps-h5"][1](tmp_path)
    (tmp_path / "secret").write_bytes(FLOATS.tobytes())
    with h5py.File(tmp_path / "usps.h5", "a") as file:
        del file["train/data"]
        file.create_dataset(
            "train/data", (40, 256), "f4", external=[(str(tmp_path / "secret"), 0, FLOATS.nbytes)]
        )
    assert "it has no array train/data of its own" in outcome("usps", tmp_path)


def test_two_releases_of_usps_are_not_guessed_between(tmp_path):
    FORMATS["usps-h5"][1](tmp_path)
    FORMATS["usps-libsvm"][1](tmp_path)
    with pytest.raises(ValueError, match=r"both usps\.h5 and usps\.bz2 are under .*different pixels"):
        cx.data.load("usps", train=4, root=tmp_path)
