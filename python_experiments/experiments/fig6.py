"""Fig. 6 and Table 2: the loss of SGD rises when the rate exceeds the critical rate of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from python_experiments import claims, plots
from python_experiments.claims import Claim, Group, Measured, Run
from python_experiments.config import Network, Preset, Rate, RunConfig
from python_experiments.experiments.fig3 import CNN5, FCN5, IMAGES
from python_experiments.registry import Experiment

SHALLOW = RunConfig(
    Network("fcn", width=1024, depth=2),
    IMAGES,
    Rate(1.1, 0.8),
    batch_size=32,
    max_steps=400,
    stop_loss=1e-3,
    eigenpairs=5,
    probe=True,
)
SMALL = "an eighth of the rate"
BELOW = "a quarter of the critical rate"
#: Table 2, mean and spread of three runs, in per cent.
PAPER = {"2-layer": "97.32 +- .45 %", "FCN": "96.17 +- 1.46 %", "CNN": "94.67 +- 3.27 %"}


#: A step is a spike of SGD when it adds this share of the loss at initialisation, or more, to the loss.
SPIKE = 0.3


def steps(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each step adds to the loss of the whole set, in units of the loss at initialisation, (steps,).

    And what it adds to L_<=s, in the same units, and whether the rate is above the critical rate of the step's batch.
    Steps before or after which the loss was not recorded are left out.
    """
    table = run.metrics
    if not {"top_loss", "rest_loss", "lr", "batch_critical_lr"} <= set(table):
        return np.empty(0), np.empty(0), np.empty(0, dtype=bool)
    loss = table["top_loss"] + table["rest_loss"]
    rise, top = loss.diff().shift(-1) / loss.iloc[0], table["top_loss"].diff().shift(-1) / loss.iloc[0]
    known = (rise.notna() & table["lr"].notna()).to_numpy()
    above = (
        table["lr"] > table["batch_critical_lr"]
    ).to_numpy()  # a batch without a finite one is never below the rate
    return rise.to_numpy(dtype=float)[known], top.to_numpy(dtype=float)[known], above[known]


def above_when_rising(run: Run) -> float:
    """Of the steps that raise the loss, the share with a rate above the batch's critical rate; NaN without any."""
    rise, _, above = steps(run)
    return float(above[rise > 0].mean()) if (rise > 0).any() else math.nan


def above_at_spikes(run: Run) -> float:
    """The same for the spikes."""
    rise, _, above = steps(run)
    return float(above[rise >= SPIKE].mean()) if (rise >= SPIKE).any() else math.nan


def precision(run: Run) -> float:
    """Of the steps with a rate above the batch's critical rate, the share that raises the loss; NaN without any."""
    rise, _, above = steps(run)
    return float((rise > 0)[above].mean()) if above.any() else math.nan


def top_share(run: Run) -> float:
    """Share of the rise at the spikes, summed over the run, that L_<=s carries; NaN without any."""
    rise, top, _ = steps(run)
    at = rise >= SPIKE
    return min(1.0, float(top[at].sum() / rise[at].sum())) if at.any() else math.nan


def largest_rise(run: Run) -> float:
    """Largest rise in a step over the loss at initialisation; NaN where no step was recorded."""
    rise, _, _ = steps(run)
    return float(rise.max()) if len(rise) else math.nan


FIG6 = Experiment(
    name="fig6",
    figure="Figure 6",
    title="SGD spikes at batches whose critical rate is below the rate, in the top eigenspace",
    statement="2-layer FCN, batches of 32 of 128 points. At rate .1, below the critical rates of all batches, the loss "
    "falls without a spike; at rate .8, above some of them, it has many, and they lie in L_<=5.",
    presets={
        "smoke": Preset(
            replace(SHALLOW, network=Network("fcn", 256, 2), max_steps=100),
            seeds=(0,),
            note="Width 256 instead of 1024 and 100 steps, to be quick.",
        ),
        "cpu": Preset(SHALLOW, seeds=(0, 1, 2), note="The paper's sizes, at most 400 steps."),
        "paper": Preset(replace(SHALLOW, max_steps=5000), seeds=(0, 1, 2), note="The paper's sizes."),
    },
    groups={
        "main": lambda config: {"SGD, batch 32": config},
        SMALL: lambda config: {"SGD, batch 32": config.at(1 / 8)},
    },
    claims=(
        Claim(
            "The loss has spikes: its largest rise in a step over the loss at initialisation",
            claims.in_every_run(largest_rise),
            bound=SPIKE,
            paper="many spikes (figure)",
            control=SMALL,
        ),
        Claim(
            "They come at batches whose critical rate is below the rate: share of the spikes",
            claims.in_every_run(above_at_spikes),
            bound=0.90,
            paper="whenever the loss increases",
            control=SMALL,
        ),
        Claim(
            "L_<=5 carries the spikes: its share of their rise",
            claims.in_every_run(top_share),
            bound=0.90,
            paper="the spikes are in L_<=5 (figure)",
            control=SMALL,
        ),
    ),
    plot=plots.batch_spikes,
    remarks=(
        "The rate is 1.1 times the critical rate of the whole set at initialisation, which is above that of some "
        "batches and below that of others; the control's is an eighth of it, as .1 is of .8.",
        "The kernel and the loss of the whole training set are recorded before every step. A spike is a step that adds "
        f"{SPIKE:g} of the loss at initialisation, or more, to it.",
    ),
)


