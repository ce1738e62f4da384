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


def _autocast(enabled: bool = True) -> nn.Module:
    """A layer under autocast, which leaves float64 as it is, so that numbers arrive there in float32 where it is on."""

    def forward(model: Any, x: Tensor) -> Tensor:
        numbers = [t.float() if enabled else t for t in (x, model.a.weight, model.a.bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            h = F.linear(*numbers)
        return model.last(torch.tanh(h.to(x)))

    return Call(forward, a=nn.Linear(32, 8), last=nn.Linear(8, 1))


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


def _frozen_kinds() -> nn.Module:
    model = seq(
        nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.PReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), *end(12)
    )
    for frozen in (model[0].weight, model[1].bias, model[2].weight, model[3].bias, model[4].weight):
        frozen.requires_grad_(False)
    return model.eval()


def _tie(model: Any) -> nn.Module:
    model.b.weight = model.a.weight
    return model


def _convolutions(mode: Any = "zeros") -> nn.Module:
    return seq(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, padding_mode=mode, bias=False), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (1, 2), padding=(0, 1)), nn.Flatten(), nn.Linear(24, 1),
    )  # fmt: skip


def _compiled(backend: str) -> nn.Module:
    compiled: Any = torch.compile(seq(nn.Linear(32, 8), nn.ReLU(True), *end(8, 2)), backend=backend)
    return compiled


def _compiled_layer() -> nn.Module:
    layer = seq(nn.Linear(6, 5), nn.Tanh())
    layer.compile(backend="eager")
    return layer


def _view_then_in_place(model: Any, x: Tensor) -> Tensor:
    """Writes into a view of an activation, as code for padding and for caches does."""
    h = model.a(x).view(-1, 2, 4)
    h[:, 0].mul_(2.0)
    return model.last(h.flatten(1).relu_())


def _sums_in_place(model: Any, x: Tensor) -> Tensor:
    h = model.a(x)
    h += 0.5
    h = h.tanh()
    z = model.b(h)
    z += h
    z.masked_fill_(x[:, :8] > 0.7, 0.0).clamp_(-1, 1).mul_(2).sub_(0.25)
    z[:, 2] = x[:, 0]
    return model.last(z)


def _views(model: Any, x: Tensor) -> Tensor:
    left, right = model.a(x).tanh().chunk(2, 1)  # [n, 6] twice
    grid = left.unflatten(1, (3, 2)).transpose(1, 2)[:, :, ::2]  # [n, 2, 2]
    windows = right.unfold(1, 2, 4)  # [n, 2, 2]
    mixed = model.b(torch.stack([grid, windows], 1).movedim(1, 2)[..., 0, :])  # [n, 2, 3]
    return model.last(torch.cat([mixed.flatten(1), right.expand(2, -1, -1)[1], left[:, :2]], 1))


#: Activations that overwrite their input; of some, autograd keeps the result, of others what it was before.
_IN_PLACE: dict[str, Any] = {
    "elu": nn.ELU, "leaky relu": nn.LeakyReLU, "silu": nn.SiLU, "mish": nn.Mish, "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish, "selu": nn.SELU, "celu": nn.CELU, "relu 6": nn.ReLU6,
}  # fmt: skip

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
    exact("one weight in two layers", lambda: _tie(Call(
        lambda m, x: m.last(torch.cat([m.a(x).tanh(), m.b(x.flip(1)).sigmoid()], 1)),
        a=nn.Linear(32, 5), b=nn.Linear(32, 5), last=nn.Linear(10, 2),
    ))),
    exact("one filter there and back", lambda: _tie(Call(
        lambda m, x: m.last(m.b(m.a(x).tanh()).tanh().flatten(1)),
        a=nn.Conv2d(2, 3, 2), b=nn.ConvTranspose2d(3, 2, 2), last=nn.Linear(32, 1),
    )), normal(2, 4, 4)),
    exact("layer norm called twice", lambda: Call(
        lambda m, x: m.last(m.norm(m.mix(m.norm(x)).tanh()).flatten(1)),
        norm=nn.LayerNorm(8), mix=nn.Linear(8, 8), last=nn.Linear(32, 1),
    ), normal(4, 8)),
    exact("convolution's bias outside of its layer", lambda: Call(
        lambda m, x: m.last(((m.a(x) * m.a.bias.view(-1, 1, 1)).tanh() + m.a.weight.mean((1, 2, 3))[:, None, None])
                            .flatten(1)),
        a=nn.Conv2d(2, 3, 2), last=nn.Linear(27, 2),
    ), normal(2, 4, 4)),
    exact("frozen layer", _frozen_layer, None, "frozen layer"),
    exact("frozen layers", _frozen_layers),
    exact("frozen in several kinds of layers", _frozen_kinds, normal(2, 4, 4)),
    exact("unused layer", _Unused),
    exact("unused parameter", lambda: Call(
        lambda m, x: m.last(m.a(x).tanh()), idle=torch.randn(3, 4), a=nn.Linear(32, 5), last=nn.Linear(5, 2),
    )),
]  # fmt: skip

