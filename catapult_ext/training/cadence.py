"""How often something is recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["AroundSpikes", "Cadence", "LogSpaced", "is_due"]


@dataclass(frozen=True, kw_only=True)
class LogSpaced:
    """Steps 0, 1, 2, ... that grow apart: those nearest to 10^(j / per_decade) for integers j.

    Args:
        per_decade: Steps between t and 10 t.
    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        _check_count("per_decade", self.per_decade, 1)

    def is_due(self, step: int) -> bool:
        """Whether 10^(j / per_decade) rounds to this step for some integer j."""
        if step == 0:
            return True
        low, high = (self.per_decade * math.log10(step + side) for side in (-0.5, 0.5))
        return math.ceil(low) < high


@dataclass(frozen=True, kw_only=True)
class AroundSpikes:
    """Every step around the spikes of the loss, those before a spike included, and few elsewhere.

    A step is in a spike when its loss (`History.metrics["loss"]`: what the update saw) exceeds `rise` times
    the median of the `window` losses before it, and when the run diverges there. Copies of the parameters
    and buffers of the last `before` steps are kept; when a spike is seen, these states are observed
    afterwards. A recorded number has the same bits as when every step is recorded.

    Args:
        before: Steps recorded before the first step of a spike.
        after: Steps recorded after its last one.
        every: Steps between two records elsewhere; None: only the first and the last row.
        rise: See above; with SGD it has to exceed the scatter of the batches' losses.
        window: See above.
        max_bytes: Bound of the memory for the copies; a run that needs more is refused at its start.

    Raises:
        ValueError: A value is out of range.
    """

    before: int = 8
    after: int = 8
    every: int | None = None
    rise: float = 1.5
    window: int = 10
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, least in (("before", 0), ("after", 0), ("window", 1), ("max_bytes", 1)):
            _check_count(name, getattr(self, name), least)
        if self.every is not None:
            _check_count("every", self.every, 1)
        if not (self.rise > 1 and math.isfinite(self.rise)):
            raise ValueError(f"rise: expected a finite number > 1, got {self.rise!r}")

    def is_due(self, step: int) -> bool:
        """Whether the step is recorded without a spike."""
        return step == 0 or (self.every is not None and step % self.every == 0)

    def sees_spike(self, losses: np.ndarray) -> bool:
        """Whether the last loss is in a spike; `losses` are all up to it, (t + 1,) float64."""
        before = losses[-1 - self.window : -1]
        return len(before) > 0 and bool(losses[-1] > self.rise * np.median(before))


#: Steps between two records, or a rule.
Cadence = int | LogSpaced | AroundSpikes


def is_due(every: Cadence, step: int) -> bool:
    """Whether a cadence records a step, whatever the loss does."""
    return step % every == 0 if isinstance(every, int) else every.is_due(step)


def check_cadence(every: object) -> None:
    """Raise ValueError for what is no cadence."""
    if isinstance(every, (LogSpaced, AroundSpikes)):
        return
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every: expected an integer >= 1, LogSpaced() or AroundSpikes(), got {every!r}")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
