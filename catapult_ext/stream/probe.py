"""What the first few samples tell about all of them: memory and work of each part, and whether blocks are allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from catapult_ext.graph.certify import relative_tolerance
from catapult_ext.graph.plan import Plan, Route
from catapult_ext.observe.allocations import Growth, record
from catapult_ext.observe.assemble import Assembler, rows_of
from catapult_ext.observe.inputs import Inputs, count, take
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import ROWS_PER_BACKWARD, Sweep, arriving

__all__ = ["LARGE", "Parameter", "Probe", "Term", "probe"]

#: Samples of the two probes. A block has at least as many as the larger one.
_SMALL, LARGE = 2, 4

#: A probe's tiles are at most this large; those of a plan are extrapolated from them.
_TILE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Term:
    """Part of a kernel that is a Hadamard product of two Gram matrices.

    Attributes:
        parameters: indices of those that it covers.
        a: numbers in a row of A.
        b: numbers in a row of B of one output.
    """

    parameters: tuple[int, ...]
    a: int
    b: int

    def is_flat(self, outputs: int) -> bool:
        """Whether (A A^T) * (B B^T) is as cheap as G G^T, whose columns can be taken a few at a time."""
        return self.b * outputs == 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """What per-sample gradients of one parameter cost.

    Attributes:
        rows: of the parameter, which tiles are slices of.
        row: numbers in one of them.
        fast_rows: tiles of fewer rows are slow.
        whole: they are formed in one piece, whatever is asked for.
        memory: bytes of making a tile of r rows for s samples, the tile included: the sum of these four times 1, s,
            r and s r.
        work: multiply-adds of forming them for one sample.
        fallback: bytes that a batched backward takes for each sample and row, where there is one.
        kind: how `work` counts them: "tiles", "node calls", "rows".
    """

    rows: int
    row: int
    fast_rows: int
    whole: bool
    memory: tuple[float, float, float, float]
    work: float
    fallback: float
    kind: str

    def tile_bytes(self, samples: int, outputs: int, rows: int) -> int:
        """Memory of making a tile."""
        rows = self.rows if self.whole else min(rows, self.rows)
        fixed, per_sample, per_row, both = self.memory
        batched = min(ROWS_PER_BACKWARD, samples * outputs) * samples * self.fallback
        return int(fixed + per_sample * samples + per_row * rows + both * samples * rows + batched)


@dataclass(frozen=True, slots=True)
class Probe:
    """Everything that a plan is made from.

    Attributes:
        samples: least number of samples in a block.
        outputs: c, or 1 where one combination of outputs is asked for.
        routes: by parameter, those of the probe's graph.
        reasons: by parameter, which rules apply, or why none does.
        sweep: memory of a forward, its certification and its backwards.
        plain: the same of a block that is not certified; `sweep` where every block may be.
        terms: for each wanted kernel, its terms.
        term_memory: memory of the terms of a block.
        parameters: by index, those that per-sample gradients are formed of.
        peak: bytes that the probe itself took.
        coupled: why the samples are not separate, or None.
    """

    samples: int
    outputs: int
    routes: tuple[str, ...]
    reasons: tuple[str, ...]
    sweep: Growth
    plain: Growth
    terms: tuple[tuple[Term, ...], ...]
    term_memory: Growth
    parameters: dict[int, Parameter]
    peak: int
    coupled: str | None

    @property
    def sweep_work(self) -> float:
        """Multiply-adds of a forward and c backwards of one sample in the layers that have parameters."""
        products = {i: t.a * t.b for terms in self.terms for t in terms for i in t.parameters[:1]}
        forward = 0.0
        for i, p in self.parameters.items():
            known = products.get(i, p.work / self.outputs)
            forward += p.rows * p.row if math.isnan(known) else known
        return forward * (1 + self.outputs)


class _Taken:
    """Numbers that one probe leaves: a sweep of some samples, and what can be made of it."""

    def __init__(
        self,
        state: ModelState,
        x: Inputs,
        outputs: str | int,
        dtype: torch.dtype | None,
        kernels: Sequence[frozenset[int]],
        input_gradient: bool,
        layer_inputs: bool,
    ) -> None:
        self.samples = count(x)
        plans: dict[Any, Plan] = {}

        def run(verify: str) -> Sweep:
            return Sweep(
                state,
                x,
                plans,
                verify=verify,
                outputs=outputs,
                input_gradient=input_gradient,
                layer_inputs=layer_inputs,
            )

        with state.untouched():
            sweep, self.series = record(lambda: run("first"), state.device)
            with state.own_buffers():
                self.plain = record(lambda: run("never"), state.device)[1]
            #: Rows that wake, and routing by values, are certified whenever they come.
            self.settled = sweep.plan.certified and not sweep.plan.data_dependent
            self.outputs, self.output = sweep.outputs, sweep.output.detach()
            self.routes, self.reasons = tuple(sweep.plan.routes), tuple(sweep.plan.reasons)
            with torch.no_grad():
                self._assemble(sweep, dtype, kernels)

    def _assemble(self, sweep: Sweep, dtype: torch.dtype | None, kernels: Sequence[frozenset[int]]) -> None:
        device = sweep.state.device
        found, self.term_series = record(
            lambda: [Assembler(sweep, dtype=dtype, only=only).terms() for only in kernels], device
        )
        self.terms = tuple(
            tuple(Term(covered, a.shape[1], b.shape[-1]) for covered, (a, b, _, _) in terms.items())
            for terms in found
        )
        del found
        whole = Assembler(sweep, dtype=dtype, tile_bytes=_TILE_BYTES)
        every = sorted((*whole.layout.ruled, *whole.layout.rows))
        flat = {
            i for term in itertools.chain(*self.terms) if term.is_flat(self.outputs) for i in term.parameters
        }
        covered = {i for term in itertools.chain(*self.terms) for i in term.parameters} - flat
        self.tiles: dict[int, tuple[list[int], list[int]]] = {}  # rows of each tile, its memory
        self.shapes: dict[int, tuple[int, bool]] = {}
        self.work: dict[int, tuple[str, float]] = {}
        tile_peak = 0
        for i in every:
            self.shapes[i], self.work[i] = (whole.fast_rows(i), whole.is_whole(i)), _work(sweep, i)
            if i in covered:
                continue
            fast, most = whole.fast_rows(i), whole.tile_step(i)
            rows = list(dict.fromkeys((min(fast, most), most)))
            self.tiles[i] = rows, [_tile_peak(whole, i, each) for each in rows]
            tile_peak = max(tile_peak, *self.tiles[i][1])
        self.kernels, kernel_series = record(
            lambda: {
                i: Assembler(
                    sweep, dtype=torch.float64, tile_bytes=_TILE_BYTES, only=frozenset([i])
                ).build_kernel()
                for i in every
            },
            device,
        )
        after = max(tile_peak, *self.plain, *self.term_series, *kernel_series)
        self.peak = max(max(self.series), self.series[-1] + after)


def _tile_peak(assembler: Assembler, i: int, rows: int) -> int:
    return max(record(lambda: assembler.columns(i, slice(0, rows)), assembler.sweep.state.device)[1])


def _work(sweep: Sweep, i: int) -> tuple[str, float]:
    """Kind and multiply-adds of a parameter's part of the kernel, by terms or per-sample gradients."""
    if sweep.plan.routes[i] == Route.ROWS:
        return "rows", math.nan
    kind, total = "tiles", 0.0
    for use in sweep.plan.uses[i]:
        data = sweep.sites.get(use.site)
        if data is not None:
            parameter = arriving(use, sweep.state.parameters[i])
            own, work = data.site.rule.work(data, use, parameter, 0)  # no room for Grams of positions
            kind = own if own == "node calls" else kind
            total += work
    return kind, total


