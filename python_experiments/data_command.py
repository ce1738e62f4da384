"""`catapult data` and `catapult data fetch`: what image sets are where, and official files from the web."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

import catapult_ext as cx

__all__ = ["fetch", "show"]

_CHECKS = {
    "official": "has the published MD5 sum",
    "differs": "does not have the published MD5 sum",
    "no published sum": "no MD5 sum is published",
}


def show(root: Path | None, console: Console) -> None:
    """Print a table of the image sets: what is found, each file with its checksum, or what to put where."""
    table = Table("name", "found", "files, or what to put where")
    for found in cx.data.available(root):
        table.add_row(found.name, _found(found), _files(found))
    console.print(table)


def fetch(names: Sequence[str], root: Path | None, console: Console) -> None:
    """Fetch the official files of the sets, with a bar for each file where there is a terminal.

    Raises:
        As `cx.data.fetch`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(file: str, here: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file)
            bars.update(tasks[file], completed=here, total=total)

        for name in names:
            for path in cx.data.fetch(name, root, report=report):
                console.print(f"{name}: fetched {path}", soft_wrap=True, highlight=False, markup=False)
            console.print(f"{name}: the official files are there", highlight=False)


def _found(found: cx.data.Availability) -> str:
    if found.problem is not None:
        return "no"
    counts = {"training": found.train, "validation": found.validation, "test": found.test}
    said = [f"{count} {part}" for part, count in counts.items() if count]
    return f"{found.form}: {', '.join(said[:-1])} and {said[-1]} images"


def _files(found: cx.data.Availability) -> str:
    if found.problem is not None:
        return found.problem + (f"; or: catapult data fetch {found.name}" if found.fetchable else "")
    return "\n".join(map(_file, found.files))


def _file(file: dict[str, Any]) -> str:
    rows = f" ({file['rows']} rows)" if "rows" in file else ""
    check = f": {_CHECKS[file['check']]}" if "check" in file else ""
    return f"{file['path']}{rows}{check}"
