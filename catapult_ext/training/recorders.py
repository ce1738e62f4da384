"""What is recorded beside the losses, and how often.

A recorder is a small frozen dataclass with a cadence `every`, the names of its columns, and `record`. It
records where its cadence says (an integer: at the steps 0, every, 2 every, ...) and, whatever the cadence, at
the last row, which describes the final parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from catapult_ext.agop import agop, agop_alignment
from catapult_ext.data import Split
from catapult_ext.hessian import hessian_top
from catapult_ext.losses import decompose_loss
from catapult_ext.observe import Observation
from catapult_ext.training.cadence import Cadence, check_cadence
from catapult_ext.training.evaluation import evaluation_mode

__all__ = [
    "AGOP",
    "CATAPULT_MARGIN",
    "AGOPAlignment",
    "BatchCriticalRate",
    "BatchHessian",
    "CriticalRate",
    "Hessian",
    "ParameterNorms",
    "Recorder",
    "Spectrum",
    "Step",
]

#: A step counts as a catapult when its rate exceeds its batch's critical rate by more than this (Section 4).
CATAPULT_MARGIN = 1e-8


@dataclass
class Step:
    """What a recorder may look at; valid during its `record` call only.

    Attributes:
        index: t; the parameters are those before update t.
        model: The model, not to be changed.
        data: The data of the run.
        lr: Rate of update t. None in recorders that do not observe the batch.
        indices: Samples of the batch of update t, (b,) int64; None for GD and where there is no batch.
        observation: The pass that the recorder asked for with `observes`, kernel included; None without.
        critical_factor: Critical rate of the algorithm in units of n c / lambda_1; None: it has none.
        keep: `keep(name, tensor)` stores a copy of a tensor of this step in `History.tensors`.
    """

    index: int
    model: nn.Module
    data: Split
    keep: Callable[[str, torch.Tensor], None]
    critical_factor: float | None = None
    lr: float | None = None
    indices: torch.Tensor | None = None
    observation: Observation | None = None

    @property
    def critical_lr(self) -> float:
        """Critical rate of the algorithm on what `observation` saw; NaN for one that has none."""
        assert self.observation is not None
        if self.critical_factor is None:
            return math.nan
        return self.observation.critical_lr.item() * self.critical_factor


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Base of all recorders; derive from it to record your own quantities.

    Class attributes:
        observes: "batch": `record` gets the pass over the batch of update t (GD: the training set); "set": it
            gets a pass over the probe, or with GD and no probe the one over the training set; None: it gets
            no pass, and costs none. Asking for a pass makes that pass compute the kernel.
        at_best: Also record once with the parameters of the best validation, into `History.best.measures`.

    Args:
        every: Steps between two records, or a `LogSpaced` or `AroundSpikes` cadence.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = None
    at_best: ClassVar[bool] = False

    every: Cadence = 1

    def __post_init__(self) -> None:
        check_cadence(self.every)

    @property
    def eigenpairs(self) -> int:
        """Eigenpairs of the pass that `record` reads; 0: none."""
        return 0

    def columns(self) -> tuple[str, ...]:
        """Names of the recorded quantities, unique among all recorders of a run."""
        raise NotImplementedError(f"{type(self).__name__} must define columns()")

    def record(self, step: Step) -> Sequence[float]:
        """Their values, in the order of `columns`."""
        raise NotImplementedError(f"{type(self).__name__} must define record()")


@dataclass(frozen=True, kw_only=True)
class Spectrum(Recorder):
    """Largest eigenvalues of the kernel, critical rate, and the loss split along the top eigenvectors.

    Columns: `lambda_1` (the norm of K) to `lambda_k`, `critical_lr` = n c / lambda_1 (with momentum m: 1 + m
    times that; NaN for algorithms without a critical rate, such as Adam), `top_loss` and `rest_loss` (L_<=s
    and L_>s: means over all n c entries, their sum is the loss of that set). They describe the probe if
    `train` was given one (one pass over it for each record); otherwise, with GD, the training set, from the
    pass that makes the step. Batches need a probe.

    Splits at further places come from the same eigenvectors: each number s in `splits` adds the columns
    `top_loss_s` and `rest_loss_s`. Fig. 16 of the paper splits the loss of ten classes at the top 10, 30 and 50.

    Args:
        every: Steps between two records.
        k: Eigenvalues to record, at most n c.
        s: Eigenvectors in the top part of the loss, at most k; None: k.
        splits: Numbers of eigenvectors at which the loss is split as well, ascending, each at most k.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = "set"

    k: int = 1
    s: int | None = None
    splits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {self.k!r}")
        if self.s is not None and not (isinstance(self.s, int) and 1 <= self.s <= self.k):
            raise ValueError(f"s: expected None or an integer from 1 to k = {self.k}, got {self.s!r}")
        whole = isinstance(self.splits, tuple) and all(isinstance(s, int) for s in self.splits)
        if not whole or not all(a < b for a, b in itertools.pairwise((0, *self.splits, self.k + 1))):
            raise ValueError(
                f"splits: expected a tuple of ascending integers from 1 to k = {self.k}, got {self.splits!r}"
            )

    @property
    def eigenpairs(self) -> int:
        """The given k."""
        return self.k

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        values = (f"lambda_{i + 1}" for i in range(self.k))
        parts = (f"{part}_{s}" for s in self.splits for part in ("top_loss", "rest_loss"))
        return (*values, "critical_lr", "top_loss", "rest_loss", *parts)

    def record(self, step: Step) -> Sequence[float]:
        """Read them off the observation."""
        seen = step.observation
        assert seen is not None
        values, vectors = seen.eigen.values, seen.eigen.vectors  # (k,), (n c, k)
        splits = (decompose_loss(seen.residual, vectors[:, :s]) for s in (self.s or self.k, *self.splits))
        parts = (part.item() for split in splits for part in split)
        return (*values[: self.k].tolist(), step.critical_lr, *parts)


