"""Made-up metrics of runs, for tests of claims, plots and the report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from python_experiments import registry
from python_experiments.claims import Run
from python_experiments.config import RunConfig

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
