"""Training with the tangent kernel in sight: algorithms, schedules, recorders, history."""

from __future__ import annotations

from catapult_ext.training.algorithms import (
    GD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Algorithm,
    BatchOrder,
    RMSprop,
)
from catapult_ext.training.cadence import AroundSpikes, LogSpaced
from catapult_ext.training.callbacks import Callback
from catapult_ext.training.catapult_schedule import CatapultSchedule, DecayAfterCatapult
from catapult_ext.training.catapults import CatapultDetector, Evidence, Reading, Spike
from catapult_ext.training.evaluation import Evaluation, Labels, evaluate
from catapult_ext.training.history import Best, History
from catapult_ext.training.recorders import (
    AGOP,
    AGOPAlignment,
    BatchCriticalRate,
    BatchHessian,
    CriticalRate,
    Hessian,
    ParameterNorms,
    Recorder,
    Spectrum,
    Step,
)
from catapult_ext.training.schedules import Constant, Cyclical, Measurement, Schedule, Stepwise, WarmUp
from catapult_ext.training.stop import Stop
from catapult_ext.training.trainer import train

__all__ = [
    "AGOP",
    "GD",
    "SGD",
    "AGOPAlignment",
    "Adadelta",
    "Adagrad",
    "Adam",
    "Algorithm",
    "AroundSpikes",
    "BatchCriticalRate",
    "BatchHessian",
    "BatchOrder",
    "Best",
    "Callback",
    "CatapultDetector",
    "CatapultSchedule",
    "Constant",
    "CriticalRate",
    "Cyclical",
    "DecayAfterCatapult",
    "Evaluation",
    "Evidence",
    "Hessian",
    "History",
    "Labels",
    "LogSpaced",
    "Measurement",
    "ParameterNorms",
    "RMSprop",
    "Reading",
    "Recorder",
    "Schedule",
    "Spectrum",
    "Spike",
    "Step",
    "Stepwise",
    "Stop",
    "WarmUp",
    "evaluate",
    "train",
]
