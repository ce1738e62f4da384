"""Conv2d with any stride, zero padding, dilation and groups, and its bias.

The per-sample gradient of the weight is a convolution of the sample's input with its sensitivities; position
Grams would cost T^2 instead and win only on very small maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.graph import nodes as names
from catapult_ext.graph.plan import Use
from catapult_ext.rules.site_data import SiteData

NAME = "conv2d"
SHORTCUT = True
BATCHED_COTANGENTS = False
SWEEPS_GRADIENT = True
LEAD = (1,)
NODES = {("ConvolutionBackward0", 1): "weight", ("ConvolutionBackward0", 2): "bias"}


def refuse(node: Any, role: str, transposed: bool) -> str | None:
    """Only plain two-dimensional convolutions."""
    return names.conv_unsupported(node)


def features(node: Any) -> Tensor:
    """Input [n, C, H, W]."""
    return names.conv_input(node)


def scale(node: Any, role: str) -> float:
    """A convolution carries no factor of its own."""
    return 1.0


def _input(data: SiteData) -> Tensor:
    return data.features_one_row()  # [n, C, H, W]


def _geometry(data: SiteData) -> tuple[list[int], list[int], list[int], int]:
    stride, padding, dilation, groups = names.conv_geometry(data.node)
    return list(stride), list(padding), list(dilation), groups


def _maps(data: SiteData) -> Tensor:
    """B as [n, c, O, Ho, Wo]."""
    return data.sensitivities_by_sample().squeeze(2)


def terms(
    data: SiteData, scales: dict[str, float]
) -> Iterator[tuple[tuple[str, ...], Tensor | None, Tensor, float, float]]:
    """The bias: its per-sample gradient is the sum of the sensitivities over the map."""
    if "bias" in scales:
        yield ("bias",), None, _maps(data).sum((-1, -2)), scales["bias"] ** 2, 1.0  # B [n, c, O]


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
    """K += G G^T over tiles of the weight, and its loss gradient from the same tiles."""
    stride, padding, dilation, groups = _geometry(data)
    ops.jacobian_accumulate_conv2d_(
        kernel,
        cast(_input(data)),
        cast(_maps(data)),
        kernel_size=list(parameter.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        grad=gradient,
        weight=None if gradient is None else weights,
        scale=factor,
        tile_bytes=tile_bytes,
    )


def tile(data: SiteData, use: Use, factor: float, rows: slice, parameter: Tensor) -> Tensor:
    """Per-sample gradients of parameter[rows]: [n c, len(rows), ...]."""
    b = _maps(data)
    if use.role == "bias":
        return b[:, :, rows].sum((-1, -2)).flatten(0, 1) * factor
    stride, padding, dilation, groups = _geometry(data)
    kernel_size = list(parameter.shape[2:])
    return ops.conv2d_tile(
        _input(data), b, rows, factor,
        kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
    )  # fmt: skip


def gradient(data: SiteData, use: Use, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    """Gradient of factor * sum_ij weights_ij f_ij with respect to the parameter, weights [n, c]."""
    d = data.weighted(weights)  # [n, O, Ho, Wo]
    if use.role == "bias":
        return d.sum((0, 2, 3)) * factor
    stride, padding, dilation, groups = _geometry(data)
    assert data.features is not None
    result = torch.ops.aten.convolution_backward(
        d, data.features, parameter.detach(), None, stride, padding, dilation, False, [0, 0], groups,
        [False, True, False],
    )[1]  # fmt: skip
    return result * factor if factor != 1.0 else result


def rank_factors(data: SiteData, use: Use, weights: Tensor, parameter: Tensor) -> None:
    """Its gradient is no product of features and sensitivities alone."""
    return None


def work(data: SiteData, role: str) -> tuple[str, float]:
    """Route and multiply-adds of this site's part of the kernel."""
    b = data.sensitivities if data.outputs == 1 else data.sensitivities[0]  # [n, O, Ho, Wo]
    n, width, positions, c = b.shape[0], b.shape[1], b.shape[2] * b.shape[3], data.outputs
    if role == "bias" or data.features is None:
        return "gram", n * n * c * c * width / 2
    return "tiles", float("nan") if positions == 0 else n * c * width * (
        positions + n * c / 2
    ) * data.features.shape[1]
