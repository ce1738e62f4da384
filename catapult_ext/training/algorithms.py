"""What a step sees: the whole training set, or a batch of a seeded shuffle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["GD", "SGD", "BatchOrder"]


@dataclass(frozen=True)
class GD:
    """Gradient descent: every step uses the whole training set."""


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent without replacement: each epoch visits a fresh shuffle in batches.

    The step on a batch follows the gradient of the batch's mean loss.

    Args:
        batch_size: b, samples per step, at most the number of training samples.
        drop_last: What happens to the n mod b samples that do not fill a last batch. False: they form a
            smaller batch, so each sample is visited once an epoch. True: they are left out of that epoch.
    """

    batch_size: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or isinstance(self.batch_size, bool) or self.batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {self.batch_size!r}")

    def steps_per_epoch(self, n: int) -> int:
        """Batches in one epoch of n samples."""
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def order(self, n: int, seed: int, device: torch.device | str = "cpu") -> BatchOrder:
        """The batches of a run: a function of n, seed and the batch size alone, on every device.

        Raises:
            ValueError: The batch size is larger than n.
        """
        if self.batch_size > n:
            raise ValueError(f"batch_size: expected at most the {n} training samples, got {self.batch_size}")
        return BatchOrder(self, n, seed, torch.device(device))


class BatchOrder:
    """Endless iterator over the sample indices of each batch, (b,) int64; made by `SGD.order`."""

    def __init__(self, algorithm: SGD, n: int, seed: int, device: torch.device) -> None:
        self._algorithm, self._n, self._device = algorithm, n, device
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_state = self._generator.get_state()  # before the shuffle of the present epoch
        self._position = 0
        self._batches = self._shuffle()

    def _shuffle(self) -> tuple[torch.Tensor, ...]:
        order = torch.randperm(self._n, generator=self._generator).to(self._device)  # (n,)
        return order.split(self._algorithm.batch_size)[: self._algorithm.steps_per_epoch(self._n)]

    def __iter__(self) -> BatchOrder:
        return self

    def __next__(self) -> torch.Tensor:
        if self._position == len(self._batches):
            self._epoch_state = self._generator.get_state()
            self._position = 0
            self._batches = self._shuffle()
        batch = self._batches[self._position]
        self._position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """State of the generator at the start of the epoch, and how many of its batches were handed out."""
        return {"epoch_generator": self._epoch_state, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self._epoch_state = state["epoch_generator"]
        self._generator.set_state(self._epoch_state)
        self._batches = self._shuffle()
        self._position = state["position"]
