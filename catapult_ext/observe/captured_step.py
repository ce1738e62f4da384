"""A training step and its observation as one CUDA graph: between two steps the host makes one call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves

from catapult_ext import ops
from catapult_ext.eigen import TopEigh, rate_at_norm, top_eigh
from catapult_ext.errors import NonFinite
from catapult_ext.losses import decompose_loss
from catapult_ext.observe.capture import Capture, fingerprint, restore
from catapult_ext.observe.cuda_graph import CudaGraph
from catapult_ext.observe.inputs import Inputs
from catapult_ext.observe.observation import Observation

if TYPE_CHECKING:
    from catapult_ext.observe.observer import Observer

__all__ = ["CapturedStep"]


class CapturedStep(Capture):
    """A gradient step and its observation, captured once and replayed by each call: see `Observer.capture`.

    All tensors below are the graph's own. A replay fills them anew, allocates nothing, and the host waits for none of
    them; what is to outlive the next replay has to be cloned. `x`, `y` and `lr` are what a replay reads: calls write
    to them, and so may the caller. The others describe the parameters before the update of the last replay.

    Attributes:
        x: samples, as they were captured.
        y: targets [n, c].
        lr: learning rate of the update, 0-dim.
        prediction: f [n, c].
        residual: r = f - y [n, c].
        loss: mean over all n c entries of r^2, 0-dim.
        kernel: tangent kernel K [n c, n c].
        eigen: `TopEigh` of its k largest eigenpairs.
        critical_lr: n c / lambda_1, 0-dim.
        top_loss: part of the loss in the span of the eigenvectors, 0-dim.
        rest_loss: part of the loss outside that span, 0-dim.
        agop: of the input [d, d]; None where the Observer was not asked for it.
        layer_agop: of the input of every layer [d, d], by parameter name; None where not asked for.
    """

    prediction: Tensor
    residual: Tensor
    loss: Tensor
    kernel: Tensor
    eigen: TopEigh
    critical_lr: Tensor
    top_loss: Tensor
    rest_loss: Tensor
    agop: Tensor | None
    layer_agop: dict[str, Tensor] | None

    def __init__(
        self,
        observer: Observer,
        x: Inputs,
        y: Tensor,
        lr: float,
        *,
        overlap: bool,
        graph: CudaGraph,
    ) -> None:
        """Certify, capture, and compare a replay with the step itself; the model is left as found.

        Args:
            observer: says what to observe; it is copied.
            x: samples.
            y: targets.
            lr: learning rate.
            overlap: see `Observer.capture`.
            graph: captures and replays.
        """
        for name, expected in (("kernel", True), ("hessian", False)):
            got = getattr(observer, f"_{name}")
            if got != expected:
                raise ValueError(f"capture: expected an Observer with {name}={expected}, got {got}")
        state = observer._state
        self.lr = torch.empty((), dtype=state.dtype, device=state.device)
        self._set_rate(lr)
        self._wrong = torch.zeros((), dtype=torch.bool, device=state.device)
        first = self._prepare(observer, x, y, graph)
        assert first.kernel is not None
        self._start = first.eigen.vectors.clone()
        # K and r of the replay before, whose spectrum is found beside a whole step.
        self._last = (first.kernel, first.residual) if overlap else None
        del first  # and with it the features and sensitivities of a pass
        with self._undone(parameters=True) as before:
            self._capture(before)
        self._written = [*self._state.parameters, *(buffer for _, _, buffer in self._state.buffers)]
        self._written += [leaf for leaf in tree_leaves(self._results) if leaf is not None]
        self.check()

    # ---- capture

    def _capture(self, before: list[tuple[Tensor, Tensor]]) -> None:
        """Make the step, capture it, replay it, and compare."""
        made = self._graph.rehearse(self._step)
        self._check_buffers()
        if not all(bool(parameter.isfinite().all()) for parameter in self._state.parameters):
            raise NonFinite(f"lr: a step at {self.lr.item()} leaves parameters that are not finite")
        after = [tensor.clone() for tensor, _ in before]
        restore(before)
        self._results = self._graph.record(self._step)
        self._check_plan()
        restore(before)
        self._graph.replay()
        for name, value in self._results.items():
            setattr(self, name, value)
        self._check_replay(
            [
                *((getattr(self, name), made[name], None) for name in ("residual", "kernel")),
                *((tensor, new, old) for (tensor, old), new in zip(before, after, strict=True)),
            ]
        )

    def _step(self) -> dict[str, Any]:
        """What is captured: the pass, its spectrum on a branch, and the update."""
        observer, graph = self._observer, self._graph
        spectrum: dict[str, Any] = {}
        if self._last is not None:
            with graph.branch():
                spectrum = self._spectrum(*self._last)
        with torch.enable_grad():
            parts = observer._parts(observer._made(self.x, self.y))
        # A step keeps what the forward made of the buffers: there is nothing to commit.
        seen = Observation(
            state=self._state, k=observer._k, buffers=[], start=None, on_eigen=observer._remember, **parts
        )
        if self._last is None:
            with graph.branch():
                spectrum = self._spectrum(parts["kernel"], seen.residual)
        with torch.no_grad():
            result = {
                "prediction": seen.prediction,
                "residual": seen.residual,
                "loss": seen.loss,
                "kernel": parts["kernel"],
                "agop": seen.agop,
                "layer_agop": seen.layer_agop() if observer._layers else None,
            }
            self._wrong.logical_or_(result["loss"].isfinite().logical_not())
            seen._gradient.step_(self.lr)
            graph.join()
            if self._last is not None:
                self._last[0].copy_(parts["kernel"])
                self._last[1].copy_(seen.residual)
        return result | spectrum

    @torch.no_grad()
    def _spectrum(self, kernel: Tensor, residual: Tensor) -> dict[str, Any]:
        """Eigenpairs of K [n c, n c], from those of the last step on, and what follows from them."""
        eigen = top_eigh(kernel, self._start.shape[1], start=self._start)
        self._start.copy_(eigen.vectors)
        top, rest = decompose_loss(residual, eigen.vectors)
        rate = rate_at_norm(eigen.values[0], residual.numel())
        return {"eigen": eigen, "critical_lr": rate, "top_loss": top, "rest_loss": rest}

    # ---- use

    @torch.no_grad()
    def __call__(
        self, x: Inputs | None = None, y: Tensor | None = None, lr: float | Tensor | None = None
    ) -> None:
        """Replay: observe the parameters as they are now, and update them. Does not wait for the device.

        Args:
            x: samples to write to `x` first; None leaves what is there.
            y: targets to write to `y` first.
            lr: rate to write to `lr` first; a 0-dim tensor on the device is not read by the host.

        Raises:
            TypeError, ValueError: an argument that does not fit what was captured, or a model whose parameters or
                buffers are no longer where they were, or are in another mode.
        """
        self._state.check_members()
        if fingerprint(self._state, self._modules) != self._here:
            raise ValueError(
                "model: its parameters, buffers or modes are not those of the capture any more (moved, replaced, "
                "frozen, train() or eval()?); capture it again"
            )
        self._write(x, y)
        if lr is not None:
            self._set_rate(lr)
        self._graph.replay()
        # Replays write behind autograd's back: observations made before this one are stale now, and are to say so.
        increment_version(self._written)

    def _set_rate(self, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor):
            if lr.dim() or lr.device != self.lr.device:
                raise ValueError(
                    f"lr: expected a number, or a 0-dim tensor on {self.lr.device}, got shape {tuple(lr.shape)} on "
                    f"{lr.device}"
                )
            self.lr.copy_(lr)
        elif isinstance(lr, bool) or not isinstance(lr, (int, float)) or not math.isfinite(lr):
            raise ValueError(f"lr: expected a finite number, or a 0-dim tensor, got {lr!r}")
        else:
            self.lr.fill_(lr)

    def check(self) -> None:
        """Raise what the replays since the last call have noted on the device; waits for it.

        Raises:
            NonFinite: a NaN or an infinity came up; the parameters may hold it as well by now.
            RuntimeError: an eigensolver did not converge.
        """
        wrong = bool(self._wrong)
        self._wrong.zero_()
        ops.cuda.check(self._state.device)
        if wrong:
            raise NonFinite(
                "model: its output is not finite, or overflows when squared, and so does the loss"
            )

    def read(self) -> dict[str, float]:
        """`check`, then the numbers of the last replay on the host.

        Returns:
            loss, critical_lr, top_loss, rest_loss, and lambda_1 to lambda_k.

        Raises:
            NonFinite, RuntimeError: as `check`.
        """
        self.check()
        names = ("loss", "critical_lr", "top_loss", "rest_loss")
        values = torch.cat([torch.stack([getattr(self, name) for name in names]), self.eigen.values]).tolist()
        return dict(
            zip((*names, *(f"lambda_{i + 1}" for i in range(len(values) - len(names)))), values, strict=True)
        )
