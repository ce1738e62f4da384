"""Missing, short, corrupt, wrong-shaped and wrongly labelled files: one line that says what to put where."""

from __future__ import annotations

import bz2
import gzip
import pickle
import struct
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import FORMATS, idx, jpeg
from PIL import Image

import catapult_ext as cx


def outcome(name: str, root, **options) -> str:
    """The word "images", or the one line of the error."""
    try:
        split = cx.data.load(name, train=4, test=2, root=root, **options)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        assert split.train.x.isfinite().all()
        return "images"
    assert "\n" not in message
    assert "put " in message, message
    return message


def files_of(root):
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".jpg")


@pytest.mark.parametrize("form", FORMATS)
def test_each_missing_file_is_named(form, tmp_path):
    name, write, _ = FORMATS[form]
    assert "put " in outcome(name, tmp_path)
    write(tmp_path)
    assert outcome(name, tmp_path) == "images"
    for path in files_of(tmp_path):
        content = path.read_bytes()
        path.unlink()
        assert path.name in outcome(name, tmp_path), path.name
        path.write_bytes(content)
    assert outcome(name, tmp_path) == "images"


@pytest.mark.parametrize("form", FORMATS)
def test_cut_files_and_changed_bytes_give_images_or_one_line(form, tmp_path):
    """HDF5 files are only cut, not changed: its C library may crash on what is not what it says."""
    name, write, _ = FORMATS[form]
    write(tmp_path)
    paths = files_of(tmp_path)
    contents = {path: path.read_bytes() for path in paths}

    @given(st.data())
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(data):
        path = data.draw(st.sampled_from(paths))
        good = contents[path]
        at = data.draw(st.integers(0, len(good) - 1) | st.integers(0, min(400, len(good) - 1)))
        if path.suffix == ".h5" or data.draw(st.booleans()):
            path.write_bytes(good[:at])
        else:
            path.write_bytes(good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :])
        try:
            said = outcome(name, tmp_path)
            assert said == "images" or path.name in said or path.stem in said, said
        finally:
            path.write_bytes(good)

    check()
    assert outcome(name, tmp_path) == "images"


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_file_and_a_folder_in_its_place_are_named(form, tmp_path):
    name, write, _ = FORMATS[form]
    write(tmp_path)
    for path in files_of(tmp_path):
        content = path.read_bytes()
        path.write_bytes(b"")
        assert path.name in outcome(name, tmp_path), path.name
        path.unlink()
        path.mkdir()
        assert path.name in outcome(name, tmp_path), path.name
        path.rmdir()
        path.write_bytes(content)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.startswith(("svhn", "usps-libsvm", "fashion"))])
def test_one_file_under_two_names_is_found_out(form, tmp_path):
    name, write, _ = FORMATS[form]
    write(tmp_path, (20, 20))
    train, test = {
        "svhn": ("train_32x32.mat", "test_32x32.mat"),
        "usps": ("usps.bz2", "usps.t.bz2"),
        "fashion-mnist": (
            "fashion-mnist/train-images-idx3-ubyte.gz",
            "fashion-mnist/t10k-images-idx3-ubyte.gz",
        ),
    }[name]
    (tmp_path / test).write_bytes((tmp_path / train).read_bytes())
    assert "hold the same bytes" in outcome(name, tmp_path)


# ---- format by format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, "it has 0 bytes"),
        (3072, "it has 3072 bytes, expected N x 3073"),
        (3073 * 10_001, "N from 1 to 10000"),
    ],
)
def test_cifar10_binary_of_another_size(tmp_path, size, reason):
    FORMATS["cifar10-binary"][1](tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(bytes(size))
    said = outcome("cifar10", tmp_path)
    assert "data_batch_2.bin is no CIFAR-10 batch" in said
    assert reason in said


def test_cifar10_binary_with_another_label(tmp_path):
    FORMATS["cifar10-binary"][1](tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
    assert "label 1 is 10, expected a class from 0 to 9" in outcome("cifar10", tmp_path)


def test_pickled_and_binary_cifar10_are_not_guessed_between(write_cifar):
    root = write_cifar()
    FORMATS["cifar10-binary"][1](root)
    with pytest.raises(ValueError, match=r"several of .*cifar-10-batches-py, cifar-10-batches-bin"):
        cx.data.load("cifar10", train=4, root=root)


X, Y = np.zeros((32, 32, 3, 30), np.uint8), np.ones((30, 1), np.uint8)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"X": X}, "it has the variables X, expected X and y"),
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
        ({"X": X, "y": Y, "more": np.zeros(3_000_000)}, "it unpacks to more than"),
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


