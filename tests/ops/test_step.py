"""The small parts of a training step, residual and in-place update, against float64, at every SIMD level."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import catapult_ext as cx
from catapult_ext import _C, ops

DTYPES = [torch.float32, torch.float64]


def exact(matrix, left, right, weight, scale):
    """The updated parameter, and the sizes of the summands, in float64."""
    right = right.double() if weight is None else right.double() * weight.double()
    left = right.new_ones(right.shape[0], 1) if left is None else left.double()
    change = scale * left.T @ right
    sizes = abs(scale) * left.abs().T @ right.abs() + matrix.double().abs()
    return matrix.double() + change.view(matrix.shape), sizes.view(matrix.shape)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 150),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    kind=st.sampled_from(["weight", "bias"]),
    weighted=st.booleans(),
    layout=st.sampled_from(
        ["dense", "expanded left", "transposed left", "strided left", "strided right", "transposed parameter"]
    ),
    zeros=st.sampled_from([0.0, 0.5]),
    level=st.sampled_from(_C.available_simd_levels()),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_updates_in_place(rows, height, width, kind, weighted, layout, zeros, level, double, seed):
    _C.set_simd_level(level)
    dtype = DTYPES[double]
    torch.manual_seed(seed)
    right = torch.randn(rows, width, dtype=dtype)
    if layout == "strided right":
        right = torch.randn(width, rows, dtype=dtype).T
    left = torch.randn(rows, height, dtype=dtype)
    if layout == "expanded left":
        left = torch.randn(1, height, dtype=dtype).expand(rows, height)
    elif layout == "transposed left":
        left = torch.randn(height, rows, dtype=dtype).T
    elif layout == "strided left":
        left = torch.randn(rows, 2 * height, dtype=dtype)[:, ::2]
    if zeros and layout != "expanded left":
        left.masked_fill_(torch.rand(rows, height) < zeros, 0.0)
    matrix = torch.randn(height, width, dtype=dtype)
    if layout == "transposed parameter":
        matrix = torch.randn(width, height, dtype=dtype).T
    if kind == "bias":
        left, matrix = None, torch.randn(width, dtype=dtype)
    weight = torch.randn(rows, 1, dtype=dtype) if weighted else None
    parameter = torch.nn.Parameter(matrix)
    expected, sizes = exact(parameter.detach(), left, right, weight, -0.37)
    version = parameter._version
    ops.rank_updates_([(parameter, left, right, weight, -0.37)])
    assert parameter._version > version  # autograd must see that it changed
    bound = 8 * torch.finfo(dtype).eps * math.sqrt(max(rows, 1)) * sizes
    assert ((parameter.detach().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("level", _C.available_simd_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "height", "width"),
    [
        (31, 16, 1024), (32, 15, 1024), (32, 16, 1023), (32, 16, 1024),  # around where panels are packed
        (129, 17, 1025), (40, 257, 1100), (300, 34, 1501), (1100, 33, 100), (700, 40, 47),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_wide_updates_in_place(level, dtype, rows, height, width, zeros, layout):
    """Packed panels: every entry, nothing beside the parameter, the same bits with any number of threads."""
    _C.set_simd_level(level)
    torch.manual_seed(rows)
    left, right = torch.randn(rows, height, dtype=dtype), torch.randn(rows, width, dtype=dtype)
    left.masked_fill_(torch.rand(rows, height) < zeros, 0.0)
    if layout == "columns":
        left = left.T.contiguous().T
    weight = torch.randn(rows, 1, dtype=dtype)
    around = torch.full((height + 2, width + 5), torch.nan, dtype=dtype)
    around[1:-1, 2:-3] = torch.randn(height, width, dtype=dtype)
    expected, sizes = exact(around[1:-1, 2:-3], left, right, weight, 0.61)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        whole = around.clone()
        torch.set_num_threads(threads)
        try:
            ops.rank_updates_([(whole[1:-1, 2:-3], left, right, weight, 0.61)])
        finally:
            torch.set_num_threads(before)
        found.append(whole[1:-1, 2:-3].clone())
        whole[1:-1, 2:-3] = torch.nan
        assert whole.isnan().all()
    bound = 8 * torch.finfo(dtype).eps * math.sqrt(rows) * sizes
    assert ((found[0].double() - expected).abs() <= bound).all()
    assert torch.equal(*found)


@pytest.mark.parametrize("level", _C.available_simd_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_passed_on_beside_zeros(level, dtype):
    """Zeros are passed over, a NaN or an infinity among them is not."""
    _C.set_simd_level(level)
    left, right = torch.randn(64, 32, dtype=dtype), torch.randn(64, 1100, dtype=dtype)
    left[torch.rand(64, 32) < 0.6] = 0.0
    left[3, 5], left[40, 6], weight = math.nan, math.inf, torch.ones(64, 1, dtype=dtype)
    weight[11] = math.nan  # 0 times NaN is NaN
    matrix = torch.zeros(32, 1100, dtype=dtype)
    ops.rank_updates_([(matrix, left, right, None, 1.0)])
    finite = torch.isfinite(matrix).all(1)
    assert not finite[[5, 6]].any()
    assert finite.sum() == 30
    ops.rank_updates_([(matrix, left, right, weight, 1.0)])
    assert matrix.isnan().all()


@pytest.mark.parametrize("weighted", [True, False])
def test_several_updates_in_one_call(device, weighted):
    shapes = [(5, 3), (1, 100), (129, 31)]
    weight = torch.randn(9, 1, device=device) if weighted else None
    updates = [
        (torch.randn(p, q), torch.randn(9, p), torch.randn(9, q), None, 0.1 * (i + 1))
        for i, (p, q) in enumerate(shapes)
    ]
    updates.append((torch.randn(40), None, torch.randn(9, 40), None, -0.7))
    updates = [
        (*(t if t is None else t.to(device) for t in (matrix, left, right)), weight, scale)
        for matrix, left, right, _, scale in updates
    ]
    expected = [exact(*update)[0] for update in updates]
    ops.rank_updates_(updates)
    for (matrix, *_), wanted in zip(updates, expected, strict=True):
        torch.testing.assert_close(matrix.double(), wanted, rtol=1e-5, atol=1e-5)


def test_an_update_that_does_not_fit_writes_nothing():
    good, bad = torch.zeros(3, 4), torch.zeros(3, 5)
    left, right = torch.randn(2, 3), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"rank_updates_: expected a parameter of shape \(3, 4\) for 2 rows"):
        ops.rank_updates_([(good, left, right, None, 1.0), (bad, left, right, None, 1.0)])
    with pytest.raises(ValueError, match="rank_updates_"):
        ops.rank_updates_([(good, left, right, torch.randn(3, 1), 1.0)])
    with pytest.raises(ValueError, match="rank_updates_"):
        ops.rank_updates_([(good, left[:1], right, None, 1.0)])
    assert not good.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (33, 7), (1000, 1)])
@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded"])
def test_residual(simd, dtype, shape, layout):
    f = torch.randn(shape, dtype=dtype)
    y = {
        "dense": torch.randn(shape, dtype=dtype),
        "transposed": torch.randn(shape[::-1], dtype=dtype).T,
        "expanded": torch.randn((1, shape[1]), dtype=dtype).expand(shape),
    }[layout]
    r, squares = ops.residual(f, y)
    assert torch.equal(r, f - y)
    assert squares.dtype == dtype
    assert squares.shape == ()
    assert squares.double() == pytest.approx(float((f - y).double().square().sum()), rel=1e-6)


def test_residual_on_each_device(device):
    f, y = torch.randn(33, 7, device=device), torch.randn(33, 7, device=device)
    r, squares = ops.residual(f, y)
    assert torch.equal(r, f - y)
    assert squares.device == f.device
    assert float(squares) == pytest.approx(float((f - y).double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_residual_whose_squares_overflow_is_an_error(bad):
    f, y = torch.randn(5, 1), torch.randn(5, 1)
    f[3] = bad
    with pytest.raises(cx.NonFinite, match="output is not finite"):
        ops.residual(f, y)
    if math.isfinite(bad):
        assert math.isfinite(ops.residual(f.double(), y.double())[1])
