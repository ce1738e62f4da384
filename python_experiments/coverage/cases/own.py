"""A network of one's own as a case: a function that returns it and samples, in a file or in a module."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.observe.inputs import Inputs
from python_experiments.coverage.brute_force import call
from python_experiments.coverage.cases.build import Case

__all__ = ["case_of"]


def case_of(name: str) -> Case:
    """FILE.py:FUNCTION or MODULE:FUNCTION, where FUNCTION() returns (model, samples), as a case.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    function = _function(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        returned = function()
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        raise ValueError(
            f"model: expected {name!r} to return (torch.nn.Module, samples), got {type(returned).__name__}"
        )
    model, x = returned
    refused = ""
    try:
        cx.ntk(model, _rows(x, torch.arange(2)))
    except cx.UnsupportedModule as error:
        refused = re.escape(str(error))

    def draw(n: int, generator: torch.Generator) -> Inputs:
        return _rows(x, torch.randperm(_length(x), generator=generator)[:n])

    return Case(name, lambda: function()[0], draw, coupled=_coupled(model, x), refused=refused, vary=False)


def _function(name: str) -> Callable[[], Any]:
    place, _, attribute = name.rpartition(":")
    if not place:
        raise ValueError(f"model: expected FILE.py:FUNCTION or MODULE:FUNCTION, got {name!r}")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise ValueError(
            f"model: expected FILE.py:FUNCTION or MODULE:FUNCTION, got {name!r} ({error})"
        ) from error


def _length(x: Inputs) -> int:
    if isinstance(x, Tensor):
        return len(x)
    return len(next(iter(x.values() if isinstance(x, Mapping) else x)))


def _rows(x: Inputs, rows: Tensor) -> Inputs:
    if isinstance(x, Tensor):
        return x[rows]
    if isinstance(x, Mapping):
        return {name: part[rows] for name, part in x.items()}
    return tuple(part[rows] for part in x)


def _coupled(model: nn.Module, x: Inputs) -> bool:
    """Whether the first two samples give something else with two others beside them."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        alone, beside = (call(model, _rows(x, torch.arange(n))) for n in (2, 4))
    return not torch.allclose(alone, beside[:2], rtol=1e-4, atol=1e-6)
