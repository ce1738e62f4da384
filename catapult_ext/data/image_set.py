"""What an image set has to say about itself; `images.py` does the rest, the same way for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ImageSet", "Pool", "Reading", "find_folder"]

_SEARCH_DEPTH = 4  # folders below the root: cifar10/exact_partial/cifar-10-batches-py is at depth 3


@dataclass(frozen=True)
class Pool:
    """Images that a split draws from: (N, channels, height, width) in file order, and class indices (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Reading:
    """An image set as found: training and validation samples come from `train`, test samples from `test`.

    Attributes:
        form: "official" (the published bytes), "partial" (fewer images), "unverified" (complete, but not the
            published bytes) or "embedded" (ships with a library).
        files: what was read, one dict per file with "path" (relative to the root), "rows" and what else is
            known.
        train: training pool.
        test: test pool.
    """

    form: str
    files: list[dict[str, Any]]
    train: Pool
    test: Pool


@dataclass(frozen=True)
class ImageSet:
    """One image set. A new set is a file with one of these and its line in `images.py`.

    Attributes:
        name: as in `cx.data.load(name)`.
        class_names: name of each class; the index is the class.
        white: pixel value of full brightness; pixels are divided by it.
        statistics: per-channel (mean, std) of the divided pixels that normalise by default, and where they
            come from; None measures them on the training split.
        read: from the data root to the images. Raises FileNotFoundError where they are not there, ValueError
            where a file is not what it should be.
        embedded: it ships with a library and needs no data root.
        layout: what to put where, for the message about a missing root.
    """

    name: str
    class_names: tuple[str, ...]
    white: float
    statistics: tuple[tuple[float, ...], tuple[float, ...], str] | None
    read: Callable[[Path], Reading]
    embedded: bool = False
    layout: str = ""


def find_folder(root: Path, name: str, layout: str) -> Path:
    """The one folder called `name` at or below the root.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where there are several.
    """
    found = [root] if root.resolve().name == name else []
    for folder, below, _ in os.walk(root, followlinks=True):
        if name in below:
            found.append(Path(folder, name))
        depth = len(Path(folder).relative_to(root).parts)
        below[:] = sorted(b for b in below if b != name) if depth + 1 < _SEARCH_DEPTH else []
    if not found:
        raise FileNotFoundError(f"no folder {name} under {root}: {layout}")
    if len(found) > 1:
        raise ValueError(
            f"several folders {name} under {root} ({', '.join(str(f.relative_to(root)) for f in found)}): "
            "point the data root at the one that is meant"
        )
    return found[0]
