"""Run folders: configuration, environment, metrics, tensors, resume state and finished marker of a run."""

from __future__ import annotations

from catapult_ext.runs.configuration import config_hash, describe
from catapult_ext.runs.files import UnreadableFile
from catapult_ext.runs.folder import FORMAT, RunError, RunFolder, RunResult, RunSession
from catapult_ext.runs.host import environment

__all__ = [
    "FORMAT",
    "RunError",
    "RunFolder",
    "RunResult",
    "RunSession",
    "UnreadableFile",
    "config_hash",
    "describe",
    "environment",
]
