"""Every op on a GPU: against float64, on streams, inside CUDA graphs, without a synchronisation, repeatably."""

from __future__ import annotations

import cuda_cases
import pytest
import torch
from chain_reference import chain, chain_arguments, moved, problem

import catapult_ext as cx
from catapult_ext.ops import cuda
from catapult_ext.ops._schema import OPS

pytestmark = pytest.mark.gpu

dtypes = pytest.mark.parametrize("dtype", cuda_cases.DTYPES)


@pytest.fixture
def device() -> str:
    """The current device, its status word made and empty."""
    torch.manual_seed(0)
    name = f"cuda:{torch.cuda.current_device()}"
    cuda.status(torch.device(name)).zero_()
    return name


def run(name, *arguments):
    """Call a registered op through the dispatcher, without waiting for it."""
    packet, _, overload = name.partition(".")
    op = getattr(torch.ops.catapult, packet)
    return (getattr(op, overload) if overload else op)(*arguments)


def call(name, *arguments):
    """Call an op and raise what it noted."""
    result = run(name, *arguments)
    cuda.check(torch.device("cuda"))
    return result


def outputs(written, returned) -> list[torch.Tensor]:
    """All results of a call of `every_op`."""
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [*written, *(out for out in returned if out is not None)]


@pytest.fixture(params=cuda.VERSIONS["ntk_gram"])
def gram_version(request):
    """Run the test with every implementation of ntk_gram that this GPU can run."""
    if request.param == "cluster" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters of blocks need compute capability 9.0")
    cuda.select("ntk_gram", request.param)
    yield request.param
    cuda.select("ntk_gram", "simple")


@dtypes
@pytest.mark.parametrize(
    ("n", "c", "widths"),
    [
        (1, 1, [(3, 2)]),
        (2, 3, [(7, 1), (0, 4)]),
        (31, 1, [(16, 16)]),
        (31, 1, [(260, 128), (33, 5), (4, 140)]),
        (33, 4, [(20, 9)]),
        (127, 1, [(3072, 1024), (1024, 1)]),
        (129, 10, [(30, 20)]),
        (1900, 1, [(300, 64), (17, 1)]),  # tiles of 128 where there are any
        (2001, 1, [(100, 1), (65, 33)]),
        (3, 1, [(1, 2)] * 35),
    ],
)
def test_gram(device, gram_version, dtype, n, c, widths):
    cuda_cases.check_gram(call, device, dtype, n, c, widths)
    cuda_cases.check_gram_cross(call, device, dtype, n, n + 3, c, widths)


@dtypes
def test_strided_gram(device, gram_version, dtype):
    cuda_cases.check_strided_gram(call, device, dtype)


@dtypes
@pytest.mark.parametrize(("n", "widths"), [(128, [(3072, 1024), (1024, 1)]), (1100, [(100, 40), (40, 1)])])
def test_gram_has_the_same_bits_at_every_call_and_in_a_graph(device, gram_version, dtype, n, widths):
    a, b, scale, beta = cuda_cases.layers(n, 1, widths, dtype, device)
    kernel = torch.full((n, n), torch.nan, dtype=dtype, device=device)
    arguments = ("ntk_gram_", kernel, a, b, scale, beta, False)
    call(*arguments)
    first = kernel.clone()
    for _ in range(20):
        kernel.fill_(torch.nan)
        call(*arguments)
        assert torch.equal(kernel, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*arguments)
    for _ in range(20):
        kernel.fill_(torch.nan)
        graph.replay()
        assert torch.equal(kernel, first)


def test_gram_beyond_32_bit_indices(device, gram_version):
    """More than 2^31 elements in the kernel: 46,400 rows, 8.6 GB."""
    n = 46400
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free device memory")
    a, b = torch.randn(n, 6, device=device), torch.ones(1, 1, device=device).expand(n, 1)
    kernel = torch.full((n, n), torch.nan, device=device)
    call("ntk_gram_", kernel, [a], [b], [1.0], [0.5], False)
    rows = torch.tensor([0, 1, 63, 64, n // 2, n - 65, n - 1], device=device)
    exact = a[rows].double() @ a.double().T + 0.5
    size = (a[rows].double().square().sum(1) + 0.5).sqrt()[:, None] * (
        a.double().square().sum(1) + 0.5
    ).sqrt()
    assert ((kernel[rows].double() - exact).abs() <= 2e-6 * size).all()
    assert torch.equal(kernel[rows], kernel[:, rows].T)


@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (65, 300), (130, 17), (128, 40000)])
def test_tile(device, gram_version, dtype, rows, columns):
    cuda_cases.check_tile(call, device, dtype, rows, columns)


