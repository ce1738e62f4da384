"""Fig. 16: the catapult of Fig. 3 with ten outputs lies in the top 10 s eigendirections for a small s."""

from __future__ import annotations

import functools
from dataclasses import replace

from python_experiments import claims
from python_experiments.claims import Claim
from python_experiments.config import Preset, Rate, RunConfig, Task
from python_experiments.experiments import fig3
from python_experiments.registry import Experiment

CLASSES = 10
#: The loss is split at the first CLASSES * s eigenvectors for each of these s.
S = (1, 3, 5)
_SPLITS = tuple(CLASSES * s for s in S)

TEN = Task("cifar10", train=128)
FCN10 = replace(fig3.FCN5, task=TEN, rate=Rate(100 / 34, 100.0), eigenpairs=_SPLITS[-1], splits=_SPLITS[:-1])
CNN10 = replace(fig3.CNN5, task=TEN, rate=Rate(80 / 16, 80.0), eigenpairs=_SPLITS[-1], splits=_SPLITS[:-1])


def _share(directions: int, column: str) -> Claim:
    return Claim(
        f"The spike lies in the top {directions} eigendirections: share of the loss's rise that L_<={directions} "
        "carries",
        claims.in_every_run(functools.partial(claims.spike_share, top=column)),
        bound=0.90,
        paper="the spike is in the top 10 s eigendirections with a small s",
        control=fig3.BELOW,
    )


_HEIGHT, _, _GROWTH, _FALL = fig3.CLAIMS
CLAIMS = (
    _HEIGHT,
    *(_share(k, f"top_loss_{k}") for k in _SPLITS[:-1]),
    _share(_SPLITS[-1], "top_loss"),
    _GROWTH,
    replace(_FALL, statement=_FALL.statement.replace("L_>5", f"L_>{_SPLITS[-1]}")),
)


def _experiment(
    name: str, panels: str, config: RunConfig, printed: str, presets: dict[str, Preset]
) -> Experiment:
    shown = config.network.kind.upper()
    return fig3.experiment(
        name,
        f"Figure 16{panels}",
        f"A catapult of a 5-layer {shown} with ten outputs lies in the top eigenspace of the kernel",
        "The kernel of 128 images of ten classes has 1,280 rows. During the catapult the top 10 s eigendirections, for "
        f"a small s, carry the spike of the training loss. {printed}",
        presets,
        claims=CLAIMS,
    )


FCN = _experiment("fig16-fcn", "a, b", FCN10, "Rate 100, critical rate 34.", fig3.presets_of_fcn(FCN10, (0,)))
_CNN = fig3.presets_of_cnn(CNN10)
CNN = _experiment(
    "fig16-cnn",
    "c, d",
    CNN10,
    "Rate 80, critical rate 16.",
    _CNN
    | {
        "cpu": Preset(
            replace(CNN10, network=replace(CNN10.network, width=64), max_steps=20),
            seeds=(0,),
            note="64 channels instead of 512, 20 steps and one seed: ten outputs take ten times as long as one.",
        )
    },
)
