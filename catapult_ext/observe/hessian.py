"""Products with the Hessian of the loss, and where to begin with its largest eigenpairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from catapult_ext.eigen import TopEigh, top_eigh
from catapult_ext.errors import NonFinite, UnsupportedModule
from catapult_ext.graph import nodes
from catapult_ext.lanczos import largest
from catapult_ext.observe.assemble import Assembler
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
        # Fused attention has no second derivative; the plain formula has.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            output = outputs_2d(state.forward(x), x)
            loss = (output - target(output.detach())).square().mean()
            if not bool(torch.isfinite(loss)):
                raise NonFinite(
                    "model: its output is not finite, or overflows when squared, and so does the loss"
                )
            gradients = self._derivative(loss, None, create_graph=True)
        self.output = output
        present = [(i, g) for i, g in enumerate(gradients) if g is not None]
        cut = [state.names[i] for i, g in present if not g.requires_grad]
        if cut:
            raise UnsupportedModule(
                f"model: the gradient of {cut[0]} cannot be differentiated: the backward of an operation behind it "
                "hides what it computes (detach, or torch.no_grad)"
            )
        self._reached = [i for i, _ in present]
        self._gradients = [g for _, g in present]
        _refuse_wrong_nodes(self._gradients)

    def _derivative(self, of: Any, weights: Any, *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        try:
            return torch.autograd.grad(
                of, self._parameters, weights, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            text = str(error)
            if not any(
                phrase in text for phrase in ("is not implemented", "differentiate twice", "use_reentrant")
            ):
                raise
            raise UnsupportedModule(
                "model: an operation has no second derivative, so that there is no Hessian; replace it by one that "
                f"has. PyTorch says: {text.splitlines()[0]}"
            ) from error

    def _write(self, parts: Sequence[Tensor | None], out: Tensor) -> None:
        for place, part in zip(out.split(self._sizes), parts, strict=True):
            if part is None:
                place.zero_()
            else:
                place.copy_(part.detach().reshape(-1))

    def product(self, v: Tensor, out: Tensor) -> None:
        """Write H v to out [p]."""
        parts = [part.view_as(p) for part, p in zip(v.split(self._sizes), self._parameters, strict=True)]
        self._write(self._derivative(self._gradients, [parts[i] for i in self._reached]), out)

    def pull_back(self, vectors: Tensor) -> Tensor:
        """J^T u for columns u [n c, m], as columns [p, m]."""
        rows = vectors.new_empty((vectors.shape[1], sum(self._sizes)))
        for row, u in zip(rows, vectors.t(), strict=True):
            self._write(self._derivative(self.output, u.view_as(self.output)), row)
        return rows.t()

    def top(self, k: int, start: Tensor | None, tol: float | None) -> TopEigh:
        """Largest k eigenpairs, from start [p, m]."""
        first = self._parameters[0]
        if tol is None:
            tol = 1e-4 if first.dtype == torch.float32 else 1e-8
        rows = first.new_empty((0, sum(self._sizes))) if start is None else start.detach().t()
        with torch.no_grad():
            return largest(
                self.product, rows, k, tol=tol, max_products=300 + 30 * k, what="hessian_top", stacklevel=4
            )


def _refuse_wrong_nodes(gradients: list[Tensor]) -> None:
    """Raise where the graph of a gradient holds a node whose derivative PyTorch drops or gets wrong."""
    pending = [g.grad_fn for g in gradients]
    seen = set(pending)
    while pending:
        node: Any = pending.pop()
        reason = nodes.NO_SECOND_DERIVATIVE.get(nodes.type_name(node).rstrip("0123456789"))
        if reason is not None:
            raise UnsupportedModule(f"model: it has no second derivative: {reason}")
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        pending.extend(following)


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
