"""Finds the files of an image set, says what they are, and reads zip members without trusting them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["find", "find_one", "form_of", "parsing", "read_member", "record", "require"]

_SEARCH_DEPTH = 4  # folders below the root: cifar10/exact_partial/cifar-10-batches-py is at depth 3


def find(root: Path, *names: str) -> list[Path]:
    """Every file or folder with one of the names, at most four folders below the root, in order of the names.

    The root itself counts where it bears one of them.
    """
    found = [root] if root.name in names else []
    for folder, below, files in os.walk(root, followlinks=True):
        found += [Path(folder, name) for name in (*below, *files) if name in names]
        depth = len(Path(folder).relative_to(root).parts)
        below[:] = sorted(b for b in below if b not in names) if depth + 1 < _SEARCH_DEPTH else []
    return sorted(found, key=lambda path: (names.index(path.name), path))


def find_one(root: Path, *names: str, layout: str) -> Path:
    """The one file or folder with one of the names.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where there are several: a guess would hide which one was used.
    """
    found = find(root, *names)
    if not found:
        raise FileNotFoundError(f"no {' or '.join(names)} under {root}: {layout}")
    if len(found) > 1:
        shown = [file.relative_to(root).as_posix() for file in found[:4]]
        shown += [f"{len(found) - 4} more"] if len(found) > 4 else []
        raise ValueError(
            f"several of {' or '.join(names)} under {root} ({', '.join(shown)}): "
            "point the data root at the one that is meant, or move the others away"
        )
    return found[0]


def require(folder: Path, names: Sequence[str], layout: str) -> list[Path]:
    """The files of these names in the folder.

    Raises:
        FileNotFoundError: naming those that are missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: {layout}")
    return [folder / name for name in names]


@contextlib.contextmanager
def parsing(path: Path, what: str, layout: str) -> Iterator[None]:
    """Around the reading of one file: whatever goes wrong ends in one line that names it.

    Raises:
        ValueError: with the file, the reason and what to put there.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the libraries that read it fail in any way
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
            reason = f"it cannot be read or is damaged ({type(error).__name__}: {reason})"
        raise ValueError(f"{path} is no {what}: {reason}; {layout}") from error


def record(root: Path, path: Path, official_md5: str | None, **known: Any) -> dict[str, Any]:
    """What `info["files"]` says about one file.

    Args:
        root: the data root; the record holds the path relative to it.
        path: of the file.
        official_md5: the published MD5 sum; None where none is published.
        **known: further entries, such as rows.

    Returns:
        path, bytes, md5, check ("official": the published sum; "differs"; "no published sum") and `known`.

    Cost: reads the file once in each process, in pieces.
    """
    status = path.stat()
    md5 = _md5(path, status.st_size, status.st_mtime_ns)
    check = "no published sum"
    if official_md5 is not None:
        check = "official" if md5 == official_md5 else "differs"
    relative = path.relative_to(root).as_posix()
    return {"path": relative, "bytes": status.st_size, "md5": md5, "check": check, **known}


@lru_cache(maxsize=256)
def _md5(path: Path, size: int, mtime_ns: int) -> str:
    """Of the file as it was when it had this size and time."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def form_of(files: list[dict[str, Any]], complete: bool) -> str:
    """Says whether these files are "official", "unverified" or "partial"; see `Reading`."""
    if all(file["check"] == "official" for file in files):
        return "official"
    return "unverified" if complete else "partial"


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """One member of a zip archive, which is never unpacked to disk.

    Raises:
        ValueError: where there is no such member, or it holds more than `limit` bytes.
    """
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"it has no member {name}") from None
    if member.file_size > limit:
        raise ValueError(f"{name} in it has {member.file_size} bytes, expected at most {limit}")
    return archive.read(member)  # no more than file_size, and the checksum is compared