@pytest.fixture(params=cuda.VERSIONS["jacobian_conv2d"])
def conv_version(request):
    """Run the test with every implementation of jacobian_conv2d."""
    cuda.select("jacobian_conv2d", request.param)
    yield request.param
    cuda.select("jacobian_conv2d", "simple")


@dtypes
@pytest.mark.parametrize("tile_bytes", [1, 700, 8 << 20])
def test_tokens(device, conv_version, dtype, tile_bytes):
    cuda_cases.check_tokens(call, device, dtype, 3, 2, 5, 7, 6, tile_bytes)
    cuda_cases.check_tokens(call, device, dtype, 8, 1, 64, 96, 80, 1 << 20)


@dtypes
@pytest.mark.parametrize("case", [*cuda_cases.CONVOLUTIONS,
    (16, 1, 64, (32, 32), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 1, 8, (4, 5), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (100, 1, 14, (7, 8), 128, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (600, 3, 1, (1, 3), 2, (1, 2), (1, 1), (0, 0), (1, 1), 1)], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", ["channels last", "dense"])
def test_convolution(device, conv_version, dtype, case, layout):
    for tile_bytes in (500, 20_000, 8 << 20):
        if case[0] < 16 or tile_bytes == 8 << 20:
            cuda_cases.check_convolution(call, device, dtype, case, tile_bytes, layout)


@dtypes
def test_convolution_in_a_graph_has_the_same_bits(device, conv_version, dtype):
    input, b = torch.randn(20, 8, 6, 6, dtype=dtype), torch.randn(20, 1, 70, 6, 6, dtype=dtype)
    kernel, grad = torch.zeros(20, 20, dtype=dtype), torch.zeros(70, 8, 3, 3, dtype=dtype)
    weight = torch.randn(20, dtype=dtype)
    input, b, kernel, grad, weight = (t.to(device) for t in (input, b, kernel, grad, weight))
    arguments = (input, b, weight, 0.5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1 << 16)
    found = []
    for graphed in (False, True, True):
        kernel.zero_()
        grad.zero_()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run("jacobian_accumulate_.conv2d", kernel, grad, *arguments)
            graph.replay()
        else:
            run("jacobian_accumulate_.conv2d", kernel, grad, *arguments)
        found.append((kernel.clone(), grad.clone()))
    cuda.check(torch.device(device))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@dtypes
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (90, 70), (5, 1300), (5000, 100)])
def test_agop(device, gram_version, dtype, rows, d):
    cuda_cases.check_agop(call, device, dtype, rows, d)


@pytest.fixture(params=cuda.VERSIONS["topk_eigh"])
def eigh_version(request):
    """Run the test with every implementation of topk_eigh."""
    cuda.select("topk_eigh", request.param)
    yield request.param
    cuda.select("topk_eigh", "simple")


@pytest.fixture
def krylov_version(eigh_version):
    """The same for matrices that go to block Krylov."""
    if eigh_version == "fused" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs clusters of blocks")
    return eigh_version


@pytest.fixture(params=cuda.VERSIONS["spectral_norm"])
def norm_version(request):
    """Run the test with every implementation of spectral_norm."""
    cuda.select("spectral_norm", request.param)
    yield request.param
    cuda.select("spectral_norm", "simple")


@dtypes
@pytest.mark.parametrize("n", [1, 2, 5, 31, 33, 127, 128, 129, 200, 256])
def test_direct_eigenpairs(device, eigh_version, dtype, n):
    for _, matrix in cuda_cases.matrices(n):
        for k in sorted({1, min(10, n), n}):
            cuda_cases.check_topk(call, device, dtype, matrix, k)


@dtypes
@pytest.mark.parametrize("n", [257, 600, 2001, 2113])
def test_krylov_cold_and_warm(device, krylov_version, dtype, n):
    tol = 1e-6 if dtype == torch.float32 else 1e-10
    decay = torch.arange(1, n + 51, dtype=torch.float64) ** -0.7
    x = torch.randn(n, n + 50, dtype=torch.float64) * decay
    start = cuda_cases.check_topk(call, device, dtype, x @ x.T, 10, tol=tol)
    cuda_cases.check_topk(call, device, dtype, 1.01 * (x @ x.T), 10, tol=tol, start=start)


@pytest.mark.parametrize("k", [4, 11])
def test_krylov_of_less_rank_than_columns(device, krylov_version, k):
    x = torch.randn(700, 2, dtype=torch.float64)
    cuda_cases.check_topk(call, device, torch.float64, x @ x.T, k, tol=1e-9)


@dtypes
@pytest.mark.parametrize(("n", "k"), [(128, 10), (200, 3), (600, 10), (2113, 12)])
def test_eigenpairs_have_the_same_bits_at_every_call_and_in_a_graph(device, krylov_version, dtype, n, k):
    x = torch.randn(n, 300, dtype=dtype, device=device) * torch.arange(1, 301, device=device) ** -1.0
    arguments = ("topk_eigh", (x @ x.T).contiguous(), k, None, 1e-5)
    first = call(*arguments)
    for _ in range(20):
        assert all(torch.equal(got, wanted) for got, wanted in zip(call(*arguments), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(*arguments)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(got, wanted) for got, wanted in zip(replayed, first, strict=True))


def test_krylov_without_convergence_ends_in_the_direct_solver(device, krylov_version):
    x = torch.randn(500, 500, dtype=torch.float64)
    cuda_cases.check_topk(call, device, torch.float64, x @ x.T, 3, tol=1e-30)


@dtypes
@pytest.mark.parametrize("n", [1, 2, 5, 32, 33, 100, 128, 129, 512, 700])
def test_norms(device, norm_version, dtype, n):
    if norm_version == "warp" and n > 512 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs clusters of blocks")
    x = torch.randn(3, n, n + 2, dtype=torch.float64)
    batch = x @ x.mT
    batch[1] *= 1e-20
    batch[2] += 1e4
    cuda_cases.check_norm(call, device, dtype, batch)


def test_many_small_norms(device, norm_version):
    x = torch.randn(500, 100, 120, dtype=torch.float64)
    cuda_cases.check_norm(call, device, torch.float32, x @ x.mT)  # flat spectra
    x = torch.rand(500, 100, 120, dtype=torch.float64)
    cuda_cases.check_norm(call, device, torch.float32, x @ x.mT)  # one eigenvalue stands out


@dtypes
@pytest.mark.parametrize("n", [5, 33, 128])
def test_norms_have_the_same_bits_at_every_call_and_in_a_graph(device, norm_version, dtype, n):
    x = torch.rand(40, n, n + 2, dtype=dtype, device=device)
    x[::2] -= 0.5
    arguments = ("spectral_norm", x @ x.mT, 1e-6)
    first = call(*arguments)
    for _ in range(20):
        assert torch.equal(call(*arguments), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(*arguments)
    for _ in range(20):
        graph.replay()
        assert torch.equal(replayed, first)


@dtypes
@pytest.mark.parametrize(
    "case",
    [*cuda_cases.CHAINS, ((100, 530, 270, 1), [5, 40, 129], (0.0,), ()), ((9, 40, 1), [500], (0.2,), ())],
    ids=str,
)
def test_chain(device, dtype, case):
    cuda_cases.check_chain(call, device, dtype, case)


def test_a_captured_chain_replays_with_other_batches_and_rates(device):
    x, y, index, sizes, rates = problem(40, 6, [5, 5, 3], torch.float32)
    data = [x.to(device), y.to(device), index.to(device), sizes, rates.to(device)]
    layers, twin = (moved(chain((6, 9, 4, 1), torch.float32), device=device) for _ in range(2))
    run("chain_sgd_", *chain_arguments(layers, data))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, lambda_1 = run("chain_sgd_", *chain_arguments(layers, data))
    for start in (layers, twin):
        for link, fresh in zip(start, chain((6, 9, 4, 1), torch.float32), strict=True):
            link.weight.copy_(fresh.weight)
            if link.bias is not None:
                link.bias.copy_(fresh.bias)
    for seed in (2, 3):
        _, _, other, _, faster = problem(40, 6, [5, 5, 3], torch.float32, seed)
        data[2].copy_(other)
        data[4].copy_(faster)
        graph.replay()
        expected = call(
            "chain_sgd_", *chain_arguments(twin, (x.to(device), y.to(device), other, sizes, faster))
        )
        assert torch.equal(losses, expected[0])
        assert torch.equal(lambda_1, expected[1])
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, twin, strict=True))


def test_a_sample_that_is_not_there_ends_a_chain_and_is_named(device):
    x, y, index, sizes, rates = problem(20, 6, [4, 4], torch.float32)
    layers = moved(chain((6, 5, 1), torch.float32), device=device)
    index[5] = 20
    data = (x.to(device), y.to(device), index.to(device), sizes, rates)
    losses, _ = run("chain_sgd_", *chain_arguments(layers, data))
    with pytest.raises(ValueError, match="batch_index: expected samples of x"):
        cuda.check(torch.device(device))
    assert losses.isfinite().tolist() == [True, False]


def test_non_finite_values_raise_when_read(device):
    bad = torch.eye(300, device=device)
    bad[200, 100] = torch.nan
    for n in (6, 300):
        part = bad[-n:, -n:] if n == 300 else torch.full((6, 6), torch.inf, device=device)
        for name, arguments in {
            "ntk_gram_": (torch.zeros(n, n, device=device), [part], [part], [1.0], [0.0], False),
            "topk_eigh": (part, 2, None, 1e-6),
            "spectral_norm": (part, 1e-6),
            "agop_inner": (part, part),
        }.items():
            run(name, *arguments)
            with pytest.raises(cx.NonFinite):
                cuda.check(torch.device("cuda"))
            cuda.check(torch.device("cuda"))


def test_nothing_synchronises(device):
    cases = cuda_cases.every_op(device, torch.float32)
    assert cases.keys() == OPS.keys()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, (_, arguments) in cases.items():
            run(name, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cuda.check(torch.device("cuda"))


@dtypes
@pytest.mark.parametrize("name", list(OPS))
def test_graph_capture(device, dtype, name):
    """A captured op replays on new inputs in the same memory."""
    written, arguments = cuda_cases.every_op(device, dtype)[name]
    before = [out.clone() for out in written]
    run(name, *arguments)  # outside of the capture once: modules load, the status word is there
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = run(name, *arguments)
    for out, old in zip(written, before, strict=True):
        out.copy_(old)
    graph.replay()
    replayed = [out.clone() for out in outputs(written, returned)]
    for out, old in zip(written, before, strict=True):
        out.copy_(old)
    eager = outputs(written, run(name, *arguments))
    cuda.check(torch.device("cuda"))
    assert all(torch.equal(x, y) for x, y in zip(replayed, eager, strict=True))


@dtypes
@pytest.mark.parametrize("name", list(OPS))
def test_bitwise_repeatable(device, dtype, name):
    first: list[torch.Tensor] = []
    for repeat in range(20):
        written, arguments = cuda_cases.every_op(device, dtype)[name]
        got = outputs(written, call(name, *arguments))
        if repeat == 0:
            first = got
        assert all(torch.equal(x, y) for x, y in zip(first, got, strict=True)), f"repeat {repeat}"


def test_concurrent_streams(device):
    """Every op on four streams at once equals itself alone."""
    alone = {}
    for name, (written, arguments) in cuda_cases.every_op(device, torch.float32).items():
        alone[name] = [out.clone() for out in outputs(written, call(name, *arguments))]
    copies = [cuda_cases.every_op(device, torch.float32) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in copies]
    torch.cuda.synchronize()
    results = []
    for name in OPS:
        for stream, cases in zip(streams, copies, strict=True):
            with torch.cuda.stream(stream):
                written, arguments = cases[name]
                results.append((name, [out.clone() for out in outputs(written, run(name, *arguments))]))
    torch.cuda.synchronize()
    # The sweeps share a kernel, so only the first of them starts from the same one as alone: all the same here.
    for name, got in results:
        assert all(torch.equal(x, y) for x, y in zip(alone[name], got, strict=True)), name


def test_device_of_the_tensors_decides(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cuda_cases.check_gram(lambda name, *a: run(name, *a), "cuda:1", torch.float32, 20, 1, [(5, 3)])
    assert torch.cuda.current_device() == 0


def test_arguments_on_two_devices_are_refused(device):
    with pytest.raises(ValueError, match="expected a tensor on"):
        run("agop_inner", torch.ones(2, 3, device=device), torch.ones(2, 3, device=device).cpu())
