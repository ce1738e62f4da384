"""How a kernel is formed within a bound of memory: one sweep, or blocks of samples and groups of parameters.

`max_bytes` bounds everything that a call allocates at its highest moment beyond what there was before it: forward,
backward, features, sensitivities, per-sample gradients, and the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from catapult_ext import ops
from catapult_ext.graph.plan import Route
from catapult_ext.stream.items import ColumnItem, HalfItem, Item, least_numbers, passes
from catapult_ext.stream.probe import LARGE, Probe

__all__ = ["NTKPlan", "ParameterPlan", "Planner", "Sizes", "make_plan"]

#: What a block costs beside the work of its samples, in multiply-adds (2 ms).
_BLOCK_WORK = 5e7
#: The fallback forms Jacobians of several parameters together up to this size.
_FALLBACK_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """One parameter's part of a plan.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        route: as in `LayerReport`: "gram", "tiles", "node calls", "rows" or "unused". "gram" without room for the
            whole features and sensitivities reads "gram, cut".
        passes: in how many passes it takes part.
        group: rows of the parameter whose per-sample gradients are held at a time; 0 where none are.
        flops: multiply-adds of its part of the kernel, NaN for "rows" (which is counted in backwards).
    """

    name: str
    shape: tuple[int, ...]
    route: str
    passes: int
    group: int
    flops: float


@dataclass(frozen=True, slots=True)
class NTKPlan:
    """What a kernel will cost, before it is computed; `print(plan)` gives a table.

    Attributes:
        samples: n.
        columns: samples of the columns, m; n for a symmetric kernel.
        outputs: c.
        streamed: whether samples go through the network in blocks; otherwise all in one sweep.
        block: samples in a block.
        passes: how often all samples go forward and backward.
        peak_bytes: predicted highest memory beyond what there was before the call: on the CPU of what is in use, where
            memory that is allocated counts when it is first written to. A bound is kept by what is allocated.
        parts: what it consists of, in bytes: "kernel" (the result), "gathered" (features, sensitivities and
            per-sample gradients of all samples), "block" (forward, backward and tiles of a block of samples).
        smallest_bytes: the smallest `max_bytes` that works.
        sweep_flops: multiply-adds of all forwards and backwards, in layers that have parameters (the products between
            activations in attention are not counted).
        flops: multiply-adds in all, without those of "rows".
        exact: False where the two probes took different ways through the network, so that `peak_bytes` is
            extrapolated from their highest moments alone.
        parameters: the parts of the parameters.
        coupled: why the samples cannot be separated, or None.
    """

    samples: int
    columns: int
    outputs: int
    streamed: bool
    block: int
    passes: int
    peak_bytes: int
    parts: dict[str, int]
    smallest_bytes: int
    sweep_flops: float
    flops: float
    exact: bool
    parameters: tuple[ParameterPlan, ...]
    coupled: str | None
    _items: tuple[tuple[Item, ...], ...] = field(default=(), repr=False)
    _tile_bytes: int = field(default=ops.TILE_BYTES, repr=False)

    def __str__(self) -> str:
        """A table."""
        kernel = f"{self.samples} x {self.columns} samples, {self.outputs} output{'s' * (self.outputs != 1)}"
        way = "one sweep"
        if self.streamed:
            way = f"{self.passes} pass{'es' * (self.passes != 1)} of blocks of {self.block} samples"
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.parts.items() if size)
        lines = [
            f"tangent kernel of {kernel}: {way}",
            f"peak memory {_bytes(self.peak_bytes)} ({parts}); smallest bound {_bytes(self.smallest_bytes)}",
            f"multiply-adds {self.flops:.3g}, of which forward and backward {self.sweep_flops:.3g}",
        ]
        if self.coupled is not None:
            lines.append(f"samples are coupled: {self.coupled}")
        width = max(len(p.name) for p in self.parameters)
        lines.append(f"{'parameter':{width}}  {'shape':>18}  {'route':>10}  passes  group  multiply-adds")
        for p in self.parameters:
            shape = " x ".join(map(str, p.shape)) or "scalar"
            flops = "backwards" if math.isnan(p.flops) else f"{p.flops:.3g}"
            lines.append(
                f"{p.name:{width}}  {shape:>18}  {p.route:>10}  {p.passes:6}  {p.group or '':>5}  {flops:>13}"
            )
        return "\n".join(lines)


def _bytes(size: float) -> str:
    if size < 1024:
        return f"{size:.0f} B"
    power = min(3, int(math.log2(size)) // 10)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which kernel is asked for.

    Attributes:
        samples: n.
        columns: m of a kernel K(x, z), None for the symmetric one.
        kernels: for each wanted kernel, the parameters that it includes.
        itemsize: bytes of a number of the kernel.
        trace: whether outputs are averaged, so that the kernel is [n, m].
        read: bytes that the source of the samples takes for each sample of a block, and besides.
        panel: how many samples' rows of the kernel are formed at a time, None for all.
        lazy: whether memory that is allocated is in use only once it is written to, as on the CPU.
    """

    samples: int
    columns: int | None
    kernels: Sequence[frozenset[int]]
    itemsize: int
    trace: bool = False
    read: tuple[int, int] = (0, 0)
    panel: int | None = None
    lazy: bool = False

    @property
    def gathered(self) -> int:
        """Samples whose features or gradients are held at a time."""
        rows = self.samples if self.panel is None or self.columns is None else self.panel
        return rows + (self.columns or 0)

    def kernel_bytes(self, outputs: int, panel: int | None = None) -> int:
        """Size of one kernel."""
        c = 1 if self.trace else outputs
        rows = panel or self.panel or self.samples
        return rows * c * (self.columns or self.samples) * c * self.itemsize


