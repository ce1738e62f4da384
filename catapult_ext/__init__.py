"""Tangent kernel, spectrum, loss split, critical learning rate and AGOP of a PyTorch model at every step."""

from __future__ import annotations

# _extension comes first: it loads torch, then the compiled module, or says what is wrong.
from catapult_ext import _extension, data, models, ops  # noqa: F401
from catapult_ext._version import __version__
from catapult_ext.agop import agop, agop_alignment, input_gradients
from catapult_ext.build import build_info
from catapult_ext.eigen import TopEigh, critical_lr, spectral_norm, top_eigh
from catapult_ext.errors import NonFinite, UnsupportedModule
from catapult_ext.hessian import hessian_top
from catapult_ext.layer_agop import layer_agop, layer_gradients, nfa_correlation
from catapult_ext.losses import decompose_loss
from catapult_ext.ntk import jacobian, ntk, ntk_file, ntk_plan
from catapult_ext.ntk_top import ntk_top
from catapult_ext.observe import CapturedStep, LayerReport, Observation, Observer, observe
from catapult_ext.runs import RunFolder
from catapult_ext.stream.plan import NTKPlan, ParameterPlan
from catapult_ext.training import (
    AGOP,
    GD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AGOPAlignment,
    Algorithm,
    AroundSpikes,
    BatchCriticalRate,
    BatchHessian,
    Callback,
    CatapultDetector,
    CatapultSchedule,
    Constant,
    CriticalRate,
    Cyclical,
    DecayAfterCatapult,
    Hessian,
    History,
    LogSpaced,
    ParameterNorms,
    Recorder,
    RMSprop,
    Schedule,
    Spectrum,
    Spike,
    Stepwise,
    Stop,
    WarmUp,
    train,
)

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
    "Callback",
    "CapturedStep",
    "CatapultDetector",
    "CatapultSchedule",
    "Constant",
    "CriticalRate",
    "Cyclical",
    "DecayAfterCatapult",
    "Hessian",
    "History",
    "LayerReport",
    "LogSpaced",
    "NTKPlan",
    "NonFinite",
    "Observation",
    "Observer",
    "ParameterNorms",
    "ParameterPlan",
    "RMSprop",
    "Recorder",
    "RunFolder",
    "Schedule",
    "Spectrum",
    "Spike",
    "Stepwise",
    "Stop",
    "TopEigh",
    "UnsupportedModule",
    "WarmUp",
    "__version__",
    "agop",
    "agop_alignment",
    "build_info",
    "critical_lr",
    "data",
    "decompose_loss",
    "hessian_top",
    "input_gradients",
    "jacobian",
    "layer_agop",
    "layer_gradients",
    "models",
    "nfa_correlation",
    "ntk",
    "ntk_file",
    "ntk_plan",
    "ntk_top",
    "observe",
    "ops",
    "spectral_norm",
    "top_eigh",
    "train",
]
