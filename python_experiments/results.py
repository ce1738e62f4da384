"""What was asked for and what came of it: requests on disk, verdicts of stored runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from catapult_ext.runs import UnreadableFile
from catapult_ext.runs.files import write_json
from python_experiments import registry, sweep, training
from python_experiments.claims import Claim, Measured, Verdict, judge
from python_experiments.registry import Request
from python_experiments.runner import Outcome


def remember(root: Path, request: Request) -> None:
    """Note that a request was made, so that the report shows it, finished or not."""
    folder = root / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{request.key}.json", asdict(request))


def remembered(root: Path) -> list[Request]:
    """The requests made under this folder, in the paper's order; unknown experiments are left out.

    Raises:
        UnreadableFile: a file of a request is damaged, or of another version; the message names it.
    """
    experiments = list(registry.all_experiments())
    requests = [_read(file) for file in sorted((root / "requests").glob("*.json"))]
    return sorted(
        (request for request in requests if request.experiment in experiments),
        key=lambda r: (
            experiments.index(r.experiment),
            registry.PRESETS.index(r.preset),
            r.base.key,
            sweep.order(r.changes),
        ),
    )


def _read(file: Path) -> Request:
    remedy = "delete it, and run the experiment again to have it in the report"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        changes = tuple((str(name), _tuples(value)) for name, value in fields.get("changes", ()))
        request = Request(**{**fields, "seeds": tuple(map(int, fields["seeds"])), "changes": changes})
        if request.experiment in registry.all_experiments():
            request.groups()  # what it asks for has to exist
        return request
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreadableFile(f"{file}: expected a request of this version ({error}); {remedy}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def verdicts(root: Path, request: Request) -> list[Verdict]:
    """Each claim of the experiment on the stored runs."""
    return judge(registry.get(request.experiment).claims, training.finished_groups(root, request))


def number(claim: Claim, measured: Measured | None) -> str:
    """A claim's number in words."""
    if measured is None:
        return "not run"
    if math.isnan(measured.value):
        return "none"
    value = measured.value + 0.0  # no "-0"
    return f"{value:.4g}{' ' if claim.unit.isalpha() and len(claim.unit) > 1 else ''}{claim.unit}"


def line(verdict: Verdict) -> str:
    """One claim in one line."""
    claim = verdict.claim
    return (
        f"{verdict.word.upper()}: {claim.statement}: {number(claim, verdict.ours)} "
        f"(needs >= {claim.bound:g}; paper: {claim.paper}; control: {number(claim, verdict.control)})"
    )


def write_failures(root: Path, failed: Sequence[Outcome]) -> Path:
    """Keep the full errors of the last command's failed runs."""
    file = root / "failures.log"
    file.write_text("\n".join(f"{', '.join(o.job.names)}\n{o.details or o.error}" for o in failed))
    return file
