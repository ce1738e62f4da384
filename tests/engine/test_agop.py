"""AGOP and alignment against per-sample autograd."""

from __future__ import annotations

import brute_force
import pytest
import torch
from networks import make
from torch import Tensor

import catapult_ext as cx


def _x(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 32, dtype=dtype, generator=torch.Generator().manual_seed(n))


def _input_jacobian(model: torch.nn.Module, x: Tensor) -> Tensor:
    """d f_ij / d x_i [n, c, d], one sample at a time through the model alone."""
    rows = []
    for sample in x:
        sample = sample.clone().requires_grad_()
        output = model(sample[None])[0].reshape(-1)
        rows.append(torch.stack([torch.autograd.grad(o, sample, retain_graph=True)[0] for o in output]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "name",
    ["in-place relu", "convolutions", "attention, batch first", "three outputs", "batch norm, eval", "lstm"],
)
def test_agop(name: str) -> None:
    model, x = make(name, 1), _x(7)
    jacobian = _input_jacobian(model, x)
    assert brute_force.relative(cx.input_gradients(model, x), jacobian) <= 1e-10
    expected = torch.einsum("ica,icb->ab", jacobian, jacobian) / 7
    got = cx.agop(model, x)
    assert brute_force.relative(got, expected) <= 1e-10
    assert torch.equal(got, got.T)
    assert float(got.trace()) == pytest.approx(float(jacobian.square().sum(-1).sum(1).mean()), rel=1e-10)
    centered = jacobian - jacobian.mean(0)
    expected_centered = torch.einsum("ica,icb->ab", centered, centered) / 7
    assert brute_force.relative(cx.agop(model, x, center=True), expected_centered) <= 1e-9
    y = torch.randn(7, jacobian.shape[1], dtype=torch.float64)
    assert brute_force.relative(cx.observe(model, x, y, agop=True).agop, expected) <= 1e-10
    assert brute_force.relative(cx.observe(model, x, y, agop=True, kernel=False).agop, expected) <= 1e-10
    assert cx.observe(model, x, y).agop is None


def test_blocks_under_a_memory_bound() -> None:
    model, x = make("three outputs", 1), _x(23)
    whole = cx.agop(model, x)
    with pytest.raises(ValueError, match=r"max_bytes: 10 is too small .* works is (\d+)") as caught:
        cx.agop(model, x, max_bytes=10)
    smallest = int(str(caught.value).rsplit(" ", 1)[1])
    for bound in (smallest, smallest + 5000, 10**9):
        assert brute_force.relative(cx.agop(model, x, max_bytes=bound), whole) <= 1e-12


def test_alignment_in_every_form() -> None:
    first, second, x = make("three outputs", 1), make("in-place relu", 2), _x(9)
    g, h = cx.agop(first, x), cx.agop(second, x)
    expected = float((g * h).sum() / (g.norm() * h.norm()))
    forms_g, forms_h = (g, cx.input_gradients(first, x)), (h, cx.input_gradients(second, x))
    for a in forms_g:
        for b in forms_h:
            assert float(cx.agop_alignment(a, b)) == pytest.approx(expected, rel=1e-12)
            assert float(cx.agop_alignment(b, a)) == pytest.approx(expected, rel=1e-12)
    assert float(cx.agop_alignment(g, 1e9 * g)) == pytest.approx(1.0, rel=1e-12)
    assert float(cx.agop_alignment(g.float(), h)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("g", "h", "error", "message"),
    [
        (torch.zeros(3, 3), torch.eye(3), ValueError, "expected AGOPs that are not zero"),
        (torch.eye(3), torch.eye(4), ValueError, "h: expected d = 3 features"),
        (torch.ones(3, 4), torch.eye(4), ValueError, r"g: expected shape \(d, d\) or \(n, c, d\)"),
        (torch.eye(3), torch.eye(3).int(), TypeError, "h: expected a float32 or float64 tensor"),
    ],
)
def test_alignment_refuses(g: Tensor, h: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cx.agop_alignment(g, h)


def test_integer_inputs_have_no_gradient() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Flatten(), torch.nn.Linear(6, 1))
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        cx.agop(model, torch.tensor([[0, 1], [2, 4]]))
