"""Loading image sets: selection, splits, labels, normalisation, on files written here in the official format."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext.data import LabelNoise, cifar10

SETS = ["cifar10", "cifar10-jpeg", "svhn", "fashion-mnist", "usps", "celeba", "digits"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.fixture
def root(write_cifar) -> Path:
    """100 training images (10 per class and 2 per class and batch) and 20 test images."""
    return write_cifar()


def parts(split: cx.data.Split) -> dict[str, cx.data.Dataset]:
    named = {"train": split.train, "validation": split.validation, "test": split.test}
    return {name: part for name, part in named.items() if part is not None}


def pixels(data: cx.data.Dataset) -> np.ndarray:
    """The bytes in the file, from the normalised float64 images."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    raw = (data.x * std + mean) * 255
    assert (raw - raw.round()).abs().max() < 1e-10
    return raw.round().byte().numpy().reshape(len(data), -1)


# ---- CIFAR-10: contents -------------------------------------------------------------------------------------


def test_images_and_labels_are_those_of_the_files(root, cifar_batch):
    split = cx.data.load(
        "cifar10", classes=None, train=90, validation=10, test=20, root=root, dtype=torch.float64
    )
    batches = [cifar_batch(f"data_batch_{i}", 20) for i in range(1, 6)]
    train_images = np.concatenate([batch["data"] for batch in batches])
    train_labels = np.concatenate([batch["labels"] for batch in batches])
    test = cifar_batch("test_batch", 20)
    for name, images, labels in (
        ("train", train_images, train_labels),
        ("validation", train_images, train_labels),
        ("test", test["data"], np.array(test["labels"])),
    ):
        data = parts(split)[name]
        rows = data.info["indices"]
        assert data.x.shape[1:] == (3, 32, 32)
        np.testing.assert_array_equal(pixels(data), images[rows])
        assert torch.equal(data.y, torch.eye(10, dtype=torch.float64)[labels[rows]])
    # Channels: the first 1024 bytes are red, row by row.
    first = split.train.info["indices"][0]
    red = (split.train.x[0, 0] * STD[0] + MEAN[0]) * 255
    np.testing.assert_allclose(red.numpy().ravel(), train_images[first, :1024], atol=1e-10)


def test_two_classes_get_minus_and_plus_one(root, cifar_batch):
    data = cx.data.load("cifar10", train=20, root=root).train
    labels = np.concatenate([cifar_batch(f"data_batch_{i}", 20)["labels"] for i in range(1, 6)])
    expected = np.where(labels[data.info["indices"]] == 7, -1, 1)
    assert data.y.shape == (20, 1)
    np.testing.assert_array_equal(data.y[:, 0].numpy(), expected)
    assert sorted(expected) == [-1] * 10 + [1] * 10
    swapped = cx.data.load("cifar10", classes=(9, 7), train=20, root=root).train
    assert torch.equal(swapped.y, -data.y)
    assert torch.equal(swapped.x, data.x)


def test_more_classes_get_one_hot_rows_in_the_order_given(root, cifar_batch):
    data = cx.data.load("cifar10", classes=(8, 1, 3), train=30, root=root).train
    labels = np.concatenate([cifar_batch(f"data_batch_{i}", 20)["labels"] for i in range(1, 6)])
    column = {8: 0, 1: 1, 3: 2}
    expected = [column[label] for label in labels[data.info["indices"]]]
    assert data.y.argmax(1).tolist() == expected
    assert torch.equal(data.y.sum(1), torch.ones(30))
    assert set(data.y.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("below", ["", "cifar10", "a/b/c"])
def test_the_folder_is_found_below_the_root(write_cifar, below):
    root = write_cifar(below=below)
    info = cx.data.load("cifar10", train=4, root=root).train.info
    assert info["files"][0]["path"] == str(Path(below, "cifar-10-batches-py", "data_batch_1"))
    direct = root / below / "cifar-10-batches-py"
    assert cx.data.load("cifar10", train=4, root=direct).train.info["files"][5]["path"] == "test_batch"


def test_files_saved_by_python_3_are_read(root, cifar_batch):
    expected = cx.data.load("cifar10", root=root, train=20)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = cifar_batch(name, 20)
        batch = {"data": batch["data"], "labels": batch["labels"]}
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, 4))
    assert torch.equal(cx.data.load("cifar10", root=root, train=20).train.x, expected.train.x)


