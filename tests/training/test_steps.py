"""Every update and every recorded number against plain autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import training_reference as brute
from torch import nn
from training_reference import Recipe

from catapult_ext.data import Split
from catapult_ext.observe import Observer
from catapult_ext.training import (
    GD,
    SGD,
    AGOPAlignment,
    BatchCriticalRate,
    Constant,
    Recorder,
    Spectrum,
    Step,
    Stop,
    train,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kernel", [False, True])
def test_gd_equals_a_hand_written_loop(outputs: int, kernel: bool) -> None:
    recipe = Recipe(c=outputs)
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    recorders = [Spectrum(k=3, s=2)] if kernel else []
    history = train(
        model, data, algorithm=GD(), schedule=Constant(0.3), recorders=recorders, stop=Stop(max_steps=7)
    )
    losses = [brute.descend(twin, data.x, data.y, 0.3) for _ in range(7)]
    losses.append(brute.mse(twin, data.x, data.y).item())
    np.testing.assert_allclose(history.metrics["loss"], losses, **CLOSE)
    np.testing.assert_allclose(history.metrics["train_loss"], losses, **CLOSE)
    torch.testing.assert_close(brute.flat(model), brute.flat(twin), **CLOSE)
    assert history.result == "max_steps"
    assert history.metrics["step"].tolist() == list(range(8))
    assert history.metrics["lr"].tolist()[:7] == [0.3] * 7
    assert np.isnan(history.metrics["lr"].iloc[7])  # the last row made no update


def test_sgd_visits_every_sample_once_an_epoch_and_follows_batch_gradients(recipe: Recipe) -> None:
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    algorithm = SGD(4)  # 13 samples: 4, 4, 4, 1
    history = train(model, data, algorithm=algorithm, schedule=Constant(0.1), stop=Stop(max_steps=10), seed=5)
    order = algorithm.order(13, seed=5)
    batches = [next(order) for _ in range(10)]
    losses = [brute.descend(twin, data.x[i], data.y[i], 0.1) for i in batches]
    np.testing.assert_allclose(history.metrics["loss"].iloc[:10], losses, **CLOSE)
    torch.testing.assert_close(brute.flat(model), brute.flat(twin), **CLOSE)
    assert [len(b) for b in batches[:4]] == [4, 4, 4, 1]
    for epoch in (batches[:4], batches[4:8]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(13))
    assert torch.cat(batches[:4]).tolist() != torch.cat(batches[4:8]).tolist()
    assert np.isnan(history.metrics["loss"].iloc[10])
    assert history.metrics["train_loss"].notna().tolist() == [t % 4 == 0 for t in range(10)] + [True]


def test_sgd_drops_the_ragged_batch_on_request() -> None:
    algorithm = SGD(4, drop_last=True)
    assert algorithm.steps_per_epoch(13) == 3
    order = algorithm.order(13, seed=0)
    batches = [next(order) for _ in range(6)]
    assert [len(b) for b in batches] == [4] * 6
    assert len(set(torch.cat(batches[:3]).tolist())) == 12


def test_spectrum_of_gd_describes_the_parameters_before_the_update(recipe: Recipe) -> None:
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    history = train(
        model,
        data,
        algorithm=GD(),
        schedule=Constant(0.2),
        recorders=[Spectrum(k=4, s=2, every=2)],
        stop=Stop(max_steps=5),
    )
    for t in range(6):
        row = history.metrics.iloc[t]
        if t in (0, 2, 4, 5):  # the cadence, and the last row
            values, vectors = torch.linalg.eigh(brute.kernel(twin, data.x))
            r = (twin(data.x) - data.y).detach().reshape(-1)
            top = (vectors[:, -2:].t() @ r).square().sum() / len(r)
            np.testing.assert_allclose(
                row[[f"lambda_{i}" for i in (1, 2, 3, 4)]], values.flip(0)[:4], rtol=1e-9
            )
            np.testing.assert_allclose(row["critical_lr"], 13 / values[-1].item(), rtol=1e-9)
            np.testing.assert_allclose(row["top_loss"], top.item(), rtol=1e-8)
            np.testing.assert_allclose(
                row["top_loss"] + row["rest_loss"], r.square().mean().item(), rtol=1e-9
            )
        else:
            assert row[["lambda_1", "critical_lr", "top_loss", "rest_loss"]].isna().all()
        brute.descend(twin, data.x, data.y, 0.2)


def test_probe_is_observed_while_training_on_batches(recipe: Recipe) -> None:
    model, twin, data, probe = recipe.model(), recipe.model(), recipe.data(), recipe.data(6, 9, "probe")
    history = train(
        model,
        data,
        algorithm=SGD(5),
        schedule=Constant(0.2),
        recorders=[Spectrum(every=3), BatchCriticalRate()],
        probe=probe,
        stop=Stop(max_steps=8),
        seed=2,
    )
    order = SGD(5).order(13, seed=2)
    for t in range(8):
        row, batch = history.metrics.iloc[t], next(order)
        if t % 3 == 0:
            np.testing.assert_allclose(row["critical_lr"], brute.critical_lr(twin, probe.x), rtol=1e-9)
            loss = brute.mse(twin, probe.x, probe.y).item()
            np.testing.assert_allclose(row["top_loss"] + row["rest_loss"], loss, rtol=1e-9)
        else:
            assert np.isnan(row["critical_lr"])
        np.testing.assert_allclose(
            row["batch_critical_lr"], brute.critical_lr(twin, data.x[batch]), rtol=1e-9
        )
        brute.descend(twin, data.x[batch], data.y[batch], 0.2)
    last = history.metrics.iloc[8]
    np.testing.assert_allclose(last["critical_lr"], brute.critical_lr(twin, probe.x), rtol=1e-9)
    assert np.isnan(last["batch_critical_lr"])


def test_catapults_are_the_steps_above_the_batch_critical_rate(recipe: Recipe) -> None:
    model, data = recipe.model(), recipe.split()
    rates = [brute.critical_lr(recipe.model(), data.train.x[i : i + 1]) for i in range(13)]
    history = train(
        model,
        data,
        algorithm=SGD(1),
        schedule=Constant(1.2 * sorted(rates)[1]),  # above for some of the samples only
        recorders=[BatchCriticalRate()],
        stop=Stop(max_steps=60),
        validate_every=7,
    )
    m = history.metrics.iloc[:-1]
    expected = m["lr"] - m["batch_critical_lr"] > 1e-8
    assert m["catapult"].tolist() == expected.tolist()
    assert 0 < expected.sum() < len(expected)
    best = m["validation_loss"].idxmin()
    assert history.best is not None
    assert history.best.step == best
    assert history.catapult_count == int(expected[:best].sum())
    assert history.metrics["catapult"].isna().tolist() == [False] * 60 + [True]


def test_a_rate_equal_to_the_critical_rate_is_no_catapult(recipe: Recipe) -> None:
    data, margin = recipe.data(), 1e-8
    critical = Observer(recipe.model())(data.x, data.y).critical_lr.item()
    for lr, expected in ((critical, False), (critical + 0.5 * margin, False), (critical + 2 * margin, True)):
        history = train(
            recipe.model(),
            data,
            algorithm=GD(),
            schedule=Constant(lr),
            recorders=[BatchCriticalRate()],
            stop=Stop(max_steps=1),
        )
        assert history.metrics["catapult"].iloc[0] == expected
        assert history.catapult_count == int(expected)


def test_count_is_unknown_unless_every_step_was_recorded(recipe: Recipe) -> None:
    for recorders in ([], [BatchCriticalRate(every=2)]):
        history = train(
            recipe.model(),
            recipe.data(),
            algorithm=GD(),
            schedule=Constant(0.1),
            recorders=recorders,
            stop=Stop(max_steps=4),
        )
        assert history.catapult_count is None


def test_agop_alignment_also_at_the_best_parameters(recipe: Recipe) -> None:
    model, data, reference = (
        recipe.model(),
        recipe.split(),
        torch.diag(torch.tensor([3.0, 1, 0, 0, 0])).double(),
    )

    def alignment(network: nn.Module) -> float:
        x = data.train.x.clone().requires_grad_()
        (g,) = torch.autograd.grad(network(x).sum(), x)
        agop = g.t() @ g / len(x)
        return (agop * reference).sum().item() / (agop.norm() * reference.norm()).item()

    start = alignment(recipe.model())
    history = train(
        model,
        data,
        algorithm=GD(),
        schedule=Constant(0.3),
        recorders=[AGOPAlignment(reference=reference, every=4)],
        stop=Stop(max_steps=30),
        validate_every=1,
    )
    column = history.metrics["agop_alignment"]
    assert column.notna().tolist() == [t % 4 == 0 or t == 30 for t in range(31)]
    np.testing.assert_allclose(column[0], start, rtol=1e-9)
    np.testing.assert_allclose(column[30], alignment(model), rtol=1e-9)
    assert history.best is not None
    twin = recipe.model()
    twin.load_state_dict(history.best.state_dict)
    np.testing.assert_allclose(history.best.measures["agop_alignment"], alignment(twin), rtol=1e-9)


def test_without_a_kernel_recorder_no_step_computes_a_kernel(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []
    original = Observer.__call__

    def counted(self: Observer, x: torch.Tensor, y: torch.Tensor) -> object:
        observation = original(self, x, y)
        passes.append(observation.kernel is not None)
        return observation

    monkeypatch.setattr(Observer, "__call__", counted)
    split = recipe.split()
    for algorithm in (GD(), SGD(4)):
        arguments = {"algorithm": algorithm, "schedule": Constant(0.1), "stop": Stop(max_steps=9)}
        train(recipe.model(), split, engine="general", **arguments)
        assert passes == [False] * (10 if algorithm == GD() else 9)
        passes.clear()
    train(
        recipe.model(),
        split,
        algorithm=SGD(4),
        schedule=Constant(0.1),
        recorders=[BatchCriticalRate(every=4)],
        stop=Stop(max_steps=9),
        engine="general",
    )
    assert passes == [t % 4 == 0 for t in range(9)]
    passes.clear()
    train(
        recipe.model(),
        split,
        algorithm=GD(),
        schedule=Constant(0.5, relative=True),
        stop=Stop(max_steps=3),
    )
    assert passes == [True, False, False, False]


class DrawnSample(Recorder):
    """A recorder of one's own."""

    observes = "batch"

    def columns(self) -> tuple[str, ...]:
        return ("sample", "kernel_trace")

    def record(self, step: Step) -> tuple[float, float]:
        assert step.indices is not None
        assert step.observation is not None
        return step.indices[0].item(), step.observation.kernel.trace().item()


