"""Synthetic tasks of the paper, with the expected gradient outer product (EGOP) of each target by hand.

Targets are polynomials of few coordinates of x ~ N(0, I_d) (multi-index models, Section 4), the full-rank
target of Appendix D, and the unit sphere with one doubled point of Fig 5 (Appendix F.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from catapult_ext.data.dataset import Dataset, Split
from catapult_ext.data.streams import stream

__all__ = ["egop", "multi_index", "multi_index_target", "unit_sphere"]


@dataclass(frozen=True)
class _Task:
    """A target f* of x ~ N(0, I_d).

    Attributes:
        formula: as the paper prints it.
        min_features: smallest d that the formula needs.
        target: (n, d) to (n,).
        mean_square: E f*(x)^2.
        egop: d to E grad f* grad f*^T, (d, d) float64.
    """

    formula: str
    min_features: int
    target: Callable[[Tensor], Tensor]
    mean_square: float
    egop: Callable[[int], Tensor]


def _rank_2_egop(d: int) -> Tensor:
    # grad = (x2, x1): E x2^2 = E x1^2 = 1 and E x1 x2 = 0.
    return _embed(torch.eye(2, dtype=torch.float64), d)


def _rank_3_egop(d: int) -> Tensor:
    # With S = x3 + ... + x10 (E S^2 = 8): d1 f = 2 x1 x2 + x2^2 + x2 S, d2 f = 2 x1 x2 + x1^2 + x1 S, and
    # di f = x1 x2 for i = 3 ... 10. Odd moments vanish, so
    #   E (d1 f)^2 = 4 E x1^2 x2^2 + E x2^4 + E x2^2 S^2 = 4 + 3 + 8 = 15, the same for d2 f;
    #   E d1 f d2 f = 4 E x1^2 x2^2 + E x2^2 x1^2 = 5;   E d1 f di f = 2 E x1^2 x2^2 = 2;   E di f dj f = 1.
    g = torch.ones(10, 10, dtype=torch.float64)
    g[:2, :] = g[:, :2] = 2
    g[:2, :2] = torch.tensor([[15.0, 5.0], [5.0, 15.0]])
    return _embed(g, d)


def _rank_4_egop(d: int) -> Tensor:
    # di f = (x1 ... x(i-1)) (1 + x(i+1) + ... + x(i+1) ... x4): 5 - i uncorrelated monomials, E of squares 1.
    # For i < j every term of di f dj f holds x(i) once (di f does not have it, dj f does), so its mean is 0.
    return _embed(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)), d)


def _full_rank_egop(d: int) -> Tensor:
    # grad = x / (sqrt(d) |x|), and E x x^T / |x|^2 = I / d by symmetry.
    return torch.eye(d, dtype=torch.float64) / d**2


def _embed(block: Tensor, d: int) -> Tensor:
    g = torch.zeros(d, d, dtype=torch.float64)
    g[: len(block), : len(block)] = block
    return g


_TASKS = {
    # E (x1 x2)^2 = 1.
    "rank-2": _Task("x1 x2", 2, lambda x: x[:, 0] * x[:, 1], 1.0, _rank_2_egop),
    # E x1^2 x2^2 (x1 + x2 + S)^2 = 3 + 3 + 8 = 14.
    "rank-3": _Task(
        "x1 x2 (x1 + ... + x10)",
        10,
        lambda x: x[:, 0] * x[:, 1] * x[:, :10].sum(1),
        14.0,
        _rank_3_egop,
    ),
    # Four uncorrelated monomials of second moment 1.
    "rank-4": _Task(
        "x1 + x1 x2 + x1 x2 x3 + x1 x2 x3 x4", 4, lambda x: x[:, :4].cumprod(1).sum(1), 4.0, _rank_4_egop
    ),
    # E |x|^2 / d = 1; nearly all of it is the squared mean.
    "full-rank": _Task(
        "|x| / sqrt(d)", 1, lambda x: x.norm(dim=1) / math.sqrt(x.shape[1]), 1.0, _full_rank_egop
    ),
}


def multi_index_target(task: str, x: Tensor, target_std: float | None = 1.0) -> Tensor:
    """The noise-free target f*(x), differentiable.

    Args:
        task: "rank-2", "rank-3", "rank-4" or "full-rank".
        x: points (n, d).
        target_std: scale of the target as in `multi_index`.

    Returns:
        (n, 1).
    """
    definition, scale = _definition(task, x.shape[1], target_std)
    return definition.target(x)[:, None] * scale  # [n, 1]


def egop(task: str, d: int = 100, target_std: float | None = 1.0) -> Tensor:
    """The expected gradient outer product E grad f*(x) grad f*(x)^T over x ~ N(0, I_d), exactly.

    Rank-2: diag(1, 1). Rank-3, over the first ten coordinates: rows (15, 5, 2 ... 2), (5, 15, 2 ... 2) and
    eight times (2, 2, 1 ... 1), divided by 14 at unit scale. Rank-4: diag(4, 3, 2, 1), divided by 4 at unit
    scale. Full-rank: I / d^2.

    Args:
        task: as in `multi_index`.
        d: input features.
        target_std: as in `multi_index`; the EGOP is that of the scaled target.

    Returns:
        (d, d) float64.

    Source: the definition of G* in Appendix F of the paper, worked out by hand in this file.
    """
    definition, scale = _definition(task, d, target_std)
    return definition.egop(d) * scale**2


def multi_index(
    task: str,
    train: int = 2000,
    validation: int = 5000,
    test: int = 5000,
    d: int = 100,
    noise_std: float = 0.1,
    target_std: float | None = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Samples x ~ N(0, I_d), y = scale f*(x) + N(0, noise_std^2) of a synthetic task.

    Args:
        task: "rank-2" x1 x2, "rank-3" x1 x2 (x1 + ... + x10), "rank-4" x1 + x1 x2 + x1 x2 x3 + x1 x2 x3 x4,
            or "full-rank" |x| / sqrt(d).
        train: samples to train on, at least 1.
        validation: samples to validate on; 0 for none.
        test: samples to test on; 0 for none.
        d: input features.
        noise_std: standard deviation of the label noise; it is not scaled.
        target_std: root mean square that the noise-free target is scaled to; None keeps f* as printed. It
            is the standard deviation of the polynomials, whose mean is 0. As printed the root mean squares
            are 1, sqrt(14), 2 and 1 (in the order above), so the default changes rank-3 and rank-4 only: with
            these as printed the paper's learning rates diverge.
        seed: of all random numbers. The three parts come from independent streams, and a larger part begins
            with the samples of a smaller one, so no size changes anything else.
        dtype: of the tensors; numbers are drawn and targets computed in float64 first.

    Returns:
        Split of x (n, d), y (n, 1); parts of size 0 are None.

    Raises:
        ValueError: naming the argument that is out of range.

    Source: Appendix F, "Dataset", of the paper.
    """
    definition, scale = _definition(task, d, target_std)
    if not (math.isfinite(noise_std) and noise_std >= 0):
        raise ValueError(f"noise_std must be finite and at least 0, got {noise_std!r}")
    parts: list[Dataset | None] = []
    for part, (name, n) in enumerate((("train", train), ("validation", validation), ("test", test))):
        _check_count(name, n, at_least=1 if name == "train" else 0)
        if n == 0:
            parts.append(None)
            continue
        x = torch.from_numpy(stream(seed, part, 0).standard_normal((n, d)))  # [n, d]
        noise = torch.from_numpy(stream(seed, part, 1).standard_normal((n, 1)))  # [n, 1]
        y = definition.target(x)[:, None] * scale + noise_std * noise  # [n, 1]
        info = {
            "task": task,
            "formula": definition.formula,
            "split": name,
            "d": d,
            "noise_std": noise_std,
            "target_std": target_std,
            "target_scale": scale,
            "seed": seed,
        }
        parts.append(Dataset(x.to(dtype), y.to(dtype), task, info))
    train_part, validation_part, test_part = parts
    assert train_part is not None
    return Split(train_part, validation_part, test_part)


