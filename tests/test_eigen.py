"""The public functions on top of the eigensolvers: top_eigh, spectral_norm, critical_lr, decompose_loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import catapult_ext as cx


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gram(n: int, d: int, seed: int = 0) -> Tensor:
    x = normal(n, d, seed=seed)
    return x @ x.T / d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (40, 3), (500, 4)])
def test_top_eigh_is_the_head_of_eigh(n: int, k: int, dtype: torch.dtype) -> None:
    kernel = gram(n, 60).to(dtype)
    values = torch.linalg.eigvalsh(kernel.double()).flip(0)
    bound = (1e-6 if dtype == torch.float32 else 1e-12) * values[0]
    found = cx.top_eigh(kernel, k)
    assert isinstance(found, cx.TopEigh)
    assert found.values.dtype == found.vectors.dtype == found.residuals.dtype == dtype
    assert found.vectors.shape == (n, k)
    assert (found.values - values[:k]).abs().max() <= bound
    pairs = kernel.double() @ found.vectors.double() - found.vectors.double() * found.values.double()
    assert pairs.norm(dim=0).max() <= 1.2 * bound
    assert (found.residuals <= 1.2 * bound).all()


def test_the_largest_algebraic_eigenvalues_count() -> None:
    kernel = -gram(30, 60)
    values = torch.linalg.eigvalsh(kernel).flip(0)
    assert torch.allclose(cx.top_eigh(kernel, 5).values, values[:5], rtol=0, atol=1e-13 * values.abs().max())


def test_start_may_be_a_result_or_its_vectors() -> None:
    kernel = gram(450, 60)
    cold = cx.top_eigh(kernel, 3)
    drifted = kernel + 1e-3 * gram(450, 60, seed=1)
    warm, also = cx.top_eigh(drifted, 3, start=cold), cx.top_eigh(drifted, 3, start=cold.vectors)
    assert all(torch.equal(a, b) for a, b in zip(warm, also, strict=True))
    fresh = cx.top_eigh(drifted, 3)
    assert (warm.values - fresh.values).abs().max() <= 1e-12 * fresh.values[0]
    assert (warm.vectors - fresh.vectors).abs().max() <= 1e-9


def test_tolerance_bounds_the_residuals() -> None:
    kernel = gram(600, 60)
    loose, tight = cx.top_eigh(kernel, 4, tol=1e-3), cx.top_eigh(kernel, 4, tol=1e-11)
    assert (loose.residuals <= 1e-3 * loose.values[0]).all()
    assert (tight.residuals <= 1e-11 * tight.values[0]).all()


def test_spectral_norm_of_minibatches() -> None:
    kernel = gram(60, 80)
    rows = torch.stack(
        [torch.randperm(60, generator=torch.Generator().manual_seed(s))[:20] for s in range(9)]
    )
    batches = kernel[rows[:, :, None], rows[:, None, :]].reshape(3, 3, 20, 20)
    exact = torch.linalg.eigvalsh(batches)[..., -1]
    assert torch.allclose(cx.spectral_norm(batches), exact, rtol=1e-12, atol=0)
    assert torch.allclose(cx.spectral_norm(batches.float()).double(), exact, rtol=1e-6, atol=0)
    rates = cx.critical_lr(batches, momentum=0.9)
    assert torch.allclose(rates, 1.9 * 20 / exact, rtol=1e-12, atol=0)


def test_critical_rate_separates_descent_from_growth() -> None:
    """On a linear model (loss: mean of squares, no factor 1/2) gradient descent grows just above the rate."""
    x, y = normal(12, 30, seed=1) / 30**0.5, normal(12, 1, seed=2)
    rate = float(cx.critical_lr(x @ x.T))
    for factor, grows in ((0.99, False), (1.01, True)):
        w = torch.zeros(30, 1, dtype=torch.float64)
        first = (x @ w - y).square().mean()
        for _ in range(2000):
            w = w - factor * rate * (2 / 12) * (x.T @ (x @ w - y))
        assert bool((x @ w - y).square().mean() > first) == grows


def test_momentum_raises_the_critical_rate() -> None:
    x, y, momentum = normal(9, 20, seed=3) / 20**0.5, normal(9, 1, seed=4), 0.8
    rate = float(cx.critical_lr(x @ x.T, momentum=momentum))
    for factor, grows in ((0.97, False), (1.03, True)):
        w = velocity = torch.zeros(20, 1, dtype=torch.float64)
        first = (x @ w - y).square().mean()
        for _ in range(400):
            velocity = momentum * velocity - factor * rate * (2 / 9) * (x.T @ (x @ w - y))
            w = w + velocity
        assert bool((x @ w - y).square().mean() > first) == grows


def test_no_curvature_means_no_critical_rate() -> None:
    assert cx.critical_lr(torch.zeros(3, 3)).item() == math.inf
    assert torch.equal(
        cx.critical_lr(torch.stack([torch.zeros(2, 2), torch.eye(2)])), torch.tensor([math.inf, 2.0])
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    c=st.integers(1, 4),
    share=st.floats(0, 1),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**31),
    double=st.booleans(),
)
def test_decompose_loss(n: int, c: int, share: float, exponent: int, seed: int, double: bool) -> None:
    rows, dtype = n * c, torch.float64 if double else torch.float32
    k = round(share * rows)
    vectors = torch.linalg.qr(normal(rows, rows, seed=seed))[0][:, :k]
    residual = normal(n, c, seed=seed + 1) * 10.0**exponent
    top, rest = cx.decompose_loss(residual.to(dtype), vectors.to(dtype))
    total = residual.square().mean()
    coefficients = vectors.T @ residual.reshape(-1)
    bound = (1e-12 if double else 1e-5) * total
    assert top.dim() == rest.dim() == 0
    assert top >= 0
    assert rest >= 0
    assert (top + rest - total).abs() <= bound
    assert (top - coefficients.square().sum() / rows).abs() <= bound
    if k == rows:
        assert rest <= (1e-26 if double else 1e-11) * total
    flat = cx.decompose_loss(residual.to(dtype).reshape(-1), vectors.to(dtype))
    assert torch.equal(torch.stack(flat), torch.stack([top, rest]))


def test_the_rest_keeps_its_digits_under_a_spike() -> None:
    """Subtracting squares would leave nothing of a rest that is 1e-10 of the loss in float32."""
    vectors = torch.linalg.qr(normal(50, 50, seed=5))[0]
    residual = 1e5 * vectors[:, 0] + vectors[:, 1]
    _, rest = cx.decompose_loss(residual.float(), vectors[:, :1].float())
    assert abs(float(rest) * 50 - 1) < 0.1


def test_split_by_kernel_eigenvectors_of_several_outputs() -> None:
    kernel, residual = gram(12, 40), normal(4, 3, seed=6)
    eigen = cx.top_eigh(kernel, 5)
    top, rest = cx.decompose_loss(residual, eigen.vectors)
    _, q = torch.linalg.eigh(kernel)
    parts = (q.flip(1).T @ residual.reshape(-1)).square() / 12
    assert torch.allclose(
        torch.stack([top, rest]), torch.stack([parts[:5].sum(), parts[5:].sum()]), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cx.critical_lr(torch.eye(2), momentum=1.0), ValueError, r"momentum: expected .* got 1.0"),
        (
            lambda: cx.critical_lr(torch.eye(2), momentum=math.nan),
            ValueError,
            r"momentum: expected .* got nan",
        ),
        (lambda: cx.critical_lr(torch.zeros(0, 0)), ValueError, r"kernel: expected at least one row"),
        (lambda: cx.critical_lr(torch.zeros(2, 3)), ValueError, r"kernel: expected shape"),
        (lambda: cx.critical_lr(torch.full((2, 2), math.nan)), cx.NonFinite, r"NaN or an infinity"),
        (lambda: cx.top_eigh(torch.eye(2), 3), ValueError, r"k: expected .* from 0 to 2, got 3"),
        (
            lambda: cx.decompose_loss(torch.zeros(3, 1), torch.zeros(2, 1)),
            ValueError,
            r"vectors: expected shape \(3, k\)",
        ),
        (
            lambda: cx.decompose_loss(torch.zeros(3, 1), torch.zeros(3)),
            ValueError,
            r"vectors: expected shape",
        ),
        (lambda: cx.decompose_loss(torch.zeros(0, 1), torch.zeros(0, 1)), ValueError, r"residual: expected"),
        (
            lambda: cx.decompose_loss(torch.zeros(1, 3, 1), torch.zeros(3, 1)),
            ValueError,
            r"residual: expected shape",
        ),
        (
            lambda: cx.decompose_loss(torch.zeros(3), torch.zeros(3, 1).double()),
            TypeError,
            r"vectors: expected torch.float32",
        ),
    ],
)
def test_wrong_arguments_are_named(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()
