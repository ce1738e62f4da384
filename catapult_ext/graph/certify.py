"""Which sample does each row of a site belong to? Asked of the network itself, with random cotangents.

Rows are not samples: attention and recurrent layers hold token-major rows even with `batch_first=True`, and
normalisation over the batch mixes samples. If row r belongs to sample i alone, the gradient that reaches it is
linear in the cotangent of sample i alone. Two backwards, with cotangents t and s_i t, therefore differ in
row r by the factor s_i exactly when the map is right; a check with all cotangents equal passes for wrong maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["RowMap", "distinct_scales", "find_row_map", "relative_tolerance", "rounding_of_sums"]


@dataclass(frozen=True, slots=True)
class RowMap:
    """Rows of a site in terms of samples.

    Attributes:
        kind: "sample" (row i is sample i), "major" (row i T + t), "minor" (row t n + i) or "permuted".
        n: samples.
        positions: T, rows per sample.
        lead: how many leading dimensions of the sensitivities are rows.
        order: for "permuted", rows sorted by sample [n T].
        dead: where too few rows were live to tell two maps apart, the rows [dead] that were not: the map holds as
            long as they stay zero. None for a map that is settled.
    """

    kind: str
    n: int
    positions: int
    lead: int = 1
    order: Tensor | None = None
    dead: Tensor | None = None

    @property
    def settled(self) -> bool:
        """Whether live rows exclude every other map."""
        return self.dead is None

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Rearrange [rows, ...] (or `lead` leading dimensions) into [n, T, ...], a view where possible."""
        flat = tensor.flatten(0, self.lead - 1) if self.lead > 1 else tensor
        if self.kind == "minor":
            return flat.unflatten(0, (self.positions, self.n)).transpose(0, 1)
        if self.order is not None:
            flat = flat.index_select(0, self.order)
        return flat.unflatten(0, (self.n, self.positions))

    def outputs_by_sample(self, tensor: Tensor) -> Tensor:
        """The same for [c, rows, ...]: [n, c, T, ...]."""
        flat = tensor.flatten(1, self.lead) if self.lead > 1 else tensor
        if self.kind == "minor":
            return flat.unflatten(1, (self.positions, self.n)).movedim(2, 0)
        if self.order is not None:
            flat = flat.index_select(1, self.order)
        return flat.unflatten(1, (self.n, self.positions)).transpose(0, 1)

    def to_rows(self, per_sample: Tensor) -> Tensor:
        """Repeat one value per sample [n] for each of its rows [rows]."""
        if self.kind == "sample":
            return per_sample
        if self.kind == "minor":
            return per_sample.repeat(self.positions)
        rows = per_sample.repeat_interleave(self.positions)
        if self.order is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


def relative_tolerance(dtype: torch.dtype) -> float:
    """How far two correct backwards may differ by rounding, relative to the larger norm."""
    return 1e-9 if dtype == torch.float64 else 2e-4


def rounding_of_sums(dtype: torch.dtype) -> float:
    """How far two correct sums may differ by rounding, relative to the root of the sum of squares of their terms.

    Far less than `relative_tolerance` of the sum itself, unless the terms cancel.
    """
    return 1e-12 if dtype == torch.float64 else 4e-6


def distinct_scales(n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """N distinct factors in [1, 2) in random order: evenly spaced, so that rounding cannot confuse two."""
    order = torch.randperm(n, generator=generator)
    return (1.0 + order.to(torch.float64) / n).to(device=like.device, dtype=like.dtype)


def find_row_map(plain: Tensor, scaled: Tensor, scales: Tensor, lead_dims: tuple[int, ...]) -> RowMap | str:
    """Compare two backwards at one site.

    Args:
        plain: sensitivities for cotangents t_ij = u_j.
        scaled: the same for s_i u_j.
        scales: s [n], from `distinct_scales`.
        lead_dims: how many leading dimensions may be rows, in order of preference.

    Returns:
        The map, or why there is none.
    """
    n = scales.numel()
    for lead in lead_dims:
        if plain.dim() < lead:
            continue
        first = plain.flatten(0, lead - 1) if lead > 1 else plain
        second = scaled.flatten(0, lead - 1) if lead > 1 else scaled
        if first.shape[0] == 0 or first.shape[0] % n:
            continue
        found = _match(first.reshape(first.shape[0], -1), second.reshape(first.shape[0], -1), scales, lead)
        if found is not None:
            return found
    return "its rows mix samples"


def _match(plain: Tensor, scaled: Tensor, scales: Tensor, lead: int) -> RowMap | None:
    n = scales.numel()
    positions = plain.shape[0] // n
    norms = scaled.norm(dim=1)  # [rows]
    tolerance = relative_tolerance(plain.dtype)
    # A row that is a sum (the gain of an instance norm, over pixels) may cancel to the rounding of larger ones.
    slack = tolerance * norms + rounding_of_sums(plain.dtype) * norms.max()

    def agrees(candidate: RowMap) -> bool:
        error = (scaled - candidate.to_rows(scales).unsqueeze(1) * plain).norm(dim=1)
        return bool((error <= slack).all())

    if positions == 1:
        candidates = [RowMap("sample", n, 1, lead)]
    else:
        candidates = [RowMap("major", n, positions, lead), RowMap("minor", n, positions, lead)]
    fitting = [candidate for candidate in candidates if agrees(candidate)]
    if fitting:
        best = fitting[0]
        # Dead rows agree with everything: a map is settled when live rows exclude the others, and when no two
        # samples without a live row could have been exchanged.
        live = norms > slack
        seen = replace(best, lead=1).by_sample(live).any(1)  # [n]
        ambiguous = (len(fitting) > 1 and n > 1) or int(seen.sum()) < max(1, n - 1)
        return replace(best, dead=(~live).nonzero().squeeze(1)) if ambiguous else best
    return _permutation(plain, scaled, norms, slack, scales, lead)


def _permutation(
    plain: Tensor, scaled: Tensor, norms: Tensor, slack: Tensor, scales: Tensor, lead: int
) -> RowMap | None:
    n = scales.numel()
    positions = plain.shape[0] // n
    if not bool((norms > slack).all()):
        return None  # a dead row could belong to any sample
    ratio = (scaled * plain).sum(1) / plain.square().sum(1)  # [rows]
    sample_of_rank = scales.argsort()
    rank = ((ratio - 1.0) * n).round().long().clamp(0, n - 1)
    sample = sample_of_rank[rank]  # [rows]
    if not bool((torch.bincount(sample, minlength=n) == positions).all()):
        return None
    order = torch.argsort(sample, stable=True)
    candidate = RowMap("permuted", n, positions, lead, order)
    error = (scaled - candidate.to_rows(scales).unsqueeze(1) * plain).norm(dim=1)
    return candidate if bool((error <= slack).all()) else None
