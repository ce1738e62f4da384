"""The one pass on Wide ResNet, ViT and Myrtle-5, against one autograd call per output of each sample."""

from __future__ import annotations

from collections.abc import Callable

import brute_force
import pytest
import torch
from torch import nn

import catapult_ext as cx
from catapult_ext.models import Myrtle5, ViT, WideResNet

N, C = 5, 2

Make = Callable[..., nn.Module]
NETWORKS: dict[str, Make] = {
    "myrtle": lambda **o: Myrtle5(2, 5, C, **o),
    "wide resnet 10": lambda **o: WideResNet(2, 10, 1, C, base_width=3, batch_norm=False, **o),
    "wide resnet 16": lambda **o: WideResNet(2, 16, 1, C, base_width=2, batch_norm=False, **o),
    "wide resnet, batch norm": lambda **o: WideResNet(2, 10, 1, C, base_width=3, batch_norm=True, **o),
    "vit": lambda **o: ViT(2, 8, 6, 2, C, heads=3, **o),
}
OPTIONS = {
    "ntk": {},
    "ntk with biases": {"bias_scale": 0.3, "weight_std": 0.8},
    "standard": {"parameterization": "standard"},
    "fixed layers": {"fixed_layers": (0, 2)},
}


def _network(name: str, options: str, training: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    model = NETWORKS[name](generator=g, **OPTIONS[options]).double()
    x = torch.randn(N, 2, 8, 8, dtype=torch.float64, generator=g)
    y = torch.randn(N, C, dtype=torch.float64, generator=g)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:  # gains of 1 and biases of 0 would hide mistakes
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=g))
        if not training:
            for _ in range(5):
                model(x + 1)  # running statistics away from 0 and 1
            model.eval()
    return model, x, y


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in NETWORKS), ("wide resnet, batch norm", False)]
)
def test_kernel_and_gradient(name: str, options: str, training: bool) -> None:
    model, x, y = _network(name, options, training)
    rows = brute_force.jacobian(model, x)
    expected = brute_force.kernel_of(rows)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    observation = cx.observe(model, x, y, k=3)

    assert brute_force.relative(observation.kernel, expected) <= 1e-10
    assert float(observation.critical_lr) == pytest.approx(N * C / float(torch.linalg.eigvalsh(expected)[-1]))
    gradients = observation.gradients()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == set(trained)
    loss = (model(x) - y).square().mean()
    scale = max(float(g.abs().max()) for g in gradients.values())
    for (key, _), exact in zip(
        trained.items(), torch.autograd.grad(loss, list(trained.values())), strict=True
    ):
        assert float((gradients[key] - exact).abs().max()) <= 1e-10 * scale, key
    by_parameter = cx.ntk(model, x, per_parameter=True)
    for key, kernel in by_parameter.items():
        flat = brute_force.flat_rows(rows[key])
        assert float((kernel - flat @ flat.T).abs().max()) <= 1e-10 * float(expected.abs().max()), key


@pytest.mark.parametrize("name", ["myrtle", "wide resnet 10", "vit"])
def test_float32(name: str) -> None:
    model, x, y = _network(name, "ntk", True)
    expected = brute_force.kernel_of(brute_force.jacobian(model, x))
    observation = cx.observe(model.float(), x.float(), y.float())
    assert brute_force.relative(observation.kernel.double(), expected) <= 1e-5


@pytest.mark.parametrize("name", ["myrtle", "wide resnet 10", "vit"])
def test_no_parameter_needs_a_backward_of_its_own(name: str) -> None:
    """Networks that treat samples one by one never fall back to a backward of the network per sample."""
    for options in OPTIONS:
        model, x, y = _network(name, options, True)
        report = cx.observe(model, x, y).layer_report
        assert {line.name for line in report} == {
            key for key, p in model.named_parameters() if p.requires_grad
        }
        assert not [line.name for line in report if line.route in ("rows", "unused")]


def test_sharpness_of_a_vit() -> None:
    """Attention is twice differentiable: the largest eigenvalue of the Hessian is that of the dense one."""
    model, x, y = _network("vit", "ntk", True)
    values = {key: p.detach() for key, p in model.named_parameters()}
    sizes = [p.numel() for p in values.values()]
    flat = torch.cat([p.flatten() for p in values.values()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = {k: v.view_as(p) for (k, p), v in zip(values.items(), vector.split(sizes), strict=True)}
        return (torch.func.functional_call(model, parts, x) - y).square().mean()

    dense = torch.func.jacrev(torch.func.grad(loss))(flat)
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    assert float(cx.hessian_top(model, x, y, tol=1e-8).values[0]) == pytest.approx(largest, rel=1e-8)
