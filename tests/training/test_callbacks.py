"""What callbacks get to see, and how they end a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import training_reference as brute
from torch import nn
from training_reference import Recipe

import catapult_ext as cx

ARGUMENTS: dict[str, Any] = {"schedule": cx.Constant(0.2), "stop": cx.Stop(max_steps=6), "validate_every": 2}


class Diary(cx.Callback):
    """Writes down every event; its state is the number of steps that it has seen."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.seen = 0

    def on_start(self, model: nn.Module, step: int) -> None:
        self.events.append(("start", step, self.seen))

    def on_step(self, row: Mapping[str, float], model: nn.Module) -> None:
        self.seen += 1
        self.events.append(("step", dict(row), brute.flat(model).clone()))

    def on_validation(self, row: Mapping[str, float], model: nn.Module, improved: bool) -> None:
        self.events.append(("validation", row["step"], row["validation_loss"], improved))

    def on_end(self, history: cx.History) -> None:
        self.events.append(("end", history))

    def state_dict(self) -> Any:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(5), cx.Adam(5)])
def test_events_come_in_order_with_their_numbers(algorithm: cx.Algorithm, recipe: Recipe) -> None:
    diary, model = Diary(), recipe.model()
    recorders = [cx.BatchCriticalRate(every=3)]
    history = cx.train(
        model, recipe.split(), algorithm=algorithm, recorders=recorders, callbacks=[diary], **ARGUMENTS
    )
    kinds = [event[0] for event in diary.events]
    pair = ["validation", "step", "step"]
    assert kinds == ["start", *pair, *pair, *pair, "validation", "end"]
    assert diary.events[0] == ("start", 0, 0)
    assert diary.events[-1][1] is history
    for t, (_, row, parameters) in enumerate(diary.of("step")):
        expected = history.metrics.iloc[t].dropna()
        assert row == expected.to_dict()
        assert ("batch_critical_lr" in row) == (t % 3 == 0 and algorithm.critical_factor is not None)
        if t == 5:
            assert torch.equal(parameters, brute.flat(model))
    best = float("inf")
    for _, step, loss, improved in diary.of("validation"):
        assert loss == history.metrics["validation_loss"][step]
        assert improved == (loss < best)
        best = min(best, loss)


class StopAt(cx.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, row: Mapping[str, float], model: nn.Module) -> bool:
        return row["step"] == self.step


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(5)])
def test_a_callback_ends_a_run_with_a_full_last_row(algorithm: cx.Algorithm, recipe: Recipe) -> None:
    model, data = recipe.model(), recipe.split()
    history = cx.train(
        model,
        data,
        algorithm=algorithm,
        recorders=[cx.Spectrum(every=100)],
        probe=data.train,
        callbacks=[StopAt(2), Diary()],
        **ARGUMENTS,
    )
    assert history.result == "stopped"
    assert history.metrics["step"].tolist() == [0, 1, 2, 3]
    last = history.metrics.iloc[-1]
    assert last["train_loss"] == pytest.approx(brute.mse(model, data.train.x, data.train.y).item())
    assert last[["validation_loss", "lambda_1"]].notna().all()


class Cut(Exception):
    pass


class Bomb(cx.Callback):
    def on_step(self, row: Mapping[str, float], model: nn.Module) -> None:
        if row["step"] == 3:
            raise Cut


def test_a_resumed_run_gives_callbacks_their_state(recipe: Recipe, tmp_path: Path) -> None:
    folder = cx.RunFolder(tmp_path, "cut", {}, 0, checkpoint_seconds=0)
    arguments = {"algorithm": cx.SGD(5), "run": folder, **ARGUMENTS}
    with pytest.raises(Cut):
        cx.train(recipe.model(), recipe.split(), callbacks=[Diary(), Bomb()], **arguments)
    with pytest.raises(ValueError, match=r"callbacks: expected also \['Diary'\], whose state"):
        cx.train(recipe.model(), recipe.split(), **arguments)
    diary = Diary()
    history = cx.train(recipe.model(), recipe.split(), callbacks=[diary], **arguments)
    assert diary.events[0] == ("start", 3, 3)
    assert diary.seen == 6
    assert [row["step"] for _, row, _ in diary.of("step")] == [3, 4, 5]
    quiet = Diary()
    loaded = cx.train(recipe.model(), recipe.split(), callbacks=[quiet], **arguments)
    assert quiet.events == []
    assert loaded.metrics.equals(history.metrics)


def test_what_is_no_callback_is_named(recipe: Recipe) -> None:
    with pytest.raises(TypeError, match="callbacks: expected Callback objects, got function"):
        cx.train(
            recipe.model(),
            recipe.data(),
            algorithm=cx.GD(),
            callbacks=[lambda: None],
            **ARGUMENTS,  # type: ignore[list-item]
        )


def test_patience_ends_a_run_that_no_longer_improves(recipe: Recipe) -> None:
    arguments = {"algorithm": cx.SGD(3), "schedule": cx.Constant(0.2), "validate_every": 2, "seed": 1}
    free = cx.train(recipe.model(), recipe.split(), stop=cx.Stop(max_steps=300), **arguments)
    losses = free.metrics["validation_loss"]
    patience = 11
    best, end = 0, None
    for t in range(301):
        if t - best >= patience:
            end = t
            break
        if losses[t] < losses[best]:
            best = t
    assert end is not None
    assert 10 < end < 300
    history = cx.train(
        recipe.model(), recipe.split(), stop=cx.Stop(max_steps=300, patience=patience), **arguments
    )
    assert history.result == "no_improvement"
    assert history.metrics["step"].iloc[-1] == end
    assert history.best is not None
    assert history.best.step == best or losses[end] < losses[best]
    with pytest.raises(ValueError, match="patience: expected a validation set"):
        cx.train(recipe.model(), recipe.data(), stop=cx.Stop(max_steps=1, patience=1), **arguments)
    with pytest.raises(ValueError, match="patience: expected None or an integer >= 1, got 0"):
        cx.Stop(max_steps=1, patience=0)
