"""Labels for the mean squared error, and label noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catapult_ext.data.streams import stream

__all__ = ["PARTS", "LabelNoise", "targets"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class LabelNoise:
    """Wrong labels on purpose: a share of the labels is replaced by another class, each with equal chance.

    Attributes:
        fraction: share of the labels that become wrong, from 0 to 1; of n candidates round(fraction n).
        seed: of which ones and of what they become; None takes the seed of the selection.
        classes: whose labels may become wrong; None for all chosen classes.
        parts: which parts get noise, of "train", "validation" and "test".

    Raises:
        ValueError: naming the attribute that is out of range.

    Source: 10 % label noise of the training set, Appendix F.7 and Fig 32 of the paper.
    """

    fraction: float
    seed: int | None = None
    classes: tuple[int, ...] | None = None
    parts: tuple[str, ...] = ("train",)

    def __post_init__(self) -> None:
        fraction = self.fraction
        if (
            isinstance(fraction, bool)
            or not isinstance(fraction, (int, float))
            or not (math.isfinite(fraction) and 0 <= fraction <= 1)
        ):
            raise ValueError(f"label_noise: fraction must be a number from 0 to 1, got {fraction!r}")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise ValueError(f"label_noise: seed must be an integer of at least 0 or None, got {self.seed!r}")
        if isinstance(self.parts, str) or not self.parts or any(part not in PARTS for part in self.parts):
            raise ValueError(f"label_noise: parts must be some of {', '.join(PARTS)}; got {self.parts!r}")

    def apply(
        self, labels: np.ndarray, classes: Sequence[int], part: str, seed: int
    ) -> tuple[np.ndarray, list[int]]:
        """The labels (n,) of a part with noise, and the positions that changed.

        Raises:
            ValueError: where `classes` of the noise are not among the chosen ones.
        """
        candidates_of = classes if self.classes is None else tuple(self.classes)
        if not set(candidates_of) <= set(classes):
            raise ValueError(
                f"label_noise: classes must be among the chosen {tuple(classes)}, got {candidates_of}"
            )
        if part not in self.parts:
            return labels, []
        random = stream(seed if self.seed is None else self.seed, 100 + PARTS.index(part))
        candidates = np.flatnonzero(np.isin(labels, candidates_of))
        changed = np.sort(random.permutation(candidates)[: round(self.fraction * len(candidates))])
        noisy = labels.copy()
        # A step of 1 ... c - 1 through the chosen classes ends at each of the others with equal chance.
        position = np.array([list(classes).index(label) for label in labels[changed]], dtype=np.int64)
        steps = random.integers(1, len(classes), len(changed))
        noisy[changed] = np.array(classes)[(position + steps) % len(classes)]
        return noisy, changed.tolist()

    def record(
        self, changed: list[int], classes: Sequence[int], part: str, seed: int
    ) -> dict[str, object] | None:
        """What `info["label_noise"]` says about a part; None where it gets no noise."""
        if part not in self.parts or self.fraction == 0:
            return None
        return {
            "fraction": self.fraction,
            "seed": seed if self.seed is None else self.seed,
            "classes": list(classes if self.classes is None else self.classes),
            "changed": changed,
        }


def targets(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """(n, 1) of -1 and +1 for two classes, (n, c) one-hot for more; float64."""
    one_hot = (labels[:, None] == np.array(classes)).astype(np.float64)  # [n, c]
    return one_hot[:, 1:] * 2 - 1 if len(classes) == 2 else one_hot
