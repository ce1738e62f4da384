"""The Myrtle network."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catapult_ext.models.layers import Parameterization, check_images, fix_layers, positive_int

__all__ = ["Myrtle5"]


class Myrtle5(nn.Module):
    """Myrtle network with 5 weight layers, of images (n, in_channels, height, width) to (n, out_features).

    3x3 convolution, ReLU, 3x3 convolution, ReLU, 2x2 mean, 3x3 convolution, ReLU, 2x2 mean, 3x3 convolution,
    ReLU, mean over the image (8x8 for images of side 32), linear output; every convolution has `width` channels
    and stride 1. Height and width must be multiples of 4. Layer l is `self.layers[l]`.

    Args:
        in_channels: channels of the images.
        width: channels of each convolution.
        out_features: outputs c.
        parameterization: as in `FCN`.
        bias_scale: as in `FCN`.
        weight_std: as in `FCN`.
        fixed_layers: as in `FCN`.
        generator: as in `FCN`.

    Raises:
        ValueError: naming the argument that is out of range.

    Source: Shankar et al. 2020, "Neural kernels without tangents", with trained weights.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_features: int = 1,
        *,
        parameterization: str = "ntk",
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        fixed_layers: Iterable[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        positive_int("width", width)
        positive_int("out_features", out_features)
        kind = Parameterization(parameterization, bias_scale, weight_std, generator)
        self.layers = nn.ModuleList(kind.conv2d(m, k, 3) for m, k in pairwise([in_channels, *[width] * 4]))
        self.layers.append(kind.linear(width, out_features))
        fix_layers(self.layers, fixed_layers)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, in_channels, height, width), in the dtype of the weights, to (n, c)."""
        first, second, third, fourth, output = self.layers
        h = check_images(x, self.in_channels, multiple=4)
        h = torch.relu(second(torch.relu(first(h))))  # [n, width, height, width of the image]
        h = torch.relu(third(F.avg_pool2d(h, 2)))  # [n, width, height / 2, ...]
        h = torch.relu(fourth(F.avg_pool2d(h, 2)))  # [n, width, height / 4, ...]
        return output(h.mean((2, 3)))  # [n, c]
