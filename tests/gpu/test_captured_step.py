"""A step and its observation in a real CUDA graph: against the Observer, without a wait, repeatably, and refused."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from captured_cases import MODELS, K, close, compare_models, compare_pass, compare_spectrum, data
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import catapult_ext as cx

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_and_empty")]


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return MODELS[name]().to("cuda", dtype)


def leaves(step: cx.CapturedStep) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(step._results) if leaf is not None]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_steps_of_an_observer(name: str, dtype: torch.dtype, overlap: bool) -> None:
    model = made(name, dtype)
    eager = copy.deepcopy(model)
    observer = cx.Observer(eager, k=K)
    x, y = data(model, 0)
    before = cx.observe(model, x, y, k=K)
    step = cx.Observer(model, k=K).capture(x, y, 0.1, overlap=overlap)
    compare_models(model, eager)
    addresses = [leaf.data_ptr() for leaf in leaves(step)]
    for seed, lr in enumerate((0.05, 0.01, 0.02)):
        x, y = data(model, seed + 1)
        step(x, y, lr if seed else torch.tensor(lr, device="cuda"))
        seen = observer(x, y)
        compare_pass(step, seen)
        compare_spectrum(step, before if overlap else seen)
        seen.step_(lr)
        compare_models(model, eager)
        before = seen
    step.check()
    assert [leaf.data_ptr() for leaf in leaves(step)] == addresses


@pytest.mark.parametrize("n", [128, 400])
def test_many_samples_through_a_catapult(n: int) -> None:
    """Warm starts of both eigensolvers, and a rate above the critical one."""
    generator = torch.Generator().manual_seed(0)
    model = cx.models.FCN(32, 64, 3, generator=generator).to("cuda", torch.float64)
    eager = copy.deepcopy(model)
    x, y = data(model, 0, n)
    observer = cx.Observer(eager, k=5)
    lr = 1.5 * float(observer(x, y).critical_lr)
    step = cx.Observer(model, k=5).capture(x, y, lr)
    for _ in range(5):
        step()
        seen = observer(x, y)
        compare_pass(step, seen)
        compare_spectrum(step, seen)
        seen.step_(lr)
    assert step.read()["loss"] == pytest.approx(float(seen.loss), rel=1e-8)


@pytest.mark.parametrize("name", ["fcn", "cnn", "cnn, three outputs"])
def test_agops(name: str) -> None:
    model = made(name)
    eager = copy.deepcopy(model)
    observer = cx.Observer(eager, k=K, agop="all")
    step = cx.Observer(model, k=K, agop="all").capture(*data(model, 0), 0.1)
    for seed in (1, 2):
        step(*data(model, seed), 0.02)
        seen = observer(*data(model, seed))
        assert step.agop is not None
        assert step.layer_agop is not None
        assert seen.agop is not None
        close(step.agop, seen.agop)
        for layer, expected in seen.layer_agop().items():
            close(step.layer_agop[layer], expected)
        seen.step_(0.02)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_replay_does_not_wait_and_takes_no_memory(overlap: bool) -> None:
    model = made("cnn, three outputs", torch.float32)
    x, y = data(model, 0)
    lr = torch.tensor(0.01, device="cuda")
    step = cx.Observer(model, k=K).capture(x, y, 0.01, overlap=overlap)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step(x, y, lr)
            step(lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    step.check()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_bits_at_every_replay(overlap: bool) -> None:
    """No race between the branch and the rest: a rate of zero leaves all replays the same work."""
    generator = torch.Generator().manual_seed(0)
    model = cx.models.FCN(64, 128, 4, generator=generator).cuda()
    step = cx.Observer(model, k=K).capture(*data_of(64, 128), 0.0, overlap=overlap)
    step()
    step()
    first = [leaf.clone() for leaf in leaves(step)]
    for _ in range(50):
        step()
        assert all(torch.equal(own, other) for own, other in zip(leaves(step), first, strict=True))


def data_of(d: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, d, generator=generator).cuda(), torch.randn(n, 1, generator=generator).cuda()


def test_on_another_stream() -> None:
    model = made("fcn")
    eager = copy.deepcopy(model)
    x, y = data(model, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step = cx.Observer(model, k=K).capture(x, y, 0.1)
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    observer = cx.Observer(eager)
    for _ in range(3):
        observer(x, y).step_(0.1)
    compare_models(model, eager)


def test_two_captures_of_one_model() -> None:
    model = made("fcn")
    eager = copy.deepcopy(model)
    observer = cx.Observer(eager)
    steps = [cx.Observer(model).capture(*data(model, seed, n), 0.05) for seed, n in ((0, 6), (1, 9))]
    for _ in range(2):
        for step, (seed, n) in zip(steps, ((0, 6), (1, 9)), strict=True):
            step()
            observer(*data(model, seed, n)).step_(0.05)
    compare_models(model, eager)


@pytest.mark.parametrize("where", ["x", "y"])
def test_what_is_not_finite_is_raised_when_it_is_read(where: str) -> None:
    model = made("fcn", torch.float32)
    x, y = data(model, 0)
    step = cx.Observer(model, k=K).capture(x, y, 0.01)
    (x if where == "x" else y)[2] = torch.nan
    step(x, y)
    step(*data(model, 0))
    with pytest.raises(cx.NonFinite):
        step.read()


class Reads(nn.Module):
    """Needs the host in its forward, or has a rule that does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.head, self.what = nn.Linear(32, 8), nn.Linear(8, 1), what
        self.table = nn.EmbeddingBag(7, 8)
        self.square = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.what == "value" and h.sum() > 0:
            h = h.tanh()
        elif self.what == "host":
            h = h + torch.arange(8.0).to(h)
        elif self.what == "table":
            h = h + self.table(x[:, :4].abs().long().clamp_max(6))
        elif self.what == "factor":
            h = nn.functional.linear(h, self.scale * self.square.weight)
        return self.head(h)


@pytest.mark.parametrize("what", ["value", "host", "table", "factor"])
def test_what_cannot_be_captured_is_refused_and_leaves_the_device_usable(what: str) -> None:
    torch.manual_seed(0)
    model = Reads(what).cuda()
    before = copy.deepcopy(model)
    x, y = data(model, 0)
    with pytest.raises(cx.UnsupportedModule, match="cannot be captured"):
        cx.Observer(model).capture(x, y, 0.1)
    compare_models(model, before)
    assert torch.cuda.get_sync_debug_mode() == 0
    other = made("fcn")
    step = cx.Observer(other).capture(*data(other, 0), 0.1)
    step()
    step.check()


def test_tensors_on_the_host_are_refused_by_name() -> None:
    model = made("fcn")
    x, y = data(model, 0)
    observer = cx.Observer(model)
    with pytest.raises(ValueError, match="x: expected a tensor on cuda"):
        observer.capture(x.cpu(), y, 0.1)
    with pytest.raises(ValueError, match="y: expected a tensor on cuda"):
        observer.capture(x, y.cpu(), 0.1)
    step = observer.capture(x, y, 0.1)
    for arguments, name in (({"x": x.cpu()}, "x"), ({"y": y.cpu()}, "y"), ({"lr": torch.tensor(0.1)}, "lr")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            step(**arguments)
