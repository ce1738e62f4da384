"""CelebA, aligned and cropped faces with 40 attributes, any of which serves as the label.

Z. Liu, P. Luo, X. Wang, X. Tang, Deep Learning Face Attributes in the Wild, ICCV 2015. Non-commercial research only;
the pictures must not be passed on.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from catapult_ext.data.files import find, find_one, form_of, parsing, read_member, record
from catapult_ext.data.image_set import ImageSet, Pool, Reading
from catapult_ext.data.jpegs import Jpegs, open_archive

__all__ = ["CELEBA"]

_WHAT = "collection of CelebA images"
_WIDTH, _HEIGHT = 178, 218
_IMAGES = 202_599
_DEFAULT_SIZE = 32  # as the images of CIFAR-10 and SVHN, so that every network of the paper takes them
_ATTRIBUTES = 40
_LIST_BYTES = 32 << 20  # of the list of attributes: 26,721,026

_PICTURES = {
    "img_align_celeba.zip": "00d2c5bc6d35e252742224ab0c1e8fcb",
    "img_align_celeba_subset.zip": None,
    "img_align_celeba": None,
}
# The first of these that is there; a list may tell of more images than there are.
_ATTRIBUTE_LISTS = {
    "list_attr_celeba.txt": "75e246fa4810816ffd6ee81facbd244c",
    "list_attr_celeba_subset.txt": None,
    "list_attr_celeba.zip": None,
}
_PARTITIONS = {
    "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
    "list_eval_partition_subset.txt": None,
}
_LAYOUT = (
    "put img_align_celeba.zip (or the unpacked folder img_align_celeba), list_attr_celeba.txt and "
    "list_eval_partition.txt of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html there (of a part of the "
    "images: img_align_celeba_subset.zip, and list_attr_celeba_subset.txt, list_eval_partition_subset.txt)"
)


def _read(
    root: Path, attribute: str = "Eyeglasses", image_size: int | tuple[int, int] | None = None
) -> Reading:
    """Pools of the official partition; `attribute` and `image_size` as in `load`."""
    box, shape, how = _geometry(image_size)
    source = find_one(root, *_PICTURES, layout=_LAYOUT)
    with parsing(source, _WHAT, _LAYOUT):
        archive = None if source.is_dir() else open_archive(source)
        members = _members(
            [path.name for path in source.iterdir()] if archive is None else archive.namelist()
        )
    files = []
    if archive is None:  # nothing but the single files could be compared with a published sum
        relative = source.relative_to(root).as_posix()
        files.append({"path": relative, "rows": len(members), "check": "no published sum"})
    else:
        files.append(record(root, source, _PICTURES[source.name], rows=len(members)))

    path, md5 = _first(root, _ATTRIBUTE_LISTS)
    with parsing(path, "list of CelebA attributes", _LAYOUT):
        names, rows = _attribute_rows(_text(path))
    if attribute not in names:
        raise ValueError(f"attribute must be one of {', '.join(names)}; got {attribute!r}")
    with parsing(path, "list of CelebA attributes", _LAYOUT):
        with_it = _column(rows, 1 + names.index(attribute), members)
    files.append(record(root, path, md5))
    path, md5 = _first(root, _PARTITIONS)
    with parsing(path, "list of the CelebA partition", _LAYOUT):
        partition = _partition(_text(path), members)
    files.append(record(root, path, md5))

    pools: list[Pool] = []
    for part in range(3):
        names = sorted(name for name in members if partition[name] == part)
        labels = np.array([with_it[name] for name in names], dtype=np.int64)
        member = [members[name] for name in names]
        images = Jpegs(source, archive, member, (_WIDTH, _HEIGHT), box, shape, _WHAT, _LAYOUT)
        pools.append(Pool(images, labels))
    train, validation, test = pools
    complete = len(members) == _IMAGES
    info = {"attribute": attribute, "image_size": list(shape), "resizing": how}
    return Reading(form_of(files, complete), files, train, test, validation, info)


def _geometry(
    image_size: int | tuple[int, int] | None,
) -> tuple[tuple[int, int, int, int] | None, tuple[int, int], str]:
    """What to cut out, (height, width) to scale it to, and the same in words."""
    if image_size is None:
        image_size = _DEFAULT_SIZE
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= 1024 for side in sides):
        raise ValueError(
            "image_size must be the side of a square or (height, width), integers from 1 to 1024; "
            f"got {image_size!r}"
        )
    shape = (sides[0], sides[1])
    if isinstance(image_size, int):
        top = (_HEIGHT - _WIDTH) // 2
        box = (0, top, _WIDTH, top + _WIDTH)
        return box, shape, f"central square of {_WIDTH} x {_WIDTH}, bilinear with antialiasing"
    return None, shape, f"whole image of {_HEIGHT} x {_WIDTH} (height x width), bilinear with antialiasing"


def _members(paths: list[str]) -> dict[str, str]:
    """Image name, and where it is in the source."""
    pattern = re.compile(r"(?:img_align_celeba/)?(\d{6}\.jpg)")
    found = {match[1]: path for path in paths if (match := pattern.fullmatch(path))}
    if not found:
        raise ValueError("it has no images NNNNNN.jpg")
    return found


def _first(root: Path, names: dict[str, str | None]) -> tuple[Path, str | None]:
    """The first of the named files that is there once, and its published MD5 sum."""
    present = [name for name in names if find(root, name)]
    if not present:
        raise FileNotFoundError(f"no {' or '.join(names)} under {root}: {_LAYOUT}")
    return find_one(root, present[0], layout=_LAYOUT), names[present[0]]


def _text(path: Path) -> str:
    """What the list says, wherever it is."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            content = read_member(archive, path.with_suffix(".txt").name, _LIST_BYTES)
    else:
        with path.open("rb") as file:
            content = file.read(_LIST_BYTES + 1)
        if len(content) > _LIST_BYTES:
            raise ValueError(f"it has more than {_LIST_BYTES} bytes")
    return content.decode("ascii")


