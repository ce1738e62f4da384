"""Files that are either complete or absent: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = [
    "UnreadableFile",
    "UnwritableFile",
    "read_json",
    "read_state",
    "replace_file",
    "sync_folder",
    "write_json",
    "write_state",
    "writing",
]

_TENSOR = "__tensor__"


class UnreadableFile(RuntimeError):
    """A file of a run folder is damaged; the message names it and says what to do."""


class UnwritableFile(RuntimeError):
    """A file of a run folder cannot be written: disk full, no permission; what was stored before is intact."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a failed write into one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UnwritableFile(
            f"{path}: cannot be written ({reason}); what was stored before is intact: make room or give "
            "permission, then run again, and it goes on from its last checkpoint"
        ) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path` in one step.

    A crash or a full disk at any moment leaves the old file or the new one, never a part of one.

    Args:
        path: The file to replace or create.
        write: Receives the path of the temporary file, in the same folder, and writes it.

    Raises:
        UnwritableFile: Writing failed; the temporary file is removed and `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the folder's own entries: without it a rename may be lost when the machine goes down."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file; raises UnreadableFile naming it when it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableFile(
            f"{path}: expected JSON ({error}); delete the run folder to start anew"
        ) from error


def write_state(path: Path, state: Any) -> None:
    """Write a tree of dicts, lists, tensors and JSON scalars as one safetensors file, atomically.

    The scalars travel as JSON in the header of the same file, so tensors and scalars never disagree. Tensors
    are stored contiguous and without sharing: a tensor that appears twice is stored twice.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_take_tensors(state, "", tensors, set()))
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"state": tree}))


def read_state(path: Path) -> Any:
    """Read what write_state wrote; tensors come back on the CPU.

    Raises:
        UnreadableFile: The file is cut off or is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        return _put_tensors(tree, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UnreadableFile(
            f"{path}: expected a complete state file ({error}); delete the run folder to start anew"
        ) from error


def _take_tensors(value: Any, key: str, tensors: dict[str, torch.Tensor], storages: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        if data.untyped_storage().data_ptr() in storages:
            data = data.clone()  # safetensors refuses tensors that share memory
        storages.add(data.untyped_storage().data_ptr())
        tensors[key or "/"] = data
        return {_TENSOR: key or "/"}
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str) or name == _TENSOR:
                raise TypeError(f"state{key}: expected string keys, got {name!r}")
        return {name: _take_tensors(v, f"{key}/{name}", tensors, storages) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(v, f"{key}/{i}", tensors, storages) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"state{key}: expected tensors, dicts, lists and JSON scalars, got {type(value).__name__}"
    )


def _put_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {name: _put_tensors(v, tensors) for name, v in tree.items()}
    if isinstance(tree, list):
        return [_put_tensors(v, tensors) for v in tree]
    return tree
