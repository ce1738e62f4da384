"""The long-lived observer: plans for several batch sizes, warm starts, state."""

from __future__ import annotations

import copy

import brute_force
import pytest
import torch
from networks import make

import catapult_ext as cx


def _batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 32, dtype=torch.float64, generator=generator),
        torch.randn(n, 1, dtype=torch.float64, generator=generator),
    )


def test_ragged_batches_and_a_changing_network() -> None:
    model = make("attention, batch first", 0)
    observer = cx.Observer(model, k=2)
    for step, n in enumerate([5, 5, 3, 1, 5, 3, 4]):
        x, y = _batch(n, step)
        observation = observer(x, y)
        expected = brute_force.kernel_of(brute_force.jacobian(model, x))
        assert brute_force.relative(observation.kernel, expected) <= 1e-10
        values = torch.linalg.eigvalsh(expected).flip(0)[: min(2, n)]
        assert torch.allclose(observation.eigen.values, values, rtol=1e-10, atol=1e-12 * float(values[0]))
        observation.step_(0.01)


def test_a_parameter_that_freezes_on_the_way() -> None:
    model = make("in-place relu", 0)
    observer = cx.Observer(model)
    x, y = _batch(4, 0)
    observer(x, y)
    model[0].weight.requires_grad_(False)
    observation = cx.observe(model, x, y)
    rows = brute_force.jacobian(model, x)
    assert "0.weight" not in rows
    assert brute_force.relative(observation.kernel, brute_force.kernel_of(rows)) <= 1e-10
    kernel = observer(x, y).kernel  # the old observer sees a graph without that leaf
    assert brute_force.relative(kernel, brute_force.kernel_of(rows)) <= 1e-10


@pytest.mark.parametrize("name", ["in-place relu", "output (n,)"])
def test_inside_of_no_grad(name: str) -> None:
    model = make(name, 0)
    x, y = _batch(5, 0)
    expected = cx.observe(model, x, y).kernel
    with torch.no_grad():
        assert torch.equal(cx.observe(model, x, y).kernel, expected)


def test_two_observers_of_one_model_agree_bitwise() -> None:
    model = make("convolutions", 0)
    x, y = _batch(6, 1)
    first, second = cx.Observer(model), cx.Observer(model)
    first(x, y)
    a, b = first(x, y), second(x, y)
    assert torch.equal(a.kernel, b.kernel)
    assert torch.equal(a.eigen.vectors, b.eigen.vectors)
    for p, q in zip(a.gradients().values(), b.gradients().values(), strict=True):
        assert torch.equal(p, q)


def test_state_goes_through_a_resume() -> None:
    model = make("in-place relu", 0)
    x, y = _batch(6, 2)
    observer = cx.Observer(model, k=3)
    first = observer(x, y).eigen
    state = observer.state_dict()
    assert torch.equal(state["start"], first.vectors)
    resumed = cx.Observer(model, k=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(x, y).eigen.vectors, observer(x, y).eigen.vectors)
    with pytest.raises(ValueError, match="state: expected the keys 'start' and 'hessian'"):
        resumed.load_state_dict({"begin": None})


def test_the_critical_rate_decides_whether_a_linear_model_diverges() -> None:
    """For a linear model the loss is quadratic: n c / lambda_1 is the exact threshold, with n c in the mean."""
    for c in (1, 3):
        for factor, grows in ((0.95, False), (1.05, True)):
            torch.manual_seed(c)
            model = torch.nn.Linear(4, c, dtype=torch.float64)
            x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, c, dtype=torch.float64)
            observer = cx.Observer(model)
            rate = factor * float(observer(x, y).critical_lr)
            losses = []
            for _ in range(200):
                observation = observer(x, y)
                losses.append(float(observation.loss))
                observation.step_(rate)
            assert (losses[-1] > losses[0]) == grows
            assert cx.critical_lr(observer(x, y).kernel) * factor == pytest.approx(rate)


def test_a_step_on_samples_that_are_the_weights_themselves() -> None:
    """The update of a layer must not read its own memory while it writes it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    y = torch.randn(40, 1)
    plain = copy.deepcopy(model)
    x = plain[0].weight.detach().clone()
    (plain(x) - y).square().mean().backward()
    expected = [p.detach() - 0.5 * p.grad for p in plain.parameters()]
    cx.observe(model, model[0].weight.detach(), y).step_(0.5)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted)
