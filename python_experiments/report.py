"""The report: one page of stored results that needs nothing beside itself."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

import catapult_ext as cx
from catapult_ext.runs.files import replace_file
from python_experiments import registry, results, style, sweep, training
from python_experiments.claims import Claim, Group, Run, Verdict, judge
from python_experiments.readings import duration
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
    def image_width(self) -> int:
        """Width in CSS pixels at which the plot's letters are read on a phone, from the PNG's header."""
        pixels = int.from_bytes((self.image or bytes(24))[16:20], "big")
        return round(pixels / style.DPI * 72)

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
    def name(self) -> str:
        """What a variant of a sweep changes, in words."""
        return sweep.in_words(self.request.changes) if self.request else ""

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


@dataclass(frozen=True)
class Sweep:
    """Variants of one request, as the page shows them."""

    experiment: Experiment
    variants: list[Section]

    @property
    def base(self) -> Request:
        """The request that they vary."""
        assert self.variants[0].request is not None
        return self.variants[0].request.base

    @property
    def anchor(self) -> str:
        """Target of links within the page."""
        return f"sweep-{self.base.key}"

    @property
    def fields(self) -> str:
        """What is varied."""
        changes = [variant.request.changes for variant in self.variants if variant.request]
        return ", ".join(dict.fromkeys(name for change in changes for name, _ in change))

    @property
    def runs(self) -> list[Run]:
        """Every finished run of every variant; runs that variants share count once."""
        runs = {(run.config, run.seed): run for variant in self.variants for run in variant.runs}
        return list(runs.values())

    @property
    def seconds(self) -> float:
        """Training time of its runs, one after the other."""
        return sum(run.summary["seconds"] for run in self.runs)

    @property
    def hardware(self) -> str:
        """The machines and thread counts that its runs used."""
        return "; ".join(dict.fromkeys(hardware(run.environment) for run in self.runs))

    @property
    def claims(self) -> list[tuple[Claim, list[Verdict]]]:
        """Each claim with its verdict on each variant."""
        by_claim = zip(*(variant.verdicts for variant in self.variants), strict=True)
        return [(verdicts[0].claim, list(verdicts)) for verdicts in by_claim]


def hardware(environment: Mapping[str, Any]) -> str:
    """GPU or CPU, threads and SIMD level of a run in one line."""
    threads = environment.get("threads")
    gpu = environment.get("gpu")
    return (
        f"{gpu + ', ' if gpu else ''}{environment.get('cpu', 'unknown CPU')}, "
        f"{threads} thread{'' if threads == 1 else 's'}, "
        f"{environment.get('simd', '?')}, torch {environment.get('torch', '?')}"
    )


def sections(root: Path) -> list[Section | Sweep]:
    """Every request made under `root`, and behind them every experiment without one; draws their plots."""
    requests = results.remembered(root)
    found: list[Section | Sweep] = []
    without: list[Section | Sweep] = []
    for experiment in registry.all_experiments().values():
        own = [request for request in requests if request.experiment == experiment.name]
        if not own:
            without.append(Section(experiment, None, {}, judge(experiment.claims, {}), 0, None))
        for _, members in itertools.groupby(own, key=lambda request: request.base.key):
            shown = [_section(root, experiment, request) for request in members]
            found += [section for section in shown if section.request and not section.request.changes]
            if variants := [section for section in shown if section.request and section.request.changes]:
                found.append(Sweep(experiment, variants))
    return found + without


def _section(root: Path, experiment: Experiment, request: Request) -> Section:
    groups = training.finished_groups(root, request)
    image = None
    if "main" in groups:
        files = style.save(experiment.plot(groups), root / "plots" / request.key)
        image = files[0].read_bytes()
    missing = len(training.unfinished(root, request))
    return Section(experiment, request, groups, judge(experiment.claims, groups), missing, image)


def counts(shown: Sequence[Section | Sweep]) -> str:
    """How many claims hold, in words."""
    parts = [part for s in shown for part in (s.variants if isinstance(s, Sweep) else [s])]
    words = [verdict.word for part in parts for verdict in part.verdicts]
    plural = {
        "holds": "hold",
        "fails": "fail",
        "not run": "not run",
        "holds, but so does its control": "hold on their controls too",
        "holds, control not run": "hold, controls not run",
    }
    found = [f"{words.count(word)} {text}" for word, text in plural.items() if word in ("holds", *words)]
    return f"{len(words)} claims: {', '.join(found)}."


def span(claim: Claim, verdicts: Sequence[Verdict], which: str) -> str:
    """Smallest to largest number of a claim over the variants of a sweep; `which` is "ours" or "control"."""
    measured = [m for v in verdicts if (m := getattr(v, which)) is not None]
    if not measured:
        return results.number(claim, None)
    known = sorted((m for m in measured if not math.isnan(m.value)), key=lambda m: m.value)
    ends = [results.number(claim, m) for m in (known or measured)[:: max(1, len(known) - 1)]]
    none = "none or " if known and len(known) < len(measured) else ""
    return none + " to ".join(dict.fromkeys(ends))


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
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters |= {
        "duration": duration,
        "math": formulas,
        "entries": entries,
    }
    shown = sections(root)
    page = environment.get_template("report.html.j2").render(
        sections=shown,
        counts=counts(shown),
        number=results.number,
        span=span,
        version=cx.__version__,
        build=cx.build_info(),
        time=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    root.mkdir(parents=True, exist_ok=True)
    file = root / "report.html"
    replace_file(file, lambda temporary: temporary.write_text(page, encoding="utf-8"))
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
