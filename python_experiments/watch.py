"""`catapult watch`: one run in the terminal while it lasts; a single look where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from catapult_ext.runs import MetricsTail, StoredRun
from python_experiments.readings import catapults, chart, duration, reading, series

_SECONDS = 0.5
_CHARTS = (
    ("loss", "loss", "bold", 5),
    ("lambda_1", "norm of K", "magenta", 3),
    ("critical_lr", "critical rate", "green", 3),
    ("batch_critical_lr", "critical rate of the batch", "green", 3),
)


def show(stored: StoredRun, console: Console) -> None:
    """Show a run until it ends, or as it is where it has ended or the console is no terminal."""
    tail = MetricsTail(stored.path)
    tail.poll()
    if not console.is_terminal or stored.state in ("finished", "interrupted"):
        console.print(view(stored, _rows(stored, tail), console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            state = stored.state
            tail.poll()
            live.update(view(stored, _rows(stored, tail), console.width), refresh=True)
            if state in ("finished", "interrupted"):
                return
            time.sleep(_SECONDS)


def _rows(stored: StoredRun, tail: MetricsTail) -> list[dict[str, Any]]:
    """The rows followed so far; those of a finished run are in another file."""
    if stored.state != "finished":
        return tail.rows
    return stored.metrics().astype(object).to_dict("records")


def view(stored: StoredRun, rows: list[dict[str, Any]], width: int) -> RenderableType:
    """State, latest numbers and charts of a run.

    Args:
        stored: the run.
        rows: its rows.
        width: columns of the terminal.
    """
    parts: list[RenderableType] = [Text(f"{stored.name}, seed {stored.seed}: {_state(stored)}", style="bold")]
    parts.append(Text(str(stored.path), style="dim", overflow="fold"))
    if not rows:
        return Group(*parts, Text("no step is recorded yet"))
    parts.append(_numbers(stored, rows))
    shown = {column for column, *_ in _CHARTS if len(series(rows, column))}
    if "critical_lr" in shown:
        shown.discard("batch_critical_lr")
    for column, title, style, height in _CHARTS:
        values = series(rows, column)
        if column in shown and (lines := chart(values, width - 1, height)):
            span = f"{title}: {values.min():.3g} to {values.max():.3g}, log scale"
            parts += [Text(span, style="dim"), Text("\n".join(lines), style=style, no_wrap=True)]
    return Group(*parts)


def _state(stored: StoredRun) -> str:
    state: str = stored.state
    if state == "finished":
        result = stored.read("result")
        return f"{result['result']} after {duration(result['seconds'])}"
    try:
        quiet = time.time() - (stored.path / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        return state
    if state == "elsewhere":
        state = f"on {stored.read('environment')[-1].get('host')}"
    return f"{state}, last row written {duration(quiet)} ago"


def _numbers(stored: StoredRun, rows: list[dict[str, Any]]) -> Table:
    now = reading(rows)
    training = stored.read("training") or {}
    limit = training.get("stop", {}).get("max_steps")
    table = Table.grid(padding=(0, 2))

    def line(name: str, value: float | None, more: str = "") -> None:
        if value is not None:
            table.add_row(
                Text(name, style="dim"), Text(f"{value:.6g}", style="bold"), Text(more, style="dim")
            )

    line("step", now.step, f"of at most {limit}" if limit else "")
    loss = series(rows, "loss")
    if len(loss):
        peak = int(np.argmax(loss))
        line("loss", now.loss, f"first {loss[0]:.4g}, largest {loss[peak]:.4g}")
    for column in ("train_loss", "validation_loss"):
        values = series(rows, column)
        if len(values) and not np.array_equal(values, loss):
            line(column.replace("_", " "), values[-1], f"smallest {values.min():.4g}")
    norms = series(rows, "lambda_1")
    if len(norms):
        line("norm of K", now.norm, f"first {norms[0]:.4g}")
    line("critical rate", now.critical_lr, "of the batch" if now.of_batch else "")
    if now.lr is not None:
        ratio = f"{now.lr / now.critical_lr:.3g} x the critical rate" if now.critical_lr else ""
        line("rate", now.lr, ratio)
    if (found := catapults(rows)) is not None:
        last = f"the last one from step {found[-1].start} to {found[-1].end}" if found else ""
        line("catapults", len(found), last)
    line("steps with rate > critical", now.steps_above, "of the batch" if now.of_batch else "")
    return table
