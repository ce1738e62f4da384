"""What a run folder holds and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import run_task
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext.runs import (
    FORMAT,
    RunError,
    RunFolder,
    UnreadableFile,
    UnwritableFile,
    config_hash,
    describe,
)
from catapult_ext.runs.files import read_state, replace_file, write_state


@dataclasses.dataclass(frozen=True)
class Configuration:
    width: int = 4
    rates: tuple[float, ...] = (0.5, 1.5)
    root: Path = Path("a/b")


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != ".lock"}


def interrupted(root: Path, kind: str = "gd") -> Path:
    """A run that stopped in the middle, with a checkpoint."""

    class Stopped(Exception):
        pass

    class Bomb(cx.Recorder):
        def columns(self) -> tuple[str, ...]:
            return ("bomb",)

        def record(self, step: cx.training.Step) -> tuple[float]:
            if step.index == 5:
                raise Stopped
            return (1.0,)

    with pytest.raises(Stopped):
        run_task.run(root, kind, recorders=[Bomb()], probe=None)
    return run_task.only_folder(root / "test" / kind)


def test_folder_is_named_by_configuration_and_seed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "fig/three", Configuration(), 7)
    assert folder.path.parent == tmp_path / "fig" / "three"
    assert folder.path.name == f"{config_hash(folder.config)}-seed7"
    assert folder.path != RunFolder(tmp_path, "fig/three", Configuration(width=5), 7).path
    assert (
        folder.path.name.split("-")[0] == RunFolder(tmp_path, "x", Configuration(), 8).path.name.split("-")[0]
    )
    assert not any(tmp_path.iterdir())  # nothing is made before it is used


def test_files_of_a_run_say_what_was_run_on_what(tmp_path: Path) -> None:
    run_task.run(tmp_path, "gd", steps=3)
    folder = run_task.only_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config == {"format": FORMAT, "name": "test/gd", "seed": 3, "config": {"kind": "gd"}}
    training = json.loads((folder / "training.json").read_text())
    assert training["stop"]["max_steps"] == 3
    assert training["schedule"] == {
        "type": "Stepwise",
        "rates": {"0": 0.4, "3": 0.6, "7": 0.5},
        "relative": True,
    }
    assert training["data"]["data.train"]["x"]["shape"] == [13, 5]
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert environment["cpu"]
    assert environment["memory_bytes"] > 2**20
    assert environment["catapult_ext"] == cx.__version__
    assert environment["build_info"]["simd"] == environment["simd"]
    assert set(environment["commit"]) == {"catapult_ext", "working_folder"}


def test_metrics_are_lines_while_running_and_parquet_when_finished(tmp_path: Path) -> None:
    history = run_task.run(tmp_path, "gd")
    parquet = pd.read_parquet(run_task.only_folder(tmp_path) / "metrics.parquet")
    assert parquet.equals(history.metrics)

    folder = interrupted(tmp_path, "sgd")
    lines = pd.read_json(folder / "metrics.jsonl", lines=True)
    assert lines["step"].tolist() == list(range(5))  # step 5 was the interrupted one
    assert lines["lr"].tolist()[:3] == [lines["lr"][0]] * 3
    assert lines["bomb"].tolist() == [1.0] * 5
    assert not (folder / "finished").exists()


def test_results_can_be_read_without_the_model(tmp_path: Path) -> None:
    history = run_task.run(tmp_path, "sgd")
    folder = RunFolder(tmp_path, "test/sgd", {"kind": "sgd"}, 3)
    assert folder.finished
    stored = cx.History.from_result(folder.read())
    assert stored.metrics.equals(history.metrics)
    with pytest.raises(RunError, match="expected a finished run"):
        RunFolder(tmp_path, "test/sgd", {"kind": "sgd"}, 4).read()
    assert not RunFolder(tmp_path, "test/sgd", {"kind": "sgd"}, 4).path.exists()


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": FORMAT + 1, "new": 1}))
    before = contents(folder)
    with pytest.raises(RunError, match=rf"written in format {FORMAT + 1} by a newer version of catapult_ext"):
        run_task.run(tmp_path, "gd")
    assert contents(folder) == before


def test_two_processes_on_one_run_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a", {}, 0)
    with folder.open():
        before = contents(folder.path)
        second = RunFolder(tmp_path, "a", {}, 0).open()
        with pytest.raises(RunError, match="another process is working on this run"):
            second.__enter__()
        assert contents(folder.path) == before
    with folder.open():
        pass


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "resume.safetensors",
            lambda b: b[: len(b) // 2],
            "resume.safetensors: expected a complete state file",
        ),
        ("resume.safetensors", lambda b: b"", "resume.safetensors: expected a complete state file"),
        (
            "resume.safetensors",
            lambda b: b"\x00" * len(b),
            "resume.safetensors: expected a complete state file",
        ),
        ("metrics.jsonl", lambda b: b[:40], "metrics.jsonl: expected at least [0-9]+ bytes .* got 40"),
        ("metrics.jsonl", lambda b: b"?" * len(b), "metrics.jsonl: expected JSON lines"),
        ("config.json", lambda b: b"{", "config.json: expected JSON"),
        ("config.json", lambda b: b"[]", "config.json: expected an object with an integer `format`"),
        ("training.json", lambda b: b"{", "training.json: expected JSON"),
        ("environment.json", lambda b: b"{", "environment.json: expected JSON"),
    ],
)
def test_damaged_files_are_named_and_kept(file: str, damage: object, message: str, tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    path = folder / file
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    state = folder / "resume.safetensors"
    before = state.read_bytes()
    with pytest.raises(UnreadableFile, match=message):
        interrupted(tmp_path)
    assert state.read_bytes() == before


def test_other_training_under_the_same_configuration_is_refused(tmp_path: Path) -> None:
    run_task.run(tmp_path, "gd", steps=3)
    with pytest.raises(RunError, match=r"training.stop.max_steps: stored 3, current 4"):
        run_task.run(tmp_path, "gd", steps=4)
    with pytest.raises(RunError, match=r"training.seed: stored 3, current 5"):
        run_task.run(tmp_path, "gd", steps=3, seed=5)
    recorders = [
        cx.BatchCriticalRate(),
        cx.Spectrum(k=2, every=3),
        cx.AGOPAlignment(reference=2 * torch.eye(5), every=4),
    ]
    with pytest.raises(RunError, match=r"training.recorders\[2\].reference.checksum"):
        run_task.run(tmp_path, "gd", steps=3, recorders=recorders)
    assert run_task.run(tmp_path, "gd", steps=3).result == "max_steps"


def test_resuming_elsewhere_warns_that_bits_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.warns(UserWarning, match="threads: 1 before, 77 now"):
        interrupted(tmp_path)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
trees = st.recursive(
    scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(), t, max_size=3), max_leaves=8
)


@given(tree=trees)
@settings(max_examples=60, deadline=None)
def test_descriptions_are_json_and_their_hash_ignores_key_order(tree: object) -> None:
    described = describe(tree)
    assert json.loads(json.dumps(described)) == described

    def reverse(value: object) -> object:
        if isinstance(value, dict):
            return {k: reverse(v) for k, v in reversed(value.items())}
        return [reverse(v) for v in value] if isinstance(value, list) else value

    assert config_hash(describe(reverse(tree))) == config_hash(described)
    assert config_hash(describe([tree, 0])) != config_hash(described)


def test_descriptions_tell_types_and_tensors_apart() -> None:
    assert describe(Configuration()) == {
        "type": "Configuration",
        "width": 4,
        "rates": [0.5, 1.5],
        "root": str(Path("a/b")),
    }
    tensor = torch.arange(6.0).reshape(2, 3)
    one, other = describe(tensor), describe(tensor.t().contiguous().t())
    assert one == other  # same values, other strides
    changed = tensor.clone()
    changed[1, 2] += 1e-6
    assert describe(changed)["checksum"] != one["checksum"]
    assert describe(np.float32(0.5)) == 0.5
    assert describe(torch.float64) == "torch.float64"
    assert describe(torch.zeros(0))["shape"] == [0]
    with pytest.raises(TypeError, match=r"config\['f'\]\[0\]: expected .* got function"):
        describe({"f": [describe]})
    with pytest.raises(ValueError, match=r"config.width: expected a finite number, got nan"):
        describe(Configuration(width=float("nan")))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected string or integer keys, got 1\.5"):
        describe({1.5: 0})


@pytest.mark.parametrize("name", ["", "/a", "a/", "../a", "a//b", "a b", ".a"])
def test_names_that_leave_the_root_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: expected letters"):
        RunFolder(tmp_path, name, {}, 0)


def test_state_files_give_back_every_tensor_and_scalar(tmp_path: Path) -> None:
    base = torch.randn(4, 6, dtype=torch.float64)
    state = {
        "a": base,
        "view": base[:, ::2],
        "tail": base[2:],
        "again": [base, base.t()],
        "nothing": None,
        "number": 0.1 + 0.2,
        "nan": float("nan"),
        "flags": {"x": True, "y": 3},
        "empty": torch.empty(0, 3),
        "count": torch.tensor(5),
        "bytes": torch.Generator().get_state(),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    file = tmp_path / "state.safetensors"
    write_state(file, state)
    found = read_state(file)
    assert list(found) == list(state)
    assert torch.equal(found["view"], base[:, ::2])
    assert torch.equal(found["tail"], base[2:])
    assert torch.equal(found["again"][1], base.t())
    for name in ("a", "empty", "count", "bytes", "half"):
        assert torch.equal(found[name], state[name])  # type: ignore[arg-type]
        assert found[name].dtype == state[name].dtype  # type: ignore[attr-defined]
    assert found["number"] == 0.1 + 0.2
    assert np.isnan(found["nan"])
    assert found["flags"] == {"x": True, "y": 3}
    assert found["nothing"] is None
    write_state(file, torch.tensor(2.5))
    assert read_state(file) == 2.5
    with pytest.raises(
        TypeError, match="state/a/0: expected tensors, dicts, lists and JSON scalars, got object"
    ):
        write_state(file, {"a": [object()]})
    assert read_state(file) == 2.5


def test_a_failing_write_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UnwritableFile, match=r"/a: cannot be written \(No space left on device\)"):
        replace_file(file, full)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert file.read_text() == "old"


def test_rows_beyond_the_checkpoint_are_cut_off_and_the_next_checkpoint_knows_it(tmp_path: Path) -> None:
    """A kill can come after rows were flushed and before the next checkpoint, again and again."""
    folder = RunFolder(tmp_path, "demo", {"a": 1}, 0)
    with folder.open() as session:
        assert session.resume() is None
        session.append([{"step": 0}])
        session.checkpoint({"step": 1})
        session.append([{"step": 1, "note": "beyond the checkpoint" * 50}])
    for step in range(1, 4):
        with folder.open() as session:
            found = session.resume()
            assert found is not None
            state, rows = found
            assert state == {"step": step}
            assert [row["step"] for row in rows] == list(range(step))
            session.checkpoint(state)  # before any row was added
        with folder.open() as session:
            assert session.resume() == found
            session.append([{"step": step}])
            session.checkpoint({"step": step + 1})
            session.append([{"step": step + 1, "note": "beyond the checkpoint" * 50}])
