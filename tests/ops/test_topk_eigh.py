"""Eigensolvers against float64 LAPACK: every method, every SIMD level, and the matrices that break solvers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catapult_ext import _C, NonFinite, ops
from catapult_ext.ops import cpu

DTYPES = [torch.float32, torch.float64]
AUTO, DIRECT, KRYLOV = 0, 1, 2
# Relative to the largest |eigenvalue|: the promise for eigenvalues, orthonormality and residuals.
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """Symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def tangent_kernel(n: int, d: int = 40, width: int = 64, seed: int = 0) -> Tensor:
    """Kernel of a ReLU network with one hidden layer: one eigenvalue stands out, the others decay slowly."""
    x, w = normal(n, d, seed=seed), normal(width, d, seed=seed + 1) / d**0.5
    h = (x @ w.T).clamp_min(0)
    kernel = x @ x.T / d * ((h > 0).double() @ (h > 0).double().T) / width + h @ h.T / width
    return (kernel + kernel.T) / 2


def exact(kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (descending), eigenvectors and the norm of the matrix in the lower triangle."""
    matrix = kernel.double().tril()
    values, vectors = torch.linalg.eigh(matrix + matrix.tril(-1).mT)
    values, vectors = values.flip(-1), vectors.flip(-1)
    return values, vectors, values.abs().amax(-1, keepdim=True)


def solve(
    kernel: Tensor, k: int, method: int, start: Tensor | None = None, tol: float | None = None
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Run one method on [n, n] without the op's choice and fallback, into poisoned results."""
    tol = BOUND[kernel.dtype] if tol is None else tol
    n, dtype = len(kernel), kernel.dtype
    results = tuple(torch.full(shape, math.nan, dtype=dtype) for shape in ((k,), (n, k), (k,)))
    status = cpu._run_topk_eigh(kernel, results, start, tol, method)
    return *results, status or [0]


def check_pairs(kernel: Tensor, values: Tensor, vectors: Tensor, residuals: Tensor) -> None:
    """Eigenvalues, orthonormality, true and reported residuals, order, sign: all that is promised for any matrix."""
    bound, k = BOUND[kernel.dtype], values.shape[-1]
    assert values.dtype == vectors.dtype == residuals.dtype == kernel.dtype
    reference, _, norm = exact(kernel)
    found, v = values.double(), vectors.double()
    assert ((found - reference[..., :k]).abs() <= bound * norm).all()
    assert (found.diff(dim=-1) <= 0).all()
    assert (v.mT @ v - torch.eye(k, dtype=torch.float64)).abs().max() <= bound
    matrix = kernel.double().tril()
    matrix = matrix + matrix.tril(-1).mT
    true = (matrix @ v - v * found.unsqueeze(-2)).norm(dim=-2)
    assert (true <= 1.2 * bound * norm).all()
    assert ((true - residuals.double()).abs() <= bound * norm).all()
    assert torch.equal(v.amax(-2), v.abs().amax(-2))


def check_subspaces(kernel: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Compare the spans of clusters: sin(angle) <= (residual + rounding) / gap to the rest."""
    reference, q, norm = exact(kernel)
    k = values.shape[-1]
    edges = [0, *(i + 1 for i in range(len(reference) - 1) if reference[i] - reference[i + 1] > 1e-3 * norm)]
    checked = 0
    for low, high in itertools.pairwise(edges):
        if high > k:
            break
        gap = min(
            reference[low - 1] - reference[low] if low else math.inf, reference[high - 1] - reference[high]
        )
        outside = vectors[:, low:high].double() - q[:, low:high] @ (
            q[:, low:high].T @ vectors[:, low:high].double()
        )
        assert outside.norm() <= 4 * (high - low) * BOUND[kernel.dtype] * norm / gap
        checked += 1
    assert checked


def spectra(n: int) -> dict[str, Tensor]:
    """Matrices that break eigensolvers, each float64 with a norm near 1."""
    ramp = torch.arange(n, dtype=torch.float64) / n
    clustered = torch.full((n,), 0.1, dtype=torch.float64)
    clustered[: max(1, n // 4)] = 1.0
    low_rank = torch.zeros(n, dtype=torch.float64)
    low_rank[:3] = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)[: min(n, 3)]
    points = normal(max(1, n // 3), 30, seed=3)[torch.arange(n) % max(1, n // 3)] / 10
    outlier = torch.full((n,), 1e-4, dtype=torch.float64) * (1 + ramp)
    outlier[0] = 1.0
    coupled = normal(n, n, seed=4) * 1e-9
    wilkinson = torch.diag((torch.arange(n, dtype=torch.float64) - n // 2).abs() / n) * 2
    wilkinson += torch.diag(torch.ones(n - 1, dtype=torch.float64) / n, 1)
    wilkinson += torch.diag(torch.ones(n - 1, dtype=torch.float64) / n, -1)
    return {
        "decaying": with_spectrum(1 / (1 + torch.arange(n, dtype=torch.float64)) ** 2),
        "two clusters": with_spectrum(clustered, seed=1),
        "rank 3": with_spectrum(low_rank, seed=2),
        "duplicate samples": points @ points.T,
        "outlier of 1e4": with_spectrum(outlier, seed=5),
        "diagonal": torch.diag(ramp),
        "nearly diagonal": torch.diag(ramp) + coupled + coupled.T,
        "zero": torch.zeros(n, n, dtype=torch.float64),
        "identity": torch.eye(n, dtype=torch.float64),
        "negative definite": with_spectrum(-0.5 - 0.5 * ramp, seed=6),
        "indefinite": with_spectrum(torch.linspace(-1, 0.5, n, dtype=torch.float64), seed=7),
        "Wilkinson": wilkinson,
        "constant": torch.ones(n, n, dtype=torch.float64) / n,
        "tangent kernel": tangent_kernel(n),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", spectra(1))
def test_direct_method_on_every_spectrum(name: str, dtype: torch.dtype, simd: str) -> None:
    for n, k in [(1, 1), (2, 1), (5, 2), (31, 31), (33, 7), (64, 64), (127, 10), (129, 40)]:
        kernel = spectra(n)[name].to(dtype)
        *pairs, status = solve(kernel, k, DIRECT)
        assert status == [0]
        check_pairs(kernel, *pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", spectra(1))
def test_krylov_method_is_right_or_says_so(name: str, dtype: torch.dtype, simd: str) -> None:
    kernel = spectra(261)[name].to(dtype)
    for k in (1, 9):
        *pairs, status = solve(kernel, k, KRYLOV)
        if status == [0]:
            check_pairs(kernel, *pairs)
        else:
            assert status == [1]
        assert status == [0] or name in (
            "diagonal",
            "nearly diagonal",
            "negative definite",
            "indefinite",
            "Wilkinson",
        )


@pytest.mark.parametrize("method", [DIRECT, KRYLOV])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_span_the_right_spaces(method: int, dtype: torch.dtype, simd: str) -> None:
    values = torch.cat([torch.tensor([1.0, 0.9, 0.9, 0.9, 0.5, 0.5]), torch.linspace(0.3, 0, 254)]).double()
    kernel = with_spectrum(values, seed=8).to(dtype)
    *pairs, status = solve(kernel, 6, method)
    assert status == [0]
    check_pairs(kernel, *pairs)
    check_subspaces(kernel, *pairs[:2])


@pytest.mark.parametrize("method", [DIRECT, KRYLOV])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_does_not_matter(method: int, scale: float, dtype: torch.dtype) -> None:
    kernel = (spectra(160)["decaying"] * scale).to(dtype)
    *pairs, status = solve(kernel, 4, method)
    assert status == [0]
    check_pairs(kernel, *pairs)
    check_subspaces(kernel, *pairs[:2])
    value = ops.spectral_norm(kernel).double()
    assert (value / scale - 1).abs() <= 2 * BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_finite_entries_overflow_loudly(dtype: torch.dtype) -> None:
    kernel = torch.full((40, 40), torch.finfo(dtype).max, dtype=dtype)
    with pytest.raises(NonFinite, match="topk_eigh"):
        ops.topk_eigh(kernel, 1)
    with pytest.raises(NonFinite, match="spectral_norm"):
        ops.spectral_norm(kernel)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_entries_surface(bad: float, n: int, dtype: torch.dtype) -> None:
    kernel = torch.eye(n, dtype=dtype)
    kernel[n - 1, n // 2] = bad
    for k in {1, n}:
        with pytest.raises(NonFinite, match="topk_eigh: a NaN or an infinity came up in the kernel"):
            ops.topk_eigh(kernel, k)
    with pytest.raises(NonFinite, match="spectral_norm"):
        ops.spectral_norm(kernel)
    with pytest.raises(NonFinite):
        ops.topk_eigh(torch.stack([torch.eye(n, dtype=dtype), kernel]), 1)


@pytest.mark.parametrize("n", [6, 40, 600])
def test_only_the_lower_triangle_is_read(n: int) -> None:
    kernel = tangent_kernel(n)
    poisoned = kernel.tril() + torch.full_like(kernel, math.nan).triu(1)
    for left, right in zip(ops.topk_eigh(kernel, 3), ops.topk_eigh(poisoned, 3), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(ops.spectral_norm(kernel), ops.spectral_norm(poisoned))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_and_strides(dtype: torch.dtype) -> None:
    kernels = torch.stack([tangent_kernel(23, seed=s) for s in range(6)]).to(dtype).reshape(2, 3, 23, 23)
    values, vectors, residuals = ops.topk_eigh(kernels, 4)
    assert values.shape == residuals.shape == (2, 3, 4)
    assert vectors.shape == (2, 3, 23, 4)
    check_pairs(kernels, values, vectors, residuals)
    wide = torch.full((2, 3, 30, 47), math.nan, dtype=dtype)
    wide[..., 3:26, 5:28] = kernels  # offset view with a row stride
    spread = torch.full((2, 3, 23, 46), math.nan, dtype=dtype)
    spread[..., ::2] = kernels  # elements apart
    norms = ops.spectral_norm(kernels)
    assert norms.shape == (2, 3)
    for view in (wide[..., 3:26, 5:28], spread[..., ::2], kernels.mT):
        assert torch.equal(ops.topk_eigh(view, 4)[0], values)
        assert torch.equal(ops.spectral_norm(view), norms)
    repeated = kernels[0, 0].expand(5, 23, 23)
    assert torch.equal(ops.topk_eigh(repeated, 4)[1], vectors[0, 0].expand(5, 23, 4))


def test_large_batches_go_through_krylov_one_by_one() -> None:
    kernels = torch.stack([tangent_kernel(400, seed=s) for s in range(2)]).float()
    start = ops.topk_eigh(kernels, 3)[1]
    values, vectors, residuals = ops.topk_eigh(kernels, 3, start=start)
    check_pairs(kernels, values, vectors, residuals)
    assert (
        (ops.spectral_norm(torch.stack([tangent_kernel(600)])) - exact(tangent_kernel(600))[0][0]).abs()
        < 1e-9
    ).all()


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 4, 4), (2, 0, 5, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    kernel = torch.zeros(shape)
    values, vectors, residuals = ops.topk_eigh(kernel, 0)
    assert values.shape == residuals.shape == (*shape[:-2], 0)
    assert vectors.shape == (*shape[:-1], 0)
    assert torch.equal(ops.spectral_norm(kernel), torch.zeros(shape[:-2]))


def test_no_pairs_of_a_matrix() -> None:
    values, vectors, residuals = ops.topk_eigh(torch.eye(4), 0)
    assert values.shape == residuals.shape == (0,)
    assert vectors.shape == (4, 0)


# --- start ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_start_changes_the_cost_only(dtype: torch.dtype, simd: str) -> None:
    kernel = tangent_kernel(420).to(dtype)
    change = 1 + 0.02 * normal(420, seed=9)
    moved = (change[:, None] * kernel.double() * change).to(dtype)
    start = solve(kernel, 6, KRYLOV)[1]
    *pairs, status = solve(moved, 6, KRYLOV, start=start)
    assert status == [0]
    check_pairs(moved, *pairs)
    check_subspaces(moved, *pairs[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "wrong", ["lower vectors", "zeros", "one vector thrice", "infinite", "tiny", "too many"]
)
def test_no_start_misleads_the_solver(wrong: str, dtype: torch.dtype) -> None:
    """Above all a start that is orthogonal to the largest eigenvectors and invariant under the kernel."""
    kernel = with_spectrum(torch.cat([torch.tensor([1.0, 0.99, 0.98]), torch.linspace(0.9, 0, 397)]).double())
    q = exact(kernel)[1]
    start = {
        "lower vectors": q[:, 3:8],
        "zeros": torch.zeros(400, 5),
        "one vector thrice": q[:, 4:5].expand(400, 3),
        "infinite": torch.full((400, 5), math.inf),
        "tiny": q[:, :5] * 1e-30,
        "too many": q[:, :100].flip(1),
    }[wrong]
    kernel = kernel.to(dtype)
    *pairs, status = solve(kernel, 5, KRYLOV, start=start.to(dtype).contiguous())
    assert status == [0]
    check_pairs(kernel, *pairs)


def test_a_crossing_behind_the_start_is_seen() -> None:
    """The eigenvalue that moves from place k + 1 to place k is not in the start: the guard must find it."""
    values = torch.cat([torch.linspace(1, 0.5, 5), torch.linspace(0.4, 0, 395)]).double()
    before = with_spectrum(values)
    start = solve(before, 5, KRYLOV)[1]
    risen = exact(before)[1][:, 6]
    after = before + 0.2 * torch.outer(risen, risen)
    *pairs, status = solve(after, 5, KRYLOV, start=start)
    assert status == [0]
    check_pairs(after, *pairs)
    assert (pairs[1][:, 4] @ risen).abs() > 1 - 1e-9


def test_without_convergence_the_status_says_so_and_the_op_is_exact() -> None:
    kernel = with_spectrum(torch.linspace(0, 1, 500, dtype=torch.float64)).float()
    *_, status = solve(kernel, 3, KRYLOV, tol=1e-9)  # below the rounding of float32: out of reach
    assert status == [1]
    check_pairs(kernel, *ops.topk_eigh(kernel, 3, tol=1e-9))
    # most of the spectrum of a large matrix is left to LAPACK
    assert solve(kernel, 400, AUTO)[3] == [1]
    check_pairs(kernel, *ops.topk_eigh(kernel, 400))


def test_lapack_failing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    kernel = tangent_kernel(200)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    pairs = ops.topk_eigh(kernel, 150)
    monkeypatch.undo()
    check_pairs(kernel, *pairs)


# --- repeatable ---


@pytest.mark.parametrize(("n", "k"), [(5, 1), (60, 60), (128, 10), (600, 5)])
def test_bitwise_repeatable(n: int, k: int) -> None:
    kernel = tangent_kernel(n).float()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first = ops.topk_eigh(kernel, k)
        for _ in range(3):
            assert all(
                torch.equal(a, b) for a, b in zip(first, ops.topk_eigh(kernel.clone(), k), strict=True)
            )
        assert torch.equal(ops.spectral_norm(kernel), ops.spectral_norm(kernel.clone()))
        check_pairs(kernel, *first)


def test_a_batch_does_not_depend_on_the_threads() -> None:
    kernels = torch.stack([tangent_kernel(30, seed=s) for s in range(7)])
    first, norms = ops.topk_eigh(kernels, 3), ops.spectral_norm(kernels)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(first, ops.topk_eigh(kernels, 3), strict=True))
        assert torch.equal(norms, ops.spectral_norm(kernels))


# --- spectral_norm ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(set(spectra(1)) - {"negative definite", "indefinite"}))
def test_spectral_norm_on_every_spectrum(name: str, dtype: torch.dtype, simd: str) -> None:
    for n in (1, 2, 5, 8, 17, 50, 100, 129):
        kernel = spectra(n)[name].to(dtype)
        reference, _, norm = exact(kernel)
        assert (ops.spectral_norm(kernel).double() - reference[0]).abs() <= BOUND[dtype] * norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [5, 20, 50, 100])
def test_spectral_norm_with_and_without_an_outlier(b: int, dtype: torch.dtype, simd: str) -> None:
    x, z = normal(40, b, b, seed=1), normal(40, b, b + 1, seed=2)
    signed = (x @ x.mT) * (z @ z.mT)  # Wishart products: no eigenvalue stands out
    whole = tangent_kernel(200)
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([torch.randperm(200, generator=generator)[:b] for _ in range(40)])
    batches = whole[rows[:, :, None], rows[:, None, :]]  # the kernels of minibatches
    for kernel in (signed.to(dtype), batches.to(dtype)):
        reference = exact(kernel)[0][:, 0]
        assert ((ops.spectral_norm(kernel).double() - reference).abs() <= BOUND[dtype] * reference).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 9, 30, 100, 400])
def test_start_orthogonal_to_the_top_vector(n: int, dtype: torch.dtype, simd: str) -> None:
    """Lanczos starts at the row sums: here every one of its vectors is orthogonal to the largest eigenvector."""
    alternating = torch.ones(n, dtype=torch.float64)
    alternating[1::2] = -1
    alternating -= alternating.mean()
    alternating /= alternating.norm()
    ones = torch.ones(n, dtype=torch.float64) / n**0.5
    for second in (1.0, 0.999, 0.5):
        kernel = 1.001 * torch.outer(alternating, alternating) + second * torch.outer(ones, ones)
        kernel = (kernel + 1e-3 * torch.eye(n, dtype=torch.float64)).to(dtype)
        reference = exact(kernel)[0][0]
        assert (ops.spectral_norm(kernel).double() - reference).abs() <= BOUND[dtype] * reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 7, 17, 33, 101, 128, 129])
def test_spectral_norms_of_batches_of_every_kind(n: int, dtype: torch.dtype, simd: str) -> None:
    """Matrices that share a group of lanes: steep and flat spectra, rank one, zero, tiny and huge, any count."""
    kinds = [tangent_kernel(max(n, 2), seed=s)[:n, :n] for s in range(3)]
    flat = normal(n, n, seed=4)
    kinds += [flat @ flat.mT, torch.ones(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)]
    kinds += [torch.eye(n, dtype=torch.float64), kinds[0] * 2.0**-60, kinds[1] * 2.0**60]
    for batch in (1, 2, 9, 16, 23, 41):
        kernels = torch.stack([kinds[(3 * b + batch) % len(kinds)] for b in range(batch)]).to(dtype)
        kernels += torch.full((n, n), torch.nan, dtype=dtype).triu(1)  # only the lower triangle counts
        reference = torch.linalg.eigvalsh(kernels.double())[..., -1]
        got = ops.spectral_norm(kernels)
        assert ((got.double() - reference).abs() <= BOUND[dtype] * reference.abs() + 1e-300).all()
        torch.set_num_threads(3)
        assert torch.equal(got, ops.spectral_norm(kernels))
        torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_matrix_of_a_batch_is_told(bad: float, simd: str) -> None:
    kernels = torch.stack([tangent_kernel(20, seed=s) for s in range(21)]).float()
    for at in (0, 6, 16, 20):
        broken = kernels.clone()
        broken[at, 19, 3] = bad
        with pytest.raises(NonFinite, match="spectral_norm"):
            ops.spectral_norm(broken)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    rank=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    power=st.floats(0, 6),
    exponent=st.integers(-20, 20),
    double=st.booleans(),
)
def test_random_kernels(n: int, rank: int, seed: int, power: float, exponent: int, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    factors = normal(n, rank, seed=seed) * (1 + torch.arange(rank, dtype=torch.float64)) ** -power
    kernel = (factors @ factors.T * 10.0**exponent).to(dtype)
    k = 1 + seed % n
    check_pairs(kernel, *ops.topk_eigh(kernel, k))
    reference, _, norm = exact(kernel)
    assert (ops.spectral_norm(kernel).double() - reference[0]).abs() <= BOUND[dtype] * norm


# --- arguments ---


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.topk_eigh(torch.eye(3), 4),
            ValueError,
            r"k: expected a number of eigenpairs from 0 to 3, got 4",
        ),
        (lambda: ops.topk_eigh(torch.eye(3), -1), ValueError, r"k: expected .* got -1"),
        (lambda: ops.topk_eigh(torch.zeros(3, 4), 1), ValueError, r"kernel: expected shape \(..., n, n\)"),
        (lambda: ops.topk_eigh(torch.zeros(3), 1), ValueError, r"kernel: expected shape"),
        (lambda: ops.topk_eigh(torch.eye(3).half(), 1), TypeError, r"kernel: expected torch.float32"),
        (lambda: ops.topk_eigh(torch.eye(3), 1, start=torch.eye(3).double()), TypeError, r"start: expected"),
        (
            lambda: ops.topk_eigh(torch.eye(3), 1, start=torch.zeros(4, 1)),
            ValueError,
            r"start: expected shape",
        ),
        (lambda: ops.spectral_norm(torch.zeros(2, 3, 4)), ValueError, r"kernel: expected shape"),
        (lambda: ops.spectral_norm(torch.eye(3).int()), TypeError, r"kernel: expected torch.float32"),
    ],
)
def test_wrong_arguments_are_named(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()


def test_every_level_was_tested() -> None:
    assert "scalar" in _C.available_simd_levels()
