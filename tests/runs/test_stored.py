"""Run folders read by those who know nothing but the folder: finished, under way, cut off, damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import run_task

from catapult_ext.runs import (
    FORMAT,
    MetricsTail,
    RunError,
    RunFolder,
    StoredRun,
    UnreadableFile,
    find_runs,
)


def begun(root: Path, rows: int = 3) -> Path:
    """A run that stopped after that many rows, without a checkpoint."""
    folder = RunFolder(root, "demo", {"a": 1}, 5)
    with folder.open() as session:
        session.resume()
        session.append([{"step": step, "loss": 1.0 / (step + 1)} for step in range(rows)])
    return folder.path


def test_a_finished_run_and_one_under_way_read_the_same(tmp_path: Path) -> None:
    history = run_task.run(tmp_path, "gd")
    stored = StoredRun(run_task.only_folder(tmp_path))
    assert (stored.name, stored.seed, stored.config, stored.state) == (
        "test/gd",
        3,
        {"kind": "gd"},
        "finished",
    )
    assert stored.metrics().equals(history.metrics)
    assert stored.read("result")["result"] == history.result
    assert stored.read("nothing") is None

    stored = StoredRun(begun(tmp_path / "other"))
    assert stored.metrics().to_dict("list") == {"step": [0, 1, 2], "loss": [1.0, 0.5, 1 / 3]}
    assert stored.state == "running"  # its process is this one


@pytest.mark.parametrize(
    ("change", "state"),
    [({"pid": 2**22 + 1}, "interrupted"), ({"host": "another"}, "elsewhere"), ({"pid": 1}, "running")],
)
def test_the_state_of_a_run_is_that_of_its_process(
    tmp_path: Path, change: dict[str, object], state: str
) -> None:
    folder = begun(tmp_path)
    file = folder / "environment.json"
    (entry,) = json.loads(file.read_text())
    file.write_text(json.dumps([entry, {**entry, **change}]))
    assert StoredRun(folder).state == state
    file.unlink()
    assert StoredRun(folder).state == "interrupted"


def test_reading_changes_nothing(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}
    stored = StoredRun(folder)
    stored.metrics()
    assert stored.state
    assert find_runs(tmp_path) == [folder]
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()} == before


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a run folder, but there is no config.json in it"):
        StoredRun(tmp_path)
    folder = begun(tmp_path)
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "format": FORMAT + 1}))
    with pytest.raises(RunError, match="by a newer version of catapult_ext"):
        StoredRun(folder)
    config.write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(UnreadableFile, match=r"config.json: expected an entry 'name'"):
        StoredRun(folder)
    config.write_text(text)
    (folder / "finished").touch()
    (folder / "metrics.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnreadableFile, match=r"metrics.parquet: expected parquet"):
        StoredRun(folder).metrics()


def test_the_tail_follows_a_run_that_is_killed_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tail, file = MetricsTail(folder), folder / "metrics.jsonl"
    assert not tail.poll()

    def write(steps: list[int], rest: str = "") -> None:
        file.write_text("".join(f'{{"step": {step}}}\n' for step in steps) + rest)

    def steps() -> list[int]:
        return [row["step"] for row in tail.rows]

    write([0, 1], '{"ste')  # a line that is being written
    assert tail.poll()
    assert steps() == [0, 1]
    write([0, 1, 2, 3, 4])
    assert tail.poll()
    assert not tail.poll()
    assert steps() == [0, 1, 2, 3, 4]
    write([0, 1])  # cut off
    assert tail.poll()
    assert steps() == [0, 1]
    # Cut off and grown beyond what was read, with lines of other lengths: the tail stands within a line.
    file.write_text("".join(f'{{"step": {step}, "loss": 0.25}}\n' for step in range(6)))
    assert tail.poll()
    assert steps() == list(range(6))
    file.unlink()  # finished
    assert not tail.poll()
    assert steps() == list(range(6))
    file.write_text("?\n")
    with pytest.raises(UnreadableFile, match=r"metrics.jsonl: expected JSON lines"):
        MetricsTail(folder).poll()


def test_runs_are_found_by_path_and_by_how_their_names_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for seed, name in enumerate(["a", "a", "b/c"]):
        folder = RunFolder(tmp_path, name, {}, seed)
        with folder.open():
            pass
        os.utime(folder.path, (seed, seed))
        folders.append(folder.path)
    assert find_runs(tmp_path) == folders[::-1]  # the last one written in front
    assert find_runs(tmp_path, "a/") == folders[1::-1]
    assert find_runs(tmp_path, "b/c") == folders[2:]
    assert find_runs(tmp_path, folders[0].name) == folders[:1]
    assert find_runs(tmp_path, f"a/{folders[1].name}") == folders[1:2]
    assert find_runs("elsewhere", str(folders[0])) == folders[:1]
    monkeypatch.chdir(folders[2])
    assert find_runs(tmp_path, ".") == [Path(".")]
    assert find_runs(tmp_path, "nothing") == find_runs(tmp_path / "none") == []
    (folders[0] / "metrics.jsonl").touch()
    assert find_runs(tmp_path)[0] == folders[0]
