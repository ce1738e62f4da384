"""Gradients with respect to what each layer's weight is multiplied with, by autograd alone, and networks to try."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from networks import make
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Perturbed(nn.Module):
    """A layer in place of another: what its weight is multiplied with gets a leaf of zeros added."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.leaves: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return layer(x + self._leaf(x))
        assert isinstance(layer, CONVOLUTIONS)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, sizes = F.pad(x, layer._reversed_padding_repeated_twice, mode), []
        for a in reversed(range(len(layer.kernel_size))):  # [..., size, ...] to [..., positions, taps, ...]
            reach = layer.dilation[a] * (layer.kernel_size[a] - 1)
            starts = torch.arange(0, x.shape[2 + a] - reach, layer.stride[a])
            taps = starts[:, None] + torch.arange(0, reach + 1, layer.dilation[a])
            x = x.index_select(2 + a, taps.flatten()).unflatten(2 + a, taps.shape)
            sizes.insert(0, len(starts))
        last = range(2, x.dim(), 2)
        patches = x.permute(0, *last, 1, *(a + 1 for a in last))  # [n, positions ..., C, taps ...]
        patches = patches.flatten(1, len(last)).flatten(2)  # [n, T, C taps]
        patches = patches + self._leaf(patches)
        groups = layer.groups
        each = patches.unflatten(2, (groups, -1))  # [n, T, groups, C / groups taps]
        filters = layer.weight.flatten(1).unflatten(0, (groups, -1))  # [groups, O / groups, C / groups taps]
        out = torch.einsum("ntgd,god->ngot", each, filters).flatten(1, 2)  # [n, O, T]
        if layer.bias is not None:
            out = out + layer.bias[:, None]
        return out.unflatten(2, sizes)

    def _leaf(self, like: Tensor) -> Tensor:
        self.leaves.append(torch.zeros_like(like, requires_grad=True))
        return self.leaves[-1]


