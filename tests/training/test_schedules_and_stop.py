"""When the rate changes, to what, and when a run ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import training_reference as brute
from torch import nn
from training_reference import Recipe

import catapult_ext as cx
from catapult_ext.data import Dataset, Split
from catapult_ext.training import GD, SGD, BatchCriticalRate, Constant, Spectrum, Stepwise, Stop, train


def test_stepwise_rates_start_with_the_update_of_their_step(recipe: Recipe) -> None:
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    schedule = Stepwise({4: 0.3, 0: 0.1, 2: 0.2})
    history = train(model, data, algorithm=GD(), schedule=schedule, stop=Stop(max_steps=6))
    rates = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert history.metrics["lr"].tolist()[:6] == rates
    for rate in rates:
        brute.descend(twin, data.x, data.y, rate)
    torch.testing.assert_close(brute.flat(model), brute.flat(twin), rtol=1e-9, atol=1e-12)
    assert history.metrics["measured_critical_lr"].isna().all()


@pytest.mark.parametrize("algorithm", [GD(), SGD(5)])
def test_relative_rates_are_multiples_of_the_whole_sets_critical_rate_at_the_increase(
    recipe: Recipe, algorithm: GD | SGD
) -> None:
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    schedule = Stepwise({0: 0.5, 3: 0.9}, relative=True)
    history = train(model, data, algorithm=algorithm, schedule=schedule, stop=Stop(max_steps=5), seed=4)
    order = algorithm.order(13, seed=4) if isinstance(algorithm, SGD) else None
    lr = 0.0
    for t in range(5):
        if t in (0, 3):
            critical = brute.critical_lr(twin, data.x)
            lr = (0.5 if t == 0 else 0.9) * critical
            np.testing.assert_allclose(history.metrics["measured_critical_lr"][t], critical, rtol=1e-9)
        np.testing.assert_allclose(history.metrics["lr"][t], lr, rtol=1e-9)
        batch = torch.arange(13) if order is None else next(order)
        brute.descend(twin, data.x[batch], data.y[batch], lr)
    assert history.metrics["measured_critical_lr"].notna().sum() == 2


def test_a_relative_constant_is_measured_once_at_initialisation(recipe: Recipe) -> None:
    data = recipe.data()
    history = train(
        recipe.model(), data, algorithm=GD(), schedule=Constant(0.7, relative=True), stop=Stop(max_steps=4)
    )
    lr = 0.7 * brute.critical_lr(recipe.model(), data.x)
    np.testing.assert_allclose(history.metrics["lr"][:4], lr, rtol=1e-9)


class Halving(cx.Schedule):
    """A schedule of one's own; without a description, as it is no dataclass."""

    def lr(self, step: int, state: dict[str, Any], measure: object) -> float:
        state["rate"] = 0.4 if step == 0 else state["rate"] / 2
        return state["rate"]