def _attribute_rows(text: str) -> tuple[list[str], list[str]]:
    """Names of the attributes, and the row of each image.

    Raises:
        ValueError: where the list is not what it should be.
    """
    lines = text.splitlines()
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise ValueError(
            "expected the number of images, the names of the attributes, then a row for each image"
        )
    count, names, rows = int(lines[0]), lines[1].split(), [row for row in lines[2:] if row.strip()]
    if len(names) != _ATTRIBUTES:
        raise ValueError(f"its second line names {len(names)} attributes, expected {_ATTRIBUTES}")
    if count != len(rows):
        raise ValueError(f"its first line announces {count} images, but {len(rows)} follow")
    return names, rows


def _column(rows: list[str], column: int, members: dict[str, str]) -> dict[str, int]:
    """1 for every image that has 1 in the column, 0 for every one that has -1."""
    found: dict[str, int] = {}
    for row in rows:
        values = row.split()
        if len(values) != 1 + _ATTRIBUTES or values[column] not in ("1", "-1"):
            raise ValueError(f"expected a name and {_ATTRIBUTES} times 1 or -1, got {row[:60]!r}")
        found[values[0]] = int(values[column] == "1")
    return _complete(found, members)


def _partition(text: str, members: dict[str, str]) -> dict[str, int]:
    """0 (train), 1 (validation) or 2 (test) for every image."""
    found: dict[str, int] = {}
    for row in text.splitlines():
        match row.split():
            case [name, ("0" | "1" | "2") as part]:
                found[name] = int(part)
            case []:
                pass
            case _:
                raise ValueError(f"expected a name and 0, 1 or 2, got {row[:60]!r}")
    return _complete(found, members)


def _complete(found: dict[str, Any], members: dict[str, str]) -> dict[str, Any]:
    missing = members.keys() - found
    if missing:
        raise ValueError(f"it leaves out {len(missing)} of {len(members)} images, such as {min(missing)}")
    return found


CELEBA = ImageSet(
    name="celeba",
    class_names=("without", "with"),
    pair=(0, 1),
    white=255,
    statistics=None,
    read=_read,
    options=("attribute", "image_size"),
    layout=_LAYOUT,
    by_hand="its owners give it only to those who accept their terms, at "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
)
