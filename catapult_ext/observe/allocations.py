"""What a call allocates, allocation by allocation, and how that grows with the number of samples.

PyTorch's allocators report to its profiler, so that everything counts that comes from them: saved activations, what
the engine holds during a backward, and the reordered copies inside of convolutions. This is the only file that
knows the profiler's entry points, which are semi-private; `tests/engine/test_allocations.py` fails where they changed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

__all__ = ["Growth", "record"]

_Result = TypeVar("_Result")


def record(call: Callable[[], _Result], device: torch.device) -> tuple[_Result, list[int]]:
    """Run a call on this thread and list how much memory it held after each allocation and each release, in bytes.

    Only memory that the call itself allocates counts; the last number is what is left of it.

    Raises:
        RuntimeError: a profiler is running already.
    """
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    try:
        _enable_profiler_legacy(config)
    except RuntimeError as error:
        raise RuntimeError("max_bytes: memory cannot be planned while a profiler is running") from error
    # A collection in between would release what reference cycles hold at another moment each time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        result = call()
    finally:
        threads = _disable_profiler_legacy()
        if collecting:
            gc.enable()
    on_cuda = device.type == "cuda"
    changes = [
        event.cuda_memory_usage() if on_cuda else event.cpu_memory_usage()
        for events in threads
        for event in events
        if event.kind() == "memory_alloc"
    ]
    return result, list(accumulate(changes, initial=0))


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory of a call as a function of its number of samples.

    Attributes:
        moments: (bytes without samples, bytes for each sample) of every moment of the call.
        exact: False where two sizes took different ways through the call, and only their highest moments compare.
    """

    moments: tuple[tuple[float, float], ...]
    exact: bool = True

    @classmethod
    def between(cls, small: int, first: list[int], large: int, second: list[int]) -> Growth:
        """From what `record` found for two numbers of samples; for one number only, `small == large`."""
        if small == large:
            return cls(((0.0, max(second) / large), (0.0, second[-1] / large)))
        exact = len(first) == len(second)
        pairs = list(zip(first, second, strict=True)) if exact else []
        pairs += [(max(first), max(second)), (first[-1], second[-1])]
        moments = []
        for low, high in pairs:
            slope = max(0.0, (high - low) / (large - small))
            moments.append((high - slope * large, slope))
        # Of moments that grow alike only the highest can be a peak.
        highest: dict[float, float] = {}
        for fixed, slope in moments[:-1]:
            highest[slope] = max(fixed, highest.get(slope, fixed))
        return cls((*((fixed, slope) for slope, fixed in highest.items()), moments[-1]), exact)

    def peak(self, samples: int) -> int:
        """Highest number of bytes."""
        return int(max(fixed + slope * samples for fixed, slope in self.moments))

    def left(self, samples: int) -> int:
        """Bytes held at the end."""
        fixed, slope = self.moments[-1]
        return int(fixed + slope * samples)
