"""Parameters outside of layers, and weights that are computed from parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from python_experiments.coverage.cases.build import Call, Case, end, exact, integers, normal, quiet, seq

__all__ = ["CASES"]

_TOKENS, _MAPS = normal(4, 8), normal(2, 4, 4)


def _frozen_part(model: Any) -> nn.Module:
    model.frozen.requires_grad_(False)
    return model


class _Symmetric(nn.Module):
    """A parametrization: the weight is the symmetric part of its original."""

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        return (weight + weight.t()) / 2


class _Bare(nn.Module):
    """Class token, positions and a scalar, as in vision transformers; takes [n, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.gain, self.a, self.last = nn.Parameter(torch.tensor(1.3)), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        z = x.view(-1, 4, 8) + self.position
        z = torch.cat([self.token.expand(len(z), -1, -1), z], 1)
        return self.last(torch.tanh(self.a(z) * self.gain).mean(1))


class _Scaled(nn.Module):
    """Bare parameters in scaled products, one on the right-hand side untransposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(16, 32)), nn.Parameter(torch.randn(16, 1))
        self.b = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return -(torch.relu(F.linear(x, self.w * 0.3, self.b) / 2) @ (0.7 * self.v)) * 1.3


class _FedWithParameter(nn.Module):
    """A layer whose input is a parameter, expanded over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6))
        self.first, self.key, self.last = nn.Linear(32, 5), nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.last(torch.tanh(self.first(x) + self.key(self.query.expand(len(x), -1))))


def _weight_and_spectral_norm() -> nn.Module:
    model = seq(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8), *end(8))
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    return model.eval()


def _by_hook(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with quiet():  # PyTorch has newer ones, and says so
        return seq(norm(nn.Linear(32, 6)), *end(6, 2))


def _symmetric() -> nn.Module:
    model = seq(nn.Linear(32, 32), *end(32))
    parametrize.register_parametrization(model[0], "weight", _Symmetric())
    return model


def _pruned() -> nn.Module:
    model = seq(nn.Linear(32, 6), *end(6, 2))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


_BARE: list[Case] = [
    exact("bare parameter", lambda: Call(
        lambda m, x: m.last(torch.tanh(x * m.gain + m.shift)),
        gain=torch.randn(32), shift=torch.randn(32), last=nn.Linear(32, 1),
    ), None, "bare Parameter"),
    exact("bare parameters", _Bare),
    exact("scaled products", _Scaled),
    exact("fed with a parameter", _FedWithParameter),
    exact("class token and positions", lambda: Call(
        lambda m, x: m.last(torch.tanh(
            m.mix(torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position).mean(1)
        )),
        token=torch.randn(1, 1, 8), position=torch.randn(5, 8), mix=nn.Linear(8, 6), last=nn.Linear(6, 2),
    ), _TOKENS),
    exact("positions, sequence first", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x.transpose(0, 1) - 0.5 * m.position)).mean(0)),
        position=torch.randn(4, 1, 8), mix=nn.Linear(8, 6), last=nn.Linear(6, 1),
    ), _TOKENS),
    exact("repeated parameter", lambda: Call(
        lambda m, x: m.last(torch.tanh(torch.cat([m.token.repeat(len(x), 2), x], 1))),
        token=torch.randn(1, 3), last=nn.Linear(38, 2),
    )),
    exact("layer scale", lambda: Call(
        lambda m, x: m.last((x + m.gain * torch.tanh(m.mix(x))).flatten(1)),
        gain=torch.randn(8), mix=nn.Linear(8, 8), last=nn.Linear(32, 1),
    ), _TOKENS),
    exact("temperatures", lambda: Call(
        lambda m, x: m.last(torch.tanh((m.mix(x) / m.t) + m.s / (2 + x.square().mean(1, keepdim=True)) - m.c)),
        t=torch.tensor([1.5]), s=torch.tensor(0.7), c=torch.randn(1, 6), mix=nn.Linear(32, 6), last=nn.Linear(6, 3),
    )),
    exact("parameter used twice", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x * m.gain)) * m.gain[:0].sum() + torch.tanh(x * m.gain + m.gain)),
        gain=torch.randn(32), mix=nn.Linear(32, 32), last=nn.Linear(32, 1),
    )),
    exact("matrix added transposed", lambda: Call(
        lambda m, x: m.last(torch.tanh(x + m.position.t()).flatten(1)),
        position=torch.randn(8, 4), last=nn.Linear(32, 2),
    ), _TOKENS),
    exact("prelu", lambda: seq(nn.Linear(32, 8), nn.PReLU(8), *end(8))),
    exact("prelu of one number, images", lambda: seq(nn.Conv2d(2, 3, 3), nn.PReLU(), *end(12, 2)), _MAPS),
]  # fmt: skip

