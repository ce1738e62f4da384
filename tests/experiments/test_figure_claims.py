"""The numbers of each figure's claims on metrics made by hand, and one bad run, which is enough to fail."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_experiments import claims, registry
from python_experiments.config import Rate
from python_experiments.experiments import fig6, fig8
from tests.experiments.synthetic import catapult_run, groups_of, rate_starts

FIG4 = registry.get("fig4-fcn").presets["paper"].config
FIG6 = registry.get("fig6").presets["paper"].config
STEPS = np.arange(41)


def claim_of(name, index):
    return registry.get(name).claims[index]


def measured(name, index, **conditions):
    """A claim's number on one run of each condition."""
    return (
        claim_of(name, index).measure({words.replace("_", " "): [r] for words, r in conditions.items()}).value
    )


def changed(run, **columns):
    """The run with other metrics."""
    return replace(run, metrics=run.metrics.assign(**columns))


# ---- Fig. 4 and 17


@given(peaks=st.sets(st.sampled_from([5, 20, 40, 65, 80])))
def test_the_rate_with_the_fewest_catapults_counts(peaks):
    assert rate_starts(FIG4) == [0, 15, 60]
    run = catapult_run(FIG4, steps=90, peaks=sorted(peaks), spike=6.0 if peaks else 0.0)
    assert [spike.peak for spike in claims.spikes(run)] == sorted(peaks)
    counts = [len(peaks & under) for under in ({5}, {20, 40}, {65, 80})]
    assert claims.catapults_per_rate(run) == min(counts)


@pytest.mark.parametrize(("step", "peaks", "least"), [(5, (5, 20), 1), (4, (5, 20), 0), (5, (5,), 0)])
def test_the_loss_at_the_step_of_a_rise_is_the_work_of_the_rate_before(step, peaks, least):
    config = replace(FIG4, raises=((step, Rate(1.5)),))
    assert claims.catapults_per_rate(catapult_run(config, peaks=peaks)) == least


def test_a_spike_that_is_no_catapult_does_not_count():
    config = replace(FIG4, raises=())
    run = catapult_run(config)
    assert claims.catapults_per_rate(run) == 1
    calm = changed(run, lr=0.5 * run.metrics["batch_critical_lr"])  # the rate was below the critical one
    assert len(claims.spikes(calm)) == 1
    assert claims.catapults_per_rate(calm) == 0


def two_spikes(*, drops=(0.5, 0.5), shares=(1.0, 1.0)):
    """Spikes at steps 5 and 25, each with a factor of the norm of K and a share of its rise in L_<=s."""
    rises = [6.0 * np.exp(-((STEPS - peak) ** 2) / 3) for peak in (5, 25)]
    top, rest = 0.3 + 0 * STEPS, 0.7 + 0 * STEPS
    norm = np.ones(41)
    for rise, peak, drop, share in zip(rises, (5, 25), drops, shares, strict=True):
        top, rest = top + share * rise, rest + (1 - share) * rise
        norm[peak:] *= drop
    run = catapult_run(FIG4)
    return changed(run, loss=top + rest, top_loss=top, rest_loss=rest, lambda_1=norm)


@given(drops=st.tuples(*[st.floats(0.05, 3.0)] * 2), shares=st.tuples(*[st.floats(0.0, 1.0)] * 2))
def test_the_worst_spike_decides(drops, shares):
    run = two_spikes(drops=drops, shares=shares)
    assert claims.norm_drop(run) == pytest.approx(min(1 / drop for drop in drops))
    assert claims.located(run) == pytest.approx(min(shares))


def test_without_a_spike_or_a_spectrum_there_is_no_number():
    for run in (catapult_run(FIG4, spike=0.0), catapult_run(FIG4)):
        bare = replace(run, metrics=run.metrics.drop(columns="lambda_1"))
        for none in (bare, catapult_run(FIG4, spike=0.0)):
            assert claims.spikes(none) == []
            assert math.isnan(claims.norm_drop(none))
            assert math.isnan(claims.located(none))
            assert claims.catapults_per_rate(none) == 0


def test_a_norm_that_ends_as_zero_is_an_infinite_drop():
    run = catapult_run(FIG4)
    dead = changed(run, lambda_1=np.where(STEPS < 5, 1.0, 0.0))
    assert claims.norm_drop(dead) == math.inf


# ---- Fig. 13


@given(at=st.integers(1, 40), deep=st.floats(0.05, 0.9))
def test_the_norm_drops_where_its_logarithm_falls_most(at, deep):
    run = catapult_run(FIG4)
    dropped = changed(run, lambda_1=np.where(at > STEPS, 100.0, 100.0 * deep))
    assert measured("fig13-fcn", 1, catapult=dropped) == -abs(at - 1 - 5)


