"""Fig. 12: the critical rate of a batch, from its tangent kernel and from the Hessian of its loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from python_experiments import claims, plots
from python_experiments.claims import Claim, Number, Run
from python_experiments.config import Network, Preset, RunConfig
from python_experiments.experiments import fig6
from python_experiments.registry import Experiment

NARROW = "a narrow network"
#: Smallest share of the steps at which the two have to agree.
SHARE = 0.9


def agreement(tolerance: float) -> Number:
    """Share of the steps at which b / lambda_1(K) is within `tolerance` of 2 / lambda_1(H); NaN without any."""

    def share(run: Run) -> float:
        kernel, hessian = run.recorded("batch_critical_lr", "batch_hessian_critical_lr")
        return float((np.abs(kernel / hessian - 1) <= tolerance).mean()) if len(kernel) else np.nan

    return share


def _experiment(
    network: str, config: RunConfig, narrow: int, tolerance: float, smoke: Preset, cpu: Preset
) -> Experiment:
    percent = f"{100 * tolerance:g} %"
    return Experiment(
        name=f"fig12-{network.lower()}",
        figure=f"Figure 12 ({network})",
        title=f"The critical rate from the kernel is that from the Hessian ({network})",
        statement="At each step of SGD with batches of 32, catapults included, b / lambda_1 of the kernel of the batch "
        f"is close to 2 / lambda_1 of the Hessian of its loss. The runs are set up as those of Table 2: rate "
        f"{config.rate.paper:g}.",
        presets={
            "smoke": smoke,
            "cpu": cpu,
            "paper": Preset(replace(config, max_steps=5000), seeds=(0, 1, 2), note="The paper's sizes."),
        },
        groups={
            "main": lambda config: {"SGD, batch 32": config},
            NARROW: lambda config: {
                "SGD, batch 32": replace(config, network=replace(config.network, width=narrow))
            },
        },
        claims=(
            Claim(
                f"b / lambda_1(K) is within {percent} of 2 / lambda_1(H): share of the steps",
                claims.in_every_run(agreement(tolerance)),
                bound=SHARE,
                paper="close (figure)",
                control=NARROW,
            ),
        ),
        plot=plots.critical_rates,
        remarks=(
            "H is the Hessian of the loss of the batch, K its tangent kernel; the critical rate of a quadratic loss is "
            "2 / lambda_1(H). H = (2 / b) J^T J + (2 / b) sum_i (f_i - y_i) H(f_i), and the second part falls as the "
            f"network gets wider: the control has the width {narrow}.",
            "The paper gives no measure of how close they are; the tolerance is ours.",
        ),
    )


def _with_hessian(config: RunConfig) -> RunConfig:
    # No kernel of the whole training set: this figure is about batches.
    return replace(config, probe=False, hessian=True, eigenpairs=1, max_steps=200)


_QUICK = "{} instead of {}, 64 points instead of 128 and {} steps, to be quick."
_POINTS = replace(fig6.SHALLOW.task, train=64)
_SHALLOW, _FCN, _CNN = map(_with_hessian, (fig6.SHALLOW, fig6.FCN, fig6.CNN))

SHALLOW = _experiment(
    "2-layer",
    _SHALLOW,
    16,
    0.01,
    Preset(
        replace(_SHALLOW, network=Network("fcn", 512, 2), task=_POINTS, max_steps=30),
        (0,),
        _QUICK.format("Width 512", 1024, 30),
    ),
    Preset(_SHALLOW, (0, 1, 2), "The paper's sizes, at most 200 steps."),
)
FCN = _experiment(
    "FCN",
    _FCN,
    32,
    0.05,
    Preset(
        replace(_FCN, network=Network("fcn", 512, 5), task=_POINTS, max_steps=15),
        (0,),
        _QUICK.format("Width 512", 1024, 15),
    ),
    Preset(_FCN, (0, 1, 2), "The paper's sizes, at most 200 steps."),
)
CNN = _experiment(
    "CNN",
    _CNN,
    4,
    0.05,
    Preset(
        replace(_CNN, network=Network("cnn", 16, 5), task=_POINTS, max_steps=8),
        (0,),
        _QUICK.format("16 channels", 512, 8),
    ),
    Preset(
        replace(_CNN, network=Network("cnn", 64, 5), max_steps=60),
        (0,),
        "64 channels instead of 512, at most 60 steps and one seed, to be done in minutes.",
    ),
)
