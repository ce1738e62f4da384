"""A run in the terminal: live while it lasts, once where it has ended or where there is no terminal."""

from __future__ import annotations

import io
import json
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from catapult_ext.runs import RunFolder, RunResult, StoredRun
from python_experiments import readings, registry, training, watch
from python_experiments.progress import Board
from tests.experiments.helpers import call
from tests.experiments.synthetic import catapult_run

CONFIG = registry.get("fig3-fcn").presets["cpu"].config


def rows_of(run):
    return run.metrics.astype(object).to_dict("records")


def terminal(width=100):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_a_reading_is_the_latest_of_each_number():
    now = readings.reading(
        [
            {"step": 0, "loss": 2.0, "lr": 3.0, "critical_lr": 4.0, "lambda_1": 8.0},
            {"step": 1, "loss": 1.0, "lr": 3.0, "critical_lr": 2.0, "batch_critical_lr": 2.5},
            {"step": 2, "loss": 0.5, "critical_lr": math.nan},
        ]
    )
    assert (now.step, now.loss, now.lr, now.norm, now.critical_lr) == (2, 0.5, 3.0, 8.0, 2.0)
    assert (now.of_batch, now.steps_above) == (False, 1)
    assert now.line == "loss 0.5, rate 1.50 x critical"
    assert readings.reading([{"step": 0, "batch_critical_lr": 2.0, "lr": 1.0}]).of_batch
    assert readings.reading([]) == readings.Reading()
    assert readings.reading([{"step": 7, "lr": 0.25}]).line == "rate 0.25"


def test_catapults_are_those_of_the_detector():
    assert len(readings.catapults(rows_of(catapult_run(CONFIG, spike=6.0)))) == 1
    assert readings.catapults(rows_of(catapult_run(CONFIG, spike=0.0))) == []
    assert readings.catapults([{"step": 0, "loss": 1.0}]) is None  # no spectrum: it cannot be told


@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60),
    width=st.integers(1, 40),
    height=st.integers(1, 5),
)
def test_charts_show_the_largest_value_and_every_bar(values, width, height):
    lines = readings.chart(np.array(values), width, height)
    assert len(lines) == height
    assert {len(line) for line in lines} == {min(width, len(values))}
    assert " " not in lines[-1]
    heights = [sum(" ▁▂▃▄▅▆▇█".index(letter) for letter in column) for column in zip(*lines, strict=True)]
    if len(values) <= width:
        assert np.all(np.diff(np.array(heights)[np.argsort(values)]) >= 0)  # in the order of the values
    if len(set(heights)) > 1:
        assert max(heights) == 8 * height


def test_charts_of_nothing_are_empty():
    assert readings.chart(np.array([0.0, -1.0]), 10, 3) == []
    assert readings.chart(np.array([]), 10, 3) == []


def test_without_a_terminal_it_is_one_look(smoke):
    request = registry.get("fig3-fcn").request("smoke")
    config, seed = request.groups()["main"]["catapult"][0]
    folder = training.folder(smoke.out, config, seed).path
    text = call("watch", folder.relative_to(smoke.out), "--out", smoke.out).stdout
    run = training.read(smoke.out, config, seed)
    words = [line.split() for line in text.splitlines()]
    assert f"seed {seed}: {run.summary['result']} after" in text
    assert ["step", str(run.steps), "of", "at", "most", str(config.max_steps)] in words
    assert f"{run.metrics['loss'].iloc[-1]:.6g}" in text
    assert f"{run.metrics['lambda_1'].iloc[-1]:.6g}" in text
    assert f"{run.metrics['critical_lr'].iloc[-1]:.6g}" in text
    above = int((run.metrics["lr"] > run.metrics["batch_critical_lr"]).sum())
    assert ["steps", "with", "rate", ">", "critical", str(above)] in words
    assert "\x1b" not in text
    assert call("watch", "--out", smoke.out).stdout.count(", seed ") == 1  # the last one, without a name


def begin(session, rows):
    session.resume()
    session.append(rows)


def test_it_follows_a_run_to_its_end(tmp_path, monkeypatch):
    run = catapult_run(CONFIG, spike=6.0)
    rows = [{k: v for k, v in row.items() if v == v} for row in rows_of(run)]
    folder, console = RunFolder(tmp_path, "demo", {}, 0), terminal()
    monkeypatch.setattr(watch, "_SECONDS", 0.02)
    seen = threading.Event()
    view = watch.view

    def noted(*arguments):
        seen.set()
        return view(*arguments)

    monkeypatch.setattr(watch, "view", noted)
    with folder.open() as session:
        begin(session, rows[:3])
        follower = threading.Thread(target=watch.show, args=(StoredRun(folder.path), console))
        follower.start()
        for row in rows[3:]:
            session.append([row])
            seen.clear()
            assert seen.wait(5)
        assert follower.is_alive()
        session.finish(RunResult(run.metrics, {}, {"result": "max_steps", "seconds": 61.0}))
    follower.join(timeout=5)
    assert not follower.is_alive()
    text = console.file.getvalue()
    for step in (10, len(rows) - 1):
        assert f"\nstep                        {step} " in text
    assert "running, last row written" in text
    assert "max_steps after 61 s" in text
    assert "the last one from step" in text


@pytest.mark.parametrize(
    ("change", "words"), [({"pid": 2**22 + 1}, "interrupted"), ({"host": "far"}, "on far, last row written")]
)
def test_a_run_without_a_process_here_says_so(tmp_path, change, words):
    folder = RunFolder(tmp_path, "demo", {}, 0)
    with folder.open() as session:
        begin(session, [])
    file = folder.path / "environment.json"
    file.write_text(json.dumps([{**json.loads(file.read_text())[0], **change}]))
    console = Console(file=io.StringIO(), width=100)
    watch.show(StoredRun(folder.path), console)
    assert words in console.file.getvalue()
    assert "no step is recorded yet" in console.file.getvalue()


def test_many_runs_have_a_bar_each_where_there_is_a_terminal(tmp_path):
    folder = RunFolder(tmp_path, "demo", {}, 0)
    with folder.open() as session:
        begin(session, [{"step": 4, "loss": 0.5, "lr": 3.0, "critical_lr": 2.0}])
        for console, shown in ((terminal(), True), (Console(file=io.StringIO()), False)):
            with Board(console, 2, enabled=True) as board:
                assert board.shown is shown
                board.show({"one run": (folder.path, 40)})
                board.done()
                board.show({"another": (tmp_path / "none", 7)})
            text = console.file.getvalue()
            assert all(
                (words in text) is shown for words in ("one run", "4/40", "rate 1.50 x critical", "0/7")
            )
            assert shown or text == ""
