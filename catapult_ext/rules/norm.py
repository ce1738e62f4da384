"""Gain and shift of LayerNorm, GroupNorm and BatchNorm.

The per-sample gradient of the gain is sum_t B_t * (normalised input)_t over the positions of a sample, that of the
shift sum_t B_t. InstanceNorm repeats its parameters over the samples and RMSNorm multiplies by its gain: those are
elementwise uses. BatchNorm with the statistics of the batch couples samples, but only below itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from catapult_ext.graph import nodes as names
from catapult_ext.graph.certify import RowMap
from catapult_ext.graph.plan import Use
from catapult_ext.rules.per_sample import gradient, rank_factors, scale, terms, tile, work
from catapult_ext.rules.site_data import SiteData

__all__ = ["gradient", "rank_factors", "scale", "terms", "tile", "work"]

NAME = "norm"
SHORTCUT = True
BATCHED_COTANGENTS = True
CALLS_NODE = False
LEAD = (1, 2, 3)
MEETS_ANYTHING = False
HOLDS_WHOLE = True
TILE_ROWS = 1
NODES = {
    (f"Native{kind}NormBackward0", argument): role
    for kind in ("Layer", "Group", "Batch")
    for argument, role in ((1, "weight"), (2, "bias"))
}


def refuse(node: Any, role: str, transposed: bool) -> str | None:
    """A matrix of gains that arrives transposed."""
    return "transposed gains" if transposed else None


def refuse_rows(node: Any, row_map: RowMap) -> str | None:
    """Samples side by side in the channels, each with gains of its own."""
    return "several samples in its channels" if _by_channel(node) and row_map.lead > 1 else None


def _by_channel(node: Any) -> bool:
    """LayerNorm keeps the last dimensions, the others keep the channels, which follow the rows."""
    return names.type_name(node) != "NativeLayerNormBackward0"


def features(node: Any, argument: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, mean and inverse deviation."""
    return names.norm_saved(node)


def jacobian(data: SiteData, use: Use, shape: tuple[int, ...]) -> Tensor:
    """Per-sample gradients [n c, *shape]."""
    b = data.sensitivities
    if use.role == "weight":
        assert isinstance(data.features, tuple)
        input, mean, inverse = data.features
        normalised = ((input - mean) * inverse).view(b.shape[-data.dim :])
        b = b * normalised
    b = data.outputs_by_sample(b)  # [n, c, T, ...]
    if _by_channel(data.node):
        b = b.flatten(4).sum((2, 4)) if b.dim() > 4 else b.sum(2)
    elif b.dim() > 3:
        b = b.flatten(2, b.dim() - len(shape) - 1).sum(2)
    return b.reshape(data.rows, *shape)
