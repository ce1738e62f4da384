"""The public kernel: modes of outputs, selections of parameters, precision and memory."""

from __future__ import annotations

import brute_force
import pytest
import torch
from networks import EXACT, make
from torch import Tensor

import catapult_ext as cx


def _x(n: int = 6, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(n, 32, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["three outputs", "three outputs, convolution", "three outputs, batch norm"])
def test_modes_of_outputs(name: str) -> None:
    model, x, z = make(name, 1), _x(), _x(4, seed=4)
    rows = torch.cat([brute_force.flat_rows(r) for r in brute_force.jacobian(model, x).values()], 1)
    others = torch.cat([brute_force.flat_rows(r) for r in brute_force.jacobian(model, z).values()], 1)
    left, right = rows.view(6, 3, -1), others.view(4, 3, -1)
    for z_, other in ((None, left), (z, right)):
        full = cx.ntk(model, x, z_)
        assert brute_force.relative(full, left.flatten(0, 1) @ other.flatten(0, 1).T) <= 1e-10
        trace = torch.einsum("icp,jcp->ij", left, other) / 3
        assert brute_force.relative(cx.ntk(model, x, z_, outputs="trace"), trace) <= 1e-10
        summed = left.sum(1) @ other.sum(1).T
        assert brute_force.relative(cx.ntk(model, x, z_, outputs="sum"), summed) <= 1e-10
        for j in range(3):
            one = left[:, j] @ other[:, j].T
            assert brute_force.relative(cx.ntk(model, x, z_, outputs=j), one) <= 1e-10


def test_selected_parameters_add_up() -> None:
    model, x = make("convolutions", 1), _x()
    names = [name for name, _ in model.named_parameters()]
    some = cx.ntk(model, x, params=names[:2])
    rest = cx.ntk(model, x, params=list(model.parameters())[2:])
    whole = cx.ntk(model, x)
    assert brute_force.relative(some + rest, whole) <= 1e-12
    by_parameter = cx.ntk(model, x, per_parameter=True, outputs="trace")
    assert list(by_parameter) == names
    assert brute_force.relative(sum(by_parameter.values()), whole) <= 1e-12


def test_double_accumulation_of_a_float_model() -> None:
    model, x = make("in-place relu", 2, torch.float32), _x(dtype=torch.float32)
    double = cx.ntk(model, x, dtype=torch.float64)
    single = cx.ntk(model, x)
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    rows = torch.cat([brute_force.flat_rows(r) for r in brute_force.jacobian(model, x).values()], 1).double()
    exact = rows @ rows.T
    diagonal = exact.diagonal().sqrt()
    normwise = lambda k: float(((k - exact).abs() / (diagonal[:, None] * diagonal)).max())  # noqa: E731
    assert normwise(double) <= 5e-7  # the activations themselves carry float32 rounding
    assert normwise(single.double()) <= 2e-6


def test_order_of_samples_and_size_of_the_set_do_not_matter() -> None:
    model, x = make("attention, batch first", 3), _x(7)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    whole = cx.ntk(model, x)
    assert brute_force.relative(cx.ntk(model, x[order]), whole[order][:, order]) <= 1e-12
    for n in (1, 2, 5):
        assert brute_force.relative(cx.ntk(model, x[:n]), whole[:n, :n]) <= 1e-12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"outputs": "mean"},
            ValueError,
            "expected 'all', 'trace', 'sum' or an integer in 0 .. 0, got 'mean'",
        ),
        ({"outputs": 1}, ValueError, "outputs: .* integer in 0 .. 0, got 1"),
        ({"outputs": True}, ValueError, "outputs:"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected"),
        ({"dtype": torch.float32}, ValueError, "dtype: expected"),
        ({"z": torch.randn(3, 31, dtype=torch.float64)}, ValueError, "z: expected samples like those of x"),
        ({"z": torch.randn(3, 32)}, ValueError, "z: expected samples like those of x"),
        ({"z": [1.0]}, TypeError, "x: expected a tensor|z: expected a tensor"),
        ({"params": "0.weight"}, TypeError, "params: expected an iterable"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cx.ntk(make("in-place relu", 0), _x(), **options)


@pytest.mark.parametrize("name", ["convolutions", "module called twice", "coupled samples", "layer norm"])
def test_a_memory_bound_changes_nothing_but_memory(name: str) -> None:
    model, x = make(name, 0), _x()
    whole = cx.ntk(model, x)
    with pytest.raises(
        ValueError, match=r"max_bytes: 1 is too small .* smallest bound that works is (\d+)"
    ) as caught:
        cx.ntk(model, x, max_bytes=1)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    assert brute_force.relative(cx.ntk(model, x, max_bytes=smallest), whole) <= 1e-12
    with pytest.raises(ValueError, match="too small"):
        cx.ntk(model, x, max_bytes=smallest - 1)


def test_every_route_appears_in_the_report() -> None:
    seen: set[str] = set()
    for name in EXACT:
        model = make(name, 0)
        c = cx.jacobian(model, _x(2)).shape[1]
        report = cx.observe(model, _x(), torch.randn(6, c, dtype=torch.float64)).layer_report
        assert [row.name for row in report] == [n for n, p in model.named_parameters() if p.requires_grad]
        seen |= {row.route for row in report}
        for row in report:
            assert (row.backwards > 0) == (row.route == "rows")
            if row.route in ("gram", "tiles", "node calls"):
                assert row.flops > 0, row
    assert seen == {"gram", "tiles", "node calls", "rows", "unused"}
