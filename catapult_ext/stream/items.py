"""What is gathered over all samples before a part of the kernel can be formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from catapult_ext.stream.probe import Parameter, Probe, Term

__all__ = ["ColumnItem", "HalfItem", "Item", "TermItem", "least_numbers", "passes"]

#: Rows of parameters longer than this are cut where memory is short; each piece costs a pass.
_LEAST_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class TermItem:
    """A [n, a] and B [n, c, b] of a part that is the Hadamard product of two Gram matrices."""

    kernel: int
    term: Term

    def numbers(self, outputs: int) -> int:
        """Numbers of a sample."""
        return self.term.a + outputs * self.term.b


@dataclass(frozen=True, slots=True)
class HalfItem:
    """Columns of A alone, or of B alone: their Gram matrix is summed up piece by piece, and multiplied at last."""

    kernel: int
    term: Term
    half: str  # "a" or "b"
    first: int
    last: int

    def numbers(self, outputs: int) -> int:
        """Numbers of a sample."""
        return (self.last - self.first) * (outputs if self.half == "b" else 1)


@dataclass(frozen=True, slots=True)
class ColumnItem:
    """Per-sample gradients [n, c, last - first] of some entries of a parameter."""

    kernel: int
    parameter: int
    first: int
    last: int

    def numbers(self, outputs: int) -> int:
        """Numbers of a sample."""
        return (self.last - self.first) * outputs


Item = TermItem | HalfItem | ColumnItem


class _Packer:
    """Fills passes with items, in order, at most `most` numbers of a sample in each."""

    def __init__(self, outputs: int, most: int) -> None:
        self.outputs, self.most = outputs, most
        self.passes: list[list[Item]] = [[]]
        self.left = most

    def put(self, item: Item) -> None:
        need = item.numbers(self.outputs)
        if need > self.left:
            self.passes.append([])
            self.left = self.most
        self.passes[-1].append(item)
        self.left -= need

    def columns(self, total: int, unit: int, each: int) -> Iterator[tuple[int, int]]:
        """Cut `total` columns of `each` numbers into ranges that fit, in multiples of `unit` wherever possible."""
        first = 0
        while first < total:
            fits = self.left // each
            if fits < min(unit, total - first):
                fits = self.most // each  # a new pass
            fits = min(total - first, fits)
            last = first + (fits - fits % unit if unit < fits < total - first else fits)
            yield first, last
            first = last


def passes(
    probe: Probe, kernels: Sequence[frozenset[int]], most: int, *, halves: bool
) -> tuple[tuple[Item, ...], ...] | None:
    """Distribute everything that the kernels need over as few passes as will do.

    Args:
        probe: sizes.
        kernels: for each wanted kernel, the parameters that it includes.
        most: numbers of a sample that may be held at a time.
        halves: whether terms may be cut, which takes two more matrices of the kernel's size.

    Returns:
        The items of each pass, or None where `most` is too little.
    """
    packer = _Packer(probe.outputs, most)
    for kernel, only in enumerate(kernels):
        by_columns = set(probe.parameters) & only
        for term in probe.terms[kernel]:
            if TermItem(kernel, term).numbers(probe.outputs) <= most:
                packer.put(TermItem(kernel, term))
            elif term.is_flat(probe.outputs):
                continue
            elif not (halves and _cut(packer, kernel, term)):
                return None
            by_columns -= set(term.parameters)
        for i in sorted(by_columns):
            if not _gather(packer, kernel, i, probe.parameters[i]):
                return None
    return tuple(tuple(each) for each in packer.passes)


def _gather(packer: _Packer, kernel: int, i: int, parameter: Parameter) -> bool:
    total, fits = parameter.rows * parameter.row, packer.most // packer.outputs
    if fits < min(_LEAST_COLUMNS, parameter.row):
        return False
    units = (parameter.fast_rows * parameter.row, parameter.row, _LEAST_COLUMNS)
    unit = next(each for each in units if each <= fits or each == units[-1])
    unit = min(unit, total)
    for first, last in packer.columns(total, unit, packer.outputs):
        packer.put(ColumnItem(kernel, i, first, last))
    return True


def _cut(packer: _Packer, kernel: int, term: Term) -> bool:
    for half, total, each in (("a", term.a, 1), ("b", term.b, packer.outputs)):
        if packer.most // each < min(_LEAST_COLUMNS, total):
            return False
        for first, last in packer.columns(total, min(_LEAST_COLUMNS, total), each):
            packer.put(HalfItem(kernel, term, half, first, last))
    return True


def least_numbers(probe: Probe, kernels: Sequence[frozenset[int]], *, halves: bool) -> int:
    """Least `most` for which `passes` finds a way."""
    c, least = probe.outputs, 1
    for kernel, only in enumerate(kernels):
        covered: set[int] = set()
        for term in probe.terms[kernel]:
            if term.is_flat(c):
                need = min(_LEAST_COLUMNS, max(term.a, 1))
            elif halves:
                need = max(min(_LEAST_COLUMNS, term.a), c * min(_LEAST_COLUMNS, term.b))
            else:
                need = term.a + c * term.b
            least = max(least, min(need, term.a + c * term.b))
            covered |= set(term.parameters)
        rows = [probe.parameters[i].row for i in set(probe.parameters) & only - covered]
        least = max([least, *(c * min(_LEAST_COLUMNS, row) for row in rows)])
    return least
