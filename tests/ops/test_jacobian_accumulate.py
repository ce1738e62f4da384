"""jacobian_accumulate: tiles against float64 products, and whole layers against per-sample autograd."""

from __future__ import annotations

import math

import pytest
import torch
from gram_reference import GRAM_BOUND, gram_error, nan_like
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import catapult_ext as cx
from catapult_ext import _C, ops

DTYPES = [torch.float32, torch.float64]


def symmetric(size, dtype):
    start = torch.randn(size, size, dtype=dtype)
    return start + start.T


def per_sample_gradients(layer, x, cotangents):
    """Return d <cotangent_ij, layer(x_i)> / d weight by autograd, [n c, ...] in float64."""
    rows = []
    for sample, outputs in zip(x, cotangents, strict=True):
        result = layer(sample[None])[0]
        for cotangent in outputs:
            rows.append(torch.autograd.grad(result, layer.weight, cotangent, retain_graph=True)[0])
    return torch.stack(rows)


# --- one tile ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (2, 5), (5, 2047), (31, 2049), (61, 33), (127, 129), (130, 4100)]
)
def test_tile(simd, dtype, rows, cols):
    tile, weight = torch.randn(rows, cols, dtype=dtype), torch.randn(rows, dtype=dtype)
    kernel, grad = torch.zeros(rows, rows, dtype=dtype), torch.zeros(cols, dtype=dtype)
    ops.jacobian_accumulate_(kernel, tile, grad=grad, weight=weight)
    exact = tile.double()
    assert gram_error(kernel, exact) <= GRAM_BOUND[dtype]
    assert torch.equal(kernel, kernel.T)
    size = exact.abs().T @ weight.double().abs()
    error = (grad.double() - exact.T @ weight.double()).abs()
    assert (error <= GRAM_BOUND[dtype] * size).all()


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(0, 90),
    with_grad=st.booleans(),
    level=st.sampled_from(_C.available_simd_levels()),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_adds_to_what_is_there(rows, cols, with_grad, level, double, seed):
    _C.set_simd_level(level)
    dtype = DTYPES[double]
    torch.manual_seed(seed)
    tile, kernel = torch.randn(rows, cols, dtype=dtype), symmetric(rows, dtype)
    weight, grad = torch.randn(rows, dtype=dtype), torch.randn(cols, dtype=dtype)
    expected_kernel, expected_grad = kernel.clone(), grad.clone()
    ops.reference.jacobian_accumulate_tile_(expected_kernel, expected_grad, tile, weight)
    if with_grad:
        ops.jacobian_accumulate_(kernel, tile, grad=grad, weight=weight)
        torch.testing.assert_close(
            grad, expected_grad, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0
        )
    else:
        ops.jacobian_accumulate_(kernel, tile)
    torch.testing.assert_close(
        kernel, expected_kernel, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tile_and_weight(simd, dtype):
    storage = nan_like((33, 300), dtype)
    storage[:, 17:217] = torch.randn(33, 200, dtype=dtype)
    weight = torch.randn(33, 4, dtype=dtype)[:, 2]
    for tile in (
        storage[:, 17:217],
        torch.randn(200, 33, dtype=dtype).T,
        torch.randn(1, 50).to(dtype).expand(33, 50),
    ):
        kernel, grad = torch.zeros(33, 33, dtype=dtype), torch.zeros(tile.shape[1], dtype=dtype)
        ops.jacobian_accumulate_(kernel, tile, grad=grad, weight=weight)
        assert gram_error(kernel, tile.double()) <= GRAM_BOUND[dtype]
        torch.testing.assert_close(grad, tile.T @ weight)


def test_wide_tile_in_several_panels(simd):
    # 8 MiB panels: a float32 row of 130 samples is cut at 14336 columns
    tile, weight = torch.randn(130, 15000), torch.randn(130)
    kernel, grad = torch.zeros(130, 130), torch.zeros(15000)
    ops.jacobian_accumulate_(kernel, tile, grad=grad, weight=weight)
    assert gram_error(kernel, tile.double()) <= 2e-6
    torch.testing.assert_close(grad.double(), tile.double().T @ weight.double(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_additive_over_columns(simd, dtype):
    tile = torch.randn(45, 700, dtype=dtype)
    whole, parts = torch.zeros(45, 45, dtype=dtype), torch.zeros(45, 45, dtype=dtype)
    ops.jacobian_accumulate_(whole, tile)
    for part in tile.split(211, 1):
        ops.jacobian_accumulate_(parts, part)
    assert gram_error(whole, tile.double()) <= GRAM_BOUND[dtype]
    assert gram_error(parts, tile.double()) <= GRAM_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_thread_count(simd, dtype):
    tile, weight = torch.randn(96, 5000, dtype=dtype), torch.randn(96, dtype=dtype)

    def run():
        kernel, grad = torch.zeros(96, 96, dtype=dtype), torch.zeros(5000, dtype=dtype)
        ops.jacobian_accumulate_(kernel, tile, grad=grad, weight=weight)
        return kernel, grad

    first = run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = run()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("factor", [1e-19, 1e18])
def test_extreme_scales(simd, factor):
    # float32: the kernel (1e-38, 1e36) fits, sums of squares in vector lanes would not keep their digits
    tile = torch.rand(9, 300) * factor
    kernel = torch.zeros(9, 9)
    ops.jacobian_accumulate_(kernel, tile)
    assert gram_error(kernel, tile.double()) <= 2e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_is_an_error(simd, bad):
    tile = torch.randn(7, 40)
    tile[3, 39] = bad
    with pytest.raises(cx.NonFinite, match="jacobian_accumulate_: a NaN or an infinity"):
        ops.jacobian_accumulate_(torch.zeros(7, 7), tile)
    weight = torch.ones(7)
    weight[2] = bad
    with pytest.raises(cx.NonFinite, match="the kernel or the gradient"):
        ops.jacobian_accumulate_(torch.zeros(7, 7), torch.randn(7, 40), grad=torch.zeros(40), weight=weight)


# --- layers over positions ---

CONVOLUTIONS = [
    # channels in, out, kernel, stride, padding, dilation, groups, image
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 7)),
    (4, 6, (3, 2), (2, 1), (0, 2), (1, 2), 2, (8, 9)),
    (6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6, (5, 5)),  # depthwise
    (4, 8, (1, 1), (2, 2), (0, 0), (1, 1), 4, (5, 5)),
    (1, 1, (2, 2), (1, 1), (0, 0), (1, 1), 1, (2, 2)),
]


def convolution(case, n, c, dtype):
    channels, width, kernel_size, stride, padding, dilation, groups, image = case
    layer = nn.Conv2d(
        channels, width, kernel_size, stride, padding, dilation, groups, bias=False, dtype=dtype
    )
    x = torch.randn(n, channels, *image, dtype=dtype)
    out = layer(x)
    b = torch.randn(n, c, *out.shape[1:], dtype=dtype)
    geometry = {
        "kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
    }  # fmt: skip
    return layer, x, b, geometry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d_against_autograd(dtype, c, case):
    n = 5
    layer, x, b, geometry = convolution(case, n, c, dtype)
    exact = 0.7 * per_sample_gradients(layer.double(), x.double(), b.double())  # [n c, O, C / g, kh, kw]
    weight = torch.randn(n * c, dtype=dtype)
    row_bytes = exact[0, 0].numel() * n * c * x.element_size()
    for tile_bytes in (1, 2 * row_bytes, 4 * row_bytes, 1 << 20):
        kernel, grad = torch.zeros(n * c, n * c, dtype=dtype), torch.zeros(exact.shape[1:], dtype=dtype)
        ops.jacobian_accumulate_conv2d_(
            kernel, x, b, **geometry, grad=grad, weight=weight, scale=0.7, tile_bytes=tile_bytes
        )
        assert gram_error(kernel, exact.flatten(1)) <= GRAM_BOUND[dtype]
        expected = torch.tensordot(weight.double(), exact, 1).to(dtype)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d_tiles_cover_the_weight_once(case):
    layer, x, b, geometry = convolution(case, 4, 2, torch.float64)
    exact = per_sample_gradients(layer, x, b)
    row_bytes = exact[0, 0].numel() * 8 * 8
    for rows_that_fit in (1, 2, 3, 100):
        seen = 0
        for rows, tile in ops.conv_tiles(x, b, **geometry, tile_bytes=rows_that_fit * row_bytes):
            assert rows.start == seen
            assert tile.nbytes <= rows_that_fit * row_bytes
            torch.testing.assert_close(tile, exact[:, rows])
            seen = rows.stop
        assert seen == b.shape[2]


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 7), length=st.integers(1, 8), scale=st.sampled_from([1.0, -0.4]))
def test_any_slice_of_a_grouped_convolution(start, length, scale):
    torch.manual_seed(start * 100 + length)
    layer, x, b, geometry = convolution(
        (4, 8, (2, 3), (1, 2), (1, 0), (1, 1), 2, (4, 6)), 3, 2, torch.float64
    )
    rows = slice(start, min(8, start + length))
    tile = ops.conv_tile(x, b, rows, scale, **geometry)
    torch.testing.assert_close(tile, scale * per_sample_gradients(layer, x, b)[:, rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 3])
