"""Fig. 5: SGD with batches of one point; the loss spikes exactly when the doubled point is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

import catapult_ext as cx
from python_experiments import claims, plots
from python_experiments.claims import Claim, Group, Run
from python_experiments.config import Network, Preset, Rate, RunConfig, Task
from python_experiments.registry import Conditions, Experiment

#: The doubled point is the first one of the task.
DOUBLED = 0

CONFIG = RunConfig(
    Network("fcn", width=16384, depth=2, fixed_layers=(1,)),
    Task("unit-sphere", train=100),
    # Half way, on a log scale, between the doubled point's critical rate and the four times larger one of the
    # others.
    Rate(2.0),
    batch_size=1,
    max_steps=400,
    full_loss=True,
    reference="first sample",
)
BELOW = "below every critical rate"
ABOVE = "above every critical rate"


def spikes(run: Run) -> np.ndarray:
    """Whether each step raises the loss of its own batch (Eq. 4), (steps,) boolean."""
    (before,), (after,) = run.recorded("loss"), run.recorded("last_batch_loss")
    steps = min(len(before), len(after))
    return after[:steps] > before[:steps]


def exceeds(run: Run) -> np.ndarray:
    """Whether the rate is above the critical rate of the batch, (steps,) boolean."""
    rate, critical = run.recorded("lr", "batch_critical_lr")
    return (rate > critical)[: len(spikes(run))]  # a step that diverged has no loss after it


def doubled(run: Run) -> np.ndarray:
    """Whether the batch is the doubled point, at each step; the batch order is a function of the seed."""
    order = cx.SGD(1).order(run.config.task.train, run.seed)
    return np.array([int(next(order)) == DOUBLED for _ in range(len(spikes(run)))], dtype=bool)


def agreement(run: Run) -> float:
    """Share of the steps in which "the loss spikes" and "the rate exceeds the critical rate" agree.

    NaN where the loss never spikes: then there is nothing to predict.
    """
    if not spikes(run).any():
        return math.nan
    return float((spikes(run) == exceeds(run)).mean())


def on_doubled(run: Run) -> float:
    """Share of the spikes at which the doubled point was the batch; NaN without a spike."""
    return float(doubled(run)[spikes(run)].mean()) if spikes(run).any() else math.nan


def plot(groups: Mapping[str, Group]) -> Figure:
    """Training loss and critical rates of the batches."""
    return plots.batches(groups, is_spike=spikes, drawn=doubled)


def _main(config: RunConfig) -> Conditions:
    return {"SGD, batch 1": config}


def _below(config: RunConfig) -> Conditions:
    """60 % of the doubled point's critical rate."""
    return {"SGD, batch 1": config.at(0.6 / config.rate.relative)}


def _above(config: RunConfig) -> Conditions:
    """Six times the doubled point's critical rate, 1.5 times the others'."""
    return {"SGD, batch 1": config.at(6 / config.rate.relative)}


FIG5 = Experiment(
    name="fig5",
    figure="Figure 5",
    title="Spikes of SGD come exactly when the rate exceeds the critical rate of the batch",
    statement="100 points on the unit sphere with target 1, one point and its target doubled: a quarter of "
    "the others' critical rate. At a rate in between, SGD with batches of one point spikes exactly when that "
    "point is drawn and the rate exceeds its critical rate.",
    presets={
        "smoke": Preset(
            replace(CONFIG, network=replace(CONFIG.network, width=4096), max_steps=200),
            seeds=(1,),
            note="Width 4096 and 200 steps, to be quick.",
        ),
        "cpu": Preset(CONFIG, seeds=(0, 1, 2), note="The paper's sizes (it prints no width and no rate)."),
        "paper": Preset(CONFIG, seeds=(0, 1, 2), note="The paper's sizes (it prints no width and no rate)."),
    },
    groups={"main": _main, BELOW: _below, ABOVE: _above},
    claims=(
        Claim(
            "The loss spikes exactly at the steps whose rate exceeds the batch's critical rate: share of the "
            "steps in which the two agree",
            claims.in_every_run(agreement, "{:.4g}"),
            bound=1.0,
            paper="exact match",
            control=BELOW,
        ),
        Claim(
            "Only the doubled point causes spikes: share of the spikes at which it was drawn",
            claims.in_every_run(on_doubled, "{:.4g}"),
            bound=1.0,
            paper="only that point",
            control=ABOVE,
        ),
    ),
    plot=plot,
    remarks=(
        "A step spikes when it raises the loss of its own batch, the running training loss of the paper: by "
        "Eq. 4 the residual of a batch of one point is multiplied by 1 - 2 rate / critical rate, up to a "
        "term that vanishes with the width. The curve shows the loss of the whole training set.",
        "The width is large so that the kernel moves little in a step. After two or three spikes the "
        "critical rate of the doubled point itself has risen above the rate, and drawing it no longer "
        "spikes, as the comparison with the critical rate says.",
        "The comparison is with the critical rate before the step. Where the two are almost equal the loss "
        "can fall all the same, because the kernel changes during the step: over seeds 0 to 9 this was so in "
        "1 of 4,000 steps (seed 9, rate over critical rate 1.03).",
    ),
)
