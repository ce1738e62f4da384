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

from python_experiments import claims, registry
from python_experiments.claims import Claim, Measured, Verdict, judge
from tests.experiments.synthetic import catapult_run, diverging_run, fig3_groups

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


@pytest.mark.parametrize("name", ["fig2", "fig3-fcn"])
def test_every_claim_of_a_catapult_holds_and_fails_on_its_control(name):
    groups = fig3_groups()
    for verdict in judge(registry.get(name).claims, groups):
        assert verdict.word == "holds", verdict
        assert verdict.control_fails is True


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
