"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from catapult_ext.models.layers import Parameterization, check_images, fix_layers, positive_int

__all__ = ["WideResNet"]


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, each behind normalisation and ReLU: `shortcut + F(h)`.

    The shortcut is h itself; where channels or size change, a 1x1 convolution of the normalised, rectified h.
    """

    def __init__(
        self, kind: Parameterization, in_channels: int, out_channels: int, stride: int, batch_norm: bool
    ) -> None:
        super().__init__()
        bias = not batch_norm
        self.norm1 = _norm(in_channels, batch_norm)
        self.conv1 = kind.conv2d(in_channels, out_channels, 3, stride=stride, bias=bias)
        self.norm2 = _norm(out_channels, batch_norm)
        self.conv2 = kind.conv2d(out_channels, out_channels, 3, bias=bias)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = kind.conv2d(in_channels, out_channels, 1, stride=stride, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, in_channels, height, width) to (n, out_channels, height / stride, width / stride)."""
        active = torch.relu(self.norm1(h))  # [n, in, height, width]
        branch = self.conv2(torch.relu(self.norm2(self.conv1(active))))  # [n, out, height', width']
        return branch + (h if self.shortcut is None else self.shortcut(active))


class ImageHead(nn.Module):
    """Normalisation, ReLU, mean over the image, linear output."""

    def __init__(self, kind: Parameterization, channels: int, out_features: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm = _norm(channels, batch_norm)
        self.linear = kind.linear(channels, out_features)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, channels, height, width) to (n, out_features)."""
        return self.linear(torch.relu(self.norm(h)).mean((2, 3)))


class WideResNet(nn.Module):
    """Wide residual network of images (n, in_channels, height, width) to (n, out_features).

    Wide ResNet depth-k, k = `widen_factor`: a 3x3 convolution to `base_width` channels, then (depth - 4) / 6
    residual blocks of k, 2 k and 4 k times `base_width` channels, of which the first with the double and the
    first with the fourfold width halve the image, then ReLU, the mean over the image and a linear output. The
    paper's networks are 10-10 and 16-2 with `base_width=16`.

    `self.layers` holds the first convolution, the residual blocks and the output layer, which are what
    `fixed_layers` counts; a block is fixed with its shortcut and its normalisation.

    Args:
        in_channels: channels of the images.
        depth: 6 N + 4 for N >= 1 blocks of each width; shortcuts are not counted.
        widen_factor: k.
        out_features: outputs c.
        base_width: channels of the first convolution.
        batch_norm: `nn.BatchNorm2d` as PyTorch initialises it, with a gain and a bias, before each ReLU, and
            no biases in the convolutions. None: in the standard parameterization, and not in that of the NTK.
        parameterization: as in `FCN`.
        bias_scale: as in `FCN`.
        weight_std: as in `FCN`.
        fixed_layers: as in `FCN`.
        generator: as in `FCN`.

    Raises:
        ValueError: naming the argument that is out of range.

    Source: Zagoruyko and Komodakis 2016, without dropout.
    """

    def __init__(
        self,
        in_channels: int,
        depth: int = 10,
        widen_factor: int = 10,
        out_features: int = 1,
        *,
        base_width: int = 16,
        batch_norm: bool | None = None,
        parameterization: str = "ntk",
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        fixed_layers: Iterable[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        if positive_int("depth", depth) < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 N + 4 with N >= 1 (10, 16, 22, ...), got {depth}")
        positive_int("widen_factor", widen_factor)
        positive_int("out_features", out_features)
        positive_int("base_width", base_width)
        if batch_norm not in (None, True, False):
            raise ValueError(f"batch_norm must be True, False or None, got {batch_norm!r}")
        kind = Parameterization(parameterization, bias_scale, weight_std, generator)
        normalised = kind.name == "standard" if batch_norm is None else batch_norm
        wide = base_width * widen_factor
        repeats = (depth - 4) // 6
        channels = [base_width, *[wide] * repeats, *[2 * wide] * repeats, *[4 * wide] * repeats]
        self.layers = nn.ModuleList([kind.conv2d(in_channels, base_width, 3, bias=not normalised)])
        for index, (before, after) in enumerate(pairwise(channels)):
            stride = 2 if index in (repeats, 2 * repeats) else 1
            self.layers.append(ResidualBlock(kind, before, after, stride, normalised))
        self.layers.append(ImageHead(kind, 4 * wide, out_features, normalised))
        fix_layers(self.layers, fixed_layers)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, in_channels, height, width), in the dtype of the weights, to (n, c)."""
        h = check_images(x, self.in_channels)
        for layer in self.layers:
            h = layer(h)
        return h  # [n, c]
