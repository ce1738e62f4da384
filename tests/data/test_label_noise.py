"""Wrong labels on purpose: how many, which, the same again for the same seed, and recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext.data import LabelNoise


def load(noise=0.0, **options) -> cx.data.Split:
    options = {"train": 100, "validation": 50, "test": 40, "seed": 3, **options}
    return cx.data.load("digits", label_noise=noise, **options)


def changed(noisy: cx.data.Dataset, clean: cx.data.Dataset) -> list[int]:
    assert torch.equal(noisy.x, clean.x)
    assert noisy.info["indices"] == clean.info["indices"]
    return (noisy.y != clean.y).any(1).nonzero().flatten().tolist()


@given(
    fraction=st.floats(0, 1),
    classes=st.lists(st.integers(0, 9), min_size=2, max_size=10, unique=True),
    seed=st.none() | st.integers(0, 99),
    parts=st.lists(st.sampled_from(["train", "validation", "test"]), min_size=1, unique=True),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_exactly_the_recorded_labels_are_wrong(fraction, classes, seed, parts, data):
    own = data.draw(st.none() | st.lists(st.sampled_from(classes), min_size=1, unique=True).map(tuple))
    noise = LabelNoise(fraction, seed, own, tuple(parts))
    clean, noisy = load(classes=classes), load(noise, classes=classes)
    for part in ("train", "validation", "test"):
        a, b = getattr(clean, part), getattr(noisy, part)
        positions = changed(b, a)
        if part not in parts or fraction == 0:
            assert positions == []
            assert b.info["label_noise"] is None
            continue
        said = json.loads(json.dumps(b.info["label_noise"]))
        assert said["changed"] == positions
        assert said["seed"] == (3 if seed is None else seed)
        columns = a.y.argmax(1) if len(classes) > 2 else (a.y[:, 0] > 0).long()
        named = np.array(classes)[columns]
        candidates = np.isin(named, classes if own is None else own)
        assert len(positions) == round(fraction * candidates.sum())
        assert candidates[positions].all()
        assert (b.y.sum(1) == 1).all() or len(classes) == 2  # still one class each


def test_a_fraction_alone_is_of_the_training_labels():
    clean, noisy = load(), load(0.1)
    assert len(changed(noisy.train, clean.train)) == 10
    assert changed(noisy.validation, clean.validation) == changed(noisy.test, clean.test) == []
    assert noisy.train.info["label_noise"]["fraction"] == 0.1
    assert clean.train.info["label_noise"] is None


def test_seeds_decide_which():
    first = [load(LabelNoise(0.2, seed)).train.info["label_noise"]["changed"] for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]
    assert load(LabelNoise(0.2, 3)).train.info["label_noise"] == load(0.2).train.info["label_noise"]


def test_wrong_classes_come_equally_often():
    """All 1,197 training labels become wrong: each of the nine others about as often, 5 sigma."""
    clean = cx.data.load("digits", classes=None, train=1197, seed=0)
    counts = np.zeros((10, 10))
    for seed in range(5):
        noisy = cx.data.load("digits", classes=None, train=1197, label_noise=LabelNoise(1.0, seed))
        np.add.at(counts, (clean.train.y.argmax(1).numpy(), noisy.train.y.argmax(1).numpy()), 1)
    assert np.trace(counts) == 0
    expected = counts.sum(1, keepdims=True) / 9
    off = counts[~np.eye(10, dtype=bool)].reshape(10, 9)
    assert (np.abs(off - expected) < 5 * np.sqrt(expected * 8 / 9)).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": -0.1}, r"fraction must be a number from 0 to 1, got -0\.1"),
        ({"fraction": float("nan")}, "fraction must be a number from 0 to 1, got nan"),
        ({"fraction": None}, "fraction must be a number from 0 to 1, got None"),
        ({"fraction": 0.1, "seed": -1}, "seed must be an integer of at least 0 or None, got -1"),
        ({"fraction": 0.1, "parts": ()}, r"parts must be some of train, validation, test; got \(\)"),
        ({"fraction": 0.1, "parts": "train"}, "parts must be some of train, validation, test; got 'train'"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=f"label_noise: {message}"):
        LabelNoise(**wrong)
