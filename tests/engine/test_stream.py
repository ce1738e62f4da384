"""Kernels of blocks of samples and groups of parameters, against brute force, with every new tensor filled with NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import brute_force
import pytest
import torch
from networks import EXACT, make
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import catapult_ext as cx

N, M = 11, 7
COUPLED = {"batch norm, training", "coupled samples", "scalar below coupling", "three outputs, batch norm"}


SMALL = {
    "in-place relu", "fed with a parameter", "pending negation", "scaled products", "shuffled samples", "unused layer",
    "output (n,)", "layer norm", "batch norm, eval", "three outputs", "prelu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Make every tensor that is allocated and not written NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _x(n: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 32, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _rows(model: nn.Module, x: Tensor) -> Tensor:
    """[n c, p]."""
    return torch.cat([brute_force.flat_rows(r) for r in brute_force.jacobian(model, x).values()], 1)


def _smallest(*args: Any, **options: Any) -> int:
    with pytest.raises(ValueError, match=r"max_bytes: 1 is too small .* bound that works is (\d+)") as caught:
        cx.ntk(*args, max_bytes=1, **options)
    return int(str(caught.value).rsplit(" ", 1)[1])


@pytest.mark.parametrize("name", EXACT)
def test_every_network_within_the_smallest_bound(name: str) -> None:
    model, x, z = make(name, 1), _x(N), _x(M, seed=4)
    left, right = _rows(model, x), _rows(model, z)
    for others, expected in (((), left @ left.T), ((z,), left @ right.T)):
        smallest = _smallest(model, x, *others)
        plan = cx.ntk_plan(model, x, *others, max_bytes=smallest)
        assert plan.peak_bytes <= smallest == plan.smallest_bytes
        kernel = cx.ntk(model, x, *others, max_bytes=smallest)
        assert brute_force.relative(kernel, expected) <= 1e-10
        assert others or torch.equal(kernel, kernel.T)
        with pytest.raises(ValueError, match="too small"):
            cx.ntk(model, x, *others, max_bytes=smallest - 1)
        assert (plan.coupled is not None) == (name in COUPLED)
        assert not (plan.streamed and name in COUPLED)
        streamed = plan.streamed
    if streamed:
        assert plan.passes >= 2
    else:
        # One sweep takes no more where certification, which four samples need as well, takes more than all the rest.
        assert name in COUPLED | SMALL


@pytest.mark.parametrize("outputs", ["all", "trace", "sum", 2])
@pytest.mark.parametrize("name", ["three outputs", "three outputs, convolution", "attention, three outputs"])
def test_modes_of_outputs(name: str, outputs: str | int) -> None:
    model, x, z = make(name, 1), _x(4 * N), _x(M, seed=4)
    left, right = (_rows(model, each).view(len(each), 3, -1) for each in (x, z))

    def expected(a: Tensor, b: Tensor) -> Tensor:
        if outputs == "all":
            return a.flatten(0, 1) @ b.flatten(0, 1).T
        if outputs == "trace":
            return torch.einsum("icp,jcp->ij", a, b) / 3
        return a.sum(1) @ b.sum(1).T if outputs == "sum" else a[:, outputs] @ b[:, outputs].T

    for others, reference in (((), expected(left, left)), ((z,), expected(left, right))):
        smallest = _smallest(model, x, *others, outputs=outputs)
        assert (
            name == "three outputs"
            or cx.ntk_plan(model, x, *others, outputs=outputs, max_bytes=smallest).streamed
        )
        kernel = cx.ntk(model, x, *others, outputs=outputs, max_bytes=smallest)
        assert brute_force.relative(kernel, reference) <= 1e-10


@pytest.mark.parametrize(
    "name", ["convolutions", "tied and transposed", "attention, batch first", "parametrizations"]
)
def test_kernels_by_parameter_and_of_some_parameters(name: str) -> None:
    model, x = make(name, 2), _x(4 * N)
    rows = {p: brute_force.flat_rows(r) for p, r in brute_force.jacobian(model, x).items()}
    smallest = _smallest(model, x, per_parameter=True)
    assert cx.ntk_plan(model, x, per_parameter=True, max_bytes=smallest).streamed
    kernels = cx.ntk(model, x, per_parameter=True, max_bytes=smallest)
    assert list(kernels) == list(rows)
    for p, kernel in kernels.items():
        assert brute_force.relative(kernel, rows[p] @ rows[p].T) <= 1e-10, p
    some = list(rows)[::2]
    expected = sum(rows[p] @ rows[p].T for p in some)
    bound = _smallest(model, x, params=some)
    assert brute_force.relative(cx.ntk(model, x, params=some, max_bytes=bound), expected) <= 1e-10


@pytest.mark.parametrize("name", ["convolutions", "three outputs", "lstm"])
def test_double_accumulation_of_a_float_model(name: str) -> None:
    model, x = make(name, 2, torch.float32), _x(4 * N, dtype=torch.float32)
    smallest = _smallest(model, x, dtype=torch.float64)
    kernel = cx.ntk(model, x, dtype=torch.float64, max_bytes=smallest)
    assert kernel.dtype == torch.float64
    rows = _rows(model, x).double()
    assert brute_force.relative(kernel, rows @ rows.T) <= 2e-6  # activations carry float32 rounding
    single = cx.ntk(model, x, max_bytes=_smallest(model, x))
    assert single.dtype == torch.float32
    assert brute_force.relative(single.double(), rows @ rows.T) <= 5e-6


def test_every_bound_gives_the_same_kernel() -> None:
    model, x = make("convolutions", 3), _x(53)
    whole = cx.ntk(model, x)
    smallest, one = _smallest(model, x), cx.ntk_plan(model, x).peak_bytes
    seen = set()
    for part in (0.0, 0.1, 0.3, 0.6, 0.99, 1.0):
        bound = smallest + int(part * (one - smallest))
        plan = cx.ntk_plan(model, x, max_bytes=bound)
        assert plan.peak_bytes <= bound
        seen.add((plan.streamed, plan.passes, plan.block))
        assert brute_force.relative(cx.ntk(model, x, max_bytes=bound), whole) <= 1e-12
    assert len(seen) >= 4


def test_a_wide_layer_is_cut() -> None:
    """Neither the features of all samples nor one row of the weight fits."""
    for c in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 3000), nn.Tanh(), nn.Linear(3000, c)).double()
        x, z = _x(61), _x(M, seed=4)
        left, right = _rows(model, x), _rows(model, z)
        for others, expected in (((), left @ left.T), ((z,), left @ right.T)):
            bound = _smallest(model, x, *others)
            plan = cx.ntk_plan(model, x, *others, max_bytes=bound)
            routes = {p.name: p.route for p in plan.parameters}
            assert routes["2.weight"] == ("tiles" if c == 1 else "gram, cut")
            assert brute_force.relative(cx.ntk(model, x, *others, max_bytes=bound), expected) <= 1e-10


class _Centered(nn.Module):
    """Couples samples before the first parameter, which no row map shows."""

    def __init__(self, width: int = 30) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(32, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.a(x - x.mean(0))))


class _CenteredLater(_Centered):
    """Couples samples only where they are many."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0) if len(x) > 4 else x
        return self.last(torch.tanh(self.a(x)))


