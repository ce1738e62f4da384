"""Layers in NTK parameterization, and the one place that decides how a layer is parameterized.

A network asks a `Parameterization` for its layers and never sees the difference between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "NTKConv2d",
    "NTKLinear",
    "Parameterization",
    "check_images",
    "fix_layers",
    "image_sides",
    "positive_int",
]


class NTKLinear(nn.Module):
    """Linear layer in NTK parameterization: `h W^T / sqrt(in_features) + bias_scale * b`, no sqrt(2).

    `W` ~ N(0, weight_std^2) and `b` ~ N(0, 1), independently; both are drawn on the CPU.

    Args:
        in_features: input features m > 0.
        out_features: output features > 0.
        bias_scale: factor of the bias, >= 0; the layer has a bias only where this is not 0.
        weight_std: standard deviation of the initial weights, > 0.
        generator: CPU generator that draws the initial values; the global one when None.

    Cost: one matrix product; scale and bias ride along in it.
    Source: Appendix F of the paper; Jacot et al. 2018, section 2, for the scaled bias.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_scales(bias_scale, weight_std)
        self.in_features = positive_int("in_features", in_features)
        self.out_features = positive_int("out_features", out_features)
        self.bias_scale = bias_scale
        self.weight_scale = 1 / math.sqrt(in_features)
        weight = torch.randn(out_features, in_features, generator=generator)  # [out, in]
        self.weight = nn.Parameter(weight.mul_(weight_std))
        bias = nn.Parameter(torch.randn(out_features, generator=generator)) if bias_scale else None
        self.register_parameter("bias", bias)  # [out]
        # addmm wants an operand where there is no bias; beta = 0 takes it out of the result. No buffer: those are
        # saved and compared at every observed step, and this is a constant.
        self._no_bias = torch.zeros(())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NTKLinear:
        """Conversions (`.to()`, `.double()`, ...) take the constant along."""
        self._no_bias = fn(self._no_bias)
        return super()._apply(fn, recurse)

    def forward(self, h: Tensor) -> Tensor:
        """`h` (..., in_features) to (..., out_features), e.g. (n, tokens, in_features)."""
        bias = self._no_bias if self.bias is None else self.bias
        rows = h if h.dim() == 2 else h.flatten(0, -2)  # [rows, in]
        out = torch.addmm(bias, rows, self.weight.t(), beta=self.bias_scale, alpha=self.weight_scale)
        return out if h.dim() == 2 else out.unflatten(0, h.shape[:-1])

    def extra_repr(self) -> str:
        """Sizes and scales, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias_scale={self.bias_scale}"


class NTKConv2d(nn.Module):
    """Convolution in NTK parameterization: `conv(h, W / sqrt(in_channels s^2)) + bias_scale * b`.

    Zero padding of (s - 1) / 2, so that images keep their size at stride 1. Initial values as in `NTKLinear`.

    Args:
        in_channels: input channels > 0.
        out_channels: output channels > 0.
        kernel_size: side s of the square filter, odd.
        stride: step of the filter, > 0; a side h becomes ceil(h / stride).
        bias_scale: as in `NTKLinear`.
        weight_std: as in `NTKLinear`.
        generator: as in `NTKLinear`.

    Source: Appendix F of the paper. (Its sums run up to ceil((s+1)/2), which would leave filter taps out; the
    usual s x s taps are meant.)
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_scales(bias_scale, weight_std)
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = positive_int("out_channels", out_channels)
        self.kernel_size = odd_int("kernel_size", kernel_size)
        self.stride = positive_int("stride", stride)
        self.bias_scale = bias_scale
        self.weight_scale = 1 / math.sqrt(in_channels * kernel_size**2)
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size, generator=generator)
        self.weight = nn.Parameter(weight.mul_(weight_std))  # [out, in, s, s]
        bias = nn.Parameter(torch.randn(out_channels, generator=generator)) if bias_scale else None
        self.register_parameter("bias", bias)  # [out]

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, in_channels, height, width) to (n, out_channels, height / stride, width / stride)."""
        # The scale goes onto the filters: far fewer numbers than the images hold.
        bias = None if self.bias is None else self.bias * self.bias_scale  # [out]
        weight = self.weight * self.weight_scale
        return F.conv2d(h, weight, bias, stride=self.stride, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        """Sizes and scales, for `print(model)`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"bias_scale={self.bias_scale}"
        )


