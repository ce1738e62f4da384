"""Small tasks and networks, and what training has to compute on them, written out with plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catapult_ext.data import Dataset, Split


class Recipe:
    """Makes equal models and data again and again, fresh at each call."""

    def __init__(self, dtype: torch.dtype = torch.float64, n: int = 13, d: int = 5, c: int = 1) -> None:
        self.dtype, self.n, self.d, self.c = dtype, n, d, c

    def model(self, seed: int = 0, *, norm: bool = False) -> nn.Sequential:
        """A 3-layer ReLU network, with BatchNorm after its first layer on request."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hidden = [nn.Linear(self.d, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU()]
            model = nn.Sequential(*hidden, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, self.c))
        return model.to(self.dtype)

    def data(self, n: int | None = None, seed: int = 1, name: str = "made") -> Dataset:
        """Inputs N(0, 1), targets a smooth function of them."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n or self.n, self.d, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.d, self.c, generator=generator, dtype=torch.float64)
        y = torch.sin(x @ weight) + 0.1 * torch.randn(
            len(x), self.c, generator=generator, dtype=torch.float64
        )
        return Dataset(x.to(self.dtype), y.to(self.dtype), name)

    def split(self) -> Split:
        """Different samples in each part."""
        return Split(self.data(), self.data(11, 2, "validation"), self.data(9, 3, "test"))


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def kernel(model: nn.Module, x: Tensor) -> Tensor:
    """K [n c, n c], one backward per row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for value in model(x).reshape(-1):
        gradients = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.t()


def critical_lr(model: nn.Module, x: Tensor) -> float:
    k = kernel(model, x)
    return len(k) / torch.linalg.eigvalsh(k)[-1].item()


def descend(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> float:
    """One step in place; the loss before it."""
    loss = mse(model, x, y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= lr * gradient
    return loss.item()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