def test_info_says_what_was_read(root):
    split = cx.data.load("cifar10", train=5, validation=3, test=2, root=root, seed=4)
    for name, data in parts(split).items():
        info = json.loads(json.dumps(data.info))
        assert data.name == info["set"] == "cifar10"
        assert info["form"] == "partial"
        assert info["split"] == name
        assert info["classes"] == [7, 9]
        assert info["class_names"] == ["horse", "truck"]
        assert info["labels"] == "-1/+1"
        assert info["selection"] == "random"
        assert info["seed"] == 4
        assert info["normalization"]["mean"] == list(MEAN)
        assert info["normalization"]["std"] == list(STD)
        assert [file["rows"] for file in info["files"]] == [20] * 6
        assert str(root) not in json.dumps(info)  # a record must not depend on the machine


def test_the_form_is_told_by_rows_and_checksums(root, monkeypatch):
    def form() -> str | None:
        return cx.data.available(root, ["cifar10"])[0].form

    assert form() == "partial"
    monkeypatch.setattr(cifar10, "_ROWS", 20)  # as if the official files had 20 images
    assert form() == "unverified"
    for table in ("_TRAIN", "_TEST"):
        rows = getattr(cifar10, table)
        single = table == "_TEST"
        rows = [
            (name, label, hashlib.md5((root / "cifar-10-batches-py" / name).read_bytes()).hexdigest())
            for name, label, _ in ([rows] if single else rows)
        ]
        monkeypatch.setattr(cifar10, table, rows[0] if single else rows)
    assert form() == "official"
    with (root / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"more")
    assert form() == "unverified"


# ---- selection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["random", "balanced", "first"])
def test_splits_do_not_overlap(root, selection):
    split = cx.data.load(
        "cifar10", train=13, validation=7, test=4, root=root, selection=selection, dtype=torch.float64
    )
    assert {name: len(part) for name, part in parts(split).items()} == {
        "train": 13,
        "validation": 7,
        "test": 4,
    }
    images = [row.tobytes() for part in parts(split).values() for row in pixels(part)]
    assert len(set(images)) == 24  # the images of the files are all different
    rows = split.train.info["indices"] + split.validation.info["indices"]
    assert sorted(rows) == sorted(i for i in range(100) if i % 10 in (7, 9))


@given(st.data())
@settings(max_examples=60)
def test_digits_splits_do_not_overlap_whatever_is_asked_for(data):
    classes = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=10, unique=True))
    selection = data.draw(st.sampled_from(["random", "balanced", "first"]))
    seed = data.draw(st.integers(0, 2**40))
    train, validation, test = (data.draw(st.integers(low, 56 * len(classes))) for low in (1, 0, 0))
    split = cx.data.load(
        "digits",
        classes=classes,
        train=train,
        validation=validation,
        test=min(test, 56 * len(classes)) if selection == "balanced" else min(test, 50),
        seed=seed,
        selection=selection,
    )
    rows = [part.info["indices"] for name, part in parts(split).items() if name != "test"]
    flat = [row for part in rows for row in part]
    assert len(flat) == len(set(flat)) == train + validation
    if split.test is not None:
        assert len(set(split.test.info["indices"])) == len(split.test)
    if selection == "balanced":
        for part in parts(split).values():
            counts = (
                (part.y > 0).sum(0)
                if len(classes) > 2
                else torch.tensor([(part.y < 0).sum(), (part.y > 0).sum()])
            )
            assert counts.max() - counts.min() <= 1


def test_sizes_do_not_change_each_other(root):
    for selection in ("random", "balanced", "first"):
        small = cx.data.load("cifar10", train=4, validation=3, test=2, root=root, selection=selection)
        large = cx.data.load("cifar10", train=14, validation=6, test=4, root=root, selection=selection)
        for name, part in parts(small).items():
            more = parts(large)[name]
            assert torch.equal(part.x, more.x[: len(part)])
            assert torch.equal(part.y, more.y[: len(part)])


def test_first_is_file_order(root):
    split = cx.data.load("cifar10", train=6, validation=3, root=root, selection="first", seed=5)
    assert split.train.info["indices"] == [7, 9, 17, 19, 27, 29]
    assert split.validation.info["indices"] == [99, 97, 89]
    balanced = cx.data.load("cifar10", train=3, validation=3, root=root, selection="balanced")
    assert (balanced.train.y > 0).sum() == 1
    assert (balanced.validation.y > 0).sum() == 2  # its remainder goes to the other class


