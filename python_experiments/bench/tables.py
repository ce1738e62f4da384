"""Tables of measurements: of one run, and those of README.md and docs/kernels.md, which stand between two comments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from python_experiments.bench.cases import JOBS, Goal, Job

__all__ = [
    "PAGES",
    "levels_table",
    "markdown_table",
    "performance_table",
    "standing_table",
    "update_pages",
    "with_block",
]

OURS = "catapult_ext"
#: Steps that observe nothing: less than what ours does.
PLAIN_STEPS = frozenset({"torch step", "torch steps", "torch.compile step"})
#: Instruction sets from the best on: the tables are of the best one that was measured.
_LEVELS = ("avx512", "avx2", "scalar")


def markdown_table(lines: Sequence[dict[str, Any]]) -> str:
    """One row per measurement: time, ratio to the baseline with quartiles, goal, memory, error.

    Args:
        lines: as `read_lines` gives them.

    Returns:
        A markdown table; the columns of numbers are right-aligned.
    """
    head = [
        "job",
        "sizes",
        "implementation",
        "median",
        "ratio (quartiles)",
        "goal",
        "GFLOP/s",
        "GB/s",
        "extra memory",
        "error",
    ]
    rows = [head, ["---"] * 3 + ["---:"] * 7]
    ratios = {(line["job"], line["implementation"]): line["ratio"] for line in lines}
    last = None
    for line in lines:
        verdict = "" if not line["goals"] else _first_goal(line, ratios)
        low, high = line["ratio_quartiles"]
        first = line["job"] != last
        last = line["job"]
        rows.append(
            [
                f"`{line['job']}`" if first else "",
                ", ".join(f"{name} {value}" for name, value in line["shapes"].items()) if first else "",
                line["implementation"],
                _seconds(line["median_s"]),
                "1"
                if line["implementation"] == line["baseline"]
                else f"{line['ratio']:.3g} ({low:.3g} - {high:.3g})",
                verdict,
                "" if line["gflops"] is None else f"{line['gflops']:.1f}",
                "" if line["gbytes_per_s"] is None else f"{line['gbytes_per_s']:.1f}",
                "" if line["peak_extra_bytes"] is None else f"{line['peak_extra_bytes'] / 2**20:.1f} MiB",
                "" if line["error_float64"] is None else f"{line['error_float64']:.1e}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _first_goal(line: Mapping[str, Any], ratios: Mapping[tuple[str, str], float]) -> str:
    """Verdict on the first goal of a line; `ratios` to the baseline by job and implementation."""
    goal = Goal(**line["goals"][0])
    if goal.over == line["baseline"]:
        return f"<= {_ratio(goal.reach)}: {goal.verdict(line['ratio'])}"
    over = line["ratio"] / ratios[line["job"], goal.over]
    return f"{_ratio(over)} of {goal.over} <= {_ratio(goal.reach)}: {goal.verdict(over)}"


def _ratio(value: float) -> str:
    """Two digits after the point, no digit from 10 on; two significant ones below 1."""
    return (
        f"{value:.0f}"
        if value >= 10
        else f"{value:.2g}"
        if value < 1
        else f"{value:.2f}".rstrip("0").rstrip(".")
    )


def _where(jobs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Processor, instruction set, versions and days of lines that share all but the days."""
    lines = [line for job in jobs.values() for line in job.values()]
    days = sorted({line["time"][:10] for line in lines})
    last = max(lines, key=lambda line: line["time"])
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"{last['cpu']}, {last['simd']}, one thread, torch {last['versions']['torch']}, {when}"


class Measured:
    """What the latest run of each job has measured on one processor, with one thread and its best instruction set.

    Attributes:
        by_place: (processor, instruction set) -> job -> implementation -> its line, this processor's first.
        by_job: job -> implementation -> its line, of the best instruction set.
        where: processor and versions, for a reader.
        elsewhere: the same as `by_job` for jobs that only other processors or instruction sets have measured.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Choose from lines as `read_lines` gives them; the processor is the one that has measured most jobs."""
        found: dict[str, dict[str, dict[str, dict[str, Mapping[str, Any]]]]] = {}
        for line in lines:
            known = JOBS.get(line["job"])
            # A job that has other sizes now has not been measured.
            if line["threads"] == 1 and known is not None and line["shapes"] == dict(known.shapes):
                jobs = found.setdefault(line["cpu"], {}).setdefault(line["simd"], {})
                jobs.setdefault(line["job"], {})[line["implementation"]] = line
        if not found:
            raise ValueError("lines: expected some of one thread, there are none")
        cpu = max(found, key=lambda name: max(map(len, found[name].values())))
        self.by_place = {
            (name, level): found[name][level]
            for name in sorted(found, key=lambda name: (name != cpu, name))
            for level in _LEVELS
            if level in found[name]
        }
        self.by_job = next(iter(self.by_place.values()))
        self.where = _where(self.by_job)
        self.elsewhere: dict[str, dict[str, Mapping[str, Any]]] = {}
        for jobs in self.by_place.values():
            for job, measured in jobs.items():
                if job not in self.by_job and OURS in measured:
                    self.elsewhere.setdefault(job, measured)

    def of(self, job: Job) -> Mapping[str, Mapping[str, Any]]:
        """Implementation -> line of a job, from elsewhere where the processor of this table has not measured it."""
        return self.by_job.get(job.name) or self.elsewhere.get(job.name, {})

    def ratio(self, job: Job, over: str | None = None) -> float | None:
        """Time of ours over that of another implementation (None: the baseline), None where one was not measured."""
        found = self.of(job)
        if OURS not in found or (over or job.baseline) not in found:
            return None
        return float(found[OURS]["ratio"] / found[over or job.baseline]["ratio"])

    def beside(self, job: Job) -> dict[str, float]:
        """Ratio to the baseline of everything else."""
        found = self.of(job)
        return {name: line["ratio"] for name, line in found.items() if name not in (job.baseline, OURS)}

    def winners(self, job: Job) -> set[str]:
        """What takes less time than ours for no less than ours does."""
        ours = self.ratio(job)
        # A plain step observes nothing, compiled or not; our general engine is ours.
        all_ratios = {job.baseline: 1.0, **self.beside(job)}
        return {
            name
            for name, ratio in all_ratios.items()
            if ours is not None and ratio < ours and name not in PLAIN_STEPS and not name.startswith(OURS)
        }


