"""Table 1 and Fig. 9a: smaller batches catapult more, align better and generalise better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from matplotlib.figure import Figure

from python_experiments import plots
from python_experiments.claims import Claim, Group, Measure, Measured, mean_by_condition, smallest_step_up
from python_experiments.config import Network, Preset, Rate, RunConfig, Task
from python_experiments.registry import Conditions, Experiment

#: Table 1, mean of three runs.
PAPER = {
    "5": {"test_loss": 0.42, "alignment": 0.95},
    "10": {"test_loss": 0.59, "alignment": 0.89},
    "50": {"test_loss": 0.71, "alignment": 0.84},
    "GD": {"test_loss": 0.74, "alignment": 0.81},
}
#: Fig. 9a has batch 100 besides.
BATCHES = {"5": 5, "10": 10, "50": 50, "100": 100, "GD": None}
COLUMNS = (("test_loss", "test loss"), ("alignment", "AGOP alignment"), ("catapults", "catapults"))

CONFIG = RunConfig(
    Network("fcn", width=1024, depth=2),
    Task("rank-2", train=2000, validation=5000, test=5000),
    Rate(0.5, 3.0),
    max_steps=40_000,
    stop_loss=1e-3,
    evaluate=True,
)
SMALL_RATE = "1/40 of the critical rate"


def _with_batch(config: RunConfig, batch_size: int | None) -> RunConfig:
    if batch_size is None:
        # The kernel of 2,000 points costs more than the step: every tenth step is enough to count catapults
        # of gradient descent, whose critical rate drifts slowly.
        return replace(config, batch_size=None, kernel_every=10, validate_every=20)
    return replace(config, batch_size=batch_size, validate_every=-(-config.task.train // batch_size))


def _main(config: RunConfig) -> Conditions:
    return {name: _with_batch(config, size) for name, size in BATCHES.items()}


def _small_rate(config: RunConfig) -> Conditions:
    """Fig. 10: at 1/40 of the critical rate no batch catapults, and the batch size makes no difference."""
    slow = config.at(0.025 / config.rate.relative)
    return {name: _with_batch(slow, BATCHES[name]) for name in ("5", "10", "50")}


def _in_words(means: Mapping[str, float]) -> str:
    return "batch " + ", ".join(
        f"{name}: {value:.{3 if value < 1000 else 4}g}" for name, value in means.items()
    )


def _order(key: str, *, rising: bool, relative: bool = False) -> Measure:
    """Smallest gain from one batch size of Table 1 to the next smaller one, of the means over the seeds."""

    def measure(group: Group) -> Measured:
        means = mean_by_condition(group, key)
        largest_first = [means[name] for name in reversed(PAPER) if name in means]
        values = largest_first if rising else largest_first[::-1]
        return Measured(smallest_step_up(values, relative=relative), _in_words(means))

    return measure


def _more_catapults(group: Group) -> Measured:
    """Smallest gain in catapults from one batch size to the next smaller one, where there are any.

    Sizes too large for a single catapult count once: none can have fewer. NaN where no size has any.
    """
    means = mean_by_condition(group, "catapults")
    values = [means[name] for name in reversed(BATCHES) if name in means]  # largest batch first
    while len(values) > 1 and values[1] == 0:
        values.pop(0)
    return Measured(smallest_step_up(values) if len(values) > 1 else math.nan, _in_words(means))


def _alignment_at_5(group: Group) -> Measured:
    values = [run.summary["alignment"] for run in group["5"]]
    return Measured(min(values), "seeds: " + ", ".join(f"{v:.3f}" for v in values))


def plot(groups: Mapping[str, Group]) -> Figure:
    """Test loss, alignment and catapults over the batch sizes."""
    return plots.table(groups, PAPER, COLUMNS)


TABLE1 = Experiment(
    name="table1",
    figure="Table 1, Figure 9a",
    title="Smaller batches: more catapults, better AGOP alignment, lower test loss",
    statement="2-layer FCN on y = x1 x2 + noise, rate 3 (half the critical rate of the training set), until "
    "the training loss is 1e-3: the smaller the batch, the more catapults, the better the alignment with the "
    "true AGOP and the lower the test loss, at the step of the best validation loss.",
    presets={
        "smoke": Preset(
            replace(
                CONFIG,
                network=Network("fcn", 64, 2),
                task=Task("rank-2", train=200, validation=200, test=200),
                max_steps=200,
            ),
            seeds=(0,),
            note="Width 64 instead of 1024, 200 points instead of 2,000 and at most 200 steps, to be quick; "
            "too small for the claims.",
        ),
        "cpu": Preset(CONFIG, seeds=(0, 1, 2), note="The paper's sizes."),
        "paper": Preset(CONFIG, seeds=(0, 1, 2), note="The paper's sizes."),
    },
    groups={"main": _main, SMALL_RATE: _small_rate},
    claims=(
        Claim(
            "The test loss falls with each step down in batch size: smallest relative gain from one size to "
            "the next",
            _order("test_loss", rising=False, relative=True),
            bound=0.01,
            paper="batch 5: .42, 10: .59, 50: .71, GD: .74",
            control=SMALL_RATE,
        ),
        Claim(
            "The AGOP alignment rises with each step down in batch size: smallest gain from one size to the "
            "next",
            _order("alignment", rising=True),
            bound=0.01,
            paper="batch 5: .95, 10: .89, 50: .84, GD: .81",
            control=SMALL_RATE,
        ),
        Claim(
            "At batch 5 the network has found the two directions: alignment, smallest over the seeds",
            _alignment_at_5,
            bound=0.90,
            paper=".95",
            control=SMALL_RATE,
        ),
        Claim(
            "Smaller batches catapult more: smallest gain in catapults from one size to the next smaller, "
            "from the largest size on that has none",
            _more_catapults,
            bound=1.0,
            paper="more for each smaller batch (figure)",
            control=SMALL_RATE,
        ),
    ),
    plot=plot,
    remarks=(
        "Catapults are counted as the paper does: steps until the best validation loss at which the rate "
        "exceeds the critical rate of the batch. For gradient descent the kernel is recorded at every tenth "
        "step only.",
        "Alignment: cosine between the AGOP on the training points (Eq. 5) and the analytic one, diag(1, 1, "
        "0, ...).",
    ),
)
