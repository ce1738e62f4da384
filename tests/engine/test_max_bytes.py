"""Predicted memory against the resident set of a fresh process, and what the prediction is made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.observe.allocations import Growth, record
from catapult_ext.observe.sweep import Sweep
from catapult_ext.stream.job import Job
from catapult_ext.stream.passes import Stream
from catapult_ext.stream.plan import Planner
from python_experiments.bench.kernel_memory import CASES, measure

#: FCN, CNN and ViT, with one and several outputs, and bounds that force blocks and passes; the rest are slow.
SOME = (
    "FCN, 10 outputs, n = 300",
    "FCN, 10 outputs, n = 300, bound",
    "CNN, 16 channels, 10 outputs, n = 96, bound",
    "CNN, 32 channels, K(x, z), 256 x 64, bound",
    "ViT-4, width 96, n = 128, bound",
)


class Shuffled(nn.Module):
    """Samples in the order of their first entries, which an inverse permutation below undoes."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        order = x[:, 0].argsort()
        return x[order][order.argsort()]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name, case in CASES.items()
        if not case.hours
    ],
)
def test_predicted_memory_is_what_a_call_takes(name: str) -> None:
    try:
        found = measure(name, exact=True)
    except RuntimeError as error:
        if "CATAPULT_DATA" in str(error) or "cifar" in str(error).lower():
            pytest.skip(str(error))
        raise
    if found is None:
        pytest.skip("the system does not tell the highest resident set")
    assert found.predicted > 50 << 20  # large against what else a process does
    assert 1 / 1.15 <= found.ratio <= 1.15, found
    if found.bound is not None:
        assert found.measured <= 1.15 * found.bound
        assert found.way != "one sweep"


def test_allocations_are_seen_one_by_one() -> None:
    """The profiler's entry points are semi-private: this fails where they changed."""
    kept, series = record(
        lambda: [torch.empty(1000), torch.empty(500), torch.empty(250)][1:], torch.device("cpu")
    )
    assert series == [0, 4000, 6000, 7000, 3000]
    del kept
    with torch.autograd.profiler.profile(), pytest.raises(RuntimeError, match="while a profiler is running"):
        record(lambda: None, torch.device("cpu"))


def test_growth_is_exact_where_moments_change_places() -> None:
    """What does not grow is the peak of few samples, what does that of many."""

    def call(samples: int) -> None:
        fixed = torch.empty(10_000)
        del fixed
        growing = torch.empty(samples, 100)
        torch.tanh(growing)

    first, second = (record(lambda n=n: call(n), torch.device("cpu"))[1] for n in (2, 4))
    growth = Growth.between(2, first, 4, second)
    assert growth.exact
    assert growth.peak(10) == 40_000
    assert growth.peak(1000) == 800_000
    assert growth.left(1000) == 0


@pytest.mark.parametrize("columns", [None, 20])
@pytest.mark.parametrize("settled", [True, False])
def test_when_blocks_are_certified_is_what_a_plan_expects(
    columns: int | None, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments at which memory is highest: (samples that are gathered already, those of the block)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    x = torch.randn(90 if columns is None else 70 + columns, 32)
    sides = (x, None) if columns is None else (x[:70], x[70:])
    if not settled:  # a node of which the graph alone does not tell where rows go
        model.insert(1, Shuffled())
    job = Job(model, *sides, outputs="all", params=None, per_parameter=False, dtype=None)
    plan = job.plan(job.plan(None).smallest_bytes)
    assert plan.streamed
    assert plan.passes > 1
    stream, seen, gathered = job.stream(plan), [], [0]
    certify, gather, fill = Sweep._certify, Stream._gather, Stream._fill

    def filled(self: Stream, items: Any, buffers: Any, place: slice, *rest: Any) -> None:
        fill(self, items, buffers, place, *rest)
        gathered[0] += place.stop - place.start

    def certified(self: Sweep, *arguments: Any) -> Any:
        seen.append((gathered[0], self.output.shape[0]))
        return certify(self, *arguments)

    def begun(self: Stream, items: Any, samples: Any) -> Any:
        if samples is job.rows:
            gathered[0] = 0
        return gather(self, items, samples)

    monkeypatch.setattr(Sweep, "_certify", certified)
    monkeypatch.setattr(Stream, "_fill", filled)
    monkeypatch.setattr(Stream, "_gather", begun)
    stream.kernels(job.rows, job.columns)
    planner = Planner(job.probe(), job.sizes())
    expected = set(planner._certified([1] * plan.passes, plan.block))
    assert (planner.probe.plain is not planner.probe.sweep) == settled
    assert len(set(seen)) > 2
    if settled:
        assert set(seen) == expected
    else:
        assert len(seen) == plan.passes * sum(-(-len(s) // plan.block) for s in sides if s is not None)


def test_predicted_growth_of_a_network_is_that_of_its_allocations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 8, 8)), nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)
    )
    x = torch.randn(90, 128)
    plan = cx.ntk_plan(model, x)
    assert plan.exact
    _, series = record(lambda: cx.ntk(model, x), torch.device("cpu"))
    assert abs(max(series) / plan.peak_bytes - 1) <= 0.02


def test_a_bound_of_an_observation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2, 8, 8)), nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(512, 1))
    x, y = torch.randn(50, 128), torch.randn(50, 1)
    whole = cx.observe(model, x, y)
    with pytest.raises(
        ValueError, match=r"max_bytes: 1 is too small to observe 50 .* works is (\d+)"
    ) as caught:
        cx.observe(model, x, y, max_bytes=1)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    with pytest.raises(ValueError, match="too small"):
        cx.observe(model, x, y, max_bytes=smallest - 1)
    seen = cx.observe(model, x, y, max_bytes=smallest)
    assert torch.allclose(seen.kernel, whole.kernel, rtol=1e-5)
    with pytest.raises(ValueError, match="max_bytes: expected None with kernel=False"):
        cx.Observer(model, kernel=False, max_bytes=smallest)
