"""What a captured step must give, written once: for the GPU, and for the stand-in where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import catapult_ext as cx

K = 3
#: Of a captured step beside the Observer's, relative to norms.
BOUND = {torch.float32: 1e-4, torch.float64: 1e-9}


class Pooled(nn.Module):
    """A convolution with few positions on which its maps are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(2, 5, 3, padding=1)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [n, 32] as images of 2 x 4 x 4."""
        return self.head(self.map(x.unflatten(1, (2, 4, 4))).tanh().mean((2, 3)))


class Embedded(nn.Module):
    """Vectors as tokens, some of them padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=1)
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 32] to tokens [n, 32]."""
        tokens = (x * 4).abs().long().clamp_max(10)
        return self.head(self.layer(self.table(tokens)).tanh().mean(1))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _fcn(outputs: int) -> nn.Module:
    return cx.models.FCN(32, 24, 3, out_features=outputs, generator=_generator())


def _cnn(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), cx.models.CNN(2, 4, 6, 3, out_features=outputs, generator=_generator())
    )


def _vit() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), cx.models.ViT(2, 4, 8, 2, patch_size=2, heads=2, generator=_generator())
    )


def _normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 1)
    )


def _tokens() -> nn.Module:
    torch.manual_seed(0)
    return Embedded()


#: Networks of vectors [n, 32] by name; "normalised" couples its samples and has buffers.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "fcn": lambda: _fcn(1),
    "fcn, three outputs": lambda: _fcn(3),
    "cnn": lambda: _cnn(1),
    "cnn, three outputs": lambda: _cnn(3),
    "few positions": Pooled,
    "vit": _vit,
    "normalised": _normalised,
    "tokens": _tokens,
}


def data(model: nn.Module, seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    """Samples [n, 32] and targets [n, c] in the dtype and on the device of a model."""
    generator, like = torch.Generator().manual_seed(seed), next(model.parameters())
    x = torch.randn(n, 32, dtype=torch.float64, generator=generator).to(like)
    with torch.no_grad():
        outputs = copy.deepcopy(model)(x).shape[1:].numel()
    return x, torch.randn(n, outputs, dtype=torch.float64, generator=generator).to(like)


def close(found: Tensor, expected: Tensor, size: Tensor | None = None) -> None:
    """Compare, relative to the norm of what is expected or to a given size."""
    assert found.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    size = expected if size is None else size
    error = float((found.detach().double() - expected.detach().double()).norm())
    assert error <= BOUND[expected.dtype] * float(size.detach().double().norm())


def compare_pass(step: cx.CapturedStep, seen: cx.Observation) -> None:
    """What a replay found in the forward and the backward, beside an Observation."""
    for name in ("prediction", "residual", "loss", "kernel"):
        close(getattr(step, name), getattr(seen, name))


def compare_spectrum(step: cx.CapturedStep, seen: cx.Observation) -> None:
    """What follows from the eigenpairs."""
    close(step.eigen.values, seen.eigen.values)
    close(step.critical_lr, seen.critical_lr)
    for name in ("top_loss", "rest_loss"):
        close(getattr(step, name), getattr(seen, name), seen.loss)


def compare_models(model: nn.Module, other: nn.Module) -> None:
    """Parameters and buffers."""
    for own, theirs in zip(
        (*model.parameters(), *model.buffers()), (*other.parameters(), *other.buffers()), strict=True
    ):
        close(own, theirs)
