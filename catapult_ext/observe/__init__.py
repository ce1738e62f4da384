"""One forward and one backward: loss, kernel, spectrum, loss split, critical rate, AGOP and the gradient."""

from __future__ import annotations

from catapult_ext.observe.captured_step import CapturedStep
from catapult_ext.observe.observation import LayerReport, Observation
from catapult_ext.observe.observer import Observer, observe

__all__ = ["CapturedStep", "LayerReport", "Observation", "Observer", "observe"]
