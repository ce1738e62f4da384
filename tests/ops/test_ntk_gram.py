"""ntk_gram and ntk_gram_cross against explicit Jacobians in float64, at every SIMD level."""

from __future__ import annotations

import math

import pytest
import torch
from gram_reference import GRAM_BOUND, gram_error, jacobian, nan_like
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext import _C, ops

DTYPES = [torch.float32, torch.float64]
#: Samples, outputs, and (input width, output width) of two layers: every edge of the blocks (60 x 60; from 192 rows on
#: 336 x 336, packed 96 columns at a time), of the micro tiles (5 x 5, 4 x 3, 3 x 3; packed 8 x 48, 8 x 24, 4 x 24,
#: 4 x 12) and of the vectors, widths that need a second chunk, and a width of one.
SHAPES = [
    (1, 1, (1, 1), (0, 1)),
    (2, 1, (3, 5), (16, 1)),
    (5, 1, (100, 64), (64, 1)),
    (31, 1, (7, 33), (1, 2)),
    (33, 3, (9, 4), (0, 3)),
    (61, 1, (1027, 17), (31, 1030)),
    (127, 1, (64, 15), (1, 1)),
    (129, 2, (10, 33), (17, 2)),
    (7, 61, (3, 4), (5, 1)),
    (2, 130, (2, 3), (8, 7)),
    (481, 1, (97, 0), (193, 1)),
    (87, 3, (95, 3), (0, 100)),
    (191, 1, (113, 20), (7, 33)),
    (64, 3, (113, 20), (7, 33)),
    (345, 1, (2100, 1), (0, 3)),
    (2, 340, (2, 3), (8, 7)),
]