def test_coupling_that_no_row_map_shows_is_found() -> None:
    model, x = _Centered().double(), _x(200)
    plan = cx.ntk_plan(model, x)
    assert plan.coupled is not None
    assert plan.smallest_bytes == plan.peak_bytes  # one block, or none
    rows = _rows(model, x)
    assert brute_force.relative(cx.ntk(model, x, max_bytes=plan.peak_bytes), rows @ rows.T) <= 1e-10
    with pytest.raises(ValueError, match=r"samples are coupled .* call model.eval\(\), or raise the bound"):
        cx.ntk(model, x, max_bytes=plan.peak_bytes - 1)
    later, x = _CenteredLater(400).double(), _x(100)
    bound = cx.ntk_plan(later, x).peak_bytes - 1
    assert cx.ntk_plan(later, x, max_bytes=bound).block > 4
    with pytest.raises(cx.UnsupportedModule, match="changes with the samples beside it"):
        cx.ntk(later, x, max_bytes=bound)


class _Batches:
    """A loader with faults."""

    def __init__(self, x: Tensor, size: int, fault: str = "") -> None:
        self.x, self.size, self.fault, self.passes = x, size, fault, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        x = self.x
        if self.passes > 2 and self.fault == "noise":
            x = x + 1e-12
        if self.passes > 2 and self.fault == "short":
            x = x[: -self.size]
        for part in x.split(self.size):
            yield part, torch.zeros(len(part))


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_loaders(size: int) -> None:
    model, x, z = make("convolutions", 1), _x(53), _x(M, seed=4)
    whole, cross = cx.ntk(model, x), cx.ntk(model, x, z)
    loader = DataLoader(TensorDataset(x, torch.zeros(53)), batch_size=size)
    assert brute_force.relative(cx.ntk(model, loader), whole) <= 1e-12
    bound = _smallest(model, loader)
    assert cx.ntk_plan(model, loader, max_bytes=bound).streamed
    assert brute_force.relative(cx.ntk(model, loader, max_bytes=bound), whole) <= 1e-12
    assert brute_force.relative(cx.ntk(model, loader, z, max_bytes=2 * bound), cross) <= 1e-12
    others = list(z.split(size))
    assert brute_force.relative(cx.ntk(model, x, others, max_bytes=2 * bound), cross) <= 1e-12


