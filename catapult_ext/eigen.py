"""Largest eigenpairs of tangent kernels and the critical learning rate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from catapult_ext import ops

__all__ = ["TopEigh", "critical_lr", "spectral_norm", "top_eigh"]


class TopEigh(NamedTuple):
    """Largest eigenpairs of one or many symmetric matrices.

    Attributes:
        values: [..., k] descending.
        vectors: [..., n, k] orthonormal columns; the component of largest magnitude is positive.
        residuals: [..., k] norms of K v - lambda v: |lambda - exact| <= residual.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def top_eigh(
    kernel: Tensor, k: int, *, start: Tensor | TopEigh | None = None, tol: float | None = None
) -> TopEigh:
    """K largest (algebraic) eigenpairs of symmetric matrices, deterministic.

    Args:
        kernel: [..., n, n] float32 or float64; only the lower triangle is read, symmetry is the caller's.
        k: number of pairs, 0 <= k <= n.
        start: vectors [..., n, columns] (or TopEigh) of an earlier step, a warm start for large n.
        tol: stop when every residual is at most tol * lambda_1; default 1e-6 (float32), 1e-10 (float64).

    Returns:
        TopEigh in the dtype of `kernel`. Inside a cluster of eigenvalues only the spanned space is determined.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        NonFinite: the kernel holds a NaN or an infinity.
    """
    if isinstance(start, TopEigh):
        start = start.vectors
    if tol is None:
        tol = 1e-6 if kernel.dtype == torch.float32 else 1e-10
    return TopEigh(*ops.topk_eigh(kernel, k, start=start, tol=tol))


def spectral_norm(kernel: Tensor) -> Tensor:
    """Largest eigenvalue [...] of symmetric positive semi-definite matrices [..., n, n].

    Raises:
        TypeError, ValueError: an argument that does not fit.
        NonFinite: the kernel holds a NaN or an infinity.
    """
    return ops.spectral_norm(kernel)


def critical_lr(kernel: Tensor, *, momentum: float = 0.0) -> Tensor:
    """(1 + momentum) N / lambda_1 with N = kernel.shape[-1]: the critical rate of the mean squared error.

    For n samples and c outputs N = n c and the kernel must be the full one; a kernel of a trace, a sum or one
    output does not give the critical rate of a network with several outputs.

    Args:
        kernel: [..., N, N].
        momentum: of heavy-ball gradient descent, in [0, 1).

    Returns:
        [...]; infinite where lambda_1 is zero.

    Raises:
        ValueError: momentum outside [0, 1).

    Source: paper section 2, 2 / lambda_max(Hessian) ~ n / lambda_1(K) for the loss without a factor 1/2.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    return (1.0 + momentum) * kernel.shape[-1] / spectral_norm(kernel)
