"""Progress of many runs at once, read from what they write; nothing at all where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from catapult_ext.runs import MetricsTail, UnreadableFile
from python_experiments.readings import reading


class Board:
    """One bar for all runs and one for each that is under way; a context manager.

    Args:
        console: where to show it.
        total: number of runs.
        enabled: False: never show anything.
    """

    def __init__(self, console: Console, total: int, *, enabled: bool) -> None:
        self.shown = enabled and console.is_terminal
        self._bars = Progress(
            TextColumn(
                "{task.fields[name]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            TextColumn(
                "{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True, justify="right")
            ),
            BarColumn(bar_width=10),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            auto_refresh=False,
            disable=not self.shown,
        )
        self._all = self._bars.add_task("", total=total, name="runs")
        self._running: dict[str, tuple[TaskID, MetricsTail]] = {}

    def __enter__(self) -> Board:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def done(self) -> None:
        """One run more has ended."""
        self._bars.advance(self._all)

    def show(self, running: Mapping[str, tuple[Path, int]]) -> None:
        """Show how far the running ones are; name -> (run folder, steps at most)."""
        for name in [name for name in self._running if name not in running]:
            self._bars.remove_task(self._running.pop(name)[0])
        for name, (folder, steps) in running.items():
            if name not in self._running:
                task = self._bars.add_task("", total=steps, name=f"  {name}")
                self._running[name] = task, MetricsTail(folder)
            task, tail = self._running[name]
            with contextlib.suppress(UnreadableFile):  # the run itself will say so
                if tail.poll():
                    now = reading(tail.rows)
                    self._bars.update(task, completed=now.step, description=now.line)
        self._bars.refresh()
