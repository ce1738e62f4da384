"""Wrong rules, wrong row maps and changing networks must be caught; a check with cotangents of one would pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import brute_force
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.graph import nodes
from catapult_ext.graph.certify import RowMap, distinct_scales, find_row_map
from catapult_ext.rules import RULES, convolution, linear


def _data(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return (
        torch.randn(n, 32, dtype=torch.float64, generator=generator),
        torch.randn(n, 1, dtype=torch.float64, generator=generator),
    )


def _routes(observation: cx.Observation) -> dict[str, str]:
    return {row.name: row.route for row in observation.layer_report}


@pytest.mark.parametrize(
    "sabotage", ["factor of the product", "features of another row", "sample-major reading", "missing use"]
)
def test_a_wrong_rule_is_caught_and_the_result_stays_exact(
    sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"sample-major reading": "attention, batch first", "missing use": "module called twice"}.get(
        sabotage, "in-place relu"
    )
    model = make(name, 1)
    x, y = _data()
    expected = brute_force.kernel_of(brute_force.jacobian(model, x))
    if sabotage == "factor of the product":
        monkeypatch.setattr(nodes, "linear_scale", lambda node, role: 1.001)
    elif sabotage == "features of another row":
        original = linear.features
        monkeypatch.setattr(linear, "features", lambda node, argument: original(node, argument).roll(1, 0))
    elif sabotage == "sample-major reading":
        monkeypatch.setattr(RowMap, "to_rows", lambda self, s: s.repeat_interleave(self.positions))
        monkeypatch.setattr(RowMap, "by_sample", lambda self, t: t.unflatten(0, (self.n, self.positions)))
    else:
        from catapult_ext.graph import plan as plan_module

        whole = plan_module._Builder._uses
        monkeypatch.setattr(
            plan_module._Builder,
            "_uses",
            lambda self, *arguments, **options: (
                whole(self, *arguments, **options)[0][:1],
                whole(self, *arguments, **options)[1],
            ),
        )
    observation = cx.observe(model, x, y)
    assert "rows" in _routes(observation).values(), "nothing was sent to the exact fallback"
    if sabotage != "factor of the product":  # with the factor wrong, biases and weights all fall back
        assert observation.kernel.shape == expected.shape
    assert brute_force.relative(observation.kernel, expected) <= 1e-10


def _networks_of_rules() -> dict[str, nn.Module]:
    """For each rule a network with a parameter that goes through it."""
    torch.manual_seed(3)
    tokens = nn.Unflatten(1, (4, 8))
    return {
        "linear": nn.Sequential(tokens, nn.Linear(8, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 1)),
        "convolution": nn.Sequential(tokens, nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(21, 1)),
        "norm": nn.Sequential(tokens, nn.LayerNorm(8), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1)),
        "elementwise": make("bare parameters", 3),
        "embedding": make("embedding", 3),
    }


_RULES = {rule.__name__.rsplit(".", 1)[1]: rule for rule in RULES}


@pytest.mark.parametrize(
    ("name", "part"),
    [(n, p) for n, rule in _RULES.items() for p in ("gradient", "jacobian", "features") if hasattr(rule, p)],
)
def test_a_sabotaged_rule_is_caught(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule = _networks_of_rules()[name].double(), _RULES[name]
    original = getattr(rule, part)

    def wrong(*arguments: object) -> object:
        found = original(*arguments)
        if part != "features":
            return found * 1.001
        if isinstance(found, tuple):
            return (found[0] * 1.001, *found[1:])
        return found.roll(1, 0) if found.dim() else found * 1.001

    monkeypatch.setattr(rule, part, wrong)
    x, y = _data()
    observation = cx.observe(model, x, y)
    assert "rows" in _routes(observation).values(), "nothing was sent to the exact fallback"
    expected = brute_force.kernel_of(brute_force.jacobian(model, x))
    assert brute_force.relative(observation.kernel, expected) <= 1e-10


class _Cancelling(nn.Module):
    """Layers whose biases have a gradient that is zero but for rounding, up to a `leak` of what is summed.

    A softmax over keys does not change when all of them are shifted alike, nor does an instance norm with its maps; the
    biases' gradients are sums over tokens or pixels that cancel, sample by sample.
    """

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.leak = leak
        self.query, self.key, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(32, 1)
        self.filters, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.InstanceNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = x.view(-1, 4, 8)
        keys, maps = self.key(z), self.filters(z)
        weights = (self.query(z) @ keys.transpose(1, 2)).softmax(2)
        h = weights @ z + self.norm(maps) + self.leak * torch.sin(keys + maps)
        return self.last(torch.tanh(h).flatten(1))


_CANCELLING = ("key.bias", "filters.bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 6, 50])
def test_a_gradient_that_cancels_to_rounding_is_certified(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = _Cancelling(0.0).double()
    x = torch.randn(n, 32, dtype=torch.float64)
    rows = brute_force.jacobian(model, x)
    for name in _CANCELLING:
        assert float(rows[name].norm()) <= 1e-14 * float(rows["last.weight"].norm())
    observation = cx.observe(copy.deepcopy(model).to(dtype), x.to(dtype), torch.zeros(n, 1, dtype=dtype))
    assert "rows" not in _routes(observation).values()
    error = brute_force.relative(observation.kernel.double(), brute_force.kernel_of(rows))
    assert error <= (1e-12 if dtype == torch.float64 else 1e-5)


_Gradient = Callable[..., Tensor]


def _wrong(fault: str, rule: _Gradient) -> _Gradient:
    """A rule's `gradient` with a fault."""
    of_factor = {"sign": -1.0, "factor 2": 2.0, "1 percent": 1.01}

    def gradient(data: Any, use: Any, factor: float, weights: Tensor, parameter: Tensor) -> Tensor:
        if fault == "missing sample":
            weights = torch.cat([torch.zeros_like(weights[:1]), weights[1:]])
        elif fault == "other samples":
            weights = weights.roll(1, 0)
        return rule(data, use, factor * of_factor.get(fault, 1.0), weights, parameter)

    return gradient