def unit_sphere(
    n: int = 100,
    d: int = 100,
    outlier_scale: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Points uniform on the unit sphere with y = 1, one of them and its label multiplied by `outlier_scale`.

    The critical rate of a single point is proportional to 1 / |x|^2, so that of the outlier is smaller by
    outlier_scale^2. The outlier is `info["outlier_index"]` (0: the points are exchangeable).

    Args:
        n: points, at least 1.
        d: dimension of the space, at least 1.
        outlier_scale: factor of the outlier and its label, above 0; 1 leaves it as the others.
        seed: of the points.
        dtype: of the tensors.

    Returns:
        x (n, d), y (n, 1).

    Raises:
        ValueError: naming the argument that is out of range.

    Source: Fig 5 and Appendix F.3 of the paper.
    """
    _check_count("n", n, at_least=1)
    _check_count("d", d, at_least=1)
    if not (math.isfinite(outlier_scale) and outlier_scale > 0):
        raise ValueError(f"outlier_scale must be finite and above 0, got {outlier_scale!r}")
    x = stream(seed).standard_normal((n, d))  # [n, d]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.ones((n, 1))
    x[0] *= outlier_scale
    y[0] *= outlier_scale
    info = {
        "task": "unit-sphere",
        "d": d,
        "outlier_scale": outlier_scale,
        "outlier_index": 0,
        "seed": seed,
    }
    return Dataset(torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype), "unit-sphere", info)


def _definition(task: str, d: int, target_std: float | None) -> tuple[_Task, float]:
    """The task and the factor of its target."""
    if task not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}; got {task!r}")
    definition = _TASKS[task]
    if type(d) is not int or d < definition.min_features:
        raise ValueError(f"d must be at least {definition.min_features} for {task}, got {d!r}")
    if target_std is None:
        return definition, 1.0
    if not (math.isfinite(target_std) and target_std > 0):
        raise ValueError(
            f"target_std must be finite and above 0, or None for the raw target; got {target_std!r}"
        )
    return definition, target_std / math.sqrt(definition.mean_square)


def _check_count(argument: str, value: int, at_least: int) -> None:
    if type(value) is not int or value < at_least:
        raise ValueError(f"{argument} must be an integer of at least {at_least}, got {value!r}")
