"""Largest eigenpairs of the Hessian of the loss against the dense Hessian, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import networks
from hessian_reference import Counter, dense, descending, problem
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext import lanczos

EXACT = sorted(set(networks.EXACT) - {"parametrizations"})  # weight_norm: refused below


def check(found: cx.TopEigh, hessian: Tensor, tol: float = 1e-8) -> None:
    """The largest eigenvalues within tol lambda_1, orthonormal upright vectors, and the residuals they claim."""
    k, exact = len(found.values), descending(hessian)
    size = float(exact[0].abs())
    rounding = 1e-12 * float(exact.abs().max())
    assert (found.values - exact[:k]).abs().max() <= tol * size + rounding
    assert (found.values.diff() <= 0).all()
    norms = (hessian @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (found.residuals <= tol * size + rounding).all()
    assert (norms - found.residuals).abs().max() <= 1e-2 * tol * size + rounding
    assert (found.vectors.T @ found.vectors - torch.eye(k)).abs().max() <= 1e-10
    largest = found.vectors.gather(0, found.vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("name", EXACT)
def test_every_network_agrees_with_the_dense_hessian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem(name)
    found = [cx.hessian_top(model, x, y, k) for k in (1, 3)]
    # The dense Hessian is taken of other parameters, which the recomputation behind a checkpoint would not see.
    monkeypatch.setattr(
        networks.situations, "checkpoint", lambda function, value, use_reentrant: function(value)
    )
    hessian = dense(model, x, y, vectorize=name == "checkpoint")  # quicker, but not for every network
    for top in found:
        check(top, hessian)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    n=st.integers(1, 6),
    c=st.integers(1, 3),
    k=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1.0, 30.0, -300.0]),
    seed=st.integers(0, 2**31),
)
def test_random_networks(widths: list[int], n: int, c: int, k: int, scale: float, seed: int) -> None:
    """Large targets make the part of the Hessian that is proportional to the residuals, of either sign, dominate."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.LazyLinear(width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.LazyLinear(c))
    x = torch.randn(n, 3)
    model(x)
    model, x = model.double(), x.double()
    y = scale * torch.rand(n, c, dtype=torch.float64)
    hessian = dense(model, x, y)
    assume(k <= len(hessian))
    check(cx.hessian_top(model, x, y, k), hessian)