@dataclass(frozen=True, kw_only=True)
class CriticalRate(Recorder):
    """Norm of the kernel and critical rate of the set, without eigenvectors; cheaper than `Spectrum`.

    Columns: `lambda_1`, `critical_lr`; of the same set and with the same factor as in `Spectrum`.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = "set"

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("lambda_1", "critical_lr")

    def record(self, step: Step) -> Sequence[float]:
        """Read them off the observation."""
        assert step.observation is not None
        return (step.observation.spectral_norm.item(), step.critical_lr)


@dataclass(frozen=True, kw_only=True)
class BatchCriticalRate(Recorder):
    """Critical rate of the batch of each step, b c / lambda_1(K_batch), and whether the step is a catapult.

    Columns: `batch_critical_lr` (with momentum m: 1 + m times the above), and `catapult`: lr -
    batch_critical_lr > 1e-8 (Section 4 of the paper); both NaN for algorithms without a critical rate. With
    GD the batch is the training set. With `every=1` the history counts the catapults until the best
    validation.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = "batch"

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("batch_critical_lr", "catapult")

    def record(self, step: Step) -> Sequence[float]:
        """Read it off the step's own pass."""
        assert step.lr is not None
        critical = step.critical_lr
        return (critical, math.nan if math.isnan(critical) else step.lr - critical > CATAPULT_MARGIN)


@dataclass(frozen=True, kw_only=True)
class Hessian(Recorder):
    """Largest eigenvalues of the Hessian of the training set's loss, and the critical rate that follows.

    Columns: `hessian_1` to `hessian_k`, descending, largest algebraic; `hessian_critical_lr` = 2 / hessian_1
    (with momentum m: 1 + m times that; NaN where hessian_1 <= 0, or for algorithms without a critical rate).
    n c / lambda_1(K) approximates it (Appendix A). The model is in the mode in which it is trained. See
    `hessian_top` for the accuracy; every record starts afresh.

    Args:
        every: When to record; each costs some tens of passes over the training set.
        k: Eigenvalues to record.
        tol: See `hessian_top`.
    """

    every: Cadence = 10
    k: int = 1
    tol: float | None = None
    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {self.k!r}")

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        values = (f"hessian_{i + 1}" for i in range(self.k))
        return tuple(self.prefix + name for name in (*values, "hessian_critical_lr"))

    def record(self, step: Step) -> Sequence[float]:
        """Solve on the samples of the batch where there is one, else on the training set."""
        train = step.data.train
        x, y = train[slice(None)] if step.indices is None else train[step.indices]
        values = hessian_top(step.model, x, y, self.k, tol=self.tol).values.tolist()  # (k,)
        if step.critical_factor is None or values[0] <= 0:
            return (*values, math.nan)
        return (*values, step.critical_factor * 2 / values[0])


