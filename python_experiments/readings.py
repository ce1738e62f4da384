"""What the rows of a run say, in a few numbers and small charts for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from catapult_ext import CatapultDetector
from catapult_ext.training import Spike

_EIGHTHS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Reading:
    """The latest numbers of a run; None where nothing was recorded.

    Attributes:
        step: updates made.
        loss: of the training set (GD) or of the last batch (SGD).
        lr: rate of the last update.
        norm: largest eigenvalue of the tangent kernel of the training set or the probe.
        critical_lr: critical rate of the training set or the probe, else of the last batch.
        of_batch: whether that critical rate is that of the batch.
        steps_above: steps whose rate exceeds the critical rate of their batch, else of the set; the paper
            counts each of them as a catapult of SGD.
    """

    step: int = 0
    loss: float | None = None
    lr: float | None = None
    norm: float | None = None
    critical_lr: float | None = None
    of_batch: bool = False
    steps_above: int | None = None

    @property
    def line(self) -> str:
        """Loss and rate in a few words, for one of many runs."""
        words = [] if self.loss is None else [f"loss {self.loss:.3g}"]
        if self.lr is not None:
            rate = (
                f"{self.lr:.3g}" if not self.critical_lr else f"{self.lr / self.critical_lr:.2f} x critical"
            )
            words.append(f"rate {rate}")
        return ", ".join(words)


def reading(rows: Sequence[Mapping[str, Any]]) -> Reading:
    """The latest numbers in the rows of a run, as `metrics.jsonl` has them; absent or NaN: not recorded."""
    if not rows:
        return Reading()
    of_batch = _latest(rows, "critical_lr") is None
    above = [high for row in rows if (high := _above(row)) is not None]
    return Reading(
        step=int(rows[-1]["step"]),
        loss=_latest(rows, "loss"),
        lr=_latest(rows, "lr"),
        norm=_latest(rows, "lambda_1"),
        critical_lr=_latest(rows, "batch_critical_lr" if of_batch else "critical_lr"),
        of_batch=of_batch and _latest(rows, "batch_critical_lr") is not None,
        steps_above=sum(above) if above else None,
    )


def catapults(rows: Sequence[Mapping[str, Any]]) -> list[Spike] | None:
    """The catapults of a run that have ended; None where the spectrum of a set was not recorded."""
    if not all(len(series(rows, column)) for column in ("lambda_1", "top_loss", "rest_loss")):
        return None
    return CatapultDetector().find(pd.DataFrame(list(rows)))


def _above(row: Mapping[str, Any]) -> bool | None:
    """Whether the rate of a row exceeds its batch's critical rate, else its set's; None: not recorded."""
    lr = _number(row, "lr")
    critical = _number(row, "batch_critical_lr")
    critical = _number(row, "critical_lr") if critical is None else critical
    return None if lr is None or critical is None else lr > critical


def _number(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    return None if value is None or not math.isfinite(value) else float(value)


def _latest(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    return next((v for row in reversed(rows) if (v := _number(row, column)) is not None), None)


def series(rows: Sequence[Mapping[str, Any]], column: str) -> np.ndarray:
    """The recorded values of a column, (records,) float64."""
    return np.array([v for row in rows if (v := _number(row, column)) is not None], dtype=np.float64)


def chart(
    values: np.ndarray, width: int, height: int, limits: tuple[float, float] | None = None
) -> list[str]:
    """Bars of a series of positive numbers on a log scale, as lines of text from top to bottom.

    Each bar is the largest of its share of the values, so that no spike is lost.

    Args:
        values: (m,) numbers; those that are not positive count as the smallest positive one.
        width: bars at most.
        height: lines; each has eight levels.
        limits: numbers at the foot and at the top; None: the smallest and the largest bar.

    Returns:
        `height` lines of min(m, width) letters; no line where no value is positive.
    """
    if not (values > 0).any():
        return []
    values = np.maximum(values, values[values > 0].min())
    edges = np.linspace(0, len(values), min(width, len(values)) + 1).astype(int)
    bars = np.log(np.maximum.reduceat(values, edges[:-1]))  # (bars,)
    low, high = (bars.min(), bars.max()) if limits is None else np.log(limits)
    share = ((bars - low) / (high - low)).clip(0, 1) if high > low else np.full_like(bars, 0.5)
    levels = 1 + np.round(share * (8 * height - 1)).astype(int)  # every bar is seen
    return [
        "".join(_EIGHTHS[min(8, max(0, level - 8 * line))] for level in levels)
        for line in reversed(range(height))
    ]


def duration(seconds: float) -> str:
    """Seconds in words, two digits: 0.4 s, 12 s, 3.5 min, 2.0 h."""
    size, unit = next(
        ((size, unit) for size, unit in ((1, "s"), (60, "min")) if seconds / size < 99.5), (3600, "h")
    )
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
