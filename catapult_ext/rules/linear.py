"""Matrix products with a parameter: Linear, F.linear, tied or transposed weights, scaled products, biases.

Out = alpha A M + beta bias with M = s W^T (or s W). The gradient of output ij with respect to W is
alpha s sum_t B_t A_t^T over the T rows of sample i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.graph import nodes as names
from catapult_ext.graph.plan import Use
from catapult_ext.rules.positions import TILES, Sizes, position_grams_
from catapult_ext.rules.site_data import SiteData

NAME = "linear"
SHORTCUT = True
BATCHED_COTANGENTS = True
CALLS_NODE = False
SWEEPS_GRADIENT = False
LEAD = (1,)
MEETS_ANYTHING = False
HOLDS_WHOLE = False
TILE_ROWS = 1
NODES = {
    ("AddmmBackward0", 2): "weight",
    ("AddmmBackward0", 0): "bias",
    ("MmBackward0", 1): "weight",
}


def refuse(node: Any, role: str, transposed: bool) -> str | None:
    """Biases that arrive transposed are matrices, which no row map covers."""
    return "transposed bias" if role == "bias" and transposed else None


def features(node: Any, argument: int) -> Tensor:
    """A [rows, in]."""
    return names.linear_features(node)


def scale(node: Any, role: str, argument: int) -> float:
    """Alpha or beta of the product."""
    return names.linear_scale(node, role)


def terms(
    data: SiteData, uses: dict[str, tuple[Use, float, Tensor]]
) -> Iterator[tuple[tuple[str, ...], Tensor | None, Tensor, float, float]]:
    """Parts that are scale (A A^T + beta) * (B B^T): (roles covered, A, B, scale, beta).

    `uses` holds for each role the use, its factor and the parameter, which is used nowhere else. One row per
    sample: weight and bias in one term. Tokens: only the bias, with its sensitivities summed.
    """
    weight = uses["weight"][1] if "weight" in uses else None
    bias = uses["bias"][1] if "bias" in uses else None
    if data.positions > 1:
        if bias is not None:
            yield ("bias",), None, data.sensitivities_by_sample().sum(2), bias**2, 1.0  # B [n, c, out]
        return
    b = data.sensitivities_one_row()  # [n, out] or [n, c, out]
    if weight is None:
        assert bias is not None
        yield ("bias",), None, b, bias**2, 1.0
    elif bias is None:
        yield ("weight",), data.features_one_row(), b, weight**2, 0.0
    elif weight == 0.0:
        yield ("weight",), data.features_one_row(), b, 0.0, 0.0
        yield ("bias",), None, b, bias**2, 1.0
    else:
        yield ("weight", "bias"), data.features_one_row(), b, weight**2, (bias / weight) ** 2


def sweep_weight(
    data: SiteData,
    factor: float,
    parameter: Tensor,
    kernel: Tensor,
    gradient: Tensor | None,
    weights: Tensor | None,
    cast: Callable[[Tensor], Tensor],
    tile_bytes: int,
) -> None:
    """K += G G^T for the weight over T > 1 positions; its gradient is cheaper as one product afterwards."""
    assert isinstance(data.features, Tensor)
    a, b = cast(data.by_sample(data.features)), cast(data.sensitivities_by_sample())
    sizes = _sizes(data, parameter)
    if sizes.choose(tile_bytes, b.element_size())[0] == TILES:
        ops.jacobian_accumulate_tokens_(kernel, a, b, scale=factor, tile_bytes=tile_bytes)
        return
    b = b.transpose(1, 2)  # [n, T, c, out]

    def product(left: slice, right: slice) -> Tensor:
        (xa, xb), (za, zb) = ((a[i].flatten(0, 1), b[i].flatten(0, 1)) for i in (left, right))
        return ops.ntk_gram_cross([xa], [xb], [za], [zb], [factor**2])

    position_grams_(kernel, sizes, sizes.block(tile_bytes, b.element_size()), product)


def _sizes(data: SiteData, parameter: Tensor) -> Sizes:
    width = data.sensitivities.shape[-1]
    n, c, positions, entries = data.rows // data.outputs, data.outputs, data.positions, parameter.numel()
    return Sizes(n, c, positions, entries // width, width, n * c * positions * entries, entries)


def tile(data: SiteData, use: Use, factor: float, rows: slice, parameter: Tensor) -> Tensor:
    """Per-sample gradients of parameter[rows]: [n c, len(rows), ...]."""
    b = data.sensitivities_by_sample()  # [n, c, T, out]
    if use.role == "bias":
        return b.sum(2)[..., rows].flatten(0, 1) * factor
    assert isinstance(data.features, Tensor)
    a = data.by_sample(data.features)  # [n, T, in]
    if not use.transposed:  # the product took W itself: W [in, out]
        a = a[..., rows].unsqueeze(1).expand(-1, data.outputs, -1, -1).flatten(0, 1)  # [n c, T, rows]
        return torch.bmm(a.transpose(1, 2), b.flatten(0, 1)) * factor
    return ops.token_tile(a, b, rows, factor)  # W [out, in]


def rank_factors(
    data: SiteData, use: Use, weights: Tensor, parameter: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None] | None:
    """(L, R, w) with L^T diag(w) R the gradient of sum_ij weights_ij f_ij, or None where it is no such product.

    L = None stands for the ones of a bias. With one output and one row per sample w is `weights` itself, so that
    nothing is computed here.
    """
    row_map = data.site.row_map
    assert row_map is not None
    b, w = data.sensitivities, None
    if data.outputs == 1 and row_map.kind == "sample" and b.dim() == 2:
        w = weights
    else:
        b = data.weighted(weights)
    if use.role == "bias":
        return (None, b, w) if parameter.shape == b.shape[1:] else None
    a = data.features
    assert isinstance(a, Tensor)
    return (b, a, w) if use.transposed else (a, b, w)


def gradient(data: SiteData, use: Use, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    """Gradient of factor * sum_ij weights_ij f_ij with respect to the parameter, weights [n, c]."""
    if use.role == "bias":
        return (data.weighted(weights).sum(0) * factor).sum_to_size(parameter.shape)
    assert isinstance(data.features, Tensor)
    a, d = data.features, data.weighted(weights)
    product = d.t() @ a if use.transposed else a.t() @ d
    return product.mul_(factor) if factor != 1.0 else product


def work(data: SiteData, use: Use, parameter: Tensor, tile_bytes: int) -> tuple[str, float]:
    """Route and multiply-adds of this use's part of the kernel."""
    rows, width = data.rows, data.sensitivities.shape[-1]
    if use.role == "bias":
        return "gram", rows * rows * width / 2
    if data.positions == 1:
        fan_in = parameter.numel() // width
        return "gram", (rows // data.outputs) ** 2 * fan_in / 2 + rows * rows * width / 2
    return _sizes(data, parameter).choose(tile_bytes, data.sensitivities.element_size())
