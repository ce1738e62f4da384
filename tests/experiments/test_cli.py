"""The command line: bad input in one line with exit code 2, failing runs, finished runs, every smoke preset."""

from __future__ import annotations

import json
import resource
import shutil

import pytest

import catapult_ext as cx
from python_experiments import registry, results, training
from tests.experiments.helpers import call

#: Cannot be made, since this file is no folder.
UNWRITABLE = f"{__file__}/runs"


def test_list_names_every_experiment_and_its_place_in_the_paper():
    text = call("list").stdout
    for experiment in registry.all_experiments().values():
        assert experiment.name in text
        assert experiment.figure in text


def test_info_is_json_and_data_says_what_is_where(tmp_path):
    assert json.loads(call("info").stdout)["version"]
    text = " ".join(call("data").stdout.split())
    assert "digits" in text
    assert "1197 training" in text
    assert "CATAPULT_DATA" in text  # cifar10 is not there: what to put where


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "fig99"), "NAME: expected one of fig2, fig3-fcn"),
        (("run", "fig5", "--preset", "huge"), "--preset"),
        (("run", "fig5", "--seeds", "0,x"), "--seeds: expected integers"),
        (("run", "fig5", "--seeds", "-1"), "--seeds: expected integers"),
        (("run", "fig5", "--jobs", "-1"), "--jobs"),
        (
            ("run", "fig5", "--device", "tpu"),
            "--device: expected cpu, cuda or cuda:0, cuda:1, ..., got 'tpu'",
        ),
        (("run", "fig5", "--device", "cuda:"), "--device: expected cpu, cuda or"),
        (("run", "fig5", "--set", "width"), "--set: expected FIELD=VALUE,VALUE,..., got 'width'"),
        (("run", "fig5", "--set", "breadth=1"), "--set: expected one of network.kind, network.width"),
        (("run", "fig5", "--set", "width=wide"), "--set network.width: expected an integer, got 'wide'"),
        (("run", "table1", "--set", "batch_size=5,7"), "the runs of table1 set batch_size themselves"),
        (("run", "fig5", "--set", "rates=paper"), "--set rates: use --rates"),
        (("watch",), "RUN: expected a run folder, or how the path of one below 'runs' begins, got none"),
        (("watch", "fcn2"), "got 'fcn2', which none is"),
        (("compare", "a", "b"), "RUN: expected a run folder"),
        (("compare", "a"), "'b'"),
        (("run", "fig5", "--rates", "paper"), "--rates paper: the paper does not print all rates of fig5"),
        (("run", "fig8", "--rates", "paper"), "the paper does not print all rates of fig8"),
        (
            ("run", "fig4-fcn", "--set", "reference=first sample"),
            "reference: expected train for a rate that changes, got first sample",
        ),
        (
            ("run", "fig8", "--set", "reference=first sample"),
            "reference: expected train for a rate that changes",
        ),
        (("run", "fig4-fcn", "--set", "raises=[[5,2.0]]"), "--set raises: expected [], got"),
        (("run", "fig8", "--set", "catapults=3"), "--set catapults: expected null, got '3'"),
        (("run", "fig3-fcn", "--data", "cifar10"), "--data cifar10: cifar10: no data root"),
        (("run", "fig3-fcn", "--data-root", "/nowhere"), "--data-root: expected a folder, got '/nowhere'"),
        (("run", "fig3-fcn", "--data", "mnist"), "--data"),
        (("run",), "NAME"),
        (("run", "fig5", "--frobnicate"), "--frobnicate"),
        (("frobnicate",), "frobnicate"),
        (("report", "--out", __file__), "--out"),
        (("run", "fig5", "--seeds", ""), "--seeds: expected integers"),
        (("run", "fig5", "--preset", "smoke", "--out", UNWRITABLE), f"--out: cannot write to {UNWRITABLE!r}"),
        (("reproduce", "--preset", "smoke", "--out", UNWRITABLE), f"--out: cannot write to {UNWRITABLE!r}"),
        (("report", "--out", UNWRITABLE), f"--out: cannot write to {UNWRITABLE!r}"),
        (("bench", "gram-128", "--out", UNWRITABLE), f"--out: cannot write to {UNWRITABLE!r}"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert named in result.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def smoke_members():
    """Every (configuration, seed) of the smoke presets, each once however many experiments show it."""
    requests = [experiment.request("smoke") for experiment in registry.all_experiments().values()]
    return {m for r in requests for group in r.groups().values() for ms in group.values() for m in ms}


@pytest.mark.parametrize("name", ["fig2", "fig3-fcn", "fig5", "fig6", "fig13-fcn", "fig17-fcn", "fig18-fcn"])
def test_the_claims_hold_at_smoke_size_and_fail_on_their_controls(smoke, name):
    out, _ = smoke
    for verdict in results.verdicts(out, registry.get(name).request("smoke")):
        assert verdict.word == "holds", results.line(verdict)


def test_finished_runs_are_not_run_again(smoke):
    out, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.parquet")}
    assert len(before) == len(smoke_members())
    text = call("run", "fig5", "fig2", "--preset", "smoke", "--out", out).stdout
    assert "0 runs to make, 5 already finished" in text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.parquet")} == before


def test_all_stands_for_every_experiment(smoke):
    out, _ = smoke
    text = call("run", "all", "--preset", "smoke", "--data", "digits", "--out", out).stdout
    assert f"0 runs to make, {len(smoke_members())} already finished" in text
    for experiment in registry.all_experiments().values():
        assert experiment.request("smoke").key in text


def test_two_at_a_time_give_the_numbers_of_one_at_a_time_bit_by_bit(smoke, tmp_path):
    arguments = ("run", "fig3-fcn", "--preset", "smoke", "--out", tmp_path / "new", "--jobs", "2")
    text = call(*arguments).stdout
    assert "3 runs to make, 0 already finished, 2 at a time" in text
    assert text.count(": done (") == 3
    assert "4 of 4 claims hold and fail on their controls" in text
    assert "0 runs to make, 3 already finished" in call(*arguments).stdout
    request = registry.get("fig3-fcn").request("smoke")
    one, two = (training.finished_groups(root, request) for root in (smoke.out, tmp_path / "new"))
    for group, conditions in one.items():
        for condition, runs in conditions.items():
            for run, other in zip(runs, two[group][condition], strict=True):
                assert run.environment["threads"] == other.environment["threads"] == 1
                assert run.metrics.equals(other.metrics)


@pytest.mark.skipif(cx.build_info()["cuda"] == "usable", reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_an_error_of_one_line(tmp_path, device):
    result = call("run", "fig5", "--device", device, "--out", tmp_path / "new", code=2)
    assert result.stderr == (
        f"error: --device {device}: expected a usable CUDA device; CUDA here: {cx.build_info()['cuda']}\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
def test_a_cuda_device_is_part_of_the_configuration_and_named_with_the_results(tmp_path):
    call("run", "fig3-fcn", "--preset", "smoke", "--device", "cuda:0", "--out", tmp_path)
    request = registry.get("fig3-fcn").request("smoke", device="cuda")
    assert request.key == "fig3-fcn-smoke-relative-digits-cuda"
    for conditions in training.finished_groups(tmp_path, request).values():
        for run in (run for members in conditions.values() for run in members):
            assert run.environment["gpu"]
    assert training.unfinished(tmp_path, registry.get("fig3-fcn").request("smoke"))
    call("run", "fig3-fcn", "--preset", "smoke", "--device", "cuda:99", "--out", tmp_path, code=2)


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", "{}", '{"experiment": "fig5"}', None],
    ids=["cut off", "no object", "empty", "fields missing", "of another version"],
)
def test_a_damaged_request_is_named(tmp_path, damage):
    results.remember(tmp_path, registry.get("fig5").request("smoke"))
    file = tmp_path / "requests" / "fig5-smoke-relative.json"
    file.write_text(damage or json.dumps({**json.loads(file.read_text()), "colour": "red"}))
    result = call("report", "--out", tmp_path, code=1)
    assert result.stderr.startswith(f"error: {file}: expected a request of this version (")
    assert "delete it, and run the experiment again" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_report_that_does_not_fit_on_the_disk_is_one_line_and_the_old_one_stays(tmp_path):
    call("report", "--out", tmp_path)
    before = (tmp_path / "report.html").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        result = call("report", "--out", tmp_path, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.stderr.startswith(f"error: {tmp_path / 'report.html'}: cannot be written (File too large)")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "report.html").read_text() == before


def test_a_damaged_run_is_named(smoke, tmp_path):
    request = registry.get("fig5").request("smoke")
    results.remember(tmp_path, request)
    source = training.folder(smoke.out, *request.groups()["main"]["SGD, batch 1"][0]).path
    copy = tmp_path / source.relative_to(smoke.out)
    shutil.copytree(source, copy)
    (copy / "result.json").write_text("{")
    result = call("report", "--out", tmp_path, code=1)
    assert result.stderr.startswith(f"error: {copy / 'result.json'}: expected JSON")


def test_a_failing_run_does_not_stop_the_others(tmp_path, monkeypatch):
    real = training.schedule

    def schedule(config, model, x):
        if config.rate.relative < 1:
            raise ArithmeticError("no rate\nat all")
        return real(config, model, x)

    monkeypatch.setattr(training, "schedule", schedule)
    result = call("run", "fig5", "--preset", "smoke", "--out", tmp_path, code=1)
    assert "1 of 3 runs failed" in result.stdout
    assert result.stdout.count("ArithmeticError: no rate") == 2  # when it happens and in the summary
    assert "below every critical rate" in result.stdout.split("1 of 3 runs failed")[1]
    assert "Traceback" not in result.stdout
    assert "at all" in (tmp_path / "failures.log").read_text()
    missing = training.unfinished(tmp_path, registry.get("fig5").request("smoke"))
    assert [group for group, *_ in missing] == ["below every critical rate"]

    monkeypatch.setattr(training, "schedule", real)  # again: only what is missing
    arguments = ("run", "fig5", "--preset", "smoke", "--out", tmp_path)
    assert "1 runs to make, 2 already finished" in call(*arguments).stdout
    assert "0 runs to make, 3 already finished" in call(*arguments).stdout
