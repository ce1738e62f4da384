"""chain_sgd_ against plain autograd in float64, at every SIMD level."""

from __future__ import annotations

import math

import pytest
import torch
from chain_reference import assert_steps_match, brute_force_, chain, moved, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from catapult_ext import _C, ops
from catapult_ext.ops import ChainLayer


# Every rest of the micro tiles (5 x 5, 4 x 3, 3 x 3), of 8 rows of an update and of the vectors; one layer; widths
# of one; more rows of a weight than a panel holds; batches of one.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ((5, 1), [3, 1]),
        ((1, 1, 1), [2]),
        ((100, 64, 1), [5, 5, 2]),
        ((7, 33, 21, 1), [1, 9, 32]),
        ((17, 3, 130, 2, 1), [13, 33]),
        ((3, 1027, 70, 1), [6]),
    ],
    ids=str,
)
def test_matches_autograd(simd, sizes, batches, dtype):
    layers = chain(sizes, dtype, slopes=(0.0, 1.0, 0.2))
    step_ = lambda layers, data: ops.chain_sgd_(layers, *data)  # noqa: E731
    assert_steps_match(step_, layers, problem(40, sizes[0], batches, dtype))


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    d=st.integers(1, 40),
    batch=st.integers(1, 40),
    slope=st.sampled_from([0.0, 0.1, 1.0]),
    biases=st.booleans(),
    fixed=st.sets(st.integers(0, 2), max_size=2),
    level=st.sampled_from(_C.available_simd_levels()),
    seed=st.integers(0, 2**31),
)
def test_any_chain(widths, d, batch, slope, biases, fixed, level, seed):
    _C.set_simd_level(level)
    sizes = (d, *widths, 1)
    fixed = {number for number in fixed if number < len(sizes) - 2}  # the last one is trained
    layers = chain(sizes, torch.float64, seed, slopes=(slope,), biases=biases, fixed=fixed)
    kept = [layer.weight.clone() for layer in layers]
    x, y, index, sizes, rates = problem(50, d, [batch], torch.float64, seed)
    exact = moved(layers)
    loss, norm = brute_force_(exact, x[index], y[index], float(rates[0]))
    with torch.no_grad():
        losses, lambda_1 = ops.chain_sgd_(layers, x, y, index, sizes, rates)
    assert losses.item() == pytest.approx(loss, rel=1e-9)
    assert lambda_1.item() == pytest.approx(norm, rel=1e-9, abs=1e-12)
    for number, (layer, expected, before) in enumerate(zip(layers, exact, kept, strict=True)):
        torch.testing.assert_close(layer.weight, expected.weight, rtol=1e-9, atol=1e-10)
        assert torch.equal(layer.weight, before) or number not in fixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_how_steps_are_spread_over_calls_or_threads(simd, dtype):
    batches = [5, 5, 1, 7, 5, 3]
    data = problem(30, 12, batches, dtype)
    x, y, index, sizes, rates = data
    results = []
    for cuts, threads in (((6,), 1), ((1, 2, 3), 1), ((1,) * 6, 1), ((4, 2), 3)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            layers = chain((12, 19, 8, 1), dtype)
            parts, start = [], 0
            for cut in cuts:
                now = slice(start, start + cut)
                first = sum(batches[:start])
                part = index[first : first + sum(batches[now])]
                with torch.no_grad():
                    parts.append(ops.chain_sgd_(layers, x, y, part, sizes[now], rates[now]))
                start += cut
        finally:
            torch.set_num_threads(before)
        found = [torch.cat(column) for column in zip(*parts, strict=True)]
        results.append([*found, *(layer.weight for layer in layers)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_agrees_with_the_reference_and_skips_what_is_not_observed(simd):
    data = problem(30, 12, [5, 4, 5], torch.float64)
    observed = torch.tensor([True, False, True])
    layers, twin = chain((12, 9, 1), torch.float64), chain((12, 9, 1), torch.float64)
    with torch.no_grad():
        losses, lambda_1 = ops.chain_sgd_(layers, *data, observed=observed)
        empty = torch.empty(0, dtype=torch.float64)
        columns = list(zip(*twin, strict=True))
        columns[1] = [empty if bias is None else bias for bias in columns[1]]
        expected = ops.reference.chain_sgd_(*columns, *data, observed, math.inf, 0.0)
    torch.testing.assert_close(losses, expected[0], rtol=1e-11, atol=0)
    torch.testing.assert_close(lambda_1, expected[1], rtol=1e-11, atol=0, equal_nan=True)
    assert lambda_1.isnan().tolist() == [False, True, False]
    for layer, other in zip(layers, twin, strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-11, atol=1e-13)


def test_dead_units_give_the_zero_kernel_and_nothing_moves(simd):
    layers = chain((4, 6, 1), torch.float32, biases=False)
    layers[0].weight.copy_(-layers[0].weight.abs())
    x, y, index, sizes, rates = problem(8, 4, [3], torch.float32)
    before = [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        losses, lambda_1 = ops.chain_sgd_(layers, x.abs(), y, index, sizes, rates)
    assert lambda_1.item() == 0.0
    assert losses.item() == pytest.approx(y[index].square().mean().item(), rel=1e-6)
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(layers, before, strict=True))


def test_a_loss_above_the_limit_ends_the_steps_before_its_update(simd):
    data = problem(20, 6, [4] * 5, torch.float64)
    layers, twin = chain((6, 5, 1), torch.float64), chain((6, 5, 1), torch.float64)
    with torch.no_grad():
        whole, _ = ops.chain_sgd_(twin, *data)
        limit = whole[3].item() * (1 - 1e-9)
        assert (whole[:3] < limit).all() or (whole[:3] > limit).any()
        first = int((whole > limit).nonzero()[0])
        losses, lambda_1 = ops.chain_sgd_(layers, *data, loss_limit=limit)
        assert torch.equal(losses[: first + 1], whole[: first + 1])
        assert losses[first + 1 :].isnan().all()
        assert lambda_1[first + 1 :].isnan().all()
        again = chain((6, 5, 1), torch.float64)
        x, y, index, sizes, rates = data
        ops.chain_sgd_(again, x, y, index[: 4 * first], sizes[:first], rates[:first])
    assert torch.equal(layers[0].weight, again[0].weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_the_steps_and_keeps_those_before(simd, bad):
    layers, twin = chain((6, 5, 1), torch.float32), chain((6, 5, 1), torch.float32)
    x, y, index, sizes, rates = problem(20, 6, [4] * 3, torch.float32)
    index = torch.arange(12)
    y[9] = bad
    with torch.no_grad():
        losses, _ = ops.chain_sgd_(layers, x, y, index, sizes, rates)
        ops.chain_sgd_(twin, x, y, index[:8], sizes[:2], rates[:2])
    assert losses.isfinite().tolist() == [True, True, False]
    assert losses[2].isnan()
    assert torch.equal(layers[0].weight, twin[0].weight)


def test_a_kernel_that_overflows_ends_the_steps(simd):
    layers = [ChainLayer(torch.full((1, 3), 1.0), trains_bias=False)]
    x = torch.tensor([[1e25, -1e25, 1.0], [1.0, 2.0, 3.0]])
    y = torch.zeros(2)
    one, rate = torch.tensor([1]), torch.tensor([1e-3], dtype=torch.float64)
    with torch.no_grad():
        losses, lambda_1 = ops.chain_sgd_(layers, x, y, torch.tensor([0]), one, rate)
        assert losses.isnan().all()
        assert not lambda_1.isfinite().any()
        assert torch.equal(layers[0].weight, torch.full((1, 3), 1.0))
        losses, _ = ops.chain_sgd_(layers, x, y, torch.tensor([1]), one, rate)
    assert losses.item() == 36.0


def test_views_with_gaps_and_shared_storage(simd):
    storage = torch.full((9, 40), math.nan, dtype=torch.float64)
    layers = chain((12, 9, 1), torch.float64)
    expected = chain((12, 9, 1), torch.float64)
    storage[:, 7:19] = layers[0].weight
    layers[0] = layers[0]._replace(weight=storage[:, 7:19])
    x, y, index, sizes, rates = problem(30, 12, [5, 6], torch.float64)
    wide = torch.full((30, 50), math.nan, dtype=torch.float64)
    wide[:, ::4][:, :12] = x
    targets = torch.full((30, 3), math.nan, dtype=torch.float64)
    targets[:, 1] = y[:, 0]
    with torch.no_grad():
        one = ops.chain_sgd_(layers, wide[:, ::4][:, :12], targets[:, 1], index, sizes, rates)
        two = ops.chain_sgd_(expected, x, y, index, sizes, rates)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert torch.equal(storage[:, 7:19], expected[0].weight)
    assert storage[:, :7].isnan().all()
    assert storage[:, 19:].isnan().all()


def test_written_parameters_are_marked_as_changed():
    layers = chain((3, 4, 1), torch.float32, fixed=(1,))
    before = [layer.weight._version for layer in layers]
    with torch.no_grad():
        ops.chain_sgd_(layers, *problem(5, 3, [2], torch.float32))
    assert layers[0].weight._version > before[0]
    assert layers[1].weight._version == before[1]


def test_no_steps_change_nothing():
    layers = chain((3, 4, 1), torch.float32)
    kept = layers[0].weight.clone()
    x, y, *_ = problem(5, 3, [2], torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    losses, lambda_1 = ops.chain_sgd_(layers, x, y, none, none, torch.empty(0, dtype=torch.float64))
    assert losses.shape == lambda_1.shape == (0,)
    assert torch.equal(layers[0].weight, kept)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.tensor([0, 5])}, ValueError, "batch_index: expected samples from 0 to 4, got 0 to 5"),
        ({"index": torch.tensor([-1, 2])}, ValueError, "batch_index: expected samples from 0 to 4, got -1 to 2"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "batch_index: expected torch.int64"),
        ({"sizes": torch.tensor([3])}, ValueError, "batch_sizes: expected sizes >= 1 that add up to 2"),
        ({"sizes": torch.tensor([0])}, ValueError, "batch_sizes: expected sizes >= 1"),
        ({"rates": torch.tensor([0.1])}, TypeError, "rates: expected torch.float64"),
        ({"rates": torch.tensor([math.nan], dtype=torch.float64)}, ValueError, "rates: expected finite"),
        ({"x": torch.randn(5, 4)}, ValueError, r"weights\[0\]: expected shape \(4, 4\), got \(4, 3\)"),
        ({"y": torch.randn(5, 2)}, ValueError, r"y: expected shape \(5,\) or \(5, 1\), got \(5, 2\)"),
        ({"y": torch.randn(5).double()}, TypeError, "y: expected torch.float32 as x has"),
        ({"x": torch.randn(5, 3).half()}, TypeError, "x: expected torch.float32 or torch.float64"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    x, y, index, sizes, rates = problem(5, 3, [2], torch.float32)
    given_ = {"x": x, "y": y, "index": index, "sizes": sizes, "rates": rates, **change}
    layers = chain((3, 4, 1), torch.float32)
    kept = layers[0].weight.clone()
    with torch.no_grad(), pytest.raises(error, match=f"chain_sgd_: {message}"):
        ops.chain_sgd_(layers, *given_.values())
    assert torch.equal(layers[0].weight, kept)


def test_layers_that_do_not_fit_are_refused():
    data = problem(5, 3, [2], torch.float32)
    layers = chain((3, 4, 1), torch.float32)
    transposed = layers[0]._replace(weight=torch.randn(3, 4).T)
    for given_, message in (
        ([], "weights: expected at least one layer"),
        ([layers[0]], r"weights\[0\]: expected shape \(1, 3\), got \(4, 3\)"),
        ([transposed, layers[1]], r"weights\[0\]: expected dense rows"),
        ([layers[0]._replace(slope=-0.5), layers[1]], "slope: expected finite numbers >= 0"),
        (chain((3, 4, 1), torch.float32, fixed=(0, 1)), "trains: expected flags of 2 layers, at least one"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            ops.chain_sgd_(given_, *data)
    square = torch.randn(3, 3)
    tied = [ChainLayer(square), ChainLayer(square), ChainLayer(torch.randn(1, 3))]
    with torch.no_grad(), pytest.raises(ValueError, match="weights: expected different tensors"):
        ops.chain_sgd_(tied, *data)
