"""The tangent kernel and the Jacobian of a model, without training it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from catapult_ext.graph import refuse_lower_precision, walk
from catapult_ext.observe.inputs import Inputs, check_inputs
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.outputs import outputs_2d
from catapult_ext.stream.file import KernelFile
from catapult_ext.stream.job import Job
from catapult_ext.stream.plan import NTKPlan
from catapult_ext.stream.samples import Loader, leaves_random_state

__all__ = ["jacobian", "ntk", "ntk_file", "ntk_plan"]


@leaves_random_state
def ntk(
    model: nn.Module,
    x: Inputs | Loader,
    z: Inputs | Loader | None = None,
    *,
    outputs: str | int = "all",
    params: Iterable[str | Tensor] | None = None,
    per_parameter: bool = False,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Tangent kernel K(x, z) = <df(x)/dw, df(z)/dw> (paper, definition 1), without the n x p Jacobian.

    Args:
        model: output (n,) or (n, c), float32 or float64; left exactly as found.
        x: samples [n, ...] for model(x); a tuple of such tensors for model(*x), a dict for model(**x). Or a DataLoader,
            or anything else that gives the same batches whenever it is iterated over: a batch is one of these, or a
            list or tuple that has it as its first entry (what is behind it, such as targets, is not used).
        z: samples of the columns, m of them; x when None (the kernel is then exactly symmetric).
        outputs: "all" for every pair of outputs; "trace" for the mean over outputs of the diagonal blocks; "sum"
            for the kernel of the summed outputs; an integer for that output. Only "all" gives the critical rate of
            a network with several outputs.
        params: names or tensors of the parameters to include, default all that require grad.
        per_parameter: return one kernel per parameter; they add up to the whole.
        dtype: torch.float64 accumulates and returns double also for a float32 model.
        max_bytes: bound of all memory that the call takes beyond what there was before it, result included
            (:doc:`/memory`). Where one sweep over all samples takes more, they go through the network in blocks, once
            for each group of parameters that fits; `ntk_plan` tells beforehand. None: one sweep whatever it takes; for
            a loader half of the memory that is free.

    Returns:
        "all": [n c, m c], row index i c + j (sample-major); otherwise [n, m]. With `per_parameter` a dict of
        such kernels by parameter name.

    Raises:
        TypeError, ValueError: an argument that does not fit; `max_bytes` too small names the smallest that works; a
            loader that gives other batches in another pass (shuffled, or with random augmentation).
        UnsupportedModule: the model cannot be treated exactly; the message says what to do.
        NonFinite: the output or the kernel is not finite.

    Cost: one forward and c backwards to the layers, then n m (fan-in + c^2 width) multiply-adds a layer (half of
    it without z), or the exact fallback of n c backwards for parameters that no rule covers. In blocks, as many
    forwards and backwards as the plan has passes; per-sample gradients are formed once.
    """
    job = Job(model, x, z, outputs=outputs, params=params, per_parameter=per_parameter, dtype=dtype)
    kernels = job.compute(max_bytes)
    return dict(zip(job.state.names, kernels, strict=True)) if per_parameter else kernels[0]


