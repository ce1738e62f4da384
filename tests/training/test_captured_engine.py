"""Runs whose passes are captured, where there is no GPU, against the general engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import captured_cases
import pandas as pd
import pytest
import torch
from captured_cases import OneMemory, close
from torch import nn
from training_reference import Recipe

import catapult_ext as cx
from catapult_ext.runs import RunError, RunFolder


@pytest.fixture
def _without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    captured_cases.without_a_device(monkeypatch)
    monkeypatch.setattr("catapult_ext.training.job._on_cuda", lambda data: True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)
    ).double()


RUNS: dict[str, dict[str, Any]] = {
    "gradient descent": {
        "algorithm": cx.GD(),
        "schedule": cx.Constant(0.9, relative=True),
        "recorders": [cx.Spectrum(k=3), cx.ParameterNorms(every=2)],
    },
    "batches": {
        "algorithm": cx.SGD(4),  # 14 samples: 4, 4, 4, 2
        "schedule": cx.Stepwise({0: 0.3, 4: 0.6}, relative=True),
        "recorders": [cx.BatchCriticalRate(every=2), cx.Spectrum(every=3), cx.Hessian(every=5)],
    },
    "momentum, around spikes": {
        "algorithm": cx.GD(momentum=0.5),
        "schedule": cx.Constant(2.5, relative=True),
        "recorders": [cx.Spectrum(every=cx.AroundSpikes(before=2, after=2))],
    },
    "Adam": {"algorithm": cx.Adam(4), "schedule": cx.Constant(0.01), "recorders": [cx.BatchCriticalRate()]},
}


def run(name: str, engine: str, model: nn.Module, **changes: Any) -> cx.History:
    arguments = {**RUNS[name], "stop": cx.Stop(max_steps=11), "seed": 3, "engine": engine} | changes
    data = Recipe(n=14).data()
    probe = data if name == "batches" else None
    return cx.train(model, data, probe=probe, progress=False, **arguments)


@pytest.mark.usefixtures("_without_a_device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_that_of_the_general_engine(name: str, training: bool) -> None:
    models = [network().train(training) for _ in range(2)]
    general, captured = (
        run(name, engine, model) for engine, model in zip(("general", "captured"), models, strict=True)
    )
    assert (general.engine, captured.engine) == ("general", "captured")
    assert general.result == captured.result
    assert (captured.result == "diverged") == (name == "momentum, around spikes")
    column = "lambda_1" if "lambda_1" in captured.metrics else "loss"
    assert captured.metrics[column].notna().sum() > 2
    assert OneMemory.made <= 5  # of batches: two sizes with and without a kernel, and the whole set
    pd.testing.assert_frame_equal(captured.metrics, general.metrics, rtol=1e-7)
    for own, theirs in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        close(own, theirs)


@pytest.mark.usefixtures("_without_a_device")
@pytest.mark.parametrize("name", ["gradient descent", "batches"])
def test_an_interrupted_run_goes_on_captured(name: str, tmp_path: Path) -> None:
    class Stopping(cx.Callback):
        def on_step(self, row: Any, model: nn.Module) -> bool:
            if row["step"] == 6:
                raise KeyboardInterrupt
            return False

    whole = run(name, "captured", network())
    folder = RunFolder(tmp_path, "run", {}, 0, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(name, "captured", network(), run=folder, callbacks=[Stopping()])
    model = network()
    resumed = run(name, "captured", model, run=folder)
    assert resumed.metrics.equals(whole.metrics)
    assert resumed.engine == "captured"
    with pytest.raises(RunError, match="engine"):
        run(name, "general", network(), run=folder)


def test_the_model_has_to_be_on_a_device() -> None:
    with pytest.raises(ValueError, match='engine: expected "auto", "general" or "native" for a model on cpu'):
        run("gradient descent", "captured", network())
