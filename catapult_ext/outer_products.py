"""Conventions of averaged outer products G^T G, given as matrices or as their factors G, and what compares them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from catapult_ext import ops

__all__ = [
    "average",
    "check_conventions",
    "check_norm",
    "correlation_or_nan",
    "power_rows",
    "raised_and_normalized",
]

_REDUCTIONS = ("mean", "sum")
_NORMS = (None, "max", "trace", "frobenius")
_CORRELATIONS = ("cosine", "pearson")


def check_conventions(**given: object) -> None:
    """Check the keywords that choose between conventions.

    Raises:
        ValueError: a value that is none of a keyword's.
    """
    allowed = {"reduction": _REDUCTIONS, "positions": ("sum", "mean"), "normalize": _NORMS}
    allowed["correlation"] = _CORRELATIONS
    for name, value in given.items():
        if name == "power":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
                raise ValueError(f"power: expected a positive number, got {value!r}")
        elif value not in allowed[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed[name]))}, got {value!r}")


def raised_and_normalized(total: Tensor, power: float, normalize: str | None, what: str) -> Tensor:
    """(AGOP)^power [d, d], then divided by the chosen norm.

    Raises:
        ValueError: the norm is zero; `what` says of which matrix.
    """
    if power != 1.0:
        total = ops.agop_reduce(power_rows(total, power))
    if normalize is None:
        return total
    norm = {"max": total.max, "trace": total.trace, "frobenius": total.norm}[normalize]()
    return total / check_norm(norm, normalize, what)


def check_norm(norm: Tensor, normalize: str, what: str) -> Tensor:
    """The norm, if it is not zero.

    Raises:
        ValueError: it is zero; `what` says of which matrix.
    """
    if not bool(norm > 0):
        raise ValueError(f"normalize: {what} is zero and cannot be divided by its {normalize}")
    return norm


def power_rows(agop: Tensor, power: float) -> Tensor:
    """N [d, d] in float64 with N^T N = agop^power.

    Eigenvalues up to d + 8 roundings of the largest count as zero: of a matrix of less than full rank they are what
    rounding left (up to half of that, also from 60,000 rows), and a root would enlarge it, for a power of 1/4 to a
    thousandth of the largest.
    """
    if len(agop) == 1:  # behind a layer of one unit, as the last one often is: no eigensolver
        return agop.double().clamp(min=0.0) ** (power / 2)
    values, vectors = torch.linalg.eigh(agop.double())  # ascending
    rounding = values[-1] * (len(values) + 8) * torch.finfo(torch.float64).eps
    values = torch.where(values > rounding, values, 0.0)
    return (vectors * values ** (power / 2)).t().contiguous()


def average(
    gradients: Tensor, *, center: bool, reduction: str, normalize: str | None, power: float, what: str
) -> Tensor:
    """AGOP [d, d] of gradients [n, c, d] that are all there, in their dtype.

    Raises:
        ValueError: it is zero and to be normalized; `what` says of which matrix.
    """
    dtype, n = gradients.dtype, gradients.shape[0]
    if power != 1.0:
        gradients = gradients.double()  # roots enlarge the rounding of small eigenvalues
    if center:
        gradients = gradients - gradients.mean(0)
    total = ops.agop_reduce(gradients.flatten(0, 1), 1.0 / n if reduction == "mean" else 1.0)
    return raised_and_normalized(total, power, normalize, what).to(dtype)


def correlation_or_nan(g: Tensor, h: Tensor, correlation: str) -> Tensor:
    """`agop_alignment` of checked arguments, NaN where it is not defined."""
    means = correlation == "pearson"
    squares_g, squares_h = _inner(g, g, means), _inner(h, h, means)
    # A constant matrix leaves rounding when its mean is subtracted.
    least_g, least_h = (1e-13 * _inner(m, m, False) if means else 0.0 for m in (g, h))
    if not (bool(squares_g > least_g) and bool(squares_h > least_h)):
        return torch.full_like(squares_g, math.nan)
    return _inner(g, h, means) / (squares_g * squares_h).sqrt()


def _inner(g: Tensor, h: Tensor, means: bool) -> Tensor:
    """<G, H>_F in float64 for matrices [d, d] or gradients [n, c, d], without the means of their entries if wanted."""
    if g.dim() == 2 and h.dim() == 2:
        g, h = g.double(), h.double()
        return ((g - g.mean()) * (h - h.mean())).sum() if means else (g * h).sum()
    if g.dim() == 3 and h.dim() == 3:
        dtype = torch.promote_types(g.dtype, h.dtype)
        inner = ops.agop_inner(g.flatten(0, 1).to(dtype), h.flatten(0, 1).to(dtype))
    else:
        factor, matrix = (g, h) if g.dim() == 3 else (h, g)
        rows = factor.flatten(0, 1).double()  # [n c, d]
        inner = ((rows @ matrix.double()) * rows).sum()
    return inner - _sum(g) * _sum(h) / g.shape[-1] ** 2 if means else inner


def _sum(g: Tensor) -> Tensor:
    """Sum of all entries of an AGOP, 1^T G 1."""
    if g.dim() == 2:
        return g.double().sum()
    return g.double().sum(-1).square().sum()
