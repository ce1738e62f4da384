"""Convolutions in one, two or three dimensions, with any stride, zero padding, dilation and groups, and transposed.

The per-sample gradient of the weight is a convolution of the sample's input with its sensitivities. In a transposed
convolution the two exchange their roles. Several maps of one sample are one map with a dimension more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.graph import nodes as names
from catapult_ext.graph.certify import RowMap
from catapult_ext.graph.plan import Use
from catapult_ext.rules.positions import GRAMS, Sizes, position_grams_
from catapult_ext.rules.site_data import SiteData

NAME = "convolution"
SHORTCUT = True
BATCHED_COTANGENTS = False
CALLS_NODE = False
SWEEPS_GRADIENT = True
LEAD = (1,)
MEETS_ANYTHING = False
HOLDS_WHOLE = False
TILE_ROWS = ops.CONV_CHANNELS
NODES = {("ConvolutionBackward0", 1): "weight", ("ConvolutionBackward0", 2): "bias"}


def refuse(node: Any, role: str, transposed: bool) -> str | None:
    """Filters as they are."""
    return "transposed filters" if transposed else None


def features(node: Any, argument: int) -> Tensor:
    """Input [n, C, ...]."""
    return names.conv_input(node)


def scale(node: Any, role: str, argument: int) -> float:
    """A convolution carries no factor of its own."""
    return 1.0


def refuse_rows(node: Any, row_map: RowMap) -> str | None:
    """Several maps of a sample take a dimension more, and three is the most that a convolution has."""
    many = row_map.positions > 1 and len(names.conv_geometry(node)[0]) == 3
    return "several volumes per sample" if many else None


def _operands(data: SiteData, parameter: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Input [m, C, ...], sensitivities [m, c, O, ...] and geometry of the convolution with this weight gradient.

    Its kernel rows are those of the site, and its maps have two or three dimensions.
    """
    assert isinstance(data.features, Tensor)
    stride, padding, dilation, groups = names.conv_geometry(data.node)
    kernel_size = list(parameter.shape[2:])
    input = data.by_sample(data.features)  # [n, T, C, ...]
    b = data.sensitivities_by_sample()  # [n, c, T, O, ...]
    if data.positions > 1 or len(kernel_size) == 1:
        input, b = input.movedim(1, 2), b.movedim(2, 3)  # [n, C, T, ...], [n, c, O, T, ...]
        kernel_size, stride, dilation = ([1, *each] for each in (kernel_size, stride, dilation))
        padding = [0, *padding]
    else:
        input, b = input.squeeze(1), b.squeeze(2)
    if names.is_transposed_convolution(data.node):
        if data.outputs > 1:
            input = input.repeat_interleave(data.outputs, 0)
        input, b = b.flatten(0, 1), input.unsqueeze(1)  # [n c, O, ...], [n c, 1, C, ...]
    geometry = {
        "kernel_size": list(kernel_size),
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
    }
    return input, b, geometry


def _summed_maps(data: SiteData) -> Tensor:
    """Gradient of the bias [n, c, O]: sensitivities summed over maps."""
    b = data.sensitivities_by_sample()  # [n, c, T, O, ...]
    return b.flatten(4).sum((2, 4))


def terms(
    data: SiteData, uses: dict[str, tuple[Use, float, Tensor]]
) -> Iterator[tuple[tuple[str, ...], Tensor | None, Tensor, float, float]]:
    """The bias: its per-sample gradient is the sum of the sensitivities over the map."""
    if "bias" in uses:
        yield ("bias",), None, _summed_maps(data), uses["bias"][1] ** 2, 1.0


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
    input, b, geometry = _operands(data, parameter)
    input, b = cast(input), cast(b)
    weights = None if gradient is None else weights
    sizes = _sizes(data, input, b, geometry)
    if sizes.choose(tile_bytes, b.element_size())[0] == GRAMS:
        _sweep_position_grams(sizes, factor, kernel, input, b, geometry, tile_bytes)
        if gradient is not None:
            assert weights is not None
            gradient += _weight_gradient(data, factor, weights.view(-1, data.outputs), parameter)
        return
    if input.dim() == 4:
        if gradient is not None:
            gradient = gradient.view(*gradient.shape[:2], *geometry["kernel_size"])
        ops.jacobian_accumulate_conv2d_(
            kernel, input, b, grad=gradient, weight=weights, scale=factor, tile_bytes=tile_bytes, **geometry
        )
        return
    for rows, part in ops.conv_tiles(input, b, factor, tile_bytes=tile_bytes, **geometry):
        grad = None if gradient is None else gradient[rows]
        ops.jacobian_accumulate_(kernel, part, grad=grad, weight=weights)


