"""What a measurement is: implementations of the same thing, timed against one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["JOBS", "Case", "Goal", "Job", "job", "select"]


@dataclass(frozen=True)
class Goal:
    """What the time of "catapult_ext" should be, as a ratio to that of another implementation.

    Attributes:
        reach: ratio that has to be reached.
        go_for: ratio that is hoped for.
        over: the other implementation, None for the baseline of the job.
    """

    reach: float
    go_for: float
    over: str | None = None

    def verdict(self, ratio: float) -> str:
        """Whether a measured ratio meets the goal."""
        if ratio <= self.go_for:
            return "met"
        return "reach met" if ratio <= self.reach else "**missed**"


@dataclass(frozen=True)
class Case:
    """Inputs, made once, and everything that is timed on them.

    Attributes:
        implementations: name -> one call of it; "catapult_ext" is ours.
        errors: name -> error against a float64 reference, computed on demand, outside of every timing.
        flop: floating-point operations of one call, the same for all, or None where that means nothing.
        traffic: bytes of the operands and of the result, each moved once, or None where that means nothing.
        dtype: of the numbers, unless the name of an implementation says otherwise.
        optional: names of peers that not every machine runs; where one fails, that is said and it is left out.
    """

    implementations: Mapping[str, Callable[[], object]]
    errors: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    flop: float | None = None
    traffic: float | None = None
    dtype: torch.dtype = torch.float32
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job:
    """One line of a performance table.

    Attributes:
        name: what `catapult bench` calls it.
        title: one line for a reader.
        baseline: the implementation that ratios refer to.
        shapes: sizes by their letters.
        build: makes the inputs (seeded) and the calls.
        goals: of "catapult_ext".
        error: what the error is relative to.
        rounds: at most so many interleaved rounds.
        memory: whether peak memory is measured too.
    """

    name: str
    title: str
    baseline: str
    shapes: Mapping[str, int]
    build: Callable[[Mapping[str, int]], Case]
    goals: tuple[Goal, ...] = ()
    error: str = ""
    rounds: int = 1000
    memory: bool = True


JOBS: dict[str, Job] = {}


def job(
    name: str,
    title: str,
    *,
    baseline: str,
    shapes: Mapping[str, int],
    goals: tuple[Goal, ...] = (),
    error: str = "",
    rounds: int = 1000,
    memory: bool = True,
) -> Callable[[Callable[[Mapping[str, int]], Case]], Callable[[Mapping[str, int]], Case]]:
    """Declare a job; the decorated function gets the shapes and returns the case. May be stacked."""

    def register(build: Callable[[Mapping[str, int]], Case]) -> Callable[[Mapping[str, int]], Case]:
        if name in JOBS:
            raise ValueError(f"two jobs are called {name!r}")
        JOBS[name] = Job(name, title, baseline, shapes, build, goals, error, rounds, memory)
        return build

    return register


def select(names: list[str]) -> list[Job]:
    """The jobs of these names or name beginnings ("fcn" means all that begin with it); all for an empty list.

    Raises:
        ValueError: a name fits no job; the message lists those that exist.
    """
    chosen: dict[str, Job] = {}
    for name in names or [""]:
        found = {key: value for key, value in JOBS.items() if key == name or key.startswith(name)}
        if not found:
            raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(JOBS)}")
        chosen |= found
    return [value for key, value in JOBS.items() if key in chosen]
