"""What a model may be called with: a tensor, a tuple of tensors or a dict of tensors by keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Inputs",
    "check_input",
    "check_inputs",
    "copies",
    "count",
    "describe",
    "join",
    "move",
    "same_samples",
    "signature",
    "take",
    "tensors",
    "versions",
]

#: model(x), model(*x) or model(**x); every tensor has the samples as its first dimension.
Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


def _parts(x: Inputs) -> list[tuple[str, Tensor]]:
    """Each tensor with what an error calls it, behind the name of the argument."""
    if isinstance(x, Tensor):
        return [("", x)]
    if isinstance(x, tuple):
        return [(f"[{index}]", part) for index, part in enumerate(x)]
    return [(f"[{name!r}]", part) for name, part in x.items()]


def count(x: Inputs) -> int:
    """N, samples."""
    return x.shape[0] if isinstance(x, Tensor) else _parts(x)[0][1].shape[0]


def signature(x: Inputs) -> Any:
    """Hashable description of names, shapes and dtypes."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return type(x), tuple((name, part.shape, part.dtype) for name, part in _parts(x))


def tensors(x: Inputs) -> list[Tensor]:
    """All tensors of an input."""
    return [part for _, part in _parts(x)]


def _map(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple):
        return tuple([change(part) for part in x])
    return {name: change(part) for name, part in x.items()}


def take(x: Inputs, samples: slice) -> Inputs:
    """Some of the samples, as views."""
    return _map(x, lambda part: part[samples])


def move(x: Inputs, device: torch.device) -> Inputs:
    """The samples on another device."""
    return _map(x, lambda part: part.to(device) if isinstance(part, Tensor) else part)


def copies(x: Inputs) -> Inputs:
    """The same numbers in memory of their own."""
    return _map(x, lambda part: part.detach().clone())


def join(parts: Sequence[Inputs]) -> Inputs:
    """The samples of several inputs of one kind, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(tensors(part) for part in parts), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return _map(parts[0], lambda _: next(joined))


def versions(x: Inputs) -> list[int]:
    """Version counters, which change when a tensor is written to."""
    return [part._version for _, part in _parts(x)]


def check_input(x: Any, device: torch.device, name: str = "x") -> None:
    """A tensor [n, ...] on the model's device.

    Raises:
        TypeError: x is no tensor.
        ValueError: it has no samples or lies on another device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (n, ...), got {type(x).__name__}")
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one sample, shape (n, ...), got shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as the model is, got {x.device}")


def check_inputs(x: Any, device: torch.device, name: str = "x") -> None:
    """A tensor [n, ...], or a tuple or dict of such tensors that share n, on the model's device.

    Raises:
        TypeError: x is something else.
        ValueError: it has no samples, its tensors differ in n, or one lies on another device.
    """
    if isinstance(x, Tensor):
        check_input(x, device, name)
        return
    if not isinstance(x, (tuple, Mapping)) or not x:
        what = f"an empty {type(x).__name__}" if isinstance(x, (tuple, Mapping)) else type(x).__name__
        raise TypeError(
            f"{name}: expected a tensor of shape (n, ...), or a tuple or dict of such tensors, got {what}"
        )
    if isinstance(x, Mapping) and not all(isinstance(key, str) for key in x):
        raise TypeError(f"{name}: expected the names of the model's arguments as keys, got {list(x)}")
    parts = _parts(x)
    for place, part in parts:
        check_input(part, device, name + place)
    first, n = parts[0][0], parts[0][1].shape[0]
    for place, part in parts[1:]:
        if part.shape[0] != n:
            raise ValueError(
                f"{name}{place}: expected n = {n} samples in its first dimension as {name}{first} has, got shape "
                f"{tuple(part.shape)}"
            )


def same_samples(x: Inputs, z: Inputs) -> bool:
    """Whether two inputs differ in nothing but the number of samples."""
    return type(x) is type(z) and [(name, part.shape[1:], part.dtype) for name, part in _parts(x)] == [
        (name, part.shape[1:], part.dtype) for name, part in _parts(z)
    ]


def describe(x: Inputs) -> str:
    """Shapes of a sample, for an error."""
    return ", ".join(f"{name + ' ' if name else ''}{tuple(p.shape[1:])} {p.dtype}" for name, p in _parts(x))