def probe(
    state: ModelState,
    x: Inputs,
    outputs: str | int,
    dtype: torch.dtype | None,
    kernels: Sequence[frozenset[int]],
    *,
    input_gradient: bool = False,
    layer_inputs: bool = False,
) -> Probe:
    """Send the first samples through the model, twice, in two numbers.

    Args:
        state: the model.
        x: at least `LARGE` samples, or all there are.
        outputs: as for a sweep.
        dtype: of the kernel.
        kernels: for each wanted kernel, the parameters that it includes.
        input_gradient: whether the sweep goes back to x as well.
        layer_inputs: whether it keeps the gradients with respect to the inputs of layers.

    Raises:
        UnsupportedModule, NonFinite: as for a sweep.
    """
    n = min(count(x), LARGE)
    x = take(x, slice(0, n))
    takes = [take(x, slice(0, _SMALL)), x] if n == LARGE else [x]
    taken = [_Taken(state, each, outputs, dtype, kernels, input_gradient, layer_inputs) for each in takes]
    small, large = taken[0], taken[-1]
    s, t = small.samples, large.samples
    sweep = Growth.between(s, small.series, t, large.series)
    settled = all(each.settled for each in taken)
    return Probe(
        samples=n,
        outputs=large.outputs,
        routes=large.routes,
        reasons=large.reasons,
        sweep=sweep,
        plain=Growth.between(s, small.plain, t, large.plain) if settled else sweep,
        terms=large.terms,
        term_memory=Growth.between(s, small.term_series, t, large.term_series),
        parameters={i: _parameter(state.parameters[i], i, small, large) for i in large.work},
        peak=max(small.peak, large.peak),
        coupled=_coupled(state, small, large),
    )


