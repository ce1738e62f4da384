"""Fig. 13: training loss and norm of the kernel on the runs of Fig. 3."""

from __future__ import annotations

import math

import numpy as np

from python_experiments import claims, plots
from python_experiments.claims import Claim, Run
from python_experiments.experiments import fig3
from python_experiments.registry import Experiment


def _steepest_drop(run: Run) -> float:
    """Minus the steps between the peak of the loss and the step that lowers the norm of K most; NaN without a spike."""
    peak = claims.peak_step(run)
    (norm,) = run.recorded("lambda_1")
    if peak is None or len(norm) < 2 or not (norm > 0).all():
        return math.nan
    return -abs(float(np.argmin(np.diff(np.log(norm)))) - peak)


def _fig13(letter: str, of: Experiment) -> Experiment:
    return Experiment(
        name=of.name.replace("fig3", "fig13"),
        figure=f"Figure 13{letter}",
        title=f"The norm of the kernel drops during the catapult ({of.presets['paper'].config.network})",
        statement="In the runs of Figure 3 the spectral norm of the tangent kernel drops while the loss has its spike.",
        presets=of.presets,
        groups={group: of.groups[group] for group in ("main", fig3.BELOW)},
        claims=(
            Claim(
                "The norm of K is smaller after the spike: norm at the first step over norm at its end",
                claims.in_every_run(claims.critical_rate_growth),
                bound=1.5,
                paper="it drops (figure)",
                control=fig3.BELOW,
                unit="x",
            ),
            Claim(
                "It drops at the spike: minus the steps between the peak of the loss and the steepest drop of the norm",
                claims.in_every_run(_steepest_drop),
                bound=-2.0,
                paper="at the same time (figure)",
                control=fig3.BELOW,
                unit="steps",
            ),
        ),
        plot=plots.norms,
        remarks=("The runs are those of Figure 3; nothing is run twice.",),
    )


FCN, CNN = _fig13("a", fig3.FCN), _fig13("b", fig3.CNN)
