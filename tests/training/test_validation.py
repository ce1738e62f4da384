"""Evaluation in chunks, classes, and the best parameters."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import training_reference as brute
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from training_reference import Recipe

from catapult_ext.data import Dataset, Split
from catapult_ext.training import GD, SGD, Constant, Labels, Stop, evaluate, train
from catapult_ext.training.history import MetricsTable
from catapult_ext.training.progress import TrainingProgress


@given(n=st.integers(1, 40), chunk=st.integers(1, 50), c=st.integers(1, 3), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_chunks_give_the_loss_of_the_whole_set(n: int, chunk: int, c: int, seed: int) -> None:
    recipe = Recipe(c=c)
    model, data = recipe.model(seed), recipe.data(n, seed)
    found = evaluate(model, data, chunk=chunk)
    np.testing.assert_allclose(found.loss, brute.mse(model, data.x, data.y).item(), rtol=1e-12)
    assert found.error is None


@given(seed=st.integers(0, 10**6), low=st.sampled_from([-1.0, 0.0]), chunk=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_two_class_error_is_the_share_nearer_to_the_wrong_label(seed: int, low: float, chunk: int) -> None:
    recipe = Recipe()
    generator = torch.Generator().manual_seed(seed)
    y = torch.where(torch.rand(23, 1, generator=generator) < 0.5, low, 1.0).double()
    y[0], y[1] = low, 1.0
    y = y[torch.argsort(y[:, 0])]  # so that chunks hold one class only
    model, data = recipe.model(seed), Dataset(recipe.data(23, seed).x, y)
    labels = Labels.of(y)
    assert labels is not None
    f = model(data.x).detach()
    nearest = torch.where((f - 1).abs() < (f - low).abs(), 1.0, low)
    assert evaluate(model, data, labels=labels, chunk=chunk).error == pytest.approx(
        (nearest != y).double().mean().item()
    )


def test_many_class_error_is_by_the_largest_output() -> None:
    y = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 2]]
    f = torch.tensor([[3.0, 2, 1], [0, 0, 0], [-3, -2, -1], [5, 4, 4.5]]).double()
    labels = Labels.of(y)
    assert labels is not None
    assert labels.wrong(f, y) == 2  # the tie goes to class 0, the last to class 0
    assert evaluate(nn.Identity(), Dataset(f, y), labels=labels).error == 0.5


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[1.0], [1.0]]),
        torch.tensor([[-1.0], [0.0], [1.0]]),
        torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
        torch.tensor([[0.5, 0.5], [0.0, 1.0]]),
    ],
)
def test_other_targets_are_no_classes(y: torch.Tensor) -> None:
    assert Labels.of(y) is None


def test_evaluation_refuses_an_output_that_would_broadcast(recipe: Recipe) -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :2]

    with pytest.raises(ValueError, match=r"model: expected an output of shape \(13, 1\), got \(13, 2\)"):
        evaluate(Wide(), recipe.data())


def test_evaluation_leaves_each_module_in_its_own_mode(recipe: Recipe) -> None:
    model = recipe.model(norm=True)
    model[1].eval()
    modes = [m.training for m in model.modules()]
    statistics = model[1].running_mean.clone()
    model[0].weight.data[0, 0] = 1.0
    evaluate(model, recipe.data())
    assert [m.training for m in model.modules()] == modes

    def failing(*_: object) -> None:
        raise RuntimeError("planned")

    handle = model[2].register_forward_hook(failing)
    model[1].train()
    with pytest.raises(RuntimeError, match="planned"):
        evaluate(model, recipe.data())
    handle.remove()
    assert model[1].training
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("best_by", ["loss", "error"])
def test_best_parameters_are_those_of_the_first_minimum(recipe: Recipe, best_by: str) -> None:
    def labelled(data: Dataset) -> Dataset:
        return Dataset(data.x, torch.where(data.y > 0, 1.0, -1.0).double(), data.name)

    parts = recipe.split()
    assert parts.validation is not None
    assert parts.test is not None
    split = Split(labelled(parts.train), labelled(parts.validation), labelled(parts.test))
    model = recipe.model()
    history = train(
        model,
        split,
        algorithm=SGD(3),
        schedule=Constant(0.2),
        stop=Stop(max_steps=200),
        validate_every=2,
        best_by=best_by,
        seed=1,
    )
    column = history.metrics[f"validation_{best_by}"]
    assert column.notna().tolist() == [t % 2 == 0 for t in range(201)]
    best = history.best
    assert best is not None
    assert best.step == column.idxmin()
    assert best.step < 200  # else nothing is shown
    row = history.metrics.iloc[best.step]
    assert (best.validation_loss, best.validation_error) == (row["validation_loss"], row["validation_error"])

    twin = recipe.model()
    twin.load_state_dict(best.state_dict)
    assert split.validation is not None
    assert split.test is not None
    loss = brute.mse(twin, split.validation.x, split.validation.y).item()
    np.testing.assert_allclose(best.validation_loss, loss, rtol=1e-9)
    np.testing.assert_allclose(best.test_loss, brute.mse(twin, split.test.x, split.test.y).item(), rtol=1e-9)
    wrong = (twin(split.test.x).sign() != split.test.y).double().mean().item()
    assert best.test_error == pytest.approx(wrong)

    np.testing.assert_allclose(  # the model itself holds the final parameters
        history.metrics["train_loss"].iloc[-1],
        brute.mse(model, split.train.x, split.train.y).item(),
        rtol=1e-9,
    )


def test_without_validation_there_is_no_best(recipe: Recipe) -> None:
    history = train(
        recipe.model(), recipe.data(), algorithm=GD(), schedule=Constant(0.1), stop=Stop(max_steps=2)
    )
    assert history.best is None
    assert "validation_loss" not in history.metrics


def test_metrics_table_grows_and_gives_rows_back() -> None:
    table = MetricsTable(["step", "loss", "catapult"])
    values = np.random.default_rng(0).standard_normal(2500)
    for t in range(2500):
        table.begin_row()
        table.put(t, "step", t)
        if t % 3:
            table.put(t, "loss", values[t])
        if t % 2 == 0:
            table.put(t, "catapult", t % 4 == 0)
    again = MetricsTable(table.names)
    again.append_records(table.records())
    frame = table.frame()
    assert frame.equals(again.frame())
    assert frame["step"].tolist() == list(range(2500))
    assert frame["loss"].isna().tolist() == [t % 3 == 0 for t in range(2500)]
    assert frame["loss"][1] == values[1]
    assert frame["catapult"].dtype == "boolean"
    assert frame["catapult"][:4].tolist()[::2] == [True, False]
    assert frame["catapult"].isna().sum() == 1250
    assert table.records(2499) == [{"step": 2499}]  # 2499 is odd and a multiple of 3
    assert table.records(4, 5) == [{"step": 4, "loss": values[4], "catapult": True}]
    assert table.records(4)[0] == {"step": 4, "loss": values[4], "catapult": True}


def test_progress_shows_loss_rate_and_critical_rate_on_a_terminal_only() -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        bar = TrainingProgress(True, 10, Console(file=screen, force_terminal=terminal, width=100))
        with bar:
            assert bar.due() == terminal
            if terminal:
                bar.show(4, 0.125, 3.5, 7.25)
                assert not bar.due()
        text = screen.getvalue()
        assert ("loss 0.125  rate 3.5  critical 7.25" in text) == terminal
        assert ("4/10" in text) == terminal
        assert terminal or text == ""
    silent = io.StringIO()
    with TrainingProgress(False, 10, Console(file=silent, force_terminal=True)) as bar:
        assert not bar.due()
    assert silent.getvalue() == ""
