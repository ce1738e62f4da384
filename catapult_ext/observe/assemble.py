"""Puts a sweep together: the kernel, and the gradient of the loss from the same features and sensitivities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.graph.plan import Route
from catapult_ext.observe.sweep import Sweep, arriving

__all__ = ["Assembler", "Term", "rows_of"]

# A [n, m], B [n, c, w] or [n, w], scale, beta: scale (A A^T + beta) * (B B^T)
Term = tuple[Tensor, Tensor, float, float]


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """Rows of a parameter, which tiles are slices of, and the numbers in one of them; a scalar is one row."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return rows, parameter.numel() // max(1, rows)


class Assembler:
    """Kernel and loss gradient of one sweep.

    Attributes:
        kernel: [n c, n c] or None.
        swept: gradients that the kernel's sweep has formed on the way, by parameter index.
    """

    def __init__(
        self,
        sweep: Sweep,
        residual: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        tile_bytes: int | None = None,
        only: frozenset[int] | None = None,
    ) -> None:
        """Prepare.

        Args:
            sweep: the pass.
            residual: r [n, c], of whose mean square gradients are formed on the way; None where none are wanted.
            dtype: of the kernel; float64 accumulates in double also from float32 activations.
            tile_bytes: what a tile of per-sample gradients may take (it is one row of a parameter at least); None:
                as much as is fast.
            only: parameter indices to keep (for kernels by parameter).
        """
        self.sweep = sweep
        self.residual = residual
        self.dtype = sweep.output.dtype if dtype is None else dtype
        if residual is not None and residual.dtype != self.dtype:
            raise TypeError(f"dtype: a kernel of {self.dtype} beside a residual of {residual.dtype}")
        self.only = only
        self.layout = sweep.plan.layout
        self.rows = sweep.output.shape[0] * sweep.outputs
        self.kernel: Tensor | None = None
        self.swept: dict[int, Tensor] = {}
        self._tile_bytes = tile_bytes

    # ---- which parameter is where

    def kept(self, parameters: Iterable[int]) -> list[int]:
        """Those of the given parameters that this kernel includes."""
        return [i for i in parameters if self.only is None or i in self.only]

    def terms(self) -> dict[tuple[int, ...], Term]:
        """Parts of the kernel that are Hadamard products of two Gram matrices, by the parameters they cover."""
        found: dict[tuple[int, ...], Term] = {}
        sweep = self.sweep
        every, factors, parameters = sweep.plan.uses, sweep.factors, sweep.state.parameters
        for index, all_roles in self.layout.gram.items():
            data = sweep.sites.get(index)
            only = self.only
            roles = all_roles if only is None else {r: i for r, i in all_roles.items() if i in only}
            if data is None or not roles:
                continue
            uses = {role: (every[i][0], factors[i][0], parameters[i]) for role, i in roles.items()}
            for covered, a, b, scale, beta in data.site.rule.terms(data, uses):
                a = b.new_empty((b.shape[0], 0)) if a is None else a
                if self.dtype != b.dtype:
                    a, b = a.to(self.dtype), b.to(self.dtype)
                found[tuple([roles[role] for role in covered])] = (a, b, scale, beta)
        return found

    def _rules(self, i: int) -> list[Any]:
        """Rules of a parameter's uses."""
        plan = self.sweep.plan
        return [plan.sites[use.site].rule for use in plan.uses[i]]

    def is_whole(self, i: int) -> bool:
        """Whether per-sample gradients of a parameter are formed in one piece."""
        through = any(use.through is not None for use in self.sweep.plan.uses[i])
        by_rows = self.sweep.plan.routes[i] == Route.ROWS
        return through or by_rows or any(rule.HOLDS_WHOLE for rule in self._rules(i))

    def fast_rows(self, i: int) -> int:
        """Rows of a parameter in the smallest tile that is fast."""
        return max((rule.TILE_ROWS for rule in self._rules(i)), default=1)

    @property
    def tile_bytes(self) -> int:
        """What a tile may take."""
        if self._tile_bytes is None:
            self._tile_bytes = max(
                [ops.TILE_BYTES, *(self._fast_tile(i) for i in self.kept(self.layout.ruled))]
            )
        return self._tile_bytes

    def _fast_tile(self, i: int) -> int:
        """Bytes of the smallest tile of a parameter that is fast."""
        if self.is_whole(i):
            return 0  # formed in one piece, whatever a tile may take
        if self.sweep.output.device.type != "cpu":
            return 0  # `fast_rows` is about the CPU's convolutions
        row = rows_of(self.sweep.state.parameters[i])[1]
        return self.rows * row * self.dtype.itemsize * self.fast_rows(i)

    # ---- kernel

    def build_kernel(self) -> Tensor:
        """K [n c, n c] = sum over parameters of <d f_ij / d w, d f_i'j' / d w>.

        Raises:
            NonFinite: a sensitivity or a product is not finite.
        """
        kernel = self.sweep.output.new_empty((self.rows, self.rows), dtype=self.dtype)
        self.kernel = kernel
        terms = self.terms()
        if terms:
            a, b, scale, beta = map(list, zip(*terms.values(), strict=True))
            ops.ntk_gram_(kernel, a, b, scale, beta)
        else:
            kernel.zero_()
        if sum(map(len, terms)) < len(self.layout.ruled) + len(self.layout.rows):
            self._add_beyond(terms)
        return kernel

    def _add_beyond(self, terms: Iterable[tuple[int, ...]]) -> None:
        """Add the parameters that no term covers."""
        weights = None  # d loss / d f [n c]
        if self.residual is not None:
            weights = self.residual.reshape(-1) * (2.0 / self.residual.numel())
        for i in self.beyond_terms(terms):
            self._sweep_weight(i, weights)
        for i in self.kept(self.layout.tiles):
            for rows, tile in self.tiles(i, self.tile_step(i)):
                self._add(i, rows, tile, weights)
        for i, jacobian in self.fallback_jacobians():
            self._add(i, slice(None), jacobian, weights)

    def beyond_terms(self, terms: Iterable[tuple[int, ...]]) -> list[int]:
        """Parameters on the Gram route that no term covers: weights with several rows per sample."""
        covered = {i for group in terms for i in group}
        return [
            i for i in self.layout.ruled if i not in covered and i not in self.layout.tiles and self._has(i)
        ]

    def _has(self, i: int) -> bool:
        return self.only is None or i in self.only

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)

    def _sweep_weight(self, i: int, weights: Tensor | None) -> None:
        """One use, several rows per sample: K += G G^T tile by tile, the gradient on the way where it is cheap."""
        assert self.kernel is not None
        use, factor = self.sweep.plan.uses[i][0], self.sweep.factors[i][0]
        data = self.sweep.sites.get(use.site)
        if data is None:
            return
        parameter = self.sweep.state.parameters[i]
        gradient = None
        if weights is not None and data.site.rule.SWEEPS_GRADIENT:
            gradient = self.swept[i] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        data.site.rule.sweep_weight(
            data, factor, parameter, self.kernel, gradient, weights, self._cast, self.tile_bytes
        )

    def tile_step(self, i: int, other_rows: int = 0) -> int:
        """How many rows of a parameter fit a tile (of `other_rows` further kernel rows as well)."""
        total, row = rows_of(self.sweep.state.parameters[i])
        if self.sweep.plan.routes[i] == Route.ROWS or any(
            u.through is not None for u in self.sweep.plan.uses[i]
        ):
            return total
        step = max(
            1, min(total, self.tile_bytes // max(1, row * self.dtype.itemsize * (self.rows + other_rows)))
        )
        multiple = self.fast_rows(i)
        return step - step % multiple if multiple < step < total else step

    def tiles(self, i: int, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Per-sample gradients of a parameter, tile by tile: (rows, [n c, len(rows), ...])."""
        total = rows_of(self.sweep.state.parameters[i])[0]
        for first in range(0, total, step):
            rows = slice(first, min(total, first + step))
            tile = self.tile(i, rows)
            if tile is not None:
                yield rows, tile

    def tile(self, i: int, rows: slice) -> Tensor | None:
        """Per-sample gradients of parameter[rows], summed over its uses: [n c, len(rows), ...], or None for 0."""
        parameter = self.sweep.state.parameters[i]
        summed: Tensor | None = None
        for use, factor in zip(self.sweep.plan.uses[i], self.sweep.factors[i], strict=True):
            data = self.sweep.sites.get(use.site)
            if data is None:
                continue
            own = rows if use.through is None else slice(0, use.shape[0] if use.shape else 1)
            part = data.site.rule.tile(data, use, factor, own, arriving(use, parameter))
            if use.through is not None:  # all rows at once
                part = self.sweep.pull_back(use, parameter, part.view(self.rows, *use.shape))
                part = part[:, rows] if parameter.dim() else part.unsqueeze(1)
            summed = part if summed is None else summed + part
        return None if summed is None else self._cast(summed)

    def _add(self, i: int, rows: slice, tile: Tensor, weights: Tensor | None) -> None:
        """K += G G^T and, where a gradient is wanted, gradient[rows] += G^T w."""
        assert self.kernel is not None
        flat = tile.reshape(self.rows, -1)  # a scalar parameter has no dimension of its own
        ops.jacobian_accumulate_(self.kernel, self._cast(flat))
        if weights is not None:
            parameter = self.sweep.state.parameters[i]
            gradient = self.swept.setdefault(i, torch.zeros_like(parameter))
            target = gradient[rows] if parameter.dim() else gradient
            target.add_((flat.t() @ weights).view(target.shape))

    def fallback_jacobians(self) -> Iterator[tuple[int, Tensor]]:
        """Exact fallback, in groups of parameters that fit the memory plan: (parameter, [n c, *shape])."""
        if not self.layout.rows:
            return
        size = self.dtype.itemsize
        budget = max(self.tile_bytes, 1 << 28)
        group: list[int] = []
        used = 0
        for i in [*self.kept(self.layout.rows), -1]:
            need = 0 if i < 0 else self.rows * self.sweep.state.parameters[i].numel() * size
            if group and (i < 0 or used + need > budget):
                yield from self._fallback_group(group)
                group, used = [], 0
            if i >= 0:
                group.append(i)
                used += need

    def _fallback_group(self, group: list[int]) -> Iterator[tuple[int, Tensor]]:
        parameters = [self.sweep.state.parameters[i] for i in group]
        jacobians = [p.new_empty((self.rows, *p.shape)) for p in parameters]
        for start, stop, rows in self.sweep.rows(group):
            for jacobian, part in zip(jacobians, rows, strict=True):
                jacobian[start:stop] = part
        yield from zip(group, jacobians, strict=True)

    def columns(self, i: int, rows: slice) -> Tensor | None:
        """Columns of the Jacobian by any route: d f / d parameter[rows] as [n c, entries], None where all are zero."""
        if self.sweep.plan.routes[i] == Route.UNUSED:
            return None
        if self.sweep.plan.routes[i] == Route.ROWS:
            jacobian = next(iter(self._fallback_group([i])))[1]
            tile: Tensor | None = jacobian[:, rows] if jacobian.dim() > 1 else jacobian
        else:
            tile = self.tile(i, rows)
        return None if tile is None else tile.reshape(self.rows, -1)

    def whole_jacobian(self, i: int) -> Tensor:
        """Per-sample gradients of one parameter in one piece: [n c, *shape]."""
        parameter = self.sweep.state.parameters[i]
        if self.sweep.plan.routes[i] == Route.ROWS:
            return self._cast(next(iter(self._fallback_group([i])))[1])
        parts = [tile for _, tile in self.tiles(i, max(1, parameter.shape[0] if parameter.dim() else 1))]
        return parts[0] if parts else parameter.new_zeros((self.rows, *parameter.shape), dtype=self.dtype)
