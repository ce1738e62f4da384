"""agop_reduce and agop_inner against float64, at every SIMD level."""

from __future__ import annotations

import math

import pytest
import torch
from gram_reference import GRAM_BOUND, gram_error, nan_like
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext import _C, ops

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d"), [(1, 1), (5, 31), (33, 129), (127, 64), (300, 100), (129, 257), (1030, 33)]
)
def test_reduce(simd, dtype, rows, d):
    g = torch.randn(rows, d, dtype=dtype)
    agop = ops.agop_reduce(g, 1 / rows)
    assert gram_error(agop, g.double().T / math.sqrt(rows)) <= GRAM_BOUND[dtype]
    assert torch.equal(agop, agop.T)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 200),
    d=st.integers(0, 150),
    level=st.sampled_from(_C.available_simd_levels()),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_adds_to_what_is_there(rows, d, level, double, seed):
    _C.set_simd_level(level)
    dtype = DTYPES[double]
    torch.manual_seed(seed)
    g, start = torch.randn(rows, d, dtype=dtype), torch.randn(d, d, dtype=dtype)
    start = start + start.T
    expected, got = start.clone(), start.clone()
    ops.reference.agop_reduce_(expected, g, 0.3)
    assert ops.agop_reduce(g, 0.3, out=got) is got
    torch.testing.assert_close(got, expected, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trace_is_the_mean_squared_gradient_norm(simd, dtype):
    g = torch.randn(211, 130, dtype=dtype)
    trace = ops.agop_reduce(g, 1 / 211).double().trace()
    torch.testing.assert_close(trace, g.double().square().sum() / 211, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(simd, dtype):
    storage = nan_like((70, 200), dtype)
    storage[:, 3:150] = torch.randn(70, 147, dtype=dtype)
    views = [
        storage[1::2, 3:150],
        torch.randn(40, 77, dtype=dtype).T,
        torch.randn(1, 9, dtype=dtype).expand(50, 9),
    ]
    for g in views:
        assert gram_error(ops.agop_reduce(g), g.double().T) <= GRAM_BOUND[dtype]
        h = torch.randn(20, g.shape[1], dtype=dtype)
        expected = (g.double() @ h.double().T).square().sum()
        torch.testing.assert_close(ops.agop_inner(g, h), expected, rtol=1e-6, atol=0)


def test_many_samples_keep_their_digits(simd):
    # Positive entries: a single running sum in float32 would lose the last digits.
    g = torch.rand(60_000, 5)
    assert gram_error(ops.agop_reduce(g), g.double().T) <= 2e-7


def test_error_no_larger_than_plain_torch(simd):
    g = torch.randn(3000, 90)
    ours, plain = gram_error(ops.agop_reduce(g), g.double().T), gram_error(g.T @ g, g.double().T)
    assert ours <= 2 * plain


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_for_any_thread_count(simd, dtype):
    g, h = torch.randn(500, 300, dtype=dtype), torch.randn(400, 300, dtype=dtype)
    first, inner = ops.agop_reduce(g), ops.agop_inner(g, h)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(first, ops.agop_reduce(g))
        assert torch.equal(inner, ops.agop_inner(g, h))


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_extreme_scales(simd, factor):
    g = torch.randn(200, 40) * factor
    agop = ops.agop_reduce(g, factor**-2)
    assert gram_error(agop, g.double().T / factor) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "others", "d"), [(1, 1, 1), (61, 5, 33), (130, 67, 1030)])
def test_inner_is_the_product_of_the_matrices(simd, dtype, rows, others, d):
    g, h = torch.randn(rows, d, dtype=dtype), torch.randn(others, d, dtype=dtype)
    expected = ((g.double().T @ g.double()) * (h.double().T @ h.double())).sum()
    inner = ops.agop_inner(g, h)
    assert inner.dtype == torch.float64
    assert inner.shape == ()
    rtol = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(inner, expected, rtol=rtol, atol=0)
    torch.testing.assert_close(ops.reference.agop_inner(g, h), expected, rtol=1e-12, atol=0)


def test_inner_of_nothing_is_zero():
    assert ops.agop_inner(torch.randn(0, 4), torch.randn(3, 4)) == 0
    assert ops.agop_inner(torch.randn(2, 0), torch.randn(3, 0)) == 0


def test_inner_at_extreme_scales(simd):
    g, h = torch.randn(30, 20) * 1e-25, torch.randn(30, 20) * 1e30
    expected = (g.double() @ h.double().T).square().sum()
    torch.testing.assert_close(ops.agop_inner(g, h), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_is_an_error(simd, bad):
    g = torch.randn(30, 130)
    g[29, 129] = bad
    with pytest.raises(cx.NonFinite, match="agop_reduce_: a NaN or an infinity"):
        ops.agop_reduce(g)
    with pytest.raises(cx.NonFinite, match="agop_inner: a NaN or an infinity"):
        ops.agop_inner(g, torch.ones(2, 130))