def test_a_recorder_of_ones_own_sees_batch_and_pass(recipe: Recipe) -> None:
    data = recipe.data()
    history = train(
        recipe.model(),
        data,
        algorithm=SGD(1),
        schedule=Constant(0.01),
        recorders=[DrawnSample()],
        stop=Stop(max_steps=13),
        seed=3,
    )
    order = SGD(1).order(13, seed=3)
    drawn = [next(order).item() for _ in range(13)]
    assert history.metrics["sample"].tolist()[:13] == drawn
    first = brute.kernel(recipe.model(), data.x[drawn[0] : drawn[0] + 1])
    np.testing.assert_allclose(history.metrics["kernel_trace"][0], first.item(), rtol=1e-9)


def test_batchnorm_statistics_are_committed_by_every_step(recipe: Recipe) -> None:
    model, twin = recipe.model(norm=True), recipe.model(norm=True)
    data = Split(recipe.data(), recipe.data(8, 4))
    history = train(
        model, data, algorithm=GD(), schedule=Constant(0.05), stop=Stop(max_steps=6), validate_every=1
    )
    for _ in range(6):
        brute.descend(twin, data.train.x, data.train.y, 0.05)
    for (name, buffer), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name, **CLOSE)
    assert model[1].num_batches_tracked.item() == 6
    assert model.training
    twin.eval()
    assert data.validation is not None
    expected_loss = brute.mse(twin, data.validation.x, data.validation.y).item()
    np.testing.assert_allclose(history.metrics["validation_loss"].iloc[-1], expected_loss, rtol=1e-9)


def test_frozen_layers_stay_and_the_callers_random_state_too(recipe: Recipe) -> None:
    model = recipe.model()
    model[0].weight.requires_grad_(False)
    before, state = model[0].weight.clone(), torch.get_rng_state()
    train(model, recipe.data(), algorithm=SGD(3), schedule=Constant(0.1), stop=Stop(max_steps=5))
    torch.testing.assert_close(model[0].weight, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_died_trains_on_and_aligns_with_nothing(recipe: Recipe) -> None:
    """All units dead: the kernel and the AGOP are zero, which is a state of the network and no error."""
    data = recipe.split()
    model = torch.nn.Sequential(
        torch.nn.Linear(recipe.d, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1, bias=False)
    ).to(data.train.x.dtype)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    history = train(
        model,
        data,
        algorithm=SGD(4),
        schedule=Constant(0.1),
        recorders=[AGOPAlignment(reference=torch.eye(recipe.d), every=1), BatchCriticalRate()],
        stop=Stop(max_steps=3),
    )
    assert history.result == "max_steps"
    assert history.metrics["agop_alignment"].isna().all()
    assert (history.metrics["catapult"].dropna() == 0).all()