@leaves_random_state
def ntk_plan(
    model: nn.Module,
    x: Inputs | Loader,
    z: Inputs | Loader | None = None,
    *,
    outputs: str | int = "all",
    params: Iterable[str | Tensor] | None = None,
    per_parameter: bool = False,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> NTKPlan:
    """How `ntk` with the same arguments would go about it, and what it would take: memory, passes, multiply-adds.

    Args:
        model: as for `ntk`, and so are the other arguments.
        x: as for `ntk`.
        z: as for `ntk`.
        outputs: as for `ntk`.
        params: as for `ntk`.
        per_parameter: as for `ntk`.
        dtype: as for `ntk`.
        max_bytes: as for `ntk`.

    Returns:
        The plan; `print(plan)` shows it as a table. `plan.peak_bytes` holds within 15 % of what is measured
        (:doc:`/memory` has the measurements).

    Raises:
        TypeError, ValueError, UnsupportedModule, NonFinite: as for `ntk`.

    Cost: forward and backwards of at most four samples, twice; memory is counted allocation by allocation as PyTorch's
    allocators report it, and grows linearly with the samples.
    """
    return Job(model, x, z, outputs=outputs, params=params, per_parameter=per_parameter, dtype=dtype).plan(
        max_bytes
    )


@leaves_random_state
def ntk_file(
    model: nn.Module,
    x: Inputs | Loader,
    path: str | os.PathLike[str],
    z: Inputs | Loader | None = None,
    *,
    outputs: str | int = "all",
    params: Iterable[str | Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> np.memmap[Any, np.dtype[Any]]:
    """`ntk` into a .npy file, for kernels larger than memory; a call that was interrupted goes on when repeated.

    The kernel is computed in panels, rows of some samples at a time, and each panel by the same plan as `ntk`. Beside
    the file lies `<path>.json`, which says whose kernel it is and which panels are done. A repeated call with the same
    model, samples and arguments continues where the last one stopped, to the same bits, or returns the finished file.

    Args:
        model: as for `ntk`, and so are the other arguments.
        x: as for `ntk`.
        path: the file to write, ending in .npy; its folder exists.
        z: as for `ntk`.
        outputs: as for `ntk`.
        params: as for `ntk`.
        dtype: as for `ntk`.
        max_bytes: as for `ntk`; None: half of the memory that is free (when continued, what it was at first).
        progress: show a progress bar where there is a terminal.

    Returns:
        The kernel, [n c, m c] or [n, m], mapped from the file and read-only; `torch.from_numpy(numpy.array(kernel))`
        reads it into memory.

    Raises:
        TypeError, ValueError, UnsupportedModule, NonFinite: as for `ntk`; the file exists and is another kernel
            (another model, other samples, arguments or versions), which is left as it is.
        UnwritableFile: the disk is full, or the folder cannot be written to.

    Cost: as for `ntk`, and the forwards, backwards and per-sample gradients once for each panel.
    """
    path = Path(path)
    if path.suffix != ".npy" or not path.parent.is_dir():
        raise ValueError(f"path: expected a .npy file in a folder that exists, got {path}")
    job = Job(model, x, z, outputs=outputs, params=params, per_parameter=False, dtype=dtype)
    file = KernelFile(job, path, max_bytes)
    if not file.finished:
        file.write(progress)
    kernel = np.load(path, mmap_mode="r")
    assert isinstance(kernel, np.memmap)
    return kernel


def jacobian(model: nn.Module, x: Inputs, *, params: Iterable[str | Tensor] | None = None) -> Tensor:
    """Jacobian of the outputs with respect to the parameters, row by row through autograd alone.

    For small cases and for tests: it uses none of the rules behind `ntk`.

    Args:
        model: output (n,) or (n, c); left exactly as found.
        x: samples, as for `ntk`.
        params: names or tensors of the parameters, default all that require grad.

    Returns:
        [n, c, p], parameters flattened in the order of `model.named_parameters()`. For a model that couples its
        samples this is the Jacobian of the batch map.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        UnsupportedModule: the forward draws random numbers, or autocast is enabled, around it or inside.

    Cost: one forward and n c backwards; n c p numbers.
    """
    state = ModelState(model, params)
    check_inputs(x, state.device)
    with state.untouched():
        output = outputs_2d(state.forward(x), x)
        refuse_lower_precision(walk(output), state.dtype)
        n, c = output.shape
        total = sum(p.numel() for p in state.parameters)
        jacobian = torch.empty(n, c, total, dtype=state.dtype, device=state.device)
        cotangent = torch.zeros_like(output)
        for i in range(n):
            for j in range(c):
                cotangent[i, j] = 1.0
                rows = torch.autograd.grad(
                    output, state.parameters, cotangent, retain_graph=True, allow_unused=True
                )
                cotangent[i, j] = 0.0
                flat = [
                    torch.zeros_like(p).reshape(-1) if row is None else row.reshape(-1)
                    for p, row in zip(state.parameters, rows, strict=True)
                ]
                jacobian[i, j] = torch.cat(flat).detach()
    return jacobian
