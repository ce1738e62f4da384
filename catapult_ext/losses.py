"""The split of the loss along eigenvectors of the kernel (paper eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decompose_loss"]


def decompose_loss(residual: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Split the mean squared residual into the part in the span of `vectors` and the rest.

    Args:
        residual: r [n, c] or [n]; flattened sample-major.
        vectors: [n c, k] orthonormal columns.

    Returns:
        (top, rest), 0-dim, means over all n c entries: top + rest = mean(r^2) up to rounding, both >= 0.

    Raises:
        ValueError: lengths that do not fit.
    """
    flat = residual.reshape(-1)  # [n c]
    if vectors.dim() != 2 or vectors.shape[0] != flat.numel():
        raise ValueError(
            f"vectors: expected shape ({flat.numel()}, k) for a residual of {flat.numel()} entries, got "
            f"{tuple(vectors.shape)}"
        )
    if flat.numel() == 0:
        raise ValueError("residual: expected at least one entry, got none")
    inside = vectors @ (vectors.t() @ flat)  # [n c]
    outside = flat - inside
    return torch.dot(inside, inside) / flat.numel(), torch.dot(outside, outside) / flat.numel()
