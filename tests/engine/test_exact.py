"""The one pass against brute force on networks that hook-based tools get wrong."""

from __future__ import annotations

import copy
import warnings

import brute_force
import pytest
import torch
from networks import EXACT, make

import catapult_ext as cx

N = 7  # odd, and no divisor of any width here


def _data(dtype: torch.dtype, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 32, dtype=dtype, generator=generator)
    return x, torch.randn(N, outputs, dtype=dtype, generator=generator)


def _outputs(model: torch.nn.Module) -> int:
    with torch.no_grad(), warnings.catch_warnings():
        shape = copy.deepcopy(model)(torch.randn(N, 32, dtype=next(model.parameters()).dtype)).shape
    return shape[1] if len(shape) == 2 else 1


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_kernel_gradient_and_loss(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make(name, 3, dtype)
    c = _outputs(model)
    x, y = _data(dtype, c, 11)
    exact = copy.deepcopy(model).double()
    rows = brute_force.jacobian(exact, x.double())
    expected = brute_force.kernel_of(rows)

    observation = cx.observe(model, x, y, k=3)

    assert brute_force.relative(observation.kernel.double(), expected) <= tolerance
    assert torch.equal(observation.kernel, observation.kernel.T)
    residual = exact(x.double()).detach().reshape(N, c) - y.double()
    assert float(observation.loss) == pytest.approx(float(residual.square().mean()), rel=10 * tolerance)
    assert brute_force.relative(observation.residual.double(), residual) <= tolerance
    weights = (2 / residual.numel() * residual).reshape(-1)
    scale = max(float(r.abs().max()) for r in rows.values()) * float(weights.abs().max())
    for parameter, gradient in observation.gradients().items():
        exact_gradient = torch.einsum("n,n...->...", weights, rows[parameter])
        assert float((gradient.double() - exact_gradient).abs().max()) <= tolerance * scale, parameter
    parts = observation.top_loss + observation.rest_loss
    assert float(parts) == pytest.approx(float(observation.loss), rel=10 * tolerance)
    top = torch.linalg.eigvalsh(expected)[-1]
    assert float(observation.critical_lr) == pytest.approx(float(N * c / top), rel=10 * tolerance)


@pytest.mark.parametrize("name", EXACT)
def test_the_transposed_jacobian_of_factors(name: str) -> None:
    """Where a pass keeps factors it gives J^T u without a backward: where the search for the sharpness begins."""
    model = make(name, 4)
    c = _outputs(model)
    x, y = _data(torch.float64, c, 15)
    rows = brute_force.jacobian(model, x)
    observation = cx.observe(model, x, y, k=2)
    for read in (False, True):
        if read:
            observation.gradients()  # formed, and kept
        u = torch.randn(N * c, 2, dtype=torch.float64)[:, :1]
        found = observation._gradient.transposed(u.view(N, c))
        factors = {part.route for part in observation.layer_report} <= {"gram", "unused"}
        if found is None:
            assert not factors or name == "fed with a parameter", observation.layer_report
            continue
        expected = torch.cat([torch.einsum("n,n...->...", u[:, 0], rows[p]).reshape(-1) for p in rows])
        assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_kernels_by_parameter_and_cross_kernel(name: str) -> None:
    model = make(name, 5)
    x, _ = _data(torch.float64, 1, 12)
    z = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(13))
    rows = brute_force.jacobian(model, x)
    others = brute_force.jacobian(model, z)
    whole = brute_force.kernel_of(rows)
    kernels = cx.ntk(model, x, per_parameter=True)
    assert kernels.keys() == rows.keys()
    for parameter, kernel in kernels.items():
        flat = brute_force.flat_rows(rows[parameter])
        assert float((kernel - flat @ flat.T).abs().max()) <= 1e-10 * float(whole.abs().max()), parameter
    cross = cx.ntk(model, x, z)
    expected = sum(brute_force.flat_rows(rows[p]) @ brute_force.flat_rows(others[p]).T for p in rows)
    assert float((cross - expected).abs().max()) <= 1e-10 * float(whole.abs().max())


@pytest.mark.parametrize("name", EXACT)
def test_a_step_equals_plain_gradient_descent(name: str) -> None:
    model = make(name, 7)
    x, y = _data(torch.float64, _outputs(model), 14)
    plain = copy.deepcopy(model)
    for _ in range(2):  # the second step starts from equal state and uses the cached plan
        output = plain(x)
        loss = (output.reshape(y.shape) - y).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in plain.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
                    p.grad = None
    observer = cx.Observer(model)
    for _ in range(2):
        observer(x, y).step_(0.05)
    for (name_, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-10, name_
    for (name_, b), q in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(b, q, rtol=1e-10, atol=1e-12), name_


def test_gradient_for_random_cotangents() -> None:
    """Targets chosen so that the residual is a given random cotangent: no symmetry can hide a wrong row."""
    for name in ("attention, batch first", "lstm", "token-major rows", "convolutions", "shuffled samples"):
        model = make(name, 9)
        x, cotangent = _data(torch.float64, 1, 15)
        cotangent = cotangent * 10 ** torch.linspace(-3, 3, N, dtype=torch.float64)[:, None]
        output = copy.deepcopy(model)(x).detach()
        observation = cx.observe(model, x, output - cotangent)
        clone = copy.deepcopy(model)
        expected = torch.autograd.grad(
            clone(x), [p for p in clone.parameters() if p.requires_grad], cotangent * 2 / N
        )
        for gradient, reference in zip(observation.gradients().values(), expected, strict=True):
            assert brute_force.relative(gradient, reference) <= 1e-10, name


def test_jacobian_is_autograd_row_by_row() -> None:
    model = make("three outputs", 2)
    x, _ = _data(torch.float64, 3, 16)
    rows = brute_force.jacobian(model, x)
    expected = torch.cat([r.flatten(1) for r in rows.values()], 1).view(N, 3, -1)
    assert torch.equal(cx.jacobian(model, x), expected)
