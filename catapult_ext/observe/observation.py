"""What one pass found, and the step that it makes possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.eigen import TopEigh, rate_at_norm, top_eigh
from catapult_ext.errors import NonFinite
from catapult_ext.graph.plan import Use
from catapult_ext.losses import decompose_loss
from catapult_ext.observe.model_state import ModelState
from catapult_ext.rules.site_data import SiteData

__all__ = ["LayerReport", "LossGradient", "Observation"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How one parameter's part of the kernel was computed.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        route: "gram" (Hadamard product of two Gram matrices), "tiles" (per-sample gradients, tile by tile), "position
            grams" (Gram matrices of all positions of all samples, where these are cheaper than "tiles"), "node
            calls" (the node alone, once per sample and output), "rows" (one backward of the network per sample
            and output) or "unused".
        rule: which rules applied, or why none did.
        flops: multiply-adds of the part, NaN where it is counted in backwards.
        backwards: backwards of the whole network beyond those that every parameter shares.
    """

    name: str
    shape: tuple[int, ...]
    route: str
    rule: str
    flops: float
    backwards: int


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

    def step_(self, rate: float) -> None:
        """Parameter -= rate gradient for every parameter."""
        parameters = self._state.parameters
        storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        updates: list[ops.RankUpdate] = []
        for i, entries in self._uses.items():
            if i not in self._swept:
                found = self._rank_updates(i, entries, storages, -rate * self._scale)
                if found is None:
                    self.dense(i)
                else:
                    updates += found
        # What the updates read is no parameter's memory: none can change what another needs.
        ops.rank_updates_(updates)
        if self._swept:
            with torch.no_grad():
                for i, gradient in self._swept.items():
                    parameters[i].sub_(gradient, alpha=rate)

    def _rank_updates(
        self, i: int, entries: list[tuple[Use, float, SiteData]], storages: set[int], scale: float
    ) -> list[ops.RankUpdate] | None:
        """The step of a parameter as products that need no memory, or None where some use has none."""
        updates: list[ops.RankUpdate] = []
        for use, factor, data in entries:
            data.check_unchanged()
            features = data.features
            if isinstance(features, Tensor) and features.untyped_storage().data_ptr() in storages:
                return None  # a layer that is fed with a parameter itself
            factors = data.site.rule.rank_factors(data, use, self._residual, self._state.parameters[i])
            if factors is None:
                return None
            updates.append((self._state.parameters[i], *factors, factor * scale))
        return updates