_GRAPHS: list[Case] = [
    exact("in-place relu", lambda: seq(
        nn.Linear(32, 8), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False), nn.ReLU(True), nn.Linear(8, 1))),
    *[
        exact(f"in-place {name}", lambda make=make: seq(nn.Linear(32, 8), make(inplace=True), *end(8, 2)))
        for name, make in _IN_PLACE.items()
    ],
    exact("in-place tanh, sigmoid and exp", lambda: Call(
        lambda m, x: m.last(m.b(m.a(x).tanh_()).sigmoid_() * m.c(x).exp_()),
        a=nn.Linear(32, 8), b=nn.Linear(8, 5), c=nn.Linear(32, 5), last=nn.Linear(5, 1),
    )),
    exact("in-place sums and masks", lambda: Call(_sums_in_place, a=nn.Linear(32, 8), b=nn.Linear(8, 8),
                                                  last=nn.Linear(8, 2))),
    exact("views", lambda: Call(_views, a=nn.Linear(32, 12), b=nn.Linear(2, 3), last=nn.Linear(14, 2))),
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
    exact("compiled", lambda: _compiled("eager")),
    exact("compiled, with autograd's graph", lambda: _compiled("aot_eager")),
    exact("compiled layer inside", lambda: Call(
        lambda m, x: m.last(m.inner(m.a(x).tanh())), a=nn.Linear(32, 6), inner=_compiled_layer(), last=nn.Linear(5, 1),
    )),
    exact("pending negation", lambda: Call(  # the imaginary part of a conjugate is a view that negates later
        lambda m, x: m.last(torch.complex(*m.first(x).tanh().split(1, 1)).conj().imag),
        first=nn.Linear(32, 2), last=nn.Linear(1, 1),
    )),
    exact("autocast inside of the forward, switched off", lambda: _autocast(enabled=False)),
    exact("dropout, eval", lambda: seq(nn.Linear(32, 8), nn.Dropout(), *end(8)).eval()),
    exact("in-place dropout, eval", lambda: seq(nn.Linear(32, 8), nn.Tanh(), nn.Dropout(inplace=True), *end(8)).eval()),
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
    Case("dropout of channels, training", lambda: seq(nn.Conv2d(2, 3, 2), nn.Dropout2d(), *end(27)), normal(2, 4, 4),
         refused=r"draws random numbers.*model\.eval\(\)"),
    Case("dropout inside of attention, training", lambda: Call(
        lambda m, x: m.last(m.layer(x).mean(1)),
        layer=nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True), last=nn.Linear(8, 1),
    ), normal(4, 8), refused=r"draws random numbers.*model\.eval\(\)"),
    Case("random slopes, training", lambda: seq(nn.Linear(32, 8), nn.RReLU(), *end(8)), normal(32),
         refused=r"draws random numbers.*model\.eval\(\)"),
    Case("autocast", lambda: seq(nn.Linear(32, 8), *end(8)), normal(32), refused=r"outside of torch\.autocast",
         context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    Case("autocast inside of the forward", _autocast, normal(32), refused=r"switch off torch\.autocast"),
    Case("half precision inside of the forward", lambda: Call(
        lambda m, x: m.last(m.a(x).half().tanh().to(x)), a=nn.Linear(32, 8), last=nn.Linear(8, 1),
    ), normal(32), refused="leave out the cast, inside of the forward"),
    Case("input changed after use", Mutated, normal(32), refused="use the out-of-place operation"),
    Case("reentrant checkpoint", lambda: Checkpointed(True), normal(32), refused="use_reentrant=False"),
    Case("table renormalised in place", lambda: seq(nn.Embedding(9, 4, max_norm=0.5), *end(24)), integers(9, 6),
         refused="max_norm"),
]  # fmt: skip

CASES: list[Case] = [*_SHARED, *_GRAPHS, *_CALLS, *_REFUSED]
