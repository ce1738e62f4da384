"""The gradient of the loss from what a sweep has left, and the step along it."""

from __future__ import annotations

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.graph.plan import Use
from catapult_ext.observe.model_state import ModelState
from catapult_ext.rules.site_data import SiteData

__all__ = ["LossGradient"]


class LossGradient:
    """Gradient of the loss, formed as late and in as few temporaries as possible.

    Each parameter's gradient is either there already (`swept`) or follows from the features, the sensitivities and
    the residual, in place where a step asks for it.
    """

    def __init__(
        self,
        state: ModelState,
        swept: dict[int, Tensor],
        uses: dict[int, list[tuple[Use, float, SiteData]]],
        residual: Tensor,
    ) -> None:
        self._state = state
        self._swept = swept
        self._uses = uses
        self._residual = residual
        self._scale = 2.0 / residual.numel()  # d loss / d f = scale * residual; rides along in the factors

    def __contains__(self, i: int) -> bool:
        return i in self._swept or bool(self._uses.get(i))

    def dense(self, i: int) -> Tensor:
        """Gradient of parameter i."""
        if i not in self._swept:
            parameter = self._state.parameters[i]
            total: Tensor | None = None
            for use, factor, data in self._uses[i]:
                data.check_unchanged()
                part = data.site.rule.gradient(data, use, factor * self._scale, self._residual, parameter)
                total = part if total is None else total + part
            assert total is not None
            self._swept[i] = total
        return self._swept[i]

    def step_(self, rate: float | Tensor) -> None:
        """Parameter -= rate gradient for every parameter.

        A rate that is a tensor (0-dim, dtype and device of the parameters) is not read by the host.
        """
        parameters = self._state.parameters
        residual, scale = self._residual, -self._scale
        if isinstance(rate, Tensor):
            residual = residual * rate  # [n, c]
        else:
            scale *= rate
        storages = self._storages()
        updates: list[ops.RankUpdate] = []
        for i, entries in self._uses.items():
            if i not in self._swept:
                found = self._rank_updates(parameters[i], entries, storages, residual, scale)
                if found is None:
                    self.dense(i)
                else:
                    updates += found
        # What the updates read is no parameter's memory: none can change what another needs.
        ops.rank_updates_(updates)
        if self._swept:
            with torch.no_grad():
                for i, gradient in self._swept.items():
                    if isinstance(rate, Tensor):
                        parameters[i].addcmul_(gradient, rate, value=-1.0)
                    else:
                        parameters[i].sub_(gradient, alpha=rate)

    def transposed(self, u: Tensor) -> Tensor | None:
        """J^T u [p] for u [n, c] without a backward; None where not all gradients are there as factors."""
        if any(i not in self._uses for i in self._swept):
            return None
        parameters, updates = self._state.parameters, list[ops.RankUpdate]()
        flat = parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters))
        parts = flat.split([parameter.numel() for parameter in parameters])
        for i, entries in self._uses.items():
            target = parts[i].view(parameters[i].shape)
            found = self._rank_updates(target, entries, self._storages(), u, 1.0)
            if found is None:
                return None
            updates += found
        ops.rank_updates_(updates)
        return flat

    def _storages(self) -> set[int]:
        return {parameter.untyped_storage().data_ptr() for parameter in self._state.parameters}

    def _rank_updates(
        self,
        target: Tensor,
        entries: list[tuple[Use, float, SiteData]],
        storages: set[int],
        residual: Tensor,
        scale: float,
    ) -> list[ops.RankUpdate] | None:
        """What adds the gradient of a parameter to a target of its shape, in products that need no memory.

        None where some use of the parameter has none.
        """
        updates: list[ops.RankUpdate] = []
        for use, factor, data in entries:
            data.check_unchanged()
            features = data.features
            if isinstance(features, Tensor) and features.untyped_storage().data_ptr() in storages:
                return None  # a layer that is fed with a parameter itself
            factors = data.site.rule.rank_factors(data, use, residual, target)
            if factors is None:
                return None
            updates.append((target, *factors, factor * scale))
        return updates