class Planner:
    """Memory of every way to a kernel."""

    def __init__(self, probe: Probe, sizes: Sizes) -> None:
        self.probe, self.sizes = probe, sizes
        self.result = len(sizes.kernels) * sizes.kernel_bytes(probe.outputs)
        #: Parameters whose part of the kernel needs no per-sample gradients.
        self.in_terms = {i for terms in probe.terms for term in terms for i in term.parameters}
        self.whole = [
            (p.rows * p.row) for i, p in probe.parameters.items() if p.whole and i not in self.in_terms
        ]
        self.separable = (
            probe.coupled is None
            and probe.samples == LARGE
            and max(sizes.samples, sizes.columns or 0) > LARGE
        )

    # ---- one sweep

    def _tiles(self, samples: int, tile_bytes: int) -> int:
        """Largest tile, and what whole Jacobians keep."""
        probe, largest = self.probe, 0
        for i, p in probe.parameters.items():
            if i not in self.in_terms:
                largest = max(
                    largest, p.tile_bytes(samples, probe.outputs, self.tile_rows(i, samples, tile_bytes))
                )
        return largest + samples * probe.outputs * sum(self.whole) * self.sizes.itemsize

    def tile_rows(self, i: int, samples: int, tile_bytes: int) -> int:
        """Rows of a parameter in a tile."""
        p = self.probe.parameters[i]
        fits = tile_bytes // max(1, samples * self.probe.outputs * p.row * self.sizes.itemsize)
        rows = max(min(p.fast_rows, p.rows), min(p.rows, fits))
        return rows - rows % p.fast_rows if p.fast_rows < rows < p.rows else rows

    def one_sweep(self, tile_bytes: int = ops.TILE_BYTES) -> int:
        """Peak of the way without blocks."""
        probe, sizes = self.probe, self.sizes
        n, m = sizes.samples, sizes.columns or 0
        c = probe.outputs
        sweeps = probe.sweep.peak(n)
        held = probe.sweep.left(n)
        if m:
            sweeps = max(sweeps, held + probe.sweep.peak(m))
            held += probe.sweep.left(m)
        kernel = n * c * (m or n) * c * sizes.itemsize
        result = len(sizes.kernels) * (kernel if not sizes.trace else n * (m or n) * sizes.itemsize)
        result += kernel if sizes.trace else 0
        terms = [probe.term_memory.peak(size) for size in (n, m) if size]
        rows = [
            p.rows * p.row * (n + m) * c * sizes.itemsize
            for i, p in probe.parameters.items()
            if probe.routes[i] == Route.ROWS
        ]
        tiles = sum(self._tiles(size, tile_bytes) for size in (n, m) if size)
        read = self.sizes.read[0] * (n + m) + self.sizes.read[1]
        fallback = min(sum(rows), max(_FALLBACK_BYTES, max(rows, default=0)))
        return read + max(probe.peak, sweeps, held + result + sum(terms) + max(tiles, fallback))

    # ---- blocks

    def block_bytes(self, block: int, tile_bytes: int, *, certified: bool = True) -> int:
        """Memory of a block of samples on its way."""
        probe, (per_sample, besides) = self.probe, self.sizes.read
        sweep = probe.sweep if certified else probe.plain
        held = sweep.left(block) + probe.term_memory.left(block)
        making = max(
            held - probe.term_memory.left(block) + probe.term_memory.peak(block),
            held + self._tiles(block, tile_bytes),
        )
        read = per_sample * block + 2 * besides if per_sample else 0
        return read + max(sweep.peak(block), making)

    def _ways(self) -> Iterator[tuple[int, bool, int]]:
        """(samples in a block, whether terms are cut, tile bytes), the thriftiest last."""
        most = max(self.sizes.samples, self.sizes.columns or 0)
        block = LARGE
        blocks = []
        while block < most:
            blocks.append(block)
            block *= 2
        for block in reversed(blocks):
            for halves in (False, True):
                yield block, halves, ops.TILE_BYTES
        for halves in (False, True):
            yield LARGE, halves, 0

    def fixed(self, block: int, halves: bool, tile_bytes: int) -> int:
        """Everything but what is gathered."""
        return self._kernels(halves) + self.block_bytes(block, tile_bytes)

    def _kernels(self, halves: bool) -> int:
        """The result, and where terms are cut what their two halves are summed up in."""
        scratch = 0
        if halves:
            c = 1 if self.sizes.trace else self.probe.outputs
            rows = self.sizes.kernel_bytes(self.probe.outputs) // self.sizes.itemsize
            scratch = (rows // (c * c) + rows) * self.sizes.itemsize
        return self.result + scratch

    def streamed(self, bound: int) -> tuple[float, int, int, tuple[tuple[Item, ...], ...], int] | None:
        """Cheapest way within the bound: (cost, block, tile bytes, items of each pass, peak), or None."""
        best = None
        number = self.sizes.gathered * self.sizes.itemsize
        for block, halves, tile_bytes in self._ways():
            room = bound - self.fixed(block, halves, tile_bytes)
            if room < number:
                continue
            found = passes(self.probe, self.sizes.kernels, room // number, halves=halves)
            if found is None:
                continue
            cost = len(found) * (self.probe.sweep_work + _BLOCK_WORK / block)
            if best is None or cost < best[0]:
                peak = self._peak(found, block, halves, tile_bytes)
                best = cost, block, tile_bytes, found, peak
        return best

    def _peak(self, found: Sequence[Sequence[Item]], block: int, halves: bool, tile_bytes: int) -> int:
        """Highest memory of passes: at the end of one, or at a block that is certified on the way."""
        per_sample = [
            sum(i.numbers(self.probe.outputs) for i in each) * self.sizes.itemsize for each in found
        ]
        samples, fixed = self.sizes.gathered, self._kernels(halves)
        certified = [(each * samples, block) for each in per_sample]
        if self.sizes.lazy and self.probe.plain is not self.probe.sweep:
            certified = list(self._certified(per_sample, block))
        peaks = [each + self.block_bytes(size, tile_bytes) for each, size in certified]
        peaks.append(max(per_sample) * samples + self.block_bytes(block, tile_bytes, certified=False))
        return fixed + max(peaks)

    def _certified(self, per_sample: Sequence[int], block: int) -> Iterator[tuple[int, int]]:
        """(Bytes that are gathered already, samples) of the blocks that are certified.

        Of blocks of a size these are number 1, 2, 4, ..., counted on from pass to pass; a ragged block is the last of
        its side in each pass.
        """
        rows, columns = self.sizes.gathered - (self.sizes.columns or 0), self.sizes.columns or 0
        of_rows, in_pass = rows // block, rows // block + columns // block
        number = 1
        while in_pass and number <= in_pass * len(per_sample):
            index, place = divmod(number - 1, in_pass)
            before = place * block if place < of_rows else rows + (place - of_rows) * block
            yield per_sample[index] * before, block
            number *= 2
        for side, before in ((rows, rows - rows % block), (columns, rows + columns - columns % block)):
            if side % block:
                yield max(per_sample) * before, side % block

    def smallest(self) -> int:
        """The smallest bound that works."""
        bounds = [self.one_sweep()]
        if self.separable:
            number = self.sizes.gathered * self.sizes.itemsize
            for halves in (False, True):
                fixed = self.fixed(LARGE, halves, 0)
                gathered = least_numbers(self.probe, self.sizes.kernels, halves=halves) * number
                bounds.append(max(self.probe.peak, fixed + gathered))
        return min(bounds)


def make_plan(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    probe: Probe,
    sizes: Sizes,
    max_bytes: int | None,
) -> NTKPlan:
    """Choose the way.

    Args:
        names: of the parameters.
        shapes: of the parameters.
        probe: what the first samples told.
        sizes: which kernel.
        max_bytes: the bound; None for one sweep, whatever it takes.

    Raises:
        ValueError: the bound is too small; the message names the smallest that works.
    """
    planner = Planner(probe, sizes)
    one = planner.one_sweep()
    smallest = planner.smallest()
    best = None
    items: tuple[tuple[Item, ...], ...] = ()
    if max_bytes is None or (one <= max_bytes and sizes.panel is None):
        peak, block, count, tile_bytes = one, sizes.samples, 1, ops.TILE_BYTES
    else:
        assert max_bytes is not None
        best = planner.streamed(max_bytes) if planner.separable and probe.peak <= max_bytes else None
        if best is None:
            raise ValueError(_too_small(max_bytes, smallest, probe, sizes))
        _, block, tile_bytes, items, peak = best
        count, peak = len(items), max(peak, probe.peak)
    n, m = sizes.samples, sizes.columns
    sweep_flops = count * (n + (m or 0)) * probe.sweep_work
    parameters = _parameters(names, shapes, probe, sizes, items)
    number = sizes.gathered * sizes.itemsize
    gathered = max((sum(i.numbers(probe.outputs) for i in each) for each in items), default=0) * number
    parts = {
        "kernel": planner.result,
        "gathered": gathered,
        "block": max(0, peak - planner.result - gathered),
    }
    return NTKPlan(
        samples=n,
        columns=n if m is None else m,
        outputs=probe.outputs,
        streamed=best is not None,
        block=block,
        passes=count,
        peak_bytes=peak,
        parts=parts,
        smallest_bytes=smallest,
        sweep_flops=sweep_flops,
        flops=sweep_flops + sum(p.flops for p in parameters if not math.isnan(p.flops)),
        exact=probe.sweep.exact,
        parameters=parameters,
        coupled=probe.coupled,
        _items=items,
        _tile_bytes=tile_bytes,
    )


def _too_small(max_bytes: int, smallest: int, probe: Probe, sizes: Sizes) -> str:
    text = (
        f"max_bytes: {max_bytes} is too small for a kernel of {sizes.samples} x {sizes.columns or sizes.samples} "
        "samples of this model"
    )
    if probe.coupled is not None:
        text += (
            f", whose samples are coupled ({probe.coupled}; BatchNorm in training mode?), so that they cannot go "
            "through it in blocks: call model.eval(), or raise the bound"
        )
    return f"{text}; the smallest bound that works is {smallest}"


def _parameters(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    probe: Probe,
    sizes: Sizes,
    items: tuple[tuple[Item, ...], ...],
) -> tuple[ParameterPlan, ...]:
    n, m, c = sizes.samples, sizes.columns, probe.outputs
    pairs = n * n / 2 if m is None else float(n * m)
    c_squared = c if sizes.trace else c * c
    found = []
    terms = {i: term for terms in probe.terms for term in terms for i in term.parameters}
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        p, route = probe.parameters.get(i), probe.routes[i]
        term = terms.get(i)
        taking = [[item for item in each if _takes(item, i)] for each in items]
        count = sum(map(bool, taking)) if items else int(p is not None)
        columns = [[k for k in each if isinstance(k, ColumnItem)] for each in taking]
        most = max((sum(k.last - k.first for k in each) for each in columns), default=0)
        group, flops = 0, 0.0
        if p is not None:
            group = -(-most // max(1, p.row))
            if term is not None and not most:
                cut = any(isinstance(k, HalfItem) for each in taking for k in each)
                route = "gram, cut" if cut else "gram"
                # A bias shares the term of its weight.
                flops = pairs * (term.a + c_squared * term.b) if i == term.parameters[0] else 0.0
            else:
                route = p.kind
                flops = p.work * (n + (m or 0)) + pairs * c_squared * p.rows * p.row
        found.append(ParameterPlan(name, shape, route, count, group, flops))
    return tuple(found)


def _takes(item: Item, i: int) -> bool:
    return i == item.parameter if isinstance(item, ColumnItem) else i in item.term.parameters
