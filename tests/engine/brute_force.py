"""What everything is compared with: one autograd call per output of each sample."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """d f_ij / d w by parameter name, [n c, *shape], on a copy of the model."""
    model = copy.deepcopy(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output = model(x)
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


def kernel_of(rows: dict[str, Tensor]) -> Tensor:
    """K = J J^T [n c, n c]."""
    flat = torch.cat([flat_rows(r) for r in rows.values()], 1)
    return flat @ flat.T


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    if expected.numel() == 0:
        return 0.0
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
