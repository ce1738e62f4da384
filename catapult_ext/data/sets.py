"""The image sets there are, and where their files are looked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from catapult_ext.data.celeba import CELEBA
from catapult_ext.data.cifar10 import CIFAR10
from catapult_ext.data.cifar10_jpeg import CIFAR10_JPEG
from catapult_ext.data.digits import DIGITS
from catapult_ext.data.fashion_mnist import FASHION_MNIST
from catapult_ext.data.image_set import ImageSet, Reading
from catapult_ext.data.svhn import SVHN
from catapult_ext.data.usps import USPS

__all__ = ["SETS", "data_root", "named", "read"]

SETS = {
    image_set.name: image_set
    for image_set in (CIFAR10, CIFAR10_JPEG, SVHN, FASHION_MNIST, USPS, CELEBA, DIGITS)
}


def named(name: str) -> ImageSet:
    """The set of this name.

    Raises:
        ValueError: where there is none.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}; got {name!r}")
    return SETS[name]


def read(
    image_set: ImageSet, root: str | os.PathLike[str] | None, options: dict[str, Any] | None = None
) -> Reading:
    """What there is of the set under the root, by default that of the environment variable CATAPULT_DATA.

    Raises:
        FileNotFoundError: where the root or the set is not found, with what to put where.
        ValueError: where a file is not what it should be.
    """
    reading = image_set.read(data_root(image_set, root), **(options or {}))
    seen: dict[str, str] = {}
    for file in reading.files:
        if "md5" in file and file["path"] != seen.setdefault(file["md5"], file["path"]):
            raise ValueError(
                f"{image_set.name}: {seen[file['md5']]} and {file['path']} hold the same bytes, so one of them "
                f"is not what its name says; {image_set.layout}"
            )
    return reading


def data_root(image_set: ImageSet, root: str | os.PathLike[str] | None) -> Path:
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
    path = Path(os.path.abspath(root))  # so that its own name is known; links stay what they are called
    if not path.is_dir():
        raise FileNotFoundError(
            f"{image_set.name}: {origin} is {path}, which is no folder; make it and {image_set.layout}"
        )
    return path