class Observation:
    """One pass over a model: n samples, c outputs, N = n c kernel rows (index i c + j).

    Tensors are detached. What costs something beyond the pass (eigenpairs, and what follows from them) is computed
    when it is first read.

    Attributes:
        prediction: f [n, c].
        residual: r = f - y [n, c].
        kernel: tangent kernel K [n c, n c], or None when not asked for.
        agop: average gradient outer product [d, d] (paper eq. 5), or None when not asked for.
    """

    def __init__(
        self,
        *,
        state: ModelState,
        k: int,
        prediction: Tensor,
        residual: Tensor,
        squares: Tensor,
        kernel: Tensor | None,
        agop: Tensor | None,
        gradient: LossGradient,
        buffers: list[tuple[Tensor, Tensor]],
        report: Callable[[], list[LayerReport]],
        start: Tensor | None,
        on_eigen: Callable[[TopEigh], None],
        find_hessian: Callable[[Tensor | None], TopEigh] | None = None,
    ) -> None:
        self.prediction = prediction
        self.residual = residual
        self._squares = squares
        self.kernel = kernel
        self.agop = agop
        self._state = state
        self._k = k
        self._gradient = gradient
        self._buffers = buffers
        self._report = report
        self._start = start
        self._on_eigen = on_eigen
        self._find_hessian = find_hessian
        self._hessian: TopEigh | None = None
        self._versions = [p._version for p in state.parameters]
        self._committed = False
        self._stepped = False
        self._eigen: TopEigh | None = None
        self._parts: tuple[Tensor, Tensor] | None = None
        self._norm: Tensor | None = None
        self._layer_report: list[LayerReport] | None = None

    # ---- loss and spectrum

    @property
    def loss(self) -> Tensor:
        """Mean over all n c entries of r^2, no factor 1/2 (paper eq. 1), 0-dim."""
        return self._squares / self.residual.numel()

    def _need_kernel(self, what: str) -> Tensor:
        if self.kernel is None:
            raise ValueError(f"{what}: the observation was made with kernel=False")
        return self.kernel

    @property
    def eigen(self) -> TopEigh:
        """Largest k eigenpairs of the kernel: values (k,) descending, vectors (n c, k), residuals (k,)."""
        if self._eigen is None:
            kernel = self._need_kernel("eigen")
            start = self._start
            if start is not None and start.shape[-2] != kernel.shape[0]:
                start = None  # another number of samples: nothing to begin with
            with torch.no_grad():
                self._eigen = top_eigh(kernel, min(self._k, kernel.shape[0]), start=start)
            self._on_eigen(self._eigen)
        return self._eigen

    @property
    def spectral_norm(self) -> Tensor:
        """lambda_1 of the kernel, 0-dim."""
        if self._norm is None:
            if self._eigen is not None:
                self._norm = self._eigen.values[0]
            else:
                self._norm = ops.spectral_norm(self._need_kernel("spectral_norm"))
        return self._norm

    @property
    def critical_lr(self) -> Tensor:
        """N c / lambda_1, 0-dim: the rate above which gradient descent on the linearised model diverges."""
        return rate_at_norm(self.spectral_norm, self.residual.numel())

    @property
    def hessian(self) -> TopEigh:
        """Largest (algebraic) eigenpair of the Hessian of the loss: values (1,), vectors (p, 1), residuals (1,).

        Flat over the observed parameters. The residual is at most .01 lambda_1 (or a RuntimeWarning says that it is
        not), which gives a lambda_1 that stands out to about 1e-4; `hessian_top` finds more pairs, and more digits.
        Begins with J^T u_1 of the kernel, or with the vector of the last observation where there is no kernel.

        Cost: one forward and backward, and 2 to 4 Hessian products, each about twice as much. It needs the
        parameters of the observation, so read it before the step.

        Raises:
            ValueError: made with hessian=False, or the parameters, x or y have changed since.
            UnsupportedModule, NonFinite: as for `hessian_top`.

        Source: paper section 2, eta_crit = 2 / lambda_max(H).
        """
        if self._hessian is None:
            if self._find_hessian is None:
                raise ValueError("hessian: the observation was made with hessian=False")
            self._check_current("hessian")
            self._hessian = self._find_hessian(None if self.kernel is None else self.eigen.vectors[:, :1])
        return self._hessian

    def _split(self) -> tuple[Tensor, Tensor]:
        if self._parts is None:
            self._parts = decompose_loss(self.residual, self.eigen.vectors)
        return self._parts

    @property
    def top_loss(self) -> Tensor:
        """Part of the loss in the span of the k top eigenvectors (paper eq. 2), 0-dim."""
        return self._split()[0]

    @property
    def rest_loss(self) -> Tensor:
        """Part of the loss outside that span, 0-dim."""
        return self._split()[1]

    @property
    def layer_report(self) -> list[LayerReport]:
        """How each parameter's part of the kernel was computed, and its cost."""
        if self._layer_report is None:
            self._layer_report = self._report()
        return self._layer_report

    def check(self) -> None:
        """Raise what a CUDA device has noted meanwhile; on the CPU everything has been raised already.

        On CUDA, values that are not finite and eigensolvers that did not converge are noted on the device, so that
        no step waits for it. Call this where a value is first read on the host; it waits for the device.

        Raises:
            NonFinite: a NaN or an infinity came up.
            RuntimeError: an eigensolver did not converge.
        """
        if self.residual.is_cuda:
            ops.cuda.check(self.residual.device)
            if not bool(torch.isfinite(self._squares)):
                raise NonFinite(
                    "model: its output is not finite, or overflows when squared, and so does the loss"
                )

    # ---- gradient and step

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the loss by parameter name; zeros where the output does not depend on the parameter."""
        self._check_current("gradients()")
        return {
            name: self._gradient.dense(i) if i in self._gradient else torch.zeros_like(parameter)
            for i, (name, parameter) in enumerate(zip(self._state.names, self._state.parameters, strict=True))
        }

    @torch.no_grad()
    def assign_grads_(self) -> None:
        """Set `.grad` of the observed parameters, for torch.optim, and commit the forward's buffer updates.

        A parameter on which the output does not depend gets None, as after a backward.

        Raises:
            ValueError: the parameters have changed since the observation.
        """
        self._check_current("assign_grads_()")
        for i, parameter in enumerate(self._state.parameters):
            parameter.grad = self._gradient.dense(i).detach() if i in self._gradient else None
        self._commit()

    def step_(self, lr: float) -> None:
        """Gradient step: parameters -= lr * gradient of the loss, in place; commits buffer updates.

        Args:
            lr: learning rate, a finite number.

        Raises:
            ValueError: a second step on one observation, or parameters that have changed since it.
        """
        rate = float(lr)
        if rate != rate or rate in (float("inf"), float("-inf")):
            raise ValueError(f"lr: expected a finite number, got {lr}")
        self._check_current("step_()")
        self._gradient.step_(rate)
        self._stepped = True
        self._commit()

    def _check_current(self, what: str) -> None:
        if self._stepped:
            raise ValueError(f"{what}: this observation has made its step already; observe again")
        for parameter, version in zip(self._state.parameters, self._versions, strict=True):
            if parameter._version != version:
                raise ValueError(f"{what}: the parameters have changed since the observation; observe again")

    def _commit(self) -> None:
        if self._buffers and not self._committed:
            for buffer, value in self._buffers:
                buffer.copy_(value)
        self._committed = True