def test_svhn_bomb_is_not_unpacked(tmp_path):
    """The header tells of 30 images; what is packed after it would fill 60 MB and tells of 2 GB."""
    FORMATS["svhn"][1](tmp_path)
    path = tmp_path / "train_32x32.mat"
    scipy.io.savemat(path, {"X": X, "y": Y}, do_compression=True)
    content = path.read_bytes()
    (size,) = struct.unpack("<I", content[132:136])
    array = bytearray(zlib.decompress(content[136 : 136 + size]))
    at = bytes(array).index(struct.pack("<II", 2, X.size))  # uint8 and how many bytes of them
    array[at + 4 : at + 8] = struct.pack("<I", 2_000_000_000)
    packer = zlib.compressobj(9)
    packed = packer.compress(bytes(array)) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(60))
    packed += packer.flush()
    path.write_bytes(content[:128] + struct.pack("<II", 15, len(packed)) + packed + content[136 + size :])
    assert "it unpacks to more than" in outcome("svhn", tmp_path)


def test_matlab_7_3_is_named(tmp_path):
    FORMATS["svhn"][1](tmp_path)
    with h5py.File(tmp_path / "train_32x32.mat", "w", userblock_size=512) as file:
        file["X"] = np.zeros((2, 3, 32, 32), np.uint8)
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    content = (tmp_path / "train_32x32.mat").read_bytes()
    (tmp_path / "train_32x32.mat").write_bytes(header + content[128:])
    assert "it is a MATLAB v7.3 file, expected v5" in outcome("svhn", tmp_path)


PIXELS = np.zeros((20, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("images", idx(np.zeros(20, np.uint8)), "it starts with 0x00000801, expected 0x00000803"),
        ("images", idx(PIXELS[:, :27]), "it has shape (20, 27, 28), expected (N, 28, 28)"),
        ("images", idx(np.zeros((60_001, 28, 28), np.uint8)), "with N from 1 to 60000"),
        ("images", gzip.compress(gzip.decompress(idx(PIXELS))[:-1]), "it has 15679 values, expected 15680"),
        ("images", gzip.compress(gzip.decompress(idx(PIXELS)) + b"\0"), "it has more than 15680 values"),
        ("images", gzip.compress(b""), "it starts with nothing"),
        ("images", idx(PIXELS)[:-9], "it cannot be read or is damaged"),
        ("images", b"no gzip", "it cannot be read or is damaged (BadGzipFile"),
        ("labels", idx(np.full(40, 10, np.uint8)), "label 0 is 10, expected a class from 0 to 9"),
        ("labels", idx(np.zeros(39, np.uint8)), "it has 39 labels for 40 images"),
    ],
)
def test_wrong_idx_files_are_named(tmp_path, kind, content, reason):
    FORMATS["fashion-mnist"][1](tmp_path)
    name = {"images": "train-images-idx3-ubyte.gz", "labels": "train-labels-idx1-ubyte.gz"}[kind]
    (tmp_path / "fashion-mnist" / name).write_bytes(content)
    said = outcome("fashion-mnist", tmp_path)
    assert f"{name} is no idx file of {kind}" in said
    assert reason in said


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path):
    FORMATS["fashion-mnist"][1](tmp_path)
    (tmp_path / "fashion-mnist").rename(tmp_path / "mnist")
    assert "MNIST has files of the same names" in outcome("fashion-mnist", tmp_path)
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "mnist").rename(tmp_path / "FashionMNIST" / "raw")  # where torchvision keeps them
    assert outcome("fashion-mnist", tmp_path) == "images"


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