def test_a_schedule_of_ones_own_is_a_dataclass(recipe: Recipe) -> None:
    model, data, stop = recipe.model(), recipe.data(), Stop(max_steps=3)
    schedule = dataclasses.dataclass(type("Halved", (Halving,), {}))()
    history = train(model, data, algorithm=GD(), schedule=schedule, stop=stop)
    assert history.metrics["lr"].tolist()[:3] == [0.4, 0.2, 0.1]
    assert history.config["schedule"] == {"type": "Halved"}
    before = brute.flat(model)
    with pytest.raises(TypeError, match=r"schedule: expected a dataclass, .* got Halving"):
        train(model, data, algorithm=GD(), schedule=Halving(), stop=stop)
    torch.testing.assert_close(brute.flat(model), before, rtol=0, atol=0)  # nothing was computed and lost


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stepwise({3: 1.0}), r"rates: expected a rate for step 0, got steps \[3\]"),
        (lambda: Stepwise({}), "rates: expected a rate for step 0"),
        (lambda: Stepwise({0: -1.0}), "rates: expected a positive finite rate at step 0, got -1.0"),
        (lambda: Stepwise({0: 1.0, -2: 1.0}), "rates: expected integer steps >= 0, got -2"),
        (lambda: Constant(float("nan")), "rate: expected a positive finite number, got nan"),
        (lambda: SGD(0), "batch_size: expected an integer >= 1, got 0"),
        (lambda: SGD(2.5), "batch_size: expected an integer >= 1, got 2.5"),
        (lambda: Stop(max_steps=-1), "max_steps: expected an integer >= 0, got -1"),
        (lambda: Stop(max_steps=1, train_loss=-1.0), "train_loss: expected None or a finite number"),
        (lambda: Stop(max_steps=1, every=0), "every: expected None or an integer >= 1, got 0"),
        (lambda: Stop(max_steps=1, diverged_above=1.0), "diverged_above: expected a number > 1, got 1.0"),
        (lambda: Spectrum(k=2, s=3), "s: expected None or an integer from 1 to k = 2, got 3"),
        (lambda: Spectrum(every=0), "every: expected an integer >= 1, LogSpaced.. or AroundSpikes.., got 0"),
        (
            lambda: cx.training.AGOPAlignment(reference=torch.ones(3)),
            r"reference: expected shape \(d, d\), got \(3,\)",
        ),
    ],
)
def test_values_out_of_range_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_gd_stops_at_the_first_training_loss_below_the_threshold(recipe: Recipe) -> None:
    data = recipe.data()
    free = train(recipe.model(), data, algorithm=GD(), schedule=Constant(0.3), stop=Stop(max_steps=60))
    losses = free.metrics["loss"].to_numpy()
    threshold = (losses[30] + losses[31]) / 2
    first = int(np.argmax(losses < threshold))
    history = train(
        recipe.model(),
        data,
        algorithm=GD(),
        schedule=Constant(0.3),
        stop=Stop(train_loss=threshold, max_steps=60),
    )
    assert history.result == "converged"
    assert len(history.metrics) == first + 1
    assert history.metrics["train_loss"].iloc[-1] < threshold
    assert np.isnan(history.metrics["lr"].iloc[-1])


def test_sgd_stops_by_the_full_set_never_by_a_batch(recipe: Recipe) -> None:
    """A set with one easy sample, whose batch loss is far below the threshold from the start."""
    model, data = recipe.model(), recipe.data()
    y = data.y.clone()
    with torch.no_grad():
        y[0] = model(data.x[:1])[0]
    data = Dataset(data.x, y)
    history = train(
        model,
        data,
        algorithm=SGD(1),
        schedule=Constant(0.02),
        stop=Stop(train_loss=0.05, max_steps=4000, every=10),
    )
    assert history.result == "converged"
    full = history.metrics["train_loss"]
    assert full.notna().tolist() == [t % 10 == 0 for t in range(len(full))]
    assert full.iloc[-1] < 0.05
    assert (full.dropna().iloc[:-1] >= 0.05).all()
    assert (history.metrics["loss"][: len(full) - 1] < 0.05).any()
    np.testing.assert_allclose(full.iloc[-1], brute.mse(model, data.x, data.y).item(), rtol=1e-9)


@pytest.mark.parametrize("algorithm", [GD(), SGD(4)])
@pytest.mark.parametrize("kernel", [False, True])
def test_divergence_is_a_result_and_the_history_is_kept(algorithm: GD | SGD, kernel: bool) -> None:
    recipe = Recipe(torch.float32)
    history = train(
        recipe.model(),
        recipe.split(),
        algorithm=algorithm,
        schedule=Constant(30.0),
        recorders=[BatchCriticalRate()] if kernel else [],
        stop=Stop(max_steps=500, diverged_above=1e30),
        validate_every=1,
    )
    assert history.result == "diverged"
    m = history.metrics
    assert 2 <= len(m) < 500
    assert m["loss"].iloc[0] < 10
    assert m["loss"].iloc[-2] > 1e4
    assert m["lr"].iloc[:-1].tolist() == [30.0] * (len(m) - 1)
    assert np.isnan(m["lr"].iloc[-1])
    assert history.best is not None
    assert np.isfinite(history.best.validation_loss)
    assert history.best.test_loss is not None
    assert np.isfinite(history.best.test_loss)