def test_balanced_takes_equally_from_each_class(root):
    data = cx.data.load("cifar10", classes=(2, 5, 6), train=11, root=root, selection="balanced").train
    assert data.y.sum(0).tolist() == [4, 4, 3]
    assert torch.equal(data.y.argmax(1), torch.arange(11) % 3)  # every beginning of it is balanced too


def test_random_draws_every_image_equally_often():
    """Over 300 seeds each of the 240 sevens and nines comes about as often as any other: 5 sigma."""
    counts = np.zeros(1197)
    draws = 300
    for seed in range(draws):
        counts[cx.data.load("digits", train=60, seed=seed).train.info["indices"]] += 1
    candidates = counts > 0
    pool = int(candidates.sum())
    share = 60 / pool
    sigma = np.sqrt(draws * share * (1 - share))
    assert pool == 240
    assert np.abs(counts[candidates] - draws * share).max() < 5 * sigma


def test_seeds_decide(root):
    loads = [cx.data.load("cifar10", train=10, test=2, root=root, seed=s) for s in (0, 0, 1)]
    assert loads[0].train.info["indices"] == loads[1].train.info["indices"] != loads[2].train.info["indices"]
    first = [cx.data.load("cifar10", train=10, root=root, seed=s, selection="first") for s in (0, 1)]
    assert torch.equal(first[0].train.x, first[1].train.x)


# ---- normalisation ------------------------------------------------------------------------------------------


def test_digits_are_normalised_by_the_training_split():
    split = cx.data.load("digits", classes=None, train=500, validation=100, test=100, dtype=torch.float64)
    assert split.train.x.shape == (500, 1, 8, 8)
    assert abs(split.train.x.mean().item()) < 1e-12
    assert split.train.x.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert abs(split.validation.x.mean().item()) > 1e-6  # the statistics are not its own
    from sklearn.datasets import load_digits

    images = load_digits().images
    statistics = split.train.info["normalization"]
    for name, offset in (("train", 0), ("validation", 0), ("test", 1197)):
        part = parts(split)[name]
        raw = part.x[:, 0] * statistics["std"][0] + statistics["mean"][0]
        rows = np.array(part.info["indices"]) + offset
        np.testing.assert_allclose(raw.numpy() * 16, images[rows], atol=1e-12)
    assert statistics["origin"] == "training split"


def test_normalisation_can_be_chosen(root):
    options = {"train": 6, "root": root, "dtype": torch.float64}
    unit = cx.data.load("cifar10", normalization="none", **options).train.x
    assert unit.min() >= 0
    assert 0.99 < unit.max() <= 1
    own = cx.data.load("cifar10", normalization=([0.1, 0.2, 0.3], [1, 2, 4]), **options).train
    expected = (unit - torch.tensor([0.1, 0.2, 0.3]).double()[:, None, None]) / torch.tensor(
        [1.0, 2.0, 4.0]
    ).double()[:, None, None]
    torch.testing.assert_close(own.x, expected, rtol=1e-6, atol=1e-6)
    assert own.info["normalization"] == {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4], "origin": "as given"}
    assert cx.data.load("cifar10", train=6, root=root).train.x.dtype == torch.float32