_COMPUTED: list[Case] = [
    exact("weight norm", lambda: seq(parametrizations.weight_norm(nn.Linear(32, 6)), *end(6, 2))),
    exact("weight norm of a convolution", lambda: seq(parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), *end(12)),
          _MAPS),
    exact("spectral norm, eval", lambda: seq(parametrizations.spectral_norm(nn.Linear(32, 6)), *end(6, 2)).eval()),
    exact("spectral norm, training", lambda: seq(parametrizations.spectral_norm(nn.Linear(32, 6)), *end(6, 2))),
    exact("spectral norm of a convolution", lambda: seq(
        parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), *end(12)), _MAPS),
    exact("weight norm of one gain", lambda: seq(
        parametrizations.weight_norm(nn.Linear(8, 5), dim=None), *end(20)), _TOKENS),
    exact("weight norm of an embedding", lambda: seq(
        parametrizations.weight_norm(nn.Embedding(9, 4)), *end(24, 2)), integers(9, 6)),
    exact("weight norm of attention", lambda: Call(
        lambda m, x: m.last(m.attend(x, x, x, need_weights=False)[0].mean(1)),
        attend=parametrizations.weight_norm(nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight"),
        last=nn.Linear(8, 1),
    ), _TOKENS),
    exact("weight norm by a hook", lambda: _by_hook(torch.nn.utils.weight_norm)),
    exact("spectral norm by a hook, eval", lambda: _by_hook(torch.nn.utils.spectral_norm).eval()),
    exact("spectral norm by a hook, training", lambda: _by_hook(torch.nn.utils.spectral_norm)),
    exact("orthogonal", lambda: seq(parametrizations.orthogonal(nn.Linear(32, 6)), *end(6, 2)), slow=("rows",)),
    exact("parametrizations", _weight_and_spectral_norm),
    exact("symmetric weight", _symmetric),
    exact("pruned", _pruned),
    exact("frozen mask", lambda: _frozen_part(Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.w * m.frozen))),
        w=torch.randn(6, 32), frozen=(torch.rand(6, 32) > 0.5).float(), last=nn.Linear(6, 1),
    ))),
    exact("low rank", lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.a @ m.b, m.bias))),
        a=torch.randn(6, 2), b=torch.randn(2, 32), bias=torch.randn(6), last=nn.Linear(6, 2),
    )),
    exact("low rank beside a frozen weight", lambda: _frozen_part(Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.frozen + 0.5 * (m.a @ m.b)))).mean(1),
        frozen=torch.randn(6, 8), a=torch.randn(6, 2), b=torch.randn(2, 8), last=nn.Linear(6, 2),
    )), _TOKENS),
    exact("sliced positions", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x + m.position[:, 1:5])).flatten(1)),
        position=torch.randn(1, 9, 8), mix=nn.Linear(8, 5), last=nn.Linear(20, 2),
    ), _TOKENS),
    exact("viewed scale", lambda: Call(
        lambda m, x: m.last(torch.tanh(x * m.scale[:, None, None] + m.shift.view(1, -1, 1, 1)).flatten(1)),
        scale=torch.randn(2), shift=torch.randn(2), last=nn.Linear(32, 2),
    ), _MAPS),
    exact("logarithmic scale", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x) * m.log_scale.exp() / (1 + F.softplus(m.other)))),
        log_scale=torch.randn(()), other=torch.randn(6), mix=nn.Linear(32, 6), last=nn.Linear(6, 1),
    )),
    exact("chunks of one weight", lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.w.chunk(2)[0])) * torch.sigmoid(F.linear(x, m.w.chunk(2)[1]))),
        w=torch.randn(12, 32), last=nn.Linear(6, 3),
    )),
    exact("two ways to one weight", lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.w / m.w.norm() + m.w.tanh()) + m.w[:, 0])),
        w=torch.randn(6, 32), last=nn.Linear(6, 1),
    )),
    exact("class token of two factors", lambda: Call(
        lambda m, x: m.last(torch.tanh(torch.cat([(m.a * m.b).expand(len(x), 3), x], 1))),
        a=torch.randn(1, 3), b=torch.randn(1, 3), last=nn.Linear(35, 1),
    )),
]  # fmt: skip

CASES: list[Case] = [*_BARE, *_COMPUTED]
