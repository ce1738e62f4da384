"""Size of the initial kernel and critical rate of the networks of `docs/models.md`: the rows of its table.

`python -m python_experiments.initial_kernels FCN CNN` measures the rows whose name holds one of the words, all without
a word, on CIFAR-2 (`CATAPULT_DATA` says where it is), and prints them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.models import CNN, FCN, Myrtle5, ViT, WideResNet

__all__ = ["ROWS", "AtInitialisation", "Row", "at_initialisation", "rendered"]


@dataclass(frozen=True)
class AtInitialisation:
    """A network before training: of its kernel K, with n samples and c outputs, and beside it the number of parameters.

    Attributes:
        parameters: how many numbers are trained.
        size: mean of K(x, x) over samples and outputs.
        cosine: mean over all pairs of rows of K(x, x') over the root of K(x, x) K(x', x').
        critical_lr: n c / lambda_1.
    """

    parameters: int
    size: float
    cosine: float
    critical_lr: float


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: the Python that makes the network.
        paper: what the paper prints of it.
        samples: how many images, the first ones.
        seeds: 0, 1, ... of its initial values.
        classes: of the images, as `cx.data.load` takes them.
    """

    name: str
    paper: str = ""
    samples: int = 128
    seeds: int = 3
    classes: str | None = "pair"

    def make(self, seed: int) -> nn.Module:
        """The network, freshly drawn."""
        torch.manual_seed(seed)
        networks = {kind.__name__: kind for kind in (CNN, FCN, Myrtle5, ViT, WideResNet)}
        model: nn.Module = eval(self.name, {"__builtins__": {}}, networks)
        return model


_STANDARD = 'parameterization="standard"'

ROWS = (
    Row("FCN(3072, 1024, 2)"),
    Row(f"FCN(3072, 1024, 2, {_STANDARD})"),
    Row("FCN(3072, 1024, 5)", "3.6, rate 6"),
    Row(f"FCN(3072, 1024, 5, {_STANDARD})"),
    Row("CNN(3, 32, 128)"),
    Row(f"CNN(3, 32, 128, {_STANDARD})"),
    Row("CNN(3, 32, 512)", "4.5, rate 8", samples=32, seeds=1),
    Row(f"CNN(3, 32, 512, {_STANDARD})", samples=32, seeds=1),
    Row("WideResNet(3, 10, 10)", "1.5, rate 3"),
    Row("WideResNet(3, 10, 10, batch_norm=True)", samples=32, seeds=1),
    Row(f"WideResNet(3, 10, 10, batch_norm=False, {_STANDARD})"),
    Row(f"WideResNet(3, 10, 10, {_STANDARD})", samples=32, seeds=1),
    Row("WideResNet(3, 16, 2)"),
    Row("WideResNet(3, 16, 2, batch_norm=True)", samples=32),
    Row(f"WideResNet(3, 16, 2, batch_norm=False, {_STANDARD})"),
    Row(f"WideResNet(3, 16, 2, {_STANDARD})", samples=32),
    Row("ViT(3, 32, 512)", "rate .2"),
    Row(f"ViT(3, 32, 512, {_STANDARD})"),
    Row("Myrtle5(3, 256)"),
    Row("Myrtle5(3, 256, 10)", seeds=1, classes=None),
    Row(f"Myrtle5(3, 256, {_STANDARD})"),
)


def at_initialisation(model: nn.Module, x: Tensor) -> AtInitialisation:
    """Measure a network on samples x [n, ...]; cost and errors are those of `cx.ntk`."""
    kernel = cx.ntk(model, x)
    assert isinstance(kernel, Tensor)
    kernel = kernel.double()  # [n c, n c]
    scale = kernel.diagonal().sqrt()  # [n c]
    cosines = kernel / torch.outer(scale, scale)  # [n c, n c]
    rows = len(kernel)
    return AtInitialisation(
        parameters=sum(p.numel() for p in model.parameters()),
        size=kernel.diagonal().mean().item(),
        cosine=(cosines.sum().item() - rows) / (rows * (rows - 1)),
        critical_lr=cx.critical_lr(kernel).item(),
    )


def rendered(row: Row, x: Tensor) -> str:
    """A row of the table in Markdown, measured on x [n, 3, 32, 32]."""
    found = [at_initialisation(row.make(seed), x) for seed in range(row.seeds)]
    cells = (
        f"`{row.name}`"
        + (", all classes" if row.classes is None else "")
        + (" *" if row.samples < 128 else ""),
        f"{found[0].parameters:,}",
        ", ".join(_short(each.size) for each in found),
        _short(sum(each.cosine for each in found) / len(found)),
        ", ".join(_short(each.critical_lr) for each in found),
        row.paper,
    )
    return "| " + " | ".join(cells) + " |"


def _short(value: float) -> str:
    """Two digits, or all before the point, without an exponent and without the zero before the point."""
    if value >= 100:
        return f"{value:.0f}"
    digits = f"{Decimal(f'{value:.1e}'):f}"  # 0.0036
    return digits.removeprefix("0") if digits.startswith("0.") else digits


def main(words: list[str]) -> None:
    """Print the rows whose name holds one of the words, all for none."""
    for row in ROWS:
        if not words or any(word in row.name for word in words):
            images = cx.data.load("cifar10", classes=row.classes, train=row.samples).train.x
            print(rendered(row, images), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
