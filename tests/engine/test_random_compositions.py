"""Random compositions of layers over vectors, tokens and maps: exact in float64 and in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import brute_force
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import catapult_ext as cx

_WORDS = 11  # of the tables

#: What has nothing to compute with of its own, but changes what rules are given: views, and activations in place.
_BETWEEN = [
    nn.Identity,
    nn.Tanh,
    nn.GELU,
    *(lambda kind=kind: kind(inplace=True) for kind in (nn.ReLU, nn.ELU, nn.SiLU)),
]


class _Apply(nn.Module):
    """A bare parameter that meets the activations."""

    def __init__(self, kind: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kind, self.value = kind, nn.Parameter(0.5 + torch.rand(shape))

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "add":
            return h + self.value
        if self.kind == "subtract":
            return self.value - 0.5 * h
        if self.kind == "multiply":
            return h * self.value
        if self.kind == "divide":
            return h / self.value
        return torch.cat([self.value.expand(len(h), *(-1,) * (h.dim() - 1)), h], 1)  # a token more


class _Attend(nn.Module):
    """Self-attention, batch first outside and token-major inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.attention(h, h, h, need_weights=False)[0]


class _DotProduct(nn.Module):
    """Scaled dot product attention of one joint layer, with a mask or without."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.joint, self.causal = nn.Linear(width, 3 * width), causal

    def forward(self, h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.joint(h).chunk(3, -1), is_causal=self.causal)


class _Tied(nn.Module):
    """Down and up again by the same matrix, transposed, and its columns once more as bare parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, 3)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.down(h)) @ self.down.weight + self.down.weight.mean(0)


class _LowRank(nn.Module):
    """A product of two parameters as the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.a @ self.b)


class _Recurrent(nn.Module):
    """All states of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h)[0]


class _SelfBilinear(nn.Module):
    """A bilinear form of the activations and themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.form = nn.Bilinear(width, width, 3)

    def forward(self, h: Tensor) -> Tensor:
        return self.form(h, torch.tanh(h))


class _Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(h)))


class _Residual(nn.Module):
    """A layer beside a shortcut."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layer(h)


class _Tokens(nn.Module):
    """Integers 0 ... `_WORDS` - 1 from numbers [n, 32]: seven for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :7].abs() * 10).long() % _WORDS


def _layer(draw: Callable[[st.SearchStrategy], object], shape: tuple[int, ...]) -> nn.Module:
    """A layer for activations [n, *shape]."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    if len(shape) == 1:
        kind = pick(
            "linear",
            "layer norm",
            "rms norm",
            "group norm",
            "batch norm",
            "bare",
            "prelu",
            "tied",
            "low rank",
            "bilinear",
        )
    elif len(shape) == 2:
        kind = pick(
            "linear",
            "layer norm",
            "rms norm",
            "instance norm",
            "convolution",
            "attention",
            "token",
            "bare",
            "prelu",
            "dot product",
            "tied",
            "low rank",
            "recurrent",
        )
    else:
        kind = pick(
            "convolution",
            "transposed",
            "linear",
            "group norm",
            "instance norm",
            "batch norm",
            "bare",
            "prelu",
            "low rank",
        )
    bias = pick(True, False)
    dims = len(shape) - 1
    if kind == "linear":
        return nn.Linear(shape[-1], pick(3, 4, 6), bias=bias)
    if kind == "layer norm":
        return nn.LayerNorm(shape[-pick(1, len(shape)) :], bias=bias)
    if kind == "rms norm":
        return nn.RMSNorm(shape[-1])
    if kind == "group norm":
        # A group of one number is that number minus itself: rounding, magnified by 1 / sqrt(eps).
        alone = len(shape) == 1 or all(size == 1 for size in shape[1:])
        return nn.GroupNorm(1 if alone else pick(1, shape[0]), shape[0])
    if kind == "batch norm":
        return [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][max(0, dims - 1)](shape[0])
    if kind == "instance norm":
        many = any(size > 1 for size in shape[1:])
        layer = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dims - 1](shape[0], affine=True)
        return layer if many else nn.Identity()
    if kind == "attention":
        return _Attend(shape[1])
    if kind == "dot product":
        return _DotProduct(shape[1], pick(True, False))
    if kind in ("tied", "low rank"):
        return (_Tied if kind == "tied" else _LowRank)(shape[-1])
    if kind == "bilinear":
        return _SelfBilinear(shape[0])
    if kind == "recurrent":
        return _Recurrent(pick(nn.GRU, nn.RNN)(shape[1], 3, batch_first=True))
    if kind == "prelu":
        return nn.PReLU(pick(1, shape[0]))
    if kind == "token":
        return _Apply("token", (1, *shape[1:]))
    if kind == "bare":
        own = tuple(pick(1, size) for size in shape)
        return _Apply(pick("add", "subtract", "multiply", "divide"), own[pick(0, len(own) - 1) :])
    groups = pick(1, 2) if shape[0] % 2 == 0 else 1
    if kind == "transposed":
        make = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1]
        return make(shape[0], 2 * groups, pick(1, 2), pick(1, 2), groups=groups, bias=bias)
    make = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    mode = pick("zeros", "circular", "replicate", "reflect")
    if pick(True, False):
        mode = "zeros" if min(shape[1:]) < 3 else mode
        return make(
            shape[0], pick(2, 4), pick(1, 2, 3), padding="same", groups=groups, bias=bias, padding_mode=mode
        )
    padding = 1 if mode != "reflect" or min(shape[1:]) > 1 else 0
    return make(
        shape[0], pick(2, 4), pick(1, 2, 3), pick(1, 2), padding, groups=groups, bias=bias, padding_mode=mode
    )