@dataclass(frozen=True, kw_only=True)
class BatchHessian(Hessian):
    """The same for the loss of the batch of each step (Fig. 12), beside `BatchCriticalRate`.

    Columns: `batch_hessian_1` to `batch_hessian_k`, `batch_hessian_critical_lr`. With GD the batch is the
    training set.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = "batch"
    prefix: ClassVar[str] = "batch_"


@dataclass(frozen=True, kw_only=True)
class AGOP(Recorder):
    """The model's average gradient outer product in evaluation mode (equation 5).

    Column: `agop_trace`, the mean over samples of the squared norm of the input gradient, summed over
    outputs. Tensor: `agop`, its leading block (size, size).

    Args:
        every: When to record; each costs c backward passes over the inputs and m c d^2 operations.
        size: Rows and columns to keep, at most d; None: all.
        x: Inputs to average over, (m, ...); None: those of the training set (the paper's choice).
    """

    every: Cadence = 10
    size: int | None = None
    x: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"size: expected None or an integer >= 1, got {self.size!r}")

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("agop_trace",)

    def record(self, step: Step) -> Sequence[float]:
        """Compute it, keep the block."""
        g = _agop(step, self.x)  # (d, d)
        step.keep("agop", g[: self.size, : self.size])
        return (g.trace().item(),)


@dataclass(frozen=True, kw_only=True)
class AGOPAlignment(Recorder):
    """Cosine between the model's AGOP in evaluation mode and a reference EGOP (equation 6).

    Column: `agop_alignment`; also recorded with the parameters of the best validation. NaN for a network that
    is constant on the data: its AGOP is zero.

    Args:
        reference: (d, d) EGOP of the target, or AGOP of a strong model; any dtype and device.
        x: Inputs to average over, (m, ...); None: those of the training set (the paper's choice).
        every: When to record; each costs c backward passes over the inputs and m c d^2 operations.
    """

    at_best: ClassVar[bool] = True

    reference: torch.Tensor
    x: torch.Tensor | None = None
    every: Cadence = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference.dim() != 2 or self.reference.shape[0] != self.reference.shape[1]:
            raise ValueError(f"reference: expected shape (d, d), got {tuple(self.reference.shape)}")

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("agop_alignment",)

    def record(self, step: Step) -> Sequence[float]:
        """Compute the AGOP and compare."""
        g = _agop(step, self.x)  # (d, d)
        if not bool(g.any()):
            return (math.nan,)  # constant on the data, all its units dead: it aligns with nothing
        return (agop_alignment(g, self.reference.to(g)).item(),)


def _agop(step: Step, x: torch.Tensor | None) -> torch.Tensor:
    with evaluation_mode(step.model):
        return agop(step.model, step.data.train.x if x is None else x)


@dataclass(frozen=True, kw_only=True)
class ParameterNorms(Recorder):
    """Euclidean norms of the parameters.

    Columns: `parameter_norm`, of all parameters together, fixed ones included, and `norm:NAME` for each name.

    Args:
        every: When to record.
        names: Parameters by name, as in `model.named_parameters()`; `ParameterNorms.of(model)` takes all.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, *, every: Cadence = 1) -> ParameterNorms:
        """A recorder of every parameter's norm."""
        return cls(every=every, names=tuple(name for name, _ in model.named_parameters()))

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("parameter_norm", *(f"norm:{name}" for name in self.names))

    def record(self, step: Step) -> Sequence[float]:
        """Squares are summed in float64."""
        squares = {
            name: p.detach().square().sum(dtype=torch.float64) for name, p in step.model.named_parameters()
        }
        if unknown := [name for name in self.names if name not in squares]:
            raise ValueError(f"names: expected parameters of the model, got {unknown[0]!r}")
        total = torch.stack(list(squares.values())).sum()
        return (total.sqrt().item(), *(squares[name].sqrt().item() for name in self.names))
