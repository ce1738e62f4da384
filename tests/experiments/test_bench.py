"""The benchmarks: timing arithmetic on a clock of our own, the lines, and every job once at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from python_experiments import bench
from python_experiments.bench import lines, memory, timing
from python_experiments.bench.cases import JOBS, Case, Job, select

SMALL = {
    "n": 24,
    "d": 20,
    "width": 24,
    "fan_in": 33,
    "fan_out": 17,
    "q": 50,
    "image": 6,
    "channels": 5,
    "batch": 3,
    "k": 4,
}


class Clock:
    """Seconds that only pass when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_interleaved_medians_and_ratios() -> None:
    clock, log = Clock(), []
    # The machine gets slower from round to round; ratios within a round are not touched by that.
    slowness = iter([1] * 12 + [s for s in (1, 2, 3) for _ in range(2)])

    def call(name: str, seconds: float) -> None:
        log.append(name)
        clock.spend(seconds * next(slowness))

    times = timing.interleaved(
        {"a": lambda: call("a", 0.5), "b": lambda: call("b", 0.25)}, "a", repeats=3, seconds=1e9, clock=clock
    )
    assert log == [*"aaaaaabbbbbb", *"ab", *"ba", *"ab"]
    assert times["a"].median == pytest.approx(1.0)
    assert times["b"].median == pytest.approx(0.5)
    assert times["b"].low == pytest.approx(0.375)
    assert times["b"].high == pytest.approx(0.625)
    assert (times["b"].ratio, times["a"].ratio) == (pytest.approx(0.5), 1.0)
    assert times["b"].ratio_low == pytest.approx(times["b"].ratio_high)
    assert times["a"].rounds == 3


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    times = timing.interleaved(
        {"a": lambda: clock.spend(1e-5), "b": lambda: clock.spend(2e-5)},
        "a",
        repeats=5,
        seconds=9,
        clock=clock,
    )
    assert times["b"].median == pytest.approx(2e-5)
    assert times["b"].ratio == pytest.approx(2)
    assert clock.now > 5 * 2 * 1.5e-3


def test_rounds_end_in_time_and_slow_peers_early() -> None:
    clock = Clock()
    times = timing.interleaved(
        {"a": lambda: clock.spend(1), "slow": lambda: clock.spend(5)},
        "a",
        repeats=100,
        seconds=30,
        clock=clock,
    )
    assert times["slow"].rounds == 3
    assert 3 < times["a"].rounds < 20
    assert times["slow"].ratio == pytest.approx(5)


def test_select_by_beginning_and_unknown_names() -> None:
    assert [job.name for job in select([])] == list(JOBS)
    assert {job.name for job in select(["sgd", "gram-128"])} == {"sgd-step-5", "sgd-step-32", "gram-128"}
    with pytest.raises(ValueError, match=r"no benchmark is called 'gramm'; there are .*gram-128"):
        select(["gramm"])


def small(job: Job) -> Job:
    shapes = {name: min(value, SMALL.get(name, value)) for name, value in job.shapes.items()}
    return Job(job.name, job.title, job.baseline, shapes, job.build, job.target, job.error)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_computes_what_it_says(name: str) -> None:
    job = small(JOBS[name])
    case = job.build(job.shapes)
    assert {job.baseline, "catapult_ext"} <= case.implementations.keys()
    assert "catapult_ext" in case.errors
    for implementation, call in case.implementations.items():
        if implementation not in case.optional:
            call()
    for implementation, error in case.errors.items():
        assert error() < (1e-4 if implementation == "torch.lobpcg" else 5e-6), implementation


def test_main_writes_one_line_per_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small(JOBS["gram-128"])
    monkeypatch.setitem(JOBS, "gram-128", job)
    said: list[str] = []
    path = bench.main(["gram-128"], tmp_path, 3, 1, memory=False, say=said.append)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["implementation"] for row in rows] == ["torch.mm", "catapult_ext", "BLAS syrk"]
    for row in rows:
        assert row["shapes"] == {"n": 24, "fan_in": 33, "fan_out": 17}
        assert row["median_s"] > 0
        assert row["ratio"] > 0
        assert 0 < row["gflops"] / row["peak_gflops"] < 2
        assert row["dtype"] == "float32"
        assert row["gflops"] == pytest.approx(24**2 * 50 / row["median_s"] / 1e9)
        assert 0 < row["error_float64"] < 1e-5
        assert row["threads"] == 1
        assert row["simd"] in ("scalar", "avx2", "avx512")
        assert row["versions"]["torch"]
        assert row["command"].split()[0] == "catapult"
    assert "| `gram-128` | n 24, fan_in 33, fan_out 17 | torch.mm |" in said[-1]


def test_an_optional_peer_that_fails_is_told_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no compiler")

    def build(shapes: object) -> Case:
        calls = {"plain": lambda: None, "catapult_ext": lambda: None, "compiled": broken}
        return Case(calls, optional=frozenset({"compiled"}))

    monkeypatch.setitem(JOBS, "maybe", Job("maybe", "", "plain", {}, build))
    said: list[str] = []
    path = bench.main(["maybe"], tmp_path, 3, 1, memory=False, say=said.append)
    assert [line["implementation"] for line in lines.read_lines([path])] == ["plain", "catapult_ext"]
    assert "maybe: compiled does not run on this machine and is left out: RuntimeError: no compiler" in said
    monkeypatch.setitem(
        JOBS, "maybe", Job("maybe", "", "plain", {}, lambda shapes: Case({"plain": broken, "x": broken}))
    )
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.main(["maybe"], tmp_path, 3, 1, memory=False, say=said.append)


def test_read_lines_keeps_the_latest_and_names_a_broken_line(tmp_path: Path) -> None:
    row = {"job": "a", "implementation": "b", "cpu": "c", "threads": 1, "device": "cpu", "time": "2"}
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({**row, "time": time, "x": time}) for time in "132"))
    assert [line["x"] for line in lines.read_lines([path])] == ["3"]
    path.write_text(json.dumps(row) + "\n{oops\n")
    with pytest.raises(
        ValueError, match=r"lines\.jsonl, line 2: expected a measurement as JSON, got '\{oops'"
    ):
        lines.read_lines([path])


def test_table_says_met_or_missed() -> None:
    row = {
        **{"job": "a", "implementation": "catapult_ext", "shapes": {"n": 3}, "baseline": "torch"},
        **{"median_s": 0.0123, "ratio": 1.25, "ratio_quartiles": [1.2, 1.3], "target_ratio": 1.2},
        **{"gflops": None, "peak_extra_bytes": 3 * 2**20, "error_float64": 1.23e-7},
    }
    table = lines.markdown_table([row, {**row, "ratio": 1.1}])
    assert (
        "| `a` | n 3 | catapult_ext | 12.3 ms | 1.25 (1.2 - 1.3) | <= 1.2: missed |  | 3.0 MiB | 1.2e-07 |"
        in table
    )
    assert "<= 1.2: met" in table


def test_peak_memory_of_a_known_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def build(shapes: object) -> Case:
        return Case({"keeps": lambda: torch.ones(8, 2**20), "none": lambda: None})

    monkeypatch.setitem(JOBS, "memory", Job("memory", "", "none", {}, build))
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell peak memory")
    assert memory.measure("memory", "keeps", 1) == pytest.approx(32 * 2**20, rel=0.05)
    assert memory.measure("memory", "none", 1) < 2**20
