"""Loads image sets: classes, subsets, splits, labels and normalisation, the same way for every set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from catapult_ext.data.cifar10 import CIFAR10
from catapult_ext.data.dataset import Dataset, Split
from catapult_ext.data.digits import DIGITS
from catapult_ext.data.image_set import ImageSet, Reading
from catapult_ext.data.streams import stream

__all__ = ["Availability", "available", "load"]

_SETS = {image_set.name: image_set for image_set in (CIFAR10, DIGITS)}

_SELECTIONS = ("random", "balanced", "first")


def load(
    name: str,
    *,
    classes: Sequence[int] | None = (7, 9),
    train: int = 128,
    validation: int = 0,
    test: int = 0,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    selection: str = "random",
    normalization: str | tuple[Sequence[float], Sequence[float]] = "default",
) -> Split:
    """A subset of an image set, split without overlap, normalised, with labels for the mean squared error.

    Training and validation samples come from the set's training images, test samples from its test images;
    the files are only read. The training set takes its samples from the front of the chosen order and the
    validation set from the back, so neither changes when the size of the other does, and a larger set begins
    with the samples of a smaller one. (The normalisation of a set without published statistics follows the
    training split.)

    Args:
        name: "cifar10" (official or partial files under the data root) or "digits" (ships with scikit-learn).
        classes: class indices, at least two; None for all. Two classes get the labels -1 (first) and +1, more
            get one-hot rows in the order given.
        train: training samples, at least 1.
        validation: validation samples; 0 for none.
        test: test samples; 0 for none.
        root: folder to look under; default is the environment variable CATAPULT_DATA.
        seed: of the selection.
        dtype: of the tensors.
        selection: "random" draws uniformly, as the paper does; "balanced" draws equally from each class
            (sizes differ by at most one); "first" takes file order, without chance.
        normalization: "default" subtracts the per-channel mean and divides by the per-channel standard
            deviation, published ones where the set has them, else those of the training split; "none" leaves
            pixels in [0, 1]; a pair (mean, std) of one number per channel is used as given.

    Returns:
        Split of x (n, channels, height, width), y (n, 1) or (n, number of classes). Parts of size 0 are None.
        `info` records files, form ("official", "partial", "unverified", "embedded"), classes, normalisation
        and the row of each sample.

    Raises:
        ValueError: naming the argument that is out of range, the numbers where more samples are asked for
            than there are, or the file that is not what it should be and what to put there.
        FileNotFoundError: where the set is not found, with what to put where.

    Cost: reads the whole set, then only touches the chosen images.
    """
    image_set = _image_set(name)
    chosen = _check_classes(image_set, classes)
    for argument, size in (("train", train), ("validation", validation), ("test", test)):
        if type(size) is not int or size < (argument == "train"):
            raise ValueError(
                f"{argument} must be an integer of at least {int(argument == 'train')}, got {size!r}"
            )
    if selection not in _SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(_SELECTIONS)}; got {selection!r}")

    reading = image_set.read(_root(image_set, root))
    train_rows, validation_rows = _choose(
        image_set, reading, "training", {"train": train, "validation": validation}, chosen, selection, seed
    )
    (test_rows,) = _choose(image_set, reading, "test", {"test": test}, chosen, selection, seed)
    mean, std, origin = _statistics(image_set, reading.train.images[train_rows], normalization)

    parts: list[Dataset | None] = []
    for part, pool, rows in (
        ("train", reading.train, train_rows),
        ("validation", reading.train, validation_rows),
        ("test", reading.test, test_rows),
    ):
        if len(rows) == 0:
            parts.append(None)
            continue
        pixels = pool.images[rows] / image_set.white  # [n, channels, height, width] float64
        x = (pixels - mean[:, None, None]) / std[:, None, None]
        info = {
            "set": name,
            "form": reading.form,
            "files": reading.files,
            "split": part,
            "classes": list(chosen),
            "class_names": [image_set.class_names[c] for c in chosen],
            "labels": "-1/+1" if len(chosen) == 2 else "one-hot",
            "normalization": {"mean": mean.tolist(), "std": std.tolist(), "origin": origin},
            "selection": selection,
            "seed": seed,
            "indices": rows.tolist(),
        }
        y = _targets(pool.labels[rows], chosen)
        parts.append(Dataset(torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype), name, info))
    train_part, validation_part, test_part = parts
    assert train_part is not None
    return Split(train_part, validation_part, test_part)


@dataclass(frozen=True)
class Availability:
    """Whether an image set can be loaded.

    Attributes:
        name: of the set.
        form: as in `info["form"]`; None where the set cannot be loaded.
        train: number of training images.
        test: number of test images.
        files: what was read.
        problem: why the set cannot be loaded and what to do; None where it can.
    """

    name: str
    form: str | None
    train: int
    test: int
    files: list[dict[str, Any]]
    problem: str | None


def available(root: str | os.PathLike[str] | None = None) -> list[Availability]:
    """What `load` would find, set by set. Reads and checks every file of every set.

    Args:
        root: folder to look under; default is the environment variable CATAPULT_DATA.
    """
    found = []
    for name, image_set in _SETS.items():
        try:
            reading = image_set.read(_root(image_set, root))
        except (FileNotFoundError, ValueError) as error:
            found.append(Availability(name, None, 0, 0, [], str(error)))
        else:
            sizes = len(reading.train.labels), len(reading.test.labels)
            found.append(Availability(name, reading.form, *sizes, reading.files, None))
    return found


def _image_set(name: str) -> ImageSet:
    if name not in _SETS:
        raise ValueError(f"name must be one of {', '.join(_SETS)}; got {name!r}")
    return _SETS[name]


def _check_classes(image_set: ImageSet, classes: Sequence[int] | None) -> tuple[int, ...]:
    count = len(image_set.class_names)
    if classes is None:
        return tuple(range(count))
    chosen = tuple(classes)
    for c in chosen:
        if type(c) is not int or not 0 <= c < count:
            raise ValueError(f"classes of {image_set.name} must be integers from 0 to {count - 1}, got {c!r}")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"classes must be at least two different ones, got {chosen}")
    return chosen


def _root(image_set: ImageSet, root: str | os.PathLike[str] | None) -> Path:
    """The folder to look under; where the set needs none, any."""
    if image_set.embedded:
        return Path()
    if root is None:
        root = os.environ.get("CATAPULT_DATA") or None
        origin = "CATAPULT_DATA"
        if root is None:
            raise FileNotFoundError(
                f"{image_set.name}: no data root; set CATAPULT_DATA (or root) to a folder "
                f"and {image_set.layout}"
            )
    else:
        origin = "root"
    path = Path(root)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{image_set.name}: {origin} is {path}, which is no folder; make it and {image_set.layout}"
        )
    return path


def _choose(
    image_set: ImageSet,
    reading: Reading,
    side: str,
    sizes: dict[str, int],
    classes: tuple[int, ...],
    selection: str,
    seed: int,
) -> list[np.ndarray]:
    """Rows of the pool for one or two parts: the first from the front of the order, the second from its back.

    Raises:
        ValueError: where the parts together need more than there is.
    """
    pool = reading.train if side == "training" else reading.test
    random = stream(seed, 0 if side == "training" else 1)
    if selection == "balanced":
        groups = [np.flatnonzero(pool.labels == c) for c in classes]
    else:
        groups = [np.flatnonzero(np.isin(pool.labels, classes))]
    quotas = {part: _shares(size, len(groups)) for part, size in sizes.items()}
    if "validation" in quotas:  # its remainder goes to the last classes: where both have one, none pays twice
        quotas["validation"].reverse()
    for i, group in enumerate(groups):
        need = sum(quota[i] for quota in quotas.values())
        if need > len(group):
            which = f"class {classes[i]}" if selection == "balanced" else f"classes {classes}"
            asked = " + ".join(f"{part} {quota[i]}" for part, quota in quotas.items())
            raise ValueError(
                f"{image_set.name} has {len(group)} {side} images of {which} ({reading.form} files), "
                f"but {asked} = {need} are asked for"
            )
    if selection != "first":
        groups = [random.permutation(group) for group in groups]
    front, *back = quotas.values()
    rows = [_interleave([group[:share] for group, share in zip(groups, front, strict=True)])]
    for quota in back:  # everything from the other end: rows of a class, and classes
        shares = [group[::-1][:share] for group, share in zip(groups, quota, strict=True)]
        rows.append(_interleave(shares[::-1]))
    return rows


def _shares(size: int, groups: int) -> list[int]:
    """`size` in `groups` parts that differ by at most one."""
    return [size // groups + (i < size % groups) for i in range(groups)]


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    """First of each part, then second of each, and so on."""
    position = np.concatenate([np.arange(len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(position, kind="stable")]


def _targets(labels: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """(n, 1) of -1 and +1 for two classes, (n, c) one-hot for more; float64."""
    one_hot = (labels[:, None] == np.array(classes)).astype(np.float64)  # [n, c]
    return one_hot[:, 1:] * 2 - 1 if len(classes) == 2 else one_hot


def _statistics(
    image_set: ImageSet, images: np.ndarray, normalization: str | tuple[Sequence[float], Sequence[float]]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Per-channel mean and standard deviation of pixels in [0, 1], (channels,) each, and their origin."""
    channels = images.shape[1]
    if normalization == "none":
        return np.zeros(channels), np.ones(channels), "none: pixels in [0, 1]"
    pair: Any = normalization
    origin = "as given"
    if normalization == "default":
        if image_set.statistics is not None:
            *pair, origin = image_set.statistics
        else:
            pixels = images / image_set.white
            pair, origin = (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))), "training split"
    try:
        mean, std = (np.asarray(values, dtype=np.float64) for values in pair)
        good = mean.shape == std.shape == (channels,) and np.isfinite([mean, std]).all() and (std > 0).all()
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f'normalization must be "default", "none" or (mean, std) of {channels} finite numbers each, '
            f"with std above 0; got {pair!r}"
        )
    return mean, std, origin
