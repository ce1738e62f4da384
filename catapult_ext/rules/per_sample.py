"""What rules share whose per-sample gradients are small, or are the sensitivities themselves.

Such a rule gives `jacobian(data, use, shape)`, per-sample gradients [n c, *shape] without the use's factor; gain
and shift of a normalisation, bare parameters. Everything else follows from it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from catapult_ext.graph.plan import Use
from catapult_ext.rules.site_data import SiteData

__all__ = ["gradient", "rank_factors", "scale", "terms", "tile", "work"]


def _jacobian(data: SiteData, use: Use, parameter: Tensor) -> Tensor:
    """[n c, *shape that the parameter has at the site], kept for further calls."""
    cached = data.cached_jacobian(use.argument)
    if cached is None:
        shape = tuple(parameter.shape)
        cached = data.site.rule.jacobian(data, use, shape[::-1] if use.transposed else shape)
        data.cache_jacobian(use.argument, cached)
    return cached


def _transformed(jacobian: Tensor, use: Use, factor: float) -> Tensor:
    """The gradients with respect to the parameter, from those with respect to what arrives at the site."""
    if use.transposed:
        jacobian = jacobian.mT
    return jacobian * factor if factor != 1.0 else jacobian


def terms(
    data: SiteData, uses: dict[str, tuple[Use, float, Tensor]]
) -> Iterator[tuple[tuple[str, ...], Tensor | None, Tensor, float, float]]:
    """G G^T of each parameter: see `rules/linear.py`. A transposition leaves it as it is."""
    for role, (use, factor, parameter) in uses.items():
        flat = _jacobian(data, use, parameter).reshape(-1, data.outputs, parameter.numel())  # [n, c, q]
        yield (role,), None, flat, factor**2, 1.0


def tile(data: SiteData, use: Use, factor: float, rows: slice, parameter: Tensor) -> Tensor:
    """Per-sample gradients of parameter[rows]: [n c, len(rows), ...]."""
    jacobian = _transformed(_jacobian(data, use, parameter), use, factor)
    return jacobian[:, rows] if parameter.dim() else jacobian.unsqueeze(1)


def gradient(data: SiteData, use: Use, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    """Gradient of factor * sum_ij weights_ij f_ij with respect to the parameter, weights [n, c]."""
    flat = _jacobian(data, use, parameter).flatten(1) if parameter.dim() else _jacobian(data, use, parameter)
    total = (weights.reshape(1, -1) @ flat.reshape(weights.numel(), -1)).squeeze(0)
    shape = parameter.shape[::-1] if use.transposed else parameter.shape
    return _transformed(total.view(shape), use, factor)


def rank_factors(data: SiteData, use: Use, weights: Tensor, parameter: Tensor) -> None:
    """Its gradient is no product of features and sensitivities alone."""
    return None


def work(data: SiteData, use: Use, parameter: Tensor, tile_bytes: int) -> tuple[str, float]:
    """Route and multiply-adds of this use's part of the kernel: one pass over the sensitivities, then G G^T."""
    return "tiles", float(data.sensitivities.numel() + data.rows**2 * parameter.numel() / 2)


def scale(node: Any, role: str, argument: int) -> float:
    """No factor of its own."""
    return 1.0
