"""From a run's description to a finished run in its folder, and back."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import catapult_ext as cx
from catapult_ext import runs
from python_experiments.claims import Group, Run
from python_experiments.config import IMAGE_SETS, RunConfig, Task
from python_experiments.registry import Request

#: The validation and test sets of synthetic tasks are drawn with the training set.
SYNTHETIC = ("rank-2",)


def folder(root: Path, config: RunConfig, seed: int) -> runs.RunFolder:
    """Where a run is kept. Experiments that describe the same run share it."""
    network = config.network
    return runs.RunFolder(root, f"{network.kind}{network.depth}-{config.task.name}", config, seed)


def load(task: Task, seed: int, data_root: Path | None) -> cx.data.Split:
    """The data of a run: a function of the task and the seed.

    Raises:
        ValueError: the image set is not there; the message says what to put where.
    """
    if task.name in IMAGE_SETS:
        return cx.data.load(
            task.name,
            classes=task.classes or None,
            train=task.train,
            validation=task.validation,
            test=task.test,
            root=data_root,
            seed=seed,
        )
    if task.name == "unit-sphere":
        return cx.data.Split(cx.data.unit_sphere(n=task.train, d=100, seed=seed), None, None)
    return cx.data.multi_index(
        task.name, train=task.train, validation=task.validation, test=task.test, seed=seed
    )


def build(config: RunConfig, shape: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """The network of a run with the initial weights of its seed.

    Args:
        config: the run.
        shape: shape of one sample: (d,) or (channels, height, width).
        outputs: c.
        seed: draws the weights, independently of data and batch order.
    """
    network = config.network
    # Apart from the seeds of data and batch order, which use the run's seed itself.
    generator = torch.Generator().manual_seed(10_000 + seed)
    common: dict[str, Any] = {
        "out_features": outputs,
        "parameterization": network.parameterization,
        "fixed_layers": network.fixed_layers,
        "generator": generator,
    }
    if network.kind == "fcn":
        return cx.models.FCN(int(np.prod(shape)), network.width, network.depth, **common)
    channels, *sides = shape
    if network.kind == "wrn":
        return cx.models.WideResNet(channels, network.depth, network.width, batch_norm=False, **common)
    if network.kind == "myrtle":
        return cx.models.Myrtle5(channels, network.width, **common)
    of_images = {"cnn": cx.models.CNN, "vit": cx.models.ViT}[network.kind]
    return of_images(channels, tuple(sides), network.width, network.depth, **common)


def schedule(config: RunConfig, model: nn.Module, x: torch.Tensor) -> cx.Schedule:
    """The learning rates of a run; `x` holds the training inputs.

    Raises:
        ValueError: the paper's rates are asked for, and it does not print all of them.
    """
    rates = config.rates_by_step
    if config.rates == "paper":
        if not config.printed:
            raise ValueError("rates: expected relative, since the paper does not print all rates of this run")
        return cx.Stepwise({step: rate.paper for step, rate in rates.items() if rate.paper is not None})
    if config.catapults is not None:
        plan = config.catapults
        return cx.CatapultSchedule(
            catapults=plan.count,
            c=plan.c,
            start=config.rate.relative,
            start_steps=plan.start_steps,
            decay=plan.decay,
            ceiling=plan.ceiling,
            s=config.eigenpairs,
        )
    if config.cycle is not None:
        high = config.rate.relative
        return cx.Cyclical(config.cycle.low * high, high, config.cycle.period, relative=True)
    if config.reference == "train":
        return cx.Stepwise({step: rate.relative for step, rate in rates.items()}, relative=True)
    return cx.Constant(config.rate.relative * cx.critical_lr(cx.ntk(model, x[:1])).item())


@functools.lru_cache(maxsize=1)
def _batches(n: int, batch_size: int, seed: int, steps: int) -> list[torch.Tensor]:
    """Samples of each batch of a run."""
    order = cx.SGD(batch_size).order(n, seed)
    return [next(order) for _ in range(steps)]


@dataclass(frozen=True, kw_only=True)
class LastBatchLoss(cx.Recorder):
    """Loss of the batch of the step before, after that step; for runs on batches.

    Args:
        batch_size: of the run.
        seed: of the run.
        steps: at least as many as the run makes.
    """

    batch_size: int
    seed: int
    steps: int

    def columns(self) -> tuple[str, ...]:
        """`last_batch_loss`."""
        return ("last_batch_loss",)

    def record(self, step: Any) -> tuple[float]:
        """NaN in the first row, which no step precedes."""
        if step.index == 0:
            return (math.nan,)
        train = step.data.train
        batch = _batches(len(train), self.batch_size, self.seed, self.steps)[step.index - 1]
        with torch.no_grad():
            return ((step.model(train.x[batch]) - train.y[batch]).square().mean().item(),)


def recorders(config: RunConfig, data: cx.data.Split, seed: int) -> list[cx.Recorder]:
    """What is recorded beside the losses."""
    chosen: list[cx.Recorder] = []
    if config.batch_size is None or config.probe:
        chosen.append(cx.Spectrum(every=config.kernel_every, k=config.eigenpairs, splits=config.splits))
    chosen.append(cx.BatchCriticalRate(every=config.kernel_every))
    if config.hessian:
        chosen.append(cx.BatchHessian(every=config.kernel_every))
    if config.full_loss and config.batch_size is not None:
        chosen.append(LastBatchLoss(batch_size=config.batch_size, seed=seed, steps=config.max_steps))
    if config.evaluate:
        egop = cx.data.egop(config.task.name, data.train.x[0].numel(), 1.0)
        chosen.append(cx.AGOPAlignment(reference=egop, every=config.max_steps + 1))  # start, best and end
    if config.keep_agop:
        chosen.append(cx.AGOP(size=config.keep_agop, every=config.max_steps + 1))
    return chosen


def train(
    config: RunConfig,
    seed: int,
    root: Path,
    data_root: Path | None,
    *,
    device: str | None = None,
    progress: bool = False,
) -> Run:
    """Train a run, go on with an interrupted one, or load a finished one.

    Args:
        config: the run.
        seed: its seed.
        root: folder of all runs.
        data_root: folder of image sets.
        device: which device of the kind that `config` names, such as "cuda:1"; None: the first.
        progress: show a progress bar where there is a terminal.
    """
    where = folder(root, config, seed)
    if not where.finished:
        data = load(config.task, seed, data_root)
        with where.open() as session:
            session.note("data", data.train.info)
        data = data.to(device or config.device)
        x, y = data.train.x, data.train.y
        if x.is_cuda:
            torch.cuda.set_device(x.device)  # the environment of the run names it
        # Drawn on the CPU: the initial weights are the same on every device.
        model = build(config, tuple(x.shape[1:]), y.shape[1], seed).to(x.device)
        cx.train(
            model,
            data,
            algorithm=cx.GD() if config.batch_size is None else cx.SGD(config.batch_size),
            schedule=schedule(config, model, x),
            stop=cx.Stop(
                max_steps=config.max_steps,
                train_loss=config.stop_loss,
                every=1 if config.full_loss else None,
            ),
            recorders=recorders(config, data, seed),
            probe=data.train if config.probe and config.batch_size is not None else None,
            seed=seed,
            run=where,
            validate_every=config.validate_every or None,
            progress=progress,
        )
    return read(root, config, seed)


def read(root: Path, config: RunConfig, seed: int) -> Run:
    """A finished run as it was stored.

    Raises:
        catapult_ext.runs.RunError: it is not finished.
    """
    where = folder(root, config, seed)
    stored = cx.History.from_result(where.read())
    summary: dict[str, Any] = {"result": stored.result, "seconds": stored.seconds}
    until = len(stored.metrics)
    if (best := stored.best) is not None:
        until = best.step
        summary |= {
            "best_step": best.step,
            "validation_loss": best.validation_loss,
            "test_loss": best.test_loss,
        }
        summary["alignment"] = best.measures.get("agop_alignment")
    if "catapult" in stored.metrics:
        summary["catapults"] = int(stored.metrics["catapult"].iloc[:until].sum())
    files = runs.StoredRun(where.path)
    summary["data"] = files.read("data")
    return Run(config, seed, stored.metrics, summary, files.read("environment")[-1], stored.tensors)


def finished_groups(root: Path, request: Request) -> dict[str, Group]:
    """The groups of a request of which every run is finished, read from their folders."""
    return {
        group: {
            condition: [read(root, config, seed) for config, seed in members]
            for condition, members in conditions.items()
        }
        for group, conditions in request.groups().items()
        if all(folder(root, config, seed).finished for config, seed in _runs(conditions))
    }


def unfinished(root: Path, request: Request) -> list[tuple[str, str, RunConfig, int]]:
    """(group, condition, configuration, seed) of the runs of a request that are not finished."""
    return [
        (group, condition, config, seed)
        for group, conditions in request.groups().items()
        for condition, members in conditions.items()
        for config, seed in members
        if not folder(root, config, seed).finished
    ]


def _runs(conditions: dict[str, list[tuple[RunConfig, int]]]) -> Iterator[tuple[RunConfig, int]]:
    for members in conditions.values():
        yield from members


def data_root(chosen: Path | None) -> Path | None:
    """The folder of image sets: the option, else `CATAPULT_DATA`, else None."""
    return chosen or (Path(os.environ["CATAPULT_DATA"]) if os.environ.get("CATAPULT_DATA") else None)
