"""Gradients with respect to the inputs of layers, from the sensitivities that a sweep has left: B W.

A layer is a weight in matrix products or convolutions, Out = A M^T. The gradient of output ij with respect to row t
of A, through this layer alone, is B_ijt M, so that nothing but B and M is needed: no features, no further backward.
Where nothing else takes A, the backward passes just that on its way, and the sweep may have kept it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.errors import NonFinite, UnsupportedModule
from catapult_ext.graph import nodes
from catapult_ext.graph.plan import Route, Use
from catapult_ext.observe.sweep import Sweep
from catapult_ext.outer_products import power_rows
from catapult_ext.rules.site_data import SiteData

__all__ = ["LayerGradients", "layer_gradients"]

# A factor of B^T B costs an eigendecomposition [w, w]: from so many rows of B for each of its rows on it is worth it.
_TALL = 16


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """G = s B W of one layer, kept as its factors.

    Attributes:
        weight: M [w, d], the layer's matrix; for a convolution d is the size of a patch.
        sensitivities: B [n, c, T, w] with the positions of all uses side by side.
        scale: s, what the network multiplies the layer with: no pass over B.
        as_matrix: brings a tensor of the parameter's shape into the shape of M.
        formed: G [n, c, T, d] where the backward has passed it, or None.
    """

    weight: Tensor
    sensitivities: Tensor
    scale: float
    as_matrix: Callable[[Tensor], Tensor]
    formed: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of G, n c T."""
        return self.sensitivities.shape[:3].numel()

    @property
    def positions(self) -> int:
        """T, rows per sample and output."""
        return self.sensitivities.shape[2]

    def centered(self, mean: Tensor) -> LayerGradients:
        """The same with a mean over samples [c, T, w] subtracted from B."""
        formed = None if self.formed is None else self.formed - self.scale * (mean @ self.weight)
        return replace(self, sensitivities=self.sensitivities - mean, formed=formed)

    def to(self, dtype: torch.dtype) -> LayerGradients:
        """The same in another dtype; what is formed anew there, is formed in it."""
        if dtype == self.weight.dtype:
            return self
        formed = None if self.formed is None else self.formed.to(dtype)
        return replace(
            self, weight=self.weight.to(dtype), sensitivities=self.sensitivities.to(dtype), formed=formed
        )

    def gradients(self, scale: float | None = None) -> Tensor:
        """Scale G [n c T, d] in memory of its own; without a scale G, which may be `formed` itself."""
        if self.formed is not None:
            formed = self.formed.flatten(0, 2)
            return formed if scale is None else formed * scale
        b = self.sensitivities.flatten(0, 2)  # [n c T, w], half of it zeros behind a ReLU
        result = b.new_zeros((b.shape[0], self.weight.shape[1]))
        factor = self.scale if scale is None else scale * self.scale
        ops.rank_updates_([(result, b.t(), self.weight, None, factor)])
        return result

    def factor(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """F [r, d] with F^T F = scale^2 G^T G: scale G itself, or r = min(w, d) where G has far more rows."""
        w, d = self.weight.shape
        if self.rows <= _TALL * min(w, d):
            return self.to(dtype).gradients(scale)
        if d < w:
            matrix = self.weight.new_zeros((d, d), dtype=dtype)
            self.add_outer_product(matrix, scale**2)
            return power_rows(matrix, 1.0).to(dtype)
        root = power_rows(_gram(self.sensitivities.to(dtype)), 1.0) * (scale * self.scale)
        return root.to(dtype) @ self.weight.to(dtype)

    def add_outer_product(self, out: Tensor, scale: float) -> None:
        """Out [d, d] += scale G^T G in out's dtype, through whichever of B W and B^T B costs less."""
        w, d = self.weight.shape
        forming = 0 if self.formed is not None else w
        through_b = self.rows * w * w / 2 + w * d * (w + d)
        if self.rows * d * (forming + d / 2) <= through_b:
            ops.agop_reduce(self.to(out.dtype).gradients(), scale, out=out)
            return
        b, weight = self.sensitivities.to(out.dtype), self.weight.to(out.dtype)
        product = weight.t() @ ((_gram(b) * (scale * self.scale**2)) @ weight)
        out.add_(product + product.t(), alpha=0.5)  # rounding makes the two triangles differ


def _gram(b: Tensor) -> Tensor:
    """B^T B [w, w] of B [n, c, T, w]."""
    if b.stride(-1) == 1 or b.shape[3] > b.shape[2] or not b.is_cpu:
        return ops.agop_reduce(b.flatten(0, 2))  # on CUDA it notes what is not finite, without a wait
    # Maps of a convolution lie channel by channel: sample by sample they need no copy, which would cost twice as much.
    each = b.flatten(0, 1)  # [n c, T, w]
    gram = torch.bmm(each.transpose(1, 2), each).sum(0, dtype=torch.float64)
    if not bool(torch.isfinite(gram).all()):
        raise NonFinite("model: the sensitivities of a convolution are not finite, or overflow when squared")
    gram = gram.to(b.dtype)
    return (gram + gram.t()).mul_(0.5)


def layer_gradients(sweep: Sweep, names: Iterable[str] | None) -> dict[str, LayerGradients]:
    """Factors of the gradient with respect to the input of every layer that the outputs depend on.

    Args:
        sweep: the pass.
        names: parameters that must be layers; None for every parameter of the sweep that is one.

    Raises:
        UnsupportedModule: a parameter is, or may be, a layer that is not covered.
    """
    wanted = None if names is None else set(names)
    found = {}
    for i, name in enumerate(sweep.state.names):
        if wanted is not None and name not in wanted:
            continue
        problem = _problem(sweep, i)
        if problem is None:
            found[name] = _factors(sweep, i, name)
        elif wanted is not None or not _may_be_left_out(sweep, i):
            raise UnsupportedModule(
                f"model: there is no AGOP of {name}: {problem}; leave it out with params=[...]"
            )
    return found


def _is_layer(sweep: Sweep, use: Use) -> bool:
    """Whether a use is the weight of a matrix product or of a convolution that is not transposed."""
    node = _node(sweep, use)
    if not nodes.is_layer_weight(node, use.argument):
        return False
    return not (nodes.is_convolution(node) and nodes.is_transposed_convolution(node))


def _problem(sweep: Sweep, i: int) -> str | None:
    """Why parameter i is not a layer with an AGOP of its own, or None."""
    plan = sweep.plan
    route, uses = plan.routes[i], plan.uses[i]
    if route == Route.UNUSED:
        return "the output does not depend on it"
    if route == Route.ROWS:
        return f"{plan.reasons[i]}, so that its sensitivities are not known sample by sample"
    if any(use.through is not None for use in uses):
        return "what the layer is given is computed from it"
    other = [use for use in uses if not _is_layer(sweep, use)]
    if other:
        kinds = sorted({nodes.type_name(_node(sweep, use)) for use in other})
        also = "also " if len(other) < len(uses) else ""
        return f"it is {also}used as no weight of a matrix product or a convolution ({', '.join(kinds)})"
    if len({use.transposed for use in uses}) > 1:
        return "it is used transposed as well, and the inputs of the two live in different spaces"
    if len({_groups(sweep, use) for use in uses}) > 1:
        return "its uses have different groups, and so patches of different sizes"
    return None


def _may_be_left_out(sweep: Sweep, i: int) -> bool:
    """Biases, gains, lookups and the like, which have no W^T W to compare with."""
    parameter, plan = sweep.state.parameters[i], sweep.plan
    if plan.routes[i] == Route.UNUSED:
        return True
    is_vector = parameter.numel() == max(parameter.shape, default=1)
    if plan.routes[i] == Route.ROWS:
        return is_vector
    if any(_is_layer(sweep, use) for use in plan.uses[i]):
        return False
    return is_vector or all(nodes.takes_entry_by_entry(_node(sweep, use)) for use in plan.uses[i])


def _node(sweep: Sweep, use: Use) -> Any:
    return sweep.graph_nodes[sweep.plan.sites[use.site].node]


def _groups(sweep: Sweep, use: Use) -> int:
    node = _node(sweep, use)
    return nodes.conv_geometry(node)[3] if nodes.is_convolution(node) else 1


def _factors(sweep: Sweep, i: int, name: str) -> LayerGradients:
    parameter, uses = sweep.state.parameters[i].detach(), sweep.plan.uses[i]
    as_matrix: Callable[[Tensor], Tensor]
    if nodes.is_convolution(_node(sweep, uses[0])):
        as_matrix = partial(_filters_as_matrix, groups=_groups(sweep, uses[0]))
    else:
        as_matrix = Tensor.detach if uses[0].transposed else Tensor.t
    weight = as_matrix(parameter)  # [w, d]
    n, c, w = sweep.output.shape[0], sweep.outputs, weight.shape[0]
    parts, factors = [], []
    for use, factor in zip(uses, sweep.factors[i], strict=True):
        data = sweep.sites.get(use.site)
        if data is not None:  # else no output depends on this use
            part = _by_position(data)  # [n, c, T, w]
            if part is None or part.shape[:2] != (n, c) or part.shape[3] != w:
                raise UnsupportedModule(
                    f"model: there is no AGOP of {name}: its sensitivities are not laid out as samples, channels and "
                    "positions; leave it out with params=[...]"
                )
            parts.append(part)
            factors.append(factor)
    if not parts:
        parts, factors = [weight.new_zeros((n, c, 1, w))], [1.0]
    if len(set(factors)) > 1:
        parts = [part * factor for part, factor in zip(parts, factors, strict=True)]
        factors = [1.0]
    b = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return LayerGradients(weight, b, factors[0], as_matrix, _formed(sweep, uses))


def _formed(sweep: Sweep, uses: list[Use]) -> Tensor | None:
    """G [n, c, T, d] where the backward has passed it."""
    if len(uses) != 1 or uses[0].site not in sweep.layer_inputs or uses[0].site not in sweep.sites:
        return None
    return sweep.sites[uses[0].site].outputs_by_sample(sweep.layer_inputs[uses[0].site])


def _filters_as_matrix(filters: Tensor, groups: int) -> Tensor:
    """Filters [O, C / groups, ...] as the matrix [O, C ...] on whole patches, zero between groups."""
    if groups == 1:
        return filters.flatten(1)
    return torch.block_diag(*filters.flatten(1).chunk(groups))


def _by_position(data: SiteData) -> Tensor | None:
    """B as [n, c, T, w]: the positions of a convolution are those of its output."""
    row_map = data.site.row_map
    if row_map is None or row_map.lead != 1:
        return None
    b = data.sensitivities_by_sample()
    if nodes.is_convolution(data.node):
        b = b.movedim(3, -1).flatten(2, -2)  # [n, c, T, O, ...] to [n, c, T ..., O]
    return b
