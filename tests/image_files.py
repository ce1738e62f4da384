"""Writes small image sets in the official formats, and says what is in them and what comes of loading them."""

from __future__ import annotations

import bz2
import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from PIL import Image

import catapult_ext as cx

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ATTRIBUTES = [f"Attribute_{i}" for i in range(38)] + ["Eyeglasses", "Smiling"]


@dataclass
class Written:
    """What a loader must give: pixels in [0, 1] of shape (N, channels, height, width), and classes."""

    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def _labels(split: str, rows: int, classes: int = 10) -> np.ndarray:
    return (np.arange(rows) * 7 + (split == "test")) % classes


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).integers(0, 256, shape, dtype=np.uint8)


def write_cifar10_binary(root: Path, rows: int = 20) -> Written:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        split = "test" if name == "test_batch" else "train"
        table = _noise(name, (rows, 3073))
        table[:, 0] = _labels(split, rows)
        table.tofile(folder / f"{name}.bin")
        parts[split].append(table[:, 1:].reshape(-1, 3, 32, 32) / 255)
        labels[split].append(table[:, 0].astype(int))
    return Written(*({s: np.concatenate(v) for s, v in group.items()} for group in (parts, labels)))


def write_svhn(root: Path, rows: tuple[int, int] = (40, 20)) -> Written:
    images, labels = {}, {}
    for split, n in zip(("train", "test"), rows, strict=True):
        pixels = _noise(split, (32, 32, 3, n))  # height, width, channel, row
        labels[split] = _labels(split, n)
        digits = np.where(labels[split] == 0, 10, labels[split]).astype(np.uint8)[:, None]
        scipy.io.savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": digits}, do_compression=True)
        images[split] = np.moveaxis(pixels, (3, 2), (0, 1)) / 255
    return Written(images, labels)


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">i{values.ndim}i", 0x800 + values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes(), 1, mtime=0)


def write_fashion_mnist(root: Path, rows: tuple[int, int] = (40, 20)) -> Written:
    folder = root / "fashion-mnist"
    folder.mkdir(parents=True)
    images, labels = {}, {}
    for split, name, n in zip(("train", "test"), ("train", "t10k"), rows, strict=True):
        pixels, labels[split] = _noise(split, (n, 28, 28)), _labels(split, n)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(labels[split].astype(np.uint8)))
        images[split] = pixels[:, None] / 255
    return Written(images, labels)


def _usps(rows: tuple[int, int]) -> Written:
    images, labels = {}, {}
    for split, n in zip(("train", "test"), rows, strict=True):
        images[split] = (_noise(split, (n, 1, 16, 16)) / 255).astype(np.float32).astype(float)
        labels[split] = _labels(split, n)
    return Written(images, labels)


def write_usps_h5(root: Path, rows: tuple[int, int] = (40, 20)) -> Written:
    written = _usps(rows)
    with h5py.File(root / "usps.h5", "w") as file:
        for split, images in written.images.items():
            data = images.reshape(-1, 256).astype(np.float32)
            file.create_dataset(f"{split}/data", data=data, compression="gzip")
            file[f"{split}/target"] = written.labels[split].astype(np.int32)
    return written


def write_usps_libsvm(root: Path, rows: tuple[int, int] = (40, 20)) -> Written:
    """Values -1 ... 1 as text; exact zeros are left out, as the format has it."""
    written = _usps(rows)
    for split, name in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        written.images[split][:, 0, 0, 3] = 0.5
        lines = []
        for image, label in zip(written.images[split], written.labels[split], strict=True):
            values = [f"{i}:{v * 2 - 1!r}" for i, v in enumerate(image.ravel().tolist(), 1) if v != 0.5]
            lines.append(" ".join([str(label + 1), *values]))
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    return written


def jpeg(seed: int, width: int, height: int) -> bytes:
    corners = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1) / 255


