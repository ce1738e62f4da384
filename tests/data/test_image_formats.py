"""Every image set in every form, from files written here: pixels, labels, and one call for all of them."""

from __future__ import annotations

import io
import itertools
import json
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import CLASSES, FORMATS, write_celeba, write_cifar10_binary, write_cifar10_jpeg, write_svhn
from PIL import Image

import catapult_ext as cx


def every_row(name: str, root, **options) -> cx.data.Split:
    """All images, in file order, in [0, 1], float64."""
    found = cx.data.available(root, [name])[0]
    assert found.problem is None, found.problem
    own_validation = found.validation
    return cx.data.load(
        name,
        classes=None,
        train=found.train,
        validation=own_validation,
        test=found.test,
        root=root,
        selection="first",
        normalization="none",
        dtype=torch.float64,
        **options,
    )


@pytest.mark.parametrize("form", FORMATS)
def test_pixels_and_labels_are_those_of_the_files(form, tmp_path):
    name, write, options = FORMATS[form]
    written = write(tmp_path)
    split = every_row(name, tmp_path, **options)
    if name == "svhn":  # nothing is left out where no validation samples are asked for
        assert split.validation is None
    for part, images in written.images.items():
        data = getattr(split, part)
        labels = written.labels[part]
        # Within one rounding of double precision; LIBSVM's and HDF5's values come from text and float32.
        np.testing.assert_allclose(data.x.numpy(), images, rtol=0, atol=1e-7 if name == "usps" else 1e-15)
        if data.y.shape[1] == 1:
            np.testing.assert_array_equal(data.y[:, 0], 2 * labels - 1)
        else:
            np.testing.assert_array_equal(data.y, np.eye(10)[labels])
        assert data.info["indices"] == list(range(len(labels)))
        assert json.loads(json.dumps(data.info))["set"] == name
        assert data.info["form"] == ("derived" if name == "cifar10-jpeg" else "partial")
        assert str(tmp_path) not in json.dumps(data.info)


@pytest.mark.parametrize("form", FORMATS)
def test_the_default_is_the_pair_of_the_paper(form, tmp_path):
    name, write, _ = FORMATS[form]
    written = write(tmp_path)
    data = cx.data.load(name, train=3, root=tmp_path).train
    pair = {"cifar10": [7, 9], "cifar10-jpeg": [7, 9], "celeba": [0, 1]}.get(name, [0, 2])
    assert data.info["classes"] == pair
    assert data.y.flatten().tolist() == [
        -1 if written.labels["train"][row] == pair[0] else 1 for row in data.info["indices"]
    ]
    if name == "celeba":
        assert data.x.shape == (3, 3, 32, 32)
        assert data.info["attribute"] == "Eyeglasses"
        assert data.info["image_size"] == [32, 32]


@pytest.mark.parametrize("form", FORMATS)
def test_parts_never_overlap_by_index_or_content(form, tmp_path):
    name, write, options = FORMATS[form]
    write(tmp_path)
    for pool in ("official", "pooled"):
        for selection in ("random", "balanced", "first"):
            split = cx.data.load(
                name, train=4, validation=2, test=2, root=tmp_path, pool=pool, selection=selection, **options
            )
            images = [
                row.numpy().tobytes() for p in (split.train, split.validation, split.test) for row in p.x
            ]
            assert len(set(images)) == 8, (pool, selection)
            parts = (split.train, split.validation, split.test)
            if pool == "pooled":
                assert len({row for part in parts for row in part.info["indices"]}) == 8
            assert all(part.info["pool"] == pool for part in parts)


