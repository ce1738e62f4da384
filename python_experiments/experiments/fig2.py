"""Fig. 2: the anatomy of one catapult, on the run of Fig. 3a."""

from __future__ import annotations

import math

import numpy as np

from python_experiments import claims, plots
from python_experiments.claims import Claim, Run
from python_experiments.experiments.fig3 import BELOW, FCN
from python_experiments.registry import Experiment


def recovery(run: Run) -> float:
    """First loss over the last one of a run with a spike; NaN without a spike."""
    if claims.peak_step(run) is None:
        return math.nan
    (loss,) = run.recorded("loss")
    return float(loss[0] / loss[-1])


def turning_lag(run: Run) -> float:
    """Minus the steps between the peak of the loss and the moment the critical rate overtakes the rate.

    NaN without a spike, or where the rate is not above the critical rate at first and below it at last.
    """
    peak = claims.peak_step(run)
    rate, critical = run.recorded("lr", "critical_lr")
    above = rate > critical
    if peak is None or not above[0] or above[-1]:
        return math.nan
    return -abs(float(np.argmin(above)) - peak)


FIG2 = Experiment(
    name="fig2",
    figure="Figure 2",
    title="The anatomy of a single catapult",
    statement="A rate above the critical rate makes the loss rise drastically, the norm of the kernel drops, "
    "the critical rate overtakes the rate, and the loss falls below where it began. Rate 6, critical rate "
    "3.6.",
    presets=FCN.presets,
    groups={group: FCN.groups[group] for group in ("main", BELOW)},
    claims=(
        Claim(
            "The training loss rises drastically: its largest value over its first",
            claims.in_every_run(claims.spike_height),
            bound=claims.SPIKE,
            paper="a drastic increase",
            control=BELOW,
            unit="x",
        ),
        Claim(
            "After the spike the loss falls below its start: first loss over last",
            claims.in_every_run(recovery),
            bound=1.0,
            paper="returns quickly to the pre-spike level",
            control=BELOW,
            unit="x",
        ),
        Claim(
            "The loss turns when the critical rate overtakes the rate: minus the steps between the two",
            claims.in_every_run(turning_lag),
            bound=-2.0,
            paper="at the same time",
            control=BELOW,
            unit="steps",
        ),
    ),
    plot=plots.anatomy,
    remarks=("The runs are those of Figure 3a; nothing is run twice.",),
)
