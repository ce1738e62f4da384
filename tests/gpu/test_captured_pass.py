"""Observers whose passes are real CUDA graphs: against those without, without a wait, and in runs of the trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from captured_cases import MODELS, K, compare_captured, compare_models, data

import catapult_ext as cx
from catapult_ext.data import Dataset

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_and_empty")]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_observations_are_those_of_an_observer(name: str, dtype: torch.dtype, kernel: bool) -> None:
    compare_captured(MODELS[name]().to("cuda", dtype), kernel=kernel)


def test_a_pass_with_its_step_waits_for_nothing() -> None:
    model = MODELS["cnn, three outputs"]().to("cuda", torch.float32)
    x, y = data(model, 0)
    observer = cx.Observer(model, k=K, captured=True)

    def step() -> cx.Observation:
        seen = observer(x, y)
        _ = seen.loss, seen.critical_lr, seen.top_loss
        seen.step_(0.01)
        return seen

    step()  # captures, and lets libraries set up what they need
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            seen = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen.check()


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(8), cx.Adam(8)])
def test_a_run_is_that_of_the_general_engine(algorithm: cx.Algorithm) -> None:
    generator = torch.Generator().manual_seed(0)
    models = [cx.models.FCN(32, 64, 3, generator=generator).to("cuda", torch.float64)]
    models.append(copy.deepcopy(models[0]))
    train = Dataset(*data(models[0], 0, 40), "made")
    rate: cx.Schedule = (
        cx.Constant(0.01) if isinstance(algorithm, cx.Adam) else cx.Constant(0.5, relative=True)
    )
    histories = [
        cx.train(
            model, train, algorithm=algorithm, schedule=rate, stop=cx.Stop(max_steps=12), probe=train,
            recorders=[cx.Spectrum(k=3, every=2), cx.BatchCriticalRate()], engine=engine, progress=False,
        )
        for model, engine in zip(models, ("captured", "general"), strict=True)
    ]  # fmt: skip
    assert [history.engine for history in histories] == ["captured", "general"]
    for column in histories[1].metrics:
        found, expected = (torch.tensor(history.metrics[column].to_numpy()) for history in histories)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0.0, equal_nan=True)
    compare_models(*models)
