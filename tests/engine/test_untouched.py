"""Every public entry leaves the model as it found it, also when it fails; a step commits what the forward changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import make
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import catapult_ext as cx
from python_experiments.coverage.cases import CASES

_N = 6  # samples


def _loader(x: Tensor) -> DataLoader:
    """Without a generator of its own: PyTorch draws from the global one whenever it is iterated over."""
    return DataLoader(TensorDataset(x), batch_size=4)


def _everything(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> list[Tensor]:
    seen = cx.observe(model, x, y, k=2, agop="all", hessian=True)
    _ = seen.layer_report
    layers = [*seen.layer_agop().values(), *seen.layer_gradients().values(), *seen.nfa_correlation().values()]
    return [
        seen.kernel,
        *_spectrum(seen),
        seen.agop,
        seen.input_agop(center=True),
        seen.hessian.values,
        *layers,
    ]


def _spectrum(seen: cx.Observation) -> list[Tensor]:
    return [
        seen.eigen.values,
        seen.loss,
        seen.critical_lr,
        seen.top_loss,
        seen.rest_loss,
        *seen.gradients().values(),
    ]


def _two_steps(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> list[Tensor]:
    observer = cx.Observer(model, k=2, verify="always")
    return [*_spectrum(observer(x, y)), *_spectrum(observer(x.flip(0), y))]


def _blocks(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> list[Tensor]:
    """A kernel in as little memory as there may be: several blocks and passes."""
    try:
        cx.ntk(model, x, max_bytes=1)
    except ValueError as error:
        if "too small" not in str(error):
            raise
        return [cx.ntk(model, x, max_bytes=int(str(error).rsplit(" ", 1)[1]))]
    raise AssertionError("a kernel in one byte")


def _file(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> list[Tensor]:
    return [torch.from_numpy(np.array(cx.ntk_file(model, x, folder / "kernel.npy")))]


#: Public entries that take a model, each with what it returns.
ENTRIES: dict[str, Callable[[nn.Module, Tensor, Tensor, Path], list[Tensor]]] = {
    "observe": _everything,
    "observe, coupled too": lambda m, x, y, _: _spectrum(cx.observe(m, x, y, k=2, hessian=True)),
    "observe, no kernel": lambda m, x, y, _: [*cx.observe(m, x, y, kernel=False).gradients().values()],
    "Observer": _two_steps,
    "ntk": lambda m, x, y, _: [cx.ntk(m, x)],
    "ntk of two sets": lambda m, x, y, _: [*cx.ntk(m, x, x[:2], per_parameter=True).values()],  # type: ignore[union-attr]
    "ntk, trace": lambda m, x, y, _: [cx.ntk(m, x, outputs="trace")],
    "ntk of a loader": lambda m, x, y, _: [cx.ntk(m, _loader(x), x)],
    "ntk in blocks": _blocks,
    "ntk_plan": lambda m, x, y, _: [torch.tensor(cx.ntk_plan(m, x, max_bytes=10**8).peak_bytes)],
    "ntk_file": _file,
    "ntk_top": lambda m, x, y, _: [cx.ntk_top(m, x, 2).values],
    "ntk_top of a loader": lambda m, x, y, _: [cx.ntk_top(m, _loader(x)).values],
    "jacobian": lambda m, x, y, _: [cx.jacobian(m, x)],
    "agop": lambda m, x, y, _: [cx.agop(m, x)],
    "input_gradients": lambda m, x, y, _: [cx.input_gradients(m, x)],
    "layer_agop": lambda m, x, y, _: [*cx.layer_agop(m, x).values()],
    "layer_gradients": lambda m, x, y, _: [*cx.layer_gradients(m, x).values()],
    "nfa_correlation": lambda m, x, y, _: [*cx.nfa_correlation(m, x).values()],
    "hessian_top": lambda m, x, y, _: [cx.hessian_top(m, x, y, 2).values],
}


def _copy(tensors: Any) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone() for t in tensors]


def _snapshot(model: nn.Module, *data: Tensor) -> dict[str, Any]:
    """What has to be found again: values as tensors, everything else as it compares."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return {
        "parameters": _copy(parameters),
        "buffers": _copy(buffers),
        "gradients": _copy(p.grad for p in parameters),
        "samples and targets": _copy(data),
        "their gradients": _copy(t.grad for t in data),
        "random numbers": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())],  # noqa: NPY002
        "rest": {
            "random": random.getstate(),
            "identity": [
                id(t) for t in (*parameters, *buffers, *(p.grad for p in parameters if p.grad is not None))
            ],
            "versions": [t._version for t in (*parameters, *data)],
            "requires": [t.requires_grad for t in (*parameters, *buffers, *data)],
            "modes": [m.training for m in model.modules()],
            "hooks": [
                list(hooks)
                for m in model.modules()
                for hooks in (
                    m._forward_hooks,
                    m._forward_pre_hooks,
                    m._backward_hooks,
                    m._backward_pre_hooks,
                )
            ],
            "hooks of parameters": [len(p._backward_hooks or ()) for p in parameters],
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "grad mode": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
        },
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, value in before["rest"].items():
        assert after["rest"][what] == value, what
    for what in before.keys() - {"rest"}:
        assert len(before[what]) == len(after[what]), what
        for old, new in zip(before[what], after[what], strict=True):
            assert (old is None) == (new is None), what
            assert old is None or torch.equal(old, new), what


