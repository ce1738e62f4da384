"""Fig. 14 and 15: the catapult of Fig. 3 on other data and in a Wide ResNet."""

from __future__ import annotations

from dataclasses import replace

from python_experiments.config import Network, Preset, Rate, RunConfig, Task
from python_experiments.experiments import fig3

SVHN = Task("svhn", train=128, classes=(0, 2))
WRN = RunConfig(Network("wrn", width=10, depth=10), fig3.IMAGES, Rate(3 / 1.5, 3.0), eigenpairs=5)

FCN_SVHN = fig3.experiment(
    "fig14-fcn",
    "Figure 14a",
    "The catapult of a 5-layer FCN on SVHN lies in the top eigenspace of the kernel",
    "As Figure 3a, on the digits 0 and 2 of SVHN. Rate 6, critical rate 3.4.",
    fig3.presets_of_fcn(replace(fig3.FCN5, task=SVHN, rate=Rate(6 / 3.4, 6.0))),
)
CNN_SVHN = fig3.experiment(
    "fig14-cnn",
    "Figure 14c",
    "The catapult of a 5-layer CNN on SVHN lies in the top eigenspace of the kernel",
    "As Figure 3b, on the digits 0 and 2 of SVHN. Rate 3, critical rate 1.6.",
    fig3.presets_of_cnn(replace(fig3.CNN5, task=SVHN, rate=Rate(3 / 1.6, 3.0))),
)
FCN_RANK2 = fig3.experiment(
    "fig15-fcn",
    "Figure 15a",
    "The catapult of a 5-layer FCN on a synthetic task lies in the top eigenspace of the kernel",
    "As Figure 3a, on 128 points of the rank-2 task. Rate 5, critical rate 1.9.",
    fig3.presets_of_fcn(replace(fig3.FCN5, task=Task("rank-2", train=128), rate=Rate(5 / 1.9, 5.0))),
)
WRN_CIFAR = fig3.experiment(
    "fig15-wrn",
    "Figure 15c",
    "The catapult of a Wide ResNet lies in the top eigenspace of the kernel",
    "As Figure 3a, for a Wide ResNet 10-10. Rate 3, critical rate 1.5.",
    {
        "smoke": Preset(
            replace(WRN, network=Network("wrn", 2, 10), task=replace(fig3.IMAGES, train=32), max_steps=15),
            seeds=(0,),
            note="Widening factor 2 instead of 10 and 32 points instead of 128, to be quick.",
        ),
        "cpu": Preset(
            replace(WRN, network=Network("wrn", 4, 10), max_steps=40),
            seeds=(0,),
            note="Widening factor 4 instead of 10, 40 steps and one seed, to be done in minutes.",
        ),
        "paper": Preset(WRN, seeds=(0,), note="The paper's sizes."),
    },
    remarks=("The network has no BatchNorm (see the page on networks).",),
)
