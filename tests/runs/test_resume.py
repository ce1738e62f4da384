"""A run that was killed at any moment ends with the numbers of one that was not, bit by bit."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import run_task
import torch

import catapult_ext as cx
from catapult_ext.runs import RunError, RunFolder, StoredRun, UnwritableFile
from catapult_ext.training.chain import Chain

KINDS = ["gd", "sgd", "batchnorm"]


def assert_same(history: cx.History, other: cx.History) -> None:
    """Equal in every bit, missing values included."""
    assert history.metrics.equals(other.metrics)
    assert (history.result, history.catapult_count) == (other.result, other.catapult_count)
    assert history.engine == other.engine
    assert history.best is not None
    assert other.best is not None
    for field in ("step", "validation_loss", "validation_error", "test_loss", "test_error", "measures"):
        assert getattr(history.best, field) == getattr(other.best, field), field
    for name, value in history.best.state_dict.items():
        assert torch.equal(value, other.best.state_dict[name]), name
    assert history.tensors.keys() == other.tensors.keys()
    for name, kept in history.tensors.items():
        assert torch.equal(kept["steps"], other.tensors[name]["steps"]), name
        assert torch.equal(kept["values"], other.tensors[name]["values"]), name


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
    # With a checkpoint at each step, every stretch of the native engine is one step.
    place, name = (Chain, "steps_") if whole.engine == "native" else (cx.Observation, "step_")
    original = getattr(place, name)

    def counted(*arguments: object) -> object:
        if len(steps_made) == 8:
            raise Crash
        steps_made.append(1)
        return original(*arguments)

    monkeypatch.setattr(place, name, counted)
    with pytest.raises(Crash):
        run_task.run(tmp_path / "cut", kind)
    steps_made.clear()
    assert_same(run_task.run(tmp_path / "cut", kind), whole)
    assert len(steps_made) == 4  # 12 in all


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that makes runs in processes of their own, see `run_task`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, run_task.__file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


class Child:
    """A run in a process of its own."""

    def __init__(self, server: subprocess.Popen[str], root: Path, steps: int, kind: str = "sgd") -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        self.output = server.stdout
        server.stdin.write(f"{root} {kind} {steps}\n")
        server.stdin.flush()
        self.pid = int(self.output.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, "the run ended before it could be killed"

    def wait(self) -> int:
        return int(self.output.readline())


def wait_for_checkpoint(root: Path, later_than: int = 0) -> int:
    """Wait for a checkpoint below `root` that is younger than that; its time."""
    deadline = time.monotonic() + 60
    while True:
        found = [f.stat().st_mtime_ns for f in root.glob("**/resume.safetensors")]
        if found and found[0] > later_than:
            return found[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("sgd", 4),
        ("adam", 3),
        ("catapults", 3),
        *(
            pytest.param(k, n, marks=pytest.mark.slow)
            for k, n in (("sgd", 20), ("adam", 15), ("catapults", 15))
        ),
    ],
)
def test_kill_9_at_random_moments(
    kind: str, kills: int, tmp_path: Path, server: subprocess.Popen[str]
) -> None:
    """A third of the kills come anywhere in the start, the others in the work after some checkpoints were made."""
    steps, root, generator = 80 * kills, tmp_path / "killed", random.Random(time.time_ns())
    checkpoint = 0
    for point in range(kills):
        child = Child(server, root, steps, kind)
        for _ in range(generator.randint(1, 5) if point % 3 else 0):
            checkpoint = wait_for_checkpoint(root, checkpoint)
        time.sleep(generator.uniform(0, 0.08))
        child.kill()
        assert not list(root.glob("**/finished"))
    folder = run_task.only_folder(root)
    assert (folder / "resume.safetensors").exists()
    assert (folder / "metrics.jsonl").read_bytes().count(b"\n") < steps
    resumed = run_task.run(root, kind, steps=steps, checkpoint_seconds=1e9)
    whole = run_task.run(tmp_path / "whole", kind, steps=steps, checkpoint_seconds=1e9)
    assert_same(resumed, whole)
    if kind != "sgd":  # there were spikes, and around them more was recorded than elsewhere
        recorded = int(whole.metrics["lambda_1"].notna().sum())
        assert steps // run_task.SPARSE + 2 < recorded < steps
        assert len(whole.tensors["agop"]["steps"]) == recorded


def test_a_second_process_is_refused_and_the_first_goes_on(
    tmp_path: Path, server: subprocess.Popen[str]
) -> None:
    root, steps = tmp_path / "shared", 200
    child = Child(server, root, steps)
    wait_for_checkpoint(root)
    folder = run_task.only_folder(root)
    assert StoredRun(folder).state == "running"
    with pytest.raises(RunError, match=f"{folder}: another process is working on this run"):
        run_task.run(root, "sgd", steps=steps)
    assert child.wait() == 0
    assert StoredRun(folder).state == "finished"
    assert_same(run_task.run(root, "sgd", steps=steps), run_task.run(tmp_path / "whole", "sgd", steps=steps))


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_refused(root: Path, reason: str) -> str:
    """A run in `root` fails on a file that cannot be written; the name of that file. Nothing half is left."""
    with pytest.raises(UnwritableFile, match=rf"cannot be written \(.*{reason}") as caught:
        run_task.run(root, "sgd")
    assert not list(root.glob("**/finished"))
    assert not list(root.glob("**/.*.tmp"))
    for lines in root.glob("**/metrics.jsonl"):
        pd.read_json(lines, lines=True)  # whole lines only
    return Path(str(caught.value).split(": cannot")[0]).name


def test_files_that_cannot_grow_are_named_and_nothing_is_lost(tmp_path: Path) -> None:
    whole = run_task.run(tmp_path / "whole", "sgd")
    named = set()
    for size in (10, 400, 1000, 3000, 5000, 6000, 7000):
        with largest_file(size):
            named.add(assert_refused(tmp_path / "full", "File too large"))
    assert {"config.json", "training.json", "resume.safetensors"} <= named
    folder = RunFolder(tmp_path, "lines", {}, 0)
    with folder.open() as session:
        session.resume()
        session.append([{"step": step} for step in range(20)])
        with largest_file(500), pytest.raises(UnwritableFile, match=r"metrics.jsonl: cannot be written"):
            session.append([{"step": step} for step in range(20, 100)])
    assert len(pd.read_json(folder.path / "metrics.jsonl", lines=True)) == 20
    assert_same(run_task.run(tmp_path / "full", "sgd"), whole)


def test_a_full_disk_is_an_error_of_one_line_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    try:
        whole = run_task.run(tmp_path / "whole", "sgd")
        ballast = disk / "ballast"
        for room in (0, 8, 16, 32):  # KiB that are left to the run
            with open(ballast, "ab", buffering=0) as file:
                with contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                file.truncate(file.tell() - room * 1024)
            assert_refused(disk / "runs", "No space left on device")
        ballast.unlink()
        assert_same(run_task.run(disk / "runs", "sgd"), whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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
