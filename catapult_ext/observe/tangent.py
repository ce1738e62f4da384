"""Products with the tangent kernel, K u = J (J^T u), without the kernel and without the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from catapult_ext.errors import NonFinite, UnsupportedModule
from catapult_ext.graph import nodes, refuse_lower_precision, walk
from catapult_ext.observe.double_backward import derivative, differentiable, refuse_cut, refuse_nodes
from catapult_ext.observe.inputs import Inputs
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.outputs import output_weights, outputs_2d
from catapult_ext.stream.samples import Blocks

__all__ = ["Linearised", "TangentKernel"]

#: Nodes through which the derivative of a gradient by its cotangent is lost. The others of
#: `nodes.NO_SECOND_DERIVATIVE` are wrong only in how a gradient depends on the parameters.
_NO_TRANSPOSE = {name: reason for name, reason in nodes.NO_SECOND_DERIVATIVE.items() if name == "Error"}


class Linearised:
    """The outputs of some samples as a linear function of a change of the parameters: products with J^T, and J.

    J is the transpose of J^T: g(w) = J^T w is a differentiable function of w, and its backward for v is J v. That
    is exact wherever a backward can be differentiated by what it is given, at kinks as well.
    """

    def __init__(self, state: ModelState, x: Inputs, *, forward: bool) -> None:
        """Run the forward and, for products with J, one differentiable backward.

        Args:
            state: the model.
            x: [n, ...].
            forward: whether products with J will be asked for.
        """
        self._parameters = state.parameters
        # The buffers of this forward are its own: one that changes them finds them as found in every block.
        with differentiable(), state.own_buffers():
            self.output = outputs_2d(state.forward(x), x)  # [n, c]
            if not bool(torch.isfinite(self.output).all()):
                raise NonFinite("model: its output is not finite")
            refuse_lower_precision(walk(self.output), state.dtype)
            if not forward:
                return
            generator = torch.Generator().manual_seed(0)
            w = torch.randn(self.output.shape, generator=generator, dtype=torch.float64).to(self.output)
            self._w = w.requires_grad_()
            gradients = derivative(self.output, self._parameters, self._w, create_graph=True)
            refuse_cut(state.names, gradients)
            refuse_nodes(gradients, _NO_TRANSPOSE)
        self._reached = [i for i, g in enumerate(gradients) if g is not None]
        # Edges, not tensors: the p numbers themselves are not needed any more.
        self._gradients = [get_gradient_edge(g) for g in gradients if g is not None]

    def transposed(self, u: Tensor) -> tuple[Tensor | None, ...]:
        """J^T u for u [n, c], by parameter."""
        return derivative(self.output, self._parameters, u)

    def times(self, v: list[Tensor]) -> Tensor:
        """J v [n, c] for v by parameter."""
        (found,) = derivative(self._gradients, [self._w], [v[i] for i in self._reached])
        return torch.zeros_like(self.output) if found is None else found.detach()


class TangentKernel:
    """The tangent kernel of samples as an operator.

    Attributes:
        rows: N, n c or, for one combination of the outputs, n.
        products: how many have been made.
    """

    def __init__(self, state: ModelState, samples: Blocks, block: int | None, outputs: str | int) -> None:
        """Prepare.

        Args:
            state: the model.
            samples: n of them.
            block: samples that go through the model together, twice for each product. None: all of them, once; the
                graph is kept for all products.
            outputs: "all", "trace", "sum" or one of them, as for `ntk`.
        """
        self._state, self._samples, self._block = state, samples, block
        first = next(samples.blocks(samples.count if block is None else block))
        with state.untouched():
            part = Linearised(state, first, forward=block is None)
        self._kept = part if block is None else None
        output = part.output.detach()
        self._shape = (samples.count, output.shape[1])
        # Rows r [m, c] of outputs: K = mean over r of (1 x r) K_all (1 x r)^T, and K_all itself for None.
        if outputs == "trace":
            self._weights: Tensor | None = torch.eye(output.shape[1]).to(output)
        else:
            self._weights = output_weights(outputs, output)
        self.rows = samples.count * (output.shape[1] if self._weights is None else 1)
        self.products = 0

    def product(self, u: Tensor) -> Tensor:
        """K u [N]."""
        self.products += 1
        if self._weights is None:
            return self._times(u.view(self._shape)).reshape(-1)
        out = torch.zeros_like(u)
        for row in self._weights:
            out.add_(self._times(torch.outer(u, row)) @ row, alpha=1.0 / len(self._weights))
        return out

    def _times(self, u: Tensor) -> Tensor:
        """J J^T u [n, c] of all outputs."""
        v = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in self._state.parameters]
        first = 0
        for x in self._blocks():
            with self._state.untouched():
                part = self._kept or Linearised(self._state, x, forward=False)
                last = first + len(part.output)
                for total, gradient in zip(v, part.transposed(u[first:last]), strict=True):
                    if gradient is not None:
                        total.add_(gradient)
            first = last
        rows = []
        for x in self._blocks():
            with self._state.untouched():
                rows.append((self._kept or Linearised(self._state, x, forward=True)).times(v))
        found = torch.cat(rows)
        self._check_transposed(u, v, found)
        return found

    def _blocks(self) -> Iterator[Inputs]:
        """Read outside of `untouched()`: loaders may draw random numbers."""
        if self._block is None:
            return iter([()])
        return self._samples.blocks(self._block)

    def _check_transposed(self, u: Tensor, v: list[Tensor], found: Tensor) -> None:
        """<u, J J^T u> = |J^T u|^2, or one of the two is not what it should be."""
        inner = float((u.double() * found).sum())
        square = float(torch.stack([part.double().square().sum() for part in v]).sum())
        size = max(square, float(u.double().norm()) * float(found.double().norm()))
        if not abs(inner - square) <= size * torch.finfo(u.dtype).eps ** (1 / 3):
            if not all(bool(torch.isfinite(part).all()) for part in (*v, found)):
                raise NonFinite("model: a product with its tangent kernel is not finite")
            raise UnsupportedModule(
                f"model: the derivative of its gradient by the cotangent is not J (<u, K u> = {inner:.6e} beside "
                f"|J^T u|^2 = {square:.6e}), so that the backward of one of its operations is not linear, or is "
                "itself differentiated wrongly"
            )
