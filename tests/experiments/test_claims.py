"""Claims on made-up runs: each holds where it should and fails where it should."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_experiments import claims, registry, results
from python_experiments.claims import Claim, Measured, Verdict, judge
from python_experiments.experiments import fig5, table1
from tests.experiments.synthetic import batch_run, catapult_run, diverging_run, groups_of

CONFIG = registry.get("fig3-fcn").presets["cpu"].config


def test_a_catapult_has_its_numbers():
    run = catapult_run(CONFIG, spike=6.0)
    loss = run.metrics["loss"]
    assert claims.peak_step(run) == 5
    assert claims.spike_height(run) == pytest.approx(loss[5] / loss[0])
    assert claims.spike_share(run) == 1.0  # L_>s falls meanwhile, which must not push the share above 1
    assert claims.critical_rate_growth(run) > 3
    assert claims.falling_share(run) == 1.0


def test_a_spike_outside_the_top_space_is_not_credited():
    run = catapult_run(CONFIG, spike=6.0)
    swapped = run.metrics.rename(columns={"top_loss": "rest_loss", "rest_loss": "top_loss"})
    share = claims.spike_share(replace(run, metrics=swapped))
    assert share <= 0
    assert claims.falling_share(replace(run, metrics=swapped)) < 0.95


@given(top=st.floats(0.1, 50), rest=st.floats(0.1, 50))
def test_the_share_is_the_part_of_the_rise(top, rest):
    metrics = pd.DataFrame(
        {
            "step": [0, 1],
            "loss": [1.0, 1.0 + top + rest],
            "top_loss": [0.5, 0.5 + top],
            "rest_loss": [0.5, 0.5 + rest],
        }
    )
    share = claims.spike_share(claims.Run(CONFIG, 0, metrics))
    if top + rest < claims.SPIKE - 1:
        assert math.isnan(share)
    else:
        assert share == pytest.approx(top / (top + rest))


def test_without_a_spike_there_is_nothing_to_share():
    run = catapult_run(CONFIG, spike=0.0)
    assert claims.peak_step(run) is None
    assert math.isnan(claims.spike_share(run))
    assert claims.critical_rate_growth(run) == pytest.approx(1)


def test_rows_without_a_record_are_left_out():
    run = catapult_run(CONFIG)
    sparse = run.metrics.copy()
    sparse.loc[sparse["step"] % 10 != 0, ["rest_loss", "critical_lr"]] = np.nan
    sparse.loc[20, "rest_loss"] = sparse.loc[10, "rest_loss"] + 1  # up at 20, and down again at 30
    assert claims.falling_share(replace(run, metrics=sparse)) == pytest.approx(3 / 4)
    assert claims.falling_share(replace(run, metrics=sparse.drop(columns="rest_loss"))) is not None
    assert math.isnan(claims.falling_share(replace(run, metrics=sparse.drop(columns="rest_loss"))))


def test_the_worst_run_decides():
    good, bad = catapult_run(CONFIG, spike=6.0), catapult_run(CONFIG, spike=0.0)
    measured = claims.worst({"a": [good], "b": [good, bad]}, claims.spike_height)
    assert measured.value == claims.spike_height(bad)
    assert measured.detail.count(",") == 2
    assert math.isnan(claims.worst({"a": [good, bad]}, claims.spike_share).value)
    assert math.isnan(claims.worst({}, claims.spike_share).value)


@pytest.mark.parametrize("name", registry.all_experiments())
def test_every_claim_holds_and_fails_on_its_control(name):
    groups = groups_of(name)
    verdicts = judge(registry.get(name).claims, groups)
    assert len(verdicts) == len(registry.get(name).claims) > 0
    for verdict in verdicts:
        assert verdict.word == "holds", verdict
        assert verdict.control_fails is True
        exchanged = groups | {"main": groups[verdict.claim.control], verdict.claim.control: groups["main"]}
        assert judge([verdict.claim], exchanged)[0].word == "fails"


@pytest.mark.parametrize("step", [0, 7, 199])
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_one_step_that_disagrees_is_enough(step, factor):
    config = registry.get("fig5").presets["cpu"].config
    run = batch_run(config, 0, rate=2.0)
    assert fig5.agreement(run) == fig5.on_doubled(run) == 1.0
    assert fig5.spikes(run).sum() == 2  # the doubled point is drawn once in each of the two epochs
    metrics = run.metrics.copy()
    metrics.loc[step + 1, "last_batch_loss"] = factor * metrics.loc[step, "loss"]
    disagrees = (factor > 1) != bool(fig5.exceeds(run)[step])
    changed = replace(run, metrics=metrics)
    assert fig5.agreement(changed) == pytest.approx(1 - disagrees / 200)
    assert (fig5.on_doubled(changed) == 1.0) == (factor < 1 or bool(fig5.doubled(run)[step]))


@pytest.mark.parametrize(("index", "key"), [(0, "test_loss"), (1, "alignment"), (3, "catapults")])
@pytest.mark.parametrize(("one", "other"), [("5", "10"), ("10", "50")])
def test_two_batch_sizes_in_the_wrong_order_are_enough(index, key, one, other):
    groups = groups_of("table1")
    claim = registry.get("table1").claims[index]
    assert claim.holds(claim.measure(groups["main"]))

    def with_value(name, value):
        return [replace(run, summary={**run.summary, key: value}) for run in groups["main"][name]]

    values = {name: groups["main"][name][0].summary[key] for name in (one, other)}
    wrong = groups["main"] | {one: with_value(one, values[other]), other: with_value(other, values[one])}
    assert not claim.holds(claim.measure(wrong))


def test_one_seed_that_has_not_found_the_directions_is_enough():
    group = groups_of("table1")["main"]
    claim = registry.get("table1").claims[2]
    assert set(group) == set(table1.BATCHES)
    first, *others = group["5"]
    assert others
    worse = replace(first, summary={**first.summary, "alignment": 0.89})
    assert not claim.holds(claim.measure({**group, "5": [*others, worse]}))


@pytest.mark.parametrize("name", ["fig2", "fig3-fcn"])
def test_no_claim_holds_on_plain_decay_and_divergence_together(name):
    for claim in registry.get(name).claims:
        values = [
            claim.measure({"x": [run]}) for run in (catapult_run(CONFIG, spike=0.0), diverging_run(CONFIG))
        ]
        assert not all(claim.holds(v) for v in values)


def test_verdicts_say_what_is_missing():
    claim = Claim("x", lambda group: Measured(group["v"]), 1.0, "", "control")
    missing = judge([claim], {})[0]
    assert (missing.word, missing.holds, missing.control_fails) == ("not run", None, None)
    words = {
        (2.0, 0.0): "holds",
        (2.0, 1.0): "holds, but so does its control",
        (2.0, None): "holds, control not run",
        (0.5, 0.0): "fails",
        (math.nan, 0.0): "fails",
        (2.0, math.nan): "holds",
    }
    for (ours, control), word in words.items():
        groups = {"main": {"v": ours}} | ({} if control is None else {"control": {"v": control}})
        assert judge([claim], groups)[0].word == word
    assert Verdict(claim, Measured(1.0), None).holds is True  # the bound itself is enough


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6))
def test_smallest_step_up_is_positive_only_for_rising_sequences(values):
    rising = all(b > a for a, b in itertools.pairwise(values))
    assert (claims.smallest_step_up(values) > 0) == rising


def test_smallest_step_up_in_relative_terms():
    assert claims.smallest_step_up([0.42, 0.59, 0.71, 0.74], relative=True) == pytest.approx(0.03 / 0.71)
    assert math.isnan(claims.smallest_step_up([1.0]))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (-0.0, "steps", "0 steps"),
        (-1.0, "steps", "-1 steps"),
        (5.7991, "x", "5.799x"),
        (math.nan, "x", "none"),
        (None, "x", "not run"),
    ],
)
def test_numbers_in_words(value, unit, text):
    claim = Claim("", lambda group: Measured(0.0), 0.0, "", "", unit)
    assert results.number(claim, None if value is None else Measured(value)) == text
