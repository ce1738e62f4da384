"""Sweeps: which fields there are, what values they take, which runs come of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_experiments import registry, results, sweep, training
from tests.experiments.helpers import call

CONFIG = registry.get("fig3-fcn").presets["smoke"].config


def test_every_combination_is_a_variant():
    found = sweep.variants(CONFIG, ["width=8,16", "rate.relative=1,2.5", "batch_size=none,4"])
    assert len(found) == 8
    assert found[0] == (("network.width", 8), ("rate.relative", 1.0), ("batch_size", None))
    config = sweep.apply(CONFIG, found[-1])
    assert (config.network.width, config.rate.relative, config.batch_size) == (16, 2.5, 4)
    others = {"network": CONFIG.network, "rate": CONFIG.rate, "batch_size": None}
    assert dataclasses.replace(config, **others) == CONFIG
    assert sweep.variants(CONFIG, []) == [()]
    assert sweep.apply(CONFIG, ()) == CONFIG


def test_equal_values_are_one_variant_and_whole_numbers_are_rates():
    assert sweep.variants(CONFIG, ["rate.relative=1,1.0,1e0"]) == [(("rate.relative", 1.0),)]
    (changes,) = sweep.variants(CONFIG, ["rate.relative=2"])
    assert isinstance(changes[0][1], float)  # 2 and 2.0 have one hash, so one folder


def test_lists_and_words_are_values_too():
    (one, other) = sweep.variants(CONFIG, ["task.classes=[7,9],[1,2]"])
    assert (one[0][1], other[0][1]) == ((7, 9), (1, 2))
    assert sweep.apply(CONFIG, sweep.variants(CONFIG, ["kind=cnn"])[0]).network.kind == "cnn"
    assert sweep.apply(CONFIG, sweep.variants(CONFIG, ["full_loss=true"])[0]).full_loss is True
    rises = registry.get("fig4-fcn").presets["smoke"].config
    assert sweep.apply(rises, sweep.variants(rises, ["raises=[]"])[0]) == dataclasses.replace(
        rises, raises=()
    )
    assert sweep.in_words((*one, ("kind", "cnn"), ("batch_size", None))) == (
        "task.classes=[7,9], kind=cnn, batch_size=null"
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["width"], "--set: expected FIELD=VALUE,VALUE,..., got 'width'"),
        (["width="], "--set: expected FIELD=VALUE"),
        (["height=1"], "--set: expected one of network.kind, network.width, .*, got 'height'"),
        (["width=1.5"], "--set network.width: expected an integer, got '1.5'"),
        (["width=true"], "--set network.width: expected an integer, got 'true'"),
        (["width=1,,2"], "--set network.width: expected an integer, got ''"),
        (["kind=rnn"], "--set network.kind: expected fcn or cnn or wrn or vit or myrtle, got 'rnn'"),
        (["rate.paper=x"], "--set rate.paper: expected a number or null, got 'x'"),
        (["task.classes=7"], r"--set task.classes: expected a list such as \[1,2\] of an integer, got '7'"),
        (["full_loss=1"], "--set full_loss: expected true or false, got '1'"),
        (["rate.relative=true"], "--set rate.relative: expected a number, got 'true'"),
        (["width=1", "network.width=2"], "expected each field once, got network.width more than once"),
        (["device=cuda"], "--set device: use --device"),
    ],
)
def test_bad_fields_and_values_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        sweep.variants(CONFIG, texts)


def test_a_change_without_effect_is_an_error():
    table1 = registry.get("table1")
    with pytest.raises(ValueError, match="--set batch_size=7: the runs of table1 set batch_size themselves"):
        table1.request("smoke", changes=(("batch_size", 7),))
    assert table1.request("smoke", changes=(("network.width", 7),)).config.network.width == 7
    base = table1.request("smoke")
    same = table1.request("smoke", changes=(("network.width", base.config.network.width),))
    assert same.groups() == base.groups()  # asked for by its value: the runs of the preset, not run twice


@given(values=st.lists(st.one_of(st.none(), st.integers(1, 10**6)), min_size=1, max_size=5, unique=True))
def test_variants_have_files_of_their_own_and_come_back_from_them(values):
    experiment = registry.get("fig3-fcn")
    requests = [experiment.request("smoke", changes=(("batch_size", value),)) for value in values]
    assert len({request.key for request in requests}) == len(values)
    for request in requests:
        fields = json.loads(json.dumps(dataclasses.asdict(request)))
        assert fields["changes"] == [["batch_size", dict(request.changes)["batch_size"]]]


def test_requests_come_back_from_their_files_in_order(tmp_path):
    experiment = registry.get("fig3-fcn")
    variants = sweep.variants(CONFIG, ["width=256,64", "task.classes=[7,9],[1,2]"])
    requests = [experiment.request("smoke", changes=changes) for changes in [*variants, ()]]
    for request in requests:
        results.remember(tmp_path, request)
    found = results.remembered(tmp_path)
    assert set(found) == set(requests)
    assert found[0].changes == ()
    assert [dict(r.changes)["network.width"] for r in found[1:]] == [64, 64, 256, 256]


def test_a_sweep_runs_each_variant_and_names_it(tmp_path):
    arguments = ("run", "fig5", "--preset", "smoke", "--out", tmp_path, "--set", "max_steps=2,4")
    text = call(*arguments, "--set", "width=64").stdout
    assert "6 runs to make, 0 already finished" in text
    for steps in (2, 4):
        changes = (("max_steps", steps), ("network.width", 64))
        request = registry.get("fig5").request("smoke", changes=changes)
        assert f"fig5 (max_steps={steps}, network.width=64), main" in text
        assert f"\n{request.key}\n" in text
        for conditions in training.finished_groups(tmp_path, request).values():
            for run in (run for members in conditions.values() for run in members):
                assert (run.steps, run.config.network.width) == (steps, 64)
    assert "0 runs to make, 6 already finished" in call(*arguments, "--set", "width=64").stdout