def layers(shape, dtype, generator=None):
    n, c, *widths = shape
    make = lambda *size: torch.randn(*size, dtype=dtype, generator=generator)  # noqa: E731
    a = [make(n, m) for m, _ in widths]
    b = [make(n, c, w) for _, w in widths]
    scale = [0.5 + index for index in range(len(widths))]
    beta = [0.3 * (index + 1) for index in range(len(widths))]
    return a, b, scale, beta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_explicit_jacobian(simd, shape, dtype):
    a, b, scale, beta = layers(shape, dtype)
    n, c = shape[:2]
    kernel = nan_like((n * c, n * c), dtype)
    assert ops.ntk_gram(a, b, scale, beta, out=kernel) is kernel
    assert gram_error(kernel, jacobian(a, b, scale, beta)) <= GRAM_BOUND[dtype]
    assert torch.equal(kernel, kernel.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
def test_cross_matches_explicit_jacobians(simd, shape, dtype):
    n, c, *widths = shape
    xa, xb, scale, beta = layers(shape, dtype)
    za, zb, _, _ = layers((n + 63, c, *widths), dtype)
    kernel = nan_like((n * c, (n + 63) * c), dtype)
    ops.ntk_gram_cross(xa, xb, za, zb, scale, beta, out=kernel)
    exact = jacobian(xa, xb, scale, beta), jacobian(za, zb, scale, beta)
    assert gram_error(kernel, *exact) <= GRAM_BOUND[dtype]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70),
    c=st.integers(1, 4),
    widths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3),
    level=st.sampled_from(_C.available_simd_levels()),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(n, c, widths, level, double, seed):
    _C.set_simd_level(level)
    dtype = DTYPES[double]
    a, b, scale, beta = layers((n, c, *widths), dtype, torch.Generator().manual_seed(seed))
    kernel = nan_like((n * c, n * c), dtype)
    ops.ntk_gram(a, b, scale, beta, out=kernel)
    assert gram_error(kernel, jacobian(a, b, scale, beta)) <= GRAM_BOUND[dtype]
    cross = ops.ntk_gram_cross(a, b, a[:], b[:], scale, beta, out=nan_like((n * c, n * c), dtype))
    assert torch.equal(cross.tril(), kernel.tril())


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_reference(simd, dtype):
    a, b, scale, beta = layers((37, 2, (20, 30), (0, 5)), dtype)
    expected, got = nan_like((74, 74), dtype), nan_like((74, 74), dtype)
    ops.reference.ntk_gram_(expected, a, b, scale, beta, False)
    torch.ops.catapult.ntk_gram_(got, a, b, scale, beta, False)
    # Relative to the rows: entries in which much cancels are as uncertain in the reference.
    size = expected.diagonal().sqrt()
    assert ((got - expected).abs() <= 2 * GRAM_BOUND[dtype] * torch.outer(size, size)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_expanded_and_offset_views(simd, dtype):
    n = 33
    storage = torch.full((n, 200), math.nan, dtype=dtype)
    storage[:, 7:60] = torch.randn(n, 53, dtype=dtype)
    columns = torch.randn(11, n, dtype=dtype)
    token_major = torch.randn(2, n, 9, dtype=dtype).transpose(0, 1)  # [n, 2, 9]
    a = [storage[:, 7:60], columns.T, torch.randn(2 * n, 5, dtype=dtype)[1::2]]
    b = [
        torch.randn(1, 1, 4, dtype=dtype).expand(n, 2, 4),
        token_major,
        torch.randn(n, 2, 12, dtype=dtype)[:, :, ::3],
    ]
    scale, beta = [1.0, 0.5, 2.0], [0.1, 0.0, 1.0]
    kernel = ops.ntk_gram(a, b, scale, beta, out=nan_like((2 * n, 2 * n), dtype))
    assert gram_error(kernel, jacobian(a, b, scale, beta)) <= GRAM_BOUND[dtype]
    one_input = [torch.randn(1, 6, dtype=dtype).expand(n, 6)]
    kernel = ops.ntk_gram(one_input, [b[1]], [1.0], [0.0])
    assert gram_error(kernel, jacobian(one_input, [b[1]], [1.0], [0.0])) <= GRAM_BOUND[dtype]


def gram(xa, xb, za, zb, scale, beta):
    """K(x, z) in float64, from the products that define it: without the Jacobians of wide layers."""
    total = 0.0
    for a, b, e, f, s, t in zip(xa, xb, za, zb, scale, beta, strict=True):
        samples = (a.double() @ e.double().T + t).repeat_interleave(b.shape[1], 0)
        samples = samples.repeat_interleave(b.shape[1], 1)  # [n c, m c]
        total = total + s * samples * (b.double().flatten(0, 1) @ f.double().flatten(0, 1).T)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("n", "c", "widths"),
    [
        (255, 1, (129, 70)), (256, 1, (129, 70)), (481, 1, (64, 1025)), (97, 5, (300, 65)), (300, 1, (63, 2100)),
    ],
)  # fmt: skip
def test_zeros_that_are_passed_over(simd, dtype, zeros, n, c, widths):
    """Features and sensitivities behind a ReLU, beside a layer without zeros."""
    a, b, scale, beta = layers((n, c, widths, (33, 80)), dtype)
    for factor in (a[0], b[0], b[1]):
        factor.masked_fill_(torch.rand_like(factor) < zeros, 0.0)
    za, zb, _, _ = layers((n + 1, c, widths, (33, 80)), dtype)
    kernel, cross = nan_like((n * c, n * c), dtype), nan_like((n * c, (n + 1) * c), dtype)
    ops.ntk_gram(a, b, scale, beta, out=kernel)
    ops.ntk_gram_cross(a, b, za, zb, scale, beta, out=cross)

    size = gram(a, b, a, b, scale, beta).diagonal().sqrt()
    for found, (fa, fb) in ((kernel, (a, b)), (cross, (za, zb))):
        bound = GRAM_BOUND[dtype] * torch.outer(size, gram(fa, fb, fa, fb, scale, beta).diagonal().sqrt())
        assert ((found.double() - gram(a, b, fa, fb, scale, beta)).abs() <= bound).all()
    assert torch.equal(kernel, kernel.T)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.ntk_gram(a, b, scale, beta), kernel)
    finally:
        torch.set_num_threads(threads)


def test_a_nan_among_zeros_is_an_error(simd):
    a, b, _, _ = layers((256, 1, (64, 64)), torch.float32)
    b[0].masked_fill_(torch.rand_like(b[0]) < 0.6, 0.0)
    b[0][200, 0, 7] = math.nan
    with pytest.raises(cx.NonFinite):
        ops.ntk_gram(a, b)


