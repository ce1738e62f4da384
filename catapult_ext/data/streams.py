"""Independent streams of random numbers from one seed."""

from __future__ import annotations

import numpy as np

__all__ = ["stream"]


def stream(seed: int, *key: int) -> np.random.Generator:
    """The stream `key` of `seed`: streams of different keys are independent, whatever is drawn from each."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
