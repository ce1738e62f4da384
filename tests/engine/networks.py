"""Networks of the catalogue that hook-based tools get wrong, each as a function of a seed; all take x [n, 32]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from python_experiments.coverage.cases import CASES, situations
from python_experiments.coverage.cases.sequence import Embedded
from python_experiments.coverage.cases.situations import Checkpointed, Mutated

__all__ = ["EXACT", "Checkpointed", "Embedded", "Mutated", "make", "situations"]

_NAMES = [
    "in-place relu", "module called twice", "tied and transposed", "fed with a parameter", "pending negation",
    "scaled products", "attention, batch first", "attention, sequence first", "attention, eval", "lstm",
    "token-major rows", "shuffled samples", "parametrizations", "frozen layers", "unused layer", "output (n,)",
    "layer norm", "embedding", "bare parameters", "checkpoint", "convolutions", "circular convolution",
    "batch norm, eval", "batch norm, training", "coupled samples", "scalar below coupling", "three outputs",
    "three outputs, convolution", "attention, three outputs", "three outputs, batch norm", "prelu", "bilinear",
    "convolution 1d", "transposed convolution",
]  # fmt: skip


def _of_vectors(name: str) -> nn.Module:
    """A case behind a layer that makes its samples of vectors."""
    case = CASES[name]
    model, x = case.make(), case.draw(1, torch.Generator())
    assert isinstance(x, torch.Tensor)
    if x.shape[1:] == (32,):
        return model
    layers = model if isinstance(model, nn.Sequential) else [model]
    return nn.Sequential(nn.Unflatten(1, x.shape[1:]), *layers).train(model.training)


EXACT: dict[str, Callable[[], nn.Module]] = {name: partial(_of_vectors, name) for name in _NAMES}


def make(name: str, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A freshly initialised network."""
    torch.manual_seed(seed)
    return EXACT[name]().to(dtype)
