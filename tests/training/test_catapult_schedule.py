"""Catapult after catapult without divergence, where raising the rate without a safe rule diverges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import catapult_ext as cx
from catapult_ext.data import Dataset
from catapult_ext.training import Reading

FCN_SEEDS = range(20)
CNN_SEEDS = range(5)


def digits(seed: int, n: int) -> Dataset:
    return cx.data.load("digits", classes=(7, 9), train=n, validation=0, test=0, seed=seed).train


def rank_2(seed: int, n: int) -> Dataset:
    return cx.data.multi_index("rank-2", train=n, validation=1, test=1, d=20, seed=seed).train


def fcn(data: Dataset, seed: int, depth: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    return cx.models.FCN(data.x[0].numel(), 128, depth, generator=generator)


def cnn(data: Dataset, seed: int) -> nn.Module:
    return cx.models.CNN(1, 8, 16, 4, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, data: Dataset, schedule: cx.Schedule, steps: int, **changes: Any) -> cx.History:
    arguments: dict[str, Any] = {"algorithm": cx.GD(), "recorders": [cx.Spectrum(k=5)], **changes}
    return cx.train(model, data, schedule=schedule, stop=cx.Stop(max_steps=steps), **arguments)


def check(history: cx.History, c: float, at_least: int) -> None:
    """No divergence, catapult after catapult, and at no step a rate above c times the critical rate."""
    assert history.result == "max_steps"
    m = history.metrics.iloc[:-1]
    assert ((m["lr"] / m["critical_lr"]) <= c * (1 + 1e-5)).all()
    assert m["loss"].max() < 1e3 * m["loss"].iloc[0]
    assert len(cx.CatapultDetector().find(history)) >= at_least
    raised = np.flatnonzero(np.diff(m["lr"]) > 0) + 1
    assert len(raised) >= at_least - 1
    assert ((m["lr"] / m["critical_lr"]).iloc[raised] > 1).all()


@pytest.mark.parametrize("seeds", [range(2), pytest.param(FCN_SEEDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("make", [digits, rank_2])
def test_fully_connected_networks_never_diverge(make: Any, depth: int, seeds: range) -> None:
    for seed in seeds:
        data = make(seed, 64)
        check(run(fcn(data, seed, depth), data, cx.CatapultSchedule(c=1.5), 150), 1.5, 2)


@pytest.mark.parametrize("seeds", [range(1), pytest.param(CNN_SEEDS, marks=pytest.mark.slow)])
def test_convolutional_networks_never_diverge(seeds: range) -> None:
    for seed in seeds:
        data = digits(seed, 32)
        check(run(cnn(data, seed), data, cx.CatapultSchedule(c=1.5), 100), 1.5, 2)


@dataclass(frozen=True)
class Unguarded(cx.Schedule):
    """Raises the rate after each catapult and does nothing else."""

    c: float
    eigenpairs = 5
    relative_to_critical = True

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        return True

    def lr(self, step: int, state: dict[str, Any], measure: Any) -> float:
        seen = measure()
        detector, inner = cx.CatapultDetector(), state.setdefault("detector", {})
        spike = detector.update(inner, Reading(step, seen.loss, seen.lambda_1, seen.top_loss(5)))
        if step == 0 or (spike is not None and spike.is_catapult):
            state["rate"] = self.c * seen.critical_lr
        return state["rate"]


def test_without_the_rules_the_same_networks_diverge() -> None:
    for seed in (0, 1):
        data = digits(seed, 64)
        assert run(fcn(data, seed, 3), data, Unguarded(1.5), 150).result == "diverged"
        assert run(fcn(data, seed, 3), data, cx.CatapultSchedule(c=1.5), 150).result == "max_steps"
    data = digits(0, 64)  # even the first rise, at a rate that a deep network does not take
    assert run(fcn(data, 0, 5), data, cx.Constant(2.0, relative=True), 150).result == "diverged"
    check(run(fcn(data, 0, 5), data, cx.CatapultSchedule(c=2.0), 150), 2.0, 2)


def test_the_first_rate_and_the_first_rise() -> None:
    data = digits(0, 64)
    schedule = cx.CatapultSchedule(c=1.5, start=0.4, start_steps=12)
    history = run(fcn(data, 0, 3), data, schedule, 40)
    m = history.metrics
    np.testing.assert_allclose(m["lr"][:12], 0.4 * m["critical_lr"][0], rtol=1e-6)
    np.testing.assert_allclose(m["lr"][12], 1.5 * m["critical_lr"][12], rtol=1e-6)
    assert m["measured_critical_lr"].iloc[:-1].notna().all()
    spikes = cx.CatapultDetector().find(history)
    assert spikes
    assert spikes[0].start >= 10
    settled = spikes[0].end + 5
    np.testing.assert_allclose(m["lr"][settled], 1.5 * m["critical_lr"][settled], rtol=1e-6)
    assert m["lr"][settled] > m["lr"][spikes[0].end]


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.GD(momentum=0.5)])
def test_after_the_last_catapult_the_rate_stays_below_the_critical_rate(algorithm: cx.SGD) -> None:
    """With momentum too, whose critical rate is 1 + m times larger."""
    data = rank_2(1, 64)
    schedule = cx.CatapultSchedule(c=1.5, catapults=2, decay=0.5)
    history = run(fcn(data, 1, 3), data, schedule, 150, algorithm=algorithm)
    detector, m = cx.CatapultDetector(), history.metrics
    found = detector.find(history)
    assert len(found) == 2
    np.testing.assert_allclose(m["critical_lr"], (1 + algorithm.momentum) * 64 / m["lambda_1"], rtol=1e-6)
    after = m.iloc[found[-1].end : -1]
    assert (after["lr"] <= 0.5 * after["critical_lr"] * (1 + 1e-6)).all()
    assert (np.diff(after["lr"]) <= 0).all()
    assert m["loss"].iloc[-1] < 1e-3 * m["loss"][0]
    # Momentum rings below its critical rate as well (complex roots): the loss falls on in waves, and each is a spike.
    later = [spike for spike in detector.spikes(history) if spike.end > found[-1].end]
    assert not later or algorithm.momentum
    assert after["loss"].max() < m["loss"].iloc[found[-1].start : found[-1].end].max()


def test_without_decay_the_last_rate_is_kept() -> None:
    data = digits(0, 64)
    history = run(fcn(data, 0, 3), data, cx.CatapultSchedule(c=1.5, catapults=2), 80)
    found = cx.CatapultDetector().find(history)
    after = history.metrics.iloc[found[1].end : -1]
    assert (np.diff(after["lr"]) <= 0).all()


def test_a_spike_above_the_ceiling_is_cut_short_and_the_next_rise_is_gentler() -> None:
    data = rank_2(0, 64)
    history = run(fcn(data, 0, 2), data, cx.CatapultSchedule(c=2.0, ceiling=20.0), 60)
    m = history.metrics
    above = int(np.flatnonzero(m["loss"] > 20.0 * m["loss"][0])[0])
    ratio = m["lr"] / m["critical_lr"]
    assert ratio[above - 1] > 1.9
    assert ratio[above] == pytest.approx(0.5)
    end = next(t for t in range(above, 60) if m["lr"][t] > m["lr"][t - 1])
    assert (ratio[above:end] <= 0.5 * (1 + 1e-6)).all()
    assert ratio[end] == pytest.approx(1.5)  # 1 + (2 - 1) / 2
    assert history.result == "max_steps"


def test_a_rise_that_comes_to_nothing_is_repeated() -> None:
    """A linear model below its critical rate has no spike: the rate is set anew after `patience` steps."""
    data = digits(0, 64)
    schedule = cx.CatapultSchedule(c=1.1, start=0.5, patience=9)
    model = cx.models.FCN(64, 8, 1, generator=torch.Generator().manual_seed(0))
    m = run(model, data, schedule, 20).metrics
    np.testing.assert_allclose(m["lr"][:9], 0.5 * m["critical_lr"][0], rtol=1e-6)
    np.testing.assert_allclose(m["lr"][9:18], 1.1 * m["critical_lr"][0], rtol=1e-5)


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(32)])
def test_decay_after_a_catapult_follows_its_schedule_until_then(algorithm: cx.Algorithm) -> None:
    data = digits(0, 64)
    schedule = cx.DecayAfterCatapult(cx.Stepwise({0: 0.5, 8: 1.6}, relative=True), to=0.4)
    history = run(fcn(data, 0, 3), data, schedule, 60, algorithm=algorithm, probe=data)
    m = history.metrics
    found = cx.CatapultDetector().find(history)
    end = found[0].end
    assert 8 < end < 40
    np.testing.assert_allclose(m["lr"][:8], 0.5 * m["critical_lr"][0], rtol=1e-6)
    np.testing.assert_allclose(m["lr"][8:end], 1.6 * m["critical_lr"][8], rtol=1e-6)
    after = m.iloc[end:-1]
    assert (after["lr"] <= 0.4 * after["critical_lr"] * (1 + 1e-6)).all()
    assert (np.diff(after["lr"]) <= 0).all()
    assert len(found) == 1


def test_measuring_seldom_costs_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches: a pass over the whole set at every fourth step, none shared by two schedules twice."""
    kernels: list[int] = []
    original = cx.Observer.__call__

    def counted(self: cx.Observer, x: torch.Tensor, y: torch.Tensor) -> cx.Observation:
        seen = original(self, x, y)
        if seen.kernel is not None:
            kernels.append(len(x))
        return seen

    monkeypatch.setattr(cx.Observer, "__call__", counted)
    data = digits(0, 64)
    schedule = cx.DecayAfterCatapult(cx.CatapultSchedule(every=4), every=4)
    run(fcn(data, 0, 2), data, schedule, 13, algorithm=cx.SGD(16), recorders=[], engine="general")
    assert kernels == [64] * 4
