"""Which networks the engine is exact on, measured: a catalogue of cases, this engine and its peers side by side.

`catapult coverage` runs it, and `docs/coverage.md` shows what it found. Nothing here imports a peer before it is asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from python_experiments.coverage.cases import Case, case_of, select
from python_experiments.coverage.lines import header, merge, read, write
from python_experiments.coverage.page import render, totals
from python_experiments.coverage.survey import installed, is_wrong, survey

__all__ = ["main"]


def main(
    words: Sequence[str],
    models: Sequence[str],
    out: Path,
    page: Path,
    console: Console,
    *,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Measure cases, merge their lines into `out`/coverage.jsonl and render the page.

    Args:
        words: parts of names of cases or of families; empty for all.
        models: networks of one's own, as `case_of` takes them, instead of the catalogue.
        out: folder of the lines.
        page: Markdown file.
        console: for progress and the table.
        peers: ask the peers that are installed too.

    Returns:
        The lines that were measured now.

    Raises:
        ValueError: a word or a model names nothing, or a stored line is none.
    """
    cases = [case_of(name) for name in models] if models else select(list(words))
    stored = read(out)
    names = list(installed()) if peers else []
    lines = _measure(cases, names, console)
    if not words and not models:  # everything: what is in no catalogue any more goes
        known = {case.name for case in cases}
        stored = [line for line in stored if line["case"] in known or line.get("own")]
    every = merge(stored, lines)
    file = write(out, every)
    page.write_text(render(every, os.path.relpath(file, page.parent)), encoding="utf-8")
    console.print(totals(lines))
    for line in filter(is_wrong, lines):
        console.print(f"wrong: {line['case']} in {line['dtype']}: {_why(line)}", markup=False)
    console.print(f"lines: {file}\npage: {page}", soft_wrap=True, markup=False)
    return lines


def _measure(cases: Sequence[Case], names: Sequence[str], console: Console) -> list[dict[str, Any]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    where = header()
    lines = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(cases) * (1 + len(names)))

        def report(tool: str, case: str) -> None:
            bar.update(task, description=f"{tool}: {case}"[:60].ljust(60))

        seen = set()
        for line in survey(cases, names, report):
            lines.append(line | where)
            if (line["tool"], line["case"]) not in seen:
                seen.add((line["tool"], line["case"]))
                bar.advance(task)
    return lines


def _why(line: dict[str, Any]) -> str:
    if line["message"]:
        return f"refused, or with another message than expected: {line['message']}"
    if not line["errors"]:
        return "not refused"
    return ", ".join(f"{what} off by {error}" for what, error in line["errors"].items())
