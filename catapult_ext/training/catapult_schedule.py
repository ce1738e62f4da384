"""Rates that react to catapults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from catapult_ext.training.catapults import CatapultDetector, Reading, Spike
from catapult_ext.training.schedules import Measurement, Schedule, check_rate, check_schedule

__all__ = ["CatapultSchedule", "DecayAfterCatapult"]


@dataclass(frozen=True, kw_only=True)
class _Watching(Schedule):
    """A schedule that follows the spikes of the training set's loss."""

    detector: CatapultDetector = field(default_factory=CatapultDetector)
    s: int = 5
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("s", "every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        if not isinstance(self.detector, CatapultDetector):
            raise TypeError(f"detector: expected a CatapultDetector, got {type(self.detector).__name__}")

    @property
    def eigenpairs(self) -> int:
        """The given s."""
        return self.s

    @property
    def relative_to_critical(self) -> bool:
        """Always."""
        return True

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """At every `every`-th step."""
        return step % self.every == 0

    def _watch(self, step: int, state: dict[str, Any], seen: Measurement) -> Spike | None:
        """Show the step to the detector; the spike that ended here, if one did."""
        # Batches have critical rates of their own, which are not measured here.
        excess = seen.previous_lr / state["critical"] if seen.whole_steps and step > 0 else math.nan
        state["critical"] = seen.critical_lr
        reading = Reading(step, seen.loss, seen.lambda_1, seen.top_loss(self.s), excess)
        return self.detector.update(state.setdefault("detector", {}), reading)


@dataclass(frozen=True, kw_only=True)
class CatapultSchedule(_Watching):
    """Raises the rate to c times the current critical rate after each catapult (Section 3.2 of the paper).

    The critical rate and the loss of the whole training set are measured before each update (GD: in the step's
    own pass). Raising the rate by a fixed plan diverges sooner or later, so:

    - The rate is at no step above c times the critical rate of that step. When the norm of K grows, the rate falls.
    - A spike higher than `ceiling` times the larger of the first loss and the loss before the spike is cut
      short: the rate goes to half the critical rate of each step, and is halved again whenever the loss
      still rises. For the rest of the run half as much is added to the critical rate: c becomes 1 + (c - 1) / 2.
    - The next rise waits until the spike is over and `settle` measurements have passed.

    These rules go by the whole training set. A small batch can have a critical rate far below the set's, and
    measuring only every few steps sees a spike late: with batches they make divergence rare, not impossible.

    Args:
        c: Rate over critical rate of a rise, > 1. ReLU networks take up to a few times the critical rate
            (Remark 1), the deeper the less.
        catapults: How many to make; None: as many as the run lasts.
        start: The same multiple before the first rise, below or above 1; None: c.
        start_steps: Measurements at `start` after which the first rise comes, if no spike came before; 0: `patience`.
        decay: After the last catapult the rate is kept at or below this multiple (< 1) of the critical rate
            of each step, so that no further catapult comes; None: the rate stays as it is, under the first
            rule above.
        settle: See above.
        patience: Measurements without a spike after which the rate is set to c times the critical rate anew:
            a rise that came to nothing, since the norm of K fell without a spike.
        ceiling: See above.
        detector: Says what a catapult is.
        s: Eigenvectors of the top eigenspace that the detector looks at.
        every: Steps between two measurements. Batches: each costs a pass over the whole training set.

    Raises:
        ValueError: A value is out of range.
    """

    c: float = 1.5
    catapults: int | None = None
    start: float | None = None
    start_steps: int = 0
    decay: float | None = None
    settle: int = 5
    patience: int = 50
    ceiling: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("c", self.c)
        if not self.c > 1:
            raise ValueError(f"c: expected a multiple of the critical rate above 1, got {self.c!r}")
        if self.start is not None:
            check_rate("start", self.start)
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay: expected None or a number in (0, 1), got {self.decay!r}")
        if self.decay is not None and self.catapults is None:
            raise ValueError("catapults: expected a number, since decay says what follows the last, got None")
        for name, least in (("start_steps", 0), ("settle", 0), ("patience", 1), ("catapults", 0)):
            value = getattr(self, name)
            if name == "catapults" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        if not self.ceiling > 1:
            raise ValueError(f"ceiling: expected a number > 1, got {self.ceiling!r}")

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """See `Schedule.lr`."""
        if step % self.every:
            return state["rate"]
        seen = measure()
        spike = self._watch(step, state, seen)
        critical, loss = seen.critical_lr, seen.loss
        if step == 0:
            start = self.c if self.start is None else self.start
            wait = self.start_steps or self.patience
            state |= {"rate": start * critical, "c": self.c, "first_loss": loss, "loss": loss}
            state |= {"wait": wait, "brake": None, "found": 0}
        rising = self.detector.is_rising(state["detector"])
        if spike is not None:
            state["found"] += spike.is_catapult
            state["wait"] = self.settle
        if not rising:
            state["brake"] = None
        elif state["brake"] is not None:
            if loss > state["loss"]:
                state["brake"] /= 2
        elif loss > self.ceiling * max(state["first_loss"], state["detector"]["spike"]["start"][1]):
            state["brake"] = 0.5
            state["c"] = 1 + (state["c"] - 1) / 2
        state["loss"] = loss
        done = self.catapults is not None and state["found"] >= self.catapults
        if not (done or rising):
            if state["wait"] == 0:
                state["rate"] = state["c"] * critical
                state["wait"] = self.patience
            state["wait"] -= 1
        limit = state["c"] if state["brake"] is None else state["brake"]
        if done and not rising and self.decay is not None:
            limit = self.decay
        state["rate"] = min(state["rate"], limit * critical)
        return state["rate"]


@dataclass(frozen=True)
class DecayAfterCatapult(_Watching):
    """Follows another schedule until catapults have come, then stays below the critical rate.

    Args:
        schedule: The schedule to begin with.
        to: From the end of the last of the catapults on, the rate is the smaller of its own and this multiple
            of the critical rate of each step; in (0, 1).
        catapults: How many are awaited, >= 1.
        detector: Says what a catapult is.
        s: Eigenvectors of the top eigenspace that the detector looks at.
        every: Steps between two measurements; with batches each costs a pass over the whole training set.

    Raises:
        TypeError: `schedule` is no schedule.
        ValueError: A value is out of range.
    """

    schedule: Schedule
    to: float = field(default=0.5, kw_only=True)
    catapults: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.schedule)
        if not 0 < self.to < 1:
            raise ValueError(f"to: expected a number in (0, 1), got {self.to!r}")
        if not isinstance(self.catapults, int) or self.catapults < 1:
            raise ValueError(f"catapults: expected an integer >= 1, got {self.catapults!r}")

    @property
    def eigenpairs(self) -> int:
        """Those that the detector and the schedule need."""
        return max(self.s, self.schedule.eigenpairs)

    def measures(self, step: int, state: dict[str, Any]) -> bool:
        """At every `every`-th step, and when the schedule does."""
        return super().measures(step, state) or self.schedule.measures(step, state.get("schedule", {}))

    def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Measurement]) -> float:
        """See `Schedule.lr`."""
        if step == 0:
            state |= {"schedule": {}, "found": 0, "rate": None}
        if step % self.every == 0:
            seen = measure()
            spike = self._watch(step, state, seen)
            state["found"] += spike is not None and spike.is_catapult
        if state["found"] < self.catapults:
            state["rate"] = self.schedule.lr(step, state["schedule"], measure)
        elif step % self.every == 0:
            state["rate"] = min(state["rate"], self.to * seen.critical_lr)
        return state["rate"]
