"""Made-up metrics of runs, for tests of claims, plots and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

import catapult_ext as cx
from python_experiments import registry
from python_experiments.claims import Run
from python_experiments.config import RunConfig
from python_experiments.experiments import fig3, fig5, table1

ENVIRONMENT = {"cpu": "Test CPU", "threads": 1, "simd": "avx2", "torch": "2.13.0"}


def catapult_run(
    config: RunConfig,
    *,
    steps: int = 40,
    spike: float = 6.0,
    seed: int = 0,
    peaks: Sequence[int] = (5,),
    summary: Mapping[str, Any] | None = None,
) -> Run:
    """Gradient descent with spikes of that height in L_<=s at `peaks`, or a plain decay where it is 0.

    The critical rate grows by 30 at each spike. Five steps before it the rate is raised to 1.8 times the critical
    rate, and stays.
    """
    t = np.arange(steps + 1)
    at = np.array(peaks if spike else [], dtype=float)[:, None]  # (spikes, 1)
    rest = 0.7 * np.exp(-t / 20)
    top = 0.25 * np.exp(-t / 4) + spike * np.exp(-((t - at) ** 2) / 3).sum(0)
    critical = 5.0 + (30.0 / (1 + np.exp(at - t))).sum(0)
    lr = np.full(steps + 1, 3.0)
    for peak in at[:, 0].astype(int):
        lr[peak - 5 :] = 1.8 * critical[peak - 5]
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
            "validation_loss": top + rest,
            **{f"top_loss_{s}": top for s in config.splits},
            **{f"rest_loss_{s}": rest for s in config.splits},
        }
    )
    outcome = {"result": "max_steps", "seconds": 1.5, "data": {}, **(summary or {})}
    return Run(config, seed, metrics, outcome, ENVIRONMENT)


def diverging_run(config: RunConfig) -> Run:
    """Both parts of the loss grow, until there is no finite row any more."""
    run = catapult_run(config, steps=6)
    parts = [column for column in run.metrics if column.startswith(("top_loss", "rest_loss"))]
    growth = 4.0 ** run.metrics["step"]
    metrics = run.metrics.assign(**{part: run.metrics[part] * growth for part in parts})
    metrics["loss"] = metrics["top_loss"] + metrics["rest_loss"]
    return replace(run, metrics=metrics, summary={**run.summary, "result": "diverged"})


def one_catapult(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 2, 3 or 13: a catapult, a plain decay below the critical rate, divergence far beyond it."""
    if group == fig3.BEYOND:
        return diverging_run(config)
    return catapult_run(config, spike=6.0 if group == "main" else 0.0, seed=seed)


def rate_starts(config: RunConfig) -> list[int]:
    """Steps at which the rates of a run with rises begin to act."""
    return [0, *(step for step, _ in config.raises)]


