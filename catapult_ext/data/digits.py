"""The handwritten digits that ship with scikit-learn: real images that need no download.

1,797 grey 8x8 images, classes 0-9, pixels 0 ... 16: the test part of E. Alpaydin and C. Kaynak, Optical
Recognition of Handwritten Digits, UCI 1998.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from catapult_ext.data.image_set import ImageSet, Pool, Reading

__all__ = ["DIGITS"]

# The set has no split of its own. Neighbouring rows come from the same writer, so the cut is between blocks
# of rows, not at random: two thirds to train, one third to test.
_TRAIN_ROWS = 1197


@cache  # parsing takes longer than all the rest of a load
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes a second to import, needed here only

    digits = load_digits()
    images, labels = digits.images[:, None], digits.target.astype(np.int64)  # [N, 1, 8, 8], [N]
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def _read(_root: Path) -> Reading:
    images, labels = _digits()
    file = {"path": "sklearn.datasets.load_digits", "rows": len(labels), "train_rows": _TRAIN_ROWS}
    return Reading(
        form="embedded",
        files=[file],
        train=Pool(images[:_TRAIN_ROWS], labels[:_TRAIN_ROWS]),
        test=Pool(images[_TRAIN_ROWS:], labels[_TRAIN_ROWS:]),
    )


DIGITS = ImageSet(
    name="digits",
    class_names=tuple("0123456789"),
    pair=(7, 9),
    white=16,
    statistics=None,
    read=_read,
    embedded=True,
    by_hand="nothing is missing: it ships with scikit-learn",
)
