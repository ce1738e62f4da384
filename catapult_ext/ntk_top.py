"""Largest eigenpairs of the tangent kernel where it is too large to be formed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from catapult_ext import lanczos
from catapult_ext.eigen import TopEigh
from catapult_ext.errors import UnsupportedModule
from catapult_ext.observe.allocations import Growth, record
from catapult_ext.observe.inputs import Inputs, count, take
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.tangent import TangentKernel
from catapult_ext.stream.job import check_max_bytes, free_bytes
from catapult_ext.stream.probe import LARGE, probe
from catapult_ext.stream.samples import Loader, Samples, TensorSamples, leaves_random_state, samples_of

__all__ = ["ntk_top"]

#: Samples of the smaller of two probes; the larger one has `LARGE`.
_SMALL = 2
#: What convolutions take beside their results does not grow quite linearly with the samples.
_ALLOWANCE = 1.05


@leaves_random_state
def ntk_top(
    model: nn.Module,
    x: Inputs | Loader,
    k: int = 1,
    *,
    outputs: str | int = "all",
    params: Iterable[str | Tensor] | None = None,
    start: Tensor | TopEigh | None = None,
    tol: float | None = None,
    max_bytes: int | None = None,
) -> TopEigh:
    """Find the k largest eigenpairs of the tangent kernel from products K u = J (J^T u), without the kernel.

    J^T u is one backward, J v the transpose of it: the derivative of J^T w by w. Both are exact for every network
    whose backward can be differentiated (attention takes its plain formula), and are compared with each other at
    every product. The iteration is that of `hessian_top`. Where K fits in memory, `top_eigh(ntk(model, x), k)` is
    faster.

    Args:
        model: output (n,) or (n, c), float32 or float64; left exactly as found. With BatchNorm in training mode J is
            that of the batch map, and all samples go through the model together.
        x: samples as for `ntk`: a tensor [n, ...], a tuple or dict of tensors, or a DataLoader.
        k: pairs, 1 <= k <= N.
        outputs: "all", "trace", "sum" or an integer, as for `ntk`. "trace" takes c times as long.
        params: names or tensors of the parameters to include, default all that require grad.
        start: vectors [N, columns] of an earlier call, or its TopEigh; each column costs a product. It changes the
            cost, and the result within the tolerance.
        tol: largest residual allowed, relative to lambda_1. Default 1e-5 for float32 and 1e-8 for float64. The error
            of an eigenvalue is at most its residual, and about residual^2 / gap.
        max_bytes: bound of the memory that the call takes: samples go through the model in blocks, each of them
            twice for each product. None: all at once, and the graph of one forward and backward is kept for all
            products (for a loader: half of the memory that is free).

    Returns:
        TopEigh: values (k,), vectors (N, k), residuals (k,); N = n c (row i c + j), or n for other `outputs` than
        "all". All residuals are <= tol lambda_1, or a RuntimeWarning says that they are not.

    Raises:
        TypeError, ValueError: an argument that does not fit; `max_bytes` too small names the smallest that works; a
            loader that gives other batches in another pass.
        UnsupportedModule: the forward draws random numbers, a backward cannot be differentiated (`ntk` can do
            without), or the samples are coupled and are to go in blocks.
        NonFinite: the output or a product is not finite.

    Cost: one forward and one backward for all products, and for each a backward and its derivative; in blocks two
    forwards, two backwards and the derivative for each product. Up to 32 + 4 k vectors [N], or 256 where these
    take less than 256 MiB.

    Example:
        >>> rate = 60000 / ntk_top(model, x).values[0]  # critical rate of 60,000 samples, one output
    """
    state = ModelState(model, params)
    samples = samples_of(x, state.device)
    check_max_bytes(max_bytes)
    if max_bytes is None and not isinstance(samples, TensorSamples):
        max_bytes = free_bytes(state.device) // 2
    block = None if max_bytes is None else _block(state, samples, k, outputs, max_bytes)
    kernel = TangentKernel(state, samples, block, outputs)
    rows = lanczos.check_arguments(k, tol, start, rows=kernel.rows, like=state.parameters[0])
    with torch.no_grad():
        return lanczos.largest(
            kernel.product,
            rows,
            k,
            tol=tol or (1e-5 if state.dtype == torch.float32 else 1e-8),
            max_products=300 + 30 * k,
            what="ntk_top",
            operator="its tangent kernel",
            stacklevel=4,  # beyond the decorator
        )


def _block(state: ModelState, samples: Samples, k: int, outputs: str | int, max_bytes: int) -> int | None:
    """Samples per block that keep a product within the bound; None where all of them do, with the graph kept."""
    n = samples.count
    few = next(samples.blocks(min(LARGE, n)))
    kept, streamed = (_growth(state, few, outputs, keep=keep) for keep in (True, False))
    rows = TangentKernel(state, TensorSamples(few), None, outputs).rows // count(few) * n
    itemsize = torch.finfo(state.dtype).bits // 8
    besides = rows * itemsize * lanczos.most_vectors(rows, max(1, k), 0, itemsize) + samples.bytes_read

    def need(growth: Growth, block: int) -> int:
        return besides + int(_ALLOWANCE * growth.peak(block)) + samples.bytes_per_sample * block

    if need(kept, n) <= max_bytes:
        return None
    coupled = probe(state, few, "all", None, [frozenset(range(len(state.names)))]).coupled
    if coupled is not None:
        raise UnsupportedModule(
            f"model: it couples its samples ({coupled}), so that they have to go through it together, which takes "
            f"max_bytes={need(kept, n)}; or call model.eval()"
        )
    blocks = range(min(LARGE, n), n + 1)
    fits = bisect.bisect_right(blocks, max_bytes, key=lambda block: need(streamed, block))
    if fits == 0:
        raise ValueError(
            f"max_bytes: {max_bytes} is too small for {k} eigenpairs of {rows} rows; the smallest bound that works is "
            f"{min(need(kept, n), need(streamed, blocks[0]))}"
        )
    return blocks[fits - 1]


def _growth(state: ModelState, few: Inputs, outputs: str | int, *, keep: bool) -> Growth:
    """Memory of a product of a block, measured on a few samples."""
    sizes = sorted({min(_SMALL, count(few)), count(few)})
    taken = [_product_memory(state, take(few, slice(0, size)), outputs, keep) for size in sizes]
    return Growth.between(sizes[0], taken[0], sizes[-1], taken[-1])


def _product_memory(state: ModelState, x: Inputs, outputs: str | int, keep: bool) -> list[int]:
    def once() -> None:
        kernel = TangentKernel(state, TensorSamples(x), None if keep else count(x), outputs)
        u = torch.ones(kernel.rows, dtype=state.dtype, device=state.device)
        with torch.no_grad():
            kernel.product(u)

    return record(once, state.device)[1]