# ---- Fig. 18


@given(growth=st.floats(-2, 12))
def test_growth_is_counted_in_orders_of_magnitude(growth):
    run = catapult_run(FIG4, spike=0.0)
    loss = np.geomspace(1.0, 10.0**growth, 41)
    grown = changed(run, loss=loss)
    number = measured("fig18-fcn", 0, from_scratch=grown, by_catapults=run)
    assert number == pytest.approx(max(0.0, growth), abs=1e-9)
    diverged = replace(grown, summary={**run.summary, "result": "diverged"})
    assert measured("fig18-fcn", 0, from_scratch=diverged, by_catapults=run) > 38


@given(last=st.floats(0.1, 100), loss=st.floats(0.1, 2.0))
def test_the_rate_that_is_reached_counts_only_where_the_loss_has_fallen(last, loss):
    run = catapult_run(FIG4, spike=0.0)
    lr = np.array([*np.full(39, 3.0), last, np.nan])
    by_catapults = changed(run, lr=lr, loss=np.linspace(1.0, loss, 41))
    from_scratch = changed(run, lr=np.full(41, 5.0))
    number = measured("fig18-fcn", 1, from_scratch=from_scratch, by_catapults=by_catapults)
    assert number == pytest.approx(last / 5) if loss < 1 else math.isnan(number)


# ---- Fig. 6 and Table 2

_PARTS = st.floats(0.05, 3.0)


