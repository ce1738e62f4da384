"""Learning rates as functions of the step, absolute or in units of the critical rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Constant", "Schedule", "Stepwise"]


class Schedule(Protocol):
    """What the trainer asks of a schedule; one of your own is a dataclass with these two methods.

    What it needs beyond `previous` it must derive from the step, so that a resumed run goes on the same way.
    """

    def measures(self, step: int) -> bool:
        """Whether `lr` will ask for the critical rate at this step."""
        ...

    def lr(self, step: int, previous: float, critical_lr: Callable[[], float]) -> float:
        """The rate of this step.

        Args:
            step: t >= 0.
            previous: The rate of step t - 1; NaN at step 0.
            critical_lr: Measures the critical rate of the whole training set before step t.
        """
        ...


@dataclass(frozen=True)
class Stepwise:
    """A rate that changes at given steps and stays in between.

    Args:
        rates: Step -> rate from that step on; must contain step 0. The update of step t itself uses the new
            rate. "Increase to 10 at iteration 15" of the paper (Appendix F) is the key 15.
        relative: The rates are multiples of the critical rate of the whole training set, n c / lambda_1(K),
            measured before the update of the step at which they start; the product then stays fixed until the
            next key. So {0: 1.67} is 1.67 times the critical rate at initialisation.

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

    def measures(self, step: int) -> bool:
        """Whether the critical rate is needed at this step."""
        return self.relative and step in self.rates

    def lr(self, step: int, previous: float, critical_lr: Callable[[], float]) -> float:
        """The rate of this step; see `Schedule.lr`."""
        rate = self.rates.get(step)
        if rate is None:
            return previous
        return rate * critical_lr() if self.relative else rate


@dataclass(frozen=True)
class Constant:
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
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate: expected a positive finite number, got {self.rate!r}")

    def measures(self, step: int) -> bool:
        """Whether the critical rate is needed at this step."""
        return self.relative and step == 0

    def lr(self, step: int, previous: float, critical_lr: Callable[[], float]) -> float:
        """The rate of this step; see `Schedule.lr`."""
        if step > 0:
            return previous
        return self.rate * critical_lr() if self.relative else float(self.rate)
