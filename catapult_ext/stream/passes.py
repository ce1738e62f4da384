"""The passes of a plan: blocks of samples fill buffers, and full buffers become parts of the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.errors import UnsupportedModule
from catapult_ext.graph.certify import relative_tolerance
from catapult_ext.graph.plan import Plan, Route
from catapult_ext.observe.assemble import Assembler, rows_of
from catapult_ext.observe.inputs import Inputs, count, take
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep
from catapult_ext.stream.items import ColumnItem, HalfItem, Item, TermItem
from catapult_ext.stream.plan import NTKPlan
from catapult_ext.stream.samples import Blocks

__all__ = ["Stream"]

#: Blocks of a block that go through the model alone as well: their outputs tell whether samples are coupled.
_ALONE = 2


class Stream:
    """Forms kernels by a plan.

    Attributes:
        state: the model.
        plan: the plan.
        on_block: called after each block with its number of samples.
    """

    def __init__(
        self,
        state: ModelState,
        plan: NTKPlan,
        kernels: Sequence[frozenset[int]],
        *,
        outputs: str | int,
        trace: bool,
        dtype: torch.dtype,
        on_block: Callable[[int], None] | None = None,
    ) -> None:
        self.state, self.plan = state, plan
        self._kernels = kernels
        self._outputs, self._trace, self._dtype = outputs, trace, dtype
        self.on_block = on_block
        self._plans: dict[Any, Plan] = {}
        self._separate = False

    def kernels(self, rows: Blocks, columns: Blocks | None, panel: slice | None = None) -> list[Tensor]:
        """The wanted kernels.

        Args:
            rows: samples of the rows; of the columns as well where there are no others.
            columns: samples of the columns, None for the symmetric kernel.
            panel: of the symmetric kernel only these samples' rows.

        Returns:
            For each kernel [n c, m c], or [n, m] of a trace.
        """
        c = 1 if self._trace else self.plan.outputs
        height = rows.count if panel is None else panel.stop - panel.start
        shape = height * c, (rows if columns is None else columns).count * c
        device = self.state.device
        totals = [torch.empty(shape, dtype=self._dtype, device=device).zero_() for _ in self._kernels]
        halves: dict[tuple[int, ...], list[Tensor]] = {}
        with torch.no_grad():
            for items in self.plan._items:
                self._pass(items, rows, columns, panel, totals, halves)
            if self._trace:
                for total in totals:
                    total.div_(self.plan.outputs)
        return totals

    # ---- a pass

    def _pass(
        self,
        items: Sequence[Item],
        rows: Blocks,
        columns: Blocks | None,
        panel: slice | None,
        totals: list[Tensor],
        halves: dict[tuple[int, ...], list[Tensor]],
    ) -> None:
        """Gather and add some items; on return their buffers are gone, before those of the next pass are made."""
        left = self._gather(items, rows)
        right = left if columns is None else self._gather(items, columns)
        for item, x, z in zip(items, left, right, strict=True):
            own = x if panel is None else x.part(panel)
            self._add(item, totals[item.kernel], own, z, halves, columns is None and panel is None)

    def _gather(self, items: Sequence[Item], samples: Blocks) -> list[_Buffers]:
        buffers = [_Buffers(item, samples.count, self) for item in items]
        first = 0
        for x in samples.blocks(self.plan.block):
            last = first + count(x)
            alone = self._alone(x)
            with self.state.untouched():
                self._fill(items, buffers, slice(first, last), x, alone)
            first = last
            if self.on_block is not None:
                self.on_block(count(x))
        if first != samples.count:
            raise ValueError(f"x: expected {samples.count} samples in every pass, got {first}")
        self._separate = True
        return buffers

    def _alone(self, x: Inputs) -> Tensor | None:
        """Outputs of the first samples of a block of the first pass, without the others beside them."""
        if self._separate or count(x) <= _ALONE:
            return None
        with self.state.untouched():
            return self.state.forward(take(x, slice(0, _ALONE))).detach().reshape(_ALONE, -1)

    def _fill(
        self,
        items: Sequence[Item],
        buffers: Sequence[_Buffers],
        place: slice,
        x: Inputs,
        alone: Tensor | None,
    ) -> None:
        sweep = Sweep(self.state, x, self._plans, verify="first", outputs=self._outputs)
        if alone is not None:
            _check_separate(alone, sweep.output.detach()[:_ALONE])
        terms = self._terms(items, sweep)
        whole = Assembler(sweep)
        for item, buffer in zip(items, buffers, strict=True):
            if isinstance(item, ColumnItem):
                self._fill_columns(item, buffer, place, whole)
                continue
            found = terms.get((item.kernel, item.term.parameters))
            if found is None:
                self._refuse_other_ways(item.term.parameters, sweep.plan)
                buffer.zero(place)
            else:
                buffer.fill_term(place, found)

    def _terms(self, items: Sequence[Item], sweep: Sweep) -> dict[tuple[int, tuple[int, ...]], Any]:
        found = {}
        wanted = [item for item in items if not isinstance(item, ColumnItem)]
        for kernel in sorted({item.kernel for item in wanted}):
            only = {i for item in wanted if item.kernel == kernel for i in item.term.parameters}
            for covered, term in Assembler(sweep, dtype=self._dtype, only=frozenset(only)).terms().items():
                found[kernel, covered] = term
        return found

    def _fill_columns(self, item: ColumnItem, buffer: _Buffers, place: slice, whole: Assembler) -> None:
        """Per-sample gradients of some entries, tile by tile."""
        rows, row = rows_of(self.state.parameters[item.parameter])
        first, last = item.first // row, -(-item.last // row)
        step = last - first
        if not whole.is_whole(item.parameter):
            fast = whole.fast_rows(item.parameter)
            step = max(min(fast, rows), self.plan._tile_bytes // (whole.rows * row * self._dtype.itemsize))
            step = step - step % fast if fast < step < rows else step
        for start in range(first, last, step):
            stop = min(last, start + step)
            part = whole.columns(item.parameter, slice(start, stop))
            begin, end = max(item.first, start * row), min(item.last, stop * row)
            target = buffer.b[place, :, begin - item.first : end - item.first]
            if part is None:
                target.zero_()
            else:
                part = part.view(target.shape[0], -1, part.shape[1])  # [n, c, entries]
                target.copy_(part[..., begin - start * row : end - start * row])

    def _refuse_other_ways(self, parameters: Sequence[int], plan: Plan) -> None:
        """A term that is missing from a block is zero there, unless the block's graph uses the parameters otherwise."""
        for i in parameters:
            if plan.routes[i] not in (Route.GRAM, Route.UNUSED):
                raise UnsupportedModule(
                    f"model: {self.state.names[i]} is used in another way in one block of samples than in another "
                    f"({plan.reasons[i]}); leave out max_bytes"
                )

    # ---- full buffers

    def _add(
        self,
        item: Item,
        total: Tensor,
        x: _Buffers,
        z: _Buffers,
        halves: dict[tuple[int, ...], list[Tensor]],
        symmetric: bool,
    ) -> None:
        if isinstance(item, ColumnItem):
            self._add_columns(total, x.matrix(), z.matrix(), symmetric)
        elif isinstance(item, TermItem):
            _add_term(total, x, z, symmetric)
        else:
            self._add_half(item, total, x, z, halves, symmetric)

    @staticmethod
    def _add_columns(total: Tensor, x: Tensor, z: Tensor, symmetric: bool) -> None:
        """Total += X Z^T."""
        if symmetric:
            ops.jacobian_accumulate_(total, x)
        else:
            none = [x.new_empty(x.shape[0], 0)], [z.new_empty(z.shape[0], 0)]
            ops.ntk_gram_cross(none[0], [x], none[1], [z], [1.0], [1.0], out=total, accumulate=True)

    def _add_half(
        self,
        item: HalfItem,
        total: Tensor,
        x: _Buffers,
        z: _Buffers,
        halves: dict[tuple[int, ...], list[Tensor]],
        symmetric: bool,
    ) -> None:
        """One more piece of A A^T or B B^T; with the last one their product goes to the kernel."""
        key = (item.kernel, *item.term.parameters)
        c = 1 if self._trace else self.plan.outputs
        if key not in halves:
            small = total.new_zeros(total.shape[0] // c, total.shape[1] // c)
            halves[key] = [small, torch.zeros_like(total)]
        a, b = halves[key]
        if item.half == "a":
            self._add_columns(a, x.a, z.a, symmetric)
        else:
            self._add_columns(b, x.matrix(), z.matrix(), symmetric)
        if item.half == "b" and item.last == item.term.b:
            a.add_(x.beta).mul_(x.scale)
            n, m = a.shape
            b.view(n, c, m, c).mul_(a[:, None, :, None])
            total.add_(b)
            del halves[key]


def _check_separate(alone: Tensor, together: Tensor) -> None:
    """Raise where the outputs of some samples depend on which others are beside them."""
    tolerance = relative_tolerance(together.dtype)
    if not float((alone - together).norm()) <= tolerance * float(alone.norm() + together.norm()):
        raise UnsupportedModule(
            "model: its output for a sample changes with the samples beside it (BatchNorm in training mode?), so "
            "that they cannot go through it in blocks: call model.eval(), or leave out max_bytes"
        )


def _add_term(total: Tensor, x: _Buffers, z: _Buffers, symmetric: bool) -> None:
    scale, beta = [x.scale], [x.beta]
    if symmetric:
        ops.ntk_gram_(total, [x.a], [x.outputs_apart()], scale, beta, True)
    else:
        left, right = x.outputs_apart(), z.outputs_apart()
        ops.ntk_gram_cross([x.a], [left], [z.a], [right], scale, beta, out=total, accumulate=True)


class _Buffers:
    """What one item gathers of n samples.

    Attributes:
        a: A [n, a], or the columns of it that the item takes.
        b: B [n, c, b], or the columns of it, or per-sample gradients.
        scale: factor of a term.
        beta: what is added to A A^T.
    """

    def __init__(self, item: Item, n: int, stream: Stream) -> None:
        self._item, self._trace = item, stream._trace
        make = lambda *shape: torch.empty(shape, dtype=stream._dtype, device=stream.state.device)  # noqa: E731
        a = b = 0
        if isinstance(item, TermItem):
            a, b = item.term.a, item.term.b
        elif isinstance(item, HalfItem) and item.half == "a":
            a = item.last - item.first
        else:
            b = item.last - item.first
        self.a, self.b = make(n, a), make(n, stream.plan.outputs, b)
        self.scale = self.beta = 0.0
        self._settled = False

    def part(self, samples: slice) -> _Buffers:
        """Those of some samples, as views."""
        found = object.__new__(_Buffers)
        found._item, found._trace, found._settled = self._item, self._trace, self._settled
        found.a, found.b = self.a[samples], self.b[samples]
        found.scale, found.beta = self.scale, self.beta
        return found

    def zero(self, samples: slice) -> None:
        """Nothing of these samples reaches the output."""
        self.a[samples] = 0.0
        self.b[samples] = 0.0

    def fill_term(self, samples: slice, term: tuple[Tensor, Tensor, float, float]) -> None:
        """Copy what a block's term holds.

        Raises:
            UnsupportedModule: the term has other sizes or factors than that of another block.
        """
        a, b, scale, beta = term
        b = b.reshape(b.shape[0], -1, b.shape[-1])
        item = self._item
        assert not isinstance(item, ColumnItem)
        same = not self._settled or (scale, beta) == (self.scale, self.beta)
        if (a.shape[1], b.shape[2]) != (item.term.a, item.term.b) or not same:
            raise UnsupportedModule(
                "model: a layer has other sizes or factors in one block of samples than in another; leave out max_bytes"
            )
        self.scale, self.beta, self._settled = scale, beta, True
        if isinstance(item, TermItem):
            self.a[samples].copy_(a)
            self.b[samples].copy_(b)
        elif item.half == "a":
            self.a[samples].copy_(a[:, item.first : item.last])
        else:
            self.b[samples].copy_(b[..., item.first : item.last])

    def outputs_apart(self) -> Tensor:
        """B [n, c, b]; of a trace [n, 1, c b], whose Gram matrix is the sum over outputs."""
        return self.b.flatten(1).unsqueeze(1) if self._trace else self.b

    def matrix(self) -> Tensor:
        """Rows of the kernel by columns: [n c, b], of a trace [n, c b]."""
        return self.b.flatten(1) if self._trace else self.b.flatten(0, 1)
