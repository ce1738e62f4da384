"""What a pass leaves for an Observation to be made of."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor

from catapult_ext.observe.assemble import Assembler
from catapult_ext.observe.loss_gradient import LossGradient
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep

__all__ = ["PassResult"]


class PassResult(NamedTuple):
    """Tensors of one pass: n samples, c outputs.

    Attributes:
        prediction: f [n, c], detached.
        residual: r = f - y [n, c].
        squares: sum of r^2, 0-dim.
        swept: gradients of the loss that are formed already, by parameter index.
        kernel: K [n c, n c], or None.
        sweep: features and sensitivities; None where the pass was a plain backward.
        assembler: of the kernel, or None.
    """

    prediction: Tensor
    residual: Tensor
    squares: Tensor
    swept: dict[int, Tensor]
    kernel: Tensor | None = None
    sweep: Sweep | None = None
    assembler: Assembler | None = None

    def gradient(self, state: ModelState) -> LossGradient:
        """Gradient of the loss, formed where it is asked for."""
        uses = {}
        if self.assembler is not None:
            sweep = self.sweep
            assert sweep is not None
            uses = {
                i: [
                    (use, factor, sweep.sites[use.site])
                    for use, factor in zip(sweep.plan.uses[i], sweep.factors[i], strict=True)
                    if use.site in sweep.sites
                ]
                for i in sweep.plan.layout.ruled
                if i not in self.swept
            }
        return LossGradient(state, self.swept, uses, self.residual)

    def anew(self) -> PassResult:
        """The same tensors, which a replay has filled again, without what was derived from their last values."""
        sweep = self.sweep
        if sweep is not None:
            sweep = copy.copy(sweep)
            sweep.sites = {site: data.anew() for site, data in sweep.sites.items()}
        return self._replace(swept=dict(self.swept), sweep=sweep)
