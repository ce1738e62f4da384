"""Training with the tangent kernel in sight: algorithms, schedules, recorders, history."""

from __future__ import annotations

from catapult_ext.training.algorithms import GD, SGD, BatchOrder
from catapult_ext.training.evaluation import Evaluation, Labels, evaluate
from catapult_ext.training.history import Best, History
from catapult_ext.training.recorders import AGOPAlignment, BatchCriticalRate, Recorder, Spectrum, Step
from catapult_ext.training.schedules import Constant, Schedule, Stepwise
from catapult_ext.training.stop import Stop
from catapult_ext.training.trainer import train

__all__ = [
    "GD",
    "SGD",
    "AGOPAlignment",
    "BatchCriticalRate",
    "BatchOrder",
    "Best",
    "Constant",
    "Evaluation",
    "History",
    "Labels",
    "Recorder",
    "Schedule",
    "Spectrum",
    "Step",
    "Stepwise",
    "Stop",
    "evaluate",
    "train",
]
