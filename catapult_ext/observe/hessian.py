"""Products with the Hessian of the loss, and where to begin with its largest eigenpairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from catapult_ext.eigen import TopEigh, top_eigh
from catapult_ext.errors import NonFinite
from catapult_ext.graph import nodes, refuse_lower_precision, walk
from catapult_ext.lanczos import largest
from catapult_ext.observe.assemble import Assembler
from catapult_ext.observe.double_backward import (
    derivative,
    differentiable,
    refuse_cut,
    refuse_nodes,
    write_flat,
)
from catapult_ext.observe.inputs import Inputs, count
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.outputs import outputs_2d
from catapult_ext.observe.sweep import Sweep

__all__ = ["STEP_TOLERANCE", "LossHessian", "kernel_vectors"]

#: Residual relative to lambda_1 at which an observation stops: two products at most steps of a training.
STEP_TOLERANCE = 1e-2

#: Where forming the kernel to begin with would cost more than the products that it saves.
_MOST_KERNEL_ROWS = 4096


class LossHessian:
    """Hessian of the mean squared error over the parameters of a state, as an operator.

    To be used inside `state.untouched()`: one forward and one differentiable backward are kept for all products.
    """

    def __init__(self, state: ModelState, x: Inputs, target: Callable[[Tensor], Tensor]) -> None:
        """Run the forward and the first backward.

        Args:
            state: the model.
            x: [n, ...].
            target: output f [n, c] to y [n, c]; the place to check y.
        """
        self._parameters = state.parameters
        self._sizes = [p.numel() for p in state.parameters]
        with differentiable():
            output = outputs_2d(state.forward(x), x)
            loss = (output - target(output.detach())).square().mean()
            if not bool(torch.isfinite(loss)):
                raise NonFinite(
                    "model: its output is not finite, or overflows when squared, and so does the loss"
                )
            refuse_lower_precision(walk(output), state.dtype)
            gradients = derivative(loss, state.parameters, None, create_graph=True)
        self.output = output
        refuse_cut(state.names, gradients)
        refuse_nodes(gradients, nodes.NO_SECOND_DERIVATIVE)
        self._reached = [i for i, g in enumerate(gradients) if g is not None]
        # Edges, not tensors: the p numbers of the gradient itself are not needed any more.
        self._gradients = [get_gradient_edge(g) for g in gradients if g is not None]

    def product(self, v: Tensor) -> Tensor:
        """H v [p]."""
        parts = [part.view_as(p) for part, p in zip(v.split(self._sizes), self._parameters, strict=True)]
        found = derivative(self._gradients, self._parameters, [parts[i] for i in self._reached])
        out = torch.empty_like(v)
        write_flat(found, self._sizes, out)
        return out

    def pull_back(self, vectors: Tensor) -> Tensor:
        """J^T u for columns u [n c, m], as columns [p, m]."""
        rows = vectors.new_empty((vectors.shape[1], sum(self._sizes)))
        for row, u in zip(rows, vectors.t(), strict=True):
            found = derivative(self.output, self._parameters, u.view_as(self.output))
            write_flat(found, self._sizes, row)
        return rows.t()

    def top(self, k: int, start: Tensor | None, tol: float | None) -> TopEigh:
        """Largest k eigenpairs, from start [p, m]."""
        first = self._parameters[0]
        if tol is None:
            tol = 1e-4 if first.dtype == torch.float32 else 1e-8
        rows = first.new_empty((0, sum(self._sizes))) if start is None else start.detach().t()
        with torch.no_grad():
            return largest(
                self.product,
                rows,
                k,
                tol=tol,
                max_products=300 + 30 * k,
                what="hessian_top",
                operator="the Hessian of its loss",
                stacklevel=4,
            )


def kernel_vectors(state: ModelState, x: Inputs, c: int, k: int) -> Tensor:
    """Top k eigenvectors of the tangent kernel as columns [n c, m]; none where it costs n c backwards or is too large.

    Args:
        state: the model.
        x: [n, ...].
        c: outputs.
        k: how many.
    """
    rows = count(x) * c
    if rows <= _MOST_KERNEL_ROWS:
        sweep = Sweep(state, x, {}, verify="first")
        if not sweep.plan.layout.rows:
            with torch.no_grad():
                return top_eigh(Assembler(sweep).build_kernel(), min(k, rows)).vectors
    return state.parameters[0].new_empty((rows, 0))
