"""Interleaved timing: every implementation in every round, so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Timing", "interleaved"]

#: A sample is as many calls as fill this many seconds, at least one: a training loop repeats the same step, so a
#: step of some hundred microseconds is timed with the caches that it leaves itself.
_SAMPLE_SECONDS = 20e-3
#: The fastest of so many calls says how many fill a sample: a plan's first uses are certified and take far longer.
_TRIALS = 5
#: An implementation slower than this takes part in the first rounds only.
_SLOW_SECONDS = 1.0
_SLOW_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one implementation.

    Attributes:
        median: over rounds.
        low: first quartile.
        high: third quartile.
        ratio: median over rounds of (this one) / (baseline in the same round).
        ratio_low: first quartile of it.
        ratio_high: third quartile of it.
        rounds: how many rounds.
    """

    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def interleaved(
    implementations: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time implementations in rounds A B C, C B A, ... in this process, after some warm-up calls of each.

    Args:
        implementations: name -> call.
        baseline: the name that ratios refer to.
        repeats: rounds.
        seconds: stop early (but after three rounds) when the rounds have taken this long.
        clock: seconds, for tests.

    Returns:
        Name -> Timing.
    """
    calls = {name: _calls_per_sample(call, clock) for name, call in implementations.items()}
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    ratios: dict[str, list[float]] = {name: [] for name in implementations}
    order = list(implementations)
    start = clock()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_index in range(repeats):
            if round_index >= 3 and clock() - start > seconds:
                break
            taken = {}
            for name in order if round_index % 2 == 0 else reversed(order):
                slow = name != baseline and samples[name] and samples[name][0] > _SLOW_SECONDS
                if slow and round_index >= _SLOW_ROUNDS:
                    continue
                call, repeat = implementations[name], calls[name]
                begin = clock()
                for _ in range(repeat):
                    call()
                taken[name] = (clock() - begin) / repeat
            for name, value in taken.items():
                samples[name].append(value)
                ratios[name].append(value / taken[baseline])
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(samples[name], ratios[name]) for name in implementations}


def _calls_per_sample(call: Callable[[], object], clock: Callable[[], float]) -> int:
    call()
    taken = []
    for _ in range(_TRIALS):
        begin = clock()
        call()
        taken.append(clock() - begin)
        if taken[-1] > _SLOW_SECONDS:
            break
    return max(1, int(_SAMPLE_SECONDS / max(min(taken), 1e-9)))


def _timing(samples: list[float], ratios: list[float]) -> Timing:
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    ratio_low, ratio, ratio_high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return Timing(median, low, high, ratio, ratio_low, ratio_high, len(samples))
