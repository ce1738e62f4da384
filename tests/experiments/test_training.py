"""From a run's description to what is trained and recorded: rates that rise, the probe, kept AGOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import catapult_ext as cx
from python_experiments import experiments, registry, training
from python_experiments.config import Catapults, Network, Preset, Rate, RunConfig, Task
from tests.experiments.helpers import call

PAIR = Task("digits", train=24, classes=(7, 9))
SMALL = RunConfig(Network("fcn", 32, 3), PAIR, Rate(1.5, 6.0), eigenpairs=3, max_steps=6)
RANK2 = Task("rank-2", train=20, validation=10, test=10)


def started(config, seed=0):
    """The data and the network that a run starts from."""
    data = training.load(config.task, seed, None)
    x, y = data.train.x, data.train.y
    return data, training.build(config, tuple(x.shape[1:]), y.shape[1], seed)


def ended(root, config, seed=0):
    """The training set and the network that a finished run left."""
    data, model = started(config, seed)
    model.load_state_dict(training.folder(root, config, seed).read().tensors["final"])
    return data.train, model


def schedule_of(config):
    data, model = started(config)
    return training.schedule(config, model, data.train.x)


RAISES = ((2, Rate(0.5, 10.0)), (4, Rate(2.0, 15.0)))


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (SMALL, cx.Stepwise({0: 1.5}, relative=True)),
        (replace(SMALL, rates="paper"), cx.Stepwise({0: 6.0})),
        (replace(SMALL, raises=RAISES), cx.Stepwise({0: 1.5, 2: 0.5, 4: 2.0}, relative=True)),
        (replace(SMALL, raises=RAISES, rates="paper"), cx.Stepwise({0: 6.0, 2: 10.0, 4: 15.0})),
        (
            replace(SMALL, catapults=Catapults(2, c=1.7, start_steps=9, decay=0.4, ceiling=70.0)),
            cx.CatapultSchedule(
                catapults=2, c=1.7, start=1.5, start_steps=9, decay=0.4, ceiling=70.0, s=SMALL.eigenpairs
            ),
        ),
    ],
    ids=["constant", "as printed", "raised", "raised as printed", "for catapults"],
)
def test_rates_become_schedules(config, schedule):
    assert schedule_of(config) == schedule


def test_each_rise_is_a_multiple_of_the_critical_rate_of_its_step(tmp_path):
    config = replace(SMALL, raises=RAISES)
    run = training.train(config, 0, tmp_path, None)
    lr, critical = run.recorded("lr", "critical_lr")
    assert lr.tolist() == pytest.approx(
        [r * critical[s] for s, r in ((0, 1.5),) * 2 + ((2, 0.5),) * 2 + ((4, 2.0),) * 2]
    )
    assert len(set(critical)) == 6  # so that it matters whose it is
    data, model = started(config)
    assert lr[0] == pytest.approx(1.5 * cx.critical_lr(cx.ntk(model, data.train.x)).item(), rel=1e-5)


def test_printed_rates_are_used_as_they_are(tmp_path):
    run = training.train(replace(SMALL, raises=RAISES, rates="paper"), 0, tmp_path, None)
    assert run.recorded("lr")[0].tolist()[:3] == [6.0, 6.0, 10.0]


def test_the_first_sample_can_be_the_reference():
    config = replace(SMALL, reference="first sample")
    data, model = started(config)
    alone = cx.critical_lr(cx.ntk(model, data.train.x[:1])).item()
    assert schedule_of(config) == cx.Constant(1.5 * alone)


UNPRINTED = [
    replace(SMALL, rate=Rate(1.5)),
    replace(SMALL, raises=(*RAISES, (5, Rate(3.0)))),
    replace(SMALL, catapults=Catapults(1)),
]


@pytest.mark.parametrize("config", UNPRINTED, ids=["first", "raised", "for catapults"])
def test_rates_that_the_paper_does_not_print_are_an_error(config):
    assert not config.printed
    with pytest.raises(ValueError, match="rates: expected relative, since the paper does not print all"):
        schedule_of(replace(config, rates="paper"))
    assert schedule_of(config)


@pytest.mark.parametrize("config", UNPRINTED, ids=["first", "raised", "for catapults"])
@pytest.mark.parametrize("where", ["preset", "group"])
def test_the_command_line_says_so_in_one_line_before_anything_is_run(tmp_path, monkeypatch, config, where):
    made = config if where == "preset" else SMALL
    experiment = replace(
        registry.get("fig3-fcn"),
        name="made-up",
        presets={name: Preset(made, (0,), "") for name in registry.PRESETS},
        groups={"main": lambda preset: {"run": replace(config, rates=preset.rates)}},
    )
    monkeypatch.setattr(experiments, "EXPERIMENTS", (experiment,))
    result = call("run", "made-up", "--rates", "paper", "--out", tmp_path / "new", code=2)
    assert result.stderr == (
        "error: --rates paper: the paper does not print all rates of made-up; use --rates relative\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raises": ((0, Rate(1.0)),)}, r"raises: expected steps >= 1, each after the one before, got \[0\]"),
        ({"raises": ((4, Rate(1.0)), (4, Rate(2.0)))}, r"each after the one before, got \[4, 4\]"),
        ({"raises": RAISES, "catapults": Catapults(1)}, "catapults: expected none in a run with raises"),
        ({"raises": RAISES, "reference": "first sample"}, "reference: expected train .*, got first sample"),
        ({"catapults": Catapults(1), "reference": "first sample"}, "reference: expected train"),
    ],
)
def test_rates_that_no_schedule_follows_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@given(
    factor=st.floats(0.01, 100),
    raises=st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10)), max_size=4, unique_by=lambda r: r[0]),
)
def test_another_rate_scales_every_rise(factor, raises):
    config = replace(SMALL, raises=tuple((step, Rate(r, 2 * r)) for step, r in sorted(raises)))
    for (step, before), (same, after) in zip(
        config.rates_by_step.items(), config.at(factor).rates_by_step.items(), strict=True
    ):
        assert step == same
        assert after == Rate(before.relative * factor, before.paper * factor)


PROBED = replace(SMALL, batch_size=5, probe=True, max_steps=4)


def test_the_probe_is_the_training_set(tmp_path):
    run = training.train(PROBED, 0, tmp_path, None)
    assert len(run.recorded("lambda_1")[0]) == 5  # every step and the end
    for steps in (1, 4):  # a row in the middle of the run above, and its last
        shorter = replace(PROBED, max_steps=steps)
        last = training.train(shorter, 0, tmp_path, None).metrics.iloc[-1]
        train, model = ended(tmp_path, shorter)
        seen = cx.observe(model, train.x, train.y, k=3)
        row = run.metrics.iloc[steps]
        columns = ["lambda_1", "lambda_2", "lambda_3", "critical_lr", "top_loss", "rest_loss"]
        assert row[columns].tolist() == last[columns].tolist()
        expected = [*seen.eigen.values.tolist(), seen.critical_lr, seen.top_loss, seen.rest_loss]
        assert row[columns].tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)
        assert row["top_loss"] + row["rest_loss"] == pytest.approx(seen.loss.item(), rel=1e-5)
        batch = next(cx.SGD(5).order(len(train), 0))
        assert row["lambda_1"] != pytest.approx(
            cx.spectral_norm(cx.ntk(model, train.x[batch])).item(), rel=0.01
        )


def test_the_probe_changes_nothing_of_the_training(tmp_path):
    probed, plain = (
        training.train(config, 0, tmp_path, None) for config in (PROBED, replace(PROBED, probe=False))
    )
    assert "lambda_1" not in plain.metrics
    for column in ("loss", "lr", "train_loss", "batch_critical_lr"):
        assert probed.metrics[column].equals(plain.metrics[column])


def test_gradient_descent_needs_no_probe(tmp_path):
    """The pass that makes the step shows the training set: equal bits, with the option or without."""
    one, other = (
        training.train(replace(SMALL, max_steps=3, probe=probe), 0, tmp_path, None) for probe in (False, True)
    )
    assert one.metrics.equals(other.metrics)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_kept_agops_come_back(tmp_path, batch_size):
    config = replace(SMALL, task=RANK2, batch_size=batch_size, keep_agop=4, max_steps=3)
    kept = training.train(config, 0, tmp_path, None).tensors["agop"]
    assert kept["steps"].tolist() == [0, 3]
    assert kept["values"].shape == (2, 4, 4)
    data, first = started(config)
    train, last = ended(tmp_path, config)
    for model, block in zip((first, last), kept["values"], strict=True):
        torch.testing.assert_close(block, cx.agop(model, train.x)[:4, :4])
    assert torch.equal(data.train.x, train.x)
    assert not torch.allclose(*kept["values"])
    assert "agop" not in training.train(replace(config, keep_agop=0), 0, tmp_path, None).tensors


def test_a_run_is_raised_for_as_many_catapults_as_it_is_to_make(smoke):
    groups = training.finished_groups(smoke.out, registry.get("fig8").request("smoke"))
    for condition, (run,) in groups["main"].items():
        count = int(condition.split()[0])
        assert (run.config.catapults.count if run.config.catapults else 0) == count
        lr, critical = run.recorded("lr", "critical_lr")
        if count:
            plan = run.config.catapults
            start = run.config.rate.relative * critical[0]
            assert lr[: plan.start_steps] == pytest.approx(start)
            assert lr[plan.start_steps] == pytest.approx(plan.c * critical[plan.start_steps])
            assert lr[-1] <= plan.decay * critical[-1] * (1 + 1e-6)  # after the last of them
        else:
            assert len(set(lr)) == 1
