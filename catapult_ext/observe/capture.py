"""What captured passes and captured steps share: a certified plan of their own, and inputs at fixed addresses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from catapult_ext.errors import UnsupportedModule
from catapult_ext.graph.certify import relative_tolerance
from catapult_ext.observe.cuda_graph import CudaGraph, WithoutHost
from catapult_ext.observe.inputs import Inputs, check_inputs, copies, describe, signature, tensors
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.observation import Observation
from catapult_ext.observe.outputs import check_target

if TYPE_CHECKING:
    from catapult_ext.observe.observer import Observer

__all__ = ["Capture", "fingerprint", "restore"]


def fingerprint(state: ModelState, modules: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Where a graph reads and writes, and what it was captured for; hashable.

    Args:
        state: parameters and buffers of the model.
        modules: all of its modules.
    """
    return (
        tuple([(p.data_ptr(), p.requires_grad) for _, p in state.every]),
        tuple([module._buffers.get(name) is b and b.data_ptr() for module, name, b in state.buffers]),
        tuple([module.training for module in modules]),
    )


def restore(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write the values back, where each is (tensor, its value before)."""
    for tensor, value in before:
        tensor.copy_(value)


class Capture:
    """Base of what is captured once and replayed on samples of one form.

    Attributes:
        x: samples that a replay reads.
        y: targets [n, c] that it reads.
    """

    x: Inputs
    y: Tensor

    def _prepare(self, observer: Observer, x: Inputs, y: Tensor, graph: CudaGraph) -> Observation:
        """Certify a pass of (a copy of) the Observer, and keep copies of x and y.

        Returns:
            The pass.

        Raises:
            ValueError: an Observer with max_bytes, or that certifies every pass.
            TypeError, ValueError, UnsupportedModule, NonFinite: as for a pass.
        """
        if observer._verify == "always":
            raise ValueError("capture: expected an Observer without verify='always': no replay is certified")
        if observer._max_bytes is not None:
            raise ValueError(f"capture: expected an Observer with max_bytes=None, got {observer._max_bytes}")
        check_inputs(x, observer._state.device)
        # Plans of its own: certified on this x, and alive as long as the graph that reads their tensors.
        observer = copy.copy(observer)
        observer._plans, observer._verify, observer._captured = {}, "never", None
        self._observer, self._state, self._graph = observer, observer._state, graph
        self._modules = list(self._state.model.modules())
        self._here = fingerprint(self._state, self._modules)
        self.x = copies(x)
        with torch.enable_grad():
            first = graph.run(lambda: self._certified(y))
        first.check()
        self._check_plan()
        self.y = check_target(y, first.prediction).detach().clone()
        return first

    def _certified(self, y: Tensor) -> Observation:
        """A pass of the Observer: raises what it refuses, and certifies the plan."""
        seen = self._observer(self.x, y)
        if seen.kernel is not None:
            _ = seen.eigen
        with self._state.untouched(), WithoutHost():
            self._state.forward(self.x)
        return seen

    def _check_plan(self) -> None:
        """Whether later passes need no look at the data. A plain pass, without kernel and AGOPs, has no plan."""
        plans = list(self._observer._plans.values())
        if len(plans) > 1:
            raise UnsupportedModule(
                "model: its graph differs from call to call; observe it without a capture"
            )
        for plan in plans:
            maps = [site.row_map for site in plan.sites]
            if plan.data_dependent or any(each is not None and each.kind == "permuted" for each in maps):
                raise UnsupportedModule(
                    "model: which of its rows belongs to which sample may depend on values (index, gather, sort, "
                    "maximum, permutation), so that its passes have to be certified on the host; observe it without a "
                    "capture"
                )
            if not plan.certified:
                raise UnsupportedModule(
                    "model: too few samples reach some layer (dead units?) to settle which rows are theirs, which each "
                    "pass then has to look at; capture it with another x, or observe it without a capture"
                )

    @contextmanager
    def _undone(self, *, parameters: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """What is done to buffers, and parameters, inside is undone; gives (tensor, its value before)."""
        state = self._state
        held = [p.detach() for _, p in state.every] if parameters else []
        held += [buffer for _, _, buffer in state.buffers]
        before = [(tensor, tensor.clone()) for tensor in held]
        try:
            yield before
        finally:
            for module, name, buffer in state.buffers:
                module._buffers[name] = buffer
            restore(before)

    def _check_buffers(self) -> None:
        for module, name, buffer in self._state.buffers:
            if module._buffers[name] is not buffer:
                raise UnsupportedModule(
                    f"model: its forward assigns a new tensor to the buffer {name}, and a replay writes to the memory "
                    "of the capture only; write to the buffer in place, or observe without a capture"
                )

    @staticmethod
    def _check_replay(triples: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Whether a replay gave what the function itself gives: (found, expected, value that both began with)."""
        if not all(_agree(*triple) for triple in triples):
            raise UnsupportedModule(
                "model: a replay of its step gives something else than the step itself, so that its forward depends on "
                "more than parameters, buffers and x (a counter, random numbers?); observe it without a capture"
            )

    def _write(self, x: Inputs | None, y: Tensor | None) -> None:
        """Write what the next replay reads; None leaves what is there."""
        if x is not None:
            check_inputs(x, self._state.device)
            if signature(x) != signature(self.x):
                raise ValueError(
                    f"x: expected {len(tensors(self.x)[0])} samples of {describe(self.x)} as captured, got "
                    f"{len(tensors(x)[0])} of {describe(x)}"
                )
            for own, given in zip(tensors(self.x), tensors(x), strict=True):
                own.copy_(given)
        if y is not None:
            self.y.copy_(check_target(y, self.y))


def _agree(found: Tensor, expected: Tensor, before: Tensor | None = None) -> bool:
    """Whether two tensors are equal up to rounding, relative to their size, or to the change from `before`."""
    if torch.allclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True):  # masks with -inf among them
        return True
    if not expected.is_floating_point():
        return False
    size, rounding = float(expected.double().norm()), 0.0
    if before is not None:
        rounding = 4.0 * torch.finfo(expected.dtype).eps * size
        size = float((expected.double() - before).norm())
    error = float((found.double() - expected).norm())
    return error <= relative_tolerance(expected.dtype) * size + rounding
