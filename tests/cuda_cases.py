"""What every CUDA op must give, written once: for the GPU, and for the emulator where there is none.

Each check takes `call(name, *arguments)` (name as in `ops._schema.OPS`) and the device of its tensors, compares
with the reference in float64 and says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from chain_reference import assert_steps_match, chain, chain_arguments, moved, problem
from gram_reference import GRAM_BOUND, gram_error, jacobian, nan_like
from torch import Tensor

from catapult_ext.ops import ChainLayer, reference

Call = Callable[..., object]
DTYPES = [torch.float32, torch.float64]
#: Of eigenvalues relative to the largest one.
EIGEN_BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
#: Of sums whose scale is known: a multiple of rounding.
SUM_BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}


def layers(
    n: int, c: int, widths: Sequence[tuple[int, int]], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor], list[float], list[float]]:
    """Random A [n, m], B [n, c, w], scale, beta of a network whose layers have these widths (m, w)."""
    a = [torch.randn(n, m, dtype=dtype).to(device) for m, _ in widths]
    b = [torch.randn(n, c, w, dtype=dtype).to(device) for _, w in widths]
    count = len(widths)
    return a, b, [0.5 + i for i in range(count)], [0.3 * (i % 3) for i in range(count)]


def check_gram(
    call: Call, device: str, dtype: torch.dtype, n: int, c: int, widths: Sequence[tuple[int, int]]
) -> None:
    """Symmetric kernel: every entry written, exact symmetry, accuracy; then accumulated once more."""
    a, b, scale, beta = layers(n, c, widths, dtype, device)
    kernel = nan_like((n * c, n * c), dtype).to(device)
    call("ntk_gram_", kernel, a, b, scale, beta, False)
    exact = jacobian([x.cpu() for x in a], [x.cpu() for x in b], scale, beta)
    assert torch.equal(kernel, kernel.T)
    assert gram_error(kernel.cpu(), exact) <= GRAM_BOUND[dtype]
    call("ntk_gram_", kernel, a, b, scale, beta, True)
    assert gram_error(kernel.cpu() / 2, exact) <= GRAM_BOUND[dtype]


def check_gram_cross(
    call: Call, device: str, dtype: torch.dtype, n: int, m: int, c: int, widths: Sequence[tuple[int, int]]
) -> None:
    """Cross kernel against the reference, relative to the norms of the rows."""
    xa, xb, scale, beta = layers(n, c, widths, dtype, device)
    za, zb, _, _ = layers(m, c, widths, dtype, device)
    kernel = nan_like((n * c, m * c), dtype).to(device)
    call("ntk_gram_cross_", kernel, xa, xb, za, zb, scale, beta, False)
    x = jacobian([t.cpu() for t in xa], [t.cpu() for t in xb], scale, beta)
    z = jacobian([t.cpu() for t in za], [t.cpu() for t in zb], scale, beta)
    size = x.norm(dim=1)[:, None] * z.norm(dim=1)[None, :]
    assert ((kernel.cpu().double() - x @ z.T).abs() <= GRAM_BOUND[dtype] * size).all()


def check_strided_gram(call: Call, device: str, dtype: torch.dtype) -> None:
    """Transposed, stepped, offset and expanded views go in as they are."""
    n, c = 37, 3
    a = [
        torch.randn(20, n, dtype=dtype).to(device).T,
        torch.randn(2 * n, 21, dtype=dtype).to(device)[1::2, 3::2],
        torch.randn(1, 5, dtype=dtype).to(device).expand(n, 5),
        torch.randn(n, 24, dtype=dtype).to(device)[:, :22],  # rows 16 bytes apart, the last piece is short
        torch.randn(n, 24, dtype=dtype).to(device)[:, 1:],
    ]
    b = [
        torch.randn(c, 8, n, dtype=dtype).to(device).permute(2, 0, 1),
        torch.randn(1, c, 1, dtype=dtype).to(device).expand(n, c, 6),
        torch.randn(n, 1, 9, dtype=dtype).to(device)[..., 2:].expand(n, c, 7),
        torch.randn(n, c, 12, dtype=dtype).to(device)[..., :9],
        torch.randn(n, c, 1, dtype=dtype).to(device).expand(n, c, 9),
    ]
    scale, beta = [1.0, 2.0, 0.5, 1.5, 1.0], [0.0, 1.0, 0.0, 0.5, 0.0]
    kernel = nan_like((n * c, n * c), dtype).to(device)
    call("ntk_gram_", kernel, a, b, scale, beta, False)
    exact = jacobian([x.cpu() for x in a], [x.cpu() for x in b], scale, beta)
    assert gram_error(kernel.cpu(), exact) <= GRAM_BOUND[dtype]


def _symmetric(size: int, dtype: torch.dtype, device: str) -> Tensor:
    half = torch.randn(size, size, dtype=dtype)
    return (half + half.T).to(device)


def _compare_sweep(
    name: str, call: Call, device: str, dtype: torch.dtype, rows: int, shape: tuple[int, ...], *rest
):
    """Run a sweep with and without gradient; rest(weight) are the arguments behind kernel and grad."""
    kernel = _symmetric(rows, dtype, device)
    grad, weight = torch.randn(shape, dtype=dtype).to(device), torch.randn(rows, dtype=dtype).to(device)
    exact = [kernel.cpu().double().clone(), grad.cpu().double().clone()]
    alone = kernel.clone()
    arguments, twin, twin_arguments = rest
    call(name, alone, None, *arguments(None))
    call(name, kernel, grad, *arguments(weight))
    twin(*exact, *twin_arguments(weight.cpu().double()))
    assert torch.equal(alone, kernel)
    assert torch.equal(kernel, kernel.T)
    for got, wanted in zip((kernel, grad), exact, strict=True):
        if wanted.numel():
            assert (got.cpu().double() - wanted).abs().max() <= SUM_BOUND[dtype] * wanted.abs().max()


def check_tile(call: Call, device: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    """K += G G^T, grad += G^T w of a given tile, dense and transposed."""
    for tile in (torch.randn(rows, columns, dtype=dtype), torch.randn(columns, rows, dtype=dtype).T):
        _compare_sweep(
            "jacobian_accumulate_.tile", call, device, dtype, rows, (columns,),
            lambda w, tile=tile: (tile.to(device), w),
            reference.jacobian_accumulate_tile_,
            lambda w, tile=tile: (tile.double(), w),
        )  # fmt: skip


def check_tokens(
    call: Call,
    device: str,
    dtype: torch.dtype,
    n: int,
    c: int,
    positions: int,
    width: int,
    out: int,
    tile_bytes: int,
) -> None:
    """A Linear over positions."""
    a, b = torch.randn(n, positions, width, dtype=dtype), torch.randn(n, c, positions, out, dtype=dtype)
    _compare_sweep(
        "jacobian_accumulate_.tokens", call, device, dtype, n * c, (out, width),
        lambda w: (a.to(device), b.to(device), w, 0.7, tile_bytes),
        reference.jacobian_accumulate_tokens_,
        lambda w: (a.double(), b.double(), w, 0.7, tile_bytes),
    )  # fmt: skip


#: n, c, channels, image, output channels, kernel size, stride, padding, dilation, groups.
CONVOLUTIONS = [
    (3, 2, 2, (5, 4), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 1, 4, (7, 6), 6, (3, 2), (2, 1), (0, 1), (2, 1), 2),
    (1, 1, 3, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 1, 3, (9, 8), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 1, 6, (6, 6), 6, (3, 3), (1, 2), (2, 0), (1, 2), 6),
    (2, 1, 8, (4, 20), 5, (1, 5), (1, 1), (0, 2), (1, 1), 1),
    (2, 1, 5, (7, 8), 4, (1, 1), (2, 2), (0, 0), (1, 1), 1),
]


#: How the images of a convolution lie in memory; "gaps": rows that do not follow each other closely.
LAYOUTS = ("channels last", "dense", "gaps")


def _laid_out(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    """Random images [..., C, H, W]."""
    *outer, channels, height, width = shape
    if layout == "channels last":
        return torch.randn(*outer, height, width, channels, dtype=dtype).movedim(-1, -3)
    if layout == "gaps":
        return nan_like((*shape[:-1], width + 3), dtype)[..., 2:-1].copy_(torch.randn(*shape, dtype=dtype))
    return torch.randn(*shape, dtype=dtype)


def check_convolution(
    call: Call,
    device: str,
    dtype: torch.dtype,
    case: tuple,
    tile_bytes: int,
    layout: str = "channels last",
) -> None:
    """A convolution; with channels last, its sensitivities arrive transposed."""
    n, c, channels, image, out, kernel_size, stride, padding, dilation, groups = case
    sizes = [
        (image[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    input = _laid_out((n, channels, *image), dtype, layout)
    b = _laid_out((n, c, out, *sizes), dtype, layout)
    tail = (0.7, kernel_size, stride, padding, dilation, groups, tile_bytes)
    _compare_sweep(
        "jacobian_accumulate_.conv2d", call, device, dtype, n * c, (out, channels // groups, *kernel_size),
        lambda w: (input.to(device), b.to(device), w, *tail),
        reference.jacobian_accumulate_conv2d_,
        lambda w: (input.double(), b.double(), w, *tail),
    )  # fmt: skip


def check_agop(call: Call, device: str, dtype: torch.dtype, rows: int, d: int) -> None:
    """Accumulated AGOP and the inner product of two."""
    g, h = torch.randn(rows, d, dtype=dtype), torch.randn(rows + 3, d, dtype=dtype)
    agop = _symmetric(d, dtype, device)
    exact = agop.cpu().double() + 0.3 * g.double().T @ g.double()
    call("agop_reduce_", agop, g.to(device), 0.3)
    assert torch.equal(agop, agop.T)
    if d:
        assert (agop.cpu().double() - exact).abs().max() <= SUM_BOUND[dtype] * exact.abs().max()
    inner = call("agop_inner", g.to(device), h.to(device))
    assert isinstance(inner, Tensor)
    assert inner.dtype == torch.float64
    assert inner.shape == ()
    wanted = reference.agop_inner(g, h)
    assert (inner.cpu() - wanted).abs() <= SUM_BOUND[dtype] * wanted


def matrices(n: int) -> Iterator[tuple[str, Tensor]]:
    """Symmetric float64 matrices [n, n] that break eigensolvers."""
    x = torch.randn(n, n, dtype=torch.float64)
    psd = x @ x.T
    twice = torch.cat([x[: n - n // 2], x[: n // 2]])
    yield "wishart", psd
    yield "rank two", x[:, :2] @ x[:, :2].T
    yield "zero", torch.zeros_like(psd)
    yield "identity", torch.eye(n, dtype=torch.float64)
    yield "every sample twice", twice @ twice.T
    yield "nearly diagonal", torch.diag(torch.arange(n, dtype=torch.float64)) + 1e-9 * psd
    yield "outlier", psd + 1e4 * n * torch.ones_like(psd)
    yield "tiny", 1e-20 * psd
    yield "huge", 1e20 * psd
    yield "indefinite", x + x.T
    yield "negative", -psd


def check_topk(
    call: Call,
    device: str,
    dtype: torch.dtype,
    matrix: Tensor,
    k: int,
    tol: float = 1e-6,
    start: Tensor | None = None,
) -> Tensor:
    """Eigenvalues, orthonormal vectors, reported residuals; garbage above the diagonal is not read."""
    n = matrix.shape[-1]
    matrix = matrix.to(dtype)
    poisoned = torch.tril(matrix) + torch.triu(torch.full_like(matrix, torch.nan), 1)
    values, vectors, residuals = call("topk_eigh", poisoned.to(device), k, start, tol)
    values, vectors, residuals = values.cpu().double(), vectors.cpu().double(), residuals.cpu().double()
    matrix = matrix.double()
    exact = torch.linalg.eigvalsh(matrix).flip(-1)[:k]
    size = max(float(torch.linalg.matrix_norm(matrix, 2)), 1e-300)
    bound = EIGEN_BOUND[dtype] * size
    assert (values - exact).abs().max() <= bound
    assert (values.diff() <= 0).all()
    assert (vectors.T @ vectors - torch.eye(k, dtype=torch.float64)).abs().max() <= EIGEN_BOUND[dtype]
    actual = (matrix @ vectors - vectors * values).norm(dim=0)
    assert (actual <= max(tol, EIGEN_BOUND[dtype]) * size).all()
    assert (actual - residuals).abs().max() <= 1e-6 * actual.max() + 1e-15 * size * n
    assert torch.equal(vectors.amax(0), vectors.abs().amax(0))  # a largest component is positive
    return vectors.to(dtype).to(device)


def check_norm(call: Call, device: str, dtype: torch.dtype, batch: Tensor, tol: float = 1e-6) -> None:
    """Largest eigenvalues of positive semi-definite matrices [b, n, n]; their order must not matter."""
    batch = batch.to(dtype)
    values = call("spectral_norm", batch.to(device), tol)
    assert isinstance(values, Tensor)
    exact = torch.linalg.eigvalsh(batch.double())[..., -1]
    assert ((values.cpu().double() - exact).abs() <= (tol + EIGEN_BOUND[dtype]) * exact).all()
    assert torch.equal(call("spectral_norm", batch.flip(0).to(device), tol).flip(0), values)  # type: ignore[attr-defined]


#: Widths, batches, slopes, layers that are not trained: rests of the groups of 8 samples and 8 rows, of 32 columns
#: and of the tiles of 64; one layer; more parameters than one launch updates.
CHAINS: list[tuple[tuple[int, ...], list[int], tuple[float, ...], tuple[int, ...]]] = [
    ((5, 1), [3, 1], (0.0,), ()),
    ((1, 1, 1), [2], (0.0,), ()),
    ((20, 33, 1), [5, 5, 2], (0.0,), ()),
    ((7, 33, 21, 1), [1, 9, 16], (0.0, 1.0, 0.2), ()),
    ((17, 3, 70, 2, 1), [13], (0.2, 0.0), (0, 2)),
    ((3,) * 12 + (1,), [4, 6], (1.0, 0.3), ()),
    ((300, 9, 5, 1), [6], (0.0,), (0,)),
]


def check_chain(call: Call, device: str, dtype: torch.dtype, case: tuple) -> None:
    """Each step of `chain_sgd_` from equal state."""
    sizes, batches, slopes, fixed = case
    layers = moved(chain(sizes, dtype, slopes=slopes, fixed=fixed), device=device)
    x, y, *steps = problem(20, sizes[0], batches, dtype)

    def step_(layers: Sequence[ChainLayer], data: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found = call("chain_sgd_", *chain_arguments(layers, data))
        assert isinstance(found, tuple)
        return found

    assert_steps_match(step_, layers, (x.to(device), y.to(device), *steps))


def every_op(device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, tuple[list[Tensor], tuple]]:
    """Name -> (results written in place, arguments): one small call of each op, for streams and graphs."""
    torch.manual_seed(seed)
    n, c = 21, 2
    a, b, scale, beta = layers(n, c, [(30, 20), (20, 1)], dtype, device)
    kernel, cross = _symmetric(n * c, dtype, device), torch.zeros(n * c, n * c, dtype=dtype, device=device)
    swept, grad = _symmetric(n * c, dtype, device), torch.zeros(33, dtype=dtype, device=device)
    weight = torch.randn(n * c, dtype=dtype).to(device)
    tile = torch.randn(n * c, 33, dtype=dtype).to(device)
    tokens, token_b = (
        torch.randn(n, 5, 6, dtype=dtype).to(device),
        torch.randn(n, c, 5, 4, dtype=dtype).to(device),
    )
    token_grad = torch.zeros(4, 6, dtype=dtype, device=device)
    image, image_b = (
        torch.randn(n, 3, 6, 6, dtype=dtype).to(device),
        torch.randn(n, c, 4, 6, 6, dtype=dtype).to(device),
    )
    image_grad = torch.zeros(4, 3, 3, 3, dtype=dtype, device=device)
    agop = _symmetric(30, dtype, device)
    large = torch.randn(300, 40, dtype=dtype).to(device)
    batch = torch.randn(9, 50, 60, dtype=dtype).to(device)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    links = moved(chain((6, 9, 4, 1), dtype), device=device)
    x, y, index, sizes, rates = problem(n, 6, [5, 5, 3], dtype)
    steps = x.to(device), y.to(device), index.to(device), sizes, rates.to(device)
    return {
        "ntk_gram_": ([kernel], (kernel, a, b, scale, beta, False)),
        "ntk_gram_cross_": ([cross], (cross, a, b, a, b, scale, beta, False)),
        "jacobian_accumulate_.tile": ([swept, grad], (swept, grad, tile, weight)),
        "jacobian_accumulate_.tokens": (
            [swept, token_grad],
            (swept, token_grad, tokens, token_b, weight, 0.5, 999),
        ),
        "jacobian_accumulate_.conv2d": (
            [swept, image_grad],
            (swept, image_grad, image, image_b, weight, 0.5, *geometry, 9999),
        ),
        "topk_eigh": ([], (large @ large.T, 3, None, 1e-6)),
        "spectral_norm": ([], (batch @ batch.mT, 1e-6)),
        "agop_reduce_": ([agop], (agop, a[0], 0.1)),
        "agop_inner": ([], (a[0], a[0].flip(0))),
        "chain_sgd_": (
            [p for link in links for p in (link.weight, link.bias) if p is not None],
            chain_arguments(links, steps),
        ),
    }
