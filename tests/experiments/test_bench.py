"""The benchmarks: timing arithmetic on a clock of our own, the lines, and every job once at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.linalg.blas  # noqa: F401  its threads are looked at
from threadpoolctl import threadpool_info, threadpool_limits

from catapult_ext import _C
from python_experiments import bench, style
from python_experiments.bench import figures, lines, scaling, tables, timing
from python_experiments.bench.cases import JOBS, Case, Goal, Job, select

SMALL = {
    "n": 24,
    "patches": 2,
    "d": 20,
    "width": 24,
    "fan_in": 33,
    "fan_out": 17,
    "q": 50,
    "image": 6,
    "channels": 5,
    "batch": 3,
    "k": 4,
    "outputs": 3,
    "depth": 3,
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
    return Job(job.name, job.title, job.baseline, shapes, job.build, job.goals, job.error)


# torch loads its forward mode with a deprecated function of its own.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", JOBS)
def test_every_job_computes_what_it_says(name: str) -> None:
    job = small(JOBS[name])
    case = job.build(job.shapes)
    assert {job.baseline, "catapult_ext"} <= case.implementations.keys()
    assert "catapult_ext" in case.errors
    for implementation, call in case.implementations.items():
        if implementation not in case.optional:
            call()
    # An iteration that ends at a residual of 1e-2, as the sharpness of a training step does, is off by its square
    # over the gap.
    iterated = {"torch.lobpcg": 1e-4} | ({"catapult_ext": 1e-3} if name.startswith("hessian") else {})
    for implementation, error in case.errors.items():
        assert error() < iterated.get(implementation, 5e-6), implementation


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
        assert row["gbytes_per_s"] == pytest.approx(4 * 24 * (33 + 17 + 24) / row["median_s"] / 1e9)
        assert row["flop_per_byte"] == pytest.approx(24 * 50 / (4 * (33 + 17 + 24)))
        assert 0.5 < row["peak_gbytes_per_s"] < 2000
        own = row["implementation"] == "catapult_ext"
        assert row["goals"] == ([{"reach": 1 / 1.7, "go_for": 0.5, "over": "torch.mm"}] if own else [])
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
    row = {
        "job": "a",
        "implementation": "b",
        "cpu": "c",
        "simd": "d",
        "threads": 1,
        "device": "cpu",
        "time": "2",
    }
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({**row, "time": time, "x": time}) for time in "132"))
    assert [line["x"] for line in lines.read_lines([path])] == ["3"]
    path.write_text(json.dumps(row) + "\n{oops\n")
    with pytest.raises(
        ValueError, match=r"lines\.jsonl, line 2: expected a measurement as JSON, got '\{oops'"
    ):
        lines.read_lines([path])


def test_table_says_met_or_missed() -> None:
    goals = [{"reach": 1.2, "go_for": 1.0, "over": "torch"}]
    row = {
        **{"job": "a", "implementation": "catapult_ext", "shapes": {"n": 3}, "baseline": "torch"},
        **{"median_s": 0.0123, "ratio": 1.25, "ratio_quartiles": [1.2, 1.3], "goals": goals},
        **{"gflops": None, "gbytes_per_s": None, "peak_extra_bytes": 3 * 2**20, "error_float64": 1.23e-7},
    }
    table = tables.markdown_table([row, {**row, "ratio": 1.1}, {**row, "ratio": 1.0}])
    assert (
        "| `a` | n 3 | catapult_ext | 12.3 ms | 1.25 (1.2 - 1.3) | <= 1.2: **missed** |  |  | 3.0 MiB | 1.2e-07 |"
        in table
    )
    assert "<= 1.2: reach met" in table
    assert "<= 1.2: met" in table
    # A goal over another implementation than the baseline.
    other = {**row, "implementation": "peer", "ratio": 0.5, "goals": []}
    beside = {**row, "ratio": 0.55, "goals": [{**goals[0], "over": "peer"}]}
    assert "| 1.1 of peer <= 1.2: reach met |" in tables.markdown_table([other, beside])


def test_the_blas_of_others_has_as_many_threads_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def look() -> None:
        seen.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    calls = {"plain": look, "catapult_ext": look}
    monkeypatch.setitem(JOBS, "look", Job("look", "", "plain", {}, lambda shapes: Case(calls)))
    with threadpool_limits(2, user_api="blas"):  # as it comes on two cores
        look()
        assert seen == {2}
        seen.clear()
        bench.main(["look"], tmp_path, repeats=3, seconds=0.01, memory=False, say=lambda _: None)
    assert seen - {2} == {1}


def test_simd_levels_are_measured_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JOBS, "gram-128", small(JOBS["gram-128"]))
    before, levels = _C.simd_level(), _C.available_simd_levels()
    path = bench.main(["gram-128"], tmp_path, 3, memory=False, simd=levels, say=lambda text: None)
    stored = lines.read_lines([path])
    assert [line["simd"] for line in stored if line["implementation"] == "catapult_ext"] == levels
    assert _C.simd_level() == before
    with pytest.raises(ValueError, match=r"simd: expected one of scalar.*, got 'sse9'"):
        bench.main(["gram-128"], tmp_path, 3, memory=False, simd=["sse9"], say=lambda text: None)


def measurement(job: str, implementation: str, ratio: float, **other: object) -> dict[str, object]:
    """A stored line of a job that is declared."""
    known = JOBS[job]
    return {
        **{"job": job, "implementation": implementation, "shapes": dict(known.shapes), "ratio": ratio},
        **{"baseline": known.baseline, "ratio_quartiles": [0.9 * ratio, 1.1 * ratio], "threads": 1},
        **{"cpu": "Some CPU", "simd": "avx512", "time": "2026-11-28T01:00", "versions": {"torch": "2.13.0"}},
        **other,
    }


def row_of(table: str, job: str) -> list[str]:
    found = [line for line in table.splitlines() if line.startswith(f"| `{job}`")]
    return [cell.strip() for cell in found[0].strip("|").split(" | ")]


def test_performance_table_has_goals_losses_and_what_was_not_measured() -> None:
    stored = [
        measurement("chain-fcn2-5", "torch steps", 1.0),
        measurement("chain-fcn2-5", "catapult_ext", 0.25),
        measurement("chain-fcn2-5", "catapult_ext, general engine", 0.2),
        # A plain step that does less is no loss; a peer that does the same is one.
        measurement("sgd-step-5", "torch step", 1.0),
        measurement("sgd-step-5", "catapult_ext", 1.5),
        measurement("sgd-step-5", "torch.compile step", 0.8),
        measurement("agop-100", "torch.mm", 1.0),
        measurement("agop-100", "catapult_ext", 0.7),
        measurement("agop-100", "BLAS syrk", 0.6),
        measurement("agop-3072", "torch.mm", 1.0),
        measurement("agop-3072", "catapult_ext", 0.5),
        measurement("agop-3072", "BLAS syrk", 0.6),
        measurement("top-10-warm-of-2000", "torch.linalg.eigh", 1.0),
        measurement("top-10-warm-of-2000", "catapult_ext", 0.02),
        measurement("top-10-warm-of-2000", "scipy eigsh (ARPACK)", 0.01),
        measurement("gram-128", "torch.mm", 1.0, shapes={"n": 1}),
        measurement("gram-128", "catapult_ext", 0.3, shapes={"n": 1}),  # other sizes than declared
        measurement(
            "fcn5-observed-step", "catapult_ext", 0.3, cpu="Another", simd="avx2", time="2026-11-27T01:00"
        ),
        measurement(
            "fcn5-observed-step", "torch step", 1.0, cpu="Another", simd="avx2", time="2026-11-27T01:00"
        ),
        measurement("agop-100", "catapult_ext", 0.1, cpu="Another", time="2026-11-29T01:00"),
    ]
    table = tables.performance_table(stored)
    assert table.startswith("Some CPU, avx512, one thread, torch 2.13.0, 2026-11-28.\n")
    assert row_of(table, "chain-fcn2-5")[1:] == [
        *["0.25 (0.23 - 0.28)", "0.4", "0.2", "reach met", "torch steps"],
        "catapult_ext, general engine 0.2",
    ]
    assert row_of(table, "sgd-step-5")[1:] == [
        *["1.5 (1.35 - 1.65)", "0.95", "0.95", "**missed**", "torch step"],
        "torch.compile step 0.8",
    ]
    assert row_of(table, "agop-100")[-1] == "**BLAS syrk 0.6**"
    assert "`agop-3072`" not in table
    assert "`agop-3072`" in tables.standing_table(stored)
    warm = [line for line in table.splitlines() if "`top-10-warm-of-2000`" in line]
    assert len(warm) == 2
    assert "reach met | torch.linalg.eigh | **scipy eigsh (ARPACK) 0.01** |" in warm[0]
    assert "| 2 | 1 | 0.5 | **missed** | scipy eigsh (ARPACK) |" in warm[1]
    assert row_of(table, "gram-128")[1] == "not measured"
    assert row_of(table, "cnn-observed-step")[1] == "not measured"
    # What another processor alone has measured stands there, and says so.
    assert [
        line for line in table.splitlines() if "`fcn5-observed-step` (1): FCN5" in line and "| 0.3 (" in line
    ]
    assert table.endswith("\n(1) Another, avx2, one thread, torch 2.13.0, 2026-11-27.\n")
    assert "scaling-" not in tables.standing_table(stored)
    with pytest.raises(ValueError, match="lines: expected some of one thread"):
        tables.performance_table([{**stored[0], "threads": 2}])


def test_levels_table_has_jobs_of_more_than_one_processor_or_instruction_set() -> None:
    stored = [
        measurement("gram-128", "catapult_ext", 0.3, cpu="Another", time="2026-11-27T01:00"),
        measurement("gram-128", "catapult_ext", 0.5),
        measurement("gram-128", "catapult_ext", 0.75, simd="avx2"),
        measurement("agop-100", "catapult_ext", 0.5),
    ]
    assert tables.levels_table(stored) == (
        "| job | avx512 | avx2 | Another, avx512, 2026-11-27 |\n| --- | ---: | ---: | ---: |\n"
        "| `gram-128` | 0.5 | 0.75 | 0.3 |\n"
    )


@pytest.mark.parametrize("page", tables.PAGES)
def test_pages_of_the_repository_are_what_the_stored_lines_give(page: str) -> None:
    root = Path(__file__).parents[2]
    text = (root / page).read_text()
    stored = lines.read_lines([root / "docs/results/cpu/lines.jsonl"])
    for name, render in tables.PAGES[page].items():
        assert tables.with_block(text, name, render(stored)) == text, f"make bench-docs writes {page} anew"


def test_a_block_is_replaced_between_its_comments_and_nowhere_else(tmp_path: Path) -> None:
    text = "a\n<!-- bench: x -->\nold\n<!-- /bench: x -->\nb\n"
    new = tables.with_block(text, "x", "new\n")
    assert new == "a\n<!-- bench: x -->\n\nnew\n\n<!-- /bench: x -->\nb\n"
    assert tables.with_block(new, "x", "new\n") == new
    for broken in ("nothing", text + text, "<!-- /bench: x --> <!-- bench: x -->\n"):
        with pytest.raises(ValueError, match=r"expected <!-- bench: x --> and <!-- /bench: x --> once each"):
            tables.with_block(broken, "x", "")
    with pytest.raises(ValueError, match=r"README\.md: not there"):
        tables.update_pages(tmp_path, [])


def test_slope_is_the_exponent_of_the_large_end() -> None:
    sizes = [16, 32, 64, 128, 256]
    seconds = [1.0, 1.0, *(3e-4 * size**1.75 for size in sizes[2:])]
    assert figures.slope(sizes, seconds) == pytest.approx(1.75)
    with pytest.raises(ValueError, match="expected two sizes or more and as many times, got 1 and 1"):
        figures.slope([1], [1])


def test_plots_show_every_measured_point(tmp_path: Path) -> None:
    stored = [
        measurement(f"scaling-{size}-{value}", name, 1.0, median_s=1e-3 * factor * value**power)
        for size, values in scaling.SIZES.items()
        for value in values
        for name, factor, power in (("torch step", 1, 1.0), ("catapult_ext", 2, 1.5))
    ]
    curves = figures.scaling_curves(stored)
    assert [ax.get_xlabel() for ax in curves.axes] == list(scaling.SIZES)
    ours, plain = curves.axes[0].lines
    assert ours.get_label() == "kernel  slope 1.5"
    assert plain.get_label() == "plain step  slope 1.0"
    assert list(ours.get_xdata()) == list(scaling.SIZES["n"])
    assert list(ours.get_ydata()) == pytest.approx([2e-3 * value**1.5 for value in scaling.SIZES["n"]])
    with pytest.raises(ValueError, match=r"expected some of scaling-depth-"):
        figures.scaling_curves([line for line in stored if "depth" not in str(line["job"])])

    speed = {"flop_per_byte": 30.0, "peak_gflops": 100.0, "peak_gbytes_per_s": 20.0, "dtype": "float32"}
    kernels = [
        measurement("gram-128", name, 1.0, gflops=gflops, **speed)
        for name, gflops in (("torch.mm", 45.0), ("catapult_ext", 90.0), ("BLAS syrk", 60.0))
    ]
    ax = figures.roofline(kernels).axes[0]
    points = {each.get_label(): each.get_offsets().tolist() for each in ax.collections}
    assert points == {"catapult_ext": [[30, 90]], "torch": [[30, 45]], "BLAS syrk": [[30, 60]]}
    roof = ax.lines[0]
    assert max(roof.get_ydata()) == 100
    assert roof.get_ydata()[0] == pytest.approx(20 * roof.get_xdata()[0])
    with pytest.raises(ValueError, match=r"`catapult bench gram` measures them"):
        figures.roofline(stored)

    path = tmp_path / "lines.jsonl"
    lines.write_lines(path, [{**line, "device": "cpu"} for line in stored + kernels])
    written = bench.publish(tmp_path, plots=True, tables=False)
    names = [stem + suffix for stem in ("roofline", "scaling") for suffix in style.SUFFIXES]
    assert [file.name for file in written] == names
    assert all(file.stat().st_size > 1000 for file in written)
    assert bench.publish(tmp_path / "none", plots=False, tables=False) == []
    with pytest.raises(ValueError, match=r"none/lines\.jsonl: not there"):
        bench.publish(tmp_path / "none", plots=True, tables=False)


def test_goal_verdicts() -> None:
    goal = Goal(1.2, 1.0)
    assert [goal.verdict(ratio) for ratio in (0.9, 1.0, 1.1, 1.2, 1.3)] == [
        *("met", "met", "reach met", "reach met", "**missed**"),
    ]


def test_peak_memory_of_a_known_allocation() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell peak memory")
    # In a fresh process: one that has run tests may hold freed memory, which the allocation would take.
    code = """
import torch
from python_experiments.bench import memory
from python_experiments.bench.cases import JOBS, Case, Job

calls = {"keeps": lambda: torch.ones(8, 2**20), "none": lambda: None}
JOBS["memory"] = Job("memory", "", "none", {}, lambda shapes: Case(calls))
print(memory.measure("memory", "keeps", 1), memory.measure("memory", "none", 1))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    keeps, none = map(int, ran.stdout.split())
    assert keeps == pytest.approx(32 * 2**20, rel=0.05)
    assert none < 2**20
