"""The command line: bad input in one line with exit code 2, failing runs, finished runs, every smoke preset."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from python_experiments import registry, results, runner, training
from tests.experiments.helpers import call

#: Cannot be made, since this file is no folder.
UNWRITABLE = f"{__file__}/runs"
EXPERIMENTS = ("fig2", "fig3-fcn", "fig3-cnn", "fig5", "table1")


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
        (("run", "fig5", "--jobs", "0"), "--jobs"),
        (("run", "fig5", "--rates", "paper"), "--rates paper: the paper prints no rate for fig5"),
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


def test_every_smoke_preset_runs_and_its_claims_are_measured(smoke):
    out, text = smoke
    for name in EXPERIMENTS:
        request = registry.get(name).request("smoke")
        assert not training.unfinished(out, request)
        groups = training.finished_groups(out, request)
        assert set(groups) == set(registry.get(name).groups)
        for verdict in results.verdicts(out, request):
            assert verdict.ours is not None
            assert verdict.control is not None
            assert results.line(verdict) in text


@pytest.mark.parametrize("name", ["fig2", "fig3-fcn", "fig5"])
def test_the_claims_hold_at_smoke_size_and_fail_on_their_controls(smoke, name):
    out, _ = smoke
    for verdict in results.verdicts(out, registry.get(name).request("smoke")):
        assert verdict.word == "holds", results.line(verdict)


def test_controls_of_the_other_experiments_fail_at_smoke_size_too(smoke):
    out, _ = smoke
    for name in ("fig3-cnn", "table1"):
        for verdict in results.verdicts(out, registry.get(name).request("smoke")):
            assert verdict.control_fails, results.line(verdict)


def test_finished_runs_are_not_run_again(smoke):
    out, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.parquet")}
    assert len(before) == 17
    text = call("run", "fig5", "fig2", "--preset", "smoke", "--out", out).stdout
    assert "0 runs to make, 5 already finished" in text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.parquet")} == before


def test_all_stands_for_every_experiment(smoke):
    out, _ = smoke
    text = call("run", "all", "--preset", "smoke", "--data", "digits", "--out", out).stdout
    assert "0 runs to make, 17 already finished" in text
    for name in EXPERIMENTS:
        assert registry.get(name).request("smoke").key in text


def test_two_at_a_time_from_nothing_to_verdicts(tmp_path):
    arguments = ("run", "fig3-fcn", "--preset", "smoke", "--out", tmp_path / "new", "--jobs", "2")
    text = call(*arguments).stdout
    assert "3 runs to make, 0 already finished, 2 at a time" in text
    assert text.count(": done (") == 3
    assert "4 of 4 claims hold and fail on their controls" in text
    assert "0 runs to make, 3 already finished" in call(*arguments).stdout


def test_fig_2_shows_the_runs_of_fig_3(smoke):
    out, _ = smoke
    mine, theirs = (registry.get(name).request("smoke").groups()["main"] for name in ("fig2", "fig3-fcn"))
    assert mine == theirs
    assert len(list((out / "fcn5-digits").iterdir())) == 3


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.sources, self.words, self.style = [], set(), [], [], False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.style = tag == "style"
        if "id" in attributes:
            self.ids.add(attributes["id"])
        self.sources += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "data") and v]

    def handle_data(self, data):
        if not self.style:
            self.words.append(data)


def squeezed(text: str) -> str:
    """Text without spaces, formulas as the page sets them."""
    return "".join(text.replace("L_<=", "L≤").replace("L_>", "L>").split())


def read_page(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def test_the_report_shows_every_claim_and_needs_nothing_beside_itself(smoke):
    out, _ = smoke
    assert str(out / "report.html") in call("report", "--out", out).stdout
    page = read_page(out / "report.html")
    text = " ".join(" ".join(page.words).split())
    letters = squeezed(text)
    for name in EXPERIMENTS:
        experiment = registry.get(name)
        request = experiment.request("smoke")
        assert request.key in page.ids
        for verdict in results.verdicts(out, request):
            # at a glance, and with its figure
            assert letters.count(squeezed(verdict.claim.statement)) >= 2
            assert results.number(verdict.claim, verdict.ours) in text
            assert squeezed(verdict.claim.paper) in letters
        for remark in experiment.remarks:
            assert squeezed(remark) in letters
        for suffix in (".png", ".svg"):
            assert (out / "plots" / (request.key + suffix)).stat().st_size > 5000
    assert len([s for s in page.sources if s.startswith("data:image/png;base64,")]) == len(EXPERIMENTS)
    assert all(s.startswith(("data:", "#")) for s in page.sources)
    assert {s[1:] for s in page.sources if s.startswith("#")} <= page.ids
    assert not re.search(r"url\(|@import", (out / "report.html").read_text())
    assert "not run" not in text.replace("What was not run is shown as not run", "")


def test_the_report_of_nothing_says_that_nothing_was_run(tmp_path):
    call("report", "--out", tmp_path)
    page = read_page(tmp_path / "report.html")
    text = " ".join(page.words)
    claims = sum(len(e.claims) for e in registry.all_experiments().values())
    assert text.count("not run") >= claims
    assert "holds" not in text
    assert not [s for s in page.sources if s.startswith("data:")]


def test_a_missing_run_is_shown_as_missing(smoke, tmp_path):
    request = registry.get("fig5").request("smoke")
    results.remember(tmp_path, request)
    training.train(*request.groups()["main"]["SGD, batch 1"][0], tmp_path, None)
    call("report", "--out", tmp_path)
    text = " ".join(" ".join(read_page(tmp_path / "report.html").words).split())
    assert "2 of its runs are not finished" in text
    assert "holds, control not run" in text


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


def job(tmp_path, config, seed=0):
    return runner.Job(config, seed, tmp_path, None, 1, (f"{config.task.name} {seed}",))


def test_a_killed_worker_takes_only_its_own_run_down(tmp_path):
    short = registry.get("fig5").presets["smoke"].config
    long = replace(
        registry.get("table1").presets["cpu"].config, batch_size=5, max_steps=10**6, stop_loss=None
    )
    missing = replace(short, task=replace(short.task, name="cifar10", classes=(7, 9)))
    jobs = [job(tmp_path, long), job(tmp_path, missing), job(tmp_path, short), job(tmp_path, short, 1)]

    def kill():
        folder = training.folder(tmp_path, long, 0).path
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        pid = int(json.loads((folder / "environment.json").read_text())[-1].get("pid", 0)) or _holder(folder)
        os.kill(pid, signal.SIGKILL)

    def _holder(folder):
        for child in multiprocessing.active_children():
            opened = [
                os.path.realpath(f"/proc/{child.pid}/fd/{n}") for n in os.listdir(f"/proc/{child.pid}/fd")
            ]
            if str((folder / "metrics.jsonl").resolve()) in opened:
                return child.pid
        raise AssertionError("no worker holds the run")

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with open(os.devnull, "w") as nothing:
        outcomes = {o.job: o for o in runner.execute(jobs, 2, Console(file=nothing))}
    killer.join(timeout=5)
    assert outcomes[jobs[0]].error == "the process ended with signal 9"
    assert outcomes[jobs[1]].error.startswith("FileNotFoundError: cifar10: no data root")
    assert outcomes[jobs[2]].error is None
    assert outcomes[jobs[3]].error is None
    assert training.folder(tmp_path, short, 1).finished


def test_each_run_is_made_once_and_the_longest_first(tmp_path):
    requests = [registry.get(name).request("cpu") for name in ("fig2", "fig3-fcn", "table1")]
    jobs, finished = runner.jobs_of(requests, tmp_path, None, 1)
    assert finished == 0
    assert len({(j.config, j.seed) for j in jobs}) == len(jobs) == 5 + 18
    assert all(j.config.batch_size is None and j.config.task.name == "rank-2" for j in jobs[:3])
    shared = [j for j in jobs if len(j.names) == 2]
    assert len(shared) == 4