def _data(n: int = _N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 32, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)


def _dressed(model: nn.Module) -> nn.Module:
    """With gradients and hooks of the caller's own."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
            p.register_hook(lambda grad: None)
    model.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    return model


class _Strange(nn.Module):
    """Changes buffers in three ways, and at its call number `at` something happens.

    Args:
        what: "raises" or "raises in its backward", after a random number, or "gives no number".
        at: number of the call, counted from 1; 0 for none.
    """

    def __init__(self, what: str, at: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 4, dtype=torch.float64), nn.Linear(4, 1, dtype=torch.float64)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.what, self.at, self.calls = what, at, count(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.replaced = self.replaced + 1
        self.hidden.data.add_(1)
        h = torch.tanh(self.a(x))
        if next(self.calls) == self.at:
            if self.what == "raises":
                torch.rand(1)
                raise RuntimeError("it raises")
            if self.what == "raises in its backward":
                h = _RaiseInBackward.apply(h)
            if self.what == "gives no number":
                h = h * float("nan")
        return self.b(h)


class _RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("it raises in its backward")


_MODELS = [
    "batch norm, training", "batch norm, eval", "spectral norm, training", "convolutions", "attention, batch first",
    "frozen layers",
]  # fmt: skip

_LAYERS = {"observe", "layer_agop", "layer_gradients", "nfa_correlation"}

#: Entries that have no answer for a model: samples that depend on each other have no gradients of their own.
_NO_ANSWER = {
    "batch norm, training": _LAYERS | {"agop", "input_gradients"},
    "spectral norm, training": _LAYERS,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", _MODELS)
def test_every_entry_leaves_the_model_alone(name: str, entry: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, x = _dressed(case.model(torch.float64)), case.samples(_N, 1, torch.float64)
    assert isinstance(x, Tensor)
    y = torch.randn(_N, model(x).shape[1], dtype=torch.float64)
    with torch.no_grad():  # the caller's grad mode is no obstacle either
        before = _snapshot(model, x, y)
        if entry in _NO_ANSWER.get(name, ()):
            with pytest.raises(cx.UnsupportedModule, match=r"couples its samples|there is no AGOP of"):
                ENTRIES[entry](model, x, y, tmp_path)
        else:
            ENTRIES[entry](model, x, y, tmp_path)
        _assert_same(before, _snapshot(model, x, y))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("raises", 1),
        ("raises", 2),
        ("raises", 4),
        ("raises in its backward", 1),
        ("raises in its backward", 2),
        ("gives no number", 1),
        ("gives no number", 2),
    ],
)
def test_an_exception_leaves_the_model_alone(what: str, at: int, entry: str, tmp_path: Path) -> None:
    torch.manual_seed(at)
    model = _dressed(_Strange(what, at))
    sound = _Strange(what, 0)
    sound.load_state_dict(model.state_dict())
    x, y = _data()
    folders = [tmp_path / "model", tmp_path / "sound"]
    for folder in folders:
        folder.mkdir()
    before = _snapshot(model, x, y)
    raised = ""
    try:
        ENTRIES[entry](model, x, y, folders[0])
    except (RuntimeError, ArithmeticError) as error:
        raised = str(error)
    if what == "gives no number":
        assert not raised or "not finite" in raised
    else:
        assert raised in ("", f"it {what}")
    if (
        what == "raises"
    ):  # not every output is differentiated, and autograd passes on whatever numbers it gets
        assert bool(raised) == (next(model.calls) > at)
    _assert_same(before, _snapshot(model, x, y))
    # The same call again: nothing of the first is left.
    model.at = 0
    for got, expected in zip(
        ENTRIES[entry](model, x, y, folders[0]), ENTRIES[entry](sound, x, y, folders[1]), strict=True
    ):
        assert torch.equal(got, expected)
    _assert_same(before, _snapshot(model, x, y))


def _writes_to_a_parameter() -> nn.Module:
    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.bias.add_(0.0)
            return super().forward(x)

    return Writes(32, 1)


#: Modules that are refused, and why.
_REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(32, 8), nn.Dropout(), nn.Linear(8, 1)), "draws random"),
    "writes to a parameter": (_writes_to_a_parameter, "wrote to the parameter"),
    "max_norm": (lambda: nn.Sequential(nn.Linear(32, 1), nn.Embedding(3, 1, max_norm=1.0)), "max_norm"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", _REFUSED)
def test_a_refused_module_is_left_alone(name: str, entry: str, tmp_path: Path) -> None:
    made, message = _REFUSED[name]
    model, (x, y) = _dressed(made().double()), _data()
    before = _snapshot(model, x, y)
    with pytest.raises(cx.UnsupportedModule, match=message):
        ENTRIES[entry](model, x, y, tmp_path)
    after = _snapshot(model, x, y)
    if name == "writes to a parameter":  # its own doing
        after["rest"]["versions"] = before["rest"]["versions"]
    _assert_same(before, after)


@pytest.mark.parametrize("commit", ["step_", "assign_grads_"])
def test_a_step_commits_buffer_updates_once(commit: str) -> None:
    model = make("batch norm, training", 4)
    reference = copy.deepcopy(model)
    x, y = _data()
    reference(x)
    observation = cx.observe(model, x, y)
    before = model[1].running_mean.clone()
    observation.gradients()
    assert torch.equal(model[1].running_mean, before)
    if commit == "step_":
        observation.step_(0.1)
    else:
        observation.assign_grads_()
        observation.assign_grads_()
    for got, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, expected)


def test_assign_grads_feeds_an_optimizer() -> None:
    model, x_y = make("unused layer", 4), _data()
    reference = copy.deepcopy(model)
    (reference(x_y[0]) - x_y[1]).square().mean().backward()
    model.idle.weight.grad = torch.ones_like(model.idle.weight)
    cx.observe(model, *x_y).assign_grads_()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-14)


# ---- what an Observer was made with


def _two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double().eval()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(5, 4).double())),
            "0.weight was replaced",
        ),
        (lambda m: setattr(m[3], "bias", None), "3.bias was replaced"),
        (lambda m: m.append(nn.Linear(1, 1).double()), "4 was replaced, added or removed"),
        (lambda m: m.__setitem__(2, nn.ReLU()), "2 was replaced"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "0.weight was"),
    ],
)
def test_a_model_that_is_made_of_other_parts_now(
    change: Callable[[nn.Module], Any], what: str, kernel: bool
) -> None:
    model = _two_layers()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    observer = cx.Observer(model, kernel=kernel)
    observer(x, y)
    change(model)
    with pytest.raises(ValueError, match=f"model: {what}.*make a new Observer"):
        observer(x, y)
    assert cx.Observer(model)(x, y).kernel is not None


def test_members_in_another_order_are_the_same() -> None:
    model = _two_layers()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    observer = cx.Observer(model, kernel=False)
    gradients = observer(x, y).gradients()
    weight = model[0].weight
    del model[0].weight
    model[0].weight = weight  # behind the bias now
    for name, gradient in observer(x, y).gradients().items():
        assert torch.equal(gradient, gradients[name])


def test_a_parameter_that_trains_now() -> None:
    model = _two_layers()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    model[0].weight.requires_grad_(False)
    all_that_train, one = cx.Observer(model), cx.Observer(model, params=["0.bias"])
    kernel = one(x, y).kernel
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight requires grad now.*make a new Observer"):
        all_that_train(x, y)
    assert torch.equal(one(x, y).kernel, kernel)  # it was told which


def test_buffers_that_were_replaced_stay_so() -> None:
    model = _two_layers()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    observer = cx.Observer(model)
    observer(x, y)
    mean, extra = torch.rand(5).double(), torch.ones(2)
    model[1].running_mean = mean
    model[0].register_buffer("extra", extra)
    assert torch.equal(observer(x, y).kernel, cx.observe(model, x, y).kernel)
    assert model[1].running_mean is mean
    model.train()
    before = mean.clone()
    observer(x, y).step_(0.1)
    assert model[1].running_mean is mean
    assert not torch.equal(mean, before)  # committed by the step
    assert model[0].extra is extra
