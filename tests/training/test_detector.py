"""The detector on trained networks: catapults are found, planted spikes of other kinds are not taken for any."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.data import Dataset
from catapult_ext.training import Reading

N = 64
#: Rates in units of the critical rate of the set: two pushes beyond it, calm before, between and after. The critical
#: rate of a batch of 16 can be half of the set's, so less of a push does, and calm has to be calmer.
RATES = {
    None: {0: 0.4, 20: 1.6, 60: 0.4, 270: 1.6, 320: 0.4},
    16: {0: 0.3, 20: 1.4, 60: 0.3, 270: 1.4, 320: 0.3},
}
PUSHES = (range(18, 60), range(268, 320))
#: Step at which each disturbance begins, and for how many steps it lasts.
PLANTED = {
    "some labels flipped": (80, 1),
    "some labels flipped for long": (110, 4),
    "all labels flipped": (140, 1),
    "noise on the labels": (170, 2),
    "a bad batch": (200, 1),
    "noise on the parameters": (230, 1),
}


def task(name: str, seed: int) -> Dataset:
    """64 points: two digits, or the rank-2 polynomial of 20 coordinates."""
    if name == "digits":
        return cx.data.load("digits", classes=(7, 9), train=N, validation=0, test=0, seed=seed).train
    return cx.data.multi_index("rank-2", train=N, validation=1, test=1, d=20, seed=seed).train


class Disturbances(cx.Callback):
    """Plants spikes that are no catapults.

    Labels of the probe change with those of the training set, except for those of the bad batch: what spikes
    there is the loss of the whole set, after one step in a wrong direction.
    """

    def __init__(self, data: Dataset, probe: Dataset, batches: list[Tensor], seed: int) -> None:
        self.data, self.probe, self.batches = data, probe, batches
        self.clean = data.y.clone()
        self.generator = torch.Generator().manual_seed(seed)

    def on_step(self, row: Mapping[str, float], model: nn.Module) -> None:
        step = int(row["step"]) + 1
        y = self.clean.clone()
        self.probe.y.copy_(y)
        self.data.y.copy_(y)
        kind = next((k for k, (at, length) in PLANTED.items() if at <= step < at + length), None)
        if kind is None:
            return
        if kind == "a bad batch":
            self.data.y[self.batches[step]] *= -4
            return
        if kind == "noise on the parameters":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=self.generator))
            return
        if kind == "all labels flipped":
            y *= -1
        elif kind == "noise on the labels":
            y += 2 * torch.randn(y.shape, generator=self.generator)
        else:
            y[torch.randperm(N, generator=self.generator)[: N // 4]] *= -1
        self.probe.y.copy_(y)
        self.data.y.copy_(y)


def disturbed_run(name: str, batch_size: int | None, seed: int) -> cx.History:
    """A 3-layer network with two catapults and the planted spikes in between."""
    source = task(name, seed)
    data, probe = (Dataset(source.x, source.y.clone()) for _ in range(2))
    algorithm = cx.GD() if batch_size is None else cx.SGD(batch_size)
    order = algorithm.order(N, seed)
    batches = [next(order) for _ in range(350)]
    return cx.train(
        cx.models.FCN(data.x[0].numel(), 128, 3, generator=torch.Generator().manual_seed(seed)),
        data,
        algorithm=algorithm,
        schedule=cx.Stepwise(RATES[batch_size], relative=True),
        recorders=[cx.Spectrum(k=5), cx.BatchCriticalRate()],
        probe=probe,
        stop=cx.Stop(max_steps=350),
        seed=seed,
        callbacks=[Disturbances(data, probe, batches, seed)],
    )


#: What would be called a catapult, by the evidence that is looked at beside the spike itself.
RULES = {
    "nothing": lambda spike: True,
    "norm": lambda spike: spike.norm.holds,
    "location": lambda spike: spike.location.holds,
    "norm, location": lambda spike: spike.norm.holds and spike.location.holds,
    "norm, location, rate": lambda spike: spike.is_catapult,
}


def tally(found: list[cx.Spike]) -> tuple[int, int, int]:
    """(pushes whose catapult was found, pushes in which none was, spikes elsewhere taken for one)."""
    hit = sum(any(spike.start in push for spike in found) for push in PUSHES)
    wrong = sum(not any(spike.start in push for push in PUSHES) for spike in found)
    return hit, len(PUSHES) - hit, wrong


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(20), marks=pytest.mark.slow)])
def test_precision_and_recall_among_planted_spikes(seeds: range) -> None:
    """Catapults of GD and of batches of 16, on two tasks, among six other spikes in each run."""
    counts = {rule: np.zeros(3, dtype=int) for rule in RULES}
    planted: dict[str, list[bool]] = {kind: [] for kind in PLANTED}
    for name in ("digits", "rank-2"):
        for batch_size in (None, 16):
            for seed in seeds:
                history = disturbed_run(name, batch_size, seed)
                assert history.result == "max_steps"
                spikes = cx.CatapultDetector().spikes(history)
                loss = history.metrics["top_loss"] + history.metrics["rest_loss"]
                for kind, (at, length) in PLANTED.items():
                    planted[kind].append(loss[at : at + length + 8].max() > 1.5 * loss[at - 5 : at].min())
                for rule, holds in RULES.items():
                    counts[rule] += tally([spike for spike in spikes if holds(spike)])
    precision = {rule: hit / (hit + wrong) for rule, (hit, _, wrong) in counts.items()}
    recall = {rule: hit / (hit + missed) for rule, (hit, missed, _) in counts.items()}
    print("hit, missed, wrong:", counts)
    for kind, spiked in planted.items():
        assert np.mean(spiked) >= 0.85, f"{kind}: too few spikes to be taken for a catapult"
    assert recall["norm, location, rate"] >= 0.97
    assert precision["norm, location, rate"] >= 0.97
    # Each piece of evidence is needed: with less of it the planted spikes pass.
    assert precision["nothing"] < 0.3
    assert precision["nothing"] < precision["norm"] < precision["norm, location"]
    assert precision["nothing"] < precision["location"] < precision["norm, location"]
    assert precision["norm, location"] < precision["norm, location, rate"]


def plain_run(multiple: float, seed: int, **changes: object) -> cx.History:
    data = task("digits", seed)
    arguments: dict[str, object] = {
        "recorders": [cx.Spectrum(k=5)],
        "stop": cx.Stop(max_steps=40),
        **changes,
    }
    return cx.train(
        cx.models.FCN(64, 128, 3, generator=torch.Generator().manual_seed(seed)),
        data,
        algorithm=cx.GD(),
        schedule=cx.Constant(multiple, relative=True),
        **arguments,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_evidence_is_what_the_history_shows(seed: int) -> None:
    history = plain_run(2.0, seed)
    spike = cx.CatapultDetector().find(history)[0]
    m = history.metrics
    loss, start, peak, end = m["loss"], spike.start, spike.peak, spike.end
    assert start < peak < end
    assert loss[start] == loss[: peak + 1].min()
    assert loss[peak] == loss[start : end + 1].max()
    assert loss[end] <= loss[start] + 0.1 * (loss[peak] - loss[start]) < loss[end - 1]
    assert spike.height.measured == pytest.approx(loss[peak] / loss[start], rel=1e-5)
    assert spike.norm.measured == m["lambda_1"][end] / m["lambda_1"][start]
    rise = m.loc[start + 1 : peak]
    rise = rise[rise["loss"] >= (loss[start] + loss[peak]) / 2]
    share = ((rise["top_loss"] - m["top_loss"][start]) / (rise["loss"] - loss[start])).max()
    assert spike.location.measured == pytest.approx(min(1.0, share), rel=1e-5)
    ratio = (m["lr"] / m["critical_lr"])[start:peak].max()
    assert spike.rate.measured == pytest.approx(ratio)
    for evidence, bound in (
        (spike.height, 1.5),
        (spike.norm, 0.95),
        (spike.location, 0.8),
        (spike.rate, 1.0),
    ):
        assert evidence.bound == bound
        assert evidence.holds
    assert spike.is_catapult


@pytest.mark.parametrize("seed", range(3))
def test_below_the_critical_rate_there_is_nothing_to_find(seed: int) -> None:
    history = plain_run(0.6, seed)
    assert cx.CatapultDetector().spikes(history) == []


def test_dense_records_around_a_spike_suffice() -> None:
    full = plain_run(2.0, 0, one_pass=False)
    recorders = [cx.Spectrum(k=5, every=cx.AroundSpikes(before=4, after=8))]
    sparse = plain_run(2.0, 0, recorders=recorders)
    assert sparse.metrics["lambda_1"].isna().sum() > 5
    found = cx.CatapultDetector().find(sparse)[0]
    assert found == cx.CatapultDetector().find(full)[0]


def frame(loss: list[float], norm: list[float], top: list[float], **columns: list[float]) -> pd.DataFrame:
    rest = np.subtract(loss, top)
    steps = range(len(loss))
    return pd.DataFrame({"step": steps, "lambda_1": norm, "top_loss": top, "rest_loss": rest, **columns})


def test_each_missing_piece_of_evidence_is_named_by_the_spike() -> None:
    """One made-up history per case, each like a catapult but for one number."""
    loss, norm, top = [1.0, 2.0, 5.0, 3.0, 0.5], [8.0, 8.0, 6.0, 4.0, 4.0], [0.5, 1.5, 4.4, 2.4, 0.1]
    rates = {"lr": [2.0] * 5, "critical_lr": [1.5] * 5}
    cases = {
        "": frame(loss, norm, top, **rates),
        "norm": frame(loss, [8.0, 8.0, 9.0, 8.0, 7.9], top, **rates),
        "location": frame(loss, norm, [0.5, 0.9, 3.5, 2.0, 0.1], **rates),
        "rate": frame(loss, norm, top, lr=[1.4] * 5, critical_lr=[1.5] * 5),
    }
    for missing, metrics in cases.items():
        (spike,) = cx.CatapultDetector().spikes(metrics)
        assert (spike.start, spike.peak, spike.end) == (0, 2, 4)
        for name in ("height", "norm", "location", "rate"):
            assert getattr(spike, name).holds == (name != missing)
        assert spike.is_catapult == (missing == "")
        assert cx.CatapultDetector().find(metrics) == ([] if missing else [spike])


def test_batches_count_by_their_own_critical_rate() -> None:
    loss, norm, top = [1.0, 5.0, 0.5], [8.0, 6.0, 4.0], [0.5, 4.4, 0.1]
    rates = {"lr": [2.0] * 3, "critical_lr": [9.0] * 3}
    (spike,) = cx.CatapultDetector().spikes(frame(loss, norm, top, **rates))
    assert not spike.is_catapult
    (spike,) = cx.CatapultDetector().spikes(
        frame(loss, norm, top, **rates, batch_critical_lr=[0.5, 9.0, 9.0])
    )
    assert spike.rate.measured == 4.0
    assert spike.is_catapult
    (spike,) = cx.CatapultDetector().spikes(frame(loss, norm, top))
    assert np.isnan(spike.rate.measured)
    assert spike.is_catapult  # what is not known speaks neither way


def test_a_spike_that_has_not_come_down_is_not_reported() -> None:
    metrics = frame([1.0, 3.0, 9.0, 27.0], [8.0, 7.0, 6.0, 5.0], [0.9, 2.9, 8.9, 26.9])
    assert cx.CatapultDetector().spikes(metrics) == []


def test_a_loss_that_moves_to_another_level_is_no_spike_and_hides_none() -> None:
    calm, spike = [1.0] * 5 + [2.0] * 30, [2.0, 6.0, 12.0, 5.0, 2.0]
    norm = [8.0] * len(calm) + [8.0, 8.0, 6.0, 4.0, 4.0]
    loss = calm + spike
    metrics = frame(loss, norm, [0.9 * value for value in loss])
    (found,) = cx.CatapultDetector(patience=20).spikes(metrics)
    assert (found.peak, found.end) == (len(calm) + 2, len(calm) + 4)
    assert found.height.measured == 6.0
    (merged,) = cx.CatapultDetector(patience=60).spikes(metrics)  # one that waits longer sees a single spike
    assert (merged.start, merged.height.measured) == (0, 12.0)


def test_a_history_without_a_spectrum_is_refused() -> None:
    with pytest.raises(
        ValueError, match="history: expected the columns of Spectrum, got none named 'top_loss'"
    ):
        cx.CatapultDetector().find(pd.DataFrame({"step": [0], "lambda_1": [1.0]}))


@given(seed=st.integers(0, 10**6), length=st.integers(1, 60), cut=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_following_a_run_gives_the_spikes_of_its_history(seed: int, length: int, cut: int) -> None:
    """Also when the state is stored and read again on the way; and every spike is what its fields say."""
    generator = np.random.default_rng(seed)
    loss = np.exp(generator.normal(0, 1.0, length).cumsum() * 0.5)
    top = loss * generator.uniform(0, 1, length)
    norm = np.exp(generator.normal(0, 0.2, length))
    detector, state, found = cx.CatapultDetector(), {}, []
    for t in range(length):
        if t == cut:
            state = json.loads(json.dumps(state))
        spike = detector.update(state, Reading(t, loss[t], norm[t], top[t]))
        found += [spike] if spike is not None else []
    whole = detector.spikes(frame(list(loss), list(norm), list(top)))
    assert [(s.start, s.peak, s.end, s.is_catapult) for s in found] == [
        (s.start, s.peak, s.end, s.is_catapult) for s in whole
    ]
    for spike in found:
        assert loss[spike.peak] == loss[spike.start : spike.end].max()
        assert loss[spike.peak] >= 1.5 * loss[spike.start]
    assert all(before.end <= after.start for before, after in pairwise(found))


def test_a_spike_that_starts_from_nothing_is_judged_and_no_catapult() -> None:
    """Loss and norm are exactly zero before it: the height has no bound, and the norm has not dropped."""
    state: dict[str, object] = {}
    detector = cx.CatapultDetector()
    values = [(0.0, 0.0), (1.0, 2.0), (0.0, 1.0)]
    found = [
        detector.update(state, cx.training.Reading(step, loss, norm, loss, 1.5))
        for step, (loss, norm) in enumerate(values)
    ]
    (spike,) = [spike for spike in found if spike is not None]
    assert spike.height.measured == math.inf
    assert spike.height.holds
    assert not spike.norm.holds
    assert not spike.is_catapult
