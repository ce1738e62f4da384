"""What a captured step must give, written once: for the GPU, and for the stand-in where there is none."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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


def compare_pass(step: cx.CapturedStep | cx.Observation, seen: cx.Observation) -> None:
    """What a replay found in the forward and the backward, beside an Observation."""
    for name in ("prediction", "residual", "loss", "kernel"):
        close(getattr(step, name), getattr(seen, name))


def compare_spectrum(step: cx.CapturedStep | cx.Observation, seen: cx.Observation) -> None:
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


def compare_captured(model: nn.Module, *, kernel: bool) -> None:
    """Three steps of an Observer whose passes are captured beside one without; all that was made outlives replays."""
    eager = copy.deepcopy(model)
    observer, other = (cx.Observer(m, k=K, kernel=kernel, captured=m is model) for m in (model, eager))
    made = []
    for seed, lr in enumerate((0.05, 0.01, 0.02)):
        x, y = data(model, seed)
        seen, expected = observer(x, y), other(x, y)
        made.append((seen, expected, seen.gradients(), expected.gradients()))
        seen.step_(lr)
        expected.step_(lr)
        compare_models(model, eager)
    for seen, expected, gradients, others in made:
        assert gradients.keys() == others.keys()
        whole = torch.cat([g.flatten() for g in others.values()])
        for name, gradient in gradients.items():
            close(gradient, others[name], whole)
        assert [row.route for row in seen.layer_report] == [row.route for row in expected.layer_report]
        close(seen.residual, expected.residual)
        close(seen.loss, expected.loss)
        if kernel:
            compare_pass(seen, expected)
            compare_spectrum(seen, expected)
        else:
            assert seen.kernel is None
    seen.check()


class HostGraph:
    """Runs again what was recorded, into the memory of the first results."""

    def run(self, function: Callable[[], Any]) -> Any:
        return function()

    rehearse = run

    def record(self, function: Callable[[], Any]) -> Any:
        self.function, self.results = function, function()
        return self.results

    def replay(self) -> None:
        for own, new in zip(tree_leaves(self.results), tree_leaves(self.function()), strict=True):
            if own is not None:
                own.copy_(new)

    @contextmanager
    def branch(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass


class OneMemory(HostGraph):
    """For captured passes: the tensors of the capture get new values, and everything else stays what it was then."""

    made = 0  #: how many there have been

    def __init__(self) -> None:
        OneMemory.made += 1

    def replay(self) -> None:
        """Run again, into the same memory, as no version counter sees it."""
        captured = self.function.__self__  # type: ignore[attr-defined]
        fixed = [*(p for _, p in captured._state.every), *(b for _, _, b in captured._state.buffers)]
        fixed += [captured.x, captured.y, *(plan.unit for plan in captured._observer._plans.values())]
        storages = {t.untyped_storage().data_ptr() for t in fixed if t is not None}
        for own, new in zip(_tensors_of(self.results), _tensors_of(self.function()), strict=True):
            if own.untyped_storage().data_ptr() not in storages:
                for dim, stride in enumerate(own.stride()):
                    if stride == 0:  # expanded
                        own, new = own.narrow(dim, 0, 1), new.narrow(dim, 0, 1)
                own.data.copy_(new)


def without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Observers on the CPU capture their passes, in `OneMemory`."""
    module = sys.modules["catapult_ext.observe.observer"]  # `cx.observe` is the function
    monkeypatch.setattr(module, "CudaGraph", lambda device: OneMemory())
    monkeypatch.setattr(cx.Observer, "_need_cuda", lambda self, what: None)
    monkeypatch.setattr(OneMemory, "made", 0)


def _tensors_of(results: dict[str, Any]) -> Iterator[Tensor]:
    made = results["made"]
    yield from (made.prediction, made.residual, made.squares, *made.swept.values(), *results["buffers"])
    if made.kernel is not None:
        yield made.kernel
    if made.sweep is not None:
        yield from made.sweep.layer_inputs.values()
        if made.sweep.input_gradients is not None:
            yield made.sweep.input_gradients
        for data in made.sweep.sites.values():
            yield data.sensitivities
            if data.features is not None:
                yield from data.features if isinstance(data.features, tuple) else (data.features,)
