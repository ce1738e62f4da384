"""Measurements beside plain PyTorch, side by side in one process: what `catapult bench` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from python_experiments.bench import ops, steps  # noqa: F401  they declare the jobs
from python_experiments.bench.cases import JOBS, Case, Job, select
from python_experiments.bench.lines import lines_of, markdown_table, read_lines, write_lines
from python_experiments.bench.memory import peak_extra_bytes
from python_experiments.bench.timing import Timing, interleaved

__all__ = ["JOBS", "Job", "main", "markdown_table", "read_lines"]


def main(
    names: list[str],
    out: Path,
    repeats: int = 40,
    threads: int = 1,
    *,
    seconds: float = 20.0,
    memory: bool = True,
    say: Callable[[str], object] = print,
) -> Path:
    """Run benchmarks and append one JSON line per measurement to `out`/lines.jsonl.

    Args:
        names: jobs, or how their names begin; empty for all.
        out: results folder.
        repeats: interleaved rounds per job.
        threads: threads of torch and of the kernels.
        seconds: a job stops earlier, after at least three rounds, when it has taken this long.
        memory: measure peak memory too (each implementation once more, in a process of its own).
        say: gets one line of progress per job, then the table.

    Returns:
        The file of the lines.

    Raises:
        ValueError: a name fits no job, or `repeats` or `threads` is not positive.
    """
    for name, value in (("repeats", repeats), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    jobs = select(names)
    path = out / "lines.jsonl"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    done = []
    try:
        for number, job in enumerate(jobs, 1):
            say(f"[{number}/{len(jobs)}] {job.name}: {job.title}")
            case = job.build(job.shapes)
            runnable = _runnable(job, case, say)
            timings = _pairs(runnable, job.baseline, min(repeats, job.rounds), seconds)
            used = {name: peak_extra_bytes(job.name, name, threads) if memory else None for name in timings}
            lines = lines_of(job, case, timings, used)
            write_lines(path, lines)  # job by job: what was measured is kept whatever comes next
            done += lines
    finally:
        torch.set_num_threads(before)
    say(markdown_table(done))
    return path


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