def test_a_loss_above_the_stated_multiple_is_divergence(recipe: Recipe) -> None:
    def run(multiple: float) -> cx.training.History:
        return train(
            recipe.model(),
            recipe.data(),
            algorithm=GD(),
            schedule=Constant(3.0, relative=True),
            stop=Stop(max_steps=12, diverged_above=multiple),
        )

    losses = run(1e300).metrics["loss"].to_numpy()
    peak = losses.max() / losses[0]
    assert peak > 1.5  # a spike or a blow-up: there is something to detect
    assert run(1.01 * peak).result == "max_steps"
    caught = run(0.5 * (1 + peak))
    assert caught.result == "diverged"
    assert caught.metrics["loss"].iloc[-1] > 0.5 * (1 + peak) * losses[0]


def test_not_finite_before_the_first_step_is_an_error(recipe: Recipe) -> None:
    data = recipe.data()
    x = data.x.clone()
    x[3, 2] = float("nan")
    for algorithm in (GD(), SGD(2)):
        with pytest.raises(cx.NonFinite):
            train(
                recipe.model(),
                Dataset(x, data.y),
                algorithm=algorithm,
                schedule=Constant(0.1),
                stop=Stop(max_steps=3),
            )


def test_zero_steps_describe_the_initial_parameters(recipe: Recipe) -> None:
    for algorithm in (GD(), SGD(3)):
        model, data = recipe.model(), recipe.split()
        history = train(model, data, algorithm=algorithm, schedule=Constant(0.1), stop=Stop(max_steps=0))
        assert len(history.metrics) == 1
        assert history.best is not None
        assert history.best.step == 0
        torch.testing.assert_close(brute.flat(model), brute.flat(recipe.model()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"data": 3}, TypeError, "data: expected a Split or a Dataset, got int"),
        (
            {"algorithm": "SGD"},
            TypeError,
            "algorithm: expected one such as GD.. or SGD.batch_size., got 'SGD'",
        ),
        ({"schedule": 0.1}, TypeError, "schedule: expected a schedule such as Constant.lr., got float"),
        ({"stop": 3}, TypeError, "stop: expected a Stop, got int"),
        ({"run": "runs/a"}, TypeError, "run: expected a RunFolder, got str"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"recorders": [3]}, TypeError, "recorders: expected Recorder objects, got int"),
        ({"algorithm": SGD(14)}, ValueError, "batch_size: expected at most the 13 training samples, got 14"),
        ({"validate_every": 0}, ValueError, "validate_every: expected an integer >= 1, got 0"),
        ({"best_by": "accuracy"}, ValueError, 'best_by: expected "loss" or "error", got \'accuracy\''),
        ({"best_by": "error"}, ValueError, "targets are no class labels"),
        (
            {"algorithm": SGD(2), "recorders": [Spectrum()]},
            ValueError,
            "probe: expected a Dataset for Spectrum",
        ),
        ({"probe": Recipe().data()}, ValueError, "probe: expected a recorder that observes it"),
        (
            {"recorders": [Spectrum(), Spectrum(every=2)]},
            ValueError,
            "recorders: expected different columns, got .*critical_lr",
        ),
        ({"recorders": [Spectrum(k=14)]}, ValueError, "k: expected at most the 13 kernel rows, got 14"),
        (
            {"data": Recipe(torch.float32).data()},
            ValueError,
            "data.train.x: expected the model's torch.float64 on cpu, got torch.float32 on cpu",
        ),
        (
            {"data": Split(Recipe().data(), Recipe(d=6).data())},
            ValueError,
            "data.validation: expected samples shaped like the training set's",
        ),
        ({"model": nn.ReLU()}, ValueError, "model: expected at least one parameter"),
        ({"data": Recipe(c=2).data()}, ValueError, r"y: expected shape \(n, c\) = \(13, 1\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    recipe: Recipe, change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {
        "model": recipe.model(),
        "data": recipe.data(),
        "algorithm": GD(),
        "schedule": Constant(0.1),
        "stop": Stop(max_steps=1),
    }
    arguments.update(change)
    with pytest.raises(error, match=message):
        train(arguments.pop("model"), arguments.pop("data"), **arguments)  # type: ignore[arg-type]
