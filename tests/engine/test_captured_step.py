"""A captured step where there is no GPU: run again by a stand-in for the graph, and on a device without values.

What a graph replays is a function of static tensors. Here the function itself runs again at each replay, which has to
agree with the Observer step by step; and it runs on the meta device, where whatever needs the host is an error.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import captured_cases
import pytest
import torch
from captured_cases import (
    HostGraph,
    K,
    OneMemory,
    close,
    compare_models,
    compare_pass,
    compare_spectrum,
    data,
)
from networks import EXACT, make
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import catapult_ext as cx
from catapult_ext.observe.captured_pass import CapturedPass
from catapult_ext.observe.cuda_graph import CudaGraph, WithoutHost
from catapult_ext.rules import embedding


def captured(
    model: nn.Module, x: Any, y: Tensor, lr: Any = 0.1, overlap: bool = False, **options: Any
) -> cx.CapturedStep:
    """`Observer.capture` without a GPU."""
    observer = cx.Observer(model, **{"k": K} | options)
    return cx.CapturedStep(observer, x, y, lr, overlap=overlap, graph=HostGraph())  # type: ignore[arg-type]


def fcn() -> nn.Module:
    return captured_cases.MODELS["fcn"]().double()


def _double(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: _double(make) for name, make in captured_cases.MODELS.items()},
    **{name: partial(make, name, 0) for name in EXACT if name != "shuffled samples"},
}


def state_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_steps_of_an_observer(name: str) -> None:
    model = MODELS[name]()
    eager = copy.deepcopy(model)
    step, observer = captured(model, *data(model, 0)), cx.Observer(eager, k=K)
    addresses = [t.data_ptr() for t in tree_leaves(step._results) if t is not None]
    for seed, lr in enumerate((0.05, 0.01, 0.02)):
        x, y = data(model, seed + 1)
        step(x, y, lr)
        seen = observer(x, y)
        compare_pass(step, seen)
        compare_spectrum(step, seen)
        seen.step_(lr)
        compare_models(model, eager)
    assert [t.data_ptr() for t in tree_leaves(step._results) if t is not None] == addresses


@pytest.mark.parametrize("agop", [True, "layers", "all"])
@pytest.mark.parametrize("name", ["fcn", "cnn", "cnn, three outputs"])
def test_agops(name: str, agop: Any) -> None:
    model = MODELS[name]()
    eager = copy.deepcopy(model)
    step, observer = captured(model, *data(model, 0), agop=agop), cx.Observer(eager, k=K, agop=agop)
    for seed in (1, 2):
        step(*data(model, seed), 0.02)
        seen = observer(*data(model, seed))
        assert (step.agop is None) == (agop == "layers")
        assert (step.layer_agop is None) == (agop is True)
        if step.agop is not None:
            close(step.agop, seen.agop)
        for layer, expected in seen.layer_agop().items() if step.layer_agop else ():
            close(step.layer_agop[layer], expected)
        seen.step_(0.02)


def test_with_overlap_the_spectrum_is_one_replay_behind() -> None:
    model = MODELS["fcn, three outputs"]()
    eager = copy.deepcopy(model)
    x, y = data(model, 0)
    step, observer = captured(model, x, y, overlap=True), cx.Observer(eager, k=K)
    before = cx.observe(model, x, y, k=K)
    for seed in range(1, 4):
        x, y = data(model, seed)
        step(x, y, 0.02)
        seen = observer(x, y)
        compare_pass(step, seen)
        compare_spectrum(step, before)
        seen.step_(0.02)
        before = seen


def test_inputs_stay_and_may_be_written_in_place() -> None:
    model = fcn()
    eager = copy.deepcopy(model)
    x, y = data(model, 0)
    step, observer = captured(model, x, y, 0.03), cx.Observer(eager)
    x.zero_()  # the step has copies
    y.zero_()
    step()
    observer(*data(model, 0)).step_(0.03)
    step.x.mul_(0.5)
    step.y.add_(1.0)
    step.lr.mul_(0.5)
    step()
    step(lr=step.lr * 2.0)
    x, y = data(model, 0)
    for lr in (0.015, 0.03):
        seen = observer(0.5 * x, y + 1.0)
        seen.step_(lr)
    close(step.loss, seen.loss)
    compare_models(model, eager)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
            self.out = nn.Linear(4, 1)

        def forward(self, p: Tensor, q: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(p) + self.b(q)))

    torch.manual_seed(0)
    model = Two().double()
    draw = lambda n: {"p": torch.randn(n, 3).double(), "q": torch.randn(n, 2).double()}  # noqa: E731
    x, y = draw(5), torch.randn(5).double()
    step = captured(model, x, y)
    assert step.y.shape == (5, 1)
    new = draw(5)
    expected = cx.observe(model, new, y).kernel
    step(new, y)
    close(step.kernel, expected)
    with pytest.raises(ValueError, match=r"x: expected 5 samples of .*'p'.* \(3,\).*got 4 of"):
        step(draw(4))


def test_numbers_come_back_at_once() -> None:
    model = fcn()
    step = captured(model, *data(model, 0), k=2)
    seen = cx.observe(model, *data(model, 0), k=2)
    step()
    expected = {
        "loss": seen.loss,
        "critical_lr": seen.critical_lr,
        "top_loss": seen.top_loss,
        "rest_loss": seen.rest_loss,
        "lambda_1": seen.eigen.values[0],
        "lambda_2": seen.eigen.values[1],
    }
    assert step.read() == {name: pytest.approx(float(value), rel=1e-9) for name, value in expected.items()}


@pytest.mark.parametrize("name", ["fcn", "batch norm, training", "three outputs, batch norm"])
def test_a_capture_leaves_the_model_as_found(name: str) -> None:
    model = MODELS[name]()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    captured(model, *data(model, 0))
    for own, other in zip(state_of(model), state_of(before), strict=True):
        assert torch.equal(own, other)
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_buffers_of_any_kind() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(32, 4), nn.Linear(4, 1)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]))
            self.register_buffer("unset", torch.full((2,), torch.nan))
            self.register_buffer("turns", torch.polar(torch.ones(4), torch.ones(4)))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head((self.layer(x) * self.turns.real + self.mask).softmax(1))

    torch.manual_seed(0)
    model = Masked()
    step = captured(model, torch.randn(6, 32), torch.randn(6, 1))
    assert int(model.calls) == 0
    step()
    step()
    assert int(model.calls) == 2


def test_a_rate_that_destroys_the_model() -> None:
    model = fcn().float()
    before = copy.deepcopy(model)
    with pytest.raises(cx.NonFinite, match="leaves parameters that are not finite"):
        captured(model, *data(model, 0), 3e38)
    for own, other in zip(state_of(model), state_of(before), strict=True):
        assert torch.equal(own, other)


def test_an_observation_made_before_a_replay_is_stale() -> None:
    model = fcn()
    step = captured(model, *data(model, 0))
    seen = cx.observe(model, *data(model, 0))
    step()
    with pytest.raises(ValueError, match="the parameters have changed since the observation"):
        seen.step_(0.1)


def test_what_is_not_finite_is_noted_and_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_device(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        residual = prediction - target
        return residual, residual.square().sum()

    monkeypatch.setattr("catapult_ext.ops.residual", on_a_device)
    model = fcn()
    x, y = data(model, 0)
    step = captured(model, x, y, 1e-300)
    y[2] = 1e200  # its square overflows
    step(x, y)
    step(*data(model, 0))
    with pytest.raises(cx.NonFinite, match="output is not finite"):
        step.read()
    step()
    assert step.read()["loss"] > 0


# ---- refusals


class Changing(nn.Module):
    """Its forward depends on `what` beside parameters and x."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.head, self.what, self.calls = nn.Linear(32, 8), nn.Linear(8, 1), what, 0
        self.register_buffer("mean", torch.zeros(8))
        self.memory = torch.zeros(8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.layer(x)
        if self.what == "value" and h.sum() > 0:
            h = h.tanh()
        elif self.what == "mask":
            h = h[h[:, 0] == h[:, 0]]
        elif self.what == "counter":
            h = h / self.calls
        elif self.what == "graph" and self.calls > 3:
            h = h.tanh()
        elif self.what == "new buffer":
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            h = h - self.mean
        elif self.what == "memory":
            self.memory = 0.9 * self.memory + h.detach().mean(0)
            h = h - self.memory
        elif self.what == "maximum":
            h = h.unflatten(1, (2, 4)).max(1).values.repeat(1, 2)
        elif self.what == "dead":
            h = (h - 1e3).relu()
        return self.head(h)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("value", "_local_scalar_dense reads the values"),
        ("mask", "whose shape depends on values"),
        ("counter", "a replay of its step gives something else"),
        ("graph", "its graph differs from call to call"),
        ("new buffer", "assigns a new tensor to the buffer mean"),
        ("memory", "a replay of its step gives something else"),
        ("maximum", "which of its rows belongs to which sample"),
        ("dead", "dead units"),
    ],
)
def test_a_forward_that_depends_on_more_is_refused(what: str, message: str) -> None:
    torch.manual_seed(0)
    model = Changing(what).double()
    before = copy.deepcopy(model)
    buffer = model.mean
    with pytest.raises(cx.UnsupportedModule, match=message):
        captured(model, *data(before, 0))
    assert model.mean is buffer
    for own, other in zip(state_of(model), state_of(before), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.5), nn.Linear(8, 1)), r"model.eval\(\)"),
        (
            lambda: nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 1)),
            "reads the values",
        ),
        (EXACT["shuffled samples"], "belongs to which sample"),
    ],
)
def test_models_that_no_replay_could_repeat(model: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(cx.UnsupportedModule, match=message):
        captured(model().double(), torch.randn(6, 32).double(), torch.randn(6, 1).double())


def test_a_capture_needs_a_cuda_device() -> None:
    model = fcn()
    with pytest.raises(ValueError, match="model: expected a model on a CUDA device for capture"):
        cx.Observer(model).capture(*data(model, 0), 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": False}, "an Observer with kernel=True, got False"),
        ({"hessian": True}, "an Observer with hessian=False, got True"),
        ({"max_bytes": 10**9}, "an Observer with max_bytes=None, got 1000000000"),
        ({"verify": "always"}, "an Observer without verify='always'"),
        ({"lr": float("nan")}, "lr: expected a finite number"),
        ({"lr": "fast"}, "lr: expected a finite number"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    model = fcn()
    with pytest.raises(ValueError, match=message):
        captured(model, *data(model, 0), **options)


def test_arguments_of_a_replay_that_do_not_fit() -> None:
    model = fcn()
    x, y = data(model, 0)
    step = captured(model, x, y)
    before = copy.deepcopy(model)
    for arguments, error, message in (
        ({"x": x[:5]}, ValueError, r"x: expected 6 samples of \(32,\) torch.float64 as captured, got 5 of"),
        ({"x": x.float()}, ValueError, "x: expected 6 samples"),
        ({"x": x.tolist()}, TypeError, "x: expected a tensor"),
        ({"x": x.to("meta")}, ValueError, "x: expected a tensor on cpu"),
        ({"y": y[:5]}, ValueError, r"y: expected shape \(n, c\) = \(6, 1\)"),
        ({"y": y.float()}, TypeError, "y: expected torch.float64"),
        ({"lr": float("inf")}, ValueError, "lr: expected a finite number"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected a number, or a 0-dim tensor on cpu"),
    ):
        with pytest.raises(error, match=message):
            step(**arguments)
    for own, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("change", ["eval", "freeze", "move", "buffer"])
def test_a_model_that_is_no_longer_the_captured_one(change: str) -> None:
    model = make("batch norm, training", 0)
    step = captured(model, *data(model, 0))
    if change == "eval":
        model.eval()
    elif change == "freeze":
        next(model.parameters()).requires_grad_(False)
    elif change == "move":
        for p in model.parameters():
            p.data = p.data.clone()
    else:
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
        norm.running_mean = norm.running_mean.clone()
    with pytest.raises(ValueError, match=r"not those of the capture any more.*capture it again"):
        step()


def test_a_captured_model_with_another_parameter() -> None:
    model = nn.Sequential(nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    step = captured(model, *data(model, 0))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ValueError, match=r"0\.weight was replaced.*make a new Observer"):
        step()


# ---- nothing waits for the device


class PassThrough(WithoutHost):
    """Refuses nothing. Graphs under a mode have other nodes, since PyTorch reshapes differently there."""

    @staticmethod
    def _refuse(name: str, what: str) -> None:
        pass


def run_without_values(model: nn.Module, **options: Any) -> None:
    """Run the recorded step on the meta device, whose tensors no host can read, with a plan certified on the CPU."""
    with sdpa_kernel(SDPBackend.MATH):  # the only one that both devices have
        with PassThrough():
            step = captured(model, *data(model, 0), **options)
        _run_without_values(step, cx.Observer(model.to("meta"), k=K, **options))


def _on_meta(captured: Any, observer: cx.Observer, *tensors: str) -> None:
    """Let what was captured on the CPU run with the model of an observer on the meta device, by the same plan."""
    ((key, plan),) = captured._observer._plans.items()
    plan.unit = None
    on_meta = tuple(torch.device("meta") if isinstance(part, torch.device) else part for part in key)
    observer._plans, observer._verify = {on_meta: plan}, "never"
    captured._observer, captured._state = observer, observer._state
    for name in ("x", "y", *tensors):
        setattr(captured, name, getattr(captured, name).to("meta"))


def _run_without_values(step: cx.CapturedStep, observer: cx.Observer) -> None:
    _on_meta(step, observer, "lr", "_start", "_wrong")
    with WithoutHost():
        result = step._step()
    assert len(observer._plans) == 1
    assert all(leaf.is_meta for leaf in tree_leaves(result) if leaf is not None)


@pytest.fixture
def storages_have_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages of the meta device all lie at 0, which would look like one memory for all tensors."""
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda self: self._cdata)


#: Their graphs on the CPU have other nodes than elsewhere.
_BY_DEVICE = {"lstm"}


@pytest.mark.usefixtures("storages_have_addresses")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - _BY_DEVICE))
def test_no_step_needs_the_host(name: str) -> None:
    run_without_values(MODELS[name]())


@pytest.mark.usefixtures("storages_have_addresses")
@pytest.mark.parametrize("name", ["fcn", "cnn", "cnn, three outputs", "attention, batch first"])
def test_no_agop_needs_the_host(name: str) -> None:
    run_without_values(MODELS[name](), agop="all")


@pytest.mark.usefixtures("storages_have_addresses")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - _BY_DEVICE))
def test_no_captured_pass_needs_the_host(name: str) -> None:
    model = MODELS[name]()
    with sdpa_kernel(SDPBackend.MATH):
        with PassThrough():
            captured_pass = CapturedPass(cx.Observer(model), *data(model, 0), graph=OneMemory())  # type: ignore[arg-type]
        observer = cx.Observer(model.to("meta"))
        _on_meta(captured_pass, observer)
        captured_pass._buffers = [buffer for _, _, buffer in observer._state.buffers]
        with WithoutHost():
            results = captured_pass._pass()
    assert results["made"].kernel.is_meta
    assert all(gradient.is_meta for gradient in results["made"].swept.values())


@pytest.mark.usefixtures("storages_have_addresses")
def test_a_rule_that_reads_values_is_refused() -> None:
    """Whether all bags are of one length is looked at in each pass."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(7, 5), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x[:, :4].abs().long().clamp_max(6)))

    with pytest.raises(cx.UnsupportedModule, match="aten::equal reads the values of a tensor"):
        run_without_values(Bags().double())


class Elsewhere(torch.Tensor):
    """A tensor of the host that says it is on a device."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("rows", [5, 40])
def test_embeddings_need_no_counts(padding: bool, rows: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(-1 if padding else 0, rows, (4, 6))
    b = torch.randn(4, 2, 6, 3, dtype=torch.float64)
    there = tokens.as_subclass(Elsewhere)
    (ranks, total), (found, bound) = embedding._ranks(tokens, rows), embedding._ranks(there, rows)
    assert torch.equal(found, ranks)
    assert total <= bound <= rows
    for first, stop in ((0, total), (1, 3), (total - 1, total)):
        expected = embedding._scatter(ranks, b, slice(first, stop))
        close(embedding._scatter(found, b, slice(first, stop)), expected)
    assert not bool(embedding._scatter(there, b, slice(rows, rows + 2)).any())


@pytest.mark.usefixtures("storages_have_addresses")
def test_a_factor_on_the_device_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 1)
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.scale * self.layer.weight)

    with pytest.raises(cx.UnsupportedModule, match="aten::_local_scalar_dense reads the values"):
        run_without_values(Scaled().double())


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda t: t.sum().item(), "_local_scalar_dense"),
        (lambda t: bool((t > 0).any()), "is_nonzero|_local_scalar_dense"),
        (lambda t: t.nonzero(), "nonzero"),
        (lambda t: t[t > 0], "index|nonzero"),
        (lambda t: t.masked_select(t > 0), "masked_select"),
        (lambda t: t.index_put_((t > 0,), t.new_zeros(())), "index_put_"),
        (lambda t: t.unique(), "_unique2"),
        (lambda t: torch.equal(t, t), "equal"),
        (lambda t: t.copy_(torch.ones(3, 3)), "copy_"),
        (lambda t: torch.ones(3, 3).to(t.device), "_to_copy"),
        (lambda t: torch.tensor(1.0).to(t.device), "_to_copy"),
        (lambda t: t[torch.tensor([0, 1])], "index"),
    ],
)
def test_each_way_to_wait_is_found(operation: Callable[[Tensor], Any], name: str) -> None:
    with WithoutHost(), pytest.raises(cx.UnsupportedModule, match=name):
        operation(torch.ones(3, 3, device="meta"))


def test_what_does_not_wait_passes() -> None:
    t = torch.ones(3, 3, device="meta")
    with WithoutHost():
        t = t * 0.5 + torch.tensor(2.0)
        t[0] = 1.0
        t[t.new_zeros(2, dtype=torch.long)] = 3.0
        assert t.masked_fill(t > 0, 1.0)[t.new_zeros(2, dtype=torch.long)].shape == (2, 3)
        assert float((t.requires_grad_() * 0.5).grad_fn._saved_other) == 0.5  # a number


# ---- streams


class Streams:
    """What `CudaGraph` uses of torch.cuda, as a log of who waits for whom and where the work is enqueued."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = iter(("main", "branch"))
        self.mode: Any = 0
        self.current = self.Stream(name="caller")

    def Stream(self, device: Any = None, name: str | None = None) -> Any:
        stream = SimpleNamespace(name=name or next(self.names))
        stream.wait_stream = lambda other: self.log.append(f"{stream.name} waits for {other.name}")
        return stream

    def current_stream(self, device: Any = None) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        """Like PyTorch's, it leaves its stream behind when the capture fails."""
        before, self.current = self.current, stream
        self.log.append("capture")
        yield
        self.current = before

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.work("replay"))

    def get_sync_debug_mode(self) -> Any:
        return self.mode

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.mode = mode

    def work(self, what: str) -> str:
        self.log.append(f"{what} on {self.current.name}")
        return what


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    modes = ("get_sync_debug_mode", "set_sync_debug_mode")
    for name in ("Stream", "current_stream", "stream", "graph", "CUDAGraph", *modes):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    return streams


def test_where_a_graph_runs_what(streams: Streams) -> None:
    graph = CudaGraph(torch.device("cuda", 0))
    assert graph.run(lambda: streams.work("first")) == "first"
    assert graph.rehearse(lambda: (streams.work("again"), streams.mode)) == ("again", "error")
    assert graph.record(lambda: streams.work("step")) == "step"
    graph.replay()
    around = ["main waits for caller", "{} on main", "caller waits for main"]
    assert streams.log == [
        *(line.format(what) for what in ("first", "again") for line in around),
        "capture",
        "step on main",
        "replay on caller",
    ]
    assert streams.mode == 0


def test_errors_that_say_what_cannot_be_captured(streams: Streams) -> None:
    def fail(text: str) -> Callable[[], None]:
        def function() -> None:
            raise RuntimeError(text)

        return function

    graph = CudaGraph(torch.device("cuda", 0))
    caller = streams.current
    for call, text in (
        (graph.rehearse, "called a synchronizing CUDA operation"),
        (graph.record, "CUDA error: operation not permitted when stream is capturing"),
    ):
        with pytest.raises(cx.UnsupportedModule, match=f"cannot be captured.*{text}"):
            call(fail(text))
        with pytest.raises(RuntimeError, match="out of memory"):
            call(fail("CUDA out of memory"))
        assert streams.current is caller
        assert streams.mode == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_the_spectrum_runs_on_the_branch(
    overlap: bool, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            streams.work(what)
            return function(*arguments, **options)

        return call

    for where, what in (
        ("captured_step.top_eigh", "eigenpairs"),
        ("captured_step.decompose_loss", "split"),
        ("assemble.Assembler.build_kernel", "kernel"),
        ("loss_gradient.LossGradient.step_", "update"),
    ):
        module, _, name = where.partition(".")
        owner: Any = sys.modules[f"catapult_ext.observe.{module}"]
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, last, logged(getattr(owner, last), what))
    graph = CudaGraph(torch.device("cuda", 0))
    host = HostGraph()
    graph.record = lambda function: graph.run(lambda: host.record(function))  # type: ignore[method-assign]
    graph.replay = host.replay  # type: ignore[method-assign]
    model = fcn()
    cx.CapturedStep(cx.Observer(model), *data(model, 0), 0.1, overlap=overlap, graph=graph)
    first = streams.log.index("caller waits for main") + 1  # behind the certified pass
    branch = ["branch waits for main", "eigenpairs on branch", "split on branch"]
    rest = ["update on main", "main waits for branch", "caller waits for main"]
    kernel = ["kernel on main"]
    expected = [*branch, *kernel, *rest] if overlap else [*kernel, *branch, *rest]
    assert streams.log[first : first + 8] == ["main waits for caller", *expected]
