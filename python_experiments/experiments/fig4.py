"""Fig. 4, 17 and 18: several catapults by raising the rate, to rates at which a fresh network diverges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from python_experiments import claims, plots
from python_experiments.claims import Claim, Group, Measured, Run
from python_experiments.config import Network, Preset, Rate, RunConfig
from python_experiments.experiments import fig3
from python_experiments.registry import Conditions, Experiment

BELOW = "below the critical rate"
#: The rate of Fig. 18 over the critical rate at initialisation.
FROM_SCRATCH = {"fcn": 7.0, "cnn": 5.0}

FCN4 = replace(
    fig3.FCN5,
    raises=((15, Rate(1.5, 10.0)), (60, Rate(1.5, 15.0))),
    eigenpairs=10,
    max_steps=90,
)
CNN4 = replace(
    fig3.CNN5,
    raises=((10, Rate(0.6, 15.0)), (40, Rate(0.8, 20.0))),
    eigenpairs=10,
    max_steps=65,
)

_RATES = {
    "fcn": "With the default, relative rates, each rise is to 1.5 times the critical rate that the network has at that "
    "step",
    "cnn": "With the default, relative rates, the rises are to .6 and .8 times the critical rate that the network has "
    "then: the norm of the CNN's kernel grows back four- to eightfold in ten steps and brings the critical rate below "
    "the rate; with 128 channels a rise to 1.2 times makes it diverge. On the embedded digits the norm hardly grows "
    "back, so that each rise is to 1.5 times there",
}
_REMARKS = (
    f"A spike is a loss of {claims.SPIKE} times the smallest of the ten steps before; it ends when nine tenths of its "
    "rise are gone. It counts as a catapult when L_<=10 carries the rise, the norm of K ends lower than it began "
    "and the rate was above the critical rate.",
    "Further catapults can come between the rises, when the norm of K grows back.",
)


def _below(config: RunConfig) -> Conditions:
    """Rises to 30 % of the critical rate at that step: no spike, also where the norm of K grows afterwards."""
    raises = tuple((step, rate.scaled(0.3 / rate.relative)) for step, rate in config.raises)
    return {"no catapult": replace(config.at(0.3 / config.rate.relative), raises=raises)}


def _raised_further(config: RunConfig) -> RunConfig:
    """Each rise to 1.5 times the critical rate at its step."""
    return replace(config, raises=tuple((step, replace(rate, relative=1.5)) for step, rate in config.raises))


def _presets(config: RunConfig, smoke: RunConfig, cpu: Preset) -> dict[str, Preset]:
    note = f"Smaller network, {smoke.task.train} points instead of 128 and fewer steps, to be quick."
    return {
        "smoke": Preset(smoke, seeds=(0,), note=note),
        "cpu": cpu,
        "paper": Preset(config, seeds=cpu.seeds, note="The paper's sizes."),
    }


_FCN_PRESETS = _presets(
    FCN4,
    replace(
        FCN4,
        network=Network("fcn", 512, 5),
        task=replace(fig3.IMAGES, train=64),
        raises=tuple((step, rate) for step, (_, rate) in zip((15, 40), FCN4.raises, strict=True)),
        max_steps=65,
    ),
    Preset(FCN4, seeds=(0, 1, 2), note="The paper's sizes."),
)
_CNN_PRESETS = _presets(
    CNN4,
    replace(CNN4, network=Network("cnn", 32, 5), task=replace(fig3.IMAGES, train=48), max_steps=60),
    Preset(
        replace(CNN4, network=Network("cnn", 128, 5)),
        seeds=(0,),
        note="128 channels instead of 512 and one seed: 512 channels take a minute a step on a CPU.",
    ),
)


def _fig4(letter: str, network: str, statement: str, presets: dict[str, Preset]) -> Experiment:
    return Experiment(
        name=f"fig4-{network}",
        figure=f"Figure 4{letter}",
        title=f"Raising the rate gives a 5-layer {network.upper()} several catapults",
        statement="Each time the rate is raised above the current critical rate there is another catapult, and the "
        f"norm of the tangent kernel drops once more. {statement}",
        presets=presets,
        groups={"main": lambda config: {"catapults": config}, BELOW: _below},
        claims=(
            Claim(
                "Every rate brings a catapult: smallest number of catapults under one of the three rates",
                claims.in_every_run(claims.catapults_per_rate),
                bound=1.0,
                paper="one for each rate (figure)",
                control=BELOW,
            ),
            Claim(
                "The norm of K drops at each spike: norm before over norm after, smallest over the spikes",
                claims.in_every_run(claims.norm_drop),
                bound=1.0,
                paper="it drops each time (figure)",
                control=BELOW,
                unit="x",
            ),
        ),
        plot=plots.catapult,
        remarks=(
            f"The paper prints absolute rates. {_RATES[network]}; the steps are the paper's.",
            *_REMARKS,
        ),
        on_digits=_raised_further if network == "cnn" else lambda config: config,
    )


FCN = _fig4("a", "fcn", "Rate 6, 10 from step 15 on, 15 from step 60 on.", _FCN_PRESETS)
CNN = _fig4("b", "cnn", "Rate 8, 15 from step 10 on, 20 from step 40 on.", _CNN_PRESETS)


def _fig17(letter: str, fig4: Experiment) -> Experiment:
    return Experiment(
        name=fig4.name.replace("fig4", "fig17"),
        figure=f"Figure 17{letter}",
        title="Each of several catapults lies in the top eigenspace of the kernel",
        statement="In the runs of Figure 4 every spike of the training loss is one of L_<=10.",
        presets=fig4.presets,
        groups=fig4.groups,
        claims=(
            Claim(
                "L_<=10 carries every spike: its share of the rise, smallest over the spikes",
                claims.in_every_run(claims.located),
                bound=0.90,
                paper="every spike is in L_<=10 (figure)",
                control=BELOW,
            ),
        ),
        plot=plots.loss_parts,
        remarks=("The runs are those of Figure 4; nothing is run twice.",),
        on_digits=fig4.on_digits,
    )


FCN_PARTS, CNN_PARTS = _fig17("a", FCN), _fig17("b", CNN)


#: Orders of magnitude of the numbers that float32 holds: by so many at least a loss has grown that is none any more.
_ALL = math.log10(float(np.finfo(np.float32).max))


def _growth(run: Run) -> float:
    """Orders of magnitude by which the loss has grown."""
    (loss,) = run.recorded("loss")
    if not len(loss):
        return math.nan
    growth = math.log10(float(loss.max() / loss[0]))
    return max(growth, _ALL) if run.summary["result"] == "diverged" else growth


def _diverges(group: Group) -> Measured:
    """Growth of the loss from scratch, smallest over the runs."""
    return claims.worst({"": group["from scratch"]}, _growth)


def _reaches(group: Group) -> Measured:
    """Last rate by catapults over the rate from scratch, smallest over the seeds; NaN where the loss has not fallen."""
    reached = []
    for run, from_scratch in zip(group["by catapults"], group["from scratch"], strict=True):
        (loss,), (rate,) = run.recorded("loss"), run.recorded("lr")
        reached.append(float(rate[-1] / from_scratch.rate) if loss[-1] < loss[0] else math.nan)
    return claims.smallest(reached)


def _scratch(config: RunConfig) -> RunConfig:
    """The constant rate of Fig. 18 from the first step on."""
    return replace(config, raises=(), max_steps=40)


def _fig18(letter: str, fig4: Experiment, printed: float) -> Experiment:
    network = fig4.presets["paper"].config.network.kind
    rate = Rate(FROM_SCRATCH[network], printed)

    def main(config: RunConfig) -> Conditions:
        return {"from scratch": replace(_scratch(config), rate=rate), "by catapults": config}

    def below(config: RunConfig) -> Conditions:
        (calm,) = _below(config).values()
        return {"from scratch": _scratch(calm), "by catapults": calm}

    return Experiment(
        name=fig4.name.replace("fig4", "fig18"),
        figure=f"Figure 18{letter}",
        title="A rate that several catapults lead to is out of reach from scratch",
        statement=f"Gradient descent at a rate that follows several catapults ({printed:g}) diverges when it begins "
        "with it.",
        presets=fig4.presets,
        groups={"main": main, BELOW: below},
        claims=(
            Claim(
                "At that rate gradient descent from scratch diverges: orders of magnitude by which the loss grows",
                _diverges,
                bound=3.0,
                paper="it diverges",
                control=BELOW,
            ),
            Claim(
                "By catapults the network gets to that rate: its last rate over the rate from scratch, the loss having "
                "fallen",
                _reaches,
                bound=1.0,
                paper=f"it gets to {printed:g}",
                control=BELOW,
                unit="x",
            ),
        ),
        plot=plots.from_scratch,
        remarks=(
            "The runs by catapults are those of Figure 4.",
            f"The rate from scratch is {rate.relative:g} times the critical rate at initialisation, no more than what "
            "the runs of Figure 4 end with.",
        ),
        diverges=True,
        on_digits=fig4.on_digits,
    )


FCN_SCRATCH, CNN_SCRATCH = _fig18("a", FCN, 60.0), _fig18("b", CNN, 40.0)
