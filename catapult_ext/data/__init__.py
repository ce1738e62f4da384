"""Data sets: synthetic tasks with analytic EGOP, and image sets. To add an image set, see `sets.py`."""

from __future__ import annotations

from catapult_ext.data.dataset import Dataset, Split
from catapult_ext.data.download import fetch
from catapult_ext.data.images import Availability, available, load
from catapult_ext.data.labels import LabelNoise
from catapult_ext.data.synthetic import egop, multi_index, multi_index_target, unit_sphere

__all__ = [
    "Availability",
    "Dataset",
    "LabelNoise",
    "Split",
    "available",
    "egop",
    "fetch",
    "load",
    "multi_index",
    "multi_index_target",
    "unit_sphere",
]