def test_large_off_tile_size(simd):
    a, b = torch.randn(2001, 6), torch.randn(2001, 3)
    kernel = ops.ntk_gram([a], [b], out=nan_like((2001, 2001), torch.float32))
    assert gram_error(kernel, jacobian([a], [b], [1.0], [0.0])) <= 2e-6
    assert torch.equal(kernel, kernel.T)


def test_identity_sensitivities_of_the_last_layer(simd):
    a = torch.randn(19, 23)
    b = torch.eye(10).expand(19, 10, 10)
    kernel = ops.ntk_gram([a], [b], [1.0], [1.0])
    assert gram_error(kernel, jacobian([a], [b], [1.0], [1.0])) <= 2e-6
    assert torch.count_nonzero(kernel) == 19 * 19 * 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_reads_the_lower_triangle(simd, dtype):
    a, b, scale, beta = layers((61, 1, (8, 9)), dtype)
    start = torch.randn(61, 61, dtype=dtype)
    kernel = torch.where(torch.ones(61, 61).tril().bool(), start, math.nan)
    ops.ntk_gram(a, b, scale, beta, out=kernel, accumulate=True)
    expected = start.tril() + start.tril(-1).T + ops.ntk_gram(a, b, scale, beta)
    torch.testing.assert_close(kernel, expected)
    assert torch.equal(kernel, kernel.T)


def test_cross_accumulates():
    xa, xb, scale, beta = layers((6, 2, (8, 9)), torch.float64)
    za, zb, _, _ = layers((3, 2, (8, 9)), torch.float64)
    start = torch.randn(12, 6, dtype=torch.float64)
    got = ops.ntk_gram_cross(xa, xb, za, zb, scale, beta, out=start.clone(), accumulate=True)
    torch.testing.assert_close(got, start + ops.ntk_gram_cross(xa, xb, za, zb, scale, beta))


@pytest.mark.parametrize("dtype", DTYPES)
def test_additive_over_layers(simd, dtype):
    a, b, scale, beta = layers((40, 1, (70, 20), (3, 50), (11, 1)), dtype)
    together = ops.ntk_gram(a, b, scale, beta)
    one_by_one = nan_like((40, 40), dtype)
    for index in range(3):
        layer = [part[index : index + 1] for part in (a, b, scale, beta)]
        ops.ntk_gram(*layer, out=one_by_one, accumulate=index > 0)
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [127, 301])
def test_permuting_samples_permutes_the_kernel_bitwise(simd, dtype, n):
    a, b, scale, beta = layers((n, 1, (65, 20), (300, 1)), dtype)
    order = torch.randperm(n)
    kernel = ops.ntk_gram(a, b, scale, beta)
    permuted = ops.ntk_gram([x[order] for x in a], [x[order] for x in b], scale, beta)
    assert torch.equal(permuted, kernel[order][:, order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 3])
def test_bitwise_equal_for_any_thread_count(simd, dtype, c):
    a, b, scale, beta = layers((128, c, (400, 300), (100, 1)), dtype)
    za, zb, _, _ = layers((90, c, (400, 300), (100, 1)), dtype)
    first, cross = ops.ntk_gram(a, b, scale, beta), ops.ntk_gram_cross(a, b, za, zb, scale, beta)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(first, ops.ntk_gram(a, b, scale, beta))
        assert torch.equal(cross, ops.ntk_gram_cross(a, b, za, zb, scale, beta))


@pytest.mark.parametrize("n", [35, 150])
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_extreme_scales_that_cancel(simd, factor, n):
    # float32: a a^T is 1e-40 or 1e40 on the way to a kernel of order one
    a, b, scale, beta = layers((n, 2, (50, 20)), torch.float32)
    beta = [0.0]
    a, b = [a[0] * factor], [b[0] / factor]
    kernel = ops.ntk_gram(a, b, scale, beta)
    assert gram_error(kernel, jacobian(a, b, scale, beta)) <= 2e-6
    cross = ops.ntk_gram_cross(a, b, a, b, scale, beta)
    assert gram_error(cross, jacobian(a, b, scale, beta)) <= 2e-6


