"""What was asked for and what came of it: requests on disk, verdicts of stored runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from python_experiments import registry, training
from python_experiments.claims import Claim, Measured, Verdict, judge
from python_experiments.registry import Request
from python_experiments.runner import Outcome


def remember(root: Path, request: Request) -> None:
    """Note that a request was made, so that the report shows it, finished or not."""
    folder = root / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{request.key}.json").write_text(json.dumps(asdict(request), indent=2) + "\n")


def remembered(root: Path) -> list[Request]:
    """The requests made under this folder, in the paper's order; unknown experiments are left out."""
    experiments = list(registry.all_experiments())
    requests = []
    for file in sorted((root / "requests").glob("*.json")):
        fields = json.loads(file.read_text())
        if fields["experiment"] in experiments:
            requests.append(Request(**{**fields, "seeds": tuple(fields["seeds"])}))
    return sorted(
        requests, key=lambda r: (experiments.index(r.experiment), registry.PRESETS.index(r.preset), r.key)
    )


def verdicts(root: Path, request: Request) -> list[Verdict]:
    """Each claim of the experiment on the stored runs."""
    return judge(registry.get(request.experiment).claims, training.finished_groups(root, request))


def number(claim: Claim, measured: Measured | None) -> str:
    """A claim's number in words."""
    if measured is None:
        return "not run"
    if math.isnan(measured.value):
        return "none"
    return f"{measured.value:.4g}{' ' if claim.unit.isalpha() and len(claim.unit) > 1 else ''}{claim.unit}"


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
