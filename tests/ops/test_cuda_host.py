"""The CUDA ops where there is no GPU: their own sources, compiled for the host over an emulator.

csrc/tests/cuda_emulator says what it catches: wrong results, memory nobody wrote, barriers that are missing
(threads run in shuffled orders) or that not all threads reach, and launches that the hardware would refuse.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path

import cuda_cases
import pytest
import torch
from chain_reference import chain, chain_arguments, moved, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext import ops
from catapult_ext.ops import cuda

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
GUARD = 64  # bytes behind a workspace that must stay as they are


def _find() -> Path | None:
    given = os.environ.get("CATAPULT_CUDA_EMULATED")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    pattern = f"build/*/csrc/tests/cuda_emulator/_cuda_emulated{suffix}"
    found = [Path(given)] if given else sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


@pytest.fixture(scope="module")
def module():
    path = _find()
    if path is None:
        pytest.skip("the CUDA emulator is not built (cmake -DCATAPULT_NATIVE_TESTS=ON, as `make test` does)")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Emulated:
    """Calls the CUDA implementations with tensors of the host; workspaces are poisoned and guarded."""

    def __init__(self, module):
        self.module = module
        self.workspaces: list[torch.Tensor] = []

    def workspace(self, size: int, device: torch.device) -> torch.Tensor:
        # All bits set is a NaN in both dtypes: what a kernel reads before writing it shows.
        self.workspaces.append(torch.full((size + GUARD,), 255, dtype=torch.uint8))
        return self.workspaces[-1]

    def __call__(self, name, *arguments):
        self.workspaces.clear()
        result = cuda.IMPLEMENTATIONS[name](*arguments)
        for workspace in self.workspaces:
            assert (workspace[-GUARD:] == 255).all(), f"{name} wrote beyond its workspace"
        cuda.check(CPU)
        return result


@pytest.fixture
def call(module, monkeypatch):
    emulated = Emulated(module)
    monkeypatch.setattr(cuda, "_native", module)
    monkeypatch.setattr(cuda, "_stream", lambda device: (0, 0))
    monkeypatch.setattr(cuda, "_workspace", emulated.workspace)
    monkeypatch.setattr(cuda, "_status", {})
    module.emulator_configure()
    yield emulated
    module.emulator_configure()


dtypes = pytest.mark.parametrize("dtype", cuda_cases.DTYPES)


@pytest.fixture(params=cuda.VERSIONS["ntk_gram"])
def gram_version(request):
    """Run the test with every implementation of ntk_gram."""
    cuda.select("ntk_gram", request.param)
    yield request.param
    cuda.select("ntk_gram", "simple")


@dtypes
@pytest.mark.parametrize(
    ("n", "c", "widths"),
    [
        (1, 1, [(3, 2)]),
        (5, 3, [(7, 1), (0, 4)]),
        (64, 1, [(16, 16)]),
        (31, 1, [(260, 128), (33, 5), (4, 140)]),
        (65, 1, [(300, 1), (17, 600)]),
        (33, 4, [(20, 9)]),
        (127, 1, [(700, 3)]),
        (2, 70, [(5, 3)]),
        (3, 1, [(1, 2)] * 35),  # more layers than one launch takes
    ],
)
def test_gram(call, gram_version, dtype, n, c, widths):
    cuda_cases.check_gram(call, "cpu", dtype, n, c, widths)
    cuda_cases.check_gram_cross(call, "cpu", dtype, n, n + 3, c, widths)


@dtypes
def test_gram_of_many_tiles_takes_one_launch(call, gram_version, dtype):
    n = 1030  # 17 tiles a side: enough blocks without splitting the depth
    a, b, scale, beta = cuda_cases.layers(n, 1, [(3, 2), (20, 7)], dtype, "cpu")
    kernel = torch.full((n, n), torch.nan, dtype=dtype)
    before = call.module.emulator_launches()
    call("ntk_gram_", kernel, a, b, scale, beta, False)
    assert call.module.emulator_launches() == before + 1
    exact = cuda_cases.jacobian(a, b, scale, beta)
    assert cuda_cases.gram_error(kernel, exact) <= cuda_cases.GRAM_BOUND[dtype]


@pytest.mark.parametrize("version", ["ffma", "tf32x3"])
def test_gram_of_large_tiles(call, monkeypatch, version):
    """1,800 rows are 120 tiles of 128 x 128, a better fit to 132 multiprocessors than 435 of 64 x 64."""
    monkeypatch.setitem(cuda._selected, "ntk_gram", cuda.VERSIONS["ntk_gram"].index(version))
    a, b, scale, beta = cuda_cases.layers(1800, 1, [(20, 5)], torch.float32, "cpu")
    kernel = torch.full((1800, 1800), torch.nan)
    call("ntk_gram_", kernel, a, b, scale, beta, False)
    assert torch.equal(kernel, kernel.T)
    exact = cuda_cases.jacobian(a, b, scale, beta)
    assert cuda_cases.gram_error(kernel, exact) <= cuda_cases.GRAM_BOUND[torch.float32]


@dtypes
def test_strided_gram(call, gram_version, dtype):
    cuda_cases.check_strided_gram(call, "cpu", dtype)


@dtypes
@pytest.mark.parametrize("widths", [[(100, 3)], [(300, 150), (20, 1)]], ids=str)  # one launch; parts
def test_gram_is_bitwise_the_same_in_any_order_of_threads(call, gram_version, dtype, widths):
    a, b, scale, beta = cuda_cases.layers(70, 1, widths, dtype, "cpu")
    kernels = []
    for seed in (0, 1, 2):
        call.module.emulator_configure(shuffle_seed=seed)
        kernels.append(torch.full((70, 70), torch.nan, dtype=dtype))
        call("ntk_gram_", kernels[-1], a, b, scale, beta, False)
    assert torch.equal(kernels[0], kernels[1])
    assert torch.equal(kernels[0], kernels[2])


@pytest.mark.parametrize("widths", [(100, 3), (300, 150), (2, 1)], ids=str)  # one launch; parts; no tiles
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_a_gram_that_is_not_finite_is_noted(call, gram_version, widths, bad):
    a, b, scale, beta = cuda_cases.layers(70, 1, [widths], torch.float32, "cpu")
    a[0][65, -1] = bad
    kernel = torch.empty(70, 70)
    with pytest.raises(cx.NonFinite):
        call("ntk_gram_", kernel, a, b, scale, beta, False)
    assert not kernel[65].isfinite().any()
    assert kernel[:65, :65].isfinite().all()


@dtypes
def test_gram_of_no_columns_is_zero(call, gram_version, dtype):
    empty = torch.empty(3, 0, dtype=dtype)
    kernel = torch.full((3, 3), torch.nan, dtype=dtype)
    call("ntk_gram_", kernel, [empty], [empty], [1.0], [1.0], False)
    assert (kernel == 0).all()


def test_clusters_are_refused_where_there_are_none(call, monkeypatch):
    call.module.emulator_configure(capability=8)
    monkeypatch.setitem(cuda._selected, "ntk_gram", cuda.VERSIONS["ntk_gram"].index("cluster"))
    a, b = [torch.ones(3, 300)], [torch.ones(3, 300)]
    with pytest.raises(ValueError, match=r"ntk_gram: clusters .* capability 9.0, this one has 8.x"):
        call("ntk_gram_", torch.empty(3, 3), a, b, [1.0], [0.0], False)


#: Bound of a tile's error over |x_i| |y_j|, at 3,072 columns.
TILE_BOUND = {
    "ffma_64": 5e-7, "ffma_128": 5e-7, "tf32x3_64": 1e-6, "tf32x3_128": 1e-6,
    "ffma_float64": 5e-15, "tensor_float64": 5e-15,
}  # fmt: skip


def _tile_error(call, engine: str, depth: int) -> float:
    """Largest error of a tile of X Y^T over |x_i| |y_j|; X as behind a ReLU and Y = -X, X: one-sided rounding."""
    dtype = torch.float64 if engine.endswith("float64") else torch.float32
    side = 128 if engine.endswith("128") else 64
    x = torch.randn(side, depth, dtype=dtype).relu()
    y = torch.cat([-x[: side // 2], x[side // 2 :]])
    result = torch.full((side, side), torch.nan, dtype=dtype)
    getattr(call.module, f"tile_sum_{engine}")(x.data_ptr(), y.data_ptr(), depth, result.data_ptr())
    size = x.double().norm(dim=1)[:, None] * y.double().norm(dim=1)
    return float(((result.double() - x.double() @ y.double().T).abs() / size).max())


@pytest.mark.parametrize("engine", TILE_BOUND)
def test_error_of_a_tile_does_not_grow_with_its_depth(call, engine):
    torch.manual_seed(0)
    assert _tile_error(call, engine, 3072) <= TILE_BOUND[engine]


def test_sums_inside_the_tensor_cores_would_drift(call):
    """What promotion is for: the same products left in accumulators that round toward zero."""
    torch.manual_seed(0)
    assert _tile_error(call, "tf32x3_in_tensor_core", 3072) > 1e-5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.sampled_from(cuda.VERSIONS["ntk_gram"]),
    n=st.integers(1, 70),
    c=st.integers(1, 3),
    widths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_gram_of_any_shape(call, version, n, c, widths, seed):
    torch.manual_seed(seed)
    cuda.select("ntk_gram", version)
    try:
        cuda_cases.check_gram(call, "cpu", torch.float32, n, c, widths)
    finally:
        cuda.select("ntk_gram", "simple")


@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (65, 300), (130, 17), (3, 1000)])
def test_tile(call, gram_version, dtype, rows, columns):
    cuda_cases.check_tile(call, "cpu", dtype, rows, columns)


@pytest.fixture(params=cuda.VERSIONS["jacobian_conv2d"])
def conv_version(request):
    """Run the test with every implementation of jacobian_conv2d."""
    cuda.select("jacobian_conv2d", request.param)
    yield request.param
    cuda.select("jacobian_conv2d", "simple")


@dtypes
@pytest.mark.parametrize("tile_bytes", [1, 700, 1 << 20])
def test_tokens(call, conv_version, dtype, tile_bytes):
    cuda_cases.check_tokens(call, "cpu", dtype, 3, 2, 5, 7, 6, tile_bytes)
    cuda_cases.check_tokens(call, "cpu", dtype, 2, 1, 20, 72, 4, tile_bytes)


@dtypes
@pytest.mark.parametrize("case", cuda_cases.CONVOLUTIONS, ids=str)
def test_convolution(call, conv_version, dtype, case):
    for tile_bytes in (500 if case[4] < 64 else 5000, 1 << 20):
        cuda_cases.check_convolution(call, "cpu", dtype, case, tile_bytes)


@dtypes
@pytest.mark.parametrize("layout", cuda_cases.LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        (2, 2, 5, (6, 8), 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (3, 1, 8, (7, 12), 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
        (2, 1, 6, (1, 70), 4, (1, 1), (1, 3), (0, 0), (1, 1), 2),
        (2, 1, 3, (33, 1), 4, (1, 1), (2, 1), (0, 0), (1, 1), 1),
    ],
    ids=str,
)
def test_convolution_of_any_layout(call, conv_version, dtype, case, layout):
    cuda_cases.check_convolution(call, "cpu", dtype, case, 1 << 20, layout)


@dtypes
def test_convolution_in_many_tiles_and_parts(call, conv_version, dtype):
    """Several tiles along rows and taps, the last ones with fewer columns than there are parts."""
    case = (3, 1, 8, (4, 5), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    cuda_cases.check_convolution(call, "cpu", dtype, case, 20_000, "dense")


@pytest.mark.parametrize("version", ["ffma", pytest.param("tf32x3", marks=pytest.mark.slow)])
def test_convolution_of_large_blocks(call, version):
    """100 samples with 128 rows and 126 taps fill 132 multiprocessors best with blocks of 128."""
    cuda.select("jacobian_conv2d", version)
    try:
        case = (100, 1, 14, (7, 8), 128, (3, 3), (1, 1), (1, 1), (1, 1), 1)
        cuda_cases.check_convolution(call, "cpu", torch.float32, case, 1 << 23, "dense")
    finally:
        cuda.select("jacobian_conv2d", "simple")


@pytest.mark.parametrize("version", ["ffma", pytest.param("tf32x3", marks=pytest.mark.slow)])
def test_convolution_of_many_samples_goes_straight_into_the_kernel(call, version):
    cuda.select("jacobian_conv2d", version)
    try:
        case = (600, 3, 1, (1, 3), 2, (1, 2), (1, 1), (0, 0), (1, 1), 1)
        cuda_cases.check_convolution(call, "cpu", torch.float32, case, 1 << 23, "dense")
    finally:
        cuda.select("jacobian_conv2d", "simple")


def test_error_of_a_convolution_does_not_grow_with_its_positions(call, conv_version):
    """1,024 positions of one sign, where rounding is one-sided."""
    torch.manual_seed(0)
    input, b = torch.rand(3, 4, 32, 32), torch.rand(3, 1, 5, 32, 32)
    tail = (1.0, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1 << 20)
    kernel, exact = torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.float64)
    call("jacobian_accumulate_.conv2d", kernel, None, input, b, None, *tail)
    ops.reference.jacobian_accumulate_conv2d_(exact, None, input.double(), b.double(), None, *tail)
    assert ((kernel - exact) / exact).abs().max() <= (1e-6 if conv_version == "tf32x3" else 4e-7)


def test_convolution_does_not_depend_on_the_order_of_threads(call, conv_version):
    torch.manual_seed(0)
    input, b = torch.randn(5, 8, 6, 6), torch.randn(5, 2, 9, 6, 6)
    found = []
    for seed in range(3):
        call.module.emulator_configure(shuffle_seed=seed)
        kernel, grad = torch.zeros(10, 10), torch.zeros(9, 8, 3, 3)
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        call("jacobian_accumulate_.conv2d", kernel, grad, input, b, torch.ones(10), 1.0, *geometry, 1 << 14)
        found.append((kernel, grad))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


def test_a_convolution_that_is_not_finite_is_noted(call, conv_version):
    input, b = torch.randn(2, 2, 4, 4), torch.randn(2, 1, 3, 4, 4)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    b[1, 0, 2, 3, 3] = torch.inf
    with pytest.raises(cx.NonFinite):
        call("jacobian_accumulate_.conv2d", torch.zeros(2, 2), None, input, b, None, 1.0, *geometry, 1 << 14)
    b[1, 0, 2, 3, 3] = 0.0
    weight, grad = torch.full((2,), torch.nan), torch.zeros(3, 2, 3, 3)
    with pytest.raises(cx.NonFinite):
        call(
            "jacobian_accumulate_.conv2d", torch.zeros(2, 2), grad, input, b, weight, 1.0, *geometry, 1 << 14
        )


def test_a_convolution_takes_two_launches_a_tile(call):
    """Gradients and products; the parts of the products are added up once, at the end."""
    input, b = torch.randn(3, 8, 4, 4), torch.randn(3, 1, 64, 4, 4)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for version in cuda.VERSIONS["jacobian_conv2d"][1:]:
        cuda.select("jacobian_conv2d", version)
        try:
            for tile_bytes, tiles in ((1 << 20, 1), (3 * 4 * 64 * 64, 2)):
                before = call.module.emulator_launches()
                arguments = (torch.zeros(3, 3), torch.zeros(64, 8, 3, 3), input, b, torch.ones(3), 1.0)
                call("jacobian_accumulate_.conv2d", *arguments, *geometry, tile_bytes)
                assert call.module.emulator_launches() == before + 2 * tiles + 1
        finally:
            cuda.select("jacobian_conv2d", "simple")


@dtypes
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (90, 70), (5, 130)])
def test_agop(call, gram_version, dtype, rows, d):
    cuda_cases.check_agop(call, "cpu", dtype, rows, d)


@pytest.fixture(params=cuda.VERSIONS["topk_eigh"])
def eigh_version(request):
    """Run the test with every implementation of topk_eigh."""
    cuda.select("topk_eigh", request.param)
    yield request.param
    cuda.select("topk_eigh", "simple")


@pytest.fixture
def fused(monkeypatch):
    """Run the test with the version "fused" of topk_eigh."""
    monkeypatch.setitem(cuda._selected, "topk_eigh", cuda.VERSIONS["topk_eigh"].index("fused"))


@dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 18])
def test_direct_eigenpairs(call, eigh_version, dtype, n):
    for _, matrix in cuda_cases.matrices(n):
        for k in sorted({1, min(3, n), n}):
            cuda_cases.check_topk(call, "cpu", dtype, matrix, k)


@pytest.mark.parametrize("n", [4, 16, 17, 33])
def test_fused_direct_eigenpairs_at_the_edges_of_threads(call, fused, n):
    for _, matrix in cuda_cases.matrices(n):
        cuda_cases.check_topk(call, "cpu", torch.float64, matrix, min(5, n))


@pytest.mark.parametrize("n", [127, 128, 129, 200])
def test_fused_direct_eigenpairs_in_one_panel_and_in_two(call, fused, n):
    for name, matrix in cuda_cases.matrices(n):
        if name in ("every sample twice", "outlier", "indefinite"):
            cuda_cases.check_topk(call, "cpu", torch.float64, matrix, 11)


def test_all_fused_eigenpairs_of_many_ties(call, fused):
    n = 70
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    values = torch.tensor([3.0] * 30 + [1.0] * 25 + [1.0 + 1e-13] * 5 + [0.0] * 10, dtype=torch.float64)
    cuda_cases.check_topk(call, "cpu", torch.float64, (q * values) @ q.T, n)


@pytest.mark.parametrize(
    ("version", "limit"), [("simple", 12 * 1024), ("fused", 12 * 1024), ("fused", 30 * 1024)]
)
def test_direct_eigenpairs_do_not_depend_on_where_the_matrix_lives(call, monkeypatch, version, limit):
    monkeypatch.setitem(cuda._selected, "topk_eigh", cuda.VERSIONS["topk_eigh"].index(version))
    x = torch.randn(2, 40, 40)
    kernel = x @ x.mT
    shared = call("topk_eigh", kernel, 20, None, 1e-6)
    # The matrix, or in the version "fused" the vectors, no longer fit: they go to the workspace.
    call.module.emulator_configure(shared_limit=limit)
    for got, wanted in zip(call("topk_eigh", kernel, 20, None, 1e-6), shared, strict=True):
        assert torch.equal(got, wanted)


@dtypes
def test_fused_eigenpairs_are_bitwise_the_same_in_any_order_of_threads(call, fused, dtype):
    x = torch.randn(2, 50, 60, dtype=dtype)
    found = []
    for seed in (0, 1, 2):
        call.module.emulator_configure(shuffle_seed=seed)
        found.append(call("topk_eigh", x @ x.mT, 6, None, 1e-6))
    for other in found[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(other, found[0], strict=True))


def test_krylov_cold_and_warm(call, eigh_version):
    x = torch.randn(270, 300, dtype=torch.float64) * torch.arange(1, 301, dtype=torch.float64) ** -0.9
    start = cuda_cases.check_topk(call, "cpu", torch.float32, x @ x.T, 3)
    cuda_cases.check_topk(call, "cpu", torch.float32, 1.01 * (x @ x.T), 3, start=start)


@pytest.mark.slow
def test_krylov_without_convergence_ends_in_the_direct_solver(call, eigh_version):
    x = torch.randn(257, 257, dtype=torch.float64)
    cuda_cases.check_topk(call, "cpu", torch.float64, x @ x.T, 1, tol=1e-30)


def converged(call) -> bool:
    """Whether block Krylov ended without the direct solver: the flag is the last word of its workspace."""
    return int(call.workspaces[-1][-GUARD - 8 : -GUARD - 4].view(torch.int32)) == 1


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([3.0, 1.0] + [0.0] * 259, 2),  # less rank than columns
        ([3.0] * 20 + [0.1] * 241, 10),  # a tie that is wider than the block
        ([-1.0, -1.5] + [-8.0 - 0.001 * i for i in range(259)], 2),  # all below what a vector of zeros gives
        ([i**-3.0 for i in range(1, 262)], 11),  # blocks of 32 columns
        ([10.0**-i for i in range(261)], 3),  # columns that are dependent but for rounding
    ],
    ids=["rank", "tie", "negative", "wide", "steep"],
)
def test_fused_krylov_where_the_basis_runs_dry_or_is_wide(call, fused, values, k):
    q = torch.linalg.qr(torch.randn(261, 261, dtype=torch.float64))[0]
    cuda_cases.check_topk(
        call, "cpu", torch.float64, (q * torch.tensor(values, dtype=torch.float64)) @ q.T, k, tol=1e-8
    )
    assert converged(call)


@pytest.mark.slow
def test_fused_krylov_of_more_rows_than_a_tile_for_each_multiprocessor(call, fused):
    x = torch.randn(2113, 2)
    start = torch.linalg.eigh(x @ x.T)[1][:, -1:]
    cuda_cases.check_topk(call, "cpu", torch.float32, x @ x.T, 1, tol=1e-4, start=start)
    assert converged(call)


def test_fused_krylov_reads_what_is_given_as_a_start_and_survives_a_broken_one(call, fused):
    n, k = 258, 2
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    kernel = (q * torch.arange(1, n + 1, dtype=torch.float64) ** -2) @ q.T
    start = q[:, :5] + 1e-9 * torch.randn(n, 5, dtype=torch.float64)
    cuda_cases.check_topk(call, "cpu", torch.float64, kernel, k, tol=1e-7, start=start)
    assert converged(call)
    start[:, 1:3] = start[:, :1]
    start[7, 4] = torch.nan
    cuda_cases.check_topk(call, "cpu", torch.float64, kernel, k, tol=1e-7, start=start)
    assert converged(call)


def test_fused_krylov_is_bitwise_the_same_in_any_order_of_threads(call, fused):
    x = torch.randn(259, 300) * torch.arange(1, 301) ** -1.5
    found = []
    for seed in (0, 1):
        call.module.emulator_configure(shuffle_seed=seed)
        found.append(call("topk_eigh", x @ x.T, 2, None, 1e-5))
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found, strict=True))


def test_fused_krylov_notes_what_is_not_finite(call, fused):
    large = torch.eye(270)
    large[200, 100] = torch.inf
    for result in cuda.IMPLEMENTATIONS["topk_eigh"](large, 2, None, 1e-6):
        assert result.isnan().all()
    with pytest.raises(cx.NonFinite):
        cuda.check(CPU)


def test_fused_krylov_is_refused_where_there_are_no_clusters(call, fused):
    call.module.emulator_configure(capability=8)
    with pytest.raises(ValueError, match="topk_eigh: clusters of blocks need a GPU of compute capability 9"):
        call("topk_eigh", torch.eye(270), 2, None, 1e-6)


def test_norm_of_a_large_matrix_by_fused_krylov(call, monkeypatch):
    monkeypatch.setitem(cuda._selected, "spectral_norm", cuda.VERSIONS["spectral_norm"].index("warp"))
    x = torch.rand(514, 20, dtype=torch.float64)
    cuda_cases.check_norm(call, "cpu", torch.float32, (x @ x.T)[None])


@pytest.fixture(params=cuda.VERSIONS["spectral_norm"])
def norm_version(request):
    """Run the test with every implementation of spectral_norm."""
    cuda.select("spectral_norm", request.param)
    yield request.param
    cuda.select("spectral_norm", "simple")


@dtypes
@pytest.mark.parametrize("n", [1, 2, 5, 33, 100])
def test_norms(call, norm_version, dtype, n):
    x = torch.randn(3, n, n + 2, dtype=torch.float64)
    batch = x @ x.mT
    batch[1] *= 1e-20
    batch[2] += 1e4
    cuda_cases.check_norm(call, "cpu", dtype, batch)
    cuda_cases.check_norm(call, "cpu", dtype, torch.zeros(1, n, n))


@pytest.fixture
def bracketed(call, monkeypatch):
    """Values of spectral_norm "warp", and whether the bracket of each matrix closed without the direct method."""
    monkeypatch.setitem(cuda._selected, "spectral_norm", cuda.VERSIONS["spectral_norm"].index("warp"))

    def find(batch: torch.Tensor, tol: float = 1e-6) -> tuple[torch.Tensor, list[bool]]:
        batch = torch.tril(batch) + torch.triu(torch.full_like(batch, torch.nan), 1)
        values = call("spectral_norm", batch, tol)
        closed = call.workspaces[-1].view(torch.int32)[: len(batch)] == 0
        return values, closed.tolist()

    return find


@dtypes
@pytest.mark.parametrize("n", [3, 8, 32, 128])
def test_a_bracket_closes_where_one_eigenvalue_stands_out(bracketed, dtype, n):
    x = torch.rand(3, n, 4 * n, dtype=dtype)  # positive entries: lambda_1 is far above the others
    exact = torch.linalg.eigvalsh((x @ x.mT).double())[:, -1]
    for scale in (1.0, 1e-30, 1e25):
        values, closed = bracketed(scale * (x @ x.mT))
        assert closed == [True] * 3
        torch.testing.assert_close(values.double(), scale * exact, rtol=2e-6, atol=0)
    negative = torch.eye(n, dtype=dtype).expand(2, n, n) * -1.0
    values, _ = bracketed(negative)
    torch.testing.assert_close(values, torch.full_like(values, -1.0), rtol=1e-6, atol=0)


@dtypes
@pytest.mark.parametrize("n", [2, 20, 70, 128])
def test_a_bracket_that_cannot_close_ends_in_the_direct_method(bracketed, dtype, n):
    hidden = torch.eye(n, dtype=dtype)
    # The top vector is (1, -1, 0, ...): orthogonal to the start, ones.
    hidden[:2, :2] = torch.tensor([[5.0, -4.0], [-4.0, 5.0]])
    cases = torch.stack([hidden, 1e-12 * hidden, hidden - 9.5 * torch.eye(n, dtype=dtype)])
    values, closed = bracketed(cases)
    if n > 2:
        assert not closed[0]
        assert not closed[1]
    expected = torch.tensor([9.0, 9e-12, -0.5], dtype=dtype)
    torch.testing.assert_close(values, expected, rtol=2e-6, atol=0)


def test_a_matrix_that_does_not_fit_the_shared_memory_is_reduced_in_the_workspace(bracketed, call):
    x = torch.randn(2, 40, 40, dtype=torch.float64)
    values, closed = bracketed(x @ x.mT, 1e-12)
    assert closed == [False, False]
    call.module.emulator_configure(shared_limit=24 * 1024, shuffle_seed=3)
    assert torch.equal(bracketed(x @ x.mT, 1e-12)[0], values)


def test_bracketed_norms_note_what_is_not_finite(call, monkeypatch):
    monkeypatch.setitem(cuda._selected, "spectral_norm", cuda.VERSIONS["spectral_norm"].index("warp"))
    batch = torch.eye(6).repeat(3, 1, 1)
    batch[1, 4, 2] = torch.inf
    values = cuda.IMPLEMENTATIONS["spectral_norm"](batch, 1e-6)
    assert values.isfinite().tolist() == [True, False, True]
    with pytest.raises(cx.NonFinite):
        cuda.check(CPU)


@dtypes
def test_bracketed_norms_are_bitwise_the_same_in_any_order_of_threads(bracketed, call, dtype):
    x = torch.rand(1, 60, 70, dtype=dtype)
    batch = torch.cat([x @ x.mT, (x - 0.5) @ (x - 0.5).mT])
    found = []
    for seed in (0, 1, 2):
        call.module.emulator_configure(shuffle_seed=seed)
        values, closed = bracketed(batch)
        assert closed == [True, False]
        found.append(values)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@dtypes
def test_every_op_is_bitwise_the_same_in_any_order_of_threads(call, dtype):
    results = []
    for seed in (0, 1, 2):
        call.module.emulator_configure(shuffle_seed=seed)
        results.append([])
        for name, (written, arguments) in cuda_cases.every_op("cpu", dtype).items():
            if name == "topk_eigh":
                arguments = (arguments[0][:40, :40].contiguous(), *arguments[1:])
            returned = call(name, *arguments)
            outputs = returned if isinstance(returned, tuple) else (returned,)
            results[-1] += [*written, *(out for out in outputs if out is not None)]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_non_finite_values_are_noted_and_raised_once_on_reading(call):
    bad = torch.eye(6)
    bad[4, 2] = torch.nan
    for name, arguments in {
        "ntk_gram_": (torch.zeros(6, 6), [bad], [torch.ones(6, 1)], [1.0], [0.0], False),
        "jacobian_accumulate_.tile": (torch.zeros(6, 6), None, bad, None),
        "topk_eigh": (bad, 2, None, 1e-6),
        "spectral_norm": (bad, 1e-6),
        "agop_reduce_": (torch.zeros(6, 6), bad, 1.0),
        "agop_inner": (bad, bad),
    }.items():
        cuda.IMPLEMENTATIONS[name](*arguments)
        with pytest.raises(cx.NonFinite, match="NaN or an infinity"):
            cuda.check(CPU)
        cuda.check(CPU)
    large = torch.eye(270)
    large[200, 100] = torch.inf
    values, vectors, residuals = cuda.IMPLEMENTATIONS["topk_eigh"](large, 2, None, 1e-6)
    assert values.isnan().all()
    assert vectors.isnan().all()
    assert residuals.isnan().all()
    with pytest.raises(cx.NonFinite):
        cuda.check(CPU)


@dtypes
@pytest.mark.parametrize("case", cuda_cases.CHAINS, ids=str)
def test_chain(call, dtype, case):
    cuda_cases.check_chain(call, "cpu", dtype, case)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    d=st.integers(1, 40),
    batches=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    slope=st.sampled_from([0.0, 0.1, 1.0]),
    fixed=st.sets(st.integers(0, 2), max_size=2),
)
def test_any_chain(call, widths, d, batches, slope, fixed):
    fixed = tuple(number for number in fixed if number < len(widths))  # the last one is trained
    cuda_cases.check_chain(call, "cpu", torch.float64, ((d, *widths, 1), batches, (slope,), fixed))


@dtypes
@pytest.mark.parametrize(
    ("op", "version"),
    [(op, version) for op in ("ntk_gram", "spectral_norm") for version in cuda.VERSIONS[op][1:]],
)
def test_chain_over_every_version_of_what_it_calls(call, dtype, op, version):
    cuda.select(op, version)
    try:
        cuda_cases.check_chain(call, "cpu", dtype, ((7, 33, 21, 1), [9], (0.0, 1.0, 0.2), ()))
    finally:
        cuda.select(op, "simple")


def chain_on_both(call, layers, data, **options):
    """Losses, lambda_1 and weights by the CPU's op and by the emulated one."""
    found = []
    for op in (ops.cpu.chain_sgd_, lambda *a: call("chain_sgd_", *a)):
        copies = moved(layers)
        with torch.no_grad():
            results = op(*chain_arguments(copies, data, **options))
        found.append([*results, *(layer.weight for layer in copies), copies[0].bias])
    for expected, got in zip(*found, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    return found[1]


def test_a_chain_in_one_call_has_the_bits_of_one_call_per_step(call):
    x, y, index, sizes, rates = problem(30, 12, [5, 5, 1, 9, 3], torch.float32)
    whole, steps = chain((12, 19, 8, 1), torch.float32), chain((12, 19, 8, 1), torch.float32)
    observed = torch.tensor([True, False, True, True, False])
    losses, lambda_1 = call("chain_sgd_", *chain_arguments(whole, (x, y, index, sizes, rates), observed))
    assert lambda_1.isnan().tolist() == [False, True, False, False, True]
    for s, batch in enumerate(index.split(sizes.tolist())):
        now = slice(s, s + 1)
        found = call(
            "chain_sgd_", *chain_arguments(steps, (x, y, batch, sizes[now], rates[now]), observed[now])
        )
        assert torch.equal(found[0], losses[now])
        torch.testing.assert_close(found[1], lambda_1[now], rtol=0, atol=0, equal_nan=True)
    for one, other in zip(whole, steps, strict=True):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("widths", [(1,), (9, 1), (9, 4, 1)])
def test_launches_of_a_chain_are_few(call, widths):
    data = problem(20, 6, [5, 5], torch.float32)
    layers = chain((6, *widths), torch.float32)
    before = call.module.emulator_launches()
    call("chain_sgd_", *chain_arguments(layers, data, torch.zeros(2, dtype=torch.bool)))
    assert call.module.emulator_launches() == before + 2 * (3 + 2 * (len(widths) - 1))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_chain_ends_before_a_loss_above_the_limit(call, steps):
    data = problem(20, 6, [4] * 4, torch.float64)
    layers = chain((6, 5, 1), torch.float64)
    losses = chain_on_both(call, layers, data)[0]
    limit = float(losses[steps - 1]) * (1 - 1e-9)
    losses, lambda_1, *_ = chain_on_both(call, layers, data, loss_limit=limit)
    ended = int((losses > limit).nonzero()[0])
    assert losses[ended + 1 :].isnan().all()
    assert lambda_1.isfinite().tolist() == [s <= ended for s in range(4)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_chain_ends_before_what_is_not_finite_and_notes_it(call, bad):
    x, y, _, sizes, rates = problem(20, 6, [4, 6, 4], torch.float64)
    y[9] = bad
    with pytest.raises(cx.NonFinite):
        chain_on_both(call, chain((6, 5, 1), torch.float64), (x, y, torch.arange(14), sizes, rates))
    layers, twin = chain((6, 5, 1), torch.float64), chain((6, 5, 1), torch.float64)
    losses, _ = cuda.IMPLEMENTATIONS["chain_sgd_"](
        *chain_arguments(layers, (x, y, torch.arange(14), sizes, rates))
    )
    assert losses.isfinite().tolist() == [True, False, False]
    assert int(cuda.status(CPU)) == 1
    cuda.status(CPU).zero_()
    call("chain_sgd_", *chain_arguments(twin, (x, y, torch.arange(4), sizes[:1], rates[:1])))
    assert torch.equal(layers[0].weight, twin[0].weight)


def test_a_chain_that_is_stopped_notes_nothing_of_the_steps_behind(call):
    x, y, _, sizes, rates = problem(20, 6, [4, 6, 4], torch.float64)
    y[9] = torch.nan
    data = (x, y, torch.arange(14), sizes, rates)
    losses, *_ = chain_on_both(call, chain((6, 5, 1), torch.float64), data, loss_limit=0.0)
    assert losses.isfinite().tolist() == [True, False, False]


def test_a_chain_ends_before_a_kernel_that_overflows(call):
    layers = [ops.ChainLayer(torch.full((1, 3), 1.0))]
    x, y = torch.tensor([[1e25, -1e25, 1.0], [1.0, 2.0, 3.0]]), torch.zeros(2)
    one, rate = torch.tensor([1]), torch.tensor([1e-3], dtype=torch.float64)
    losses, lambda_1 = cuda.IMPLEMENTATIONS["chain_sgd_"](
        *chain_arguments(layers, (x, y, one * 0, one, rate))
    )
    assert losses.isnan().all()
    assert lambda_1.isnan().all()
    assert torch.equal(layers[0].weight, torch.full((1, 3), 1.0))
    with pytest.raises(cx.NonFinite):
        cuda.check(CPU)
    assert call("chain_sgd_", *chain_arguments(layers, (x, y, one, one, rate)))[0].item() == 36.0


def test_a_chain_of_dead_units_stays(call):
    layers = chain((4, 6, 1), torch.float64, biases=False)
    layers[0].weight.copy_(-layers[0].weight.abs())
    x, *rest = problem(8, 4, [3], torch.float64)
    _, lambda_1, *weights = chain_on_both(call, layers, (x.abs(), *rest))
    assert lambda_1.item() == 0.0
    assert torch.equal(weights[0], layers[0].weight)


def test_a_chain_reads_and_writes_views_with_gaps(call):
    storage = torch.full((9, 40), torch.nan, dtype=torch.float64)
    layers, twin = chain((12, 9, 1), torch.float64), chain((12, 9, 1), torch.float64)
    storage[:, 7:19] = layers[0].weight
    layers[0] = layers[0]._replace(weight=storage[:, 7:19])
    x, y, *steps = problem(30, 12, [5, 6], torch.float64)
    wide = torch.full((30, 50), torch.nan, dtype=torch.float64)
    wide[:, ::4][:, :12] = x
    targets = torch.full((30, 3), torch.nan, dtype=torch.float64)
    targets[:, 1] = y[:, 0]
    before = layers[0].weight._version, layers[1].weight._version
    one = call("chain_sgd_", *chain_arguments(layers, (wide[:, ::4][:, :12], targets[:, 1], *steps)))
    two = call("chain_sgd_", *chain_arguments(twin, (x, y, *steps)))
    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))
    assert torch.equal(storage[:, 7:19], twin[0].weight)
    assert storage[:, :7].isnan().all()
    assert storage[:, 19:].isnan().all()
    assert layers[0].weight._version > before[0]
    assert layers[1].weight._version > before[1]


