"""The native engine of the trainer on a GPU: against the general one, and with its stretches as CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from training_reference import Recipe

import catapult_ext as cx
from catapult_ext.data import Dataset
from catapult_ext.training import chain as chain_module

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def made(dtype: torch.dtype, n: int = 13) -> tuple[torch.nn.Module, Dataset]:
    recipe = Recipe(dtype, n=n)
    data = recipe.data()
    return recipe.model().cuda(), Dataset(data.x.cuda(), data.y.cuda(), "made")


def run(model: torch.nn.Module, data: Any, engine: str, steps: int, **changes: Any) -> cx.History:
    arguments: dict[str, Any] = {
        "algorithm": cx.SGD(4),
        "schedule": cx.Constant(0.3, relative=True),
        "recorders": [cx.BatchCriticalRate()],
        "stop": cx.Stop(max_steps=steps),
        "seed": 3,
        **changes,
    }
    return cx.train(model, data, engine=engine, progress=False, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_step_from_equal_state_agrees(dtype: torch.dtype) -> None:
    for seed in range(5):
        model, data = made(dtype)
        twin = copy.deepcopy(model)
        general, native = run(model, data, "general", 1, seed=seed), run(twin, data, "auto", 1, seed=seed)
        assert (general.engine, native.engine) == ("general", "native")
        for column in ("loss", "lr", "batch_critical_lr", "train_loss"):
            np.testing.assert_allclose(
                native.metrics[column], general.metrics[column], rtol=BOUND[dtype], err_msg=column
            )
        for moved, expected in zip(twin.parameters(), model.parameters(), strict=True):
            error = (moved - expected).detach().norm()
            assert error <= BOUND[dtype] * expected.detach().norm()


def test_graphs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    original = chain_module._Graphs._capture

    def counting(self: Any, *arguments: Any) -> Any:
        captured.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(chain_module._Graphs, "_capture", counting)
    model, data = made(torch.float32, n=50)
    twin = copy.deepcopy(model)
    graphed = run(model, data, "native", 400)
    assert captured
    monkeypatch.setattr(chain_module._Graphs, "run", lambda *_: None)
    eager = run(twin, data, "native", 400)
    assert graphed.metrics.equals(eager.metrics)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_divergence_is_a_result_and_leaves_nothing_noted() -> None:
    model, data = made(torch.float32)
    stop = cx.Stop(max_steps=200, every=50, diverged_above=1e300)
    history = run(model, data, "native", 200, schedule=cx.Constant(1e20), stop=stop)
    assert history.result == "diverged"
    cx.ops.cuda.check(torch.device("cuda"))
