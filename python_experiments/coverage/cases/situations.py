"""What a network does with its layers: shares them, freezes them, reorders rows, couples samples, hides parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from python_experiments.coverage.cases.build import Call, Case, end, exact, integers, normal, parts, seq

__all__ = ["CASES", "Checkpointed", "Mutated"]


class Checkpointed(nn.Module):
    """Activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.zero, self.a, self.last = nn.Linear(32, 32), seq(nn.Linear(32, 8), nn.Tanh()), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.last(checkpoint(self.a, self.zero(x), use_reentrant=self.reentrant))


class Mutated(nn.Module):
    """The input of a layer is changed in place after use: autograd itself refuses the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(32, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = torch.sigmoid(self.a(x)).clone()
        z = self.b(h)
        h.mul_(2)
        return self.last(z + 1.0)


class _Unused(nn.Module):
    """A layer that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle, self.last = nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        self.idle(x)
        return self.last(torch.tanh(self.a(x)))


class _Captioner(nn.Module):
    """An image [n, 3, 4, 4] and its tokens [n, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.read = nn.Conv2d(3, 4, 2), nn.Embedding(9, 4, padding_idx=0)
        self.last = nn.Linear(4, 2)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.last(torch.tanh(torch.tanh(self.see(image)).mean((2, 3)) + self.read(tokens).mean(1)))


def _frozen_layer() -> nn.Module:
    model = seq(nn.Linear(32, 8), *end(8))
    model[0].requires_grad_(False)
    return model


def _frozen_layers() -> nn.Module:
    model = seq(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _convolutions(mode: Any = "zeros") -> nn.Module:
    return seq(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode=mode, bias=False), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (1, 2), padding=(0, 1)), nn.Flatten(), nn.Linear(24, 1),
    )  # fmt: skip


def _compiled() -> nn.Module:
    compiled: Any = torch.compile(seq(nn.Linear(32, 8), nn.ReLU(True), *end(8, 2)), backend="eager")
    return compiled


def _view_then_in_place(model: Any, x: Tensor) -> Tensor:
    """Writes into a view of an activation, as code for padding and for caches does."""
    h = model.a(x).view(-1, 2, 4)
    h[:, 0].mul_(2.0)
    return model.last(h.flatten(1).relu_())


_SHARED: list[Case] = [
    exact("module called twice", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.shared(torch.tanh(m.shared(torch.tanh(m.first(x))))))),
        first=nn.Linear(32, 8), shared=nn.Linear(8, 8), last=nn.Linear(8, 1),
    )),
    exact("convolution called twice", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.shared(torch.tanh(m.shared(x)))).flatten(1)),
        shared=nn.Conv2d(2, 2, 3, padding=1), last=nn.Linear(32, 1),
    ), normal(2, 4, 4)),
    exact("tied weights", lambda: Call(  # token table and output layer
        lambda m, x: F.linear(torch.tanh(m.table(x)).mean(1), m.table.weight), table=nn.Embedding(5, 6),
    ), integers(5, 7), "tied weights"),
    exact("tied and transposed", lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(torch.tanh(m.first(x)), m.first.weight.T))),
        first=nn.Linear(32, 8), last=nn.Linear(32, 1),
    )),
    exact("inside and outside of its module", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.a(x) + 0.1 * m.a.bias) + m.a.weight.mean(1) * x[:, :8]),
        a=nn.Linear(32, 8), last=nn.Linear(8, 2),
    )),
    exact("frozen layer", _frozen_layer, None, "frozen layer"),
    exact("frozen layers", _frozen_layers),
    exact("unused layer", _Unused),
]  # fmt: skip

_GRAPHS: list[Case] = [
    exact("in-place relu", lambda: seq(
        nn.Linear(32, 8), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False), nn.ReLU(True), nn.Linear(8, 1))),
    exact("writing into a view", lambda: Call(_view_then_in_place, a=nn.Linear(32, 8), last=nn.Linear(8, 1))),
    exact("residual and branches", lambda: Call(
        lambda m, x: m.last(torch.cat([m.a(x).tanh() + m.b(x), m.b(m.c(x).relu()) * m.a(x).sigmoid()], 1)),
        a=nn.Linear(32, 6), b=nn.Linear(32, 6), c=nn.Linear(32, 32), last=nn.Linear(12, 2),
    )),
    exact("convolutions", _convolutions),
    exact("three outputs, convolution", lambda: seq(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, padding=1, stride=2), *end(16, 3))),
    exact("circular convolution", lambda: _convolutions("circular")),
    exact("token-major rows", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.a(x.transpose(0, 1).reshape(-1, 8))).view(4, -1, 8).mean(0)),
        a=nn.Linear(8, 8), last=nn.Linear(8, 1),
    ), normal(4, 8)),
    exact("shuffled samples", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.a(x.flip(0))).flip(0)), a=nn.Linear(32, 8), last=nn.Linear(8, 1),
    )),
    exact("routed by value", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.a(x[x[:, 0].argsort()]))[x[:, 0].argsort().argsort()]),
        a=nn.Linear(32, 8), last=nn.Linear(8, 1),
    )),
    exact("coupled samples", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.a(x) - m.a(x).mean(0))), a=nn.Linear(32, 8), last=nn.Linear(8, 1),
    ), slow=("rows",), coupled=True),
    exact("scalar below coupling", lambda: Call(
        lambda m, x: m.last(torch.tanh(m.a(x) * m.gain - (m.a(x) * m.gain).mean(0))),
        gain=torch.tensor(0.7), a=nn.Linear(32, 8), last=nn.Linear(8, 1),
    ), slow=("rows",), coupled=True),
    exact("three outputs, batch norm", lambda: seq(nn.Linear(32, 8), nn.BatchNorm1d(8), *end(8, 3)),
          slow=("rows",), coupled=True),
    exact("checkpoint", lambda: Checkpointed(False)),
    exact("compiled", _compiled),
    exact("pending negation", lambda: Call(  # the imaginary part of a conjugate is a view that negates later
        lambda m, x: m.last(torch.complex(*m.first(x).tanh().split(1, 1)).conj().imag),
        first=nn.Linear(32, 2), last=nn.Linear(1, 1),
    )),
    exact("dropout, eval", lambda: seq(nn.Linear(32, 8), nn.Dropout(), *end(8)).eval()),
]  # fmt: skip

_CALLS: list[Case] = [
    exact("several inputs", _Captioner, parts(normal(3, 4, 4), integers(9, 6))),
    exact("inputs by keyword", _Captioner, parts(tokens=integers(9, 6), image=normal(3, 4, 4))),
    exact("output (n,)", lambda: Call(
        lambda m, x: m.last(torch.relu(m.a(x))).squeeze(1), a=nn.Linear(32, 8), last=nn.Linear(8, 1),
    )),
]  # fmt: skip

_REFUSED: list[Case] = [
    Case("dropout, training", lambda: seq(nn.Linear(32, 8), nn.Dropout(), *end(8)), normal(32),
         refused=r"draws random numbers.*model\.eval\(\)"),
    Case("autocast", lambda: seq(nn.Linear(32, 8), *end(8)), normal(32), refused=r"outside of torch\.autocast",
         context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    Case("input changed after use", Mutated, normal(32), refused="use the out-of-place operation"),
    Case("reentrant checkpoint", lambda: Checkpointed(True), normal(32), refused="use_reentrant=False"),
    Case("table renormalised in place", lambda: seq(nn.Embedding(9, 4, max_norm=0.5), *end(24)), integers(9, 6),
         refused="max_norm"),
]  # fmt: skip

CASES: list[Case] = [*_SHARED, *_GRAPHS, *_CALLS, *_REFUSED]