def test_normalisation_by_the_training_split_is_exact(tmp_path):
    write_svhn(tmp_path)
    for name in ("default", "training"):
        split = cx.data.load(
            "svhn", classes=None, train=30, test=20, root=tmp_path, normalization=name, dtype=torch.float64
        )
        assert split.train.x.mean((0, 2, 3)).abs().max() < 1e-12
        assert (split.train.x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-12
        assert split.test.x.mean().abs() > 1e-4  # the statistics are not its own
        assert split.test.info["normalization"]["origin"] == "training split"
    write_cifar10_binary(tmp_path)
    default = cx.data.load("cifar10", train=10, root=tmp_path).train
    own = cx.data.load("cifar10", train=10, root=tmp_path, normalization="training").train
    assert default.info["normalization"]["origin"] != "training split"
    assert own.x.mean((0, 2, 3)).abs().max() < 1e-5


def test_statistics_do_not_depend_on_the_pieces(tmp_path, monkeypatch):
    from catapult_ext.data import images

    write_svhn(tmp_path)
    whole = cx.data.load("svhn", classes=None, train=30, root=tmp_path, dtype=torch.float64).train
    monkeypatch.setattr(images, "_PIECE", 8 * 3072 * 7)  # seven images at a time
    pieces = cx.data.load("svhn", classes=None, train=30, root=tmp_path, dtype=torch.float64).train
    torch.testing.assert_close(pieces.x, whole.x, rtol=1e-12, atol=1e-12)


# ---- SVHN: neighbouring rows show one photo -----------------------------------------------------------------


@pytest.mark.parametrize("selection", ["random", "balanced", "first"])
@pytest.mark.parametrize("pool", ["official", "pooled"])
def test_svhn_validation_is_the_end_of_the_file_and_no_photo_is_on_both_sides(tmp_path, selection, pool):
    write_svhn(tmp_path, rows=(200, 60))
    test = 10 if pool == "pooled" else 5
    options = {"root": tmp_path, "selection": selection, "pool": pool}
    split = cx.data.load("svhn", train=12, validation=8, test=test, **options)
    train, validation = split.train.info["indices"], split.validation.info["indices"]
    assert max(train) < min(validation) - 5
    if pool == "pooled":
        last = split.test.info["indices"]
        assert max(validation) < min(last) - 5
        assert max(last) == max(i for i in range(200) if i * 7 % 10 in (0, 2)) or max(last) >= 200
    else:
        pair = [i for i in range(200) if i * 7 % 10 in (0, 2)]
        assert sorted(validation) == pair[-8:]
    more = cx.data.load("svhn", train=14, validation=8, test=test, **options)
    assert more.train.info["indices"][:12] == train or selection == "balanced"
    assert more.validation.info["indices"] == validation


def test_svhn_says_what_the_gap_costs(tmp_path):
    write_svhn(tmp_path, rows=(100, 20))  # 20 images of 0 and 2
    cx.data.load("svhn", train=20, root=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"svhn has \d+ training images of classes \(0, 2\) \(partial files\), but train 16 \+ "
        r"validation 4 = 20 are asked for \([1-3] more are left out: neighbouring rows can show the same photo",
    ):
        cx.data.load("svhn", train=16, validation=4, root=tmp_path)


@given(
    train=st.integers(1, 60),
    validation=st.integers(0, 40),
    test=st.integers(0, 30),
    seed=st.integers(0, 99),
    selection=st.sampled_from(["random", "balanced", "first"]),
    pool=st.sampled_from(["official", "pooled"]),
    classes=st.lists(st.integers(0, 9), min_size=2, max_size=10, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_svhn_parts_are_whole_and_apart_or_the_error_says_why(svhn_root, classes, **options):
    try:
        split = cx.data.load("svhn", root=svhn_root, classes=classes, **options)
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert re.match(r"svhn has \d+ .*images of class.* are asked for", message)
        return
    rows = {}
    for part in ("train", "validation", "test"):
        data = getattr(split, part)
        assert (0 if data is None else len(data)) == options[part]
        rows[part] = [] if data is None else data.info["indices"]
        assert len(set(rows[part])) == options[part]
    order = ("train", "validation", "test") if options["pool"] == "pooled" else ("train", "validation")
    filled = [rows[part] for part in order if rows[part]]
    for before, after in itertools.pairwise(filled):
        assert max(before) < min(after) - 5


@pytest.fixture(scope="module")
def svhn_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("svhn")
    write_svhn(root, rows=(300, 60))
    return root


def test_linked_folders_are_called_what_the_link_says(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "root").mkdir()
    write_cifar10_binary(tmp_path / "store")
    (tmp_path / "store" / "cifar-10-batches-bin").rename(tmp_path / "store" / "c10")
    (tmp_path / "root" / "cifar-10-batches-bin").symlink_to(tmp_path / "store" / "c10")
    info = cx.data.load("cifar10", train=4, root=tmp_path / "root").train.info
    assert info["files"][0]["path"] == "cifar-10-batches-bin/data_batch_1.bin"


def test_the_root_may_be_the_folder_itself(tmp_path, monkeypatch):
    write_cifar10_binary(tmp_path)
    monkeypatch.chdir(tmp_path / "cifar-10-batches-bin")
    assert cx.data.load("cifar10", train=4, root=".").train.info["files"][0]["path"] == "data_batch_1.bin"


# ---- CelebA -------------------------------------------------------------------------------------------------


def test_celeba_any_attribute_is_a_label(tmp_path):
    write_celeba(tmp_path)
    glasses = cx.data.load("celeba", train=6, root=tmp_path, selection="first").train
    smiling = cx.data.load("celeba", train=6, root=tmp_path, selection="first", attribute="Smiling").train
    assert torch.equal(glasses.y, -smiling.y)
    assert torch.equal(glasses.x, smiling.x)
    assert smiling.info["attribute"] == "Smiling"
    with pytest.raises(ValueError, match=r"attribute must be one of Attribute_0, .*Smiling; got 'Wings'"):
        cx.data.load("celeba", train=6, root=tmp_path, attribute="Wings")


def test_celeba_image_size(tmp_path):
    write_celeba(tmp_path)

    def load(size):
        options = {"normalization": "none", "selection": "first", "dtype": torch.float64}
        return cx.data.load("celeba", train=2, root=tmp_path, image_size=size, **options).train

    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith("jpg"))
        row = load(None).info["indices"][0]
        partition = (tmp_path / "list_eval_partition.txt").read_text().split()
        train = [name for name in names if partition[partition.index(name[-10:]) + 1] == "0"]
        image = Image.open(io.BytesIO(archive.read(train[row])))
    square = image.crop((0, 20, 178, 198)).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(load(24).x[0].numpy(), np.asarray(square).transpose(2, 0, 1) / 255)
    whole = image.resize((20, 30), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(load((30, 20)).x[0].numpy(), np.asarray(whole).transpose(2, 0, 1) / 255)
    assert load((30, 20)).info["image_size"] == [30, 20]
    for wrong in (0, -3, 1.5, True, (3,), (3, 4, 5), "32", 5000):
        with pytest.raises(ValueError, match="image_size must be the side of a square or"):
            load(wrong)


def test_celeba_folder_and_zip_hold_the_same(tmp_path):
    write_celeba(tmp_path / "a")
    write_celeba(tmp_path / "b", form="folder")
    a, b = (cx.data.load("celeba", train=5, validation=2, root=tmp_path / root) for root in ("a", "b"))
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.validation.x, b.validation.x)


# ---- lazily, in bounded memory ------------------------------------------------------------------------------


def test_only_the_chosen_jpegs_are_decoded(tmp_path):
    """Every other image is damaged: nobody may notice before it is chosen."""
    write_cifar10_jpeg(tmp_path)
    chosen = cx.data.load("cifar10-jpeg", train=3, root=tmp_path).train
    with zipfile.ZipFile(tmp_path / "cifar10_jpeg.zip") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    labels = np.load(tmp_path / "train_labels.npy")
    kept = {
        f"train/{CLASSES[labels[row]]}/{(labels[:row] == labels[row]).sum():04d}.jpg"
        for row in chosen.info["indices"]
    }
    with zipfile.ZipFile(tmp_path / "cifar10_jpeg.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content if name in kept else b"damaged")
    again = cx.data.load("cifar10-jpeg", train=3, root=tmp_path).train
    assert torch.equal(again.x, chosen.x)
    with pytest.raises(
        ValueError, match=r"cifar10_jpeg\.zip is no archive .*train/\w+/\d{4}\.jpg in it cannot"
    ):
        cx.data.load("cifar10-jpeg", train=8, root=tmp_path)


def test_svhn_is_never_held_as_floats(tmp_path):
    rows = 4000
    write_svhn(tmp_path, rows=(rows, 20))
    cx.data.load("svhn", train=5, root=tmp_path)  # imports, and the checksums
    tracemalloc.start()
    try:
        cx.data.load("svhn", train=5, root=tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * rows * 3072  # as uint8 it is 1, as float32 4, as float64 8 times rows * 3072
