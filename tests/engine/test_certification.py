"""Wrong rules, wrong row maps and changing networks must be caught; a check with cotangents of one would pass."""

from __future__ import annotations

import brute_force
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.graph import nodes
from catapult_ext.graph.certify import RowMap, distinct_scales, find_row_map
from catapult_ext.rules import RULES, linear


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
