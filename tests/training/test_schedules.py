"""Cyclical rates, warm-up, schedules in units of the critical rate, and their resumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import training_reference as brute
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_reference import Recipe

import catapult_ext as cx


def rates(schedule: cx.Schedule, steps: int) -> list[float]:
    """The rates of an absolute schedule."""

    def forbidden() -> cx.training.Measurement:
        raise AssertionError("an absolute schedule measured")

    state: dict[str, object] = {}
    assert not any(schedule.measures(t, state) for t in range(steps))
    return [schedule.lr(t, state, forbidden) for t in range(steps)]


@given(low=st.floats(1e-3, 1.0), ratio=st.floats(1.01, 100.0), period=st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_cyclical_rates_are_a_triangle(low: float, ratio: float, period: int) -> None:
    high = low * ratio
    found = rates(cx.Cyclical(low, high, period), 3 * period)
    corners = [0, period / 2, period, 1.5 * period, 2 * period, 2.5 * period, 3 * period]
    expected = np.interp(np.arange(3 * period), corners, [low, high, low, high, low, high, low])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(steps=st.integers(1, 30), rate=st.floats(1e-3, 10.0))
@settings(max_examples=30, deadline=None)
def test_warm_up_rises_linearly_into_its_schedule(steps: int, rate: float) -> None:
    inner = cx.Stepwise({0: rate, 5: 2 * rate, 40: 0.5 * rate})
    ramp = [min(1.0, (t + 1) / steps) for t in range(50)]
    np.testing.assert_allclose(
        rates(cx.WarmUp(inner, steps), 50), np.multiply(ramp, rates(inner, 50)), rtol=1e-12
    )


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(5), cx.GD(momentum=0.6)])
def test_relative_rates_are_multiples_of_the_critical_rate_at_the_start(
    algorithm: cx.SGD, recipe: Recipe
) -> None:
    data = recipe.data()
    schedule = cx.WarmUp(cx.Cyclical(0.1, 0.5, 4, relative=True), 2)
    history = cx.train(
        recipe.model(), data, algorithm=algorithm, schedule=schedule, stop=cx.Stop(max_steps=9)
    )
    critical = brute.critical_lr(recipe.model(), data.x) * (1 + algorithm.momentum)
    expected = np.array([0.05, 0.3, 0.5, 0.3, 0.1, 0.3, 0.5, 0.3, 0.1]) * critical
    np.testing.assert_allclose(history.metrics["lr"][:9], expected, rtol=1e-9)
    assert history.metrics["measured_critical_lr"].notna().sum() == 1


class Cut(Exception):
    pass


class Bomb(cx.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, row: Mapping[str, float], model: nn.Module) -> None:
        if row["step"] == self.step:
            raise Cut


SCHEDULES: dict[str, cx.Schedule] = {
    "cyclical": cx.Cyclical(0.2, 1.2, 7, relative=True),
    "warm-up": cx.WarmUp(cx.Stepwise({0: 0.5, 6: 0.8}, relative=True), 10),
    "catapult": cx.CatapultSchedule(c=2.0, catapults=2, decay=0.5, settle=1, patience=4),
    "decay": cx.DecayAfterCatapult(cx.Constant(2.0, relative=True)),
    "warm-up of a catapult": cx.WarmUp(cx.CatapultSchedule(c=2.0, start=0.5, start_steps=3), 5),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(8, momentum=0.2)])
def test_schedules_resume_to_the_same_bits(
    name: str, algorithm: cx.Algorithm, recipe: Recipe, tmp_path: Path
) -> None:
    arguments = {
        "algorithm": algorithm,
        "schedule": SCHEDULES[name],
        "stop": cx.Stop(max_steps=30),
        "recorders": [cx.BatchCriticalRate(every=3)],
    }
    whole_model, model = recipe.model(), recipe.model()
    whole = cx.train(whole_model, recipe.data(), **arguments)
    folder = cx.RunFolder(tmp_path, "cut", {}, 0, checkpoint_seconds=0)
    for cut in (3, 8, 14):  # three interruptions of one run
        with pytest.raises(Cut):
            cx.train(recipe.model(), recipe.data(), run=folder, callbacks=[Bomb(cut)], **arguments)
    again = cx.train(model, recipe.data(), run=folder, **arguments)
    assert again.metrics.equals(whole.metrics)
    for value, expected in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert value.equal(expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cx.Cyclical(0.5, 0.5, 4), ValueError, "high: expected a rate above low = 0.5, got 0.5"),
        (lambda: cx.Cyclical(-1, 0.5, 4), ValueError, "low: expected a positive finite number, got -1"),
        (lambda: cx.Cyclical(0.1, 0.5, 1), ValueError, "period: expected an integer >= 2, got 1"),
        (
            lambda: cx.WarmUp(0.5, 4),
            TypeError,
            "schedule: expected a schedule such as Constant.lr., got float",
        ),
        (lambda: cx.WarmUp(cx.Constant(1), 0), ValueError, "steps: expected an integer >= 1, got 0"),
        (lambda: cx.CatapultSchedule(c=1.0), ValueError, "c: expected a multiple .* above 1, got 1.0"),
        (lambda: cx.CatapultSchedule(decay=0.5), ValueError, "catapults: expected a number, since decay"),
        (
            lambda: cx.CatapultSchedule(catapults=1, decay=1.0),
            ValueError,
            r"decay: expected None or .* \(0, 1\)",
        ),
        (lambda: cx.CatapultSchedule(settle=-1), ValueError, "settle: expected an integer >= 0, got -1"),
        (lambda: cx.CatapultSchedule(ceiling=1), ValueError, "ceiling: expected a number > 1, got 1"),
        (lambda: cx.CatapultSchedule(s=0), ValueError, "s: expected an integer >= 1, got 0"),
        (lambda: cx.DecayAfterCatapult(3), TypeError, "schedule: expected a schedule"),
        (
            lambda: cx.DecayAfterCatapult(cx.Constant(1), to=2),
            ValueError,
            r"to: expected a number in \(0, 1\)",
        ),
        (lambda: cx.DecayAfterCatapult(cx.Constant(1), detector=3), TypeError, "detector: expected a Catap"),
        (lambda: cx.CatapultDetector(rise=1.0), ValueError, "rise: expected a finite number > 1, got 1.0"),
        (lambda: cx.CatapultDetector(drop=1.5), ValueError, r"drop: expected a number in \(0, 1\), got 1.5"),
        (lambda: cx.CatapultDetector(window=0), ValueError, "window: expected an integer >= 1, got 0"),
        (lambda: cx.CatapultDetector(excess=-1), ValueError, "excess: expected a finite number >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
