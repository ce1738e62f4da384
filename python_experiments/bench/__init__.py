"""Measurements beside plain PyTorch, side by side in one process: what `catapult bench` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from catapult_ext import _C
from python_experiments.bench import ops, peers, readings, scaling, steps  # noqa: F401  they declare the jobs
from python_experiments.bench.cases import JOBS, Case, Job, select
from python_experiments.bench.lines import lines_of, read_lines, write_lines
from python_experiments.bench.memory import peak_extra_bytes
from python_experiments.bench.tables import markdown_table, update_pages
from python_experiments.bench.timing import Timing, interleaved

__all__ = ["JOBS", "Job", "main", "markdown_table", "publish", "read_lines"]


def main(
    names: list[str],
    out: Path,
    repeats: int = 40,
    threads: int = 1,
    *,
    seconds: float = 20.0,
    memory: bool = True,
    simd: Sequence[str] = (),
    say: Callable[[str], object] = print,
) -> Path:
    """Run benchmarks and append one JSON line per measurement to `out`/lines.jsonl.

    Args:
        names: jobs, or how their names begin; empty for all.
        out: results folder.
        repeats: interleaved rounds per job.
        threads: threads of torch, of the kernels and of the BLAS beside them.
        seconds: a job stops earlier, after at least three rounds, when it has taken this long.
        simd: instruction sets of our kernels ("scalar", "avx2", "avx512"), each in a run of its own; the one in use
            where none is given.
        memory: measure peak memory too (each implementation once more, in a process of its own).
        say: gets one line of progress per job, then the table.

    Returns:
        The file of the lines.

    Raises:
        ValueError: a name fits no job, `repeats` or `threads` is not positive, or an instruction set is not available.
    """
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    for level in simd:
        if level not in _C.available_simd_levels():
            raise ValueError(f"simd: expected one of {', '.join(_C.available_simd_levels())}, got {level!r}")
    jobs = select(names)
    path = out / "lines.jsonl"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    level_before, done = _C.simd_level(), []
    runs = [(level, job) for level in simd or [level_before] for job in jobs]
    try:
        for number, (level, job) in enumerate(runs, 1):
            _C.set_simd_level(level)
            say(f"[{number}/{len(runs)}] {job.name}: {job.title}{f' ({level})' if simd else ''}")
            case = job.build(job.shapes)
            runnable = _runnable(job, case, say)
            with threadpool_limits(threads, user_api="blas"):  # SciPy's, which torch's setting does not reach
                timings = _pairs(runnable, job.baseline, min(repeats, job.rounds), seconds)
            # The first call of what is optional loads a compiler or another framework, which says nothing.
            weighed = set(timings) - case.optional if memory and job.memory else set()
            used = {name: peak_extra_bytes(job.name, name, threads) for name in weighed}
            lines = lines_of(job, case, timings, used)
            write_lines(path, lines)  # job by job: what was measured is kept whatever comes next
            done += lines
    finally:
        _C.set_simd_level(level_before)
        torch.set_num_threads(before)
    say(markdown_table(done))
    return path


def publish(out: Path, *, plots: bool, tables: bool) -> list[Path]:
    """Draw and write what the stored lines give.

    Args:
        out: results folder, with lines.jsonl in it.
        plots: draw `out`/roofline and `out`/scaling, as PNG and PDF.
        tables: write the tables of README.md and docs/kernels.md of this checkout anew.

    Returns:
        The files written.

    Raises:
        ValueError: there are no lines, or none that a plot needs, or this is no checkout.
    """
    written: list[Path] = []
    if not plots and not tables:
        return written
    path = out / "lines.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: not there; `catapult bench --out {out}` writes it")
    lines = read_lines([path])
    if plots:
        from python_experiments.bench.figures import roofline, scaling_curves
        from python_experiments.style import save

        written += save(roofline(lines), out / "roofline") + save(scaling_curves(lines), out / "scaling")
    if tables:
        written += update_pages(Path(__file__).parents[2], lines)
    return written


def _runnable(job: Job, case: Case, say: Callable[[str], object]) -> dict[str, Callable[[], object]]:
    """The implementations without those optional ones that fail here; each failure is said, with its reason."""
    runnable = dict(case.implementations)
    for name in case.optional:
        try:
            runnable[name]()
        except Exception as error:  # a compiler that is missing raises whatever torch makes of it
            say(
                f"{job.name}: {name} does not run on this machine and is left out: {type(error).__name__}: {error}"
            )
            del runnable[name]
    return runnable


def _pairs(
    implementations: Mapping[str, Callable[[], object]], baseline: str, repeats: int, seconds: float
) -> dict[str, Timing]:
    """Each implementation interleaved with the baseline alone.

    With all of them in one round a peer that walks through megabytes would leave cold caches to the next one.
    """
    timings: dict[str, Timing] = {}
    others = [name for name in implementations if name != baseline]
    for name in others:
        pair = {baseline: implementations[baseline], name: implementations[name]}
        timings = interleaved(pair, baseline, repeats=repeats, seconds=seconds / len(others)) | timings
    return {name: timings[name] for name in implementations}
