"""Copies of the last states of a model, to look at again when it turns out that they matter."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from catapult_ext.training.update import parameters_and_buffers, restore

__all__ = ["PastState", "StateRing"]


@dataclass
class PastState:
    """A step that was made: what it started from.

    Attributes:
        step: t.
        lr: Rate of update t.
        indices: Samples of its batch, (b,) int64; None for the whole set.
        tensors: Parameters and buffers before it, copies.
        recorded: Numbers of the recorders that have recorded it.
    """

    step: int
    lr: float
    indices: torch.Tensor | None
    tensors: dict[str, torch.Tensor]
    recorded: list[int] = field(default_factory=list)


class StateRing:
    """The last `size` states of a model; memory is size times that of its parameters and buffers."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self._model = model
        self.size = size
        self._states: deque[PastState] = deque(maxlen=size)

    def __iter__(self) -> Iterator[PastState]:
        """From the oldest to the newest."""
        return iter(self._states)

    @torch.no_grad()
    def push(self, step: int, lr: float, indices: torch.Tensor | None, recorded: list[int]) -> None:
        """Copy the present state, in the place of the oldest one when the ring is full."""
        now = parameters_and_buffers(self._model)
        if len(self._states) == self.size:
            tensors = self._states.popleft().tensors
            for name, value in now.items():
                tensors[name].copy_(value)
        else:
            tensors = {name: value.clone() for name, value in now.items()}
        self._states.append(PastState(step, lr, indices, tensors, recorded))

    def visit(self, states: list[PastState]) -> Iterator[PastState]:
        """Put the model into each of the states in turn, and back into its own afterwards."""
        if not states:
            return
        present = {name: value.clone() for name, value in parameters_and_buffers(self._model).items()}
        try:
            for state in states:
                restore(self._model, state.tensors)
                yield state
        finally:
            restore(self._model, present)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states, as trees of tensors and scalars."""
        return [vars(state) for state in self._states]

    def load_state_dict(self, stored: list[dict[str, Any]], device: torch.device) -> None:
        """Go on from `state_dict`."""
        self._states.clear()
        for entry in stored:
            indices = entry["indices"]
            tensors = {name: value.to(device) for name, value in entry["tensors"].items()}
            moved = {"indices": None if indices is None else indices.to(device), "tensors": tensors}
            self._states.append(PastState(**{**entry, **moved}))
