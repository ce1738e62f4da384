"""Matrix products on vectors, tokens and arrays of higher rank."""

from __future__ import annotations

import torch
from torch import nn

from python_experiments.coverage.cases.build import Call, Case, end, exact, normal, seq

__all__ = ["CASES"]

CASES: list[Case] = [
    exact("linear", lambda: seq(nn.Linear(32, 8), *end(8)), None, "Linear", "float64"),
    exact("linear, no bias", lambda: seq(nn.Linear(32, 8, bias=False), *end(8)), None, "no bias"),
    exact("three outputs", lambda: seq(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8), *end(8, 3)), None, "k = 3"),
    exact("linear on tokens", lambda: seq(nn.Linear(8, 5), *end(20)), normal(4, 8), "Linear on tokens"),
    exact("linear on tokens, three outputs", lambda: seq(nn.Linear(8, 5), *end(20, 3)), normal(4, 8)),
    exact("linear on grids", lambda: seq(nn.Linear(4, 3), *end(24, 2)), normal(2, 4, 4)),
    exact("linear on grids, channels last", lambda: Call(
        lambda m, x: m.last(m.mix(x.movedim(1, -1)).tanh().flatten(1)), mix=nn.Linear(2, 3), last=nn.Linear(48, 1),
    ), normal(2, 4, 4)),
    exact("linear on volumes", lambda: seq(nn.Linear(3, 5, bias=False), *end(40)), normal(2, 2, 2, 3)),
    exact("linear in the products of einsum", lambda: Call(
        lambda m, x: m.last(torch.einsum("ntd,hd->nht", x, m.w).tanh().flatten(1)),
        w=torch.randn(5, 8), last=nn.Linear(20, 2),
    ), normal(4, 8), slow=("node calls",)),
    exact("one matrix for each head", lambda: Call(
        lambda m, x: m.last(torch.einsum("nhd,hde->nhe", x, m.w).tanh().flatten(1)),
        w=torch.randn(4, 8, 3), last=nn.Linear(12, 1),
    ), normal(4, 8), slow=("node calls",)),
    exact("bilinear", lambda: Call(
        lambda m, x: m.last(m.mix(x[:, :12], x[:, 12:]).tanh()), mix=nn.Bilinear(12, 20, 5), last=nn.Linear(5, 2),
    ), slow=("node calls",)),
]  # fmt: skip
