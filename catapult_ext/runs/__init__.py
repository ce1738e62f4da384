"""Run folders: configuration, environment, metrics, tensors, resume state and finished marker of a run."""

from __future__ import annotations

from catapult_ext.runs.configuration import config_hash, describe
from catapult_ext.runs.files import UnreadableFile, UnwritableFile
from catapult_ext.runs.folder import FORMAT, RunError, RunFolder, RunResult, RunSession
from catapult_ext.runs.host import environment
from catapult_ext.runs.stored import MetricsTail, StoredRun, find_runs

__all__ = [
    "FORMAT",
    "MetricsTail",
    "RunError",
    "RunFolder",
    "RunResult",
    "RunSession",
    "StoredRun",
    "UnreadableFile",
    "UnwritableFile",
    "config_hash",
    "describe",
    "environment",
    "find_runs",
]