@dataclass(frozen=True)
class Parameterization:
    """How the layers of a network are scaled and initialised.

    Attributes:
        name: "ntk" (`NTKLinear`, `NTKConv2d`) or "standard" (`nn.Linear`, `nn.Conv2d` as PyTorch initialises
            them, with biases).
        bias_scale: of the NTK layers; must stay 0 for "standard", which has its own biases.
        weight_std: of the NTK layers; must stay 1 for "standard".
        generator: CPU generator of all initial values; the global one when None.

    Raises:
        ValueError: for an unknown name, or a scale that the chosen parameterization has not.
    """

    name: str = "ntk"
    bias_scale: float = 0.0
    weight_std: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.name not in ("ntk", "standard"):
            raise ValueError(f'parameterization must be "ntk" or "standard", got {self.name!r}')
        _check_scales(self.bias_scale, self.weight_std)
        if self.name == "standard":
            for argument, value, neutral in (
                ("bias_scale", self.bias_scale, 0.0),
                ("weight_std", self.weight_std, 1.0),
            ):
                if value != neutral:
                    raise ValueError(
                        f'{argument} belongs to parameterization="ntk"; "standard" keeps the initialisation '
                        f"and biases of PyTorch, so {argument} must be left out, got {value!r}"
                    )

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """A linear layer from (..., in_features) to (..., out_features)."""
        if self.name == "ntk":
            return NTKLinear(in_features, out_features, **self._ntk_options())
        return self._pytorch_default(nn.utils.skip_init(nn.Linear, in_features, out_features))

    def conv2d(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, bias: bool = True
    ) -> nn.Module:
        """A convolution with zero padding that keeps the size at stride 1.

        `bias=False` leaves out the bias that the parameterization would have; normalisation takes its place.
        """
        odd_int("kernel_size", kernel_size)
        if self.name == "ntk":
            options = self._ntk_options() if bias else {**self._ntk_options(), "bias_scale": 0.0}
            return NTKConv2d(in_channels, out_channels, kernel_size, stride=stride, **options)
        layer = nn.utils.skip_init(
            nn.Conv2d, in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias
        )
        return self._pytorch_default(layer)

    def embedding(self, *shape: int) -> nn.Parameter:
        """A parameter that is added to activations: N(0, weight_std^2), as `nn.Embedding` for "standard"."""
        return nn.Parameter(torch.randn(shape, generator=self.generator).mul_(self.weight_std))

    def _ntk_options(self) -> dict[str, Any]:
        return {
            "bias_scale": self.bias_scale,
            "weight_std": self.weight_std,
            "generator": self.generator,
        }

    def _pytorch_default(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The initialisation of `nn.Linear` and `nn.Conv2d`, which take no generator themselves."""
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=self.generator)
        if layer.bias is not None:
            bound = 1 / math.sqrt(layer.weight[0].numel())  # 1 / sqrt(fan in)
            nn.init.uniform_(layer.bias, -bound, bound, generator=self.generator)
        return layer


def fix_layers(layers: nn.ModuleList, fixed: Iterable[int]) -> None:
    """Exclude the parameters of the layers with these indices from training (`requires_grad = False`).

    Raises:
        ValueError: for an index that is not one of 0 ... len(layers) - 1.
    """
    for index in fixed:
        if type(index) is not int or not 0 <= index < len(layers):
            raise ValueError(
                f"fixed_layers must hold layer indices from 0 to {len(layers) - 1}, got {index!r}"
            )
        layers[index].requires_grad_(False)


def check_images(
    x: Tensor, channels: int, size: tuple[int, int] | None = None, *, multiple: int = 1
) -> Tensor:
    """`x`, if it is (n, channels, *size), or of any sides that are multiples of `multiple` where size is None."""
    if size is not None:
        if x.shape[1:] == (channels, *size):
            return x
        expected = f"(n, {channels}, {size[0]}, {size[1]})"
    else:
        if x.dim() == 4 and x.shape[1] == channels and all(s > 0 and s % multiple == 0 for s in x.shape[2:]):
            return x
        expected = f"(n, {channels}, height, width)"
        expected += f" with height and width multiples of {multiple}" if multiple > 1 else ""
    raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")


def image_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the argument `image_size`."""
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    return positive_int("image_size", rows), positive_int("image_size", columns)


def positive_int(argument: str, value: int) -> int:
    """`value`, if it is an integer above 0."""
    if type(value) is not int or value <= 0:
        raise ValueError(f"{argument} must be an integer above 0, got {value!r}")
    return value


def odd_int(argument: str, value: int) -> int:
    """`value`, if it is an odd integer above 0."""
    if positive_int(argument, value) % 2 == 0:
        raise ValueError(f"{argument} must be odd, so that zero padding keeps the image size; got {value}")
    return value


def _check_scales(bias_scale: float, weight_std: float) -> None:
    if not (math.isfinite(bias_scale) and bias_scale >= 0):
        raise ValueError(f"bias_scale must be finite and at least 0, got {bias_scale!r}")
    if not (math.isfinite(weight_std) and weight_std > 0):
        raise ValueError(f"weight_std must be finite and above 0, got {weight_std!r}")
