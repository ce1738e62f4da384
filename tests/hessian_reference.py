"""The dense Hessian, networks to take it of, and a count of Hessian products, for the tests of `hessian_top`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from engine import networks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense(model: nn.Module, x: Tensor, y: Tensor, *, vectorize: bool = False) -> Tensor:
    """Hessian [p, p] of the mean squared error, by `torch.autograd.functional.hessian`."""
    model = copy.deepcopy(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        output = torch.func.functional_call(model, {n: part.view_as(p) for (n, p), part in parts}, (x,))
        return (output.reshape(len(x), -1) - y.reshape(len(x), -1)).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    with sdpa_kernel(SDPBackend.MATH):
        hessian: Any = torch.autograd.functional.hessian(loss, flat, vectorize=vectorize)
    return hessian


def descending(hessian: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(hessian).flip(0)


def problem(name: str, seed: int = 0, n: int = 6, scale: float = 1.0) -> tuple[nn.Module, Tensor, Tensor]:
    model = networks.make(name, seed)
    x = torch.randn(n, 32, dtype=torch.float64)
    with torch.no_grad():
        c = copy.deepcopy(model)(x).reshape(n, -1).shape[1]
    return model, x, scale * torch.rand(n, c, dtype=torch.float64)


class Counter(nn.Module):
    """A model that counts second backwards, of which each product makes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.products = 0

    def forward(self, x: Tensor) -> Tensor:
        return _Count.apply(self.model(x), self)

    def taken(self) -> int:
        count, self.products = self.products, 0
        return count


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, counter: Counter) -> Tensor:
        ctx.counter = counter
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _CountSecond.apply(grad, ctx.counter), None


class _CountSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, counter: Counter) -> Tensor:
        ctx.counter = counter
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.counter.products += 1
        return grad, None