# ---- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "mnist"}, "name must be one of cifar10, cifar10-jpeg, svhn, .*digits; got 'mnist'"),
        ({"classes": (7, 10)}, "classes of cifar10 must be integers from 0 to 9, got 10"),
        ({"classes": (7, "truck")}, "classes of cifar10 must be integers from 0 to 9, got 'truck'"),
        ({"classes": (7,)}, r"classes must be at least two different ones, got \(7,\)"),
        ({"classes": (7, 7)}, r"classes must be at least two different ones, got \(7, 7\)"),
        ({"train": 0}, "train must be an integer of at least 1, got 0"),
        ({"validation": -1}, "validation must be an integer of at least 0, got -1"),
        ({"test": 1.5}, r"test must be an integer of at least 0, got 1\.5"),
        ({"seed": -3}, "seed must be an integer of at least 0, got -3"),
        ({"classes": "all"}, "classes must be class indices, None or \"pair\"; got 'all'"),
        ({"pool": "all"}, "pool must be one of official, pooled; got 'all'"),
        ({"attribute": "Smiling"}, "attribute is an argument of celeba, not of cifar10"),
        ({"image_size": 8}, "image_size is an argument of celeba, not of cifar10"),
        ({"label_noise": 1.5}, r"label_noise: fraction must be a number from 0 to 1, got 1\.5"),
        ({"label_noise": True}, "label_noise: fraction must be a number from 0 to 1, got True"),
        ({"label_noise": "10%"}, "label_noise: fraction must be a number from 0 to 1, got '10%'"),
        ({"label_noise": LabelNoise(0.1, classes=(1,))}, r"classes must be among the chosen \(7, 9\), got"),
        ({"selection": "best"}, "selection must be one of random, balanced, first; got 'best'"),
        ({"normalization": "zca"}, "normalization must be .* of 3 finite numbers each.*got 'zca'"),
        ({"normalization": ([0.0], [1.0])}, "normalization must be .* of 3 finite numbers each"),
        ({"normalization": ([0.0] * 3, [1.0, 1.0, 0.0])}, "normalization must be .* std above 0"),
        ({"normalization": ([0.0] * 3, [1.0, 1.0, np.nan])}, "normalization must be .* std above 0"),
        ({"normalization": None}, "normalization must be .*got None"),
        (
            {"train": 15, "validation": 6},
            r"cifar10 has 20 training images of classes \(7, 9\) \(partial files\), "
            r"but train 15 \+ validation 6 = 21 are asked for",
        ),
        ({"test": 5}, r"cifar10 has 4 test images of classes \(7, 9\).*test 5 = 5 are asked for"),
        (
            {"train": 21, "selection": "balanced"},
            r"10 training images of class 7 .*train 11 \+ validation 0 = 11 are asked for",
        ),
    ],
)
def test_wrong_arguments_are_named(root, wrong, message):
    good = {"name": "cifar10", "train": 4, "root": root}
    options = {**good, **wrong}
    with pytest.raises(ValueError, match=message):
        cx.data.load(options.pop("name"), **options)


# ---- what is there ------------------------------------------------------------------------------------------


def test_missing_root_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("CATAPULT_DATA", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        cx.data.load("cifar10")
    message = str(error.value)
    for part in ("CATAPULT_DATA", "cifar-10-batches-py/", "data_batch_1 ... data_batch_5", "test_batch"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(
        FileNotFoundError, match=r"root is .*nowhere, which is no folder.*cifar-10-batches-py/"
    ):
        cx.data.load("cifar10", root=tmp_path / "nowhere")
    monkeypatch.setenv("CATAPULT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"CATAPULT_DATA is .*nowhere, which is no folder"):
        cx.data.load("cifar10")
    with pytest.raises(
        FileNotFoundError,
        match=r"no cifar-10-batches-py or cifar-10-batches-bin under .*: put cifar-10-batches-py/",
    ):
        cx.data.load("cifar10", root=tmp_path)


def test_the_environment_names_the_root(monkeypatch, root):
    expected = cx.data.load("cifar10", train=4, root=root).train.x
    monkeypatch.setenv("CATAPULT_DATA", str(root))
    assert torch.equal(cx.data.load("cifar10", train=4).train.x, expected)


def test_available_lists_every_set(monkeypatch, root, tmp_path):
    monkeypatch.delenv("CATAPULT_DATA", raising=False)
    found = {item.name: item for item in cx.data.available()}
    assert list(found) == SETS
    for name in SETS[:-1]:
        assert found[name].form is None
        assert re.match(rf"{name}: no data root; set CATAPULT_DATA .* and put ", found[name].problem)
    assert (found["digits"].form, found["digits"].train, found["digits"].test) == ("embedded", 1197, 600)
    found = {item.name: item for item in cx.data.available(root)}
    assert (found["cifar10"].form, found["cifar10"].train, found["cifar10"].test) == ("partial", 100, 20)
    assert found["cifar10"].problem is None
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"")
    found = {item.name: item for item in cx.data.available(root)}
    assert "data_batch_2 is no CIFAR-10 batch" in found["cifar10"].problem


def test_two_copies_are_not_guessed_between(write_cifar):
    write_cifar(below="a")
    root = write_cifar(below="b/c")
    with pytest.raises(ValueError, match=r"several of .*a/cifar-10-batches-py, b/c/cifar-10-batches-py"):
        cx.data.load("cifar10", root=root)
