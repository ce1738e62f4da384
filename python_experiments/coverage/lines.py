"""What is stored: OUT/coverage.jsonl, one JSON line for each tool, case and precision."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from catapult_ext.runs import environment

__all__ = ["FILE", "header", "merge", "read", "write"]

FILE = "coverage.jsonl"

_KEYS = frozenset({"case", "tool", "version", "dtype", "verdict", "error", "message", "torch", "cpu"})


def header() -> dict[str, Any]:
    """What every line says about where it comes from."""
    here = environment()
    commit = here["commit"]["catapult_ext"]
    return {
        "time": here["time"],
        "commit": commit and str(commit)[:12],
        "torch": here["torch"],
        "python": here["python"],
        "cpu": here["cpu"],
        "simd": here["simd"],
    }


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of a folder, none where it has no file.

    Raises:
        ValueError: a line is none; the message names file and line.
    """
    file = out / FILE
    lines = []
    for number, text in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            line = json.loads(text)
            if not set(line) >= _KEYS:
                raise ValueError("keys are missing")
        except (ValueError, TypeError) as error:
            where = f"{file}, line {number}"
            raise ValueError(f"{where}: expected a line of `catapult coverage`, got {text[:60]!r}") from error
        lines.append(line)
    return lines


def merge(stored: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stored lines, but of what the same tool has measured again, and behind them the new ones."""
    new = list(new)
    measured = {(line["case"], line["tool"]) for line in new}
    return [line for line in stored if (line["case"], line["tool"]) not in measured] + new


def write(out: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """Write the file, whole or not at all."""
    file, part = out / FILE, out / f"{FILE}.part"
    part.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    os.replace(part, file)
    return file
