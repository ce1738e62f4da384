"""The Hessian's largest eigenvalue at every step of a training."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import torch
from hessian_reference import Counter, dense, descending, problem

import catapult_ext as cx


@pytest.mark.parametrize("kernel", [True, False])
def test_the_observer_tracks_it(kernel: bool) -> None:
    torch.manual_seed(0)
    model = cx.models.FCN(8, 64, 3, 2).double()
    x, y = torch.randn(10, 8, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    observer = cx.Observer(model, k=2, kernel=kernel, hessian=True)
    for _ in range(4):
        observation = observer(x, y)
        found, exact = observation.hessian, cx.hessian_top(model, x, y)
        assert found is observation.hessian
        assert found.residuals[0] <= 1e-2 * found.values[0]
        assert (found.values - exact.values).abs() <= 1e-3 * exact.values
        resumed = cx.Observer(model, k=2, kernel=kernel, hessian=True)
        resumed.load_state_dict(observer.state_dict())
        observation.step_(0.1)
        twice = observer(x, y).hessian, resumed(x, y).hessian
        assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    observation = observer(x, y)
    observation.step_(0.1)
    with pytest.raises(ValueError, match="hessian: this observation has made its step"):
        _ = observation.hessian
    observation = observer(x, y)
    x += 1
    with pytest.raises(ValueError, match="hessian: x or y has changed"):
        _ = observation.hessian


def test_the_observer_keeps_to_its_parameters() -> None:
    model, x, y = problem("layer norm")
    part = cx.observe(model, x, y, params=["0.weight"], hessian=True).hessian
    for name, p in model.named_parameters():
        p.requires_grad_(name == "0.weight")
    exact = descending(dense(model, x, y))[0]
    assert part.vectors.shape == (256, 1)
    assert (part.values[0] - exact).abs() <= 1e-3 * exact


def _catapult(name: str, root: Path | None, steps: int, starts: tuple[str, ...]) -> None:
    data = cx.data.load(name, classes=(7, 9), train=128, validation=0, test=0, root=root, seed=0)
    x, y = data.train.x, data.train.y
    generator = torch.Generator().manual_seed(10_000)
    model = Counter(cx.models.FCN(x[0].numel(), 1024, 5, 1, generator=generator))
    observer = cx.Observer(model, hessian=True)
    rate, losses = 0.0, []
    last: cx.TopEigh | None = None
    products: dict[str, list[int]] = {start: [] for start in starts}
    for step in range(steps):
        observation = observer(x, y)
        rate = rate or 6 / 3.6 * float(observation.critical_lr)
        losses.append(float(observation.loss))
        found = []
        for start in starts:
            if start == "kernel":
                found.append(observation.hessian)
            else:
                last = cx.hessian_top(model, x, y, start=last, tol=1e-2)
                found.append(last)
            products[start].append(model.taken())
        if step % 3 == 0:
            exact = cx.hessian_top(model, x, y, start=found[-1], tol=5e-4).values
            model.taken()
        for top in found:
            assert top.residuals[0] <= 1e-2 * top.values[0]
            assert step % 3 or (top.values / exact - 1).abs() <= 1e-4
        observation.step_(rate)
    assert max(losses) > 2 * losses[0] > 2.5 * losses[-1], losses  # there was a catapult
    for counts in products.values():
        assert statistics.median(counts) == 2, products
        assert max(counts) <= 4, products


def test_few_products_a_step_through_a_catapult() -> None:
    _catapult("digits", None, 18, ("kernel",))


@pytest.mark.slow
@pytest.mark.skipif(
    "CATAPULT_DATA" not in os.environ, reason="CATAPULT_DATA is unset: no CIFAR-10 to train on"
)
def test_few_products_a_step_through_the_catapult_of_figure_3a() -> None:
    _catapult("cifar10", Path(os.environ["CATAPULT_DATA"]), 24, ("kernel", "last step"))
