"""Networks of the paper. One file per architecture; how a layer is scaled is decided in `layers.py`."""

from __future__ import annotations

from catapult_ext.models.cnn import CNN
from catapult_ext.models.fcn import FCN
from catapult_ext.models.layers import NTKConv2d, NTKLinear
from catapult_ext.models.myrtle import Myrtle5
from catapult_ext.models.vit import ViT
from catapult_ext.models.wide_resnet import WideResNet

__all__ = ["CNN", "FCN", "Myrtle5", "NTKConv2d", "NTKLinear", "ViT", "WideResNet"]