@given(
    first=st.tuples(_PARTS, _PARTS),
    made=st.lists(st.tuples(_PARTS, _PARTS, st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=12),
)
def test_steps_that_raise_the_loss_are_held_against_the_critical_rate_of_their_batch(first, made):
    """Row t has what is before step t: the parts of the loss, and the critical rate of its batch; the rate is 1."""
    parts = np.array([first, *[step[:2] for step in made]])  # (steps + 1, 2)
    critical = [step[2] for step in made]
    metrics = pd.DataFrame(
        {
            "step": np.arange(len(parts)),
            "lr": [*np.ones(len(made)), np.nan],
            "top_loss": parts[:, 0],
            "rest_loss": parts[:, 1],
            "batch_critical_lr": [*critical, np.nan],
        }
    )
    run = claims.Run(FIG6, 0, metrics)
    loss = [float(top + rest) for top, rest in parts]
    assert claims.set_loss(run).tolist() == pytest.approx(loss)
    rising, spiking, above, shares = [], [], [], []
    for t, rate in enumerate(critical):
        is_above = rate < 1.0
        rises = loss[t + 1] > loss[t]
        spikes = (loss[t + 1] - loss[t]) / loss[0] >= fig6.SPIKE
        rising += [is_above] if rises else []
        spiking += [is_above] if spikes else []
        above += [rises] if is_above else []
        shares += [(parts[t + 1, 0] - parts[t, 0], loss[t + 1] - loss[t])] if spikes else []

    def share(found):
        return sum(found) / len(found) if found else math.nan

    expected = min(1.0, sum(s[0] for s in shares) / sum(s[1] for s in shares)) if shares else math.nan
    for number, value in (
        (fig6.above_when_rising(run), share(rising)),
        (fig6.above_at_spikes(run), share(spiking)),
        (fig6.precision(run), share(above)),
        (fig6.top_share(run), expected),
    ):
        assert number == pytest.approx(value, nan_ok=True)
    assert measured("fig6", 0, run=run) == pytest.approx(max(np.diff(loss)) / loss[0])


def test_one_spike_outside_is_enough():
    """A spike whose batch has a critical rate above the rate, or that L_>s carries."""
    group = groups_of("fig6")["main"]
    (runs,) = group.values()
    run = runs[-1]
    rise, _, above = fig6.steps(run)
    assert set(np.flatnonzero(rise >= fig6.SPIKE)) == set(np.flatnonzero(above))
    critical = run.metrics["batch_critical_lr"].copy()
    critical[np.flatnonzero(above)[:2]] = 4.0
    swapped = changed(run, top_loss=run.metrics["rest_loss"], rest_loss=run.metrics["top_loss"])
    for index, bad in ((1, changed(run, batch_critical_lr=critical)), (2, swapped)):
        claim = claim_of("fig6", index)
        assert claim.holds(claim.measure({"x": runs}))
        assert not claim.holds(claim.measure({"x": [*runs[:-1], bad]}))


@pytest.mark.parametrize("name", ["table2-2-layer", "table2-fcn", "table2-cnn"])
def test_table_2_is_the_mean_over_the_runs_with_its_precision_beside_it(name):
    (runs,) = groups_of(name)["main"].values()
    run = runs[-1]
    rise, _, above = fig6.steps(run)
    some = np.flatnonzero(above)[:4]
    critical = run.metrics["batch_critical_lr"].copy()
    critical[some] = 4.0  # these rise with a rate below the batch's critical rate
    right = 1 - len(some) / above.sum()
    number = claim_of(name, 0).measure({"x": [*runs[:-1], changed(run, batch_critical_lr=critical)]})
    assert number.value == pytest.approx((len(runs) - 1 + right) / len(runs))
    assert f"{right:.3f}; precision of the rule: 1.000" in number.detail
    assert (rise > 0).sum() == above.sum()


def test_a_batch_without_a_critical_rate_moves_no_other_step():
    (runs,) = groups_of("table2-fcn")["main"].values()
    run = runs[0]
    rise, _, above = fig6.steps(run)
    critical = run.metrics["batch_critical_lr"].copy()
    calm = int(np.flatnonzero(~above)[0])
    critical[calm] = np.nan
    again = fig6.steps(changed(run, batch_critical_lr=critical))
    assert np.array_equal(again[0], rise)
    assert np.array_equal(again[2], above)


def test_a_run_without_any_step_has_no_number():
    (runs,) = groups_of("fig6")["main"].values()
    run = replace(runs[0], metrics=runs[0].metrics.iloc[:1])
    for claim in registry.get("fig6").claims:
        assert math.isnan(claim.measure({"x": [run]}).value)


# ---- Fig. 8 and 26


@pytest.mark.parametrize(
    ("name", "index", "key"), [("fig8", 1, "test_loss"), ("fig8", 2, "alignment"), ("fig26", 0, None)]
)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_two_counts_in_the_wrong_order_are_enough(name, index, key, count):
    """Neighbours exchange a number of their summaries, or their AGOPs."""
    group, claim = groups_of(name)["main"], claim_of(name, index)
    one, other = list(group)[count : count + 2]

    def with_that_of(run, its):
        if key is None:
            return replace(run, tensors=its.tensors)
        return replace(run, summary={**run.summary, key: its.summary[key]})

    exchanged = {
        mine: [with_that_of(run, its) for run, its in zip(group[mine], group[theirs], strict=True)]
        for mine, theirs in ((one, other), (other, one))
    }
    assert claim.holds(claim.measure(group))
    assert not claim.holds(claim.measure(group | exchanged))


@pytest.mark.parametrize("peaks", [(5,), (5, 35, 65), ()])
def test_one_run_with_another_number_of_catapults_is_enough(peaks):
    group = groups_of("fig8")["main"]
    claim = claim_of("fig8", 0)
    runs = group["2 catapults"]
    other = catapult_run(runs[-1].config, steps=120, peaks=peaks, spike=6.0 if peaks else 0.0)
    total = sum(map(len, group.values()))
    number = claim.measure({**group, "2 catapults": [*runs[:-1], other]})
    assert number.value == pytest.approx(1 - 1 / total)
    assert not claim.holds(number)


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=5))
def test_pictures_of_the_agop_use_the_whole_scale(diagonal):
    run = next(iter(groups_of("fig26")["main"].values()))[0]
    block = torch.diag(torch.tensor(diagonal))
    kept = {"steps": torch.tensor([run.steps]), "values": block[None]}
    early = replace(run, tensors={"agop": {**kept, "steps": torch.tensor([0])}})
    assert np.isnan(
        fig8.agop(early)
    ).all()  # a run that diverged keeps only its first AGOP: that is not its picture
    run = replace(run, tensors={"agop": kept})
    picture = fig8.agop(run)
    if block.min() == block.max():
        assert np.isnan(picture).all()  # a network that is constant has no picture, and the claim no number
        return
    assert (picture.min(), picture.max()) == (0, 1)
    order = block.flatten().argsort()
    assert np.all(np.diff(picture.flatten()[order.numpy()]) >= 0)


def test_the_true_picture_is_that_of_two_features():
    run = next(iter(groups_of("fig26")["main"].values()))[0]
    assert np.array_equal(fig8.true_agop(run), np.diag([1.0, 1.0, *[0.0] * 8]))


# ---- all of them


@pytest.mark.parametrize("name", ["fig4-fcn", "fig6", "fig13-fcn", "fig17-fcn", "fig18-fcn", "table2-fcn"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_bad_run_is_enough(name, seed):
    groups = groups_of(name)
    for claim in registry.get(name).claims:
        main = {condition: list(runs) for condition, runs in groups["main"].items()}
        for runs, (bad, *_) in zip(main.values(), groups[claim.control].values(), strict=True):
            runs[seed] = bad
        assert claim.holds(claim.measure(groups["main"])), claim.statement
        assert not claim.holds(claim.measure(main)), claim.statement
