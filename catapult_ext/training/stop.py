"""When a run ends, and as what."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Stop"]


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Ends a run as "converged", "max_steps", "no_improvement" or "diverged".

    Args:
        max_steps: Number of updates after which the run ends.
        train_loss: The run has converged when the loss of the whole training set (mean over all n c entries,
            no factor 1/2) is below this; None: never. The paper stops at 1e-3 (Appendix F). The running loss
            of batches is never taken for it.
        every: Batches only: steps between two evaluations of the loss of the whole training set; None: once an
            epoch. Convergence can only be noticed there. GD knows that loss at every step.
        patience: Steps without a better validation (`best_by` of `train`) after which the run ends; None: never.
        diverged_above: The run has diverged when a loss (of the training set, or of a batch) exceeds this
            multiple of the training set's loss at initialisation, or when a loss, a gradient or a kernel is
            not finite. A catapult's spike is far below the default.

    Raises:
        ValueError: A value is out of range.
    """

    max_steps: int
    train_loss: float | None = None
    every: int | None = None
    patience: int | None = None
    diverged_above: float = 1e6

    def __post_init__(self) -> None:
        if not isinstance(self.max_steps, int) or self.max_steps < 0:
            raise ValueError(f"max_steps: expected an integer >= 0, got {self.max_steps!r}")
        if self.train_loss is not None and not (self.train_loss >= 0 and math.isfinite(self.train_loss)):
            raise ValueError(f"train_loss: expected None or a finite number >= 0, got {self.train_loss!r}")
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(f"every: expected None or an integer >= 1, got {self.every!r}")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise ValueError(f"patience: expected None or an integer >= 1, got {self.patience!r}")
        if not self.diverged_above > 1:
            raise ValueError(f"diverged_above: expected a number > 1, got {self.diverged_above!r}")

    def verdict(
        self, step: int, train_loss: float | None, initial_loss: float, best_step: int | None
    ) -> str | None:
        """The result when the run ends before the update of this step, else None.

        Args:
            step: t, the number of updates made.
            train_loss: Loss of the whole training set before the update, None when not evaluated.
            initial_loss: The same at step 0.
            best_step: Step of the best validation so far, if any.
        """
        if train_loss is not None:
            if not train_loss <= self.loss_limit(initial_loss):
                return "diverged"
            if self.train_loss is not None and train_loss < self.train_loss:
                return "converged"
        if step >= self.max_steps:
            return "max_steps"
        waited = self.patience is not None and best_step is not None and step - best_step >= self.patience
        return "no_improvement" if waited else None

    def loss_limit(self, initial_loss: float) -> float:
        """The largest loss that does not count as divergence; finite."""
        return min(self.diverged_above * initial_loss, 1e308)
