"""Numeric tests of the paper's statements, made of the metrics of stored runs.

A claim is measured twice: on the runs of the figure, where it has to hold, and on control runs, where it has
to fail. A claim that also holds on its control shows nothing and is reported as such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

import catapult_ext as cx
from python_experiments.config import RunConfig

#: A step is a spike of a single catapult when the loss has grown this many times since the start.
SPIKE = 1.5


@dataclass(frozen=True)
class Run:
    """A finished run as it was stored.

    Attributes:
        config: what was run.
        seed: its seed.
        metrics: one row per step; columns that were not recorded at a step hold NaN.
        summary: the outcome as scalars: "result", "seconds", "test_loss", "alignment", "catapults", ...
        environment: what it ran on.
        tensors: what recorders kept, by name: "steps" (m,) and "values" (m, ...).
    """

    config: RunConfig
    seed: int
    metrics: pd.DataFrame
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def recorded(self, *columns: str) -> tuple[np.ndarray, ...]:
        """The values of each column at the steps where all of them were recorded, in float64.

        Empty arrays where a column was never recorded.
        """
        if not set(columns) <= set(self.metrics):
            return tuple(np.empty(0) for _ in columns)
        table = self.metrics[list(columns)].dropna()
        return tuple(table[column].to_numpy(dtype=np.float64) for column in columns)

    @property
    def steps(self) -> int:
        """Updates made; the last row of the metrics describes the final parameters."""
        return int(self.metrics["step"].iloc[-1])

    @property
    def rate(self) -> float:
        """The learning rate at first."""
        return float(self.recorded("lr")[0][0])

    @property
    def initial_critical_rate(self) -> float | None:
        """Critical rate of the training set at initialisation; None where it was not measured."""
        for column in ("critical_lr", "measured_critical_lr"):
            (values,) = self.recorded(column)
            if len(values):
                return float(values[0])
        return None


#: The runs of one condition of an experiment (a batch size, for example), one for each seed.
Group = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Measured:
    """A claim's number: the value that decides, and how it came about, in words."""

    value: float
    detail: str = ""


Number = Callable[[Run], float]
Measure = Callable[[Group], Measured]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper that a number decides.

    Attributes:
        statement: the statement, in words.
        measure: computes the number from a group of runs; NaN where there is nothing to measure.
        bound: the smallest number with which the statement holds.
        paper: the paper's number, printed beside ours.
        control: name of the control group on which the claim has to fail.
        unit: printed behind the numbers.
    """

    statement: str
    measure: Measure
    bound: float
    paper: str
    control: str
    unit: str = ""

    def holds(self, measured: Measured) -> bool:
        """Whether the number reaches the bound; NaN never does."""
        return measured.value >= self.bound


@dataclass(frozen=True)
class Verdict:
    """A claim measured on the figure's runs and on its control; `None` where the runs are missing."""

    claim: Claim
    ours: Measured | None
    control: Measured | None

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds on the figure's runs."""
        return None if self.ours is None else self.claim.holds(self.ours)

    @property
    def control_fails(self) -> bool | None:
        """Whether the claim fails on its control, as it must."""
        return None if self.control is None else not self.claim.holds(self.control)

    @property
    def word(self) -> str:
        """Not run, fails, holds, or what is wrong with the control."""
        if self.holds is None:
            return "not run"
        if not self.holds:
            return "fails"
        return {True: "holds", False: "holds, but so does its control", None: "holds, control not run"}[
            self.control_fails
        ]


def judge(claims: Sequence[Claim], groups: Mapping[str, Group]) -> list[Verdict]:
    """Measure each claim on the group "main" and on its control; a group that is missing was not run."""
    return [
        Verdict(
            claim,
            claim.measure(groups["main"]) if "main" in groups else None,
            claim.measure(groups[claim.control]) if claim.control in groups else None,
        )
        for claim in claims
    ]


def in_every_run(number: Number, text: str = "{:.3g}") -> Measure:
    """Measure of a claim that has to hold in each run: the smallest of their numbers, NaN if one has none."""
    return lambda group: worst(group, number, text)


def worst(group: Group, number: Number, text: str = "{:.3g}") -> Measured:
    """The smallest of the runs' numbers (NaN counts as smaller than all), with all of them in words."""
    return smallest([float(number(run)) for runs in group.values() for run in runs], text)


def smallest(values: Sequence[float], text: str = "{:.3g}") -> Measured:
    """The smallest of some runs' numbers; see `worst`."""
    value = math.nan if any(math.isnan(v) for v in values) or not values else min(values)
    words = ["none" if math.isnan(v) else text.format(v) for v in values]
    return Measured(value, "seeds: " + ", ".join(words) if len(words) > 1 else "")