def several_catapults(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 4, 17 or 18: a catapult five steps after each rise, a plain decay, or divergence."""
    if group == "main" and condition == "from scratch":
        return diverging_run(config)
    peaks = [step + 5 for step in rate_starts(config)]
    spike = 6.0 if group == "main" else 0.0
    run = catapult_run(config, steps=config.max_steps, spike=spike, seed=seed, peaks=peaks)
    if (
        group != "main" and condition == "by catapults"
    ):  # the norm of K grows: a share of the critical rate falls
        run = replace(run, metrics=run.metrics.assign(lr=0.9 * run.metrics["lr"]))
    return run


#: Every so many steps a run of `probe_run` draws a batch whose critical rate is low.
LOW_EVERY = 20


def probe_run(config: RunConfig, seed: int, *, rate: float, steps: int = 200) -> Run:
    """SGD with the training set as a probe: the loss rises by half of the first one where the rate is too high.

    The critical rate of every 20th batch is 1, that of the others 4. The rise lies in L_<=s, and fades afterwards.
    """
    t = np.arange(steps)
    critical = np.where(t % LOW_EVERY == 7, 1.0, 4.0)
    top = [0.2]
    for above in rate > critical:
        top.append(top[-1] + 0.5 if above else 0.95 * top[-1])
    rest = 0.8 * np.exp(-np.arange(steps + 1) / 100) + 0.01
    loss = np.array(top) + rest
    metrics = pd.DataFrame(
        {
            "step": np.arange(steps + 1),
            "lr": [*np.full(steps, rate), np.nan],
            "loss": [*loss[:-1], np.nan],
            "train_loss": loss,
            "lambda_1": np.full(steps + 1, 64.0),
            "critical_lr": np.full(steps + 1, 2.0),
            "batch_critical_lr": [*critical, np.nan],
            "top_loss": top,
            "rest_loss": rest,
        }
    )
    return Run(config, seed, metrics, {"result": "max_steps", "seconds": 1.5, "data": {}}, ENVIRONMENT)


def batches_of_32(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 6 or Table 2: between the critical rates of the batches, or below them all."""
    return probe_run(config, seed, rate=2.0 if group == "main" else 0.5)


def sgd_catapults(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 7, 19 or 21 to 23: two spikes of the training set's loss at which the norm of K falls, or none."""
    peaks = (8, 25) if group == "main" else ()
    run = catapult_run(config, spike=6.0 if peaks else 0.0, seed=seed, peaks=peaks)
    critical = 5.0 + 30.0 * (run.metrics["step"].to_numpy()[:, None] >= np.array(peaks)).sum(1)
    return replace(run, metrics=run.metrics.assign(critical_lr=critical, lambda_1=128 / critical))


def two_critical_rates(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 12: the two are apart by a tenth of the smallest tolerance, or by twice the largest."""
    run = probe_run(config, seed, rate=2.0)
    apart = 1.001 if group == "main" else 1.1
    hessian = apart * run.metrics["batch_critical_lr"]
    return replace(run, metrics=run.metrics.assign(batch_hessian_critical_lr=hessian))


def counted_catapults(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 8 or 26: the more catapults the better; without catapults all runs come out the same."""
    count = int(condition.split()[0]) if group == "main" else 0
    block = torch.diag(torch.tensor([1.0, 1.0, *[0.6 - 0.15 * count] * 8]))  # (10, 10)
    summary = {"test_loss": 0.8 - 0.1 * count, "alignment": 0.5 + 0.1 * count}
    peaks = [5 + 30 * k for k in range(count)]
    run = catapult_run(
        config, steps=120, peaks=peaks, spike=6.0 if peaks else 0.0, seed=seed, summary=summary
    )
    kept = {"steps": torch.tensor([0, 120]), "values": torch.stack([torch.ones(10, 10), block])}
    return replace(run, tensors={"agop": kept})


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


def batches_of_one(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Fig. 5."""
    return batch_run(config, seed, rate={"main": 2.0, fig5.BELOW: 0.5, fig5.ABOVE: 6.0}[group])


def batch_sizes(group: str, condition: str, config: RunConfig, seed: int) -> Run:
    """A run of Table 1: the paper's numbers, and no difference at the small rate."""
    paper = {**table1.PAPER, "100": {"test_loss": 0.72, "alignment": 0.83}}
    catapults = {"5": 90, "10": 40, "50": 8, "100": 0, "GD": 0}
    numbers = {"test_loss": 0.8, "alignment": 0.8, "catapults": 0}
    if group == "main":
        numbers = {**paper[condition], "catapults": catapults[condition]}
    return catapult_run(config, seed=seed, spike=0.0, summary=numbers)


#: How the runs of an experiment are made up, by the beginning of its name.
MAKERS = {
    "fig2": one_catapult,
    "fig3": one_catapult,
    "fig13": one_catapult,
    "fig14": one_catapult,
    "fig15": one_catapult,
    "fig16": one_catapult,
    "fig7": sgd_catapults,
    "fig21": sgd_catapults,
    "fig22": sgd_catapults,
    "fig23": sgd_catapults,
    "fig12": two_critical_rates,
    "fig4": several_catapults,
    "fig17": several_catapults,
    "fig18": several_catapults,
    "fig5": batches_of_one,
    "fig6": batches_of_32,
    "table2": batches_of_32,
    "fig8": counted_catapults,
    "fig26": counted_catapults,
    "table1": batch_sizes,
}


def groups_of(name: str) -> dict[str, dict[str, list[Run]]]:
    """All groups of an experiment's request at the preset cpu, as they should come out."""
    make = MAKERS[name.split("-")[0]]
    return {
        group: {
            condition: [make(group, condition, config, seed) for config, seed in members]
            for condition, members in conditions.items()
        }
        for group, conditions in registry.get(name).request("cpu").groups().items()
    }
