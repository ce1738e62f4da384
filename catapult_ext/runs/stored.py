"""Runs as they lie on the disk, finished or under way: for readers that know a folder and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from catapult_ext.runs.files import UnreadableFile, read_json
from catapult_ext.runs.folder import RunError, check_format

__all__ = ["MetricsTail", "StoredRun", "find_runs"]


class StoredRun:
    """A run folder, only read: nothing in it is changed, and no run is disturbed.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        name: What was run.
        seed: Its seed.
        config: Its configuration, as `describe` gives it.

    Raises:
        RunError: It is no run folder, or one of a newer version.
        UnreadableFile: Its `config.json` is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise RunError(f"{self.path}: expected a run folder, but there is no config.json in it")
        stored = read_json(self.path / "config.json")
        check_format(self.path, stored)
        try:
            self.name: str = stored["name"]
            self.seed: int = stored["seed"]
            self.config: Any = stored["config"]
        except KeyError as error:
            raise UnreadableFile(f"{self.path / 'config.json'}: expected an entry {error}") from None

    def __repr__(self) -> str:
        return f"StoredRun({str(self.path)!r})"

    def read(self, topic: str) -> Any:
        """The tree in `topic`.json ("training", "environment", "result", ...); None where there is none."""
        file = self.path / f"{topic}.json"
        return read_json(file) if file.exists() else None

    @property
    def state(self) -> Literal["finished", "running", "interrupted", "elsewhere"]:
        """Whether it is complete, has a living process, has none, or was last worked on by another machine."""
        if (self.path / "finished").exists():
            return "finished"
        started = self.read("environment")
        if not started:
            return "interrupted"
        if started[-1].get("host") != socket.gethostname():
            return "elsewhere"
        try:
            os.kill(started[-1]["pid"], 0)
        except ProcessLookupError:
            return "interrupted"
        except PermissionError:
            pass  # somebody else's, but alive
        return "running"

    def metrics(self) -> pd.DataFrame:
        """One row per step, all that are there by now; steps at which a column was not recorded hold NaN.

        Raises:
            UnreadableFile: The metrics are damaged.
        """
        marker, file = self.path / "finished", self.path / "metrics.parquet"
        if not marker.exists():
            tail = MetricsTail(self.path)
            if tail.poll() or not marker.exists():  # else it has finished between the two looks
                return pd.DataFrame(tail.rows)
        try:
            return pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise UnreadableFile(f"{file}: expected parquet ({error})") from error


class MetricsTail:
    """Follows the `metrics.jsonl` of a run folder while it grows, or is cut off by a resumption.

    Attributes:
        rows: The rows read so far.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = folder / "metrics.jsonl"
        self._position = 0

    def poll(self) -> bool:
        """Read what has come since the last call; whether there was anything. A file that is gone is none."""
        try:
            with open(self._file, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._position:
                    self._position, self.rows = 0, []
                file.seek(self._position)
                new = file.read()
        except FileNotFoundError:
            return False
        new = new[: new.rfind(b"\n") + 1]  # a line that is being written is left for the next time
        try:
            rows = [json.loads(line) for line in new.splitlines()]
        except ValueError:
            rows = None
        known = self.rows[-1].get("step", -1) if self.rows else -1
        if rows is None or (rows and rows[0].get("step", known + 1) <= known):
            if self._position == 0:
                raise UnreadableFile(
                    f"{self._file}: expected JSON lines; delete the run folder to start anew"
                )
            # Cut off and grown again between two calls: what was read may be gone.
            self._position, self.rows = 0, []
            return self.poll()
        self.rows += rows
        self._position += len(new)
        return bool(rows)


def find_runs(root: str | os.PathLike[str], name: str = "") -> list[Path]:
    """The run folders that `name` stands for: a path, or the beginning of one below `root`.

    Args:
        root: Folder of all runs.
        name: Path of a run folder, absolute or seen from here or from `root`; or what such a path, or the
            folder's own name, begins with. Empty: all runs below `root`.

    Returns:
        The folders, the one that was written to last in front.
    """
    root = Path(root)
    if name:
        for path in (Path(name), root / name):
            if (path / "config.json").is_file():
                return [path]
    wanted = name.rstrip("/")
    found = [
        file.parent
        for file in root.glob("**/config.json")
        if file.parent.relative_to(root).as_posix().startswith(wanted) or file.parent.name.startswith(wanted)
    ]
    return sorted(found, key=_last_written, reverse=True)


def _last_written(folder: Path) -> int:
    times = [folder.stat().st_mtime_ns]
    with contextlib.suppress(FileNotFoundError):  # it has just finished
        times.append((folder / "metrics.jsonl").stat().st_mtime_ns)
    return max(times)
