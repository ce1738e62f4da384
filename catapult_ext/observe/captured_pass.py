"""A pass as a CUDA graph: one launch instead of the hundreds of a forward, a backward and their Gram products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from catapult_ext.observe.capture import Capture, restore
from catapult_ext.observe.cuda_graph import CudaGraph
from catapult_ext.observe.inputs import Inputs
from catapult_ext.observe.pass_result import PassResult

if TYPE_CHECKING:
    from catapult_ext.observe.observer import Observer

__all__ = ["CapturedPass"]


class CapturedPass(Capture):
    """What an Observer computes for samples of one form, captured once and replayed.

    Attributes:
        memory: its version counter advances with each replay, after which what was made before is overwritten.
    """

    def __init__(self, observer: Observer, x: Inputs, y: Tensor, *, graph: CudaGraph) -> None:
        """Certify, capture, and compare a replay with the pass itself; the model is left as found.

        Args:
            observer: says what to compute; it is copied.
            x: samples.
            y: targets.
            graph: captures and replays.
        """
        self._prepare(observer, x, y, graph)
        self._buffers = [buffer for _, _, buffer in self._state.buffers]
        self.memory = torch.zeros(())
        with self._undone(parameters=False), torch.no_grad():
            expected = graph.rehearse(self._pass)
            self._check_buffers()
            self._results = graph.record(self._pass)
            self._check_plan()
            graph.replay()
            pairs = zip(self._numbers(self._results), self._numbers(expected), strict=True)
            self._check_replay((found, other, None) for found, other in pairs)

    def _pass(self) -> dict[str, Any]:
        """What is captured: the pass, and what it makes of the buffers, which are left as found."""
        before = [(buffer, buffer.clone()) for buffer in self._buffers]
        with torch.enable_grad():
            made = self._observer._made(self.x, self.y)
        # The gradient is left in products of features and sensitivities, which every replay fills; what needs the
        # network's own graph has been formed with the kernel.
        after = [buffer.clone() for buffer in self._buffers]
        restore(before)
        return {"made": made, "buffers": after}

    def _numbers(self, results: dict[str, Any]) -> list[Tensor]:
        """All that has to come out of a replay again."""
        made: PassResult = results["made"].anew()
        gradient = made.gradient(self._state)
        gradients = [gradient.dense(i) for i in range(len(self._state.parameters)) if i in gradient]
        kernel = [] if made.kernel is None else [made.kernel]
        return [made.residual, *kernel, *gradients, *results["buffers"]]

    @torch.no_grad()
    def __call__(self, x: Inputs, y: Tensor) -> tuple[PassResult, list[tuple[Tensor, Tensor]]]:
        """Replay on samples of the captured form; does not wait for the device.

        Returns:
            The pass, and (buffer, value that the forward gave it) for each buffer: in the memory of the graph, up to
            the next replay.
        """
        self._write(x, y)
        self._graph.replay()
        increment_version(self.memory)
        made: PassResult = self._results["made"]
        return made.anew(), list(zip(self._buffers, self._results["buffers"], strict=True))
