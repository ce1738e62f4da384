"""Largest eigenpairs of tangent kernels and the critical learning rate.

Letters: n rows of a kernel (samples times outputs), k eigenpairs. Nothing here is differentiable.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from catapult_ext import ops

__all__ = ["TopEigh", "critical_lr", "spectral_norm", "top_eigh"]


class TopEigh(NamedTuple):
    """Largest eigenpairs of one or many symmetric matrices K [..., n, n].

    Attributes:
        values: [..., k] eigenvalues lambda, descending.
        vectors: [..., n, k] orthonormal columns v; the component of largest magnitude is positive. Within a cluster
            of (nearly) equal eigenvalues only the space they span is determined, not the single vectors.
        residuals: [..., k] norms ||K v - lambda v|| of the pairs as they stand here. Some eigenvalue lies within the
            residual of each value; with a gap to the others, sin(angle to the exact vector) <= residual / gap.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def top_eigh(
    kernel: Tensor, k: int, *, start: Tensor | TopEigh | None = None, tol: float | None = None
) -> TopEigh:
    """Find the k largest (algebraic) eigenpairs of symmetric matrices.

    Small matrices (n <= 320, or k a large part of n) are reduced to tridiagonal form in float64; large ones go through
    block Krylov iterations that begin with `start` and random vectors from a fixed seed. Where the iteration does not
    converge an exact method takes over, so the result is never a rough one.

    Args:
        kernel: K [..., n, n], float32 or float64, of any definiteness. Only the lower triangle is read: symmetry is
            the caller's.
        k: number of pairs, 0 <= k <= n.
        start: vectors [..., n, columns] of an earlier step, or its TopEigh: a warm start for large n. It changes the
            cost, and the result within the tolerance; any start leads to the same eigenpairs.
        tol: largest residual allowed, relative to lambda_1 (to the largest |eigenvalue| met, if that is larger).
            Default 1e-6 for float32 and 1e-12 for float64.

    Returns:
        TopEigh in the dtype of `kernel`. Eigenvalues to 1e-6 lambda_1 (float32) or 1e-12 lambda_1 (float64), vectors
        orthonormal to the same figures, bitwise repeatable for the same input, `start` and thread count.

    Raises:
        TypeError: `kernel` or `start` of another dtype.
        ValueError: a shape or a k that does not fit.
        NonFinite: the lower triangle holds a NaN or an infinity, or an eigenvalue overflows.

    Cost: 4/3 n^3 + 2 n^2 k operations and 16 n^2 bytes (direct); 2 n^2 (k + k/4 + 4) operations a product, 5 to 20
    products, reading half of K each time, and 20 n (k + k/4 + 4) numbers (Krylov).

    Example:
        >>> top_eigh(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).values
        tensor([3., 2.])

    Source: the top eigenspace of the tangent kernel, paper section 3.
    """
    if isinstance(start, TopEigh):
        start = start.vectors
    return TopEigh(*ops.topk_eigh(kernel, k, start=start, tol=tol))


def spectral_norm(kernel: Tensor) -> Tensor:
    """Largest eigenvalue lambda_1 of symmetric positive semi-definite matrices.

    A few Lanczos steps where they prove the value, a direct method where they do not: the batch kernels of SGD, whose
    first eigenvalue stands out, cost a few passes over the matrix.

    Args:
        kernel: K [..., n, n], float32 or float64; only the lower triangle is read. For a matrix that is not positive
            semi-definite the result is the largest algebraic eigenvalue.

    Returns:
        [...] lambda_1 to 1e-6 (float32) or 1e-12 (float64) relative; 0 for n = 0.

    Raises:
        TypeError: `kernel` of another dtype.
        ValueError: a shape other than (..., n, n).
        NonFinite: the lower triangle holds a NaN or an infinity, or lambda_1 overflows.

    Cost: 2 n^2 operations a step, 3 to 6 steps for tangent kernels; 4/3 n^3 where no eigenvalue stands out.
    """
    return ops.spectral_norm(kernel)


def critical_lr(kernel: Tensor, *, momentum: float = 0.0) -> Tensor:
    """Critical learning rate (1 + momentum) N / lambda_1 of the mean squared error, N = kernel.shape[-1].

    The loss is the mean over all N = n c entries of (f - y)^2, without a factor 1/2. The kernel must be the full one
    of all outputs: a kernel of the trace, the sum or one output does not give the critical rate of a network with
    several outputs.

    Args:
        kernel: K [..., N, N], float32 or float64; only the lower triangle is read.
        momentum: of heavy-ball gradient descent, in [0, 1).

    Returns:
        [...] rates; infinite where lambda_1 is not positive.

    Raises:
        TypeError: `kernel` of another dtype.
        ValueError: momentum outside [0, 1), a shape other than (..., N, N), N = 0.
        NonFinite: the kernel holds a NaN or an infinity.

    Source: paper section 2, eta_crit = 2 / lambda_max(Hessian), there approximated by n / lambda_1(K).
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    norm = spectral_norm(kernel)
    rows = kernel.shape[-1]
    if rows == 0:
        raise ValueError(f"kernel: expected at least one row, got shape {tuple(kernel.shape)}")
    return rate_at_norm(norm, (1.0 + momentum) * rows)


def rate_at_norm(norm: Tensor, rows: float) -> Tensor:
    """Rows / lambda_1, infinite where lambda_1 is not positive."""
    if (
        norm.dim() == 0 and norm.is_cpu
    ):  # one number: plain arithmetic, on the path of every small training step
        value = norm.item()
        return norm.new_full((), rows / value if value > 0.0 else math.inf)
    return rows / norm.clamp_min(0.0)
