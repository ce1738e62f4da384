"""This engine and its peers on the same cases: one line, a dict of JSON values, for each tool, case and precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import catapult_ext as cx
from python_experiments.coverage import ours, peers
from python_experiments.coverage.cases import FAMILIES, Case
from python_experiments.coverage.ours import SINGLE, TOLERANCES, Reference
from python_experiments.coverage.peer_process import Answer, PeerProcess

__all__ = ["ENGINE", "OWN", "family", "installed", "is_wrong", "judged", "survey"]

ENGINE = "catapult_ext"

#: The family of networks that are not in the catalogue.
OWN = "Your networks"

_FAMILY = {case.name: family for family, cases in FAMILIES.items() for case in cases}


def family(line: dict[str, Any]) -> str:
    """The family of a line's network."""
    return _FAMILY.get(line["case"], OWN)


def installed() -> dict[str, dict[str, str]]:
    """Versions of the peers that are here, by peer and distribution."""
    found = {name: peers.versions(peer) for name, peer in peers.PEERS.items()}
    return {name: versions for name, versions in found.items() if versions is not None}


def survey(
    cases: Sequence[Case], names: Iterable[str], report: Callable[[str, str], object]
) -> Iterable[dict[str, Any]]:
    """Every case by the engine in both precisions, then by each peer, in float64 where that is possible.

    Args:
        cases: what to measure.
        names: of the peers.
        report: gets tool and case before each is measured.

    Yields:
        Lines: case, own (only of networks that are not in the catalogue), tool, version, dtype, verdict (see
        `LEGEND` of the page), error (relative, None where there is none), message; of the engine also the routes,
        [route, rule] of each parameter, and all errors.
    """
    references: dict[str, Reference | None] = {}
    for case in cases:
        report(ENGINE, case.name)
        references[case.name] = None if case.refused else ours.reference(case)
        yield from _by_engine(case, references[case.name])
    for name in names:
        version = " ".join((peers.versions(peers.PEERS[name]) or {}).values())
        with PeerProcess(name) as process:
            for case in cases:
                report(name, case.name)
                line = _by_peer(process, case, references[case.name])
                yield _head(case, name) | {"version": version} | line


def is_wrong(line: dict[str, Any]) -> bool:
    """Whether the engine itself is out of tolerance, or does not refuse what it has to."""
    return line["tool"] == ENGINE and line["verdict"] == "wrong"


def _head(case: Case, tool: str) -> dict[str, Any]:
    own = {} if case.name in _FAMILY else {"own": True}
    return {"case": case.name, **own, "tool": tool}


def _number(error: float) -> float | None:
    return float(f"{error:.2e}") if math.isfinite(error) else None  # no more digits than say something


def _by_engine(case: Case, reference: Reference | None) -> Iterable[dict[str, Any]]:
    for dtype, tolerance in TOLERANCES.items():
        found = ours.measure(case, dtype, reference)
        yield _head(case, ENGINE) | {
            "version": cx.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "verdict": found.verdict(case, tolerance),
            "error": _number(max(found.errors.values())) if found.errors else None,
            "message": found.refusal,
            "errors": {what: _number(error) for what, error in found.errors.items()},
            "routes": {name: [route, found.rules[name]] for name, route in found.routes.items()},
        }


def _by_peer(process: PeerProcess, case: Case, reference: Reference | None) -> dict[str, Any]:
    answer = process.ask(case.name, torch.float64)
    line = judged(answer, reference, torch.float64)
    if line["verdict"] == "refuses" and not answer.late:
        single = judged(process.ask(case.name, torch.float32), reference, torch.float32)
        if single["verdict"] != "refuses":
            return single | {"message": f"in float64: {line['message']}"}
    return line


def judged(answer: Answer, reference: Reference | None, dtype: torch.dtype) -> dict[str, Any]:
    """What an answer is worth."""
    line = {"dtype": str(dtype).removeprefix("torch."), "error": None, "message": answer.message}
    if answer.kernel is None:
        return line | {"verdict": "refuses" if answer.applicable else "not applicable"}
    if reference is None:
        return line | {"verdict": "answers"}
    error = reference.kernel_error(answer.kernel)
    if not math.isfinite(error):
        shape = tuple(answer.kernel.shape)
        expected = tuple(reference.kernel.shape)
        return line | {
            "verdict": "wrong",
            "message": f"a kernel {shape} for {expected}, or one that is not finite",
        }
    verdict = "exact" if error <= TOLERANCES[torch.float64] else "float32" if error <= SINGLE else "wrong"
    if verdict != "wrong" and answer.kernel.numel() != reference.kernel.numel():
        verdict = "blocks"
    return line | {"verdict": verdict, "error": _number(error)}