def test_a_sample_that_is_not_there_ends_a_chain_and_is_named(call, monkeypatch):
    layers = chain((6, 5, 1), torch.float64)
    x, y, index, sizes, rates = problem(20, 6, [4, 4], torch.float64)
    monkeypatch.setattr(cuda._checks, "chain_sgd", lambda *_: None)  # as for indices that are on a GPU
    for wrong in (20, -1):
        index[5] = wrong
        losses, _ = cuda.IMPLEMENTATIONS["chain_sgd_"](*chain_arguments(layers, (x, y, index, sizes, rates)))
        assert losses.isfinite().tolist() == [True, False]
        with pytest.raises(ValueError, match="batch_index: expected samples of x"):
            cuda.check(CPU)


def test_missing_convergence_is_noted(call):
    cuda.status(CPU).fill_(2)
    with pytest.raises(RuntimeError, match="did not converge"):
        cuda.check(CPU)
    cuda.check(CPU)


@dtypes
def test_nothing_to_do_launches_nothing(call, dtype):
    empty = torch.empty(0, 5, dtype=dtype)
    kernel = torch.empty(0, 0, dtype=dtype)
    before = call.module.emulator_launches()
    call("ntk_gram_", kernel, [empty], [empty], [1.0], [0.0], False)
    call("jacobian_accumulate_.tile", kernel, None, empty, None)
    call("agop_reduce_", torch.empty(0, 0, dtype=dtype), torch.empty(7, 0, dtype=dtype), 1.0)
    none = torch.empty(0, dtype=torch.int64)
    data = (torch.ones(2, 3, dtype=dtype), torch.ones(2, dtype=dtype), none, none, none.double())
    assert call("chain_sgd_", *chain_arguments(chain((3, 1), dtype), data))[0].shape == (0,)
    assert call("topk_eigh", torch.empty(3, 0, 0, dtype=dtype), 0, None, 1e-6)[1].shape == (3, 0, 0)
    assert call("topk_eigh", torch.eye(4, dtype=dtype), 0, None, 1e-6)[1].shape == (4, 0)
    assert call("spectral_norm", torch.empty(2, 0, 0, dtype=dtype), 1e-6).tolist() == [0.0, 0.0]
    assert call("spectral_norm", torch.empty(0, 4, 4, dtype=dtype), 1e-6).shape == (0,)
    assert call.module.emulator_launches() == before


