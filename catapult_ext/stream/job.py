"""The arguments of a kernel, checked, and how they become a plan and a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from catapult_ext import ops
from catapult_ext.observe.inputs import Inputs, count, describe, same_samples
from catapult_ext.observe.model_state import ModelState
from catapult_ext.stream.one_sweep import one_sweep
from catapult_ext.stream.passes import Stream
from catapult_ext.stream.plan import NTKPlan, Planner, Sizes, make_plan
from catapult_ext.stream.probe import LARGE, Probe, probe
from catapult_ext.stream.samples import Loader, Samples, TensorSamples, samples_of, together

__all__ = ["Job", "check_max_bytes", "tile_bytes_within"]


def tile_bytes_within(
    state: ModelState, x: Inputs, max_bytes: int, *, input_gradient: bool, layer_inputs: bool
) -> int:
    """What tiles of an observation may take, so that all of it stays within a bound.

    Args:
        state: the model.
        x: all samples; an observation takes them in one sweep.
        max_bytes: the bound.
        input_gradient: whether the gradients with respect to x are kept.
        layer_inputs: whether those with respect to the inputs of layers are.

    Raises:
        ValueError: the bound is too small; the message names the smallest that works.
    """
    every = frozenset(range(len(state.names)))
    found = probe(state, x, "all", None, [every], input_gradient=input_gradient, layer_inputs=layer_inputs)
    planner = Planner(found, Sizes(count(x), None, [every], state.dtype.itemsize))
    # Gradients of the loss that are formed beside the kernel; the residual and the loss are small.
    numbers = sum(p.rows * p.row for i, p in found.parameters.items() if i not in planner.in_terms)
    besides = numbers * state.dtype.itemsize
    for tile_bytes in (16 * ops.TILE_BYTES, ops.TILE_BYTES, ops.TILE_BYTES // 8, 1):
        if planner.one_sweep(tile_bytes) + besides <= max_bytes:
            return tile_bytes
    raise ValueError(
        f"max_bytes: {max_bytes} is too small to observe {count(x)} samples of this model in one sweep; the smallest "
        f"bound that works is {planner.one_sweep(1) + besides}"
    )


def check_max_bytes(max_bytes: int | None) -> None:
    """Raise ValueError unless it is None or a positive integer."""
    if max_bytes is not None and (
        not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes <= 0
    ):
        raise ValueError(f"max_bytes: expected a positive integer or None, got {max_bytes!r}")


class Job:
    """A kernel that is asked for.

    Attributes:
        state: the model.
        rows: samples of the rows.
        columns: samples of the columns, None for a symmetric kernel.
        kernels: for each wanted kernel, the parameters that it includes.
        swept_outputs: the outputs that a sweep goes back from.
        lazy: whether samples come from a loader.
        dtype: of the kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Inputs | Loader,
        z: Inputs | Loader | None,
        *,
        outputs: str | int,
        params: Iterable[str | Tensor] | None,
        per_parameter: bool,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the arguments, which are those of `ntk`."""
        state = self.state = ModelState(model, params)
        self.rows = samples_of(x, state.device)
        self.columns = None if z is None else samples_of(z, state.device, "z")
        self.lazy = not all(isinstance(s, TensorSamples) for s in (self.rows, self.columns) if s is not None)
        if self.columns is not None:
            first, second = (next(side.blocks(LARGE)) for side in (self.rows, self.columns))
            if not same_samples(first, second):
                raise ValueError(
                    f"z: expected samples like those of x, {describe(first)}, got {describe(second)}"
                )
        if dtype not in (None, torch.float32, torch.float64) or (
            dtype == torch.float32 and state.dtype == torch.float64
        ):
            raise ValueError(f"dtype: expected None, the model's dtype or torch.float64, got {dtype}")
        self.dtype = state.dtype if dtype is None else dtype
        self.trace = outputs == "trace"
        self.swept_outputs: str | int = "all" if self.trace else outputs
        every = range(len(state.names))
        self.kernels = [frozenset([i]) for i in every] if per_parameter else [frozenset(every)]
        self._probe: Probe | None = None

    def probe(self) -> Probe:
        """What the first samples tell."""
        if self._probe is None:
            fewer = self.columns is not None and self.columns.count > self.rows.count
            samples: Samples = self.columns if fewer and self.columns is not None else self.rows
            first = next(samples.blocks(min(LARGE, samples.count)))
            self._probe = probe(self.state, first, self.swept_outputs, self.dtype, self.kernels)
        return self._probe

    def sizes(self, panel: int | None = None) -> Sizes:
        """What the memory depends on."""
        sides = [side for side in (self.rows, self.columns) if side is not None]
        return Sizes(
            samples=self.rows.count,
            columns=None if self.columns is None else self.columns.count,
            kernels=self.kernels,
            itemsize=self.dtype.itemsize,
            trace=self.trace,
            read=(max(s.bytes_per_sample for s in sides), max(s.bytes_read for s in sides)),
            panel=panel,
            lazy=self.state.device.type == "cpu",
        )

    def bound(self, max_bytes: int | None) -> int:
        """The bound where there has to be one: half of the memory that is free unless one is given."""
        check_max_bytes(max_bytes)
        return free_bytes(self.state.device) // 2 if max_bytes is None else max_bytes

    def plan(self, max_bytes: int | None, panel: int | None = None) -> NTKPlan:
        """The plan of the kernel, or of a panel of it."""
        check_max_bytes(max_bytes)
        if max_bytes is None and self.lazy:
            max_bytes = self.bound(None)
        shapes = [tuple(p.shape) for p in self.state.parameters]
        return make_plan(self.state.names, shapes, self.probe(), self.sizes(panel), max_bytes)

    def compute(self, max_bytes: int | None) -> list[Tensor]:
        """The kernels, all in memory."""
        check_max_bytes(max_bytes)
        if max_bytes is not None or self.lazy:
            plan = self.plan(max_bytes)
            if plan.streamed:
                return self.stream(plan).kernels(self.rows, self.columns)
        z = None if self.columns is None else together(self.columns)
        return one_sweep(
            self.state,
            together(self.rows),
            z,
            self.kernels,
            outputs=self.swept_outputs,
            trace=self.trace,
            dtype=self.dtype,
        )

    def stream(self, plan: NTKPlan, on_block: Callable[[int], None] | None = None) -> Stream:
        """What computes the kernel by a plan."""
        return Stream(
            self.state,
            plan,
            self.kernels,
            outputs=self.swept_outputs,
            trace=self.trace,
            dtype=self.dtype,
            on_block=on_block,
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device: of the GPU, or what the system says is available.

    Raises:
        ValueError: the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("max_bytes: the system does not tell how much memory is free; give a bound")
