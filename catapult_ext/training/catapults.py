"""Finding catapults: spikes of the loss that the tangent kernel explains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from catapult_ext.training.history import History

__all__ = ["CatapultDetector", "Evidence", "Reading", "Spike"]


class Reading(NamedTuple):
    """What the detector sees of one step.

    Attributes:
        step: t.
        loss: Mean squared error of the observed set before update t.
        lambda_1: Norm of its kernel.
        top_loss: Part of the loss in the top eigenspace, L_<=s.
        excess: Largest rate over critical rate among the updates since the reading before; NaN: not known.
    """

    step: int
    loss: float
    lambda_1: float
    top_loss: float
    excess: float = math.nan


class Evidence(NamedTuple):
    """One number that speaks for a catapult or against it.

    Attributes:
        measured: The number; NaN when it is not known.
        bound: What it has to reach.
        holds: Whether it does. What is not known speaks neither way.
    """

    measured: float
    bound: float
    holds: bool


@dataclass(frozen=True)
class Spike:
    """A spike of the loss, with what tells whether it is a catapult.

    Attributes:
        start: Step of the smallest loss before the rise.
        peak: Step of the largest loss.
        end: First step at which most of the rise is gone.
        height: Loss at the peak over that at the start; at least `rise`.
        norm: Norm of K at the end over that at the start; at most `drop`.
        location: Largest share of the rise that L_<=s carries at a step, up to the peak, at which at least half of
            the rise is there; at least `share`. (At the peak itself the kernel already turns.)
        rate: Largest rate over critical rate among the updates of the rise; above `excess`.
    """

    start: int
    peak: int
    end: int
    height: Evidence
    norm: Evidence
    location: Evidence
    rate: Evidence

    @property
    def is_catapult(self) -> bool:
        """Whether all of the evidence holds."""
        return all(e.holds for e in (self.height, self.norm, self.location, self.rate))


@dataclass(frozen=True, kw_only=True)
class CatapultDetector:
    """Tells catapults from other spikes of the loss (Section 2 and Claim 1 of the paper).

    A catapult is a drastic increase of the loss followed by a fast decrease, in the top eigenspace of the
    tangent kernel, triggered by a rate above the critical one and accompanied by a drop of the norm of K. A
    spike that has not come down yet is not reported: whether the norm drops is not known before its end.

    Args:
        rise: A spike begins where the loss exceeds this multiple of the smallest of the `window` readings
            before.
        window: See above.
        tail: It ends where no more than this share of its rise is left.
        patience: A rise that has not come down so many readings after its largest loss is no spike, and is
            dropped: the loss has moved to another level.
        drop: Largest norm of K at its end, relative to that at its start.
        share: Smallest share of its rise in the top eigenspace.
        excess: The largest rate over critical rate in its rise has to exceed this. The critical rate of the
            batches counts where it was recorded (`BatchCriticalRate`), else that of the observed set; where
            neither was, this is left out.

    Raises:
        ValueError: A value is out of range.
    """

    rise: float = 1.5
    window: int = 10
    tail: float = 0.1
    patience: int = 30
    drop: float = 0.95
    share: float = 0.8
    excess: float = 1.0

    def __post_init__(self) -> None:
        if not (self.rise > 1 and math.isfinite(self.rise)):
            raise ValueError(f"rise: expected a finite number > 1, got {self.rise!r}")
        for name in ("window", "patience"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        for name in ("tail", "drop", "share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in (0, 1), got {getattr(self, name)!r}")
        if not (self.excess >= 0 and math.isfinite(self.excess)):
            raise ValueError(f"excess: expected a finite number >= 0, got {self.excess!r}")

    def find(self, history: History | pd.DataFrame) -> list[Spike]:
        """The catapults of a run, in order.

        Args:
            history: A history or its metrics, with the columns of `Spectrum`: rows without them are passed
                over. Record every step, or around spikes: between two records a catapult can hide.

        Raises:
            ValueError: A column is missing.
        """
        return [spike for spike in self.spikes(history) if spike.is_catapult]

    def spikes(self, history: History | pd.DataFrame) -> list[Spike]:
        """All spikes that came down again, catapults and others, each with its evidence."""
        state: dict[str, Any] = {}
        metrics = history.metrics if isinstance(history, History) else history
        found = (self.update(state, reading) for reading in _readings(metrics))
        return [spike for spike in found if spike is not None]

    def update(self, state: dict[str, Any], reading: Reading) -> Spike | None:
        """Follow a run as it goes on.

        Args:
            state: Empty at first; changed in place. Holds JSON values only, so that it can be stored.
            reading: The next step, later than all before.

        Returns:
            The spike that ended at this step, if one did.
        """
        recent: list[list[float]] = state.setdefault("recent", [])
        spike: dict[str, Any] | None = state.setdefault("spike", None)
        finished = None
        if spike is None:
            lowest = min(recent, key=lambda past: past[1], default=None)
            if lowest is not None and reading.loss > self.rise * lowest[1]:
                since = [past[4] for past in recent if past[0] > lowest[0]]
                excess = _largest([*since, reading.excess])
                # `above`: steps above half of the rise; `excess`: up to the peak, `seen`: up to now.
                spike = {"start": lowest, "above": [list(reading)], "excess": excess, "seen": excess}
                state["spike"] = {**spike, "left": self.patience}
        else:
            start, peak = Reading(*spike["start"]), _peak(spike)
            spike["seen"] = _largest([spike["seen"], reading.excess])
            if reading.loss <= start.loss + self.tail * (peak.loss - start.loss):
                finished = self._judge(spike, reading)
                recent.clear()  # the next spike is measured against what comes after this one
                state["spike"] = None
            elif reading.loss > peak.loss:
                half = (start.loss + reading.loss) / 2
                spike["above"] = [past for past in spike["above"] if past[1] >= half] + [list(reading)]
                spike |= {"excess": spike["seen"], "left": self.patience}
            elif spike["left"] == 1:
                state["spike"] = None
            else:
                spike["left"] -= 1
                if reading.loss >= (start.loss + peak.loss) / 2:
                    spike["above"].append(list(reading))
        recent.append(list(reading))
        del recent[: -self.window]
        return finished

    def is_rising(self, state: dict[str, Any]) -> bool:
        """Whether a spike has begun and not ended."""
        return state.get("spike") is not None

    def _judge(self, spike: dict[str, Any], end: Reading) -> Spike:
        start, peak, excess = Reading(*spike["start"]), _peak(spike), spike["excess"]
        # A loss of exactly zero, or a network without any gradient, may stand before a spike.
        height = peak.loss / start.loss if start.loss > 0 else math.inf
        norm = end.lambda_1 / start.lambda_1 if start.lambda_1 > 0 else math.inf
        rise = [Reading(*past) for past in spike["above"] if past[0] <= peak.step]
        shares = [(past.top_loss - start.top_loss) / (past.loss - start.loss) for past in rise]
        location = min(1.0, max(shares))  # what L_>s loses meanwhile is not credited to L_<=s
        return Spike(
            start=int(start.step),
            peak=int(peak.step),
            end=int(end.step),
            height=Evidence(height, self.rise, height >= self.rise),
            norm=Evidence(norm, self.drop, norm <= self.drop),
            location=Evidence(location, self.share, location >= self.share),
            rate=Evidence(excess, self.excess, math.isnan(excess) or excess > self.excess),
        )


def _peak(spike: dict[str, Any]) -> Reading:
    """The first step with the largest loss."""
    return Reading(*max(spike["above"], key=lambda past: past[1]))


def _largest(values: list[float]) -> float:
    """The largest known value, NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return max(known, default=math.nan)


def _readings(metrics: pd.DataFrame) -> list[Reading]:
    """The rows of a run at which its spectrum was recorded."""
    for column in ("step", "lambda_1", "top_loss", "rest_loss"):
        if column not in metrics:
            raise ValueError(f"history: expected the columns of Spectrum, got none named {column!r}")
    critical = next((c for c in ("batch_critical_lr", "critical_lr") if c in metrics), None)
    ratio = np.full(len(metrics), np.nan)
    if critical is not None and "lr" in metrics:
        ratio = (metrics["lr"] / metrics[critical]).to_numpy(dtype=float)
    columns = ["step", "lambda_1", "top_loss", "rest_loss"]
    readings, before = [], 0
    for row, (step, lambda_1, top, rest) in enumerate(metrics[columns].to_numpy(dtype=float).tolist()):
        if math.isnan(lambda_1) or math.isnan(top) or math.isnan(rest):
            continue
        excess = _largest(ratio[before:row].tolist())
        readings.append(Reading(int(step), top + rest, lambda_1, top, excess))
        before = row
    return readings
