"""What an image set has to say about itself; `images.py` does the rest, the same way for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = ["Download", "ImageSet", "Images", "Pool", "Reading"]


class Images(Protocol):
    """Images in file order, of which any may still be in their file: an array is one."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Those of the integer rows (n,): (n, channels, height, width) in the dtype of the file."""
        ...


@dataclass(frozen=True)
class Pool:
    """Images that a split draws from, (N, channels, height, width) in file order, and class indices (N,)."""

    images: Images
    labels: np.ndarray


@dataclass(frozen=True)
class Reading:
    """An image set as found.

    Attributes:
        form: "official" (the published bytes), "partial" (fewer images), "unverified" (complete, but not known
            to be the published bytes), "derived" (made from the set; pixels differ) or "embedded" (ships with
            a library).
        files: what was read, one dict per file (`files.record`).
        train: training pool; validation samples come from it, too, unless there is a pool of their own.
        test: test pool.
        validation: official validation pool, where the set has one.
        info: what else the record of every part should say.
    """

    form: str
    files: list[dict[str, Any]]
    train: Pool
    test: Pool
    validation: Pool | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Download:
    """One official file.

    Attributes:
        url: where it is published.
        md5: its published MD5 sum.
        folder: where it goes, below the data root.
        unpack: members to take from it, where it is a tar archive; None keeps the file as it is.
    """

    url: str
    md5: str
    folder: str
    unpack: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ImageSet:
    """One image set. A new set is a file with one of these and its line in `sets.py`.

    Attributes:
        name: as in `cx.data.load(name)`.
        class_names: name of each class; the index is the class.
        pair: the two classes taken by default, those of the paper.
        white: pixel value of full brightness; pixels are divided by it.
        statistics: per-channel (mean, std) of the divided pixels that normalise by default, and where they
            come from; None measures them on the training split.
        read: from the data root and the `options` to the images. Raises FileNotFoundError where they are not
            there, ValueError where a file is not what it should be.
        options: names of the further arguments of `load` that `read` takes.
        neighbours: up to so many rows in succession may show the same thing, so that validation samples are
            taken from the end of the pool and not at random.
        embedded: it ships with a library and needs no data root.
        layout: what to put where, for the message about what is missing.
        downloads: the official files, for `fetch`.
        by_hand: why `fetch` cannot get it, where it cannot.
    """

    name: str
    class_names: tuple[str, ...]
    pair: tuple[int, int]
    white: float
    statistics: tuple[tuple[float, ...], tuple[float, ...], str] | None
    read: Callable[..., Reading]
    options: tuple[str, ...] = ()
    neighbours: int = 1
    embedded: bool = False
    layout: str = ""
    downloads: tuple[Download, ...] = ()
    by_hand: str = ""
