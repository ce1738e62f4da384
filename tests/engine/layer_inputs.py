"""Gradients with respect to what each layer's weight is multiplied with, by autograd alone, and networks to try."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from networks import make
from torch import Tensor, nn


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
        assert isinstance(layer, nn.Conv2d)
        if layer.padding_mode == "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice)
        else:
            x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(
            1, 2
        )  # [n, T, C s s]
        patches = patches + self._leaf(patches)
        groups, outputs = layer.groups, layer.out_channels
        each = patches.unflatten(2, (groups, -1))  # [n, T, groups, C / groups s s]
        filters = layer.weight.flatten(1).unflatten(0, (groups, -1))  # [groups, O / groups, C / groups s s]
        out = torch.einsum("ntgd,god->ngot", each, filters).flatten(1, 2)
        if layer.bias is not None:
            out = out + layer.bias[:, None]
        size = [
            (x.shape[2 + a] - layer.dilation[a] * (layer.kernel_size[a] - 1) - 1) // layer.stride[a] + 1
            for a in (0, 1)
        ]
        return out.view(len(x), outputs, *size)

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


def layer_names(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
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
