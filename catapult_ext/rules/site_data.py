"""What one backward left at a site, in the layouts that the rules need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catapult_ext.graph.plan import Site

__all__ = ["SiteData"]


def _version(features: Tensor | tuple[Tensor, ...] | None) -> int | None:
    if features is None:
        return None
    return features._version if isinstance(features, Tensor) else features[0]._version


class SiteData:
    """Features and sensitivities of one site.

    Attributes:
        site: structure and row map.
        node: the autograd node of this forward.
        features: A as saved by the node (or the several tensors that a rule reads), None where no parameter here
            needs it.
        sensitivities: B, the gradient of each output with respect to the node's output: the node's own shape
            for one output, [c, *shape] for several.
        outputs: c.
    """

    __slots__ = (
        "_jacobian",
        "_weighted",
        "features",
        "node",
        "outputs",
        "sensitivities",
        "site",
        "version",
    )

    def __init__(
        self,
        site: Site,
        node: Any,
        features: Tensor | tuple[Tensor, ...] | None,
        sensitivities: Tensor,
        outputs: int,
    ) -> None:
        self.site = site
        self.node = node
        self.features = features
        self.version = features._version if isinstance(features, Tensor) else _version(features)
        self.sensitivities = sensitivities
        self.outputs = outputs
        self._jacobian: dict[int, Tensor] = {}
        self._weighted: tuple[Tensor, Tensor] | None = None

    def anew(self) -> SiteData:
        """The same tensors with new values: nothing that was derived from the last ones, whose versions they had."""
        return SiteData(self.site, self.node, self.features, self.sensitivities, self.outputs)

    @property
    def positions(self) -> int:
        """T, rows per sample."""
        assert self.site.row_map is not None
        return self.site.row_map.positions

    @property
    def shape(self) -> torch.Size:
        """Of the node's output."""
        return self.sensitivities.shape if self.outputs == 1 else self.sensitivities.shape[1:]

    @property
    def dim(self) -> int:
        """Dimensions of the node's output."""
        return len(self.shape)

    @property
    def rows(self) -> int:
        """N = n c, rows of the kernel."""
        assert self.site.row_map is not None
        return self.site.row_map.n * self.outputs

    def check_unchanged(self) -> None:
        """Raise when the saved input was modified in place since the backward."""
        if _version(self.features) != self.version:
            raise ValueError(
                "x or an activation was modified in place after the observation; its gradient can no longer be "
                "formed: call gradients(), assign_grads_() or step_() first"
            )

    def by_sample(self, tensor: Tensor) -> Tensor:
        """[rows, ...] as [n, T, ...]."""
        assert self.site.row_map is not None
        return self.site.row_map.by_sample(tensor)

    def sensitivities_by_sample(self) -> Tensor:
        """B as [n, c, T, ...]."""
        return self.outputs_by_sample(self.sensitivities)

    def outputs_by_sample(self, tensor: Tensor) -> Tensor:
        """A tensor laid out as the sensitivities as [n, c, T, ...]."""
        assert self.site.row_map is not None
        if self.outputs == 1:
            return self.by_sample(tensor).unsqueeze(1)
        return self.site.row_map.outputs_by_sample(tensor)

    def sensitivities_one_row(self) -> Tensor:
        """B of a site with one row per sample: [n, ...] for one output, else [n, c, ...], without a copy."""
        row_map = self.site.row_map
        assert row_map is not None
        if row_map.order is not None:
            both = self.sensitivities_by_sample().squeeze(2)
            return both.squeeze(1) if self.outputs == 1 else both
        return self.sensitivities if self.outputs == 1 else self.sensitivities.transpose(0, 1)

    def features_one_row(self) -> Tensor:
        """A of a site with one row per sample: [n, ...]."""
        row_map = self.site.row_map
        assert row_map is not None
        assert isinstance(self.features, Tensor)
        return self.features if row_map.order is None else self.by_sample(self.features).squeeze(1)

    def weighted(self, weights: Tensor) -> Tensor:
        """D = sum_j weights_ij B^(j)_i in the node's own shape: the gradient of sum_ij weights_ij f_ij there.

        Args:
            weights: [n, c]; the result is kept for further calls with the same tensor.
        """
        if self._weighted is None or self._weighted[0] is not weights:
            self._weighted = (weights, self._weight(weights))
        return self._weighted[1]

    def _weight(self, weights: Tensor) -> Tensor:
        row_map = self.site.row_map
        assert row_map is not None
        if self.outputs == 1:
            if row_map.kind == "sample" and self.sensitivities.dim() == 2:
                return self.sensitivities * weights  # the common case, without a detour over rows
            return self.scale_rows(self.sensitivities, row_map.to_rows(weights[:, 0]))
        total = self.scale_rows(self.sensitivities[0], row_map.to_rows(weights[:, 0]))
        for j in range(1, self.outputs):
            total += self.scale_rows(self.sensitivities[j], row_map.to_rows(weights[:, j]))
        return total

    def scale_rows(self, tensor: Tensor, factors: Tensor) -> Tensor:
        """Multiply each row of a tensor in the node's own shape by its factor [rows]."""
        assert self.site.row_map is not None
        lead = self.site.row_map.lead
        rows = factors.unflatten(0, tensor.shape[:lead]) if lead > 1 else factors
        return tensor * rows.reshape(rows.shape + (1,) * (tensor.dim() - lead))

    def cached_jacobian(self, argument: int) -> Tensor | None:
        """Per-sample gradients that the rule has computed for an argument."""
        return self._jacobian.get(argument)

    def cache_jacobian(self, argument: int, jacobian: Tensor) -> None:
        """Keep per-sample gradients for further tiles."""
        self._jacobian[argument] = jacobian
