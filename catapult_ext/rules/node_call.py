"""Any other node that takes a parameter directly, one sample at a time: exact, n c calls of that node alone.

The node's own backward is linear in the incoming gradient, so its parameter gradient for B masked to the rows
of sample i is the gradient of output ij. It covers whatever has no rule of its own as long as rows can be told
apart, such as bilinear layers; `rules/linear.py` describes the methods.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catapult_ext.graph import nodes as names
from catapult_ext.graph.plan import Use
from catapult_ext.rules.site_data import SiteData

NAME = "node"
SHORTCUT = False
BATCHED_COTANGENTS = True
CALLS_NODE = True
SWEEPS_GRADIENT = False
LEAD = (1, 2, 3)
MEETS_ANYTHING = True
HOLDS_WHOLE = True
TILE_ROWS = 1


def refuse(node: Any, scaled: bool, transposed: bool) -> str | None:
    """Why a node cannot be called alone."""
    if scaled or transposed:
        return f"it is transformed before it reaches {names.type_name(node)}"
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return f"{names.type_name(node)} is a custom autograd function"
    if names.output_count(node) != 1:
        return f"{names.type_name(node)} has {names.output_count(node)} outputs"
    return None


def features(node: Any, argument: int) -> None:
    """The node keeps what it needs."""
    return None


def scale(node: Any, role: str, argument: int) -> float:
    """The node's backward includes every factor."""
    return 1.0


def _call(data: SiteData, grad_output: Tensor, argument: int, parameter: Tensor) -> Tensor:
    result = data.node(grad_output)
    gradient = result[argument] if isinstance(result, tuple) else result
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.sum_to_size(parameter.shape)


def _jacobian(data: SiteData, argument: int, parameter: Tensor) -> Tensor:
    """Per-sample gradients [n c, *parameter.shape]."""
    cached = data.cached_jacobian(argument)
    if cached is not None:
        return cached
    row_map = data.site.row_map
    assert row_map is not None
    jacobian = parameter.new_empty((row_map.n * data.outputs, *parameter.shape))
    unit = torch.zeros(row_map.n, dtype=parameter.dtype, device=parameter.device)
    for i in range(row_map.n):
        unit[i] = 1.0
        rows = row_map.to_rows(unit)
        for j in range(data.outputs):
            b = data.sensitivities if data.outputs == 1 else data.sensitivities[j]
            jacobian[i * data.outputs + j] = _call(data, data.scale_rows(b, rows), argument, parameter)
        unit[i] = 0.0
    data.cache_jacobian(argument, jacobian)
    return jacobian


def tile(data: SiteData, use: Use, factor: float, rows: slice, parameter: Tensor) -> Tensor:
    """Per-sample gradients of parameter[rows]: [n c, len(rows), ...]."""
    jacobian = _jacobian(data, use.argument, parameter)
    return jacobian[:, rows] if parameter.dim() else jacobian.unsqueeze(1)


def gradient(data: SiteData, use: Use, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    """Gradient of factor * sum_ij weights_ij f_ij with respect to the parameter, weights [n, c]."""
    result = _call(data, data.weighted(weights), use.argument, parameter)
    return result * factor if factor != 1.0 else result


def rank_factors(data: SiteData, use: Use, weights: Tensor, parameter: Tensor) -> None:
    """Its gradient is no product of features and sensitivities alone."""
    return None


def work(data: SiteData, use: Use, parameter: Tensor, tile_bytes: int) -> tuple[str, float]:
    """Route and multiply-adds of this use's part of the kernel: calls of the node, each over all its elements."""
    return "node calls", float(data.rows * data.sensitivities.numel() + data.rows**2 * parameter.numel() / 2)
