"""What is recorded beside the losses, and how often.

A recorder is a small frozen dataclass with a cadence `every`, the names of its columns, and `record`. It
records at the steps 0, every, 2 every, ... and, whatever the cadence, at the last row, which describes the
final parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from catapult_ext.agop import agop, agop_alignment
from catapult_ext.data import Split
from catapult_ext.losses import decompose_loss
from catapult_ext.observe import Observation
from catapult_ext.training.evaluation import evaluation_mode

__all__ = ["CATAPULT_MARGIN", "AGOPAlignment", "BatchCriticalRate", "Recorder", "Spectrum", "Step"]

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
    """

    index: int
    model: nn.Module
    data: Split
    lr: float | None = None
    indices: torch.Tensor | None = None
    observation: Observation | None = None


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Base of all recorders; derive from it to record your own quantities.

    Class attributes:
        observes: "batch": `record` gets the pass that makes update t, over the batch (GD: the training set);
            "set": it gets a pass over the probe, or with GD and no probe the pass that makes update t;
            None: it gets no pass, and costs none. Asking for a pass makes that pass compute the kernel.
        at_best: Also record once with the parameters of the best validation, into `History.best.measures`.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = None
    at_best: ClassVar[bool] = False

    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {self.every!r}")

    @property
    def eigenpairs(self) -> int:
        """Eigenpairs that the pass over the "set" has to provide."""
        return 1

    def columns(self) -> tuple[str, ...]:
        """Names of the recorded quantities, unique among all recorders of a run."""
        raise NotImplementedError(f"{type(self).__name__} must define columns()")

    def record(self, step: Step) -> Sequence[float]:
        """Their values, in the order of `columns`."""
        raise NotImplementedError(f"{type(self).__name__} must define record()")


@dataclass(frozen=True, kw_only=True)
class Spectrum(Recorder):
    """Largest eigenvalues of the kernel, critical rate, and the loss split along the top eigenvectors.

    Columns: `lambda_1` (the norm of K) to `lambda_k`, `critical_lr` = n c / lambda_1, `top_loss` and
    `rest_loss` (L_<=s and L_>s: means over all n c entries, their sum is the loss of that set). They describe
    the probe if `train` was given one (one pass over it for each record); otherwise, with GD, the training
    set, from the pass that makes the step. SGD needs a probe.

    Args:
        every: Steps between two records.
        k: Eigenvalues to record, at most n c.
        s: Eigenvectors in the top part of the loss, at most k; None: k.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = "set"

    k: int = 1
    s: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {self.k!r}")
        if self.s is not None and not (isinstance(self.s, int) and 1 <= self.s <= self.k):
            raise ValueError(f"s: expected None or an integer from 1 to k = {self.k}, got {self.s!r}")

    @property
    def eigenpairs(self) -> int:
        """The given k."""
        return self.k

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return (*(f"lambda_{i + 1}" for i in range(self.k)), "critical_lr", "top_loss", "rest_loss")

    def record(self, step: Step) -> Sequence[float]:
        """Read them off the observation."""
        seen = step.observation
        assert seen is not None
        s = self.s or self.k
        values, vectors = seen.eigen.values, seen.eigen.vectors  # (k,), (n c, k)
        top, rest = decompose_loss(seen.residual, vectors[:, :s])
        return (*values[: self.k].tolist(), seen.critical_lr.item(), top.item(), rest.item())


@dataclass(frozen=True, kw_only=True)
class BatchCriticalRate(Recorder):
    """Critical rate of the batch of each step, b c / lambda_1(K_batch), and whether the step is a catapult.

    Columns: `batch_critical_lr`, and `catapult`: lr - batch_critical_lr > 1e-8 (Section 4 of the paper). With
    GD the batch is the training set. With `every=1` the history counts the catapults until the best
    validation.
    """

    observes: ClassVar[Literal["batch", "set"] | None] = "batch"

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("batch_critical_lr", "catapult")

    def record(self, step: Step) -> Sequence[float]:
        """Read it off the step's own pass."""
        assert step.observation is not None
        assert step.lr is not None
        critical = step.observation.critical_lr.item()
        return (critical, step.lr - critical > CATAPULT_MARGIN)


@dataclass(frozen=True, kw_only=True)
class AGOPAlignment(Recorder):
    """Cosine between the model's AGOP in evaluation mode and a reference EGOP (equation 6).

    Column: `agop_alignment`; also recorded with the parameters of the best validation. NaN for a network that is
    constant on the data: its AGOP is zero.

    Args:
        reference: (d, d) EGOP of the target, or AGOP of a strong model; any dtype and device.
        x: Inputs to average over, (m, ...); None: those of the training set (the paper's choice).
        every: Steps between two records; each costs c backward passes over the inputs and m c d^2 operations.
    """

    at_best: ClassVar[bool] = True

    reference: torch.Tensor
    x: torch.Tensor | None = None
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference.dim() != 2 or self.reference.shape[0] != self.reference.shape[1]:
            raise ValueError(f"reference: expected shape (d, d), got {tuple(self.reference.shape)}")

    def columns(self) -> tuple[str, ...]:
        """See the class."""
        return ("agop_alignment",)

    def record(self, step: Step) -> Sequence[float]:
        """Compute the AGOP and compare."""
        with evaluation_mode(step.model):
            g = agop(step.model, step.data.train.x if self.x is None else self.x)  # (d, d)
        if not bool(g.any()):
            return (
                math.nan,
            )  # a network that is constant on the data, all its units dead, aligns with nothing
        return (agop_alignment(g, self.reference.to(g)).item(),)
