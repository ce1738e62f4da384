"""The report: one page of stored results that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

import catapult_ext as cx
from python_experiments import registry, results, style, training
from python_experiments.claims import Group, Run, Verdict, judge
from python_experiments.registry import Experiment, Request


@dataclass(frozen=True)
class Section:
    """One experiment in one preset, as the page shows it; `request` is None where nothing was asked for."""

    experiment: Experiment
    request: Request | None
    groups: Mapping[str, Group]
    verdicts: list[Verdict]
    missing: int
    image: bytes | None

    @property
    def source(self) -> str:
        """The plot as the source of an image element."""
        return "data:image/png;base64," + base64.b64encode(self.image or b"").decode()

    @property
    def wide(self) -> bool:
        """Whether the plot has several columns, from width and height in the PNG's header."""
        width, height = (int.from_bytes((self.image or bytes(24))[i : i + 4], "big") for i in (16, 20))
        return width > 1.5 * height

    @property
    def anchor(self) -> str:
        """Target of links within the page."""
        return self.request.key if self.request else self.experiment.name

    @property
    def runs(self) -> list[Run]:
        """Every finished run of it."""
        return [run for group in self.groups.values() for runs in group.values() for run in runs]

    @property
    def seconds(self) -> float:
        """Training time of its runs, one after the other."""
        return sum(run.summary["seconds"] for run in self.runs)

    @property
    def status(self) -> str:
        """Not run, incomplete, all claims hold, or how many do not."""
        if not self.runs:
            return "not run"
        bad = [verdict for verdict in self.verdicts if verdict.word != "holds"]
        if "main" not in self.groups:
            return "incomplete"
        return f"{len(bad)} of {len(self.verdicts)} not shown" if bad else "all claims hold"

    @property
    def data_text(self) -> str:
        """The training task in words."""
        return str(self.request.config.task) if self.request else ""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the figure's own run."""
        return asdict(self.request.config) if self.request else {}

    @property
    def hardware(self) -> str:
        """The machines and thread counts that its runs used."""
        return "; ".join(dict.fromkeys(hardware(run.environment) for run in self.runs))


def hardware(environment: Mapping[str, Any]) -> str:
    """CPU, threads and SIMD level of a run in one line."""
    threads = environment.get("threads")
    return (
        f"{environment.get('cpu', 'unknown CPU')}, {threads} thread{'' if threads == 1 else 's'}, "
        f"{environment.get('simd', '?')}, torch {environment.get('torch', '?')}"
    )


def sections(root: Path) -> list[Section]:
    """Every request made under `root`, and every experiment without one; draws their plots."""
    requests = results.remembered(root)
    found = []
    for experiment in registry.all_experiments().values():
        own = [request for request in requests if request.experiment == experiment.name]
        if not own:
            found.append(Section(experiment, None, {}, judge(experiment.claims, {}), 0, None))
        for request in own:
            groups = training.finished_groups(root, request)
            image = None
            if "main" in groups:
                files = style.save(experiment.plot(groups), root / "plots" / request.key)
                image = files[0].read_bytes()
            found.append(
                Section(
                    experiment,
                    request,
                    groups,
                    judge(experiment.claims, groups),
                    len(training.unfinished(root, request)),
                    image,
                )
            )
    return found


def write(root: Path) -> Path:
    """Render `root`/report.html from what is stored under `root`.

    Returns:
        The file. Runs that are missing are shown as not run.
    """
    environment = Environment(
        loader=PackageLoader("python_experiments"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "math": formulas,
        "entries": entries,
    }
    page = environment.get_template("report.html.j2").render(
        sections=sections(root),
        number=results.number,
        version=cx.__version__,
        build=cx.build_info(),
        time=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    root.mkdir(parents=True, exist_ok=True)
    file = root / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def entries(values: Mapping[str, Any]) -> str:
    """One line for each entry: its name and its value as JSON."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in values.items())


def formulas(text: str) -> Markup:
    """Text with L_<=5 and L_>5 set as formulas, everything else escaped."""
    return Markup(re.sub(r"L_(&lt;=|&gt;)(\w+)", _subscript, str(escape(text))))


def _subscript(found: re.Match[str]) -> str:
    relation = "≤" if found[1] == "&lt;=" else "&gt;"
    return f"<i>L</i><sub>{relation}{found[2]}</sub>"


def duration(seconds: float) -> str:
    """Seconds in words: 0.4 s, 12 s, 3.5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"
