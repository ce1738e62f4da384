"""Observers whose passes are captured, where there is no GPU: a stand-in runs them again into the same memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import captured_cases
import pytest
import torch
from captured_cases import OneMemory, close, compare_captured, compare_models, data
from networks import EXACT, make
from torch import Tensor, nn

import catapult_ext as cx

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda make=make: make().double()) for name, make in captured_cases.MODELS.items()},
    **{name: partial(make, name, 0) for name in EXACT if name != "shuffled samples"},
}


@pytest.fixture(autouse=True)
def _without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    captured_cases.without_a_device(monkeypatch)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_observations_are_those_of_an_observer(name: str, kernel: bool) -> None:
    compare_captured(MODELS[name](), kernel=kernel)
    assert OneMemory.made == 1


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("agop", [True, "layers", "all"])
@pytest.mark.parametrize("name", ["fcn", "cnn", "cnn, three outputs"])
def test_agops(name: str, agop: Any, kernel: bool) -> None:
    model = MODELS[name]()
    observer, other = (cx.Observer(model, agop=agop, kernel=kernel, captured=c) for c in (True, False))
    found, expected = [], []
    for seed in (1, 2, 3):
        x, y = data(model, seed)
        for results, seen in ((found, observer(x, y)), (expected, other(x, y))):
            results.append([] if agop == "layers" else [seen.agop, seen.input_gradients])
            if agop != True:  # noqa: E712
                for factored in (False, True):
                    results[-1] += seen.layer_agop(factored=factored).values()
                results[-1] += seen.layer_gradients().values()
    for own, others in zip(found, expected, strict=True):
        assert len(own) == len(others)
        assert len(own) > 0
        for tensor, reference in zip(own, others, strict=True):
            close(tensor, reference)


def test_what_the_next_pass_overwrites_is_refused_behind_it() -> None:
    model = MODELS["fcn"]()
    observer = cx.Observer(model, agop="layers", captured=True)
    first = observer(*data(model, 0))
    kernel = cx.observe(model, *data(model, 0)).kernel
    observer(*data(model, 1))
    for call in (first.gradients, first.assign_grads_, first.layer_gradients, lambda: first.step_(0.1)):
        with pytest.raises(ValueError, match="a later pass has overwritten the captured one's features"):
            call()
    close(first.kernel, kernel)
    assert first.top_loss + first.rest_loss == pytest.approx(float(first.loss))


def test_any_optimizer_takes_the_gradients() -> None:
    model = MODELS["cnn"]()
    eager = copy.deepcopy(model)
    steps = [
        (m, cx.Observer(m, captured=c), torch.optim.Adam(m.parameters(), 1e-3))
        for m, c in ((model, True), (eager, False))
    ]
    for seed in range(4):
        for m, observer, optimizer in steps:
            observer(*data(m, seed)).assign_grads_()
            optimizer.step()
    compare_models(model, eager)
    observer(*data(model, 9))
    for own, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        close(own.grad, theirs.grad)  # no replay reaches them


def test_each_form_is_captured_once_and_four_are_kept() -> None:
    model = MODELS["normalised"]()
    observer = cx.Observer(model, captured=True)
    for _ in range(2):
        for n in (6, 4):
            for mode in (True, False):
                model.train(mode)
                x, y = data(model, n, n)
                close(observer(x, y).kernel, cx.observe(model, x, y).kernel)
    assert OneMemory.made == 4
    x, y = data(model, 0, 5)
    observer(x, y)  # a fifth in place of the one that was used longest ago
    observer(*data(model, 0, 4))
    assert OneMemory.made == 5
    model.train()
    observer(*data(model, 0, 6))
    assert OneMemory.made == 6
    for p in model.parameters():
        p.data = p.data.clone()
    close(observer(x, y.squeeze(1)).kernel, cx.observe(model, x, y).kernel)
    assert OneMemory.made == 7


def test_a_model_that_is_made_of_other_parts_now() -> None:
    model = MODELS["normalised"]()
    observer = cx.Observer(model, captured=True)
    x, y = data(model, 0)
    observer(x, y)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    norm.running_mean = mean = norm.running_mean.clone()
    observer(x, y).step_(0.1)
    assert OneMemory.made == 2
    assert norm.running_mean is mean
    close(observer(x, y).kernel, cx.observe(model, x, y).kernel)
    norm.weight = nn.Parameter(norm.weight.detach() * 2)
    with pytest.raises(ValueError, match="weight was replaced, added or removed"):
        observer(x, y)


def test_a_capture_leaves_the_model_as_found() -> None:
    model = MODELS["normalised"]()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before, random = copy.deepcopy(model), torch.get_rng_state()
    observer = cx.Observer(model, captured=True)
    for seed in range(3):
        observer(*data(model, seed))
    for own, other in zip(
        (*model.parameters(), *model.buffers()), (*before.parameters(), *before.buffers()), strict=True
    ):
        assert torch.equal(own, other)
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_capture_lets_observations_before_it_make_their_step() -> None:
    model = MODELS["normalised"]()
    eager = copy.deepcopy(model)
    seen = cx.observe(model, *data(model, 0))
    cx.Observer(model, captured=True)(*data(model, 1))
    seen.step_(0.1)
    cx.observe(eager, *data(model, 0)).step_(0.1)
    compare_models(model, eager)


def test_hessian() -> None:
    model = MODELS["fcn"]()
    observer, other = (cx.Observer(model, hessian=True, captured=c) for c in (True, False))
    for seed in range(2):
        x, y = data(model, seed)
        close(observer(x, y).hessian.values, other(x, y).hessian.values)


def test_a_model_that_depends_on_more_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(32, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) / self.calls

    with pytest.raises(cx.UnsupportedModule, match="a replay of its step gives something else"):
        cx.Observer(Counting().double(), captured=True)(
            torch.randn(6, 32).double(), torch.randn(6, 1).double()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "always"}, "captured: expected False with verify='always', got True"),
        ({"max_bytes": 10**9}, "captured: expected False with max_bytes=1000000000, got True"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cx.Observer(MODELS["fcn"](), captured=True, **options)


def test_a_captured_pass_needs_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="model: expected a model on a CUDA device for captured, got one on cpu"
    ):
        cx.Observer(MODELS["fcn"](), captured=True)


def test_arguments_that_do_not_fit() -> None:
    model = MODELS["fcn"]()
    x, y = data(model, 0)
    observer = cx.Observer(model, captured=True)
    observer(x, y)
    for arguments, error, message in (
        ((x, y[:5]), ValueError, r"y: expected shape \(n, c\) = \(6, 1\)"),
        ((x, y.float()), TypeError, "y: expected torch.float64"),
        ((x.tolist(), y), TypeError, "x: expected a tensor"),
        ((x.to("meta"), y), ValueError, "x: expected a tensor on cpu"),
    ):
        with pytest.raises(error, match=message):
            observer(*arguments)
    assert OneMemory.made == 1


def test_the_stand_in_finds_results_that_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the check: without copies, the next replay changes what was handed out."""
    monkeypatch.setattr(torch, "clone", lambda tensor: tensor)
    model = MODELS["fcn"]()
    observer = cx.Observer(model, captured=True)
    first = observer(*data(model, 0))
    second = observer(*data(model, 1))
    assert first.kernel is not None
    assert torch.equal(first.kernel, second.kernel)