def test_tokens_against_autograd(dtype, c):
    n, positions = 6, 7
    layer = nn.Linear(10, 9, bias=False, dtype=dtype)
    x = torch.randn(positions, n, 10, dtype=dtype).transpose(0, 1)  # as attention holds it
    b = torch.randn(n, c, positions, 9, dtype=dtype)
    exact = -1.3 * per_sample_gradients(layer.double(), x.double(), b.double())
    weight = torch.randn(n * c, dtype=dtype)
    for tile_bytes in (1, 4000, 1 << 20):
        kernel, grad = torch.zeros(n * c, n * c, dtype=dtype), torch.zeros(9, 10, dtype=dtype)
        ops.jacobian_accumulate_tokens_(
            kernel, x, b, grad=grad, weight=weight, scale=-1.3, tile_bytes=tile_bytes
        )
        assert gram_error(kernel, exact.flatten(1)) <= GRAM_BOUND[dtype]
        torch.testing.assert_close(grad, torch.tensordot(weight.double(), exact, 1).to(dtype))
    for rows, tile in ops.token_tiles(x, b, -1.3, 3 * n * c * 10 * x.element_size()):
        assert rows.stop - rows.start == 3
        torch.testing.assert_close(tile, exact[:, rows].to(dtype))
    torch.testing.assert_close(ops.token_tile(x, b, slice(2, 7), -1.3), exact[:, 2:7].to(dtype))


