"""Made-up metrics of runs, for tests of claims, plots and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

import catapult_ext as cx
from python_experiments import registry
from python_experiments.claims import Run
from python_experiments.config import RunConfig
from python_experiments.experiments import fig5, table1

ENVIRONMENT = {"cpu": "Test CPU", "threads": 1, "simd": "avx2", "torch": "2.13.0"}


def catapult_run(config: RunConfig, *, steps: int = 40, spike: float = 6.0, seed: int = 0) -> Run:
    """Gradient descent with a spike of that height in L_<=s at step 5, or a plain decay where it is 0."""
    t = np.arange(steps + 1)
    rest = 0.7 * np.exp(-t / 20)
    top = 0.25 * np.exp(-t / 4) + spike * np.exp(-((t - 5) ** 2) / 3)
    critical = 5.0 + (30.0 / (1 + np.exp(5.0 - t)) if spike else 0 * t)
    lr = np.full(steps + 1, 9.0 if spike else 3.0)
    lr[-1] = np.nan
    metrics = pd.DataFrame(
        {
            "step": t,
            "lr": lr,
            "loss": top + rest,
            "train_loss": top + rest,
            "lambda_1": 128 / critical,
            "critical_lr": critical,
            "batch_critical_lr": critical,
            "top_loss": top,
            "rest_loss": rest,
        }
    )
    return Run(config, seed, metrics, {"result": "max_steps", "seconds": 1.5, "data": {}}, ENVIRONMENT)


def diverging_run(config: RunConfig) -> Run:
    """Both parts of the loss grow, until there is no finite row any more."""
    run = catapult_run(config, steps=6)
    growth = 4.0 ** run.metrics["step"]
    metrics = run.metrics.assign(
        top_loss=run.metrics["top_loss"] * growth, rest_loss=run.metrics["rest_loss"] * growth
    )
    metrics["loss"] = metrics["top_loss"] + metrics["rest_loss"]
    return replace(run, metrics=metrics, summary={**run.summary, "result": "diverged"})


def fig3_groups(name: str = "fig3-fcn") -> dict[str, dict[str, list[Run]]]:
    """All groups of a Fig. 3 request, as they should come out."""
    groups = registry.get(name).request("cpu").groups()
    made = {}
    for group, conditions in groups.items():
        for condition, members in conditions.items():
            for config, seed in members:
                if group == "beyond the largest rate":
                    run = diverging_run(config)
                else:
                    run = catapult_run(config, spike=6.0 if group == "main" else 0.0, seed=seed)
                made.setdefault(group, {}).setdefault(condition, []).append(run)
    return made


def batch_run(config: RunConfig, seed: int, *, rate: float, steps: int = 200) -> Run:
    """SGD with batches of one point whose loss rises exactly at rates above the batch's critical rate.

    The critical rate is 1 for the doubled point and 4 for every other one.
    """
    order = cx.SGD(1).order(config.task.train, seed)
    drawn = np.array([int(next(order)) == fig5.DOUBLED for _ in range(steps)])
    critical = np.where(drawn, 1.0, 4.0)
    loss = np.linspace(1.0, 0.5, steps)
    after = loss * np.where(rate > critical, 3.0, 0.5)
    metrics = pd.DataFrame(
        {
            "step": np.arange(steps + 1),
            "lr": [*np.full(steps, rate), np.nan],
            "loss": [*loss, np.nan],
            "train_loss": [*loss, 0.5],
            "last_batch_loss": [np.nan, *after],
            "batch_critical_lr": [*critical, np.nan],
        }
    )
    return Run(config, seed, metrics, {"result": "max_steps", "seconds": 1.5, "data": {}}, ENVIRONMENT)


def fig5_groups() -> dict[str, dict[str, list[Run]]]:
    """All groups of a Fig. 5 request, as they should come out."""
    rates = {"main": 2.0, fig5.BELOW: 0.5, fig5.ABOVE: 6.0}
    return _made("fig5", lambda group, condition, config, seed: batch_run(config, seed, rate=rates[group]))


def table1_groups() -> dict[str, dict[str, list[Run]]]:
    """All groups of a Table 1 request: the paper's numbers, and no difference at the small rate."""
    paper = {**table1.PAPER, "100": {"test_loss": 0.72, "alignment": 0.83}}
    catapults = {"5": 90, "10": 40, "50": 8, "100": 0, "GD": 0}
    same = {"test_loss": 0.8, "alignment": 0.8, "catapults": 0}

    def make(group: str, condition: str, config: RunConfig, seed: int) -> Run:
        numbers = {**paper[condition], "catapults": catapults[condition]} if group == "main" else same
        run = catapult_run(config, seed=seed, spike=0.0)
        return replace(run, summary={**run.summary, **numbers})

    return _made("table1", make)


def _made(name: str, make: Callable[[str, str, RunConfig, int], Run]) -> dict[str, dict[str, list[Run]]]:
    """The groups of a request at the preset cpu, each run made up by `make(group, condition, config, seed)`."""
    return {
        group: {
            condition: [make(group, condition, config, seed) for config, seed in members]
            for condition, members in conditions.items()
        }
        for group, conditions in registry.get(name).request("cpu").groups().items()
    }


def groups_of(name: str) -> dict[str, dict[str, list[Run]]]:
    """All groups of an experiment's request, as they should come out."""
    return {
        "fig2": lambda: fig3_groups("fig3-fcn"),
        "fig3-fcn": lambda: fig3_groups("fig3-fcn"),
        "fig3-cnn": lambda: fig3_groups("fig3-cnn"),
        "fig5": fig5_groups,
        "table1": table1_groups,
    }[name]()
