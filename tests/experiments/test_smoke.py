"""Every experiment's smoke preset: it runs in seconds, and each claim is a number on its runs and its control."""

from __future__ import annotations

import math

import numpy as np
import pytest

from python_experiments import registry, results, training

EXPERIMENTS = list(registry.all_experiments())
SECONDS = 8


@pytest.fixture(params=EXPERIMENTS)
def request_(request):
    """Each experiment's smoke request in turn."""
    return registry.get(request.param).request("smoke")


def test_it_runs_in_seconds(smoke_seconds, request_):
    assert smoke_seconds[request_.experiment] < SECONDS


def test_every_run_is_stored_and_of_the_figures_own_only_those_diverge_that_are_meant_to(smoke, request_):
    experiment = registry.get(request_.experiment)
    assert training.unfinished(smoke.out, request_) == []
    groups = training.finished_groups(smoke.out, request_)
    assert set(groups) == set(experiment.groups)
    for group, conditions in groups.items():
        for condition, runs in conditions.items():
            for run in runs:
                assert 0 < run.steps <= run.config.max_steps
                assert run.environment["threads"] == 1
                if group == "main":
                    (loss,) = run.recorded("loss")
                    assert len(loss) >= run.steps
                    assert np.isfinite(loss).all()
                    if experiment.diverges and condition == "from scratch":
                        assert run.summary["result"] == "diverged"
                    else:
                        assert run.summary["result"] in ("converged", "max_steps")


def test_divergence_is_meant_where_the_figure_is_about_it():
    assert {name for name in EXPERIMENTS if registry.get(name).diverges} == {"fig18-fcn", "fig18-cnn"}


def test_images_are_the_embedded_ones(smoke, request_):
    if request_.images is None:
        assert not registry.get(request_.experiment).images
        return
    for conditions in training.finished_groups(smoke.out, request_).values():
        for runs in conditions.values():
            for run in runs:
                assert run.config.task.name == "digits"
                assert run.summary["data"]["form"] == "embedded"


def test_each_claim_is_a_number_or_none_and_is_printed(smoke, request_):
    verdicts = results.verdicts(smoke.out, request_)
    assert [v.claim for v in verdicts] == list(registry.get(request_.experiment).claims)
    for verdict in verdicts:
        assert verdict.word != "not run"
        for measured in (verdict.ours, verdict.control):
            assert measured is not None
            assert not math.isinf(measured.value)
            words = results.number(verdict.claim, measured)
            if math.isnan(measured.value):
                assert words == "none"
                assert not verdict.claim.holds(measured)
            else:
                shown = float(words.removesuffix(verdict.claim.unit))
                assert shown == pytest.approx(measured.value, rel=1e-3)
        assert results.line(verdict) in smoke.text


def test_controls_are_other_runs_and_decide_their_part(smoke, request_):
    groups = training.finished_groups(smoke.out, request_)
    planned = request_.groups()
    main = {member for members in planned["main"].values() for member in members}
    # The run without a catapult is what both sides of Fig. 8 are held against.
    baseline = set(planned["main"].get("0 catapults", ()))
    for verdict in results.verdicts(smoke.out, request_):
        control = {m for members in planned[verdict.claim.control].values() for m in members}
        assert control - baseline
        assert control & main <= baseline
        again = verdict.claim.measure(groups[verdict.claim.control])
        assert results.number(verdict.claim, again) == results.number(verdict.claim, verdict.control)
        assert verdict.control_fails, results.line(verdict)