@dtypes
def test_products_over_nothing_are_zero(call, dtype):
    kernel = torch.full((3, 3), torch.nan, dtype=dtype)
    call(
        "ntk_gram_",
        kernel,
        [torch.empty(3, 0, dtype=dtype)],
        [torch.empty(3, 0, dtype=dtype)],
        [1.0],
        [1.0],
        False,
    )
    assert (kernel == 0).all()
    assert call("agop_inner", torch.empty(0, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)) == 0
    agop = torch.ones(2, 2, dtype=dtype)
    call("agop_reduce_", agop, torch.empty(0, 2, dtype=dtype), 1.0)
    assert (agop == 1).all()


def test_a_failed_launch_names_the_op_and_the_error(call, monkeypatch):
    monkeypatch.setattr(cuda, "_stream", lambda device: (3, 0))
    with pytest.raises(
        RuntimeError, match=r"agop_reduce: CUDA error 101 \(cudaErrorInvalidDevice\): invalid device"
    ):
        call("agop_reduce_", torch.eye(3), torch.eye(3), 1.0)


def test_versions_are_chosen_by_name():
    for op, versions in cuda.VERSIONS.items():
        assert cuda.selected(op) == versions[0] == "simple"
        try:
            cuda.select(op, versions[-1])
            assert cuda.selected(op) == versions[-1]
        finally:
            cuda.select(op, "simple")
        with pytest.raises(ValueError, match=f"version: expected one of simple.* for {op}, got 'fastest'"):
            cuda.select(op, "fastest")
    with pytest.raises(ValueError, match=r"op: expected one of ntk_gram, .*got 'gram'"):
        cuda.select("gram", "simple")