def input_gradients(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """[n, c, T, d] by parameter name, one sample at a time through perturbed layers."""
    model = copy.deepcopy(model)
    layers = {}
    for name in names:
        path = name.removesuffix(".weight")
        layers[name] = Perturbed(model.get_submodule(path))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    for sample in x:
        for layer in layers.values():
            layer.leaves.clear()
        outputs = model(sample[None]).reshape(-1)
        for name, layer in layers.items():
            rows = []
            for output in outputs:
                parts = torch.autograd.grad(output, layer.leaves, retain_graph=True, allow_unused=True)
                flat = [
                    (torch.zeros_like(leaf) if part is None else part).reshape(-1, leaf.shape[-1])
                    for part, leaf in zip(parts, layer.leaves, strict=True)
                ]
                rows.append(torch.cat(flat))
            samples[name].append(torch.stack(rows))
    return {name: torch.stack(rows).detach() for name, rows in samples.items()}


def outer(gradients: Tensor) -> Tensor:
    return torch.einsum("ictp,ictq->pq", gradients, gradients) / len(gradients)


def samples(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 32, dtype=dtype, generator=torch.Generator().manual_seed(n))


class Tokens(nn.Module):
    """Linear layers on tokens with a residual branch, a layer norm and a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.norm = nn.Parameter(torch.randn(4, 8)), nn.LayerNorm((4, 8))
        self.a, self.b, self.last = nn.Linear(8, 5), nn.Linear(5, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x.view(-1, 4, 8) + self.position)
        z = z + self.b(torch.tanh(self.a(z)))
        return self.last(torch.tanh(z).mean(1))


def convolution(
    groups: int = 1, stride: int = 1, padding: int = 0, dilation: int = 1, mode: str = "zeros", c: int = 1
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 4, 3, padding=1, groups=groups),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, stride, padding, dilation, groups, padding_mode=mode),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(c),
    )
    model(torch.zeros(1, 32))
    return model.double()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: make("in-place relu", 3),
    "three outputs": lambda: make("three outputs", 3),
    "called twice": lambda: make("module called twice", 3),
    "token-major rows": lambda: make("token-major rows", 3),
    "shuffled samples": lambda: make("shuffled samples", 3),
    "unused layer": lambda: make("unused layer", 3),
    "bare parameters": lambda: make("bare parameters", 3),
    "batch norm, eval": lambda: make("batch norm, eval", 3),
    "tokens": lambda: Tokens().double(),
    "convolutions": lambda: make("convolutions", 3),
    "circular": lambda: convolution(padding=1, mode="circular"),
    "reflect": lambda: convolution(padding=1, mode="reflect"),
    "stride": lambda: convolution(stride=2, padding=1),
    "dilation": lambda: convolution(dilation=2, padding=1),
    "groups": lambda: convolution(groups=2, stride=2, c=3),
    "no padding, outputs": lambda: convolution(c=3),
}


@dataclass(frozen=True)
class Geometry:
    """A convolution of odd sizes, no two of them alike, in the middle of a network."""

    kernel: tuple[int, ...]
    options: dict[str, Any]
    channels: tuple[int, int] = (2, 3)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        return (self.channels[0], *_MAPS[len(self.kernel)])

    def make(self, outputs: int, transposed: bool = False) -> nn.Module:
        """Conv of one pixel, tanh, this convolution, tanh, linear; freshly drawn."""
        dims, (inner, width) = len(self.kernel), self.channels
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else CONVOLUTIONS
        model = nn.Sequential(
            CONVOLUTIONS[dims - 1](inner, inner, 1),
            nn.Tanh(),
            kinds[dims - 1](inner, width, self.kernel, **self.options),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(outputs),
        )
        model(torch.zeros(1, *self.shape))
        return model.double()


_MAPS = {1: (7,), 2: (7, 5), 3: (7, 4, 3)}
_KERNELS = {1: (3,), 2: (3, 2), 3: (3, 2, 1)}
_OF_DIMS = {
    "plain": lambda d: Geometry(_KERNELS[d], {}),
    "stride": lambda d: Geometry(_KERNELS[d], {"stride": (2, 3, 2)[:d], "padding": (1, 1, 0)[:d]}),
    "dilation": lambda d: Geometry(_KERNELS[d], {"dilation": (2, 3, 1)[:d], "padding": (2, 0, 1)[:d]}),
    "groups": lambda d: Geometry(_KERNELS[d], {"groups": 3, "stride": 2, "padding": 1}, (6, 9)),
    "depthwise": lambda d: Geometry(_KERNELS[d], {"groups": 3, "dilation": 2, "padding": 2}, (3, 6)),
    "no bias": lambda d: Geometry((2, 3, 2)[:d], {"bias": False, "padding": (4, 0, 1)[:d], "stride": (3, 1, 2)[:d]}),
    "whole map": lambda d: Geometry(_MAPS[d], {}),
    "valid": lambda d: Geometry(_KERNELS[d], {"padding": "valid", "stride": (1, 2, 1)[:d], "dilation": (3, 1, 1)[:d]}),
    **{
        f"same, {mode}": lambda d, mode=mode: Geometry(
            (4, 3, 2)[:d], {"padding": "same", "dilation": (1, 2, 1)[:d], "padding_mode": mode}
        )
        for mode in ("zeros", "circular", "reflect", "replicate")
    },
    **{
        f"{mode}, stride, dilation, groups": lambda d, mode=mode: Geometry(
            _KERNELS[d],
            {"padding": (2, 1, 1)[:d], "stride": (1, 2, 3)[:d], "dilation": (2, 1, 1)[:d], "groups": 2}
            | {"padding_mode": mode},
            (4, 6),
        )
        for mode in ("zeros", "circular", "reflect", "replicate")
    },
}  # fmt: skip

GEOMETRIES: dict[str, Geometry] = {f"{d}d, {name}": of(d) for d in (1, 2, 3) for name, of in _OF_DIMS.items()}


def layer_names(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, *CONVOLUTIONS)
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds) and name != "idle"]


NETWORKS = st.fixed_dictionaries(
    {
        "width": st.integers(1, 9),
        "tokens": st.sampled_from([1, 2, 4]),
        "outputs": st.integers(1, 3),
        "n": st.integers(2, 9),
        "seed": st.integers(0, 10**6),
        "convolution": st.booleans(),
    }
)


def random_network(
    width: int, tokens: int, outputs: int, n: int, seed: int, convolution: bool
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    body: list[nn.Module]
    if convolution:
        body = [nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, width, 3, stride=2, padding=tokens % 2)]
    else:
        body = [nn.Unflatten(1, (tokens, 32 // tokens)), nn.Linear(32 // tokens, width)]
    model = nn.Sequential(*body, nn.Tanh(), nn.Flatten(), nn.LazyLinear(outputs)).double()
    model(torch.zeros(1, 32, dtype=torch.float64))
    return model, torch.randn(n, 32, dtype=torch.float64)
