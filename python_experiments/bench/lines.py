"""One JSON line per measurement."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import catapult_ext as cx
from catapult_ext.runs import environment
from python_experiments.bench.cases import Case, Job
from python_experiments.bench.timing import Timing

__all__ = ["lines_of", "read_lines", "write_lines"]

#: Numbers of the array whose copy shows the bandwidth of memory: far more than any cache holds.
_COPIED = 1 << 26


def header() -> dict[str, Any]:
    """What every line says about where it comes from."""
    here = environment()
    return {
        "command": " ".join(["catapult", *sys.argv[1:]]),
        "time": here["time"],
        "commit": here["commit"]["catapult_ext"],
        "versions": {"catapult_ext": here["catapult_ext"], "python": here["python"], **here["packages"]},
        "cpu": here["cpu"],
        "simd": here["simd"],
        "compiler": cx.build_info()["compiler"],
    }


@functools.cache
def peak_gflops(dtype: torch.dtype, threads: int) -> float:
    """Rate of the best of some products of 1024 x 1024 matrices by torch, measured once: what a kernel can be held to.

    The thread count is the one in use; it is an argument because another one has another peak.
    """
    if threads != torch.get_num_threads():
        raise ValueError(f"threads: expected {torch.get_num_threads()}, those in use, got {threads}")
    a = torch.randn(1024, 1024, dtype=dtype)
    out = a @ a
    taken = []
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, a, out=out)
        taken.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(taken) / 1e9


@functools.cache
def peak_gbytes(threads: int) -> float:
    """Bandwidth of memory in GB/s: bytes read and written by the best of some copies, measured once."""
    if threads != torch.get_num_threads():
        raise ValueError(f"threads: expected {torch.get_num_threads()}, those in use, got {threads}")
    source = torch.ones(_COPIED)
    target = torch.empty_like(source)
    taken = []
    for _ in range(6):
        begin = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(taken) / 1e9


def lines_of(
    job: Job, case: Case, timings: dict[str, Timing], memory: dict[str, int | None]
) -> list[dict[str, Any]]:
    """The measurements of a job, one dict per implementation."""
    where = header()
    threads = torch.get_num_threads()
    goals = [
        {"reach": goal.reach, "go_for": goal.go_for, "over": goal.over or job.baseline} for goal in job.goals
    ]
    lines = []
    for name, timing in timings.items():
        error = case.errors.get(name)
        lines.append(
            {
                "job": job.name,
                "title": job.title,
                "implementation": name,
                "shapes": dict(job.shapes),
                "dtype": str(case.dtype).removeprefix("torch."),
                "device": "cpu",
                "threads": threads,
                "rounds": timing.rounds,
                "median_s": timing.median,
                "quartiles_s": [timing.low, timing.high],
                "baseline": job.baseline,
                "ratio": timing.ratio,
                "ratio_quartiles": [timing.ratio_low, timing.ratio_high],
                "goals": goals if name == "catapult_ext" else [],
                "gflops": None if case.flop is None else case.flop / timing.median / 1e9,
                "peak_gflops": None if case.flop is None else peak_gflops(case.dtype, threads),
                "gbytes_per_s": None if case.traffic is None else case.traffic / timing.median / 1e9,
                "peak_gbytes_per_s": None if case.traffic is None else peak_gbytes(threads),
                "flop_per_byte": None if not case.flop or not case.traffic else case.flop / case.traffic,
                "peak_extra_bytes": memory.get(name),
                "error_float64": None if error is None else error(),
                "error_of": job.error if error else None,
                **where,
            }
        )
    return lines


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append the lines to a file, which is made with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def read_lines(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every line of the files, the latest of each job, implementation, processor, instruction set and thread count.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                key = tuple(
                    line[name] for name in ("job", "implementation", "cpu", "simd", "threads", "device")
                )
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a measurement as JSON, got {text[:60]!r}"
                ) from error
            if key not in latest or line["time"] >= latest[key]["time"]:
                latest[key] = line
    return list(latest.values())