class Powers(nn.Module):
    """f_i = w_i^2 / 2: the Hessian is diagonal, 2 / n (w_i^2 + r_i), and any spectrum can be had."""

    def __init__(self, n: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.square() / 2 + 0 * x.sum(1)


def powers(diagonal: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """Model, x and y whose Hessian has this diagonal."""
    n = len(diagonal)
    return Powers(n, diagonal.dtype), torch.zeros(n, 1, dtype=diagonal.dtype), -diagonal * n / 2


def test_the_largest_is_algebraic() -> None:
    diagonal = torch.tensor([-1e3, 1.0, -40.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    model, x, y = powers(diagonal)
    assert torch.allclose(dense(model, x, y), torch.diag(diagonal), rtol=1e-14, atol=0)
    found = cx.hessian_top(model, x, y, 3)
    assert torch.allclose(found.values, torch.tensor([1.0, 0.5, 0.25]).double(), rtol=1e-8, atol=1e-11)
    every = cx.hessian_top(model, x, y, 6)
    assert torch.allclose(every.values, diagonal.sort(descending=True).values, rtol=1e-12, atol=1e-11)


def test_no_positive_curvature() -> None:
    model, x, y = powers(torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64))
    assert abs(cx.hessian_top(model, x, y).values.item() + 1) <= 1e-8
    model, x, y = powers(torch.tensor([-3.0, 0.0, -2.0], dtype=torch.float64))
    assert abs(cx.hessian_top(model, x, y).values.item()) <= 1e-12
    model, x, y = powers(torch.zeros(4, dtype=torch.float64))
    found = cx.hessian_top(model, x, y, 2)
    assert torch.equal(found.values, torch.zeros(2).double())
    assert torch.equal(found.residuals, torch.zeros(2).double())


def test_repeated_eigenvalues() -> None:
    model, x, y = powers(torch.tensor([2.0, 2.0, 2.0, 1.0, -5.0], dtype=torch.float64))
    found = cx.hessian_top(model, x, y, 4)
    assert torch.allclose(found.values, torch.tensor([2.0, 2, 2, 1]).double(), rtol=1e-8)


class Apart(nn.Module):
    """Output 0 has all of the tangent kernel, output 1 all of the curvature: J^T u has no part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.zeros(5).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.a, self.b.square().sum() + 0 * x[:, 0]], 1)


def test_an_eigenvector_that_the_kernel_does_not_know() -> None:
    model, x = Apart(), torch.randn(4, 3, dtype=torch.float64)
    y = torch.stack([x.sum(1), torch.full((4,), -50.0).double()], 1)
    hessian = dense(model, x, y)
    exact = descending(hessian)
    assert exact[0] > 1.5 * exact[5]  # five times the curvature of output 1, then that of output 0
    check(cx.hessian_top(model, x, y), hessian)


@settings(max_examples=20, deadline=None)
@given(index=st.integers(0, 60), seed=st.integers(0, 100), columns=st.integers(1, 3))
def test_any_start_leads_to_the_same_pairs(index: int, seed: int, columns: int) -> None:
    model, x, y = problem("token-major rows", seed)
    hessian = dense(model, x, y)
    wrong = torch.linalg.eigh(hessian).eigenvectors[:, index : index + columns]
    check(cx.hessian_top(model, x, y, 2, start=wrong), hessian)


def test_tolerance_and_start_decide_the_cost() -> None:
    model, x, y = problem("token-major rows")
    counted = Counter(model)
    exact = descending(dense(model, x, y))[0]
    cost = {}
    for tol in (1e-2, 1e-5, 1e-11):
        found = cx.hessian_top(counted, x, y, tol=tol)
        cost[tol] = counted.taken()
        assert found.residuals[0] <= tol * exact
        assert (found.values[0] - exact).abs() <= tol * exact
    assert 2 <= cost[1e-2] < cost[1e-5] < cost[1e-11] <= sum(p.numel() for p in model.parameters())
    warm = cx.hessian_top(counted, x, y, start=found, tol=1e-2)
    assert counted.taken() <= cost[1e-2]
    same = cx.hessian_top(counted, x, y, start=found.vectors, tol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(warm, same, strict=True))


def test_float32_is_right_to_its_tolerance() -> None:
    model, x, y = problem("three outputs, convolution")
    exact = descending(dense(model, x, y))
    found = cx.hessian_top(model.float(), x.float(), y.float(), 3)
    assert found.values.dtype == found.vectors.dtype == found.residuals.dtype == torch.float32
    assert (found.values.double() - exact[:3]).abs().max() <= 1e-4 * exact[0]
    assert (found.residuals <= 1e-4 * found.values[0]).all()


def test_long_float32_vectors_are_measured_in_float64() -> None:
    """A float32 dot product of millions of entries is off by 1e-4, and with it every eigenvalue."""
    diagonal = torch.cat([torch.full((1_500_000,), 0.5), torch.ones(1_500_000)])
    model, x, y = powers(diagonal)
    found = cx.hessian_top(model, x, y, start=torch.rand(len(diagonal), 1) + 0.5, tol=1e-3)
    assert abs(found.values.item() - 1) <= 2e-6
    assert abs(float(found.vectors.double().norm()) - 1) <= 1e-6


def test_a_restart_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "_LARGEST_BASIS", 8)  # then 32 + 4 k vectors at most
    diagonal = torch.linspace(-1, 1, 400, dtype=torch.float64)
    model, x, y = powers(diagonal)
    counted = Counter(model)
    found = cx.hessian_top(counted, x, y, 2)
    assert counted.taken() > 40
    assert torch.allclose(found.values, diagonal.flip(0)[:2], rtol=0, atol=1e-8)


def test_what_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "_LARGEST_BASIS", 8)
    diagonal = 1 - torch.linspace(0, 1, 1500, dtype=torch.float64).square() * 1e-3
    model, x, y = powers(diagonal)
    with pytest.warns(RuntimeWarning, match=r"hessian_top: \d of 2 eigenpairs have not converged") as warned:
        found = cx.hessian_top(model, x, y, 2, tol=1e-13)
    assert Path(warned[0].filename) == Path(__file__)
    norms = (diagonal[:, None] * found.vectors - found.vectors * found.values).norm(dim=0)
    assert norms.max() > 1e-13
    assert torch.allclose(found.residuals, norms, rtol=1e-3)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (diagonal - value).abs().min() <= residual + 1e-15


# ---- what has no Hessian


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0].square()


class _Detached(_Cube):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (3 * grad * ctx.saved_tensors[0].square()).detach()


class _Twisted(_Cube):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].flip(1)


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.last, self.function = nn.Linear(32, 4), nn.Linear(4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function.apply(self.a(x)))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: Applied(_Cube), cx.UnsupportedModule, "marked once_differentiable"),
        (lambda: Applied(_Detached), cx.UnsupportedModule, "gradient of a.weight cannot be differentiated"),
        (lambda: Applied(_Twisted), cx.UnsupportedModule, "not symmetric"),
        (lambda: networks.EXACT["parametrizations"](), cx.UnsupportedModule, "weight_norm.* constant"),
        (lambda: networks.Checkpointed(True), cx.UnsupportedModule, "use_reentrant=False"),
        (lambda: nn.Sequential(nn.Linear(32, 1), nn.Dropout(0.5)), cx.UnsupportedModule, r"model.eval\(\)"),
    ],
)
def test_refused_with_a_reason(model: Any, error: type[Exception], message: str) -> None:
    network = model().double()
    x, y = torch.randn(6, 32, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    start = torch.ones(sum(p.numel() for p in network.parameters()), 1, dtype=torch.float64)
    state = torch.get_rng_state()
    for begin in (None, start):
        with pytest.raises(error, match=message):
            cx.hessian_top(network, x, y, start=begin)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_finite_is_raised() -> None:
    x, y = torch.randn(6, 32, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    model = nn.Linear(32, 1).double()
    with torch.no_grad():
        model.weight[0, 3] = math.inf
    with pytest.raises(cx.NonFinite, match="output is not finite"):
        cx.hessian_top(model, x, y)


@pytest.mark.parametrize("name", ["batch norm, training", "batch norm, eval", "attention, batch first"])
def test_the_model_is_left_as_found(name: str) -> None:
    model, x, y = problem(name)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads, versions = [p.grad.clone() for p in model.parameters()], [p._version for p in model.parameters()]
    random, training = torch.get_rng_state(), model.training
    with torch.no_grad():
        cx.hessian_top(model, x, y)
        assert len(cx.observe(model, x, y, hessian=True).hessian.values) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training == training


MODEL = nn.Linear(32, 1).double()
X, Y = torch.zeros(5, 32, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cx.hessian_top(MODEL, X, Y, 0), ValueError, "k: expected an integer from 1 to 33, got 0"),
        (lambda: cx.hessian_top(MODEL, X, Y, 34), ValueError, "k: expected an integer from 1 to 33, got 34"),
        (lambda: cx.hessian_top(MODEL, X, Y, tol=0.0), ValueError, "tol: expected a positive number"),
        (lambda: cx.hessian_top(MODEL, X, Y, tol=math.nan), ValueError, "tol: expected a positive number"),
        (lambda: cx.hessian_top(MODEL, X, Y, start=X), ValueError, r"start: expected shape \(33, columns\)"),
        (
            lambda: cx.hessian_top(MODEL, X, Y, start=torch.zeros(33, 1)),
            TypeError,
            "start: expected torch.float64",
        ),
        (
            lambda: cx.hessian_top(MODEL, X, Y, start=torch.full((33, 1), math.nan).double()),
            ValueError,
            "start: expected finite",
        ),
        (lambda: cx.hessian_top(MODEL, X, Y, start=[1]), TypeError, "start: expected a tensor or a TopEigh"),
        (lambda: cx.hessian_top(MODEL, X, Y[:4]), ValueError, r"y: expected shape \(n, c\) = \(5, 1\)"),
        (lambda: cx.hessian_top(MODEL, X[:0], Y), ValueError, "x: expected at least one sample"),
        (lambda: cx.observe(MODEL, X, Y).hessian, ValueError, "made with hessian=False"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
