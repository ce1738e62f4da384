"""The page of the stored lines: every case, the engine's route and error, and what each peer made of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from python_experiments.coverage.cases import CASES, FAMILIES
from python_experiments.coverage.lines import FILE
from python_experiments.coverage.peers import PEERS, PIP
from python_experiments.coverage.survey import ENGINE, OWN, family

__all__ = ["LEGEND", "render", "totals"]

#: Every verdict that a line may have.
LEGEND = {
    "exact": "the kernel is within 1e-10 of brute force in float64 (of the engine: also within 1e-5 in float32)",
    "float32": "within 1e-5 only: it refuses float64, or computes a part of it in single precision",
    "blocks": "entries of equal outputs are within 1e-10, and the others are not given",
    "wrong": "a kernel came back without a word and is off by this, relative to the root of the diagonal entries",
    "refuses": "an exception, whether it is meant or not",
    "answers": "a kernel came back where the engine refuses, and there is nothing to compare it with",
    "not applicable": "the tool itself was never asked",
}

_SHORT = {"not applicable": "n/a"}
_SHOWN = 150  # characters of an error on the page


def render(lines: Sequence[dict[str, Any]], link: str) -> str:
    """The page in Markdown.

    Args:
        lines: as `read` gives them; at least one is of the engine.
        link: from the page to the file of the lines.
    """
    order = {name: number for number, name in enumerate(CASES)}
    lines = sorted(lines, key=lambda line: order.get(line["case"], len(order)))
    by_tool = {name: [line for line in lines if line["tool"] == name] for name in (ENGINE, *PEERS)}
    tools = {name: own for name, own in by_tool.items() if own}
    families = [name for name in (*FAMILIES, OWN) if any(family(line) == name for line in tools[ENGINE])]
    cells = {(case, name): _cell(own) for name in tools for case, own in _by_case(tools[name]).items()}
    environment = Environment(
        loader=PackageLoader("python_experiments"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    page = environment.get_template("coverage.md.j2").render(
        engine=ENGINE,
        file=FILE,
        link=link,
        where=_where(lines),
        tools=tools,
        peers=[name for name in tools if name != ENGINE],
        missing=[name for name in PEERS if name not in tools],
        how={name: peer.how for name, peer in PEERS.items()},
        pip=PIP,
        legend=LEGEND,
        short=_SHORT,
        families=families,
        counts={name: Counter(_verdicts(own).values()) for name, own in tools.items()},
        matrix={
            row: case.name for case in CASES.values() for row in case.matrix if (case.name, ENGINE) in cells
        },
        cells=cells,
        rows={name: _by_case(line for line in tools[ENGINE] if family(line) == name) for name in families},
        refused=[
            line for line in tools[ENGINE] if line["verdict"] == "refuses" and line["dtype"] == "float64"
        ],
        messages={name: _messages(own) for name, own in tools.items()},
        summary=lambda of, name: _summary([x for x in tools[name] if of in (None, family(x))]),
        routes=_routes,
        own_cell=lambda line: _error(line["error"]) if line["verdict"] == "exact" else _cell([line]),
        text=_text,
    )
    return page.rstrip("\n") + "\n"


def totals(lines: Sequence[dict[str, Any]]) -> Table:
    """How often each tool of the lines earned each verdict, for the terminal."""
    by_tool = {name: [line for line in lines if line["tool"] == name] for name in (ENGINE, *PEERS)}
    counts = {name: Counter(_verdicts(own).values()) for name, own in by_tool.items() if own}
    shown = [verdict for verdict in LEGEND if any(count[verdict] for count in counts.values())]
    table = Table("tool", *shown)
    for name, count in counts.items():
        table.add_row(name, *(str(count[verdict] or "") for verdict in shown))
    return table


def _by_case(lines: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        found[line["case"]].append(line)
    return found


def _verdicts(lines: Iterable[dict[str, Any]]) -> dict[str, str]:
    """By case; the engine's of two precisions is the worse."""
    return {
        case: "wrong" if any(line["verdict"] == "wrong" for line in own) else own[0]["verdict"]
        for case, own in _by_case(lines).items()
    }


def _summary(lines: Sequence[dict[str, Any]]) -> str:
    """Such as "12, 3 wrong, 8 refused": how many are right, and what the others are."""
    counts = Counter(_verdicts(lines).values())
    words = {
        "float32": "float32",
        "blocks": "blocks",
        "wrong": "wrong",
        "refuses": "refused",
        "answers": "unchecked",
    }
    others = [f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict]]
    others += [f"{counts['not applicable']} n/a"] if counts["not applicable"] else []
    return ", ".join([str(counts["exact"]), *others])


def _cell(lines: Sequence[dict[str, Any]]) -> str:
    verdict = next(iter(_verdicts(lines).values()))
    if verdict != "wrong":
        return _SHORT.get(verdict, verdict)
    errors = [line["error"] for line in lines if line["verdict"] == "wrong"]
    return f"**wrong** {_error(max(errors))}" if all(error is not None for error in errors) else "**wrong**"


def _error(value: float | None) -> str:
    """One digit: 3e-16."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _routes(line: dict[str, Any]) -> str:
    """The routes of a network's parameters, each once."""
    return ", ".join(dict.fromkeys(route for route, _ in line["routes"].values()))


def _messages(lines: Iterable[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """What was said, how often, and of which case first; most frequent first."""
    cases: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if line["verdict"] in ("refuses", "not applicable"):
            cases[_text(line["message"])].append(line["case"])
    return sorted(((message, len(own), own[0]) for message, own in cases.items()), key=lambda row: -row[1])


def _text(message: str, shown: int = _SHOWN) -> str:
    """Fit for a cell in backticks."""
    short = message if len(message) <= shown else message[: shown - 3] + "..."
    return short.replace("|", "/").replace("`", "'")


def _where(lines: Sequence[dict[str, Any]]) -> str:
    """Where and when it was measured, as far as the lines agree."""
    said = []
    for key, words in (("torch", "torch {}"), ("python", "Python {}"), ("cpu", "{}"), ("simd", "SIMD {}")):
        values = sorted({str(line[key]) for line in lines})
        said.append(words.format(" and ".join(values)))
    days = sorted({line["time"][:10] for line in lines})
    return ", ".join([*said, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"])