def _parameter(parameter: Tensor, i: int, small: _Taken, large: _Taken) -> Parameter:
    rows, row = rows_of(parameter)
    fast_rows, whole = large.shapes[i]
    s0, s1 = small.samples, large.samples
    kind, work = large.work[i]
    by_rows = large.routes[i] == Route.ROWS
    if not by_rows and small is not large:
        # Of alpha s + beta s^2 the second part is that of the products.
        work = (small.work[i][1] / s0 * s1 - work / s1 * s0) / (s1 - s0)
    memory, fallback = (0.0, 0.0, 0.0, 0.0), 0.0
    if i in large.tiles:
        tiles, peaks = large.tiles[i]
        if by_rows:
            result = s1 * large.outputs * rows * row * parameter.element_size()
            batch = min(ROWS_PER_BACKWARD, s1 * large.outputs)
            fallback = max(0, peaks[-1] - result) / (batch * s1)
            memory = (0.0, 0.0, 0.0, result / (s1 * rows))
        elif small is large or small.tiles[i][0] != tiles:
            memory = (0.0, 0.0, 0.0, peaks[-1] / (s1 * tiles[-1]))
        else:
            memory = _bilinear((s0, s1), (tiles[0], tiles[-1]), [small.tiles[i][1], peaks])
    return Parameter(rows, row, fast_rows, whole, memory, work, fallback, kind)


def _bilinear(
    samples: tuple[int, int], rows: tuple[int, int], peaks: Sequence[Sequence[int]]
) -> tuple[float, float, float, float]:
    """Coefficients of 1, s, r, s r through the measured peaks [sample numbers][row numbers]."""
    (s0, s1), (r0, r1) = samples, rows
    if r0 == r1:
        slope = (peaks[1][0] - peaks[0][0]) / (s1 - s0)
        return peaks[1][0] - slope * s1, slope, 0.0, 0.0
    points = torch.tensor([[1, s, r, s * r] for s in (s0, s1) for r in (r0, r1)], dtype=torch.float64)
    values = torch.tensor([peaks[k][j] for k in (0, 1) for j in (0, 1)], dtype=torch.float64)
    fixed, per_sample, per_row, both = torch.linalg.solve(points, values).tolist()
    return fixed, per_sample, per_row, both


def _coupled(state: ModelState, small: _Taken, large: _Taken) -> str | None:
    """Why the kernel of some samples depends on the others, if it does."""
    for name, route, reason in zip(state.names, large.routes, large.reasons, strict=True):
        if route == Route.ROWS and "mix samples" in reason:
            return f"{name}: {reason}"
    if small is large:
        return None
    tolerance = relative_tolerance(state.dtype)
    few = small.samples
    first, second = small.output, large.output[:few]
    if not float((first - second).norm()) <= tolerance * float(first.norm() + second.norm()):
        return f"the outputs of the first {few} samples change with the samples beside them"
    for i, kernel in small.kernels.items():
        other = large.kernels[i][: len(kernel), : len(kernel)]
        size = float(torch.maximum(kernel.diagonal(), other.diagonal()).max())
        if not float((kernel - other).abs().max()) <= 4 * tolerance * size:
            return (
                f"{state.names[i]}: gradients of the first {few} samples change with the samples beside them"
            )
    return None
