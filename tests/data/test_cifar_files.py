"""CIFAR-10 files that are not what they should be, and the real ones where they are."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx

DATA = os.environ.get("CATAPULT_DATA")
real_files = pytest.mark.skipif(
    not DATA, reason="CATAPULT_DATA is not set: no real CIFAR-10 files to test on"
)


def load(root: Path) -> cx.data.Split:
    return cx.data.load("cifar10", train=4, root=root)


class TouchesFile:
    """A pickle that runs `os.system` where the reader lets it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_batch_runs_nothing(write_cifar, tmp_path, protocol):
    root, marker = write_cifar(), tmp_path / "ran"
    batch = {"data": TouchesFile(marker), "labels": [1]}
    (root / "cifar-10-batches-py" / "data_batch_4").write_bytes(pickle.dumps(batch, protocol))
    with pytest.raises(
        ValueError, match=r"data_batch_4 is no CIFAR-10 batch: it asks for \w+\.system"
    ) as error:
        load(root)
    assert not marker.exists()
    assert "\n" not in str(error.value)


def change(**changes):
    """A batch with some entries replaced, or left out where None."""

    def apply(batch):
        return {key: value for key, value in {**batch, **changes}.items() if value is not None}

    return apply


IMAGES = np.zeros((20, 3072), np.uint8)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change(data=None), "it has no array called data"),
        (change(data=[1, 2]), "it has no array called data"),
        (change(data=IMAGES[:, :3071]), r"data has shape \(20, 3071\), expected \(N, 3072\)"),
        (change(data=IMAGES.reshape(20, 3, 1024)), r"data has shape \(20, 3, 1024\), expected \(N, 3072\)"),
        (change(data=IMAGES[:0], labels=[]), r"data has shape \(0, 3072\)"),
        (change(data=IMAGES.astype(np.int64)), "the array in it is not one of uint8"),
        (change(labels=None), "it has no list of labels for 20 images"),
        (change(labels=list(range(10))), "it has 10 labels for 20 images"),
        (change(labels=[0] * 19 + [10]), "label 19 is 10, expected a class from 0 to 9"),
        (change(labels=[0] * 19 + [b"x"]), "label 19 is b'x', expected a class from 0 to 9"),
        (
            change(batch_label=b"training batch 1 of 5"),
            "'training batch 1 of 5', expected 'training batch 3 of 5'",
        ),
        (lambda batch: [1], "it holds a list, expected a dict with data and labels"),
    ],
)
def test_wrong_contents_are_named(write_cifar, cifar_batch, as_python2, damage, reason):
    root = write_cifar()
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(as_python2(damage(cifar_batch("data_batch_3", 20))))
    with pytest.raises(
        ValueError, match=rf"data_batch_3 is no CIFAR-10 batch: .*{reason}.*cifar-10-python"
    ) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_too_many_rows_are_named(write_cifar, as_python2):
    root = write_cifar()
    batch = {"data": np.zeros((10_001, 3072), np.uint8), "labels": [0] * 10_001}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(as_python2(batch))
    with pytest.raises(ValueError, match=r"test_batch is no .*shape \(10001, 3072\).* N from 1 to 10000"):
        load(root)


def test_missing_files_are_named(write_cifar):
    root = write_cifar()
    (root / "cifar-10-batches-py" / "data_batch_2").unlink()
    (root / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py has no data_batch_2, test_batch: put "):
        load(root)


def test_damaged_files_give_images_or_one_line(write_cifar, cifar_batch, as_python2):
    """Cut short anywhere, or with any byte changed: either still a batch, or a clear error."""
    folder = write_cifar() / "cifar-10-batches-py"
    good = as_python2(cifar_batch("data_batch_5", 20))

    def outcome(content: bytes) -> str:
        (folder / "data_batch_5").write_bytes(content)
        try:
            split = load(folder)
        except ValueError as error:
            return str(error)
        assert split.train.x.isfinite().all()
        return "images"

    @given(position=st.integers(0, len(good) - 1) | st.integers(0, 300), byte=st.integers(0, 255))
    @settings(max_examples=100, deadline=None)
    def check(position, byte):
        assert "data_batch_5 is no CIFAR-10 batch: " in outcome(good[:position])
        changed = good[:position] + bytes([byte]) + good[position + 1 :]
        assert any(part in outcome(changed) for part in ("images", "data_batch_5 is no CIFAR-10 batch: "))

    assert outcome(good) == "images"
    check()


def test_files_are_only_read(write_cifar):
    root = write_cifar()
    folder = root / "cifar-10-batches-py"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    load(root).train.x.zero_()
    cx.data.available(root)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    folder.chmod(0o755)  # so that the folder can be removed


# ---- the real files -----------------------------------------------------------------------------------------


@real_files
def test_real_files_load_without_overlap():
    cifar = cx.data.available(names=["cifar10"])[0]
    if cifar.problem is not None:
        pytest.skip(cifar.problem)
    split = cx.data.load("cifar10", train=128, validation=300, test=200, dtype=torch.float64)
    rows = split.train.info["indices"] + split.validation.info["indices"]
    assert len(set(rows)) == 428
    images = [x.numpy().tobytes() for part in (split.train, split.validation, split.test) for x in part.x]
    assert len(set(images)) == 628
    assert split.train.info["form"] == cifar.form
    assert set(split.train.y.flatten().tolist()) == {-1.0, 1.0}


@real_files
def test_real_files_have_the_published_statistics():
    """All training images: channel means and deviations of the constants used, within what a part can tell."""
    cifar = cx.data.available(names=["cifar10"])[0]
    if cifar.problem is not None:
        pytest.skip(cifar.problem)
    split = cx.data.load("cifar10", classes=None, train=cifar.train, normalization="none", selection="first")
    x = split.train.x  # [n, 3, 32, 32]
    image_means = x.mean((2, 3))  # [n, 3]
    error = image_means.std(0) / len(x) ** 0.5
    assert ((image_means.mean(0) - torch.tensor([0.4914, 0.4822, 0.4465])).abs() < 5 * error + 5e-5).all()
    torch.testing.assert_close(
        x.std((2, 3), correction=0).mean(0), torch.tensor([0.2023, 0.1994, 0.2010]), rtol=0.02, atol=0
    )
    counts = split.train.y.sum(0)
    assert (counts - len(x) / 10).abs().max() < 5 * (len(x) * 0.09) ** 0.5
    assert sum(file["rows"] for file in split.train.info["files"][:5]) == len(x)