def test_wrong_cifar10_jpegs_are_named(tmp_path):
    FORMATS["cifar10-jpeg"][1](tmp_path)
    labels = np.load(tmp_path / "train_labels.npy")

    class Runs:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    (tmp_path / "train_labels.npy").write_bytes(pickle.dumps(Runs()))
    assert "train_labels.npy is no list of labels" in outcome("cifar10-jpeg", tmp_path)
    np.save(tmp_path / "train_labels.npy", np.array([Runs()], dtype=object))
    assert "train_labels.npy is no list of labels" in outcome("cifar10-jpeg", tmp_path)
    assert not (tmp_path / "ran").exists()
    for wrong, reason in (
        (labels.astype(np.int64), "it holds int64 of shape (40,), expected uint8 of shape (N,)"),
        (labels[:, None], "it holds uint8 of shape (40, 1)"),
        (labels + 1, "is 10, expected a class from 0 to 9"),
        (labels[:39], "it has 40 images under train/ but train_labels.npy tells of 39"),
        (labels[::-1] * 0, "it has 40 images under train/ but train_labels.npy tells of 40; train/"),
    ):
        np.save(tmp_path / "train_labels.npy", wrong)
        assert reason in outcome("cifar10-jpeg", tmp_path)


def celeba_with(root, member: str, content: bytes) -> str:
    FORMATS["celeba-zip"][1](root)
    with zipfile.ZipFile(root / "img_align_celeba.zip") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, own in contents.items():
            archive.writestr(name, content if name == member else own)
        if member not in contents:
            archive.writestr(member, content)
    try:
        split = cx.data.load("celeba", train=8, validation=8, test=8, root=root)
    except ValueError as error:
        return str(error)
    assert split.train.x.isfinite().all()
    return "images"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (jpeg(0, 177, 218), "the image is 177 x 218 pixels, expected 178 x 218"),
        (jpeg(0, 178, 218)[:-300], "000001.jpg in it cannot be used (image file is truncated"),
        (bytes(1 << 21), "000001.jpg in it has 2097152 bytes, expected at most 1048576"),
        (b"GIF89a", "000001.jpg in it cannot be used (cannot identify image file"),
    ],
)
def test_wrong_celeba_images_are_named(tmp_path, content, reason):
    said = celeba_with(tmp_path, "img_align_celeba/000001.jpg", content)
    assert "img_align_celeba.zip is no collection of CelebA images" in said
    assert reason in said


def test_other_image_formats_are_not_opened(tmp_path):
    png = tmp_path / "x.png"
    Image.new("RGB", (178, 218)).save(png)
    said = celeba_with(tmp_path, "img_align_celeba/000001.jpg", png.read_bytes())
    assert "cannot identify image file" in said


def test_paths_in_an_archive_lead_nowhere(tmp_path):
    before = {path for path in tmp_path.parent.rglob("*")}
    said = celeba_with(tmp_path, "../../img_align_celeba/000002.jpg", jpeg(0, 178, 218))
    assert said == "images"  # of those that belong there
    after = {path for path in tmp_path.parent.rglob("*")} - before
    assert {path.parent for path in after} == {tmp_path}


def test_members_of_one_name_are_not_guessed_between(tmp_path):
    FORMATS["celeba-zip"][1](tmp_path)
    with (
        zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("img_align_celeba/000001.jpg", b"")
    assert "it has several members img_align_celeba/000001.jpg" in outcome("celeba", tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("list_attr_celeba.txt", "24\r\n", "25\r\n", "its first line announces 25 images, but 24 follow"),
        ("list_attr_celeba.txt", "24\r\n", "", "expected the number of images, the names of the attributes"),
        ("list_attr_celeba.txt", " Smiling", "", "its second line names 39 attributes, expected 40"),
        ("list_attr_celeba.txt", "000004.jpg ", "000004.jpg 3 ", "expected a name and 40 times 1 or -1"),
        (
            "list_attr_celeba.txt",
            "000004.jpg",
            "000005.jpg",
            "it leaves out 1 of 24 images, such as 000004.jpg",
        ),
        ("list_eval_partition.txt", "000004.jpg 1", "000004.jpg 3", "expected a name and 0, 1 or 2"),
        (
            "list_eval_partition.txt",
            "000004.jpg",
            "000005.jpg",
            "it leaves out 1 of 24 images, such as 000004.jpg",
        ),
    ],
)
def test_wrong_celeba_lists_are_named(tmp_path, name, old, new, reason):
    FORMATS["celeba-zip"][1](tmp_path)
    text = (tmp_path / name).read_bytes().decode()
    part = {"000004.jpg 1": text[text.index("000004.jpg") :][:12]}.get(old, old)
    assert part in text
    (tmp_path / name).write_bytes(text.replace(part, new, 1).encode())
    said = outcome("celeba", tmp_path)
    assert f"{name} is no list of" in said
    assert reason in said
