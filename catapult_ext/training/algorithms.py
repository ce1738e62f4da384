"""The optimizers of Table 3: which samples a step sees, and the rule of the update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["GD", "SGD", "Adadelta", "Adagrad", "Adam", "Algorithm", "BatchOrder", "RMSprop"]


@dataclass(frozen=True)
class Algorithm:
    """Base of all algorithms; derive from it to train with another optimizer of `torch.optim`.

    A step follows the gradient of the mean loss of its samples: a batch of a seeded shuffle, or the whole
    training set.

    Args:
        batch_size: b, samples per step, at most the number of training samples; None: all of them.
        drop_last: What happens to the n mod b samples that do not fill a last batch. False: they form a
            smaller batch, so each sample is visited once an epoch. True: they are left out of that epoch.
    """

    batch_size: int | None
    drop_last: bool = False

    def __post_init__(self) -> None:
        b = self.batch_size
        if b is not None and (not isinstance(b, int) or isinstance(b, bool) or b < 1):
            raise ValueError(f"batch_size: expected an integer >= 1, got {b!r}")

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer | None:
        """The rule of the update; its rate is set before each step. None: w <- w - lr g, the fast way."""
        return None

    @property
    def critical_factor(self) -> float | None:
        """Critical rate of this rule in units of n c / lambda_1; None: it has none, as it rescales gradients."""
        return None

    def steps_per_epoch(self, n: int) -> int:
        """Batches in one epoch of n samples."""
        b = self.batch_size or n
        return n // b if self.drop_last else -(-n // b)

    def order(self, n: int, seed: int, device: torch.device | str = "cpu") -> BatchOrder:
        """The batches of a run: a function of n, seed and the batch size alone, on every device.

        Raises:
            ValueError: The batch size is larger than n.
        """
        if self.batch_size is not None and self.batch_size > n:
            raise ValueError(f"batch_size: expected at most the {n} training samples, got {self.batch_size}")
        return BatchOrder(self, n, seed, torch.device(device))


@dataclass(frozen=True)
class _HeavyBall(Algorithm):
    """Steps along the gradient, or with momentum."""

    momentum: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum!r}")

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer | None:
        """`torch.optim.SGD` where there is momentum."""
        return torch.optim.SGD(parameters, lr=0.0, momentum=self.momentum) if self.momentum else None

    @property
    def critical_factor(self) -> float | None:
        """1 + m."""
        return 1.0 + self.momentum


@dataclass(frozen=True)
class SGD(_HeavyBall):
    """Stochastic gradient descent without replacement: each epoch visits a fresh shuffle in batches.

    Args:
        batch_size: See `Algorithm`.
        drop_last: See `Algorithm`.
        momentum: m of the heavy ball, v <- m v + g, w <- w - lr v; in [0, 1). Its critical rate is (1 + m)
            times that of plain steps.
    """


@dataclass(frozen=True)
class GD(_HeavyBall):
    """Gradient descent: every step uses the whole training set.

    Args:
        momentum: See `SGD`.
    """

    batch_size: int | None = field(default=None, init=False)
    drop_last: bool = field(default=False, init=False)


@dataclass(frozen=True)
class RMSprop(Algorithm):
    """`torch.optim.RMSprop`: gradients over the root of a running mean of their squares.

    Args:
        batch_size: See `Algorithm`.
        drop_last: See `Algorithm`.
        alpha: Of the running mean.
        eps: Added to the root.
    """

    alpha: float = field(default=0.99, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """See the class."""
        return torch.optim.RMSprop(parameters, lr=0.0, alpha=self.alpha, eps=self.eps)


@dataclass(frozen=True)
class Adagrad(Algorithm):
    """`torch.optim.Adagrad`: gradients over the root of the sum of their squares.

    Args:
        batch_size: See `Algorithm`.
        drop_last: See `Algorithm`.
        eps: Added to the root.
    """

    eps: float = field(default=1e-10, kw_only=True)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """See the class."""
        return torch.optim.Adagrad(parameters, lr=0.0, eps=self.eps)


@dataclass(frozen=True)
class Adadelta(Algorithm):
    """`torch.optim.Adadelta`: gradients scaled by running means of squared updates and gradients.

    Args:
        batch_size: See `Algorithm`.
        drop_last: See `Algorithm`.
        rho: Of the running means.
        eps: Added to both.
    """

    rho: float = field(default=0.9, kw_only=True)
    eps: float = field(default=1e-6, kw_only=True)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """See the class."""
        return torch.optim.Adadelta(parameters, lr=0.0, rho=self.rho, eps=self.eps)


@dataclass(frozen=True)
class Adam(Algorithm):
    """`torch.optim.Adam`: running mean of the gradients over the root of that of their squares.

    Args:
        batch_size: See `Algorithm`.
        drop_last: See `Algorithm`.
        betas: Of the two running means.
        eps: Added to the root.
    """

    betas: tuple[float, float] = field(default=(0.9, 0.999), kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """See the class."""
        return torch.optim.Adam(parameters, lr=0.0, betas=self.betas, eps=self.eps)


class BatchOrder:
    """Endless iterator over the sample indices of each batch, (b,) int64; made by `Algorithm.order`."""

    def __init__(self, algorithm: Algorithm, n: int, seed: int, device: torch.device) -> None:
        self._algorithm, self._n, self._device = algorithm, n, device
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_state = self._generator.get_state()  # before the shuffle of the present epoch
        self._position = 0
        self._batches = self._shuffle()

    def _shuffle(self) -> tuple[torch.Tensor, ...]:
        order = torch.randperm(self._n, generator=self._generator).to(self._device)  # (n,)
        batches = order.split(self._algorithm.batch_size or self._n)
        return batches[: self._algorithm.steps_per_epoch(self._n)]

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
