"""Learning rates as functions of the step, absolute or in units of the critical rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from catapult_ext.losses import decompose_loss
from catapult_ext.observe import Observation

__all__ = ["Constant", "Cyclical", "Measurement", "Schedule", "Stepwise", "WarmUp"]


class Measurement:
    """What a schedule may ask about the whole training set before an update; each number is lazy.

    Args:
        observation: A pass over the training set with its kernel.
        factor: Critical rate of the algorithm in units of n c / lambda_1.
        previous_lr: Rate of the update before; NaN at step 0.
        whole_steps: Whether updates follow the gradient of the whole training set; False: of batches.
    """

    def __init__(
        self, observation: Observation, factor: float, previous_lr: float, whole_steps: bool
    ) -> None:
        self._observation = observation
        self._factor = factor
        self.previous_lr = previous_lr
        self.whole_steps = whole_steps

    @property
    def loss(self) -> float:
        """Mean over all n c entries of (f - y)^2."""
        return self._observation.loss.item()

    @property
    def lambda_1(self) -> float:
        """The norm of K."""
        return self._observation.spectral_norm.item()

    @property
    def critical_lr(self) -> float:
        """N c / lambda_1 times the algorithm's factor (1 + momentum)."""
        return self._observation.critical_lr.item() * self._factor

    def top_loss(self, s: int) -> float:
        """Part of the loss in the first s eigenvectors, at most the schedule's `eigenpairs`."""
        seen = self._observation
        vectors: torch.Tensor = seen.eigen.vectors[:, :s]  # (n c, s)
        return decompose_loss(seen.residual, vectors)[0].item()


class Schedule:
    """Base of all schedules; derive a frozen dataclass from it and define `lr`.

    What it has to remember goes into `state`, a dict of JSON values that the run owns and stores, so that a
    resumed run goes on the same way.
    """

    @property
    def eigenpairs(self) -> int:
        """Eigenpairs that `lr` reads of a measurement; 0: none."""
        return 0

    @property
    def relative_to_critical(self) -> bool:
        """Whether it ever measures; such a schedule needs an algorithm that has a critical rate."""
        return False

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """Whether `lr` will measure at this step."""
        return False

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """The rate of the update of step t.

        Args:
            step: t >= 0; called once for each, in order.
            state: Empty at step 0.
            measure: Describes the whole training set before the update.
        """
        raise NotImplementedError(f"{type(self).__name__} must define lr()")


@dataclass(frozen=True)
class Stepwise(Schedule):
    """A rate that changes at given steps and stays in between.

    Args:
        rates: Step -> rate from that step on; must contain step 0. The update of step t itself uses the new
            rate. "Increase to 10 at iteration 15" of the paper (Appendix F) is the key 15.
        relative: The rates are multiples of the critical rate of the whole training set, n c / lambda_1(K)
            (with momentum m: 1 + m times that), measured before the update of the step at which they start;
            the product then stays fixed until the next key. So {0: 1.67} is 1.67 times the critical rate at
            initialisation.

    Raises:
        ValueError: No step 0, a negative step, or a rate that is not a positive finite number.
    """

    rates: Mapping[int, float]
    relative: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for step, rate in self.rates.items():
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"rates: expected integer steps >= 0, got {step!r}")
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(f"rates: expected a positive finite rate at step {step}, got {rate!r}")
        if 0 not in self.rates:
            raise ValueError(f"rates: expected a rate for step 0, got steps {sorted(self.rates)}")
        object.__setattr__(self, "rates", {step: float(self.rates[step]) for step in sorted(self.rates)})

    @property
    def relative_to_critical(self) -> bool:
        """As `relative` says."""
        return self.relative

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """At the given steps, when relative."""
        return self.relative and step in self.rates

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """See `Schedule.lr`."""
        if (rate := self.rates.get(step)) is not None:
            state["rate"] = rate * measure().critical_lr if self.relative else rate
        return state["rate"]


@dataclass(frozen=True)
class Constant(Schedule):
    """One rate for the whole run.

    Args:
        rate: The learning rate, or with `relative` its multiple of the critical rate of the whole training
            set at initialisation.
        relative: See `Stepwise`.

    Raises:
        ValueError: The rate is not a positive finite number.
    """

    rate: float
    relative: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)

    @property
    def relative_to_critical(self) -> bool:
        """As `relative` says."""
        return self.relative

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """At step 0, when relative."""
        return self.relative and step == 0

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """See `Schedule.lr`."""
        if step == 0:
            state["rate"] = self.rate * measure().critical_lr if self.relative else float(self.rate)
        return state["rate"]


@dataclass(frozen=True)
class Cyclical(Schedule):
    """The triangular policy: from `low` up to `high` and down again in each period (Appendix C.4, Fig. 23).

    The rate of update t is low + (high - low) (1 - |2 u - 1|) with u = (t mod period) / period.

    Args:
        low: Rate at the start of each period, > 0.
        high: Rate half way, larger than `low`.
        period: Steps of a whole cycle, up and down, >= 2.
        relative: Both rates are multiples of the critical rate of the whole training set at initialisation.

    Raises:
        ValueError: A value is out of range.
    """

    low: float
    high: float
    period: int
    relative: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_rate("low", self.low)
        check_rate("high", self.high)
        if not self.high > self.low:
            raise ValueError(f"high: expected a rate above low = {self.low}, got {self.high!r}")
        if not isinstance(self.period, int) or self.period < 2:
            raise ValueError(f"period: expected an integer >= 2, got {self.period!r}")

    @property
    def relative_to_critical(self) -> bool:
        """As `relative` says."""
        return self.relative

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """At step 0, when relative."""
        return self.relative and step == 0

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """See `Schedule.lr`."""
        if step == 0:
            state["unit"] = measure().critical_lr if self.relative else 1.0
        height = 1.0 - abs(2.0 * (step % self.period) / self.period - 1.0)
        return (self.low + (self.high - self.low) * height) * state["unit"]


@dataclass(frozen=True)
class WarmUp(Schedule):
    """A linear rise from zero into another schedule: update t < steps uses (t + 1) / steps of its rate.

    Args:
        schedule: The schedule that the rise leads into; it runs from step 0 on.
        steps: Length of the rise, >= 1.

    Raises:
        TypeError: `schedule` is no schedule.
        ValueError: `steps` is out of range.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {self.steps!r}")

    @property
    def eigenpairs(self) -> int:
        """Those of the schedule."""
        return self.schedule.eigenpairs

    @property
    def relative_to_critical(self) -> bool:
        """As the schedule."""
        return self.schedule.relative_to_critical

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """When the schedule does."""
        return self.schedule.measures(step, state)

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """See `Schedule.lr`."""
        return self.schedule.lr(step, state, measure) * min(1.0, (step + 1) / self.steps)


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless the rate is a positive finite number."""
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"{name}: expected a positive finite number, got {rate!r}")


def check_schedule(schedule: object) -> None:
    """Raise TypeError unless it is a schedule."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: expected a schedule such as Constant(lr), got {type(schedule).__name__}")
