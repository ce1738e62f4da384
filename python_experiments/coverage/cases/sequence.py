"""Attention, recurrent layers and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_experiments.coverage.cases.build import Call, Case, end, exact, integers, normal, parts, seq

__all__ = ["CASES", "Embedded"]

_TOKENS = normal(4, 8)
_FUSED = ("rows",)  # in float32 on a CPU, PyTorch runs the whole layer as one operation


def _attention(outputs: int = 1, mode: str = "self", **options: Any) -> nn.Module:
    """`nn.MultiheadAttention` on four tokens; inside it holds token-major rows, whatever `batch_first` says."""
    first = bool(options.setdefault("batch_first", True))
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    call: dict[str, Any] = {"need_weights": mode == "weights"}

    def forward(model: Any, x: Tensor) -> Tensor:
        z = x if first else x.transpose(0, 1)
        if mode == "cross":
            query = z[:, :1] if first else z[:1]
            return model.last(model.attend(query, z, z, **call)[0].flatten(1) if first
                              else model.attend(query, z, z, **call)[0].squeeze(0))  # fmt: skip
        if mode == "masked":
            call.update(attn_mask=causal, is_causal=True)
        if mode == "padded":
            call.update(key_padding_mask=torch.tensor([False, False, False, True]).expand(len(x), -1))
        out, weights = model.attend(z, z, z, **call)
        out = out.mean(1 if first else 0)
        return model.last(out if weights is None else torch.cat([out, weights.flatten(1)], 1))

    last = nn.Linear(24 if mode == "weights" else 8, outputs)
    return Call(forward, attend=nn.MultiheadAttention(8, 2, **options), last=last)


def _dot_product(**options: Any) -> nn.Module:
    return Call(
        lambda m, x: m.last(
            F.scaled_dot_product_attention(*m.qkv(x).view(-1, 4, 3, 2, 8).permute(2, 0, 3, 1, 4), **options).flatten(1)
        ),
        qkv=nn.Linear(8, 48), last=nn.Linear(64, 1),
    )  # fmt: skip


def _recurrent(kind: Callable[..., nn.RNNBase], **options: Any) -> nn.Module:
    layer = kind(8, 5, batch_first=True, **options)
    return Call(
        lambda m, x: m.last(m.layer(x)[0][:, -1]),
        layer=layer,
        last=nn.Linear(10 if layer.bidirectional else 5, 1),
    )


class Embedded(nn.Module):
    """Tokens derived from the input, which is [n, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.last = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        tokens = (x[:, :7].abs() * 10).long() % 11
        return self.last(torch.tanh(self.a(self.table(tokens))).mean(1))


CASES: list[Case] = [
    exact("attention, batch first", _attention, _TOKENS, "MultiheadAttention"),
    exact("attention, sequence first", lambda: _attention(batch_first=False), _TOKENS),
    exact("attention, eval", lambda: _attention().eval(), _TOKENS),
    exact("attention, three outputs", lambda: _attention(3), _TOKENS),
    exact("attention, weights returned", lambda: _attention(2, "weights"), _TOKENS),
    exact("attention, causal mask", lambda: _attention(2, "masked"), _TOKENS),
    exact("attention, padding mask", lambda: _attention(2, "padded", batch_first=False), _TOKENS),
    exact("attention, bias of keys", lambda: _attention(2, add_bias_kv=True, add_zero_attn=True), _TOKENS),
    exact("attention, no bias", lambda: _attention(1, bias=False), _TOKENS),
    exact("attention across", lambda: _attention(2, "cross"), _TOKENS),
    exact("attention across, sequence first", lambda: _attention(2, "cross", batch_first=False), _TOKENS),
    exact("attention, own widths of keys and values", lambda: Call(
        lambda m, x, keys, values: m.last(m.attend(x, keys, values, need_weights=False)[0].flatten(1)),
        attend=nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True), last=nn.Linear(32, 2),
    ), parts(_TOKENS, normal(3, 5), normal(3, 3))),
    exact("scaled dot product attention", lambda: _dot_product(is_causal=True), _TOKENS),
    exact("scaled dot product attention, mask and scale", lambda: _dot_product(
        attn_mask=torch.ones(4, 4, dtype=torch.bool).tril(), scale=0.3), _TOKENS),
    exact("scaled dot product attention, added mask, fewer keys", lambda: Call(
        lambda m, x: m.last(F.scaled_dot_product_attention(
            m.q(x).view(-1, 4, 4, 2).transpose(1, 2), m.k(x).view(-1, 4, 2, 2).transpose(1, 2),
            m.v(x).view(-1, 4, 2, 2).transpose(1, 2), attn_mask=torch.linspace(-1, 1, 16).view(4, 4).to(x),
            enable_gqa=True,
        ).flatten(1)),
        q=nn.Linear(8, 8), k=nn.Linear(8, 4, bias=False), v=nn.Linear(8, 4), last=nn.Linear(32, 2),
    ), _TOKENS),
    exact("scaled dot product attention, learned mask", lambda: Call(
        lambda m, x: m.last(F.scaled_dot_product_attention(x, m.key(x), x, attn_mask=m.bias).flatten(1)),
        key=nn.Linear(8, 8, bias=False), bias=torch.randn(4, 4), last=nn.Linear(32, 1),
    ), _TOKENS),
    exact("layers of their own for queries, keys and values", lambda: Call(  # the keys' bias has a gradient of zero
        lambda m, x: m.last(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)).flatten(1)),
        q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8), last=nn.Linear(32, 2),
    ), _TOKENS),
    exact("transformer", lambda: Call(
        lambda m, x: m.last(m.layer(x).mean(1)),
        layer=nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), last=nn.Linear(8, 2),
    ), _TOKENS),
    exact("transformer decoder, norm first", lambda: Call(
        lambda m, x: m.last(m.layer(x[:, :3], x).flatten(1)),
        layer=nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True), last=nn.Linear(24, 1),
    ), _TOKENS),
    exact("lstm", lambda: _recurrent(nn.LSTM), _TOKENS, slow=_FUSED),
    exact("lstm, two layers, both directions", lambda: _recurrent(nn.LSTM, num_layers=2, bidirectional=True), _TOKENS,
          slow=_FUSED),
    exact("gru", lambda: _recurrent(nn.GRU), _TOKENS),
    exact("rnn", lambda: _recurrent(nn.RNN), _TOKENS),
    exact("embedding", Embedded, None, "Embedding"),
    exact("embedding of integers", lambda: seq(nn.Embedding(9, 4), *end(24, 2)), integers(9, 6)),
    exact("embedding, three outputs", lambda: Call(
        lambda m, x: m.last(m.table(x).tanh().mean(1)), table=nn.Embedding(5, 3), last=nn.Linear(3, 3),
    ), integers(5, 7)),
    exact("embedding, padding", lambda: seq(nn.Embedding(5, 3, padding_idx=2), *end(21)), integers(5, 7)),
    exact("embedding, sequence first", lambda: Call(
        lambda m, x: m.last(m.table(x.t()).tanh().mean(0)), table=nn.Embedding(5, 3), last=nn.Linear(3, 1),
    ), integers(5, 7)),
    exact("embedding bag, mean", lambda: seq(nn.EmbeddingBag(9, 5), *end(5, 2)), integers(9, 6)),
    exact("embedding bag, sum, padding", lambda: seq(nn.EmbeddingBag(9, 5, mode="sum", padding_idx=1), *end(5)),
          integers(9, 6)),
    exact("embedding bag, max", lambda: seq(nn.EmbeddingBag(9, 5, mode="max"), *end(5)), integers(9, 6),
          slow=("node calls",)),
    exact("embedding bag, weighted", lambda: Call(
        lambda m, x, weights: m.last(m.table(x, per_sample_weights=weights).tanh()),
        table=nn.EmbeddingBag(9, 5, mode="sum"), last=nn.Linear(5, 3),
    ), parts(integers(9, 6), normal(6))),
    exact("embedding bags, several per sample", lambda: Call(
        lambda m, x: m.last(m.table(x.view(-1, 3)).view(len(x), -1).tanh()),
        table=nn.EmbeddingBag(9, 5, padding_idx=0), last=nn.Linear(10, 1),
    ), integers(9, 6)),
    exact("positions from a table", lambda: Call(
        lambda m, x: m.last((m.words(x) + m.places(torch.arange(6))).tanh().flatten(1)),
        words=nn.Embedding(9, 4), places=nn.Embedding(7, 4), last=nn.Linear(24, 2),
    ), integers(9, 6)),
    exact("relative positions", lambda: Call(  # one bias for each distance of two tokens
        lambda m, x: m.last(
            (m.scores(x) + m.bias[(torch.arange(4)[:, None] - torch.arange(4)).abs()]).softmax(-1).flatten(1)
        ),
        scores=nn.Linear(8, 4), bias=torch.randn(4), last=nn.Linear(16, 1),
    ), _TOKENS),
    exact("positions from a layer", lambda: Call(
        lambda m, x: m.last((x + m.places(torch.linspace(0, 1, 4).to(x)[:, None])).tanh().flatten(1)),
        places=seq(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 8)), last=nn.Linear(32, 2),
    ), _TOKENS, slow=("rows",)),
    exact("samples in the columns of a table", lambda: Call(
        lambda m, x: m.last(m.table(torch.arange(5))[:, : len(x)].t() * x), table=nn.Embedding(5, 7),
        last=nn.Linear(5, 1),
    ), normal(5), coupled=True),
]  # fmt: skip
