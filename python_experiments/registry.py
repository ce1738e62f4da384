"""The experiments by name. A new figure or table is one file in `experiments/` and one line here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from python_experiments import sweep
from python_experiments.claims import Claim, Group
from python_experiments.config import IMAGE_SETS, Device, Preset, Rates, RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESETS = ("smoke", "cpu", "paper")
#: Training points at most with the embedded digits, which have 236 images of the rarest pair of classes.
DIGITS = 200

#: Conditions of a group by name: the batch sizes of a table, or the one run of a figure.
Conditions = dict[str, RunConfig]


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper.

    Attributes:
        name: what `catapult run` calls it.
        figure: where it stands in the paper.
        title: one line.
        statement: what the paper says it shows.
        presets: sizes by name, one for each of `PRESETS`.
        groups: builds, from a preset's configuration, the conditions of "main" and of each control group.
        claims: numeric tests of the statement.
        plot: draws the stored runs.
        remarks: where our setting differs from the paper's and why; what the reader must know.
        diverges: some runs of "main" are meant to diverge.
        repeat_controls: run the control groups with every seed, not with the first one alone.
        on_digits: what is different with the embedded digits in the place of the paper's images.
    """

    name: str
    figure: str
    title: str
    statement: str
    presets: Mapping[str, Preset]
    groups: Mapping[str, Callable[[RunConfig], Conditions]]
    claims: Sequence[Claim]
    plot: Callable[[Mapping[str, Group]], Figure]
    remarks: Sequence[str] = ()
    diverges: bool = False
    repeat_controls: bool = False
    on_digits: Callable[[RunConfig], RunConfig] = lambda config: config

    @property
    def images(self) -> str | None:
        """The paper's image set, which `--data` can replace; None for a synthetic task."""
        name = self.presets["paper"].config.task.name
        return name if name in IMAGE_SETS else None

    def request(
        self,
        preset: str,
        *,
        rates: Rates = "relative",
        images: str = "digits",
        seeds: Sequence[int] | None = None,
        device: Device = "cpu",
        changes: sweep.Changes = (),
    ) -> Request:
        """What to run for one preset.

        Args:
            preset: "smoke", "cpu" or "paper".
            rates: which form of the rate is used.
            images: replaces the task's name where the experiment uses images.
            seeds: seeds of the group "main"; None: the preset's.
            device: kind of device.
            changes: fields of the configuration that are set to something else.

        Raises:
            ValueError: a change would change none of the runs of the group "main".
        """
        request = Request(
            self.name,
            preset,
            rates,
            images if self.images else None,
            tuple(seeds or self.presets[preset].seeds),
            device,
            changes,
        )
        for name, value in changes:
            others = replace(request, changes=tuple(c for c in changes if c[0] != name))
            if request.config != others.config and request.groups()["main"] == others.groups()["main"]:
                raise ValueError(f"--set {name}={value}: the runs of {self.name} set {name} themselves")
        return request


@dataclass(frozen=True)
class Request:
    """One experiment in one preset, as asked for on the command line; decides every run of it.

    Attributes:
        experiment: its name.
        preset: "smoke", "cpu" or "paper".
        rates: "relative" or "paper".
        images: the image set, None for a synthetic task.
        seeds: seeds of the group "main".
        device: "cpu" or "cuda".
        changes: fields of the preset's configuration that are set to something else: a variant of a sweep.
    """

    experiment: str
    preset: str
    rates: Rates
    images: str | None
    seeds: tuple[int, ...]
    device: Device = "cpu"
    changes: sweep.Changes = ()

    @property
    def base(self) -> Request:
        """The request that this one is a variant of; itself where nothing is changed."""
        return replace(self, changes=())

    @property
    def name(self) -> str:
        """The experiment and what is changed, in words."""
        return f"{self.experiment} ({sweep.in_words(self.changes)})" if self.changes else self.experiment

    @property
    def key(self) -> str:
        """Name of the files that belong to it."""
        parts = [self.experiment, self.preset, self.rates, self.images or "", self.device.replace("cpu", "")]
        changes = [re.sub(r"[^\w.=+-]", "_", sweep.in_words((change,))) for change in self.changes]
        return "-".join(part for part in [*parts, *changes] if part)

    @property
    def config(self) -> RunConfig:
        """The preset's configuration with the chosen rates, images, device and changes."""
        experiment = get(self.experiment)
        config = experiment.presets[self.preset].config
        task = replace(config.task, name=self.images) if self.images else config.task
        if self.images == "digits":
            config = experiment.on_digits(config)
            task = replace(task, train=min(task.train, DIGITS))
        config = replace(config, task=task, rates=self.rates, device=self.device)
        return sweep.apply(config, self.changes)

    def groups(self) -> dict[str, dict[str, list[tuple[RunConfig, int]]]]:
        """Group -> condition -> (configuration, seed) of each of its runs."""
        experiment = get(self.experiment)
        return {
            group: {
                condition: [(config, seed) for seed in self._seeds_of(experiment, group)]
                for condition, config in build(self.config).items()
            }
            for group, build in experiment.groups.items()
        }

    def _seeds_of(self, experiment: Experiment, group: str) -> tuple[int, ...]:
        return self.seeds if group == "main" or experiment.repeat_controls else self.seeds[:1]


def all_experiments() -> dict[str, Experiment]:
    """Every experiment by name, in the paper's order."""
    from python_experiments.experiments import EXPERIMENTS

    return {experiment.name: experiment for experiment in EXPERIMENTS}


def main_experiments() -> list[Experiment]:
    """Those that `catapult reproduce` runs unless told otherwise."""
    from python_experiments.experiments import MAIN

    return list(MAIN)


def get(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    experiments = all_experiments()
    if name not in experiments:
        raise ValueError(f"NAME: expected one of {', '.join(experiments)} or all, got {name!r}")
    return experiments[name]


def choose(names: Sequence[str]) -> list[Experiment]:
    """The experiments of those names, each once, in the order given; "all" stands for every one."""
    wanted = [n for name in names for n in (all_experiments() if name == "all" else [name])]
    return [get(name) for name in dict.fromkeys(wanted)]
