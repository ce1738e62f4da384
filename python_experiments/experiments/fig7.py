"""Fig. 7, 19, 21, 22 and 23: the spikes of SGD are catapults, in four architectures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

import catapult_ext as cx
from python_experiments import claims, plots
from python_experiments.claims import Claim, Run
from python_experiments.config import Cycle, Network, Preset, Rate, RunConfig, Task
from python_experiments.experiments import fig3, fig14
from python_experiments.experiments.fig6 import SPIKE, top_share
from python_experiments.registry import DIGITS, Experiment

BELOW = "a quarter of the critical rate"


def _spikes(run: Run) -> list[cx.Spike]:
    """Those whose rise is `SPIKE` of the loss at initialisation or more; the small ones of batch noise are left out."""
    loss = claims.set_loss(run)
    steps = run.recorded("step", "top_loss", "rest_loss")[0].tolist()
    at = {int(step): float(value) for step, value in zip(steps, loss, strict=True)}
    return [spike for spike in claims.spikes(run) if at[spike.peak] - at[spike.start] >= SPIKE * loss[0]]


def norm_drop(run: Run) -> float:
    """Norm of K before a spike over that at its end, smallest over the spikes; NaN without any."""
    largest = max((spike.norm.measured for spike in _spikes(run)), default=math.nan)
    return 1 / largest if largest != 0 else math.inf


def fall_at_spikes(run: Run) -> float:
    """Of all that log norm(K) loses in the steps in which it falls, the share between start and end of a spike.

    NaN where it never falls.
    """
    steps, norm = run.recorded("step", "lambda_1")
    if len(norm) < 2 or not (norm > 0).all():
        return math.nan
    fall = -np.minimum(np.diff(np.log(norm)), 0.0)
    inside = np.zeros(len(fall), dtype=bool)
    for spike in _spikes(run):
        inside |= (steps[:-1] >= spike.start) & (steps[:-1] < spike.end)
    return float(fall[inside].sum() / fall.sum()) if fall.sum() > 0 else math.nan


CLAIMS = (
    Claim(
        "L_<=1 carries the spikes: its share of their rise",
        claims.in_every_run(top_share),
        bound=0.90,
        paper="the spikes are in L_<=1 (figure)",
        control=BELOW,
    ),
    Claim(
        "The norm of K drops at each spike: norm before over norm at its end, smallest over the spikes",
        claims.in_every_run(norm_drop),
        bound=1.1,
        paper="a significant drop (figure)",
        control=BELOW,
        unit="x",
    ),
    Claim(
        "It drops at the spikes and hardly elsewhere: share of all its fall that comes at spikes",
        claims.in_every_run(fall_at_spikes),
        bound=0.5,
        paper="mostly increasing or unchanged at other steps",
        control=BELOW,
    ),
)
_REMARKS = (
    f"A spike adds {SPIKE:g} of the loss at initialisation, or more, to the loss of the whole training set and comes "
    "down again; it begins where the loss is more than 1.5 times the smallest of the ten steps before, and ends when "
    "nine tenths of its rise are gone. The smaller spikes, which the noise of the batches makes of a small loss, are "
    "left out.",
    "The kernel and the loss of the whole training set are recorded before every step.",
    "The paper prints no critical rate of these runs. Rates are its ratio of rate to critical rate in Figures 3 and "
    "15; for ViT-4 1.75, its critical rate being .10 to .13 here and its printed rate .2.",
)

#: Network and rate of each architecture.
ARCHITECTURES = {
    "fcn": (fig3.FCN5.network, fig3.FCN5.rate),
    "cnn": (fig3.CNN5.network, fig3.CNN5.rate),
    "wrn": (fig14.WRN.network, fig14.WRN.rate),
    "vit": (Network("vit", width=512, depth=4), Rate(1.75, 0.2)),
}
_NAMES = {
    "fcn": "a 5-layer FCN",
    "cnn": "a 5-layer CNN",
    "wrn": "a Wide ResNet 10-10",
    "vit": "ViT-4",
}
#: (width, steps) of the presets smoke and cpu, and what the width counts.
_SIZES = {
    "fcn": ((256, 60), (1024, 400), "units"),
    "cnn": ((16, 25), (128, 60), "channels"),
    "wrn": ((2, 12), (10, 60), "times the channels"),
    "vit": ((32, 25), (128, 100), "features"),
}


def _sgd(kind: str, task: Task, printed: bool) -> RunConfig:
    """Batches of 32 until the loss is 1e-3, with the kernel of the whole training set at each step."""
    network, rate = ARCHITECTURES[kind]
    return RunConfig(
        network,
        task,
        rate if printed else Rate(rate.relative),
        batch_size=32,
        probe=True,
        stop_loss=1e-3,
        max_steps=5000,
        eigenpairs=1,
    )


def _presets(config: RunConfig, points: int) -> dict[str, Preset]:
    """The sizes of each architecture, with so many training points in the preset cpu."""
    (small, few), (medium, more), unit = _SIZES[config.network.kind]
    width, train = config.network.width, config.task.train

    def sized(width: int, train: int, steps: int) -> RunConfig:
        network, task = replace(config.network, width=width), replace(config.task, train=train)
        return replace(config, network=network, task=task, max_steps=steps)

    quick = f"{small} {unit} instead of {width}, 64 points instead of {train:,} and {few} steps, to be quick."
    smoke = sized(small, 64, few)
    if config.network.kind == "wrn":
        smoke, quick = (
            smoke.at(0.5),
            f"{quick} Half the rate: so narrow a network diverges above it.",
        )
    smaller = [f"{medium} {unit} instead of {width}"] if medium != width else []
    smaller += [f"{points} points instead of {train:,}"] if points != train else []
    return {
        "smoke": Preset(smoke, (0,), quick),
        "cpu": Preset(
            sized(medium, points, more),
            (0, 1, 2) if config.network.kind == "fcn" else (0,),
            f"{', '.join([*smaller, f'at most {more} steps'])}, to be done in minutes.",
        ),
        "paper": Preset(config, (0, 1, 2), "The paper's sizes."),
    }


def _experiment(
    name: str,
    figure: str,
    config: RunConfig,
    words: str = "",
    remarks: tuple[str, ...] = (),
    points: int = 128,
) -> Experiment:
    who = _NAMES[config.network.kind] + words
    printed = f" Rate {config.rate.paper:g}." if config.rate.paper is not None else ""
    return Experiment(
        name=name,
        figure=figure,
        title=f"The spikes of SGD are catapults: {who}",
        statement=f"SGD with batches of 32 trains {who}. L_<=1 carries the spikes of the training loss, and at each of "
        f"them the norm of the tangent kernel drops, while it mostly grows or stays at other steps.{printed}",
        presets=_presets(config, points),
        groups={
            "main": lambda config: {"SGD, batch 32": config},
            BELOW: lambda config: {"SGD, batch 32": config.at(0.25 / config.rate.relative)},
        },
        claims=CLAIMS,
        plot=plots.sgd_catapults,
        remarks=(*remarks, *_REMARKS),
    )


_PANELS = {"fcn": "a", "cnn": "b", "wrn": "c", "vit": "d"}
_NOT_PRINTED = ("The paper prints no rate of this figure; it is the same multiple as in Figure 7.",)
_FEW_DIGITS = (f"With the embedded digits there are {DIGITS} points: there are no more of two classes.",)

FIG7 = tuple(
    _experiment(f"fig7-{kind}", f"Figure 7{panel}{full}", _sgd(kind, fig3.IMAGES, True))
    for (kind, panel), full in zip(_PANELS.items(), ("", "", ", 19a", ", 19b"), strict=True)
)
FIG21 = tuple(
    _experiment(
        f"fig21-{kind}",
        f"Figure 21{panel}",
        _sgd(kind, fig14.SVHN, False),
        " on the digits 0 and 2 of SVHN",
        _NOT_PRINTED,
    )
    for kind, panel in _PANELS.items()
)
_LARGE = replace(fig3.IMAGES, train=5000)
FIG22 = tuple(
    _experiment(
        f"fig22-{kind}",
        f"Figure 22{_PANELS[kind]}",
        _sgd(kind, _LARGE, False),
        " on 5,000 images",
        (*_NOT_PRINTED, *_FEW_DIGITS),
        points=500,
    )
    for kind in ("fcn", "cnn")
)
FIG23 = _experiment(
    "fig23",
    "Figure 23",
    replace(_sgd("wrn", fig3.IMAGES, False), cycle=Cycle(low=0.1, period=40)),
    ", the rate rising and falling in cycles",
    (
        "The paper prints neither the rates of its cycles nor their length. Here the rate rises from a tenth of that "
        "of Figure 7c to it and falls back in 40 steps.",
    ),
)
