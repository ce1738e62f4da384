"""Every case of the catalogue: exact, or refused with a remedy; and the cheaper of two exact routes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import brute_force
import pytest
import torch
from torch import nn

import catapult_ext as cx
from python_experiments.coverage import ours
from python_experiments.coverage.cases import CASES
from python_experiments.coverage.cases.build import Call, end, seq

#: Rows of the comparison of tools that is published with them, on each of which some tool errs.
ROWS = {
    "Linear", "no bias", "float64", "convolution", "stride", "stride and dilation", "frozen layer", "Linear on tokens",
    "groups", "circular padding", "Conv1d", "ConvTranspose2d", "BatchNorm eval", "BatchNorm training", "LayerNorm",
    "LayerNorm on tokens", "RMSNorm", "GroupNorm", "MultiheadAttention", "Embedding", "bare Parameter", "tied weights",
    "k = 3",
}  # fmt: skip

_reference = cache(ours.reference)


def test_the_catalogue_has_every_row_of_the_comparison() -> None:
    named = [row for case in CASES.values() for row in case.matrix]
    assert len(named) == len(set(named)) == 23
    assert set(named) == ROWS


@pytest.mark.parametrize("dtype", ours.TOLERANCES, ids=["f64", "f32"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_exact_and_fast(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    found = ours.measure(case, dtype, _reference(case))
    assert found.errors.keys() == {"kernel", "gradient", "jacobian", "step"} | (
        set() if case.coupled else {"cross kernel"}
    )
    for what, error in found.errors.items():
        assert error <= ours.TOLERANCES[dtype], what
    assert found.routes.keys() == _reference(case).rows.keys()
    assert set(found.routes.values()) - ours.FAST <= case.slow


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_refused_with_a_remedy(name: str) -> None:
    case = CASES[name]
    model, x = case.model(torch.float64), case.samples(5, 1, torch.float64)
    for call in (cx.ntk, lambda m, x: cx.observe(m, x, torch.zeros(5, 1, dtype=torch.float64))):
        with pytest.raises(cx.UnsupportedModule, match=case.refused), case.context():
            call(model, x)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.slow])
def test_what_is_said_to_be_slow_is(name: str) -> None:
    case = CASES[name]
    routes = {
        r for dtype in ours.TOLERANCES for r in ours.measure(case, dtype, _reference(case)).routes.values()
    }
    assert case.slow <= routes


#: Few positions of wide layers, for which Gram matrices of the positions are cheaper; the parameter that takes them.
WIDE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "linear": ("1.weight", lambda: seq(nn.Unflatten(1, (2, 16)), nn.Linear(16, 256), *end(512, 2))),
    "attention": (
        "attend.in_proj_weight",
        lambda: Call(
            lambda m, x: m.last(m.attend(*[m.mix(x.view(-1, 2, 16))] * 3, need_weights=False)[0].mean(1)),
            mix=nn.Linear(16, 64), attend=nn.MultiheadAttention(64, 2, batch_first=True), last=nn.Linear(64, 1),
        ),
    ),
    "convolution": ("1.weight", lambda: seq(nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 16, 2), *end(16, 3))),
    "convolution 1d": (
        "1.weight", lambda: seq(nn.Unflatten(1, (8, 4)), nn.Conv1d(8, 96, 3, stride=2, padding=1), *end(192))
    ),
    "transposed convolution": (
        "1.weight", lambda: seq(nn.Unflatten(1, (32, 1, 1)), nn.ConvTranspose2d(32, 16, 2), *end(64, 3))
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
        cx.observe(model, x, y, max_bytes=1)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    for extra in (0, 30_000, 300_000):
        bounded = cx.observe(model, x, y, max_bytes=smallest + extra)
        assert brute_force.relative(bounded.kernel, expected) <= 1e-10
        seen |= {row.route for row in bounded.layer_report if row.name == parameter}
    assert seen <= {"tiles", "position grams"}
