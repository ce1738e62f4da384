"""Networks of the paper. One file per architecture; how a layer is scaled is decided in `layers.py`."""

from __future__ import annotations

from catapult_ext.models.cnn import CNN
from catapult_ext.models.fcn import FCN
from catapult_ext.models.layers import NTKConv2d, NTKLinear

__all__ = ["CNN", "FCN", "NTKConv2d", "NTKLinear"]