@pytest.mark.parametrize("leak", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fault", ["sign", "factor 2", "1 percent", "missing sample", "other samples"])
def test_a_wrong_gradient_that_nearly_cancels_is_caught(
    fault: str, dtype: torch.dtype, leak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth of what is summed is left, and of every parameter whatever is wrong with it is noticed."""
    torch.manual_seed(4)
    model, n = _Cancelling(leak).to(dtype), 50
    for rule in (linear, convolution):
        monkeypatch.setattr(rule, "gradient", _wrong(fault, rule.gradient))
    routes = _routes(cx.observe(model, torch.randn(n, 32).to(dtype), torch.zeros(n, 1, dtype=dtype)))
    if fault == "other samples":  # a sum of weights, whose order does not matter
        del routes["last.bias"]
    assert set(routes.values()) == {"rows"}, routes


def test_a_missing_use_of_a_bias_that_cancels_elsewhere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from catapult_ext.graph import plan as plan_module

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = x.view(-1, 4, 8)
            weights = (self.query(z) @ self.key(z).transpose(1, 2)).softmax(2)
            values = F.linear(z.tanh(), self.key.weight, self.key.bias)
            return self.last(torch.cat([weights @ z, torch.tanh(values)], 2).flatten(1))

    torch.manual_seed(4)
    model, (x, y) = Tied().double(), _data()
    rows = brute_force.jacobian(model, x)
    assert _routes(cx.observe(model, x, y))["key.bias"] == "tiles"
    whole, routes = plan_module._Builder._uses, []
    for kept in (
        slice(0, 1),
        slice(1, 2),
    ):  # the use in which the bias cancels, which is as good as none, or the other

        def some(self: Any, *arguments: Any, kept: slice = kept, **options: Any) -> Any:
            uses, problem = whole(self, *arguments, **options)
            return (uses[kept] if len(uses) > 1 else uses), problem

        monkeypatch.setattr(plan_module._Builder, "_uses", some)
        observation = cx.observe(model, x, y)
        assert _routes(observation)["key.weight"] == "rows"
        routes.append(_routes(observation)["key.bias"])
        assert brute_force.relative(observation.kernel, brute_force.kernel_of(rows)) <= 1e-10
    assert sorted(routes) == ["gram", "rows"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_cancel_to_rounding_have_a_map(dtype: torch.dtype) -> None:
    """The gain of an instance norm has one number for each map and sample, a sum over its pixels that may cancel."""
    torch.manual_seed(2)
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1)]
    for _ in range(4):
        layers += [nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    model, n = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 1)), 64
    x = torch.randn(n, 1, 16, 16, dtype=torch.float64)
    rows = brute_force.jacobian(copy.deepcopy(model).double(), x)
    observation = cx.observe(model.to(dtype), x.to(dtype), torch.zeros(n, 1, dtype=dtype))
    assert set(_routes(observation).values()) <= {"gram", "tiles", "position grams"}
    error = brute_force.relative(observation.kernel.double(), brute_force.kernel_of(rows))
    assert error <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_samples_side_by_side_in_the_channels_of_a_norm() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.shift, self.last = (
                nn.Parameter(torch.randn(4)),
                nn.Parameter(torch.randn(4)),
                nn.Linear(32, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            gain, shift = (torch.cat([each] * len(x)) for each in (self.gain, self.shift))
            z = F.batch_norm(x.view(1, -1, 8), None, None, gain, shift, training=True)
            return self.last(torch.tanh(z).view(-1, 32))

    torch.manual_seed(3)
    model, (x, y) = Channels().double(), _data()
    observation = cx.observe(model, x, y)
    assert _routes(observation)["gain"] == _routes(observation)["shift"] == "rows"
    expected = brute_force.kernel_of(brute_force.jacobian(model, x))
    assert brute_force.relative(observation.kernel, expected) <= 1e-10


class _Drifting(nn.Module):
    """Couples its samples from a given call on, without a change of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(32, 8), nn.Linear(8, 1)
        self.strength = 0.0

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.last(torch.tanh(z - self.strength * z.mean(0)))


def test_a_network_that_begins_to_couple_its_samples_is_caught() -> None:
    x, y = _data()
    always = cx.Observer(model := _Drifting().double(), verify="always")
    always(x, y)
    model.strength = 0.5
    with pytest.raises(
        cx.UnsupportedModule, match=r"a\.weight was certified.*mix samples.*verify=\"always\""
    ):
        always(x, y)
    model = _Drifting().double()
    first = cx.Observer(model)
    first(x, y)
    model.strength = 0.5
    with pytest.raises(cx.UnsupportedModule, match="was certified"):
        first(x, y)  # use number 2: the plan is certified again each time its uses double


def test_when_a_plan_is_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    from catapult_ext.observe.sweep import Sweep

    calls = []
    original = Sweep._certify
    monkeypatch.setattr(Sweep, "_certify", lambda self, *a: (calls.append(1), original(self, *a))[1])
    x, y = _data()
    for verify, expected in (("first", 4), ("always", 9), ("never", 1)):
        calls.clear()
        observer = cx.Observer(make("in-place relu", 0), verify=verify)
        for _ in range(9):
            observer(x, y)
        assert len(calls) == expected, verify  # "first": uses number 1, 2, 4 and 8


class _Waking(nn.Module):
    """Token-major rows of which only two are read at first: row 0 and row 3 of 2 x 2 belong to the same samples as
    if they were sample-major."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(16, 8), nn.Linear(8, 1)
        self.register_buffer("mask", torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(2, 2, 16).transpose(0, 1).reshape(4, 16)  # row t n + i
        h = torch.tanh(self.a(tokens)).view(2, 2, 8)
        return self.last((h * self.mask[:, :, None]).sum(0))


@pytest.mark.parametrize("verify", ["first", "never"])
def test_rows_that_were_dead_are_certified_when_they_wake(verify: str) -> None:
    x, y = _data(2)
    observer = cx.Observer(model := _Waking().double(), verify=verify)
    for _ in range(2):
        observer(x, y)
    model.mask.fill_(1.0)
    observation = observer(x, y)  # use number 3, at which "first" would not certify
    expected = brute_force.kernel_of(brute_force.jacobian(model, x))
    assert brute_force.relative(observation.kernel, expected) <= 1e-10


class _Gathering(nn.Module):
    """Rows routed by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(32, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = torch.tanh(self.a(x[order]))
        return self.last(h[order.argsort()])


def test_data_dependent_routing_is_certified_each_time() -> None:
    model = _Gathering().double()
    observer = cx.Observer(model)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 32, dtype=torch.float64, generator=generator)
        y = torch.randn(6, 1, dtype=torch.float64, generator=generator)
        observation = observer(x, y)
        expected = brute_force.kernel_of(brute_force.jacobian(model, x))
        assert brute_force.relative(observation.kernel, expected) <= 1e-10
        loss = (model(x) - y).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for got, reference in zip(observation.gradients().values(), gradients, strict=True):
            assert brute_force.relative(got, reference) <= 1e-10


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    positions=st.integers(1, 5),
    layout=st.sampled_from(["major", "minor", "permuted"]),
    seed=st.integers(0, 2**31),
    dead=st.booleans(),
)
def test_row_maps_are_recovered(n: int, positions: int, layout: str, seed: int, dead: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = n * positions
    sample = {
        "major": torch.arange(rows) // positions,
        "minor": torch.arange(rows) % n,
        "permuted": (torch.arange(rows) // positions)[torch.randperm(rows, generator=generator)],
    }[layout]
    plain = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    if dead and layout != "permuted":
        plain[torch.rand(rows, generator=generator) < 0.3] = 0.0
    scales = distinct_scales(n, plain, generator)
    found = find_row_map(plain, plain * scales[sample][:, None], scales, (1,))
    assert isinstance(found, RowMap)
    values = torch.randn(n, dtype=torch.float64, generator=generator)
    live = plain.abs().sum(1) > 0
    if found.settled:
        assert torch.equal(found.to_rows(values)[live], values[sample][live])
    by_sample = found.by_sample(plain * values[sample][:, None])
    expected = torch.zeros(n, 3, dtype=torch.float64).index_add_(0, sample, plain * values[sample][:, None])
    if found.settled:
        assert torch.allclose(by_sample.sum(1), expected, rtol=1e-12, atol=1e-12)
    # Rows that mix two samples have no map.
    if n > 1 and bool(live.all()):
        mixed = plain * scales[sample][:, None]
        mixed[0] = plain[0] * (scales[0] + scales[1]) / 2 + 0.3 * plain[0].roll(1)
        assert isinstance(find_row_map(plain, mixed, scales, (1,)), str)
