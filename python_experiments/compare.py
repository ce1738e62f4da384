"""`catapult compare`: two runs side by side, what they were given and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from catapult_ext.runs import StoredRun
from python_experiments.readings import catapults, chart, reading, series

#: Entries of an environment that a reader of two results wants to see when they differ.
_ENVIRONMENT = ("catapult_ext", "torch", "cpu", "threads", "simd", "gpu", "commit")


def show(one: StoredRun, other: StoredRun, console: Console) -> None:
    """Print what differs between two runs: configuration, environment, results, metrics."""
    given = [
        {"name": run.name, "seed": run.seed, **flat(run.config), **_training(run)} for run in (one, other)
    ]
    _print(console, "configuration", "field", differences(*given))
    _print(console, "environment", "entry", differences(*(_environment(run) for run in (one, other))))
    tables = [run.metrics() for run in (one, other)]
    rows = [table.astype(object).to_dict("records") for table in tables]
    results = [_result(run, r) for run, r in zip((one, other), rows, strict=True)]
    _print(
        console, "results", "result", {key: (results[0].get(key), results[1].get(key)) for key in results[0]}
    )
    _print(console, "metrics: first to last (smallest to largest)", "column", _metrics(*tables))
    console.print(f"\n{agreement(*tables)}", highlight=False)
    losses = [series(r, "loss") for r in rows]
    positive = np.concatenate([loss[loss > 0] for loss in losses])
    for letter, run, loss in zip("AB", (one, other), losses, strict=True):
        console.print(f"\n{letter}: loss of {run.path}", style="dim", highlight=False, soft_wrap=True)
        for line in chart(loss, console.width - 1, 4, (positive.min(), positive.max())) if len(loss) else []:
            console.print(line, no_wrap=True, highlight=False)


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """A tree of dicts as dotted name -> value; lists stay values."""
    if not isinstance(tree, Mapping):
        return {name: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The two values by name, where they differ; None where one has none."""
    return {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    }


def agreement(one: pd.DataFrame, other: pd.DataFrame) -> str:
    """Up to which step two tables of metrics hold the same bits, in a sentence."""
    columns = [c for c in one if c in other]
    steps = min(len(one), len(other))
    if not steps or not columns:
        return "The runs have no step or no column in common."
    where: dict[str, int] = {}
    for column in columns:
        a, b = (t[column].astype("float64").to_numpy()[:steps] for t in (one, other))
        differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        if differ.any():
            where[column] = int(differ.argmax())
    if where:
        first = min(where.values())
        names = ", ".join(column for column, row in where.items() if row == first)
        step = int(one["step"].iloc[first])
        if first == 0:
            return f"The metrics differ from step {step} on, in {names}."
        return f"The metrics are equal bit by bit before step {step} and differ there in {names}."
    longer = "" if len(one) == len(other) else f"; then only {'A' if len(one) > len(other) else 'B'} goes on"
    return f"The metrics in common are equal bit by bit in all {steps} rows{longer}."


def _training(run: StoredRun) -> dict[str, Any]:
    """What the trainer was given beyond the configuration."""
    return flat(run.read("training") or {}, "training")


def _environment(run: StoredRun) -> dict[str, Any]:
    entries = run.read("environment") or [{}]
    return flat({name: entries[-1].get(name) for name in _ENVIRONMENT})


def _result(run: StoredRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    result = run.read("result") or {}
    best = result.get("best") or {}
    now, found = reading(rows), catapults(rows)
    shown = {
        "state": run.state,
        "result": result.get("result"),
        "steps": now.step,
        "seconds": result.get("seconds"),
        "last loss": now.loss,
        "catapults": None if found is None else len(found),
        "steps with rate > critical": now.steps_above,
    }
    names = {"step": "best step", "measures": "best"}
    return shown | flat({names.get(name, name.replace("_", " ")): value for name, value in best.items()})


def _metrics(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, tuple[Any, Any]]:
    columns = [c for c in dict.fromkeys([*one, *other]) if c not in ("step", "catapult")]
    return {column: (_summary(one, column), _summary(other, column)) for column in columns}


def _summary(table: pd.DataFrame, column: str) -> str | None:
    values = table[column].dropna().astype("float64") if column in table else pd.Series(dtype="float64")
    if values.empty:
        return None
    first, last, low, high = values.iloc[0], values.iloc[-1], values.min(), values.max()
    return f"{first:.4g} to {last:.4g} ({low:.4g} to {high:.4g})"


def _print(console: Console, title: str, label: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    pairs = {name: pair for name, pair in pairs.items() if pair != (None, None)}
    if not pairs:
        console.print(f"\n{title}: no difference", highlight=False)
        return
    table = Table(label, "A", "B", title=title, title_justify="left", title_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for name, pair in pairs.items():
        table.add_row(*(Text(text) for text in (name, *map(_word, pair))))
    console.print()
    console.print(table)


def _word(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
