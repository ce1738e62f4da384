"""Images that stay in a zip archive or a folder of JPEG files until they are asked for."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catapult_ext.data.files import parsing, read_member

__all__ = ["Jpegs", "open_archive"]

_BYTES = 1 << 20  # of one JPEG file; those of CelebA have about 7,000


@dataclass(frozen=True, eq=False)
class Jpegs:
    """JPEG images, decoded when they are asked for.

    Attributes:
        source: zip archive, or folder.
        archive: the archive, open; None for a folder.
        names: of the members or files, in row order.
        size: (width, height) that each has in the file.
        box: (left, upper, right, lower) to cut out; None for all of it.
        shape: (height, width) to scale the cut to, with Pillow's antialiased bilinear filter; where it has
            that size already, pixels stay as they are.
        what, layout: for the error about one that is damaged.
    """

    source: Path
    archive: zipfile.ZipFile | None
    names: Sequence[str]
    size: tuple[int, int]
    box: tuple[int, int, int, int] | None
    shape: tuple[int, int]
    what: str
    layout: str

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(n, 3, height, width) uint8.

        Raises:
            ValueError: naming the file that is missing, damaged or of another size.
        """
        images = np.empty((len(rows), 3, *self.shape), np.uint8)
        if self.archive is None:
            for i, row in enumerate(rows):
                path = self.source / self.names[row]
                with parsing(path, self.what, self.layout):
                    if path.stat().st_size > _BYTES:
                        raise ValueError(f"it has more than {_BYTES} bytes")
                    images[i] = self._decode(path.read_bytes())
            return images
        with parsing(self.source, self.what, self.layout):
            for i, row in enumerate(rows):
                try:
                    images[i] = self._decode(read_member(self.archive, self.names[row], _BYTES))
                except Exception as error:
                    raise ValueError(f"{self.names[row]} in it cannot be used ({error})") from error
        return images

    def _decode(self, content: bytes) -> np.ndarray:
        """(3, height, width)."""
        from PIL import Image  # needed here only

        with Image.open(io.BytesIO(content), formats=("JPEG",)) as file:
            if file.size != self.size:  # known before anything is decoded
                raise ValueError(f"the image is {_by(file.size)} pixels, expected {_by(self.size)}")
            if file.mode != "RGB":
                raise ValueError(f"the image has mode {file.mode}, expected RGB")
            image = file.crop(self.box or (0, 0, *self.size))
            height, width = self.shape
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)  # [height, width, 3]
        return pixels.transpose(2, 0, 1)  # [3, height, width]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive, which closes itself when nothing refers to it any more: its table of contents is long.

    Raises:
        ValueError: where two members have one name: which of them is meant?
    """
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError(f"it has several members {Counter(names).most_common(1)[0][0]}")
    return archive
