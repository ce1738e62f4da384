"""Float64 brute force for the tests of ntk_gram and jacobian_accumulate: explicit per-sample Jacobians."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Bound of |dK_ij| / sqrt(K_ii K_jj).
GRAM_BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}


def layer_jacobian(a: Tensor, b: Tensor, scale: float, beta: float) -> Tensor:
    """Return rows sqrt(scale) [vec(b_ij a_i^T), sqrt(beta) b_ij]: [n c, m w + w] in float64."""
    a, b = a.double(), b.double()
    b = b.unsqueeze(1) if b.dim() == 2 else b  # [n, c, w]
    weight = torch.einsum("icw,im->icwm", b, a).flatten(2)  # [n, c, w m]
    return math.sqrt(scale) * torch.cat([weight, math.sqrt(beta) * b], 2).flatten(0, 1)


def jacobian(
    a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], beta: Sequence[float]
) -> Tensor:
    """Concatenate the Jacobians of all layers: [n c, p]."""
    return torch.cat([layer_jacobian(*layer) for layer in zip(a, b, scale, beta, strict=True)], 1)


def gram_error(kernel: Tensor, rows: Tensor, columns: Tensor | None = None) -> float:
    """Return max |dK_ij| / sqrt(K_ii K_jj) against rows columns^T in float64 (0 / 0 counts as no error)."""
    columns = rows if columns is None else columns
    exact = rows @ columns.T
    size = torch.outer(rows.norm(dim=1), columns.norm(dim=1))
    difference = (kernel.double() - exact).abs()
    assert not difference.isnan().any()
    assert (difference[size == 0] == 0).all()
    return float((difference / size.clamp_min(1e-300)).max()) if difference.numel() else 0.0


def nan_like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an output full of NaN: whatever a kernel fails to write is seen."""
    return torch.full(tuple(shape), math.nan, dtype=dtype)
