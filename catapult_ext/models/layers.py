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

__all__ = ["NTKConv2d", "NTKLinear", "Parameterization", "fix_layers", "positive_int"]


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
        """`h` (n, in_features) to (n, out_features)."""
        bias = self._no_bias if self.bias is None else self.bias
        return torch.addmm(bias, h, self.weight.t(), beta=self.bias_scale, alpha=self.weight_scale)

    def extra_repr(self) -> str:
        """Sizes and scales, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bias_scale={self.bias_scale}"


class NTKConv2d(nn.Module):
    """Convolution in NTK parameterization: `conv(h, W / sqrt(in_channels s^2)) + bias_scale * b`.

    Stride 1 and zero padding, so that images keep their size. Initial values as in `NTKLinear`.

    Args:
        in_channels: input channels > 0.
        out_channels: output channels > 0.
        kernel_size: side s of the square filter, odd.
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
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_scales(bias_scale, weight_std)
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = positive_int("out_channels", out_channels)
        self.kernel_size = odd_int("kernel_size", kernel_size)
        self.bias_scale = bias_scale
        self.weight_scale = 1 / math.sqrt(in_channels * kernel_size**2)
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size, generator=generator)
        self.weight = nn.Parameter(weight.mul_(weight_std))  # [out, in, s, s]
        bias = nn.Parameter(torch.randn(out_channels, generator=generator)) if bias_scale else None
        self.register_parameter("bias", bias)  # [out]

    def forward(self, h: Tensor) -> Tensor:
        """`h` (n, in_channels, height, width) to (n, out_channels, height, width)."""
        # The scale goes onto the filters: far fewer numbers than the images hold.
        bias = None if self.bias is None else self.bias * self.bias_scale  # [out]
        return F.conv2d(h, self.weight * self.weight_scale, bias, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        """Sizes and scales, for `print(model)`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
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
        """A linear layer from (n, in_features) to (n, out_features)."""
        if self.name == "ntk":
            return NTKLinear(in_features, out_features, **self._ntk_options())
        return self._pytorch_default(nn.utils.skip_init(nn.Linear, in_features, out_features))

    def conv2d(self, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
        """A size-preserving convolution, stride 1, zero padding."""
        odd_int("kernel_size", kernel_size)
        if self.name == "ntk":
            return NTKConv2d(in_channels, out_channels, kernel_size, **self._ntk_options())
        return self._pytorch_default(
            nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        )

    def _ntk_options(self) -> dict[str, Any]:
        return {
            "bias_scale": self.bias_scale,
            "weight_std": self.weight_std,
            "generator": self.generator,
        }

    def _pytorch_default(self, layer: nn.Linear | nn.Conv2d) -> nn.Module:
        """The initialisation of `nn.Linear` and `nn.Conv2d`, which take no generator themselves."""
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=self.generator)
        bound = 1 / math.sqrt(layer.weight[0].numel())  # 1 / sqrt(fan in)
        assert layer.bias is not None
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