def test_tiles_of_two_uses_sum_before_the_kernel():
    # A weight that is used twice: the kernel of the sum of its per-sample gradients, not the sum of kernels.
    layer = nn.Linear(4, 6, bias=False, dtype=torch.float64)
    x, z = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    bx, bz = torch.randn(2, 5, 1, 3, 6, dtype=torch.float64)
    exact = per_sample_gradients(layer, x, bx) + per_sample_gradients(layer, z, bz)
    kernel = torch.zeros(5, 5, dtype=torch.float64)
    for rows, tile in ops.token_tiles(x, bx, tile_bytes=500):
        ops.jacobian_accumulate_(kernel, tile + ops.token_tile(z, bz, rows))
    assert gram_error(kernel, exact.flatten(1)) <= 1e-13


def test_reference_agrees():
    layer, x, b, geometry = convolution(CONVOLUTIONS[1], 4, 2, torch.float64)
    weight, shape = torch.randn(8, dtype=torch.float64), layer.weight.shape
    results = []
    for run in (ops.reference.jacobian_accumulate_conv2d_, torch.ops.catapult.jacobian_accumulate_.conv2d):
        kernel, grad = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        run(kernel, grad, x, b, weight, 0.3, *geometry.values(), 1000)
        results.append((kernel, grad))
    torch.testing.assert_close(results[0], results[1])
