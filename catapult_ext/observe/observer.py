"""The long-lived object behind every observation: model, plans, warm vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from catapult_ext import ops
from catapult_ext.eigen import TopEigh
from catapult_ext.graph.plan import Plan, Route
from catapult_ext.observe.assemble import Assembler
from catapult_ext.observe.capture import fingerprint
from catapult_ext.observe.captured_pass import CapturedPass
from catapult_ext.observe.captured_step import CapturedStep
from catapult_ext.observe.cuda_graph import CudaGraph
from catapult_ext.observe.hessian import STEP_TOLERANCE, LossHessian
from catapult_ext.observe.inputs import Inputs, check_input, check_inputs, signature, versions
from catapult_ext.observe.layer_gradients import LayerGradients, layer_gradients
from catapult_ext.observe.loss_gradient import LossGradient
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.observation import LayerReport, Observation
from catapult_ext.observe.outputs import check_target, outputs_2d
from catapult_ext.observe.pass_result import PassResult
from catapult_ext.observe.sweep import Sweep, arriving
from catapult_ext.stream.job import check_max_bytes, tile_bytes_within

__all__ = ["Observer", "observe"]

_VERIFY = ("first", "always", "never")
_CAPTURES = 4  # forms of x whose captured passes are kept


class Observer:
    """Observes one model again and again: the first pass plans and certifies, later ones reuse the plan.

    The price of a pass is one forward, c backwards to the layers (no weight gradients), the Gram products, and what
    is read from the Observation. A network that couples its samples (BatchNorm in training mode) costs n c
    backwards for the layers below the coupling. Parameters, buffers, `.grad`, hooks, mode and random state are left
    as found, also when an exception passes through.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int = 1,
        loss: str = "mse",
        params: Iterable[str | Tensor] | None = None,
        kernel: bool = True,
        agop: bool | str = False,
        hessian: bool = False,
        verify: str = "first",
        max_bytes: int | None = None,
        captured: bool = False,
    ) -> None:
        """Prepare to observe.

        Args:
            model: float32 or float64; its output is (n,) or (n, c).
            k: eigenpairs of the kernel (at most n c are returned).
            loss: "mse", mean over all entries of (f - y)^2.
            params: names or tensors of the parameters to observe, default all that require grad.
            kernel: compute the tangent kernel; without it an observation is loss, residual and gradient.
            agop: of what there will be AGOPs: True, of the input; "layers", of the input of every layer, which costs
                next to nothing, since the backward passes there anyway; "all", of both. (The AGOP of a first layer
                that alone takes the input is that of the input, and a backward to the input is not free.)
            hessian: let observations find the largest eigenpair of the Hessian of the loss.
            verify: when a plan is certified against autograd with random cotangents: "first" (its first use, and
                its uses number 2, 4, 8, ...; always where routing depends on the data), "always", or "never"
                again after the first use, which has to find out which rows belong to which sample.
            max_bytes: bound of all memory that an observation takes beyond what there was before it (:doc:`/memory`);
                what is read from it afterwards (eigenpairs, gradients, Hessian) comes on top. It needs the kernel.
            captured: on CUDA, capture the pass of each form of x in a CUDA graph at its first use, and replay it from
                then on: one launch, where the host otherwise takes longer than the device. An observation's gradient,
                step and layers are there up to the next pass only. The four forms used last keep their memory. What
                cannot be captured is said by `capture`, which takes the update into the graph as well.

        Raises:
            TypeError, ValueError: an argument that does not fit.
        """
        if loss != "mse":
            raise ValueError(f"loss: expected 'mse', got {loss!r}")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k: expected a positive integer, got {k!r}")
        if agop not in (False, True, "layers", "all"):
            raise ValueError(f"agop: expected False, True, 'layers' or 'all', got {agop!r}")
        if verify not in _VERIFY:
            raise ValueError(f"verify: expected one of {', '.join(_VERIFY)}, got {verify!r}")
        check_max_bytes(max_bytes)
        if max_bytes is not None and not kernel:
            raise ValueError("max_bytes: expected None with kernel=False, where there is nothing to bound")
        self._state = ModelState(model, params)
        self._k = k
        self._kernel = kernel
        self._agop = agop in (True, "all")
        self._layers = agop in ("layers", "all")
        self._hessian = hessian
        self._verify = verify
        self._max_bytes = max_bytes
        self._plans: dict[Any, Plan] = {}
        self._tile_bytes: dict[Any, int] = {}
        self._captured: dict[Any, CapturedPass] | None = None
        if captured:
            self._need_cuda("captured")
            for name, value, fits in (
                ("verify", verify, verify != "always"),
                ("max_bytes", max_bytes, max_bytes is None),
            ):
                if not fits:
                    raise ValueError(f"captured: expected False with {name}={value!r}, got True")
            self._captured = {}
        self._modules = list(model.modules())
        self._start: Tensor | None = None
        self._hessian_start: Tensor | None = None

    def __call__(self, x: Inputs, y: Tensor) -> Observation:
        """One pass.

        Args:
            x: samples [n, ...] for model(x); a tuple of such tensors for model(*x), a dict for model(**x). Integer
                tokens are fine, except with an AGOP of the input, which needs one floating-point tensor.
            y: targets [n, c], or [n] for one output; dtype of the model.

        Returns:
            The Observation.

        Raises:
            TypeError, ValueError: an argument that does not fit, or a model whose parameters or submodules are no
                longer those that the Observer was made with.
            UnsupportedModule: the model cannot be observed exactly; the message says what to do.
            NonFinite: the output, or the kernel, is not finite.
        """
        (check_input if self._agop else check_inputs)(x, self._state.device)
        memory = None
        if self._captured is None:
            with self._state.untouched() as buffers:
                made = self._made(x, y)
        else:
            replay = self._captured_pass(self._captured, x, y)
            made, buffers = replay(x, y)
            memory = replay.memory
        return Observation(
            state=self._state,
            k=self._k,
            buffers=buffers,
            start=self._start,
            on_eigen=self._remember,
            find_hessian=self._hessian_finder(x, y) if self._hessian else None,
            memory=memory,
            **self._parts(made),
        )

    def _captured_pass(self, known: dict[Any, CapturedPass], x: Inputs, y: Tensor) -> CapturedPass:
        """The capture for samples of this form and the model as it is, made at its first use."""
        self._state.check_members()
        self._state.find_buffers()
        key = signature(x), fingerprint(self._state, self._modules)
        found = known.pop(key, None) or CapturedPass(self, x, y, graph=CudaGraph(self._state.device))
        known[key] = found  # the last one is the one used last
        if len(known) > _CAPTURES:
            del known[next(iter(known))]
        return found

    def capture(self, x: Inputs, y: Tensor, lr: float, *, overlap: bool = False) -> CapturedStep:
        """Capture the pass and the gradient step behind it in one CUDA graph, to be replayed step after step.

        A replay is one launch: forward, backward, kernel, eigenpairs on a second stream beside the rest, the split of
        the loss, the critical rate, AGOPs where the Observer was asked for them, and `parameters -= lr * gradient`.
        New samples, targets and rates go in without a new capture::

            step = observer.capture(x, y, 0.1)
            for x, y in batches:
                step(x, y, lr=step.critical_lr / 2)
            print(step.read())

        The capture makes the step a few times, certified at first, and undoes it. Afterwards everything is as in that
        step but for values: shapes, modes, and numbers that the forward takes from the host.

        Args:
            x: samples as for a pass, on the model's CUDA device; copied.
            y: targets, as for a pass; copied.
            lr: rate of the first replay, and of the steps that are undone; a finite number.
            overlap: find the spectrum of each replay during the next one, beside all of it, instead of beside the
                update alone. `eigen`, `critical_lr`, `top_loss` and `rest_loss` are then one replay behind the other
                results, after the first replay those of the capture.

        Returns:
            The CapturedStep. It keeps the memory of a pass, and a copy of x and y, as long as it lives.

        Raises:
            TypeError, ValueError: an argument that does not fit, a model that is not on a CUDA device, or an Observer
                with kernel=False, hessian=True, max_bytes or verify="always".
            UnsupportedModule: what a pass refuses, and what a replay could not repeat: a forward, or a rule, that
                reads values on the host (embedding bags do), copies from it, or routes by values; a forward with
                state outside of parameters and buffers; and a plan that the capture's x does not settle.
            NonFinite: as for a pass, or a step that leaves parameters that are not finite.

        Cost: about ten steps, and copies of parameters and buffers while it captures.
        """
        self._need_cuda("capture()")
        return CapturedStep(self, x, y, lr, overlap=overlap, graph=CudaGraph(self._state.device))

    def _need_cuda(self, what: str) -> None:
        if self._state.device.type != "cuda":
            raise ValueError(
                f"model: expected a model on a CUDA device for {what}, got one on {self._state.device}"
            )

    def _remember(self, eigen: TopEigh) -> None:
        self._start = eigen.vectors

    def _hessian_finder(self, x: Inputs, y: Tensor) -> Callable[[Tensor | None, LossGradient], TopEigh]:
        """What finds the Hessian's top pair from u_1 [n c, 1], or from the last one where there is no kernel."""
        state, before = self._state, (versions(x), y._version)

        def find(u: Tensor | None, gradient: LossGradient) -> TopEigh:
            if (versions(x), y._version) != before:
                raise ValueError("hessian: x or y has changed since the observation; observe again")
            with state.untouched():
                hessian = LossHessian(state, x, lambda output: check_target(y, output))
                if u is None:
                    top = hessian.top(1, self._hessian_start, STEP_TOLERANCE)
                    self._hessian_start = top.vectors
                    return top
                found = gradient.transposed(u.view_as(hessian.output))
                start = hessian.pull_back(u) if found is None else found.unsqueeze(1)
                return hessian.top(1, start, STEP_TOLERANCE)

        return find

    def _made(self, x: Inputs, y: Tensor) -> PassResult:
        return self._with_kernel(x, y) if self._kernel else self._without_kernel(x, y)

    def _with_kernel(self, x: Inputs, y: Tensor) -> PassResult:
        tile_bytes = None if self._max_bytes is None else self._tiles_within(x, self._max_bytes)
        sweep = self._sweep(x)
        with torch.no_grad():
            prediction = sweep.output.detach()
            residual, squares = ops.residual(prediction, check_target(y, prediction))
            assembler = Assembler(sweep, residual, tile_bytes=tile_bytes)
            kernel = assembler.build_kernel()
        sweep.output = prediction  # lets go of the graph; features and sensitivities stay
        return PassResult(prediction, residual, squares, assembler.swept, kernel, sweep, assembler)

    def _parts(self, made: PassResult) -> dict[str, Any]:
        """Of an Observation, by the names of its arguments."""
        state, sweep, assembler = self._state, made.sweep, made.assembler
        return {
            "prediction": made.prediction,
            "residual": made.residual,
            "squares": made.squares,
            "kernel": made.kernel,
            "input_gradients": None if sweep is None else sweep.input_gradients,
            "layers": None if sweep is None else self._layer_finder(sweep),
            "gradient": made.gradient(state),
            "report": lambda: _no_report(state) if assembler is None else _report(state, assembler),
        }

    def _sweep(self, x: Inputs, keep_graph: bool = False) -> Sweep:
        return Sweep(
            self._state,
            x,
            self._plans,
            verify=self._verify,
            input_gradient=self._agop,
            layer_inputs=self._layers,
            keep_graph=keep_graph,
        )

    def _layer_finder(self, sweep: Sweep) -> Callable[[], dict[str, LayerGradients]] | None:
        if not self._layers:
            return None

        def find() -> dict[str, LayerGradients]:
            with torch.no_grad():
                return layer_gradients(sweep, None)

        return find

    def _tiles_within(self, x: Inputs, max_bytes: int) -> int:
        key = signature(x)
        if key not in self._tile_bytes:
            self._tile_bytes[key] = tile_bytes_within(
                self._state,
                x,
                max_bytes,
                input_gradient=self._agop,
                layer_inputs=self._layers,
            )
        return self._tile_bytes[key]

    def _without_kernel(self, x: Inputs, y: Tensor) -> PassResult:
        state, sweep = self._state, None
        if self._agop or self._layers:
            sweep = self._sweep(x, keep_graph=True)
            output = sweep.output
        else:
            state.check_members()
            output = outputs_2d(state.forward(x), x)
        prediction = output.detach()
        residual, squares = ops.residual(prediction, check_target(y, prediction))
        weights = residual * (2.0 / residual.numel())
        found = torch.autograd.grad(output, state.parameters, weights, allow_unused=True)
        # Embeddings may give sparse gradients.
        swept = {i: g.to_dense() if g.is_sparse else g for i, g in enumerate(found) if g is not None}
        return PassResult(prediction, residual, squares, swept, sweep=sweep)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on to the same bits: the warm vectors of the eigensolvers."""
        return {"start": self._start, "hessian": self._hessian_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`.

        Raises:
            ValueError: keys that this version does not know.
        """
        if set(state) != {"start", "hessian"}:
            raise ValueError(f"state: expected the keys 'start' and 'hessian', got {sorted(state)}")
        self._start, self._hessian_start = state["start"], state["hessian"]