def test_a_version_that_does_not_exist_is_refused(call, monkeypatch):
    monkeypatch.setattr(cuda, "_selected", dict.fromkeys(cuda.VERSIONS, 99))
    with pytest.raises(ValueError, match=r"ntk_gram_?: expected a version from 0 to .*, got 99"):
        call("ntk_gram_", torch.empty(2, 2), [torch.ones(2, 1)], [torch.ones(2, 1)], [1.0], [0.0], False)
    with pytest.raises(ValueError, match=r"jacobian_conv2d: expected a version from 0 to 2, got 99"):
        call(
            "jacobian_accumulate_.tokens",
            torch.zeros(1, 1),
            None,
            torch.ones(1, 2, 3),
            torch.ones(1, 1, 2, 3),
            None,
            1.0,
            99,
        )
    for name, arguments in {
        "topk_eigh": (torch.eye(3), 1, None, 1e-6),
        "spectral_norm": (torch.eye(3), 1e-6),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected a version from 0 to .*, got 99"):
            call(name, *arguments)


def test_wrong_arguments_are_refused_before_any_launch(call):
    before = call.module.emulator_launches()
    with pytest.raises(ValueError, match="kernel: expected shape"):
        call("ntk_gram_", torch.empty(2, 3), [torch.ones(2, 1)], [torch.ones(2, 1)], [1.0], [0.0], False)
    with pytest.raises(TypeError, match=r"expected torch.float32 or torch.float64"):
        call("spectral_norm", torch.eye(3, dtype=torch.float16), 1e-6)
    assert call.module.emulator_launches() == before


def test_state_of_the_machine_is_said_in_words(module):
    assert module.cuda_status()["reason"] == ""
    assert module.cuda_status()["devices"] == ["emulated on the host, sm_90"]
    module.emulator_configure(devices=0)
    assert module.cuda_status() == {
        "driver": "", "runtime": "13.0", "devices": [], "reason": "no CUDA driver: no usable device",
    }  # fmt: skip
    module.emulator_configure()


def test_cuda_tensors_without_cuda_kernels_say_how_to_get_them():
    if cuda.compiled():
        pytest.skip("this build holds CUDA kernels")
    refuse = cuda._not_compiled("ntk_gram_")
    with pytest.raises(RuntimeError, match=r"ntk_gram_: got CUDA tensors, but .* built without CUDA"):
        refuse(1, 2)
