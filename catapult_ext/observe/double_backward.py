"""Forwards whose backward can be differentiated in turn, and what stands in the way of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from catapult_ext.errors import UnsupportedModule
from catapult_ext.graph import nodes

__all__ = ["derivative", "differentiable", "refuse_cut", "refuse_nodes", "write_flat"]


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on, and attention by its plain formula: the fused one has no second derivative."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def derivative(
    of: Any, by: Sequence[Tensor], weights: Any, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that keeps the graph and takes what is not reached for None.

    Raises:
        UnsupportedModule: an operation on the way has no second derivative.
    """
    try:
        return torch.autograd.grad(
            of, by, weights, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        text = str(error)
        if not any(
            phrase in text for phrase in ("is not implemented", "differentiate twice", "use_reentrant")
        ):
            raise
        raise UnsupportedModule(
            "model: an operation has no second derivative, so that its backward cannot be differentiated; replace it "
            f"by one that has. PyTorch says: {text.splitlines()[0]}"
        ) from error


def refuse_cut(names: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
    """Raise UnsupportedModule where a gradient is there, but nothing of what it was computed from."""
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None and not gradient.requires_grad:
            raise UnsupportedModule(
                f"model: the gradient of {name} cannot be differentiated: the backward of an operation behind it "
                "hides what it computes (detach, or torch.no_grad)"
            )


def refuse_nodes(gradients: Sequence[Tensor | None], reasons: Mapping[str, str]) -> None:
    """Raise UnsupportedModule where the graph of a gradient holds a node of one of these names."""
    pending: list[Any] = [g.grad_fn for g in gradients if g is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        reason = reasons.get(nodes.type_name(node).rstrip("0123456789"))
        if reason is not None:
            raise UnsupportedModule(f"model: it has no second derivative: {reason}")
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        pending.extend(following)


def write_flat(parts: Sequence[Tensor | None], sizes: Sequence[int], out: Tensor) -> None:
    """Lay parts one after the other into out [sum of sizes], zeros for None."""
    for place, part in zip(out.split(list(sizes)), parts, strict=True):
        if part is None:
            place.zero_()
        else:
            place.copy_(part.detach().reshape(-1))