#: What the first layers of a network are given.
_STARTS: dict[str, Callable[[], tuple[list[nn.Module], tuple[int, ...]]]] = {
    "vectors": lambda: ([], (32,)),
    "tokens": lambda: ([nn.Unflatten(1, (4, 8))], (4, 8)),
    "maps": lambda: ([nn.Unflatten(1, (2, 4, 4))], (2, 4, 4)),
    "volumes": lambda: ([nn.Unflatten(1, (1, 2, 4, 4))], (1, 2, 4, 4)),
    "words": lambda: ([_Tokens(), nn.Embedding(_WORDS, 6, padding_idx=3)], (7, 6)),
    "bags of words": lambda: ([_Tokens(), nn.EmbeddingBag(_WORDS, 6, mode="mean", padding_idx=2)], (6,)),
}


def _computed(draw: Callable[[st.SearchStrategy], object], layer: nn.Module) -> nn.Module:
    """The layer with a weight that is computed from other parameters, or a part of it frozen, or as it is."""
    kind = draw(st.sampled_from(["plain", "plain", "weight norm", "spectral norm", "frozen"]))
    matrix = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    if kind == "weight norm" and matrix:
        return parametrizations.weight_norm(layer)
    if kind == "spectral norm" and matrix:
        return parametrizations.spectral_norm(layer)
    if kind == "frozen":
        for p in list(layer.parameters())[:1]:
            p.requires_grad_(False)
    return layer


@st.composite
def compositions(draw: Callable[[st.SearchStrategy], object], start: str) -> nn.Module:
    """A network of x [n, 32] with one to three outputs, in eval mode."""
    torch.manual_seed(draw(st.integers(0, 2**31)))  # type: ignore[arg-type]
    layers, shape = _STARTS[start]()
    for _ in range(draw(st.integers(1, 5))):  # type: ignore[call-overload]
        layer = _computed(draw, _layer(draw, shape)).eval()
        with torch.no_grad():
            after = tuple(layer(torch.zeros(2, *shape)).shape[1:])
        if after == shape:
            layer = draw(st.sampled_from([nn.Sequential, _Residual, _Twice]))(layer)  # type: ignore[operator]
        shape = after
        layers.append(layer)
        layers.append(draw(st.sampled_from(_BETWEEN))())  # type: ignore[operator]
    width = int(torch.Size(shape).numel())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, draw(st.integers(1, 3)))).eval()  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        if p.dim() == 1 and "value" not in name:
            nn.init.normal_(p, 0.5)
    for name, buffer in model.named_buffers():
        if "var" in name:
            buffer.uniform_(0.5, 2)
    return model


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
@pytest.mark.parametrize("start", _STARTS)
@settings(max_examples=16, deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_random_compositions(start: str, data: st.DataObject, n: int, seed: int) -> None:
    model = data.draw(compositions(start))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 32, generator=generator)
    exact = copy.deepcopy(model).double()
    rows = brute_force.jacobian(exact, x.double())
    expected = brute_force.kernel_of(rows)
    c = len(expected) // n
    y = torch.randn(n, c, generator=generator)
    residual = exact(x.double()).detach().view(n, c) - y.double()
    weights = (2 / (n * c) * residual).reshape(-1)
    references = {p: torch.einsum("n,n...->...", weights, r) for p, r in rows.items()}
    largest = max(float(r.norm()) for r in references.values())
    diagonal = expected.diagonal().sqrt().clamp_min(1e-30)
    single = brute_force.jacobian(model, x)
    # Normalising few numbers magnifies the rounding of the forward, which no way of assembling gets rid of.
    rounding = max(
        float((single[p].double() - rows[p]).norm() / r.norm().clamp_min(1e-30))
        for p, r in rows.items()
        if r.any()
    )
    for network, tolerance in ((exact, 1e-10), (model, 1e-5 + 4 * rounding)):
        dtype = next(network.parameters()).dtype
        observation = cx.observe(network, x.to(dtype), y.to(dtype))
        error = (observation.kernel.double() - expected).abs() / torch.outer(diagonal, diagonal)
        assert float(error.max()) <= tolerance
        assert torch.equal(observation.kernel, observation.kernel.T)
        for p, gradient in observation.gradients().items():
            assert float((gradient.double() - references[p]).norm()) <= tolerance * largest, p
