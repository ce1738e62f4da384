"""Loss and classification error of a data set, in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from catapult_ext.data import Dataset

__all__ = ["Evaluation", "Labels", "evaluate", "evaluation_mode"]


@dataclass(frozen=True)
class Evaluation:
    """Mean squared error over all n c entries, and the share of wrong classes (None: no classes)."""

    loss: float
    error: float | None


def evaluate(
    model: nn.Module, data: Dataset, *, labels: Labels | None = None, chunk: int = 256
) -> Evaluation:
    """Evaluate a model in evaluation mode, without gradients, leaving the modes of its modules as they were.

    Args:
        model: Maps (m, ...) to (m, c), or (m,) when c = 1.
        data: x (n, ...), y (n, c).
        labels: How to tell the classes; None: no classification error.
        chunk: Samples per forward pass; bounds the memory. Chunks are summed in float64.

    Returns:
        The mean over the whole set; independent of `chunk` up to rounding.

    Raises:
        ValueError: The set is empty, or the output does not have the shape of y.
    """
    n = len(data)
    if n == 0:
        raise ValueError(f"data: expected at least one sample in {data.name!r}, got 0")
    squares, wrong = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, n, chunk):
            y = data.y[start : start + chunk]  # (m, c)
            f = model(data.x[start : start + chunk])  # (m, c)
            if f.dim() == 1 and y.shape[1] == 1:
                f = f.unsqueeze(1)
            if f.shape != y.shape:
                raise ValueError(f"model: expected an output of shape {tuple(y.shape)}, got {tuple(f.shape)}")
            squares += (f - y).square().sum(dtype=torch.float64).item()
            if labels is not None:
                wrong += labels.wrong(f, y)
    return Evaluation(squares / data.y.numel(), None if labels is None else wrong / n)


@dataclass(frozen=True)
class Labels:
    """How classes are read off targets and predictions.

    Args:
        boundary: With one output, the point half way between the two labels: a prediction above it means the
            upper label, one exactly on it the lower. Not used with several outputs, where the class is the
            largest output, the first of equals.
    """

    boundary: float = 0.0

    @classmethod
    def of(cls, y: torch.Tensor) -> Labels | None:
        """The labels in targets (n, c), or None when these are no classes.

        Classes are both of -1/+1 or both of 0/1 for c = 1, and one-hot rows for c > 1.
        """
        if y.shape[1] > 1:
            one_hot = bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())
            return cls() if one_hot else None
        return {(-1.0, 1.0): cls(0.0), (0.0, 1.0): cls(0.5)}.get(tuple(torch.unique(y).tolist()))

    def wrong(self, prediction: torch.Tensor, y: torch.Tensor) -> int:
        """Number of samples whose class is wrong; both arguments (n, c)."""
        if y.shape[1] == 1:
            return int(((prediction > self.boundary) != (y > self.boundary)).sum())
        return int((prediction.argmax(1) != y.argmax(1)).sum())


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and each one back into its own afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
