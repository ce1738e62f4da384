"""The real image sets, where they are: no overlap by row or by content, published counts, the sizes promised."""

from __future__ import annotations

import hashlib
import os
from functools import cache

import pytest
import torch

import catapult_ext as cx
from catapult_ext.data import sets
from catapult_ext.data.files import find

pytestmark = pytest.mark.skipif(
    not os.environ.get("CATAPULT_DATA"),
    reason="CATAPULT_DATA is not set: no real image sets to test on",
)

SETS = ["cifar10", "cifar10-jpeg", "svhn", "fashion-mnist", "usps", "celeba", "digits"]


@cache
def there(name: str) -> cx.data.Availability:
    found = cx.data.available(names=[name])[0]
    if found.problem is not None:
        pytest.skip(found.problem)
    return found


def parts(split: cx.data.Split) -> list[cx.data.Dataset]:
    return [part for part in (split.train, split.validation, split.test) if part is not None]


@pytest.mark.parametrize("pool", ["official", "pooled"])
@pytest.mark.parametrize(
    "selection", ["random", *(pytest.param(s, marks=pytest.mark.slow) for s in ("balanced", "first"))]
)
@pytest.mark.parametrize("name", SETS)
def test_no_image_is_in_two_parts(name, selection, pool):
    """By row, and by the content of the image as the network gets it."""
    there(name)
    split = cx.data.load(name, train=128, validation=60, test=40, pool=pool, selection=selection, seed=1)
    contents = [hashlib.sha256(x.numpy().tobytes()).digest() for part in parts(split) for x in part.x]
    assert len(contents) == len(set(contents)) == 228
    rows = [part.info["indices"] for part in parts(split)]
    own_pool = name == "celeba" and pool == "official"  # of validation: rows count from 0 again
    together = rows[0] if own_pool else rows[0] + rows[1] + (rows[2] if pool == "pooled" else [])
    assert len(together) == len(set(together))


@pytest.mark.parametrize(
    "name",
    [
        *("cifar10", "usps", "digits"),
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("svhn", "celeba", "fashion-mnist", "cifar10-jpeg")
        ),
    ],
)
def test_no_image_is_in_two_parts_when_all_are_taken(name):
    """Every image of the files, of every class."""
    found = there(name)
    split = cx.data.load(name, classes=None, train=found.train, validation=found.validation, test=found.test)
    contents = [hashlib.sha256(x.numpy().tobytes()).digest() for part in parts(split) for x in part.x]
    assert len(contents) == found.train + found.validation + found.test
    hashes = [set(contents[: found.train]), set(contents[found.train :])]
    assert not hashes[0] & hashes[1]


@pytest.mark.parametrize(
    ("name", "classes", "sizes", "options"),
    [
        ("cifar10", (7, 9), (128, 64, 64), {}),
        ("cifar10-jpeg", (7, 9), (5000, 5000, 2000), {}),
        ("svhn", (0, 2), (1000, 700, 450), {}),
        ("fashion-mnist", (0, 2), (1000, 5000, 2000), {}),
        ("usps", (0, 2), (1000, 900, 550), {}),
        ("celeba", (0, 1), (1000, 1000, 1000), {}),
        pytest.param("celeba", (0, 1), (1000, 5000, 5000), {"pool": "pooled"}, marks=pytest.mark.slow),
    ],
)
def test_sizes_that_the_files_allow(name, classes, sizes, options):
    """Near the paper's sizes; the smallest files known to be in use hold as many."""
    there(name)
    train, validation, test = sizes
    split = cx.data.load(name, classes=classes, train=train, validation=validation, test=test, **options)
    assert tuple(len(part) for part in parts(split)) == sizes
    assert all(part.x.isfinite().all() for part in parts(split))
    assert abs(split.train.x.mean()) < 1e-3 or name.startswith("cifar10")


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [  # classes 0 ... 9
        (
            "usps",
            [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644],
            [359, 264, 198, 166, 200, 160, 170, 147, 166, 177],
        ),
        ("fashion-mnist", [6000] * 10, [1000] * 10),
        ("cifar10-jpeg", [5000] * 10, [1000] * 10),
    ],
)
def test_published_class_counts(name, train, test):
    found = there(name)
    if (found.train, found.test) != (sum(train), sum(test)):
        pytest.skip(f"{name} is {found.form}")
    reading = sets.read(sets.SETS[name], None)
    for pool, counts in ((reading.train, train), (reading.test, test)):
        assert torch.bincount(torch.from_numpy(pool.labels)).tolist() == counts


def test_the_jpeg_form_is_cifar10_but_lossy():
    """Rows of the first official batch, as JPEG: the same labels, pixels near and yet not the same."""
    there("cifar10-jpeg")
    if there("cifar10").train < 100:
        pytest.skip("cifar10: too few images")
    options = {"classes": None, "train": 100, "selection": "first", "normalization": "none"}
    exact, lossy = (cx.data.load(name, **options).train for name in ("cifar10", "cifar10-jpeg"))
    assert torch.equal(exact.y, lossy.y)
    difference = (exact.x - lossy.x).abs().mean() * 255
    assert 1 < difference < 12


def test_svhn_parts_are_apart_in_the_file():
    there("svhn")
    split = cx.data.load("svhn", train=1000, validation=500, test=100)
    assert max(split.train.info["indices"]) < min(split.validation.info["indices"]) - 5


def test_no_person_of_celeba_is_in_two_official_parts():
    there("celeba")
    root = sets.data_root(sets.SETS["celeba"], None)
    lists = find(root, "identity_CelebA.txt", "identity_CelebA_subset.txt")
    if not lists:
        pytest.skip("no identity_CelebA.txt")
    person = dict(line.split() for line in lists[0].read_text().splitlines())
    reading = sets.read(sets.SETS["celeba"], None)
    people = [
        {person[name[-10:]] for name in pool.images.names}
        for pool in (reading.train, reading.validation, reading.test)
    ]
    assert all(people)
    assert sum(map(len, people)) == len(set().union(*people))
