"""What one pass found, and the step that it makes possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.eigen import TopEigh, rate_at_norm, top_eigh
from catapult_ext.errors import NonFinite
from catapult_ext.losses import decompose_loss
from catapult_ext.observe.layer_features import add_outer_products, correlations, factors, finished
from catapult_ext.observe.layer_gradients import LayerGradients
from catapult_ext.observe.loss_gradient import LossGradient
from catapult_ext.observe.model_state import ModelState
from catapult_ext.outer_products import average, check_conventions

__all__ = ["LayerReport", "Observation"]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


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


class Observation:
    """One pass over a model: n samples, c outputs, N = n c kernel rows (index i c + j).

    Tensors are detached. What costs something beyond the pass (eigenpairs, and what follows from them) is computed
    when it is first read.

    Attributes:
        prediction: f [n, c].
        residual: r = f - y [n, c].
        kernel: tangent kernel K [n c, n c], or None when not asked for.
        input_gradients: d f_ij / d x_i [n, c, d], x flattened per sample, or None when not asked for.
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
        input_gradients: Tensor | None,
        layers: Callable[[], dict[str, LayerGradients]] | None,
        gradient: LossGradient,
        buffers: list[tuple[Tensor, Tensor]],
        report: Callable[[], list[LayerReport]],
        start: Tensor | None,
        on_eigen: Callable[[TopEigh], None],
        find_hessian: Callable[[Tensor | None, LossGradient], TopEigh] | None = None,
        memory: Tensor | None = None,
    ) -> None:
        # Memory of a captured pass is overwritten by its next replay: what is handed out is a copy then.
        own = torch.clone if memory is not None else _itself
        self.prediction = own(prediction)
        self.residual = own(residual)
        self._squares = own(squares)
        self.kernel = None if kernel is None else own(kernel)
        self.input_gradients = None if input_gradients is None else own(input_gradients.detach().flatten(2))
        self._own = own
        self._memory = memory
        self._memory_version = 0 if memory is None else memory._version
        self._find_layers = layers
        self._layers: dict[str, LayerGradients] | None = None
        self._agop: Tensor | None = None
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
            u = None if self.kernel is None else self.eigen.vectors[:, :1]
            self._hessian = self._find_hessian(u, self._gradient)
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

    # ---- features

    @property
    def agop(self) -> Tensor | None:
        """Average gradient outer product [d, d] of the input (paper eq. 5), or None when not asked for."""
        if self._agop is None and self.input_gradients is not None:
            self._agop = self.input_agop()
        return self._agop

    def input_agop(
        self,
        *,
        center: bool = False,
        reduction: str = "mean",
        normalize: str | None = None,
        power: float = 1.0,
    ) -> Tensor:
        """The AGOP of the input, [d, d], by other conventions than the paper's: those of `catapult_ext.agop`.

        Raises:
            ValueError: made without agop=True (or "all"), or an argument that does not fit.

        Cost: n c d^2 multiply-adds. `input_gradients` themselves do for `agop_alignment`, without any d x d matrix.
        """
        if self.input_gradients is None:
            raise ValueError("input_agop(): the observation was made without agop=True (or 'all')")
        check_conventions(reduction=reduction, normalize=normalize, power=power)
        return average(
            self.input_gradients,
            center=center,
            reduction=reduction,
            normalize=normalize,
            power=power,
            what="the AGOP of the input",
        )

    def _need_layers(self, what: str) -> dict[str, LayerGradients]:
        """Of the parameters that were observed, for as long as these have not changed."""
        if self._find_layers is None:
            raise ValueError(f"{what}: the observation was made without agop='layers' (or 'all')")
        self._check_current(what)
        if self._layers is None:
            self._layers = self._find_layers()
        return self._layers

    def layer_gradients(self) -> dict[str, Tensor]:
        """Gradients with respect to the input of every layer, from this pass: see `catapult_ext.layer_gradients`.

        Returns:
            By parameter name [n, c T, d]. The AGOP is G^T G / n of the rows; `agop_alignment` takes them as they are.

        Raises:
            ValueError: made without agop="layers" (or "all"), or the parameters have changed since.
            UnsupportedModule: a layer whose sensitivities are not known sample by sample.

        Cost: none for a hidden linear layer whose input nothing else takes; n c T w d multiply-adds for the others.
        """
        layers, n = self._need_layers("layer_gradients()"), self.residual.shape[0]
        with torch.no_grad():
            return {
                name: self._own(layer.gradients()).unflatten(0, (n, -1)) for name, layer in layers.items()
            }

    def layer_agop(
        self,
        *,
        center: bool = False,
        reduction: str = "mean",
        positions: str = "sum",
        normalize: str | None = None,
        power: float = 1.0,
        factored: bool = False,
    ) -> dict[str, Tensor]:
        """AGOP of every layer, [d, d] by parameter name, from this pass: see `catapult_ext.layer_agop`.

        With `factored` each is given as a factor F [1, r, d] instead, AGOP = F^T F, which `agop_alignment` takes as
        it is: r is the number of gradients, n c T, or the smaller of w and d where that is far less (convolutions).

        Raises:
            ValueError: made without agop="layers" (or "all"), the parameters have changed since, or an argument does
                not fit.
            UnsupportedModule, NonFinite: as `catapult_ext.layer_agop`.

        Cost: that of `catapult_ext.layer_agop` beyond its sweep. Factored: nothing for a hidden linear layer whose
        input nothing else takes, n c T w d multiply-adds for others, n c T w^2 / 2 for a convolution with many
        positions.
        """
        check_conventions(reduction=reduction, positions=positions, normalize=normalize, power=power)
        layers, total = self._need_layers("layer_agop()"), dict[str, Tensor]()
        dtype = self._state.dtype
        scale = 1.0 / self.residual.shape[0] if reduction == "mean" else 1.0
        with torch.no_grad():
            if factored:
                found = factors(
                    layers, scale=scale, positions=positions, center=center, power=power, normalize=normalize
                )
                return {name: self._own(factor) for name, factor in found.items()}
            means = {name: each.sensitivities.mean(0) for name, each in layers.items()} if center else None
            add_outer_products(
                total,
                layers,
                scale=scale,
                positions=positions,
                means=means,
                dtype=dtype if power == 1.0 else torch.float64,  # roots enlarge rounding
            )
            return finished(total, power, normalize, dtype)

    def nfa_correlation(
        self,
        *,
        initial: Mapping[str, Tensor] | None = None,
        center: bool = False,
        power: float = 0.5,
        correlation: str = "pearson",
    ) -> dict[str, Tensor]:
        """Correlation of each layer's W^T W with its AGOP, from this pass: see `catapult_ext.nfa_correlation`.

        Raises:
            ValueError: made without agop="layers" (or "all"), the parameters have changed since, or an argument does
                not fit.
            UnsupportedModule: a layer whose sensitivities are not known sample by sample.
        """
        check_conventions(power=power, correlation=correlation)
        layers = self._need_layers("nfa_correlation()")
        with torch.no_grad():
            return correlations(
                layers,
                initial=initial,
                parameters=dict(zip(self._state.names, self._state.parameters, strict=True)),
                center=center,
                power=power,
                correlation=correlation,
            )

    # ---- how it was done

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
            name: self._own(self._gradient.dense(i)) if i in self._gradient else torch.zeros_like(parameter)
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
            parameter.grad = self._own(self._gradient.dense(i)).detach() if i in self._gradient else None
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
        if self._memory is not None and self._memory._version != self._memory_version:
            raise ValueError(
                f"{what}: a later pass has overwritten the captured one's features and sensitivities; call it before "
                "the next pass, or observe with captured=False"
            )

    def _commit(self) -> None:
        if self._buffers and not self._committed:
            for buffer, value in self._buffers:
                buffer.copy_(value)
        self._committed = True
