"""Missing, short, corrupt, wrong-shaped and wrongly labelled files: one line that says what to put where."""

from __future__ import annotations

import gzip
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import FORMATS, idx, jpeg, outcome
from PIL import Image

import catapult_ext as cx


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


PIXELS = np.zeros((20, 28, 28), np.uint8)


def packed(content):
    return gzip.compress(content, 1, mtime=0)  # the bytes are in the tests' names, the same in every worker


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("images", idx(np.zeros(20, np.uint8)), "it starts with 0x00000801, expected 0x00000803"),
        ("images", idx(PIXELS[:, :27]), "it has shape (20, 27, 28), expected (N, 28, 28)"),
        ("images", idx(np.zeros((60_001, 28, 28), np.uint8)), "with N from 1 to 60000"),
        ("images", packed(gzip.decompress(idx(PIXELS))[:-1]), "it has 15679 values, expected 15680"),
        ("images", packed(gzip.decompress(idx(PIXELS)) + b"\0"), "it has more than 15680 values"),
        ("images", packed(b""), "it starts with nothing"),
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
