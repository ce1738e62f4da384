"""Bare parameters: added to activations, multiplied with them, or repeated over samples, with broadcasting.

Class tokens, position embeddings, scales, the slope of PReLU, the gain of RMSNorm, gain and shift of InstanceNorm.
The derivative of the node's output by the parameter is one number for each element: its per-sample gradient is that
number times B, summed over the elements of the sample that share an entry of the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catapult_ext.graph import nodes as names
from catapult_ext.graph.plan import Use
from catapult_ext.rules.per_sample import gradient, rank_factors, terms, tile, work
from catapult_ext.rules.site_data import SiteData

__all__ = ["gradient", "rank_factors", "terms", "tile", "work"]

NAME = "elementwise"
SHORTCUT = True
BATCHED_COTANGENTS = True
CALLS_NODE = False
LEAD = (1, 2, 3)
MEETS_ANYTHING = True
HOLDS_WHOLE = True
TILE_ROWS = 1
NODES = {
    ("AddBackward0", 0): "bias",
    ("AddBackward0", 1): "bias",
    ("SubBackward0", 0): "bias",
    ("SubBackward0", 1): "bias",
    ("MulBackward0", 0): "weight",
    ("MulBackward0", 1): "weight",
    ("DivBackward0", 0): "weight",
    ("DivBackward0", 1): "weight",
    ("PreluKernelBackward0", 1): "weight",
    ("ExpandBackward0", 0): "bias",
    ("RepeatBackward0", 0): "bias",
}


def refuse(node: Any, role: str, transposed: bool) -> str | None:
    """Everything is covered."""
    return None


def features(node: Any, argument: int) -> Tensor:
    """Derivative of a product, a quotient or a PReLU."""
    return names.elementwise_derivative(node, argument)


def scale(node: Any, role: str, argument: int) -> float:
    """Sign and alpha of a sum."""
    return names.elementwise_scale(node, argument)


def jacobian(data: SiteData, use: Use, shape: tuple[int, ...]) -> Tensor:
    """Per-sample gradients [n c, *shape]."""
    row_map = data.site.row_map
    assert row_map is not None
    b = data.sensitivities
    if use.role == "weight":
        assert isinstance(data.features, Tensor)
        b = b * data.features
    repeats = names.repeats(data.node)
    if repeats is not None:
        return _repeated(data, b, shape, repeats)
    own = (1,) * (data.dim - len(shape)) + shape  # of the parameter, as broadcast
    lead = own[: row_map.lead]
    by_sample = data.outputs_by_sample(b)  # [n, c, T, ...]
    summed = [3 + k for k, size in enumerate(own[row_map.lead :]) if size == 1 and by_sample.shape[3 + k] > 1]
    if all(size == 1 for size in lead):
        summed += [2] if row_map.positions > 1 else []
    elif lead != _positions_kept(data):
        return _one_by_one(data, b, lambda each: each.sum_to_size(shape))
    if summed:
        by_sample = by_sample.sum(summed)
    return by_sample.reshape(data.rows, *shape)


def _positions_kept(data: SiteData) -> tuple[int, ...]:
    """Leading sizes of a parameter that has an entry for each position and none for samples."""
    row_map = data.site.row_map
    assert row_map is not None
    if row_map.lead != 2 or row_map.kind not in ("major", "minor"):
        return ()
    sizes = (row_map.n, row_map.positions) if row_map.kind == "major" else (row_map.positions, row_map.n)
    if data.shape[:2] != sizes:
        return ()
    return (1, sizes[1]) if row_map.kind == "major" else (sizes[0], 1)


def _repeated(data: SiteData, b: Tensor, shape: tuple[int, ...], repeats: tuple[int, ...]) -> Tensor:
    own = (1,) * (len(repeats) - len(shape)) + shape
    interleaved = [size for pair in zip(repeats, own, strict=True) for size in pair]  # r0, s0, r1, s1, ...
    row_map = data.site.row_map
    assert row_map is not None
    if row_map.lead == 1 and row_map.kind in ("sample", "major") and repeats[0] % row_map.n == 0:
        interleaved[0] //= row_map.n
        parts = data.outputs_by_sample(b).reshape(data.rows, *interleaved)
        return parts.sum(list(range(1, parts.dim(), 2))).view(data.rows, *shape)
    every_other = list(range(0, len(interleaved), 2))
    return _one_by_one(data, b, lambda each: each.reshape(interleaved).sum(every_other).view(shape))


def _one_by_one(data: SiteData, b: Tensor, reduce: Any) -> Tensor:
    """Per-sample gradients where a parameter has entries for single rows: each sample's part alone."""
    row_map = data.site.row_map
    assert row_map is not None
    unit = torch.zeros(row_map.n, dtype=b.dtype, device=b.device)
    gradients = []
    for i in range(row_map.n):
        unit[i] = 1.0
        rows = row_map.to_rows(unit)
        gradients += [
            reduce(data.scale_rows(each, rows)) for each in (b.unsqueeze(0) if data.outputs == 1 else b)
        ]
        unit[i] = 0.0
    return torch.stack(gradients)