def _no_report(state: ModelState) -> list[LayerReport]:
    return [
        LayerReport(name, tuple(p.shape), "none", "no kernel was asked for", 0.0, 0)
        for name, p in zip(state.names, state.parameters, strict=True)
    ]


def _report(state: ModelState, assembler: Assembler) -> list[LayerReport]:
    sweep, plan = assembler.sweep, assembler.sweep.plan
    total = sweep.output.shape[0] * sweep.outputs
    rows = []
    for i, (name, parameter) in enumerate(zip(state.names, state.parameters, strict=True)):
        route, flops, backwards = plan.routes[i], 0.0, 0
        if route == Route.ROWS:
            flops, backwards = float("nan"), total
        elif route != Route.UNUSED:
            for use in plan.uses[i]:
                data = sweep.sites.get(use.site)
                if data is not None:
                    kind, work = data.site.rule.work(
                        data, use, arriving(use, parameter), assembler.tile_bytes
                    )
                    route = kind if plan.routes[i] == Route.GRAM else route
                    route = kind if kind == "node calls" else route
                    flops += work
        rows.append(LayerReport(name, tuple(parameter.shape), route, plan.reasons[i], flops, backwards))
    return rows


def observe(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    k: int = 1,
    start: Tensor | TopEigh | None = None,
    loss: str = "mse",
    params: Iterable[str | Tensor] | None = None,
    kernel: bool = True,
    agop: bool | str = False,
    hessian: bool = False,
    verify: str = "first",
    max_bytes: int | None = None,
) -> Observation:
    """One-shot `Observer`: everything about one model on one batch from a single pass.

    Args:
        model: as for `Observer`.
        x: samples [n, ...], or a tuple or dict of such tensors, as for `Observer`.
        y: targets [n, c], or [n] for one output.
        k: eigenpairs of the kernel.
        start: vectors (or TopEigh) of an earlier step, for a warm start on large kernels.
        loss: "mse".
        params: parameters to observe.
        kernel: compute the tangent kernel.
        agop: of what there will be AGOPs: True (the input), "layers" or "all".
        hessian: let the observation find the largest eigenpair of the Hessian of the loss.
        verify: see `Observer`; a one-shot plan is always new, so "first" certifies.
        max_bytes: bound of the memory, see `Observer`.

    Returns:
        The Observation.

    Raises:
        TypeError, ValueError, UnsupportedModule, NonFinite: as for `Observer`.
    """
    observer = Observer(
        model,
        k=k,
        loss=loss,
        params=params,
        kernel=kernel,
        agop=agop,
        hessian=hessian,
        verify=verify,
        max_bytes=max_bytes,
    )
    if start is not None:
        observer._start = start.vectors if isinstance(start, TopEigh) else start
    return observer(x, y)
