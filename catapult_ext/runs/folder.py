"""One folder per configuration and seed, from the first step to the finished result.

| file | holds | written |
|---|---|---|
| `config.json` | format version, name, seed, configuration and its hash | once, first |
| `environment.json` | versions, hardware, commit, one entry per start or resumption | at each start |
| `data.json` and the like | what the caller notes about the run | once |
| `metrics.jsonl` | one line per step | appended and flushed while the run lasts |
| `resume.safetensors` | all that is needed to go on bit by bit | replaced at each checkpoint |
| `metrics.parquet`, `tensors.safetensors`, `result.json` | the result | at the end |
| `finished` | the marker: all of the result is there | last |

`metrics.jsonl` is flushed to the disk before each `resume.safetensors` that refers to it, which stores how
many bytes of it belong to the state. So after a crash at any moment the lines beyond the state are cut off
and the run goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from catapult_ext.runs.configuration import config_hash, describe, first_difference
from catapult_ext.runs.files import (
    UnreadableFile,
    read_json,
    read_state,
    replace_file,
    sync_folder,
    write_json,
    write_state,
    writing,
)
from catapult_ext.runs.host import bitwise_difference, environment

__all__ = ["FORMAT", "RunError", "RunFolder", "RunResult", "RunSession"]

#: Version of the folder's layout. A folder of a newer version is refused, never touched.
FORMAT = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_FLUSH_SECONDS = 1.0


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message names it and says why. Nothing in it was changed."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: `metrics` (one row per step), `tensors` (a tree), `summary` (JSON)."""

    metrics: pd.DataFrame
    tensors: Any
    summary: dict[str, Any]


