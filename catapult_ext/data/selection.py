"""Which rows of a pool each part of a split gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["SELECTIONS", "choose"]

SELECTIONS = ("random", "balanced", "first")


def choose(
    what: str,
    labels: np.ndarray,
    sizes: dict[str, int],
    classes: Sequence[int],
    selection: str,
    random: np.random.Generator,
    neighbours: int = 1,
) -> list[np.ndarray]:
    """Rows for each part: the first from the front of the chosen order, the others, in turn, from its back.

    Args:
        what: the pool, for the error: "cifar10 has {} training images of {} (partial files)".
        labels: class of each row, (N,).
        sizes: part and number of samples.
        classes: to draw from.
        selection: as in `load`.
        random: for the order.
        neighbours: where above 1, the parts from the back are those at the end of the file, and the
            neighbours - 1 rows before each of them are left out of the parts that come before.

    Raises:
        ValueError: where the parts together need more than there is.
    """
    if selection == "balanced":
        groups = [np.flatnonzero(labels == c) for c in classes]
    else:
        groups = [np.flatnonzero(np.isin(labels, classes))]
    quotas = {part: _shares(size, len(groups)) for part, size in sizes.items()}
    front, *back = quotas
    for part in back:  # the remainder goes to the last classes: where two parts have one, none pays twice
        quotas[part].reverse()

    order = groups if selection == "first" else [random.permutation(group) for group in groups]
    taken: dict[str, list[np.ndarray]] = {}
    line = order if neighbours == 1 else groups  # what the parts from the back are cut from, and what is left
    for part in back:
        taken[part] = [group[::-1][:share] for group, share in zip(line, quotas[part], strict=True)]
        if neighbours == 1:
            line = [group[: len(group) - len(own)] for group, own in zip(line, taken[part], strict=True)]
        elif sizes[part]:
            cut = min(own.min(initial=len(labels)) for own in taken[part]) - (neighbours - 1)
            line = [group[group < cut] for group in line]

    for i, group in enumerate(groups):
        available = len(line[i]) + sum(len(taken[part][i]) for part in back)
        need = sum(quota[i] for quota in quotas.values())
        if need > available:
            which = f"class {classes[i]}" if selection == "balanced" else f"classes {tuple(classes)}"
            asked = " + ".join(f"{part} {quota[i]}" for part, quota in quotas.items())
            left_out = (
                f" ({len(group) - available} more are left out: neighbouring rows can show the same photo, "
                "so the file is cut into whole parts)"
            )
            raise ValueError(
                f"{what.format(available, which)}, but {asked} = {need} are asked for"
                + left_out * (available < len(group))
            )
    order = [group[np.isin(group, left)] for group, left in zip(order, line, strict=True)]
    taken[front] = [group[:share] for group, share in zip(order, quotas[front], strict=True)]
    # From the back come the rows of a class, and the classes, in reverse.
    return [_interleave(taken[part] if part == front else taken[part][::-1]) for part in sizes]


def _shares(size: int, groups: int) -> list[int]:
    """`size` in `groups` parts that differ by at most one."""
    return [size // groups + (i < size % groups) for i in range(groups)]


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    """First of each part, then second of each, and so on."""
    position = np.concatenate([np.arange(len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(position, kind="stable")]