def _with_precision(run_number: Callable[[Run], float]) -> Callable[[Group], Measured]:
    """Mean over the seeds; in words the seeds, and how often the loss rises when the rate is above."""

    def measure(group: Group) -> Measured:
        runs = [run for members in group.values() for run in members]
        values = [run_number(run) for run in runs]
        words = "seeds: " + ", ".join("none" if math.isnan(v) else f"{v:.3f}" for v in values)
        words += "; precision of the rule: " + ", ".join(f"{precision(run):.3f}" for run in runs)
        return Measured(float(np.mean(values)), words)

    return measure


def _table2(network: str, config: RunConfig, smoke: Preset, cpu: Preset) -> Experiment:
    return Experiment(
        name=f"table2-{network.lower()}",
        figure=f"Table 2 ({network})",
        title=f"When the loss of SGD rises, the rate is above the critical rate of the batch ({network})",
        statement="Of all steps, until the training loss is 1e-3, at which the loss over all 128 points rises, the "
        f"share at which the rate is above the critical rate of the batch of that step. Rate {config.rate.paper:g}.",
        presets={
            "smoke": smoke,
            "cpu": cpu,
            "paper": Preset(replace(config, max_steps=5000), seeds=(0, 1, 2), note="The paper's sizes."),
        },
        groups={
            "main": lambda config: {"SGD, batch 32": config},
            BELOW: lambda config: {"SGD, batch 32": config.at(0.25 / config.rate.relative)},
        },
        claims=(
            Claim(
                "Share of the steps with a rising loss at which the rate is above the batch's critical rate, mean over "
                "the seeds",
                _with_precision(above_when_rising),
                bound=0.90,
                paper=PAPER[network],
                control=BELOW,
            ),
            Claim(
                f"The same among the spikes, the steps that add {SPIKE:g} of the loss at initialisation or more",
                _with_precision(above_at_spikes),
                bound=0.90,
                paper="(not separated)",
                control=BELOW,
            ),
        ),
        plot=plots.batch_spikes,
        remarks=(
            "The first claim is the paper's definition, word by word. A batch of 32 follows the gradient of its own "
            "points: the loss over all 128 also rises a little now and then while the rate is below the critical rate "
            "of the batch, and each such step counts as much as a spike. The second claim looks at spikes alone.",
            "Precision: of the steps at which the rate is above the critical rate of the batch, the share at which the "
            "loss rises.",
        ),
    )


def _sgd(config: RunConfig) -> RunConfig:
    return replace(config, batch_size=32, max_steps=400, stop_loss=1e-3, probe=True)


FCN, CNN = _sgd(FCN5), _sgd(CNN5)
_FULL = "The paper's sizes, at most 400 steps."
_SMALL_TASK = replace(IMAGES, train=64)
TABLE2_SHALLOW = _table2("2-layer", SHALLOW, FIG6.presets["smoke"], FIG6.presets["cpu"])
TABLE2_FCN = _table2(
    "FCN",
    FCN,
    Preset(
        replace(FCN, network=Network("fcn", 256, 5), task=_SMALL_TASK, max_steps=60),
        seeds=(0,),
        note="Width 256 instead of 1024, 64 points instead of 128 and 60 steps, to be quick.",
    ),
    Preset(FCN, seeds=(0, 1, 2), note=_FULL),
)
TABLE2_CNN = _table2(
    "CNN",
    CNN,
    Preset(
        replace(CNN, network=Network("cnn", 16, 5), task=_SMALL_TASK, max_steps=25),
        seeds=(0,),
        note="16 channels instead of 512, 64 points instead of 128 and 25 steps, to be quick.",
    ),
    Preset(
        replace(CNN, network=Network("cnn", 64, 5), max_steps=100),
        seeds=(0, 1, 2),
        note="64 channels instead of 512 and at most 100 steps: 512 channels take a minute a step on a CPU.",
    ),
)