class RunFolder:
    """The place of one run: `root / name / <hash of the configuration>-seed<seed>`.

    Creating the object touches no file.

    Args:
        root: Folder of all runs.
        name: What is run, for example "fig3" or "table1/batch5": letters, digits, ".", "_", "-" and "/".
        config: Everything that decides the run's numbers, as a dataclass or dict (see `describe`).
        seed: The run's seed; not part of the hash, so that the seeds of one configuration stand together.
        checkpoint_seconds: Time between two resume states. 0 writes one at every step.

    Raises:
        ValueError: `name` or `checkpoint_seconds` is not as above.
        TypeError: `config` has a part with no stable description.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str,
        config: Any,
        seed: int,
        *,
        checkpoint_seconds: float = 30.0,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f'name: expected letters, digits, ".", "_", "-" and "/" between parts, got {name!r}'
            )
        if not checkpoint_seconds >= 0:
            raise ValueError(f"checkpoint_seconds: expected a number >= 0, got {checkpoint_seconds!r}")
        self.name = name
        self.seed = int(seed)
        self.config = describe(config)
        self.checkpoint_seconds = checkpoint_seconds
        self.path = Path(root) / name / f"{config_hash(self.config)}-seed{self.seed}"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def finished(self) -> bool:
        """Whether the result is complete."""
        return (self.path / "finished").exists()

    def read(self) -> RunResult:
        """Read the result of a finished run.

        Raises:
            RunError: The run is not finished, or the folder is of a newer version.
            UnreadableFile: A file of it is damaged.
        """
        if not self.finished:
            raise RunError(f"{self.path}: expected a finished run, but there is no `finished` marker")
        self._check_config(read_json(self.path / "config.json"))
        try:
            metrics = pd.read_parquet(self.path / "metrics.parquet")
        except (OSError, ValueError) as error:
            raise UnreadableFile(f"{self.path / 'metrics.parquet'}: expected parquet ({error})") from error
        return RunResult(
            metrics, read_state(self.path / "tensors.safetensors"), read_json(self.path / "result.json")
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[RunSession]:
        """Take the folder for this process until the block ends.

        Raises:
            RunError: Another process holds it, it is of a newer version, or its configuration differs.
            UnreadableFile: A file of it is damaged.
            UnwritableFile: The folder or a file of it cannot be written.
        """
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise RunError(f"{self.path}: another process is working on this run") from None
        try:
            file = self.path / "config.json"
            if not file.exists():
                write_json(file, self._described())
            self._check_config(read_json(file))
            session = RunSession(self)
            try:
                yield session
            finally:
                session.close()
        finally:
            lock.release()

    def _described(self) -> dict[str, Any]:
        return {"format": FORMAT, "name": self.name, "seed": self.seed, "config": self.config}

    def _check_config(self, stored: Any) -> None:
        """Refuse a newer layout and a folder that holds another configuration."""
        check_format(self.path, stored)
        if (difference := first_difference(stored, self._described(), "config")) is not None:
            raise RunError(f"{self.path}: holds another configuration ({difference})")


def check_format(path: Path, stored: Any) -> None:
    """Refuse the folder `path` when its `stored` config.json is none, or is of a newer layout."""
    if not isinstance(stored, dict) or not isinstance(stored.get("format"), int):
        raise UnreadableFile(f"{path / 'config.json'}: expected an object with an integer `format`")
    if stored["format"] > FORMAT:
        raise RunError(
            f"{path}: written in format {stored['format']} by a newer version of catapult_ext; "
            f"this one reads up to format {FORMAT}"
        )


class RunSession:
    """Writing access to a run folder; obtained from `RunFolder.open`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.path = folder.path
        self._metrics: Any = None  # binary file, open from `resume` on
        self._next_checkpoint = time.monotonic() + folder.checkpoint_seconds
        self._next_flush = 0.0

    def check(self, topic: str, described: Any) -> None:
        """Store what else decides the numbers on first use; refuse to go on when it has changed since.

        Args:
            topic: Name of the JSON file, for example "training".
            described: A tree from `describe`.

        Raises:
            RunError: The stored tree differs; the message names where.
        """
        file = self.path / f"{topic}.json"
        if not file.exists():
            write_json(file, described)
        elif (difference := first_difference(read_json(file), described, topic)) is not None:
            raise RunError(
                f"{self.path}: this run was started with something else ({difference}); put what differs "
                "into the configuration of the run, or delete the folder"
            )

    def note(self, topic: str, described: Any) -> None:
        """Store what a reader should know but no number depends on (where files lie, for example), once."""
        file = self.path / f"{topic}.json"
        if not file.exists():
            write_json(file, described)

    def resume(self) -> tuple[Any, list[dict[str, Any]]] | None:
        """Open the metrics for writing, cut off what lies beyond the last checkpoint, and return that.

        Returns:
            The state given to the last `checkpoint` and the rows up to it; None for a run that starts anew.

        Raises:
            UnreadableFile: The resume state is damaged, or the metrics end before it.
        """
        self._note_environment()
        state_file, metrics_file = self.path / "resume.safetensors", self.path / "metrics.jsonl"
        stored = read_state(state_file) if state_file.exists() else None
        size = stored["metrics_bytes"] if stored else 0
        with writing(metrics_file):
            # Unbuffered: a write that failed must not be tried again when the file is closed.
            self._metrics = open(metrics_file, "ab", buffering=0)  # noqa: SIM115  closed by close()
        if self._metrics.tell() < size:
            raise UnreadableFile(
                f"{metrics_file}: expected at least {size} bytes for the resume state beside it, got "
                f"{self._metrics.tell()}; delete the run folder to start anew"
            )
        self._metrics.truncate(size)
        self._metrics.seek(size)  # truncating leaves the position behind the new end, and `tell` with it
        if stored is None:
            return None
        try:
            rows = [json.loads(line) for line in metrics_file.read_bytes().splitlines()]
        except ValueError as error:
            raise UnreadableFile(
                f"{metrics_file}: expected JSON lines ({error}); delete the run folder to start anew"
            ) from error
        return stored["state"], rows

    def flush_due(self) -> bool:
        """Whether the last `append` is long enough ago to write the rows that came since."""
        return time.monotonic() >= self._next_flush

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows (JSON scalars; leave out what is not known) and hand them to the system.

        After a kill of the process they are there; after a loss of power only those up to the last
        checkpoint.

        Raises:
            UnwritableFile: The disk is full; no part of these rows is left in the file.
        """
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        start = self._metrics.tell()
        with writing(self.path / "metrics.jsonl"):
            try:
                while lines:
                    lines = lines[self._metrics.write(lines) :]
            except OSError:
                self._metrics.truncate(start)
                self._metrics.seek(start)
                raise
        self._next_flush = time.monotonic() + _FLUSH_SECONDS

    def checkpoint_due(self) -> bool:
        """Whether the last checkpoint is `checkpoint_seconds` ago."""
        return time.monotonic() >= self._next_checkpoint

    def checkpoint(self, state: Any) -> None:
        """Make the present state the one to resume from.

        Args:
            state: Tree of dicts, lists, tensors and JSON scalars that belongs to the rows appended so far.
        """
        with writing(self.path / "metrics.jsonl"):
            os.fsync(self._metrics.fileno())  # first: the state below refers to these bytes
        stored = {"metrics_bytes": self._metrics.tell(), "state": state}
        write_state(self.path / "resume.safetensors", stored)
        self._next_checkpoint = time.monotonic() + self.folder.checkpoint_seconds

    def finish(self, result: RunResult) -> None:
        """Store the result, set the marker, then remove what only an unfinished run needs."""
        write_state(self.path / "tensors.safetensors", result.tensors)
        write_json(self.path / "result.json", result.summary)
        replace_file(self.path / "metrics.parquet", lambda file: result.metrics.to_parquet(file, index=False))
        write_json(self.path / "finished", {"time": environment()["time"]})
        self.close()
        for name in ("resume.safetensors", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        sync_folder(self.path)

    def close(self) -> None:
        """Close the metrics file."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _note_environment(self) -> None:
        file = self.path / "environment.json"
        now = environment()
        entries = read_json(file) if file.exists() else []
        if entries and (difference := bitwise_difference(entries[-1], now)) is not None:
            warnings.warn(
                f"{self.path}: resumed in another environment, so the numbers will not repeat bit by bit "
                f"({difference})",
                stacklevel=3,
            )
        write_json(file, [*entries, now])