def _rows(jobs: Sequence[Job], measured: Measured) -> str:
    places: dict[str, dict[str, Mapping[str, Mapping[str, Any]]]] = {}
    for job in jobs:
        if job.name in measured.elsewhere:
            line = measured.elsewhere[job.name][OURS]
            places.setdefault(f"{line['cpu']}, {line['simd']}", {})[job.name] = measured.elsewhere[job.name]
    marks = {name: f" ({i})" for i, place in enumerate(places.values(), 1) for name in place}
    head = ["job", "ours / baseline", "reach", "go for", "verdict", "baseline", "beside it, / baseline"]
    rows = [head, ["---", "---:", "---:", "---:", "---", "---", "---"]]
    for job in jobs:
        found = measured.of(job)
        beside = []
        for name, ratio in measured.beside(job).items():
            text = f"{name} {_ratio(ratio)}"
            beside.append(f"**{text}**" if name in measured.winners(job) else text)
        for number, goal in enumerate(job.goals or (None,)):
            ratio = measured.ratio(job, goal.over if goal else None)
            text = "not measured" if ratio is None else _ratio(ratio)
            if ratio is not None and (goal is None or goal.over is None):
                low, high = found[OURS]["ratio_quartiles"]
                text = f"{_ratio(ratio)} ({_ratio(low)} - {_ratio(high)})"
            rows.append(
                [
                    f"`{job.name}`{marks.get(job.name, '')}" + (f": {job.title}" if number == 0 else ""),
                    text,
                    _ratio(goal.reach) if goal else "",
                    _ratio(goal.go_for) if goal else "",
                    goal.verdict(ratio) if goal and ratio is not None else "",
                    (goal.over if goal else None) or job.baseline,
                    ", ".join(beside) if number == 0 else "",
                ]
            )
    notes = [f"\n({i}) {_where(place)}.\n" for i, place in enumerate(places.values(), 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n" + "".join(notes)


def _tabled() -> list[Job]:
    """The jobs that have rows: not those whose costs are drawn against a size."""
    return [job for job in JOBS.values() if not job.name.startswith("scaling-")]


def performance_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table of README.md: jobs with a goal, and every one in which something else is faster than ours.

    Args:
        lines: as `read_lines` gives them.
    """
    measured = Measured(lines)
    shown = [job for job in _tabled() if job.goals or measured.winners(job)]
    return f"{measured.where}.\n\n{_rows(shown, measured)}"


def standing_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/kernels.md: every job."""
    measured = Measured(lines)
    return f"{measured.where}.\n\n{_rows(_tabled(), measured)}"


def levels_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Ratio to the baseline of each job that was measured on several processors or with several instruction sets.

    Columns of other processors say when the last of their lines was measured: the code may have changed since.
    """
    measured = Measured(lines)
    here = next(iter(measured.by_place))[0]
    heads = []
    for (cpu, level), jobs in measured.by_place.items():
        last = max(line["time"][:10] for job in jobs.values() for line in job.values())
        heads.append(level if cpu == here else f"{cpu}, {level}, {last}")
    rows = [["job", *heads], ["---", *["---:"] * len(heads)]]
    for job in _tabled():
        found = [jobs.get(job.name, {}).get(OURS) for jobs in measured.by_place.values()]
        if sum(line is not None for line in found) > 1:
            rows.append([f"`{job.name}`", *("" if line is None else _ratio(line["ratio"]) for line in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


#: Page, from the root of the repository -> name of a block in it -> what renders it.
PAGES: Mapping[str, Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]]] = {
    "README.md": {"performance": performance_table},
    "docs/kernels.md": {"standing": standing_table, "levels": levels_table},
}


def with_block(text: str, name: str, block: str) -> str:
    """The text with what stands between the comments `bench: NAME` and `/bench: NAME` replaced.

    Raises:
        ValueError: the comments are not there, each once and in this order.
    """
    begin, end = f"<!-- bench: {name} -->\n", f"<!-- /bench: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin.strip()} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def update_pages(root: Path, lines: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Render every block of `PAGES` anew from lines as `read_lines` gives them.

    Args:
        root: of a checkout of the repository.
        lines: the measurements.

    Returns:
        The pages.

    Raises:
        ValueError: a page or one of its comments is missing; nothing is written then.
    """
    texts = {}
    for page, blocks in PAGES.items():
        path = root / page
        if not path.is_file():
            raise ValueError(f"{path}: not there; tables are written in a checkout of the repository")
        texts[path] = path.read_text()
        for name, render in blocks.items():
            try:
                texts[path] = with_block(texts[path], name, render(lines))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    for path, text in texts.items():
        path.write_text(text)
    return list(texts)
