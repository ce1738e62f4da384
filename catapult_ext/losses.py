"""The split of the loss along eigenvectors of the kernel (paper eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decompose_loss"]


def decompose_loss(residual: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Split the mean squared residual into the part in the span of `vectors` and the rest.

    With P = V V^T, N = n c and r = f - y:  L = mean(r^2) = ||P r||^2 / N + ||r - P r||^2 / N.  The rest is computed
    from the projected-out residual, not by subtracting squares, so it keeps its digits when the top part spikes.

    Args:
        residual: r [n, c] or [N], flattened sample-major (index i c + j), float32 or float64.
        vectors: V [N, k] orthonormal columns, of the dtype and on the device of `residual`; k = 0 is allowed.

    Returns:
        (top, rest), 0-dim, both >= 0: means over all N entries; top + rest = mean(r^2) to rounding.

    Raises:
        TypeError: dtypes that differ.
        ValueError: shapes or devices that do not fit, or no entry at all.

    Cost: 4 N k operations.

    Example:
        >>> decompose_loss(torch.tensor([3.0, 1.0]), torch.tensor([[1.0], [0.0]]))
        (tensor(4.5000), tensor(0.5000))

    Source: paper section 3, equation 2 (L_<=s and L_>s).
    """
    if residual.dim() not in (1, 2) or residual.numel() == 0:
        raise ValueError(
            f"residual: expected shape (n, c) or (n c,) with at least one entry, got {tuple(residual.shape)}"
        )
    rows = residual.numel()
    if vectors.dim() != 2 or vectors.shape[0] != rows:
        raise ValueError(
            f"vectors: expected shape ({rows}, k) for a residual of {rows} entries, got {tuple(vectors.shape)}"
        )
    if vectors.dtype != residual.dtype:
        raise TypeError(f"vectors: expected {residual.dtype} as residual has, got {vectors.dtype}")
    if vectors.device != residual.device:
        raise ValueError(f"vectors: expected a tensor on {residual.device}, got {vectors.device}")
    flat = residual.reshape(-1)  # [N]
    inside = vectors @ (vectors.t() @ flat)  # [N]
    outside = flat - inside  # [N]
    return torch.dot(inside, inside) / rows, torch.dot(outside, outside) / rows
