"""Every layer family: exact, and by the route that its rule promises."""

from __future__ import annotations

import copy
from collections.abc import Callable

import brute_force
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catapult_ext as cx

N = 6
FAST = {"gram", "tiles", "position grams"}


class Call(nn.Module):
    """A forward written as a function of the parameters of `parts`."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _map(*shape: int) -> nn.Module:
    return nn.Unflatten(1, shape)


def _end(width: int, outputs: int = 1) -> list[nn.Module]:
    return [nn.Tanh(), nn.Flatten(), nn.Linear(width, outputs)]


def _seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def _on_maps(
    layer: nn.Module, width: int, *, shape: tuple[int, ...] = (2, 4, 4), outputs: int = 1
) -> nn.Module:
    return _seq(_map(*shape), layer, *_end(width, outputs))


def _frozen() -> nn.Module:
    model = _seq(nn.Linear(32, 8), *_end(8))
    model[0].requires_grad_(False)
    return model


def _attention(outputs: int = 1) -> nn.Module:
    return Call(
        lambda m, x: m.last(m.attend(*[x.view(-1, 4, 8)] * 3, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(8, 2, batch_first=True),
        last=nn.Linear(8, outputs),
    )


def _tied() -> nn.Module:
    """Token table and output layer share their weight."""
    return Call(
        lambda m, x: F.linear(torch.tanh(m.table(_tokens(x))).mean(1), m.table.weight),
        table=nn.Embedding(5, 6),
    )


def _tokens(x: Tensor, size: int = 5) -> Tensor:
    return (x[:, :7].abs() * 7).long() % size


#: The layer matrix: rows that hook-based tools err on, or refuse.
MATRIX: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: _seq(nn.Linear(32, 8), *_end(8)),
    "linear, no bias": lambda: _seq(nn.Linear(32, 8, bias=False), *_end(8)),
    "linear, float64": lambda: _seq(nn.Linear(32, 8), *_end(8)).double(),
    "convolution": lambda: _on_maps(nn.Conv2d(2, 3, 3), 12),
    "convolution, stride": lambda: _on_maps(nn.Conv2d(2, 3, 2, stride=2), 12),
    "convolution, dilation": lambda: _on_maps(nn.Conv2d(2, 3, 2, stride=(1, 2), dilation=2, padding=1), 24),
    "frozen layer": _frozen,
    "linear on tokens": lambda: _seq(_map(4, 8), nn.Linear(8, 5), *_end(20)),
    "convolution, groups": lambda: _on_maps(nn.Conv2d(2, 4, 3, groups=2), 16),
    "convolution, circular": lambda: _on_maps(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 48),
    "convolution 1d": lambda: _on_maps(nn.Conv1d(4, 3, 3), 18, shape=(4, 8)),
    "transposed convolution": lambda: _on_maps(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), 300),
    "batch norm, eval": lambda: _seq(nn.Linear(32, 8), nn.BatchNorm1d(8), *_end(8)).eval(),
    "batch norm, training": lambda: _seq(nn.Linear(32, 8), nn.BatchNorm1d(8), *_end(8)),
    "layer norm": lambda: _seq(nn.Linear(32, 8), nn.LayerNorm(8), *_end(8)),
    "layer norm on tokens": lambda: _seq(_map(4, 8), nn.Linear(8, 5), nn.LayerNorm(5), *_end(20)),
    "rms norm": lambda: _seq(_map(4, 8), nn.Linear(8, 5), nn.RMSNorm(5), *_end(20)),
    "group norm": lambda: _on_maps(_seq(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), 16),
    "multihead attention": _attention,
    "embedding": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.table(_tokens(x))).flatten(1)),
        table=nn.Embedding(5, 3),
        last=nn.Linear(21, 1),
    ),
    "bare parameter": lambda: Call(
        lambda m, x: m.last(torch.tanh(x * m.gain + m.shift)),
        gain=torch.randn(32),
        shift=torch.randn(32),
        last=nn.Linear(32, 1),
    ),
    "tied weights": _tied,
    "three outputs": lambda: _seq(nn.Linear(32, 8), *_end(8, 3)),
}

#: More of each family.
MORE: dict[str, Callable[[], nn.Module]] = {
    "convolution, reflect": lambda: _on_maps(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 48),
    "convolution, replicate": lambda: _on_maps(nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), 48),
    "convolution, same": lambda: _on_maps(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), 48),
    "convolution, depthwise": lambda: _on_maps(nn.Conv2d(2, 6, 3, groups=2, padding=1), 96, outputs=2),
    "convolution 1d, groups": lambda: _on_maps(nn.Conv1d(4, 6, 3, groups=2, padding=2, stride=2), 30, shape=(4, 8)),
    "convolution 3d": lambda: _on_maps(nn.Conv3d(2, 3, 2, padding=(1, 0, 0)), 3 * 5 * 1 * 1, shape=(2, 4, 2, 2)),
    "convolution 3d, groups": lambda: _on_maps(
        nn.Conv3d(2, 4, 2, groups=2, dilation=(2, 1, 1)), 4 * 2, shape=(2, 4, 2, 2), outputs=3
    ),
    "transposed convolution 1d": lambda: _on_maps(
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2), 6 * 15, shape=(4, 8), outputs=2
    ),
    "transposed convolution 3d": lambda: _on_maps(
        nn.ConvTranspose3d(2, 3, 2, dilation=(1, 2, 1)), 3 * 5 * 4 * 3, shape=(2, 4, 2, 2)
    ),
    "convolution of several maps": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.conv(x.view(-1, 1, 4, 4))).reshape(len(x), -1)),
        conv=nn.Conv2d(1, 3, 3, groups=1), last=nn.Linear(24, 2),
    ),
    "convolution 1d of several maps": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.conv(x.view(-1, 2, 4))).reshape(len(x), -1)),
        conv=nn.Conv1d(2, 3, 2), last=nn.Linear(36, 2),
    ),
    "transposed convolution of several maps": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.conv(x.view(-1, 1, 4, 4))).reshape(len(x), -1)),
        conv=nn.ConvTranspose2d(1, 2, 2, stride=2), last=nn.Linear(256, 2),
    ),
    "layer norm over two dimensions": lambda: _seq(_map(2, 4, 4), nn.LayerNorm((4, 4)), *_end(32, 2)),
    "layer norm without bias": lambda: _seq(_map(4, 8), nn.LayerNorm(8, bias=False), *_end(32)),
    "layer norm, sequence first": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.norm(x.view(-1, 4, 8).transpose(0, 1).contiguous())).mean(0)),
        norm=nn.LayerNorm(8), last=nn.Linear(8, 3),
    ),
    "batch norm, eval, images": lambda: _on_maps(nn.BatchNorm2d(2), 32, outputs=3).eval(),
    "batch norm, eval, sequences": lambda: _on_maps(nn.BatchNorm1d(4), 32, shape=(4, 8)).eval(),
    "group norm on vectors": lambda: _seq(nn.GroupNorm(4, 32), *_end(32, 2)),
    "instance norm": lambda: _on_maps(nn.InstanceNorm2d(2, affine=True), 32, outputs=3),
    "instance norm 1d": lambda: _on_maps(nn.InstanceNorm1d(4, affine=True), 32, shape=(4, 8)),
    "rms norm, three outputs": lambda: _seq(_map(4, 8), nn.RMSNorm((4, 8)), *_end(32, 3)),
    "attention, three outputs": lambda: _attention(3),
    "scaled dot product attention": lambda: Call(
        lambda m, x: m.last(
            F.scaled_dot_product_attention(
                *m.qkv(x.view(-1, 4, 8)).view(-1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4), is_causal=True
            ).flatten(1)
        ),
        qkv=nn.Linear(8, 48), last=nn.Linear(64, 1),
    ),
    "transformer": lambda: Call(
        lambda m, x: m.last(m.layer(x.view(-1, 4, 8)).mean(1)),
        layer=nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), last=nn.Linear(8, 2),
    ),
    "embedding, three outputs": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.table(_tokens(x))).mean(1)),
        table=nn.Embedding(5, 3, padding_idx=2), last=nn.Linear(3, 3),
    ),
    "embedding, sequence first": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.table(_tokens(x).t())).mean(0)), table=nn.Embedding(5, 3), last=nn.Linear(3, 1)
    ),
    "class token and positions": lambda: Call(
        lambda m, x: m.last(torch.tanh(
            m.mix(torch.cat([m.token.expand(len(x), -1, -1), x.view(-1, 4, 8)], 1) + m.position).mean(1)
        )),
        token=torch.randn(1, 1, 8), position=torch.randn(5, 8), mix=nn.Linear(8, 6), last=nn.Linear(6, 2),
    ),
    "positions, sequence first": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x.view(-1, 4, 8).transpose(0, 1) - 0.5 * m.position)).mean(0)),
        position=torch.randn(4, 1, 8), mix=nn.Linear(8, 6), last=nn.Linear(6, 1),
    ),
    "repeated parameter": lambda: Call(
        lambda m, x: m.last(torch.tanh(torch.cat([m.token.repeat(len(x), 2), x], 1))),
        token=torch.randn(1, 3), last=nn.Linear(38, 2),
    ),
    "layer scale": lambda: Call(
        lambda m, x: m.last((x.view(-1, 4, 8) + m.gain * torch.tanh(m.mix(x.view(-1, 4, 8)))).flatten(1)),
        gain=torch.randn(8), mix=nn.Linear(8, 8), last=nn.Linear(32, 1),
    ),
    "temperatures": lambda: Call(
        lambda m, x: m.last(torch.tanh((m.mix(x) / m.t) + m.s / (2 + x.square().mean(1, keepdim=True)) - m.c)),
        t=torch.tensor([1.5]), s=torch.tensor(0.7), c=torch.randn(1, 6), mix=nn.Linear(32, 6), last=nn.Linear(6, 3),
    ),
    "parameter used twice": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x * m.gain)) * m.gain[:0].sum() + torch.tanh(x * m.gain + m.gain)),
        gain=torch.randn(32), mix=nn.Linear(32, 32), last=nn.Linear(32, 1),
    ),
    "matrix added transposed": lambda: Call(
        lambda m, x: m.last(torch.tanh(x.view(-1, 4, 8) + m.position.t()).flatten(1)),
        position=torch.randn(8, 4), last=nn.Linear(32, 2),
    ),
}  # fmt: skip

#: What a layer is given is computed from parameters: slices, masks, normalised or low-rank weights.
COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: _seq(nn.utils.parametrizations.weight_norm(nn.Linear(32, 6)), *_end(6, 2)),
    "weight norm of a convolution": lambda: _on_maps(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), 12),
    "pruned": lambda: _frozen_part(Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.w * m.frozen))),
        w=torch.randn(6, 32), frozen=(torch.rand(6, 32) > 0.5).float(), last=nn.Linear(6, 1),
    )),
    "low rank": lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.a @ m.b, m.bias))),
        a=torch.randn(6, 2), b=torch.randn(2, 32), bias=torch.randn(6), last=nn.Linear(6, 2),
    ),
    "low rank beside a frozen weight": lambda: _frozen_part(Call(
        lambda m, x: m.last(torch.tanh(F.linear(x.view(-1, 4, 8), m.frozen + 0.5 * (m.a @ m.b)))).mean(1),
        frozen=torch.randn(6, 8), a=torch.randn(6, 2), b=torch.randn(2, 8), last=nn.Linear(6, 2),
    )),
    "sliced positions": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x.view(-1, 4, 8) + m.position[:, 1:5])).flatten(1)),
        position=torch.randn(1, 9, 8), mix=nn.Linear(8, 5), last=nn.Linear(20, 2),
    ),
    "viewed scale": lambda: Call(
        lambda m, x: m.last(
            torch.tanh(x.view(-1, 2, 4, 4) * m.scale[:, None, None] + m.shift.view(1, -1, 1, 1)).flatten(1)
        ),
        scale=torch.randn(2), shift=torch.randn(2), last=nn.Linear(32, 2),
    ),
    "logarithmic scale": lambda: Call(
        lambda m, x: m.last(torch.tanh(m.mix(x) * m.log_scale.exp() / (1 + F.softplus(m.other)))),
        log_scale=torch.randn(()), other=torch.randn(6), mix=nn.Linear(32, 6), last=nn.Linear(6, 1),
    ),
    "cross attention": lambda: Call(
        lambda m, x: m.last(m.attend(x[:, None, :8], *[x.view(-1, 4, 8)] * 2, need_weights=False)[0].squeeze(1)),
        attend=nn.MultiheadAttention(8, 2, batch_first=True), last=nn.Linear(8, 2),
    ),
    "chunks of one weight": lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.w.chunk(2)[0])) * torch.sigmoid(F.linear(x, m.w.chunk(2)[1]))),
        w=torch.randn(12, 32), last=nn.Linear(6, 3),
    ),
    "two ways to one weight": lambda: Call(
        lambda m, x: m.last(torch.tanh(F.linear(x, m.w / m.w.norm() + m.w.tanh()) + m.w[:, 0])),
        w=torch.randn(6, 32), last=nn.Linear(6, 1),
    ),
    "class token of two factors": lambda: Call(
        lambda m, x: m.last(torch.tanh(torch.cat([(m.a * m.b).expand(len(x), 3), x], 1))),
        a=torch.randn(1, 3), b=torch.randn(1, 3), last=nn.Linear(35, 1),
    ),
}  # fmt: skip


def _frozen_part(model: nn.Module) -> nn.Module:
    model.frozen.requires_grad_(False)
    return model


#: Exact, but without a rule of their own.
SLOW = {"batch norm, training": {"rows"}}


#: Few positions of wide layers, for which Gram matrices of the positions are cheaper; the parameter that takes them.
WIDE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "linear": ("1.weight", lambda: _seq(_map(2, 16), nn.Linear(16, 256), *_end(512, 2))),
    "attention": (
        "attend.in_proj_weight",
        lambda: Call(
            lambda m, x: m.last(m.attend(*[m.mix(x.view(-1, 2, 16))] * 3, need_weights=False)[0].mean(1)),
            mix=nn.Linear(16, 64), attend=nn.MultiheadAttention(64, 2, batch_first=True), last=nn.Linear(64, 1),
        ),
    ),
    "convolution": ("1.weight", lambda: _on_maps(nn.Conv2d(8, 16, 2), 16, shape=(8, 2, 2), outputs=3)),
    "convolution 1d": ("1.weight", lambda: _on_maps(nn.Conv1d(8, 96, 3, stride=2, padding=1), 192, shape=(8, 4))),
    "transposed convolution": (
        "1.weight", lambda: _on_maps(nn.ConvTranspose2d(32, 16, 2), 64, shape=(32, 1, 1), outputs=3)
    ),
    "embedding": (
        "table.weight",
        lambda: Call(
            lambda m, x: m.last(torch.tanh(m.table((x[:, :2].abs() * 1e4).long() % 999)).flatten(1)),
            table=nn.Embedding(999, 40, padding_idx=3), last=nn.Linear(80, 2),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_the_cheaper_of_two_exact_routes(name: str) -> None:
    torch.manual_seed(5)
    parameter, make = WIDE[name]
    model = make().double()
    x = torch.randn(21, 32, dtype=torch.float64)
    x[3] = x[8]  # tokens in common
    rows = brute_force.jacobian(model, x)
    expected = brute_force.kernel_of(rows)
    y = torch.randn(21, len(expected) // 21, dtype=torch.float64)
    observation = cx.observe(model, x, y)
    routes = {row.name: row.route for row in observation.layer_report}
    assert routes[parameter] == "position grams"
    assert brute_force.relative(observation.kernel, expected) <= 1e-10
    assert torch.equal(observation.kernel, observation.kernel.T)
    weights = (2 / y.numel() * observation.residual).reshape(-1)
    gradient = torch.einsum("n,n...->...", weights, rows[parameter])
    assert brute_force.relative(observation.gradients()[parameter], gradient) <= 1e-10
    # Several blocks, and none where memory is short.
    seen = set()
    with pytest.raises(ValueError, match="too small") as caught:
        cx.ntk(model, x, max_bytes=1)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    for extra in (0, 30_000, 300_000):
        bounded = cx.observe(model, x, y, max_bytes=smallest + extra)
        assert brute_force.relative(bounded.kernel, expected) <= 1e-10
        seen |= {row.route for row in bounded.layer_report if row.name == parameter}
    assert seen <= {"tiles", "position grams"}


def _make(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    model = {**MATRIX, **MORE, **COMPUTED}[name]()
    for p in model.parameters():
        if p.dim() == 1:  # gains of one and shifts of zero would hide mistakes
            nn.init.normal_(p, 0.5)
    return model.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", [*MATRIX, *MORE, *COMPUTED])
def test_exact_and_fast(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = _make(name, dtype)
    generator = torch.Generator().manual_seed(8)
    x, z = (torch.randn(n, 32, dtype=dtype, generator=generator) for n in (N, 4))
    exact = copy.deepcopy(model).double()
    rows, columns = brute_force.jacobian(exact, x.double()), brute_force.jacobian(exact, z.double())
    expected = brute_force.kernel_of(rows)
    c = len(expected) // N
    y = torch.randn(N, c, dtype=dtype, generator=generator)

    observation = cx.observe(model, x, y)

    diagonal = expected.diagonal().sqrt()
    error = ((observation.kernel.double() - expected).abs() / torch.outer(diagonal, diagonal)).max()
    assert float(error) <= tolerance
    weights = (2 / (N * c) * (exact(x.double()).detach().view(N, c) - y.double())).reshape(-1)
    references = {p: torch.einsum("n,n...->...", weights, r) for p, r in rows.items()}
    largest = max(float(r.norm()) for r in references.values())
    for p, gradient in observation.gradients().items():
        assert float((gradient.double() - references[p]).norm()) <= tolerance * largest, p
    if dtype == torch.float64 and name != "batch norm, training":
        cross = sum(brute_force.flat_rows(rows[p]) @ brute_force.flat_rows(columns[p]).T for p in rows)
        assert brute_force.relative(cx.ntk(model, x, z), cross) <= tolerance
        assert brute_force.relative(cx.ntk(model, x, max_bytes=1 << 20), expected) <= tolerance
    assert {row.route for row in observation.layer_report} - FAST <= SLOW.get(name, set())
