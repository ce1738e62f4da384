"""What everything is compared with: one autograd call per output of each sample."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from catapult_ext.observe.inputs import Inputs

__all__ = ["call", "flat_rows", "jacobian", "kernel_of", "relative", "rows_of"]


def call(model: nn.Module, x: Inputs) -> Tensor:
    """model(x), model(*x) or model(**x)."""
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, Mapping) else model(*x)


def jacobian(model: nn.Module, x: Inputs) -> dict[str, Tensor]:
    """Rows d f_ij / d w by parameter name, [n c, *shape], on a copy of the model."""
    return rows_of(copy.deepcopy(model), x)


def rows_of(model: nn.Module, x: Inputs) -> dict[str, Tensor]:
    """The same on the model itself, whose buffers a forward may change."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output = call(model, x)
    rows = [
        torch.autograd.grad(entry, list(named.values()), retain_graph=True, allow_unused=True)
        for entry in output.reshape(-1)
    ]
    return {
        name: torch.stack([torch.zeros_like(p) if r is None else r for r in column])
        for (name, p), column in zip(named.items(), zip(*rows, strict=True), strict=True)
    }


def flat_rows(rows: Tensor) -> Tensor:
    """[n c, *shape] as [n c, q], also for a scalar parameter."""
    return rows.reshape(rows.shape[0], -1)


def kernel_of(rows: dict[str, Tensor], columns: dict[str, Tensor] | None = None) -> Tensor:
    """K = J(x) J(z)^T [n c, m c], of x with itself without `columns`."""
    left = torch.cat([flat_rows(r) for r in rows.values()], 1)
    right = left if columns is None else torch.cat([flat_rows(columns[name]) for name in rows], 1)
    return left @ right.T


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    if expected.numel() == 0:
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
