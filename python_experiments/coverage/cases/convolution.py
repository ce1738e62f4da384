"""Convolutions and transposed convolutions in one, two and three dimensions, in every geometry and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_experiments.coverage.cases.build import Call, Case, end, exact, normal, seq

__all__ = ["CASES"]

_SHAPES = {1: (4, 8), 2: (2, 4, 4), 3: (2, 4, 2, 2)}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _on_maps(
    dims: int, kind: Callable[..., nn.Module], *sizes: Any, outputs: int = 1, **options: Any
) -> nn.Module:
    """A layer on samples of `_SHAPES[dims]`, then the end of the network."""
    shape = _SHAPES[dims]
    layer = kind(shape[0], *sizes, **options)
    with torch.no_grad():
        width = layer(torch.zeros(1, *shape)).numel()
    return seq(layer, *end(width, outputs))


def _case(
    name: str,
    dims: int,
    *sizes: Any,
    matrix: tuple[str, ...] = (),
    transposed: bool = False,
    **options: Any,
) -> Case:
    kind = (_TRANSPOSED if transposed else _CONVOLUTIONS)[dims]
    return exact(name, lambda: _on_maps(dims, kind, *sizes, **options), normal(*_SHAPES[dims]), *matrix)


def _several(
    name: str,
    layer: Callable[..., nn.Module],
    sizes: tuple[int, ...],
    map_shape: tuple[int, ...],
    **options: int,
) -> Case:
    """Several maps of one sample, as in a network that looks at an image in parts."""

    def forward(model: Any, x: Tensor) -> Tensor:
        maps = model.layer(x.view(-1, *map_shape)).tanh()
        return model.last(maps.reshape(len(x), -1))

    def make() -> nn.Module:
        made = layer(*sizes, **options)
        with torch.no_grad():
            width = made(torch.zeros(32 // torch.Size(map_shape).numel(), *map_shape)).numel()
        return Call(forward, layer=made, last=nn.Linear(width, 2))

    return exact(f"{name} of several maps", make, normal(2, 4, 4))


# Every padding mode in every dimension, together with a stride, a dilation and groups.
_PADDED = [
    _case(f"convolution {d}d, {mode}, stride, groups", d, 4, 2, stride=(2, *(1,) * (d - 1)), padding=1, groups=2,
          padding_mode=mode, outputs=2 if mode == "circular" else 1)
    for d in (1, 2, 3) for mode in ("zeros", "circular", "reflect", "replicate")
]  # fmt: skip
_SAME = [
    _case(f"convolution {d}d, same, {mode}", d, 3, (3, 2, 1)[:d], padding="same", dilation=(2, 1, 1)[:d],
          padding_mode=mode)
    for d in (1, 2, 3) for mode in ("zeros", "circular", "reflect", "replicate")
]  # fmt: skip

CASES: list[Case] = [
    _case("convolution", 2, 3, 3, matrix=("convolution",)),
    _case("convolution, valid", 2, 3, (2, 3), padding="valid"),
    _case("convolution, stride", 2, 3, 2, stride=2, matrix=("stride",)),
    _case("convolution, dilation", 2, 3, 2, stride=(1, 2), dilation=2, padding=1, matrix=("stride and dilation",)),
    _case("convolution, groups", 2, 4, 3, groups=2, matrix=("groups",)),
    _case("convolution, circular", 2, 3, 3, padding=1, padding_mode="circular", matrix=("circular padding",)),
    _case("convolution, reflect", 2, 3, 3, padding=1, padding_mode="reflect"),
    _case("convolution, replicate", 2, 3, 3, padding=1, padding_mode="replicate"),
    _case("convolution, depthwise", 2, 6, 3, groups=2, padding=1, outputs=2),
    _case("convolution, no bias", 2, 3, 3, bias=False, outputs=3),
    _case("convolution of one pixel", 2, 3, 1, outputs=2),
    _case("convolution, wider padding than kernel", 2, 3, 2, padding=(3, 0), stride=2, outputs=2),
    exact("convolution of an unfolded image", lambda: Call(
        lambda m, x: m.last((m.filters @ F.unfold(x, 2)).tanh().flatten(1)),
        filters=torch.randn(3, 8), last=nn.Linear(27, 2),
    ), normal(2, 4, 4)),
    exact("convolution by a bare filter", lambda: Call(
        lambda m, x: m.last(F.conv2d(x, 0.5 * m.filters, m.shift).tanh().flatten(1)),
        filters=torch.randn(3, 2, 2, 2), shift=torch.randn(3), last=nn.Linear(27, 1),
    ), normal(2, 4, 4)),
    exact("pooled and enlarged", lambda: seq(
        nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 3, 2), nn.AdaptiveAvgPool2d(2), *end(12)), normal(2, 4, 4)),
    _case("convolution 1d", 1, 3, 3, matrix=("Conv1d",)),
    _case("convolution 1d, groups", 1, 6, 3, groups=2, padding=2, stride=2),
    _case("convolution 3d", 3, 3, 2, padding=(1, 0, 0)),
    _case("convolution 3d, groups", 3, 4, 2, groups=2, dilation=(2, 1, 1), outputs=3),
    *_PADDED,
    *_SAME,
    _several("convolution", nn.Conv2d, (1, 3, 3), (1, 4, 4)),
    _several("convolution 1d", nn.Conv1d, (2, 3, 2), (2, 4)),
    _case("transposed convolution", 2, 3, 3, stride=2, output_padding=1, transposed=True, matrix=("ConvTranspose2d",)),
    _case("transposed convolution, groups", 2, 4, 3, stride=(2, 1), padding=1, groups=2, transposed=True, outputs=2),
    _case("transposed convolution, dilation, no bias", 2, 3, 2, dilation=2, bias=False, transposed=True),
    _case("transposed convolution 1d", 1, 6, 3, stride=2, padding=1, groups=2, transposed=True, outputs=2),
    _case("transposed convolution 1d, output padding", 1, 3, 3, stride=3, output_padding=2, transposed=True),
    _case("transposed convolution 3d", 3, 3, 2, dilation=(1, 2, 1), transposed=True),
    _case("transposed convolution 3d, groups", 3, 4, 2, stride=2, output_padding=(1, 0, 1), groups=2, transposed=True),
    _several("transposed convolution", nn.ConvTranspose2d, (1, 2, 2), (1, 4, 4), stride=2),
]  # fmt: skip