def test_one_faint_sample_keeps_its_digits(simd):
    a, b, scale, _ = layers((35, 1, (50, 20)), torch.float32)
    a[0][7] *= 1e-18
    kernel = ops.ntk_gram(a, b, scale, [0.0])
    exact = jacobian(a, b, scale, [0.0])
    assert gram_error(kernel, exact) <= 2e-6


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_extreme_scales_in_double(simd, factor):
    a, b, scale, _ = layers((35, 1, (50, 20)), torch.float64)
    kernel = ops.ntk_gram([a[0] * factor], b, scale, [0.0])
    assert gram_error(kernel, jacobian([a[0] * factor], b, scale, [0.0])) <= 1e-13


def test_relu_zeros_and_duplicates(simd):
    a = [torch.randn(40, 30).relu()]
    b = [torch.randn(40, 12)]
    a[0][3], b[0][5] = 0, 0
    a[0][8], b[0][8] = a[0][9], b[0][9]
    kernel = ops.ntk_gram(a, b)
    assert gram_error(kernel, jacobian(a, b, [1.0], [0.0])) <= 2e-6
    assert not kernel[3].any()
    assert not kernel[5].any()
    assert torch.equal(kernel[8], kernel[9])


def test_error_no_larger_than_plain_torch(simd):
    # Long sums of positive numbers: the hard case for a single running sum.
    a, b = torch.rand(24, 100_000), torch.ones(24, 1)
    exact = jacobian([a], [b], [1.0], [0.0])
    ours = gram_error(ops.ntk_gram([a], [b]), exact)
    assert ours <= 2e-6
    assert ours <= 2 * gram_error(a @ a.T, exact) + 2e-7


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_error_of_packed_blocks_no_larger_than_plain_torch(simd, zeros):
    a, b = torch.rand(300, 20_000), torch.ones(300, 1)
    a[torch.rand_like(a) < zeros] = 0.0
    ours = gram_error(ops.ntk_gram([a], [b]), a.double())
    assert ours <= 2e-6
    assert ours <= 2 * gram_error(a @ a.T, a.double()) + 2e-7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b"])
def test_non_finite_input_is_an_error(simd, bad, where):
    for n, c in ((5, 1), (62, 2)):
        a, b, scale, beta = layers((n, c, (9, 9)), torch.float32)
        (a[0] if where == "a" else b[0]).view(-1)[-1] = bad
        with pytest.raises(cx.NonFinite, match="ntk_gram_: a NaN or an infinity"):
            ops.ntk_gram(a, b, scale, beta)
        with pytest.raises(cx.NonFinite, match="ntk_gram_cross_: a NaN or an infinity"):
            ops.ntk_gram_cross(a, b, a, b, scale, beta)


def test_overflow_is_an_error(simd):
    a, b = torch.full((3, 4), 1e15), torch.full((3, 4), 1e15)
    with pytest.raises(cx.NonFinite):
        ops.ntk_gram([a], [b])
    assert ops.ntk_gram([a.double()], [b.double()])[0, 0] == pytest.approx(16e60)


def test_no_samples():
    a, b = [torch.randn(0, 4)], [torch.randn(0, 2, 3)]
    assert ops.ntk_gram(a, b).shape == (0, 0)
    za, zb = [torch.randn(3, 4)], [torch.randn(3, 2, 3)]
    assert ops.ntk_gram_cross(a, b, za, zb).shape == (0, 6)
    assert ops.ntk_gram_cross(za, zb, a, b).shape == (6, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [33, 259])
def test_memory_past_the_rows_is_not_read(simd, n, dtype):
    # Rows end at the very end of a storage whose other half is NaN.
    storage = torch.full((2 * n * 13,), math.nan, dtype=dtype)
    storage[: n * 13] = torch.randn(n * 13, dtype=dtype)
    a = storage[: n * 13].view(n, 13)
    kernel = ops.ntk_gram([a], [torch.ones(n, 1, dtype=dtype)])
    assert gram_error(kernel, a.double()) <= GRAM_BOUND[dtype]


def test_direct_form_is_the_op():
    a, b, scale, beta = layers((9, 1, (30, 20)), torch.float32)
    expected = ops.ntk_gram(a, b, scale, beta)
    kernel = nan_like((9, 9), torch.float32)
    with torch.no_grad():
        ops.ntk_gram_(kernel, a, b, scale, beta)
    assert torch.equal(kernel, expected)
    a[0].requires_grad_()
    ops.ntk_gram_(kernel, a, b, scale, beta)
    assert kernel.requires_grad  # not silently cut off
