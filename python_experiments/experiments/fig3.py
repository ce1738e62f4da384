"""Fig. 3: one catapult of gradient descent, split along the top eigenvectors of the tangent kernel."""

from __future__ import annotations

from dataclasses import replace

from python_experiments import claims, plots
from python_experiments.claims import Claim
from python_experiments.config import Network, Preset, Rate, RunConfig, Task
from python_experiments.registry import Conditions, Experiment

IMAGES = Task("cifar10", train=128, classes=(7, 9))
FCN5 = RunConfig(Network("fcn", width=1024, depth=5), IMAGES, Rate(6 / 3.6, 6.0), eigenpairs=5)
CNN5 = RunConfig(Network("cnn", width=512, depth=5), IMAGES, Rate(8 / 4.5, 8.0), eigenpairs=5)

BELOW = "below the critical rate"
BEYOND = "beyond the largest rate"


def _main(config: RunConfig) -> Conditions:
    return {"catapult": config}


def _below(config: RunConfig) -> Conditions:
    """60 % of the critical rate: no catapult. A quarter of the steps shows it: nothing happens."""
    return {"no catapult": replace(config.at(0.6 / config.rate.relative), max_steps=config.max_steps // 4)}


def _beyond(config: RunConfig) -> Conditions:
    """Eight times the critical rate, above the largest one that gives a catapult (Remark 1): divergence."""
    return {"divergence": config.at(8 / config.rate.relative)}


CLAIMS = (
    Claim(
        "The training loss has a spike: its largest value over its first",
        claims.in_every_run(claims.spike_height),
        bound=claims.SPIKE,
        paper="a drastic increase",
        control=BELOW,
        unit="x",
    ),
    Claim(
        "The spike lies in the top five eigendirections: share of the loss's rise that L_<=5 carries",
        claims.in_every_run(claims.spike_share),
        bound=0.90,
        paper="the spike is in L_<=5",
        control=BELOW,
    ),
    Claim(
        "The norm of the kernel drops: critical rate at the end of the spike over that at initialisation",
        claims.in_every_run(claims.critical_rate_growth),
        bound=3.0,
        paper="the norm of K is smaller at the end of the spike",
        control=BELOW,
        unit="x",
    ),
    Claim(
        "L_>5 falls: share of the steps in which it does",
        claims.in_every_run(claims.falling_share),
        bound=0.90,
        paper="almost monotonically",
        control=BEYOND,
    ),
)

_GROUPS = {"main": _main, BELOW: _below, BEYOND: _beyond}
_REMARKS = (
    "The paper prints neither how it normalises images nor its seed; the critical rate depends on both. "
    "Rates are therefore the paper's ratio of rate to critical rate times the critical rate measured here, "
    "unless asked otherwise (--rates paper).",
    f"A spike is a loss of {claims.SPIKE} times its first value. The share of the rise is capped at 1: what "
    "L_>5 loses until the peak is not credited. It ends where the loss is below its first value again; "
    "afterwards the norm of K slowly grows back.",
    "The claims on the spike and on the critical rate have to fail on a run at .6 times the critical rate. "
    "L_>5 also falls there, so that claim has to fail on a run at 8 times the critical rate, which diverges.",
)


def experiment(
    name: str,
    figure: str,
    title: str,
    statement: str,
    presets: dict[str, Preset],
    remarks: tuple[str, ...] = (),
    claims: tuple[Claim, ...] = CLAIMS,
) -> Experiment:
    """A figure that shows of another network or of other data what Figure 3 shows."""
    return Experiment(
        name=name,
        figure=figure,
        title=title,
        statement=statement,
        presets=presets,
        groups=_GROUPS,
        claims=claims,
        plot=plots.catapult,
        remarks=(*remarks, *_REMARKS),
    )


def presets_of_fcn(config: RunConfig, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Preset]:
    """Those of a 5-layer FCN of width 1024: the paper's size is within reach of a CPU."""
    smoke = replace(
        config, network=replace(config.network, width=512), task=replace(config.task, train=64), max_steps=40
    )
    return {
        "smoke": Preset(
            smoke, seeds[:1], "Width 512 instead of 1024 and 64 points instead of 128, to be quick."
        ),
        "cpu": Preset(config, seeds, "The paper's sizes."),
        "paper": Preset(config, seeds, "The paper's sizes."),
    }


def presets_of_cnn(config: RunConfig) -> dict[str, Preset]:
    """Those of a 5-layer CNN of 512 channels."""
    smoke = replace(
        config, network=replace(config.network, width=32), task=replace(config.task, train=32), max_steps=15
    )
    cpu = replace(config, network=replace(config.network, width=128), max_steps=30)
    return {
        "smoke": Preset(smoke, (0,), "32 channels instead of 512 and 32 points instead of 128, to be quick."),
        "cpu": Preset(
            cpu,
            (0,),
            "128 channels instead of 512, 30 steps and one seed: 512 channels take half a minute a step on a CPU. "
            "The narrower the network, the more its kernel moves in a step: at 64 channels spikes come and go all the "
            "time, and at 128 a second one can follow and L_>5 rises for a few steps.",
        ),
        "paper": Preset(config, (0,), "The paper's sizes."),
    }


FCN = experiment(
    "fig3-fcn",
    "Figure 3a",
    "A catapult of a 5-layer FCN lies in the top eigenspace of the kernel",
    "During the catapult L_<=5 carries the spike of the training loss, L_>5 decreases almost monotonically, and the "
    "norm of the tangent kernel drops (Claim 1). Rate 6, critical rate 3.6.",
    presets_of_fcn(FCN5),
)
CNN = experiment(
    "fig3-cnn",
    "Figure 3b",
    "A catapult of a 5-layer CNN lies in the top eigenspace of the kernel",
    "As Figure 3a, for a convolutional network. Rate 8, critical rate 4.5.",
    presets_of_cnn(CNN5),
)
