"""An observation leaves the model as it found it; a step commits what the forward changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import make
from torch import Tensor, nn

import catapult_ext as cx


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
        "versions": [p._version for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [
            len(h)
            for m in model.modules()
            for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ],
        "requires": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def _assert_same(before: dict[str, Any], model: nn.Module) -> None:
    after = _snapshot(model)
    for key in ("identity", "versions", "modes", "hooks", "requires", "grad mode"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


def _data(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 32, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)


def _with_gradients(name: str) -> nn.Module:
    model = make(name, 1)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "name", ["batch norm, training", "convolutions", "attention, batch first", "frozen layers"]
)
def test_every_call_leaves_the_model_alone(name: str) -> None:
    model = _with_gradients(name)
    x, y = _data()
    calls = [
        lambda: cx.observe(model, x, y, k=2).layer_report,
        lambda: cx.ntk(model, x),
        lambda: cx.ntk(model, x, x[:2], per_parameter=True),
        lambda: cx.jacobian(model, x),
        lambda: cx.observe(model, x, y, kernel=False).gradients(),
    ]
    if name != "batch norm, training":
        calls.append(lambda: cx.agop(model, x))
    before = _snapshot(model)
    for call in calls:
        with torch.no_grad():  # the caller's grad mode is no obstacle either
            call()
        _assert_same(before | {"grad mode": torch.is_grad_enabled()}, model)
    assert not x.requires_grad
    assert x.grad is None


class _Fails(nn.Module):
    """Changes a buffer, draws a random number, and raises at a chosen moment."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.a = nn.Linear(32, 4, dtype=torch.float64)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("replaced", torch.zeros(2))
        self.moment = moment

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.replaced = self.replaced + 1
        torch.rand(1)
        h = self.a(x)
        if self.moment == "forward":
            raise RuntimeError("the forward fails")
        if self.moment == "backward":
            h = _RaiseInBackward.apply(h)
        return h.sum(1, keepdim=True)


class _RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("the backward fails")


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_an_exception_passes_through_a_restored_model(moment: str) -> None:
    model = _Fails(moment)
    x, y = _data()
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match=f"the {moment} fails"):
        cx.observe(model, x, y)
    _assert_same(before, model)


def test_drawing_random_numbers_is_refused_and_undone() -> None:
    model = _Fails("never")
    x, y = _data()
    before = _snapshot(model)
    with pytest.raises(cx.UnsupportedModule, match=r"draws random numbers.*model.eval\(\)"):
        cx.observe(model, x, y)
    _assert_same(before, model)


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