def write_cifar10_jpeg(root: Path, rows: tuple[int, int] = (40, 20)) -> Written:
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(root / "cifar10_jpeg.zip", "w") as archive:
        for split, n in zip(("train", "test"), rows, strict=True):
            labels[split] = _labels(split, n)
            contents = [jpeg(1000 * (split == "test") + row, 32, 32) for row in range(n)]
            seen = [0] * 10
            for label, content in zip(labels[split], contents, strict=True):
                archive.writestr(f"{split}/{CLASSES[label]}/{seen[label]:04d}.jpg", content)
                seen[label] += 1
            images[split] = np.stack([decoded(content) for content in contents])
            np.save(root / f"{split}_labels.npy", labels[split].astype(np.uint8))
    return Written(images, labels)


def celeba_lists(names: list[str], with_it: np.ndarray, partition: np.ndarray) -> tuple[str, str]:
    """Text of the list of attributes (Eyeglasses as told, Smiling the reverse) and of the partition."""
    rows = []
    for i, (name, own) in enumerate(zip(names, with_it, strict=True)):
        values = [(-1) ** (i + j) for j in range(38)] + [2 * int(own) - 1, 1 - 2 * int(own)]
        rows.append(name + " " + " ".join(f"{value:2d}" for value in values))
    attributes = "\r\n".join([str(len(rows)), " ".join(ATTRIBUTES) + " ", *rows]) + "\r\n"
    return attributes, "".join(f"{name} {part}\n" for name, part in zip(names, partition, strict=True))


def write_celeba(root: Path, rows: int = 24, form: str = "zip") -> Written:
    """Form "zip", "folder", or "subset" (names of a part, and a zipped list that tells of more images)."""
    names = [f"{3 * i + 1:06d}.jpg" for i in range(rows)]
    contents = {name: jpeg(i, 178, 218) for i, name in enumerate(names)}
    labels = np.arange(rows) // 2 % 2
    partition = np.arange(rows) * 5 % 12 // 6 * 2  # train and test
    partition[::3] = 1
    attributes, parts = celeba_lists(names, labels, partition)
    root.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        (root / "img_align_celeba").mkdir()
        for name, content in contents.items():
            (root / "img_align_celeba" / name).write_bytes(content)
    else:
        ending = "_subset" if form == "subset" else ""
        with zipfile.ZipFile(root / f"img_align_celeba{ending}.zip", "w") as archive:
            archive.writestr("img_align_celeba/", b"")
            for name, content in reversed(contents.items()):  # the order inside does not matter
                archive.writestr(f"img_align_celeba/{name}", content)
    if form == "subset":
        more, _ = celeba_lists([*names, "900000.jpg"], np.append(labels, 1), np.append(partition, 0))
        with zipfile.ZipFile(root / "list_attr_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("list_attr_celeba.txt", more)
        (root / "list_eval_partition_subset.txt").write_text(parts)
    else:
        (root / "list_attr_celeba.txt").write_text(attributes, newline="")
        (root / "list_eval_partition.txt").write_text(parts)
    images = np.stack([decoded(content) for content in contents.values()])
    masks = {"train": partition == 0, "validation": partition == 1, "test": partition == 2}
    return Written(
        {part: images[mask] for part, mask in masks.items()},
        {part: labels[mask] for part, mask in masks.items()},
    )


#: Set, how to write it, further arguments of `load`.
FORMATS: dict[str, tuple[str, Callable[..., Written], dict[str, object]]] = {
    "cifar10-binary": ("cifar10", write_cifar10_binary, {}),
    "cifar10-jpeg": ("cifar10-jpeg", write_cifar10_jpeg, {}),
    "svhn": ("svhn", write_svhn, {}),
    "fashion-mnist": ("fashion-mnist", write_fashion_mnist, {}),
    "usps-h5": ("usps", write_usps_h5, {}),
    "usps-libsvm": ("usps", write_usps_libsvm, {}),
    "celeba-zip": ("celeba", write_celeba, {"image_size": (218, 178)}),
    "celeba-folder": ("celeba", lambda root: write_celeba(root, form="folder"), {"image_size": (218, 178)}),
    "celeba-subset": ("celeba", lambda root: write_celeba(root, form="subset"), {"image_size": (218, 178)}),
}


def outcome(name: str, root: Path, **options: Any) -> str:
    """The word "images", or the one line of the error."""
    try:
        split = cx.data.load(name, train=4, test=2, root=root, **options)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        assert split.train.x.isfinite().all()
        return "images"
    assert "\n" not in message
    assert "put " in message, message
    return message