def test_loaders_that_cannot_be_used() -> None:
    model, x = make("convolutions", 1), _x(53)
    shuffled = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)
    for loader in (shuffled, _Batches(x, 8, "noise"), _Batches(x, 8, "short")):
        with pytest.raises(
            ValueError, match=r"x: expected the loader to give the same batches .* shuffle=False"
        ):
            cx.ntk(model, loader, max_bytes=80_000)
    with pytest.raises(TypeError, match=r"x: expected a loader that can be read again .* got generator"):
        cx.ntk(model, (part for part in x.split(8)))
    with pytest.raises(ValueError, match="x: expected at least one batch"):
        cx.ntk(model, [])
    with pytest.raises(
        TypeError, match=r"x: expected a tensor .* whose entry 1 is no batch of these but str"
    ):
        cx.ntk(model, [x, "y"])


def test_inputs_of_several_tensors_and_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.last = nn.Embedding(9, 6), nn.Linear(32, 6), nn.Linear(6, 2)

        def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
            h = self.table(tokens) * torch.tanh(self.mix(image)).unsqueeze(1)
            return self.last(torch.tanh(h).mean(1))

    torch.manual_seed(1)
    model, image = Two().double(), _x(53)
    tokens = torch.randint(0, 9, (53, 5))
    whole = cx.ntk(model, (image, tokens))
    for x in ((image, tokens), {"tokens": tokens, "image": image}):
        bound = _smallest(model, x)
        assert cx.ntk_plan(model, x, max_bytes=bound).streamed
        assert brute_force.relative(cx.ntk(model, x, max_bytes=bound), whole) <= 1e-12
    batches = [((image[i : i + 9], tokens[i : i + 9]), None) for i in range(0, 53, 9)]
    assert brute_force.relative(cx.ntk(model, batches, max_bytes=2 * bound), whole) <= 1e-12


def test_the_model_is_left_as_found() -> None:
    """Power iterations of spectral_norm and running statistics move at every forward: each block begins anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.utils.parametrizations.spectral_norm(model[0])
    model = model.double().train()
    x = _x(53)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = cx.ntk(model, x)
    bound = cx.ntk_plan(model, x).smallest_bytes
    assert cx.ntk_plan(model, x, max_bytes=bound).streamed
    assert brute_force.relative(cx.ntk(model, x, max_bytes=bound), whole) <= 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_plan_as_a_table() -> None:
    model, x = make("convolutions", 1), _x(53)
    plan = cx.ntk_plan(model, x, max_bytes=cx.ntk_plan(model, x).smallest_bytes)
    text = str(plan)
    assert f"{plan.passes} passes of blocks of {plan.block} samples" in text
    for p in plan.parameters:
        assert p.name in text
    assert plan.flops >= plan.sweep_flops > 0
    assert sum(plan.parts.values()) >= plan.peak_bytes
    assert {p.route for p in plan.parameters} == {"tiles", "gram"}
    assert max(p.passes for p in plan.parameters) >= 2
    assert "one sweep" in str(cx.ntk_plan(model, x))


@pytest.mark.parametrize("bound", [0, -5, 1.5, True, "1 GB"])
def test_bounds_that_are_none(bound: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes: expected a positive integer or None"):
        cx.ntk(make("convolutions", 1), _x(5), max_bytes=bound)
