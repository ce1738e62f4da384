"""Loads image sets: classes, subsets, splits, labels and normalisation, the same way for every set."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from catapult_ext.data.dataset import Dataset, Split
from catapult_ext.data.image_set import Images, ImageSet, Pool, Reading
from catapult_ext.data.labels import LabelNoise, targets
from catapult_ext.data.selection import SELECTIONS, choose
from catapult_ext.data.sets import SETS, named, read
from catapult_ext.data.streams import stream

__all__ = ["Availability", "available", "load"]

POOLS = ("official", "pooled")
_PIECE = 1 << 25  # bytes of float64 pixels in the making at a time


def load(
    name: str,
    *,
    classes: Sequence[int] | str | None = "pair",
    train: int = 128,
    validation: int = 0,
    test: int = 0,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    selection: str = "random",
    pool: str = "official",
    normalization: str | tuple[Sequence[float], Sequence[float]] = "default",
    label_noise: float | LabelNoise = 0.0,
    attribute: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Split:
    """A subset of an image set, split without overlap, normalised, with labels for the mean squared error.

    Training samples come from the set's training images, test samples from its test images, validation samples
    from its validation images (CelebA) or else from its training images; the files are only read. The training
    set takes its samples from the front of the chosen order and the validation set from the back, so neither
    changes when the size of the other does, and a larger set begins with the samples of a smaller one. (The
    normalisation of a set without published statistics follows the training split.) Neighbouring rows of
    SVHN can be crops of one photo: there the validation samples are the last ones of the file, the five rows
    before them are left out, and the training samples are drawn from the rows before these.

    Args:
        name: "cifar10", "cifar10-jpeg", "svhn", "fashion-mnist", "usps", "celeba" (files under the data root) or
            "digits" (ships with scikit-learn).
        classes: class indices, at least two; None for all; "pair" for the two that the paper takes: 7 and 9 of
            cifar10, cifar10-jpeg and digits, 0 and 2 of svhn, fashion-mnist and usps; of celeba, 0 without
            the attribute and 1 with it. Two classes get the labels -1 (first) and +1, more get one-hot rows
            in the order given.
        train: training samples, at least 1.
        validation: validation samples; 0 for none.
        test: test samples; 0 for none.
        root: folder to look under; default is the environment variable CATAPULT_DATA.
        seed: of the selection, and of the label noise unless that has its own.
        dtype: of the tensors.
        selection: "random" draws uniformly, as the paper does, so that classes keep their natural shares;
            "balanced" draws equally from each class (sizes differ by at most one); "first" takes file order,
            without chance.
        pool: "official" keeps to the official parts; "pooled" draws all three parts, still without overlap,
            from all images of the set together, where its official parts are too small. Results are then
            not comparable with published ones, and of celeba one person can be in two parts. Rows are
            counted through training, validation and test images.
        normalization: "default" subtracts the per-channel mean and divides by the per-channel standard
            deviation, published ones where the set has them, else those of the training split; "training"
            takes those of the training split in any case; "none" leaves pixels in [0, 1]; a pair (mean, std)
            of one number per channel is used as given.
        label_noise: share of the training labels to make wrong, or a `LabelNoise` that says more.
        attribute: of celeba only: which of its 40 attributes is the label; "Eyeglasses" by default.
        image_size: of celeba only: side in pixels that the central square of 178 x 178 is scaled to (32 by
            default), or (height, width) that the whole image is scaled to; (218, 178) leaves it as it is.

    Returns:
        Split of x (n, channels, height, width), y (n, 1) or (n, number of classes). Parts of size 0 are None.
        `info` records files, form ("official", "partial", "unverified", "derived", "embedded"), classes,
        normalisation, label noise with the positions of the wrong labels, and the row of each sample.

    Raises:
        ValueError: naming the argument that is out of range, the numbers where more samples are asked for
            than there are, or the file that is not what it should be and what to put there.
        FileNotFoundError: where the set is not found, with what to put where.

    Cost: reads every file once; of JPEG files, only the chosen ones are decoded. Memory: the files' own arrays
    (uint8: 300 MB for all of SVHN; none for JPEG), the result, and the chosen images as in the file.
    """
    image_set = named(name)
    chosen = _check_classes(image_set, classes)
    sizes = {"train": train, "validation": validation, "test": test}
    for argument, size in sizes.items():
        if type(size) is not int or size < (argument == "train"):
            raise ValueError(
                f"{argument} must be an integer of at least {int(argument == 'train')}, got {size!r}"
            )
    for argument, value, known in (("selection", selection, SELECTIONS), ("pool", pool, POOLS)):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}; got {value!r}")
    noise = label_noise if isinstance(label_noise, LabelNoise) else LabelNoise(label_noise)
    options = {"attribute": attribute, "image_size": image_size}
    options = {option: value for option, value in options.items() if value is not None}
    for option in options.keys() - image_set.options:
        takers = ", ".join(other.name for other in SETS.values() if option in other.options)
        raise ValueError(f"{option} is an argument of {takers}, not of {name}")

    reading = read(image_set, root, options)
    rows: dict[str, np.ndarray] = {}
    sources: dict[str, Pool] = {}
    for side, source, parts, key in _pools(reading, pool, sizes):
        what = f"{name} has {{}} {side}images of {{}} ({reading.form} files)"
        random = stream(seed, key)
        chosen_rows = choose(what, source.labels, parts, chosen, selection, random, image_set.neighbours)
        rows |= zip(parts, chosen_rows, strict=True)
        sources |= dict.fromkeys(parts, source)

    datasets: dict[str, Dataset] = {}
    for part in sizes:  # the training set first: it may say how to normalise
        if len(rows[part]) == 0:
            continue
        pixels = sources[part].images[rows[part]]  # [n, channels, height, width], dtype of the file
        if part == "train":
            mean, std, origin = _statistics(image_set, pixels, normalization)
        x = torch.empty(pixels.shape, dtype=dtype)
        for at, piece in _pieces(pixels, image_set.white):
            x[at] = torch.from_numpy((piece - mean[:, None, None]) / std[:, None, None])
        labels, changed = noise.apply(sources[part].labels[rows[part]], chosen, part, seed)
        info = {
            "set": name,
            "form": reading.form,
            "files": reading.files,
            **reading.info,
            "split": part,
            "pool": pool,
            "classes": list(chosen),
            "class_names": [image_set.class_names[c] for c in chosen],
            "labels": "-1/+1" if len(chosen) == 2 else "one-hot",
            "label_noise": noise.record(changed, chosen, part, seed),
            "normalization": {"mean": mean.tolist(), "std": std.tolist(), "origin": origin},
            "selection": selection,
            "seed": seed,
            "indices": rows[part].tolist(),
        }
        y = torch.from_numpy(targets(labels, chosen)).to(dtype)
        datasets[part] = Dataset(x, y, name, info)
    return Split(datasets["train"], datasets.get("validation"), datasets.get("test"))


@dataclass(frozen=True)
class Availability:
    """Whether an image set can be loaded.

    Attributes:
        name: of the set.
        form: as in `info["form"]`; None where the set cannot be loaded.
        train: number of training images.
        validation: number of official validation images; 0 where the set has none of its own.
        test: number of test images.
        files: what was read.
        problem: why the set cannot be loaded and what to do; None where it can.
        fetchable: whether `fetch` can get its official files.
    """

    name: str
    form: str | None
    train: int
    validation: int
    test: int
    files: list[dict[str, Any]]
    problem: str | None
    fetchable: bool


def available(
    root: str | os.PathLike[str] | None = None, names: Sequence[str] | None = None
) -> list[Availability]:
    """What `load` would find, set by set. Reads and checks every file of every set, but decodes no JPEG.

    Args:
        root: folder to look under; default is the environment variable CATAPULT_DATA.
        names: of the sets to look for; None for all.

    Raises:
        ValueError: for a name that no set has.
    """
    found = []
    for name in SETS if names is None else names:
        image_set = named(name)
        fetchable = bool(image_set.downloads)
        try:
            reading = read(image_set, root)
        except (FileNotFoundError, ValueError) as error:
            found.append(Availability(name, None, 0, 0, 0, [], str(error), fetchable))
        else:
            validation = 0 if reading.validation is None else len(reading.validation.labels)
            sizes = len(reading.train.labels), validation, len(reading.test.labels)
            found.append(Availability(name, reading.form, *sizes, reading.files, None, fetchable))
    return found


def _check_classes(image_set: ImageSet, classes: Sequence[int] | str | None) -> tuple[int, ...]:
    count = len(image_set.class_names)
    if isinstance(classes, str):
        if classes != "pair":
            raise ValueError(f'classes must be class indices, None or "pair"; got {classes!r}')
        return image_set.pair
    if classes is None:
        return tuple(range(count))
    chosen = tuple(classes)
    for c in chosen:
        if type(c) is not int or not 0 <= c < count:
            raise ValueError(f"classes of {image_set.name} must be integers from 0 to {count - 1}, got {c!r}")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"classes must be at least two different ones, got {chosen}")
    return chosen


@dataclass(frozen=True, eq=False)
class _Joined:
    """Images of several sources, one after the other."""

    sources: list[Images]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        start = 0
        pieces, places = [], []
        for images in self.sources:
            places.append(np.flatnonzero((rows >= start) & (rows < start + len(images))))
            pieces.append(images[rows[places[-1]] - start])
            start += len(images)
        joined = np.empty((len(rows), *pieces[0].shape[1:]), pieces[0].dtype)
        for place, piece in zip(places, pieces, strict=True):
            joined[place] = piece
        return joined


def _pools(reading: Reading, pool: str, sizes: dict[str, int]) -> list[tuple[str, Pool, dict[str, int], int]]:
    """What the parts are drawn from.

    Returns:
        For each pool its name, itself, its parts (the first comes from the front of the order, the others from
        the back) and the number of its stream of random numbers.
    """
    train, validation, test = sizes.items()
    if pool == "pooled":
        pools = [p for p in (reading.train, reading.validation, reading.test) if p is not None]
        joined = Pool(_Joined([p.images for p in pools]), np.concatenate([p.labels for p in pools]))
        return [("", joined, dict((train, test, validation)), 3)]
    if reading.validation is None:
        own = [("training ", reading.train, dict((train, validation)), 0)]
    else:
        own = [
            ("training ", reading.train, dict((train,)), 0),
            ("validation ", reading.validation, dict((validation,)), 2),
        ]
    return [*own, ("test ", reading.test, dict((test,)), 1)]


def _pieces(pixels: np.ndarray, white: float) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows after the other, divided by `white`, as float64."""
    step = max(1, _PIECE // (8 * math.prod(pixels.shape[1:])))
    for start in range(0, len(pixels), step):
        at = slice(start, start + step)
        yield at, np.divide(pixels[at], white, dtype=np.float64)


def _statistics(
    image_set: ImageSet, images: np.ndarray, normalization: str | tuple[Sequence[float], Sequence[float]]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Per-channel mean and standard deviation of pixels in [0, 1], (channels,) each, and their origin."""
    channels = images.shape[1]
    if normalization == "none":
        return np.zeros(channels), np.ones(channels), "none: pixels in [0, 1]"
    pair: Any = normalization
    origin = "as given"
    if normalization == "default" and image_set.statistics is not None:
        *pair, origin = image_set.statistics
    elif normalization in ("default", "training"):
        pair, origin = _measure(images, image_set.white), "training split"
    try:
        mean, std = (np.asarray(values, dtype=np.float64) for values in pair)
        good = mean.shape == std.shape == (channels,) and np.isfinite([mean, std]).all() and (std > 0).all()
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f'normalization must be "default", "training", "none" or (mean, std) of {channels} finite numbers each, '
            f"with std above 0; got {pair!r}"
        )
    return mean, std, origin


def _measure(images: np.ndarray, white: float) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and standard deviation of the divided pixels, (channels,) each."""
    axes, count = (0, 2, 3), images.size // images.shape[1]
    mean = sum(piece.sum(axes) for _, piece in _pieces(images, white)) / count
    squares = sum(np.square(piece - mean[:, None, None]).sum(axes) for _, piece in _pieces(images, white))
    return mean, np.sqrt(squares / count)