def peak_step(run: Run) -> int | None:
    """Index of the largest training loss; None when that is less than `SPIKE` times the first one.

    Gradient descent records every column used here at every step, so one index serves them all.
    """
    (loss,) = run.recorded("loss")
    if not len(loss) or loss.max() < SPIKE * loss[0]:
        return None
    return int(loss.argmax())


def spike_height(run: Run) -> float:
    """Largest training loss over the first."""
    (loss,) = run.recorded("loss")
    return float(loss.max() / loss[0]) if len(loss) else math.nan


def spike_share(run: Run, top: str = "top_loss") -> float:
    """Share of the spike's rise, from the first step to the peak, that lies in L_<=s; NaN without a spike.

    The part that L_>s loses meanwhile is not credited: the share is at most 1. `top` is the column of L_<=s.
    """
    peak = peak_step(run)
    loss, part = run.recorded("loss", top)
    if peak is None or peak >= len(part):  # the last loss of a run that diverged comes without a kernel
        return math.nan
    return min(1.0, float((part[peak] - part[0]) / (loss[peak] - loss[0])))


def spike_end(run: Run) -> int | None:
    """Index of the first loss after the peak that is below the first loss; None where there is none."""
    peak = peak_step(run)
    if peak is None:
        return None
    (loss,) = run.recorded("loss")
    under = np.flatnonzero(loss[peak:] < loss[0])
    return peak + int(under[0]) if len(under) else None


def critical_rate_growth(run: Run) -> float:
    """Critical rate at the end of the spike over that at the first step.

    NaN for a spike without an end; without any spike the last record takes the place of its end.
    """
    (rate,) = run.recorded("critical_lr")
    end = spike_end(run) if peak_step(run) is not None else len(rate) - 1
    return math.nan if end is None or len(rate) < 2 else float(rate[end] / rate[0])


def falling_share(run: Run) -> float:
    """Share of the steps in which L_>s falls; the step after which a run is no longer finite is none of them."""
    (rest,) = run.recorded("rest_loss")
    steps = len(rest) - 1 + (run.summary.get("result") == "diverged")
    return float((np.diff(rest) < 0).sum() / steps) if len(rest) > 1 else math.nan


def spikes(run: Run) -> list[cx.Spike]:
    """Spikes of the training set's loss that came down again; empty where no spectrum was recorded."""
    return [] if "lambda_1" not in run.metrics else cx.CatapultDetector().spikes(run.metrics)


def catapults_per_rate(run: Run) -> float:
    """Smallest number of catapults that peak under one of the rates of a run with `raises`.

    The loss of the step at which a rate begins is still the work of the rate before.
    """
    starts = [*run.config.rates_by_step, run.steps]
    peaks = np.array([spike.peak for spike in spikes(run) if spike.is_catapult])
    counts = [((first < peaks) & (peaks <= end)).sum() for first, end in itertools.pairwise(starts)]
    return float(min(counts))


def norm_drop(run: Run) -> float:
    """Norm of K before a spike over that at its end, smallest over the spikes; NaN without a spike.

    Infinite where the norm ends as zero, all units being dead.
    """
    largest = max((spike.norm.measured for spike in spikes(run)), default=math.nan)
    return 1 / largest if largest != 0 else math.inf


def located(run: Run) -> float:
    """Share of a spike's rise that L_<=s carries, smallest over the spikes; NaN without a spike."""
    return min((spike.location.measured for spike in spikes(run)), default=math.nan)


def set_loss(run: Run) -> np.ndarray:
    """Loss of the whole training set before each step and after the last, (steps + 1,)."""
    top, rest = run.recorded("top_loss", "rest_loss")
    return top + rest


def mean_by_condition(group: Group, key: str) -> dict[str, float]:
    """Mean over the seeds of an entry of the summaries, per condition."""
    return {name: float(np.mean([run.summary[key] for run in runs])) for name, runs in group.items()}


def smallest_step_up(values: Sequence[float], *, relative: bool = False) -> float:
    """Smallest difference between neighbours of a sequence that should rise; positive only when it does.

    Args:
        values: two or more numbers, in the order in which they should rise.
        relative: divide each difference by the smaller of its two numbers' magnitude.

    Returns:
        The difference, NaN for fewer than two numbers.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return math.nan
    steps = np.diff(array)
    if relative:
        steps = steps / np.minimum(np.abs(array[1:]), np.abs(array[:-1]))
    return float(steps.min())
