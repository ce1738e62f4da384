"""Chains of Linear layers for `chain_sgd_`, and a step of one by autograd in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.ops import ChainLayer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def chain(sizes, dtype, seed=0, *, slopes=None, biases=True, fixed=()):
    """Layers with NTK-like scales; every second one has a bias, and those in `fixed` are not trained."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
    layers = []
    for number, (width, out) in enumerate(itertools.pairwise(sizes)):
        bias = make(out) if biases and number % 2 == 0 else None
        slope = 0.0 if slopes is None else slopes[number % len(slopes)]
        trained = number not in fixed
        layers.append(ChainLayer(make(out, width), bias, width**-0.5, 0.3, slope, trained, trained))
    return layers


def problem(n, d, batches, dtype, seed=1):
    """x, y, indices, sizes, rates."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype)
    y = torch.randn(n, 1, dtype=torch.float64, generator=generator).to(dtype)
    index = torch.randint(n, (sum(batches),), generator=generator)
    rates = torch.rand(len(batches), dtype=torch.float64, generator=generator) * 0.2
    return x, y, index, torch.tensor(batches, dtype=torch.int64), rates


def moved(layers, **to):
    """Copies of the parameters, with another dtype or device."""
    return [
        layer._replace(
            weight=layer.weight.to(**to, copy=True),
            bias=None if layer.bias is None else layer.bias.to(**to, copy=True),
        )
        for layer in layers
    ]


def brute_force_(layers, x, y, rate):
    """One step by autograd in float64: loss, lambda_1 of the explicit Jacobian, parameters changed in place."""
    trained = [
        tensor.requires_grad_()
        for layer in layers
        for tensor, flag in ((layer.weight, layer.trains_weight), (layer.bias, layer.trains_bias))
        if flag and tensor is not None
    ]
    h = x
    for number, layer in enumerate(layers):
        h = layer.weight_scale * h @ layer.weight.T
        if layer.bias is not None:
            h = h + layer.bias_scale * layer.bias
        if number + 1 < len(layers):
            h = torch.nn.functional.leaky_relu(h, layer.slope) if layer.slope else torch.relu(h)
    rows = [torch.autograd.grad(value, trained, retain_graph=True) for value in h.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # [b, p]
    loss = (h - y.view(-1, 1)).square().mean()
    gradients = torch.autograd.grad(loss, trained)
    with torch.no_grad():
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.requires_grad_(False).sub_(gradient, alpha=rate)
    return loss.item(), torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1].item()


def chain_arguments(
    layers: Sequence[ChainLayer],
    data: Sequence[Tensor],
    observed: Tensor | None = None,
    loss_limit: float = math.inf,
) -> tuple:
    """Of the op itself, for `data` as from `problem`."""
    tol = ops.default_tolerance(data[0].dtype)
    weights, biases, *rest = (list(column) for column in zip(*layers, strict=True))
    biases = [weights[0].new_empty(0) if bias is None else bias for bias in biases]
    observed = torch.ones(len(data[4]), dtype=torch.bool) if observed is None else observed
    return (weights, biases, *rest, *data, observed, loss_limit, tol)


def assert_steps_match(
    step_: Callable[..., tuple[Tensor, Tensor]], layers: Sequence[ChainLayer], data: Sequence[Tensor]
) -> None:
    """Each step from equal state: step_(layers, data of one step) returns its loss and lambda_1 [1]."""
    x, y, index, sizes, rates = data
    bound = TOLERANCE[x.dtype]
    for step, batch in enumerate(index.split(sizes.tolist())):
        exact = moved(layers, dtype=torch.float64, device="cpu")
        loss, norm = brute_force_(exact, x[batch].double().cpu(), y[batch].double().cpu(), float(rates[step]))
        with torch.no_grad():
            losses, lambda_1 = step_(layers, (x, y, batch, sizes[step : step + 1], rates[step : step + 1]))
        assert losses.shape == lambda_1.shape == (1,)
        assert losses.dtype == lambda_1.dtype == x.dtype
        assert abs(losses.item() - loss) <= bound * loss
        assert abs(lambda_1.item() - norm) <= bound * norm
        for layer, expected in zip(layers, exact, strict=True):
            for got, wanted in ((layer.weight, expected.weight), (layer.bias, expected.bias)):
                if got is not None:
                    assert float((got.cpu() - wanted).norm()) <= bound * float(wanted.norm())