def _sizes(data: SiteData, input: Tensor, b: Tensor, geometry: dict[str, Any]) -> Sizes:
    m, c, width = b.shape[:3]
    positions, groups = b.shape[3:].numel(), geometry["groups"]
    fan_in = input.shape[1] // groups * math.prod(geometry["kernel_size"])
    entries = fan_in * width
    # Patches of maps in three dimensions are not unfolded; with groups, G has few entries and is cheap.
    separable = groups == 1 and input.dim() == 4
    return Sizes(m, c, positions, fan_in, width, m * c * positions * entries, entries, fan_in, separable)


def _sweep_position_grams(
    sizes: Sizes,
    factor: float,
    kernel: Tensor,
    input: Tensor,
    b: Tensor,
    geometry: dict[str, Any],
    tile_bytes: int,
) -> None:
    by_position = b.flatten(3).permute(0, 3, 1, 2)  # [m, T, c, O]
    taps = [geometry[name] for name in ("kernel_size", "dilation", "padding", "stride")]

    def operands(samples: slice) -> tuple[Tensor, Tensor]:
        patches = torch.nn.functional.unfold(input[samples], *taps)  # [s, C taps, T]
        return patches.transpose(1, 2).flatten(0, 1), by_position[samples].flatten(0, 1)

    def product(left: slice, right: slice) -> Tensor:
        (xa, xb), (za, zb) = operands(left), operands(right)
        return ops.ntk_gram_cross([xa], [xb], [za], [zb], [factor**2])

    position_grams_(kernel, sizes, sizes.block(tile_bytes, b.element_size()), product)


def tile(data: SiteData, use: Use, factor: float, rows: slice, parameter: Tensor) -> Tensor:
    """Per-sample gradients of parameter[rows]: [n c, len(rows), ...]."""
    if use.role == "bias":
        return _summed_maps(data)[:, :, rows].flatten(0, 1) * factor
    input, b, geometry = _operands(data, parameter)
    rows = slice(*rows.indices(parameter.shape[0])[:2])
    part = ops.conv_tile(input, b, rows, factor, **geometry)
    return part.view(*part.shape[:2], *parameter.shape[1:])


def gradient(data: SiteData, use: Use, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    """Gradient of factor * sum_ij weights_ij f_ij with respect to the parameter, weights [n, c]."""
    d = data.weighted(weights)  # [rows, O, ...]
    if use.role == "bias":
        return d.flatten(2).sum((0, 2)) * factor
    return _weight_gradient(data, factor, weights, parameter)


def _weight_gradient(data: SiteData, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    d = data.weighted(weights)
    stride, padding, dilation, groups = names.conv_geometry(data.node)
    assert isinstance(data.features, Tensor)
    input = data.features
    if names.is_transposed_convolution(data.node):
        d, input = input, d
    shape = parameter.new_empty(1).expand(parameter.shape)  # only its shape is read
    result = torch.ops.aten.convolution_backward(
        d,
        input,
        shape,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [False, True, False],
    )[1]
    return result.mul_(factor) if factor != 1.0 else result


def rank_factors(data: SiteData, use: Use, weights: Tensor, parameter: Tensor) -> None:
    """Its gradient is no product of features and sensitivities alone."""
    return None


def work(data: SiteData, use: Use, parameter: Tensor, tile_bytes: int) -> tuple[str, float]:
    """Route and multiply-adds of this use's part of the kernel."""
    rows = data.rows
    if use.role == "bias":
        return "gram", rows * rows * parameter.numel() / 2
    input, b, geometry = _operands(data, parameter)
    return _sizes(data, input, b, geometry).choose(tile_bytes, b.element_size())
