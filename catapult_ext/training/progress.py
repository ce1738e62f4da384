"""A progress bar with loss, rate and critical rate; nothing at all where there is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["TrainingProgress"]

_SECONDS = 0.2


class TrainingProgress:
    """Shows one run; a context manager.

    Args:
        enabled: False: never show anything.
        total: Steps of the run at most.
        console: Where to show it; None: standard error.
    """

    def __init__(self, enabled: bool, total: int, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total)
        self._next = 0.0

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def due(self) -> bool:
        """Whether it is time for an update; an update costs more than a small step."""
        return not self._bar.disable and time.monotonic() >= self._next

    def show(self, step: int, loss: float, lr: float, critical_lr: float | None) -> None:
        """Update the bar."""
        critical = "" if critical_lr is None else f"  critical {critical_lr:.3g}"
        self._bar.update(self._task, completed=step, description=f"loss {loss:.4g}  rate {lr:.3g}{critical}")
        self._next = time.monotonic() + _SECONDS
