"""Embedding tables and bags: the gradient is a scatter of the sensitivities to the rows of the sample's tokens.

In a bag each token gets its share of what arrives at the bag. The kernel sees only rows that some sample uses, whatever
the size of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.graph import nodes as names
from catapult_ext.graph.certify import RowMap
from catapult_ext.graph.plan import Use
from catapult_ext.rules.per_sample import rank_factors, scale
from catapult_ext.rules.positions import GRAMS, Sizes, position_grams_
from catapult_ext.rules.site_data import SiteData

__all__ = ["rank_factors", "scale"]

NAME = "embedding"
SHORTCUT = True
BATCHED_COTANGENTS = True
CALLS_NODE = False
SWEEPS_GRADIENT = False
LEAD = (1, 2, 3)
MEETS_ANYTHING = True
HOLDS_WHOLE = False
TILE_ROWS = 1
NODES = {("EmbeddingBackward0", 0): "weight", ("EmbeddingBagBackward0", 0): "weight"}


def refuse(node: Any, role: str, transposed: bool) -> str | None:
    """A gradient divided by how often a token came is none of the output."""
    if transposed:
        return "transposed table"
    if names.is_bag(node) and names.bag_tokens(node) is None:
        return "bags of different lengths, or their maximum"
    return "scale_grad_by_freq" if names.embedding_scales_by_frequency(node) else None


def refuse_rows(node: Any, row_map: RowMap) -> str | None:
    """A table of which one vector belongs to several samples."""
    return None if row_map.lead < len(names.output_shape(node, 0)) else "several samples in one vector"


def features(node: Any, argument: int) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens [...], -1 for padding; of bags [bags, P], with the share of each."""
    if not names.is_bag(node):
        return names.embedding_tokens(node)
    bags = names.bag_tokens(node)
    assert bags is not None
    return bags


def _by_sample(data: SiteData) -> tuple[Tensor, Tensor]:
    """Tokens [n, T] and sensitivities [n, c, T, width] of all positions of a sample."""
    b = data.sensitivities_by_sample()  # [n, c, T, ..., width]
    if isinstance(data.features, tuple):
        tokens, share = (data.by_sample(each) for each in data.features)  # [n, bags, P]
        b = b.unsqueeze(3) * share.to(b.dtype)[:, None, :, :, None]
    else:
        assert isinstance(data.features, Tensor)
        tokens = data.by_sample(data.features.unsqueeze(-1))
    return tokens.flatten(1), b.reshape(b.shape[0], b.shape[1], -1, b.shape[-1])


def _scatter(tokens: Tensor, b: Tensor, rows: slice) -> Tensor:
    """Per-sample gradients [n c, len(rows), width] of table[rows] for tokens [n, T], b [n, c, T, width]."""
    n, c, _, width = b.shape
    count = rows.stop - rows.start
    inside = (tokens >= rows.start) & (tokens < rows.stop)  # [n, T]
    if tokens.is_cpu:
        sample, position = inside.nonzero(as_tuple=True)
        row, values = (
            tokens[sample, position] - rows.start,
            b[sample, :, position],
        )  # [tokens in range, c, width]
    else:  # how many are in range is not known without a wait: the others add zeros
        sample = torch.arange(n, device=tokens.device).unsqueeze(1).expand_as(tokens)
        row = (tokens - rows.start).clamp(0, count - 1).long()
        values = (b * inside[:, None, :, None]).transpose(1, 2)  # [n, T, c, width]
    result = b.new_zeros(n, c, count, width)
    # Added where two positions hold one token.
    result.transpose(1, 2).index_put_((sample, row), values, accumulate=True)
    return result.flatten(0, 1)


def _ranks(tokens: Tensor, rows: int) -> tuple[Tensor, int]:
    """Tokens numbered by the rows of the table that are in use, -1 for padding, and how many rows there are at most."""
    if tokens.is_cpu:
        used, ranks = tokens.unique(return_inverse=True)
        padding = int(bool((used < 0).any()))
        return ranks - padding, used.numel() - padding
    ordered, places = tokens.flatten().sort()  # the same without a wait, and so without their number
    first = ordered >= 0
    first[1:] &= ordered[1:] != ordered[:-1]
    ranks = torch.empty_like(places).scatter_(0, places, first.cumsum(0) - 1)
    return ranks.view_as(tokens), min(rows, tokens.numel())


def terms(
    data: SiteData, uses: dict[str, tuple[Use, float, Tensor]]
) -> Iterator[tuple[tuple[str, ...], Tensor | None, Tensor, float, float]]:
    """No part is a product of Gram matrices."""
    return iter(())


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
    """K += G G^T over the rows of the table that are in use."""
    tokens, b = _by_sample(data)
    b = cast(b * factor if factor != 1.0 else b)
    sizes = _sizes(data, tokens, parameter)
    if sizes.choose(tile_bytes, b.element_size())[0] == GRAMS:
        by_position = b.transpose(1, 2)  # [n, T, c, width]

        def product(left: slice, right: slice) -> Tensor:
            same = (tokens[left].reshape(-1, 1) == tokens[right].reshape(1, -1)) & (
                tokens[left].reshape(-1, 1) >= 0
            )
            outer = by_position[left].flatten(0, 2) @ by_position[right].flatten(0, 2).t()
            c = data.outputs
            outer.view(same.shape[0], c, same.shape[1], c).mul_(same[:, None, :, None])
            return outer

        position_grams_(kernel, sizes, sizes.block(tile_bytes, b.element_size()), product)
        return
    ranks, total = _ranks(tokens, parameter.shape[0])
    step = max(1, tile_bytes // max(1, data.rows * b.shape[-1] * b.element_size()))
    for first in range(0, total, step):
        ops.jacobian_accumulate_(kernel, _scatter(ranks, b, slice(first, min(total, first + step))))


def _sizes(data: SiteData, tokens: Tensor, parameter: Tensor) -> Sizes:
    n, positions = tokens.shape
    used, width = min(parameter.shape[0], tokens.numel()), parameter.shape[1]
    return Sizes(n, data.outputs, positions, 0, width, data.sensitivities.numel(), used * width)


def tile(data: SiteData, use: Use, factor: float, rows: slice, parameter: Tensor) -> Tensor:
    """Per-sample gradients of parameter[rows]: [n c, len(rows), width]."""
    tokens, b = _by_sample(data)
    part = _scatter(tokens, b, slice(*rows.indices(parameter.shape[0])[:2]))
    return part * factor if factor != 1.0 else part


def gradient(data: SiteData, use: Use, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
    """Gradient of factor * sum_ij weights_ij f_ij with respect to the parameter, weights [n, c]."""
    tokens, d = data.features, data.weighted(weights)
    if isinstance(tokens, tuple):
        tokens, share = tokens
        d = d.unsqueeze(-2) * share.to(d.dtype).unsqueeze(-1)  # [bags, P, width]
    assert isinstance(tokens, Tensor)
    tokens, d = tokens.flatten(), d.flatten(0, -2)
    result = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    counted = (tokens >= 0).to(d.dtype) * factor  # padding gets no gradient
    return result.index_add_(0, tokens.clamp_min(0), d * counted.unsqueeze(1))


def work(data: SiteData, use: Use, parameter: Tensor, tile_bytes: int) -> tuple[str, float]:
    """Route and multiply-adds of this use's part of the kernel."""
    tokens, b = _by_sample(data)
    return _sizes(data, tokens, parameter).choose(tile_bytes, b.element_size())
