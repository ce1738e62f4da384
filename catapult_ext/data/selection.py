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

    def check(available: list[np.ndarray], note: str) -> None:
        for i, group in enumerate(available):
            need = sum(quota[i] for quota in quotas.values())
            if need > len(group):
                which = f"class {classes[i]}" if selection == "balanced" else f"classes {tuple(classes)}"
                asked = " + ".join(f"{part} {quota[i]}" for part, quota in quotas.items())
                raise ValueError(
                    f"{what.format(len(group), which)}, but {asked} = {need} are asked for{note}"
                )

    check(groups, "")
    order = groups if selection == "first" else [random.permutation(group) for group in groups]
    taken: dict[str, list[np.ndarray]] = {}
    if neighbours == 1:
        for part in back:
            taken[part] = [group[::-1][:share] for group, share in zip(order, quotas[part], strict=True)]
            order = [group[: len(group) - share] for group, share in zip(order, quotas[part], strict=True)]
    else:
        rest = groups  # in file order
        dropped = [np.zeros(0, dtype=np.int64) for _ in groups]
        for part in back:
            taken[part] = [group[::-1][:share] for group, share in zip(rest, quotas[part], strict=True)]
            rows = np.concatenate(taken[part])
            cut = rows.min() - (neighbours - 1) if len(rows) else len(labels)
            dropped = [
                np.union1d(out, np.setdiff1d(group[group >= cut], own))
                for out, group, own in zip(dropped, rest, taken[part], strict=True)
            ]
            rest = [group[group < cut] for group in rest]
        check(
            [np.setdiff1d(group, out) for group, out in zip(groups, dropped, strict=True)],
            f" ({sum(map(len, dropped))} more are left out: neighbouring rows can show the same photo, "
            "so the parts are cut from the file whole)",
        )
        order = [group[np.isin(group, left)] for group, left in zip(order, rest, strict=True)]
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
