"""A run that was killed at any moment ends with the numbers of one that was not, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import run_task
import torch

import catapult_ext as cx

KINDS = ["gd", "sgd", "batchnorm"]


def assert_same(history: cx.History, other: cx.History) -> None:
    """Equal in every bit, missing values included."""
    assert history.metrics.equals(other.metrics)
    assert (history.result, history.catapult_count) == (other.result, other.catapult_count)
    assert history.best is not None
    assert other.best is not None
    for field in ("step", "validation_loss", "validation_error", "test_loss", "test_error", "measures"):
        assert getattr(history.best, field) == getattr(other.best, field), field
    for name, value in history.best.state_dict.items():
        assert torch.equal(value, other.best.state_dict[name]), name


class Crash(BaseException):
    """Stands for the end of the process."""


class CrashAt:
    """Replaces a durable operation by one that, at its `last` call over all, crashes before or after it."""

    def __init__(self, last: int, after: bool) -> None:
        self.calls, self.last, self.after = 0, last, after

    def wrap(self, operation: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **keywords: object) -> object:
            self.calls += 1
            if self.calls == self.last and not self.after:
                raise Crash
            result = operation(*arguments, **keywords)
            if self.calls == self.last:
                raise Crash
            return result

        return wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_any_write_changes_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 2
    whole_model = run_task.model(kind)
    whole = run_task.run(tmp_path / "whole", kind, steps=steps, network=whole_model)
    assert len(whole.metrics) == steps + 1

    counter = CrashAt(-1, False)
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counter.wrap(getattr(os, name)))
        run_task.run(tmp_path / "counted", kind, steps=steps)
    assert counter.calls > 15

    generator = random.Random(kind)
    points = range(1, counter.calls + 1)  # all of them for SGD, whose state is the richest
    for last in points if kind == "sgd" else generator.sample(points, 6):
        root, crash = tmp_path / str(last), CrashAt(last, after=generator.random() < 0.5)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, crash.wrap(getattr(os, name)))
            with pytest.raises(Crash):
                run_task.run(root, kind, steps=steps)
        # What a crash may leave beside: half of a line, and a temporary file.
        lines = list(root.glob("**/metrics.jsonl"))
        if lines and generator.random() < 0.5:
            with open(lines[0], "ab") as file:
                file.write(b'{"step": 99, "lo')
            (lines[0].parent / ".resume.safetensors.tmp").write_bytes(b"half")
        model = run_task.model(kind)
        assert_same(run_task.run(root, kind, steps=steps, network=model), whole)
        for (name, value), expected in zip(
            model.state_dict().items(), whole_model.state_dict().values(), strict=True
        ):
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_last_checkpoint_not_from_the_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_task.run(tmp_path / "whole", kind)
    steps_made: list[int] = []
    original = cx.Observation.step_

    def counted(self: cx.Observation, lr: float) -> None:
        if len(steps_made) == 8:
            raise Crash
        steps_made.append(1)
        original(self, lr)

    monkeypatch.setattr(cx.Observation, "step_", counted)
    with pytest.raises(Crash):
        run_task.run(tmp_path / "cut", kind)
    steps_made.clear()
    assert_same(run_task.run(tmp_path / "cut", kind), whole)
    assert len(steps_made) == 4  # 12 in all


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(kills: int, tmp_path: Path) -> None:
    steps, generator = 350 * kills, random.Random(time.time_ns())
    command = [sys.executable, run_task.__file__, str(tmp_path / "killed"), "sgd", str(steps)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    left_at: list[int] = []
    for _ in range(kills):
        child = subprocess.Popen(command, env=environment, cwd=tmp_path)
        deadline = time.monotonic() + 60
        state = "**/resume.safetensors"
        before = {f.stat().st_mtime_ns for f in (tmp_path / "killed").glob(state)}
        while {f.stat().st_mtime_ns for f in (tmp_path / "killed").glob(state)} in (set(), before):
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        assert child.poll() is None, "the run ended before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        folder = run_task.only_folder(tmp_path / "killed")
        assert not (folder / "finished").exists()
        left_at.append((folder / "metrics.jsonl").read_bytes().count(b"\n"))
    assert left_at == sorted(left_at)
    assert left_at[0] > 0
    assert left_at[-1] < steps
    resumed = run_task.run(tmp_path / "killed", "sgd", steps=steps, checkpoint_seconds=1e9)
    whole = run_task.run(tmp_path / "whole", "sgd", steps=steps, checkpoint_seconds=1e9)
    assert_same(resumed, whole)


def test_a_finished_run_is_loaded_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run_task.model("sgd")
    first = run_task.run(tmp_path, "sgd", network=model)

    def forbidden(*_: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(cx.Observer, "__call__", forbidden)
    again_model = run_task.model("sgd")
    again = run_task.run(tmp_path, "sgd", network=again_model)
    assert_same(again, first)
    assert (again.config, again.seconds) == (first.config, first.seconds)
    for value, expected in zip(again_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected)
    names = sorted(f.name for f in run_task.only_folder(tmp_path).iterdir() if f.name != ".lock")
    assert names == [
        "config.json",
        "environment.json",
        "finished",
        "metrics.parquet",
        "result.json",
        "tensors.safetensors",
        "training.json",
    ]


def test_diverged_runs_are_finished_runs(tmp_path: Path) -> None:
    changes: dict[str, object] = {"schedule": cx.Constant(100.0), "stop": cx.Stop(max_steps=100)}
    first = run_task.run(tmp_path, "gd", **changes)
    assert first.result == "diverged"
    assert_same(run_task.run(tmp_path, "gd", **changes), first)
