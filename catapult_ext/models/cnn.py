"""Plain convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from catapult_ext.models.layers import (
    Parameterization,
    check_images,
    fix_layers,
    image_sides,
    positive_int,
)

__all__ = ["CNN"]


class CNN(nn.Module):
    """Convolutional ReLU network: depth - 1 convolutions (stride 1, zero padding), flatten, linear output.

    Maps (n, in_channels, height, width of the image) to (n, out_features). The 5-layer CNN of the paper has
    `depth=5` and `width=512` (Appendix F.1). Layer l is `self.layers[l]`; the last one is the linear layer.

    Args:
        in_channels: channels of the images.
        image_size: side of square images, or (height, width).
        width: channels of each convolution.
        depth: number of weight layers, at least 2.
        out_features: outputs c.
        kernel_size: side of the filters, odd.
        parameterization: as in `FCN`.
        bias_scale: as in `FCN`.
        weight_std: as in `FCN`.
        fixed_layers: as in `FCN`.
        generator: as in `FCN`.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int | tuple[int, int],
        width: int,
        depth: int = 5,
        out_features: int = 1,
        *,
        kernel_size: int = 3,
        parameterization: str = "ntk",
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        fixed_layers: Iterable[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.image_size = image_sides(image_size)
        positive_int("width", width)
        positive_int("out_features", out_features)
        if positive_int("depth", depth) < 2:
            raise ValueError("depth must be at least 2 (one convolution and the output layer), got 1")
        kind = Parameterization(parameterization, bias_scale, weight_std, generator)
        channels = [in_channels, *[width] * (depth - 1)]
        self.layers = nn.ModuleList(kind.conv2d(m, k, kernel_size) for m, k in pairwise(channels))
        self.layers.append(kind.linear(width * math.prod(self.image_size), out_features))
        fix_layers(self.layers, fixed_layers)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, in_channels, height, width), in the dtype of the weights, to (n, c)."""
        *convolutions, output = self.layers
        h = check_images(x, self.in_channels, self.image_size)
        for layer in convolutions:
            h = torch.relu(layer(h))  # [n, width, height, width of the image]
        return output(h.flatten(1))  # [n, c]
