"""Configurations as plain JSON trees, and the hash that names a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

__all__ = ["config_hash", "describe", "first_difference"]


def describe(value: Any, where: str = "config") -> Any:
    """Turn a configuration into a tree of dicts, lists, strings, numbers, booleans and None.

    Dataclasses become a dict of their fields with the class name under "type"; tensors and arrays become
    their shape, dtype and a checksum of their bytes, so that two different tensors never look equal.

    Args:
        value: Dataclass instance, mapping with string keys, list, tuple, tensor, array, dtype, device, path,
            string, finite number, boolean or None, nested as deep as needed.
        where: Name of the value in error messages.

    Returns:
        The tree. Equal trees mean equal configurations.

    Raises:
        TypeError: A part has no stable description; the message names it.
        ValueError: A number is NaN or infinite.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {value}")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {
            "type": type(value).__name__,
            **{name: describe(v, f"{where}.{name}") for name, v in fields.items()},
        }
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(f"{where}: expected string or integer keys, got {key!r}")
        return {str(key): describe(v, f"{where}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return describe(value.item(), where)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _describe_tensor(torch.as_tensor(value))
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return str(value)
    raise TypeError(
        f"{where}: expected a dataclass, mapping, sequence, tensor, string, number or None, "
        f"got {type(value).__name__}"
    )


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(data.reshape(-1).view(torch.uint8).numpy().data, digest_size=16).hexdigest()
    return {"shape": list(data.shape), "dtype": str(data.dtype), "checksum": digest}


def config_hash(described: Any) -> str:
    """Sixteen hex digits that depend on the content of a described configuration, not on key order."""
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def first_difference(stored: Any, current: Any, where: str) -> str | None:
    """Name the first place where two described trees differ, or None when they are equal."""
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in [*stored, *(k for k in current if k not in stored)]:
            if key not in current or key not in stored:
                return f"{where}.{key} is only in the {'stored' if key in stored else 'current'} one"
            if (found := first_difference(stored[key], current[key], f"{where}.{key}")) is not None:
                return found
        return None
    if isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
        for i, (a, b) in enumerate(zip(stored, current, strict=True)):
            if (found := first_difference(a, b, f"{where}[{i}]")) is not None:
                return found
        return None
    return None if stored == current else f"{where}: stored {stored!r}, current {current!r}"
