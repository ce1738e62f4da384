"""The compiled ops beside what torch and scipy offer for the same quantity."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

from catapult_ext import ops
from python_experiments.bench.cases import Case, Goal, job

__all__: list[str] = []

#: Name of a peer that goals refer to.
_ARPACK = "scipy eigsh (ARPACK)"
_GRAM = (Goal(1 / 1.7, 1 / 2),)


def _relative_gram(call: Callable[[], Tensor], exact: Tensor) -> Callable[[], float]:
    scale = exact.diagonal().sqrt()
    return lambda: float(((call().double() - exact).abs() / torch.outer(scale, scale)).max())


@job(
    "gram-128",
    "tangent kernel of one layer from its inputs and sensitivities",
    baseline="torch.mm",
    shapes={"n": 128, "fan_in": 3072, "fan_out": 1024},
    goals=_GRAM,
    error="relative to sqrt(K_ii K_jj)",
)
@job(
    "gram-512",
    "tangent kernel of one layer from its inputs and sensitivities",
    baseline="torch.mm",
    shapes={"n": 512, "fan_in": 1024, "fan_out": 1024},
    goals=_GRAM,
    error="relative to sqrt(K_ii K_jj)",
)
@job(
    "gram-2000",
    "tangent kernel of one layer from its inputs and sensitivities",
    baseline="torch.mm",
    shapes={"n": 2000, "fan_in": 100, "fan_out": 1024},
    goals=_GRAM,
    error="relative to sqrt(K_ii K_jj)",
)
def _gram_float32(s: Mapping[str, int]) -> Case:
    return _gram(s, torch.float32)


@job(
    "gram-relu-2000",
    "tangent kernel of one layer between ReLUs: half of its inputs and of its sensitivities is zero",
    baseline="torch.mm",
    shapes={"n": 2000, "fan_in": 1024, "fan_out": 1024},
    goals=_GRAM,
    error="relative to sqrt(K_ii K_jj)",
)
def _gram_relu(s: Mapping[str, int]) -> Case:
    return _gram(s, torch.float32, zeros=0.5)


_ONE_THREAD = "catapult_ext, one thread"


@job(
    "two-threads-512",
    "tangent kernel of one layer with two threads beside one",
    baseline=_ONE_THREAD,
    shapes={"n": 512, "fan_in": 1024, "fan_out": 1024},
    goals=(Goal(1 / 1.6, 1 / 1.8),),
    error="relative to sqrt(K_ii K_jj)",
)
@job(
    "two-threads-2000",
    "tangent kernel of one layer with two threads beside one",
    baseline=_ONE_THREAD,
    shapes={"n": 2000, "fan_in": 1024, "fan_out": 1024},
    goals=(Goal(1 / 1.6, 1 / 1.8),),
    error="relative to sqrt(K_ii K_jj)",
)
def _gram_threads(s: Mapping[str, int]) -> Case:
    case = _gram(s, torch.float32)
    kernel, error = (which["catapult_ext"] for which in (case.implementations, case.errors))

    def with_threads(count: int) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return kernel()
        finally:
            torch.set_num_threads(before)

    # No FLOP: the rate of two threads has no place under the roof of one.
    return Case(
        {_ONE_THREAD: lambda: with_threads(1), "catapult_ext": lambda: with_threads(2)},
        {"catapult_ext": error},
    )


@job(
    "gram-float64-128",
    "tangent kernel of one layer in float64",
    baseline="torch.mm",
    shapes={"n": 128, "fan_in": 3072, "fan_out": 1024},
    goals=_GRAM,
    error="relative to sqrt(K_ii K_jj)",
)
@job(
    "gram-float64-2000",
    "tangent kernel of one layer in float64",
    baseline="torch.mm",
    shapes={"n": 2000, "fan_in": 100, "fan_out": 1024},
    goals=_GRAM,
    error="relative to sqrt(K_ii K_jj)",
)
def _gram_float64(s: Mapping[str, int]) -> Case:
    return _gram(s, torch.float64)


def _gram(s: Mapping[str, int], dtype: torch.dtype, zeros: float = 0.0) -> Case:
    torch.manual_seed(0)
    a, b = torch.randn(s["n"], s["fan_in"], dtype=dtype), torch.randn(s["n"], s["fan_out"], dtype=dtype)
    for factor in (a, b):
        factor[torch.rand(factor.shape) < zeros] = 0.0
    syrk = scipy.linalg.blas.ssyrk if dtype == torch.float32 else scipy.linalg.blas.dsyrk

    def blas() -> Tensor:
        # Transposed views are Fortran-ordered, so that nothing is copied.
        left = syrk(1.0, a.numpy().T, trans=1)
        left *= syrk(1.0, b.numpy().T, trans=1)
        return torch.from_numpy(left)  # upper triangle

    calls: dict[str, Callable[[], Tensor]] = {
        "torch.mm": lambda: (a @ a.T).mul_(b @ b.T),
        "catapult_ext": lambda: ops.ntk_gram([a], [b]),
    }
    exact = (a.double() @ a.double().T) * (b.double() @ b.double().T)
    upper = torch.triu(exact)
    scale = exact.diagonal().sqrt()
    errors = {name: _relative_gram(call, exact) for name, call in calls.items()}
    errors["BLAS syrk"] = lambda: float(
        ((torch.triu(blas()).double() - upper).abs() / torch.outer(scale, scale)).max()
    )
    flop = s["n"] ** 2 * (s["fan_in"] + s["fan_out"])
    traffic = dtype.itemsize * s["n"] * (s["fan_in"] + s["fan_out"] + s["n"])
    return Case({**calls, "BLAS syrk": blas}, errors, flop, traffic, dtype)


@job(
    "jacobian-accumulate",
    "K += G G^T and gradient += G^T w of a tile of per-sample gradients",
    baseline="torch",
    shapes={"n": 128, "q": 8192},
    error="relative to sqrt(K_ii K_jj)",
)
def _jacobian(s: Mapping[str, int]) -> Case:
    torch.manual_seed(0)
    tile, weight = torch.randn(s["n"], s["q"]), torch.randn(s["n"])
    kernel, grad = torch.zeros(s["n"], s["n"]), torch.zeros(s["q"])

    def ours() -> Tensor:
        kernel.zero_()
        ops.jacobian_accumulate_(kernel, tile, grad=grad, weight=weight)
        return kernel

    def plain() -> Tensor:
        kernel.zero_()
        kernel.addmm_(tile, tile.T)
        grad.addmv_(tile.T, weight)
        return kernel

    exact = tile.double() @ tile.double().T
    return Case(
        {"torch": plain, "catapult_ext": ours},
        {"torch": _relative_gram(plain, exact), "catapult_ext": _relative_gram(ours, exact)},
        flop=s["n"] ** 2 * s["q"] + 2 * s["n"] * s["q"],
        traffic=4 * (s["n"] * s["q"] + s["n"] ** 2 + 2 * s["q"]),  # the gradient is read and written
    )


@job(
    "agop-100",
    "AGOP of many samples",
    baseline="torch.mm",
    shapes={"n": 2000, "d": 100},
    error="relative to the norm",
)
@job(
    "agop-3072",
    "AGOP of images",
    baseline="torch.mm",
    shapes={"n": 128, "d": 3072},
    error="relative to the norm",
)
def _agop(s: Mapping[str, int]) -> Case:
    torch.manual_seed(0)
    g = torch.randn(s["n"], s["d"])

    def blas() -> Tensor:
        # The upper triangle of a Fortran-ordered matrix is the lower one of its transposed view.
        return torch.from_numpy(scipy.linalg.blas.ssyrk(1 / s["n"], g.numpy().T).T)

    calls: dict[str, Callable[[], Tensor]] = {
        "torch.mm": lambda: (g.T @ g).mul_(1 / s["n"]),
        "catapult_ext": lambda: ops.agop_reduce(g, 1 / s["n"]),
    }
    exact = g.double().T @ g.double() / s["n"]

    def error(call: Callable[[], Tensor]) -> Callable[[], float]:
        return lambda: float((call().double() - exact).norm() / exact.norm())

    errors = {name: error(call) for name, call in calls.items()}
    errors["BLAS syrk"] = lambda: float((blas().double() - exact.tril()).norm() / exact.tril().norm())
    return Case(
        {**calls, "BLAS syrk": blas},
        errors,
        flop=s["n"] * s["d"] ** 2,
        traffic=4 * (s["n"] * s["d"] + s["d"] ** 2),
    )


def _eigenvalue_errors(
    calls: Mapping[str, Callable[[], Tensor]], kernel: Tensor, k: int
) -> dict[str, Callable[[], float]]:
    """Largest error of the k largest eigenvalues by each call, relative to lambda_1."""

    @functools.cache
    def exact() -> Tensor:  # takes seconds for a large kernel, and not everybody asks for errors
        return torch.linalg.eigvalsh(kernel.double()).flip(-1)[..., :k]

    def error(call: Callable[[], Tensor]) -> Callable[[], float]:
        return lambda: float(((call().double() - exact()) / exact()[..., :1]).abs().max())

    return {name: error(call) for name, call in calls.items()}


def _syevr(kernel: Tensor, k: int) -> Tensor:
    """The k largest eigenvalues by LAPACK, with their eigenvectors."""
    n = len(kernel)
    return torch.from_numpy(scipy.linalg.eigh(kernel.numpy(), subset_by_index=[n - k, n - 1])[0][::-1].copy())


def tangent_like_kernel(n: int, *batch: int) -> Tensor:
    """A positive semi-definite matrix with one large eigenvalue and a power-law tail, as tangent kernels have."""
    torch.manual_seed(0)
    features = torch.randn(*batch, n, n) * torch.arange(1, n + 1).pow(-0.75)
    features[..., 0] += 2.0
    return features @ features.mT  # [..., n, n]


@job(
    "top-10-of-128",
    "10 largest eigenpairs, cold start",
    baseline="torch.linalg.eigh",
    shapes={"n": 128, "k": 10},
    error="eigenvalues, relative to lambda_1",
)
@job(
    "top-10-of-2000",
    "10 largest eigenpairs, cold start",
    baseline="torch.linalg.eigh",
    shapes={"n": 2000, "k": 10},
    error="eigenvalues, relative to lambda_1",
)
def _topk(s: Mapping[str, int]) -> Case:
    kernel, k = tangent_like_kernel(s["n"]), s["k"]
    calls: dict[str, Callable[[], Tensor]] = {
        "torch.linalg.eigh": lambda: torch.linalg.eigh(kernel)[0].flip(-1)[:k],
        "catapult_ext": lambda: ops.topk_eigh(kernel, k)[0],
        "LAPACK syevr": lambda: _syevr(kernel, k),
        _ARPACK: lambda: torch.from_numpy(
            scipy.sparse.linalg.eigsh(kernel.numpy(), k, which="LA", tol=1e-6)[0][::-1].copy()
        ),
        "torch.lobpcg": lambda: torch.lobpcg(kernel, k, largest=True)[0],
    }
    return Case(calls, _eigenvalue_errors(calls, kernel, k))


@job(
    "top-10-float64-of-128",
    "10 largest eigenpairs in float64 beside all of them in float32",
    baseline="torch.linalg.eigh, float32",
    shapes={"n": 128, "k": 10},
    goals=(Goal(1 / 2.2, 1 / 3),),
    error="eigenvalues, relative to lambda_1",
)
def _topk_float64(s: Mapping[str, int]) -> Case:
    kernel, k = tangent_like_kernel(s["n"]), s["k"]
    double = kernel.double()
    calls: dict[str, Callable[[], Tensor]] = {
        "torch.linalg.eigh, float32": lambda: torch.linalg.eigh(kernel)[0].flip(-1)[:k],
        "torch.linalg.eigh": lambda: torch.linalg.eigh(double)[0].flip(-1)[:k],
        "LAPACK syevr": lambda: _syevr(double, k),
        "catapult_ext": lambda: ops.topk_eigh(double, k)[0],
    }
    return Case(calls, _eigenvalue_errors(calls, double, k), dtype=torch.float64)


@job(
    "top-10-warm-of-2000",
    "10 largest eigenpairs, started at those of the step before",
    baseline="torch.linalg.eigh",
    shapes={"n": 2000, "k": 10},
    goals=(Goal(1 / 30, 1 / 60), Goal(1.0, 1 / 2, over=_ARPACK)),
    error="eigenvalues, relative to lambda_1",
)
def _topk_warm(s: Mapping[str, int]) -> Case:
    before, k = tangent_like_kernel(s["n"]), s["k"]
    # A step of training: a few hundredths of every entry, and still positive semi-definite.
    change = 1 + 0.03 * torch.randn(s["n"])
    kernel = change[:, None] * before * change
    start = ops.topk_eigh(before, k)[1]  # [n, k]
    v0 = start.sum(1).numpy()
    calls: dict[str, Callable[[], Tensor]] = {
        "torch.linalg.eigh": lambda: torch.linalg.eigh(kernel)[0].flip(-1)[:k],
        "catapult_ext": lambda: ops.topk_eigh(kernel, k, start=start)[0],
        _ARPACK: lambda: torch.from_numpy(
            scipy.sparse.linalg.eigsh(kernel.numpy(), k, which="LA", tol=1e-6, v0=v0)[0][::-1].copy()
        ),
        "torch.lobpcg": lambda: torch.lobpcg(kernel, k, X=start, largest=True)[0],
    }
    return Case(calls, _eigenvalue_errors(calls, kernel, k))


@job(
    "spectral-norm-5",
    "lambda_1 of the kernel of a batch",
    baseline="torch.linalg.eigvalsh",
    shapes={"n": 5},
    error="relative to lambda_1",
)
@job(
    "spectral-norm-32",
    "lambda_1 of the kernel of a batch",
    baseline="torch.linalg.eigvalsh",
    shapes={"n": 32},
    error="relative to lambda_1",
)
@job(
    "spectral-norm-2000",
    "lambda_1 of a large kernel",
    baseline="torch.linalg.eigvalsh",
    shapes={"n": 2000},
    error="relative to lambda_1",
)
@job(
    "spectral-norm-400x20",
    "lambda_1 of the kernels of 400 batches of 20",
    baseline="torch.linalg.eigvalsh",
    shapes={"n": 20, "batch": 400},
    goals=(Goal(1 / 5, 1 / 10),),
    error="relative to lambda_1",
)
@job(
    "spectral-norm-400x100",
    "lambda_1 of the kernels of 400 batches of 100",
    baseline="torch.linalg.eigvalsh",
    shapes={"n": 100, "batch": 400},
    goals=(Goal(1 / 25, 1 / 45),),
    error="relative to lambda_1",
)
@job(
    "spectral-norm-400x50",
    "lambda_1 of the kernels of 400 batches of 50",
    baseline="torch.linalg.eigvalsh",
    shapes={"n": 50, "batch": 400},
    goals=(Goal(1 / 15, 1 / 30),),
    error="relative to lambda_1",
)
def _spectral_norm(s: Mapping[str, int]) -> Case:
    kernel = tangent_like_kernel(s["n"], *([s["batch"]] if "batch" in s else []))
    calls: dict[str, Callable[[], Tensor]] = {
        "torch.linalg.eigvalsh": lambda: torch.linalg.eigvalsh(kernel)[..., -1],
        "catapult_ext": lambda: ops.spectral_norm(kernel),
    }
    with_axis = {name: lambda call=call: call()[..., None] for name, call in calls.items()}
    return Case(calls, _eigenvalue_errors(with_axis, kernel, 1))
