"""CPU implementations: checks, raw pointers to `_C`, memory from torch alone.

Threads: `torch.get_num_threads()` at each call. Strided, expanded and offset views go to the kernels as they
are; a copy is made only where the innermost stride is not 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from catapult_ext import _C
from catapult_ext.errors import NonFinite
from catapult_ext.ops import _checks, reference, tiles
from catapult_ext.ops._schema import RankUpdate, register_backend

# What may be written through its pointer: a subclass may hold its numbers elsewhere.
_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1}  # DType in csrc/core/types.h


def _unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense (or too short to matter), else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _non_finite(op: str, what: str) -> NonFinite:
    return NonFinite(f"{op}: a NaN or an infinity came up in {what}")


# --- ntk_gram ---


def _gram_terms(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Return the seven integers of each layer that `_C.ntk_gram` takes, and copies to keep alive."""
    fields: list[int] = []
    copies: list[Tensor] = []
    for x, y in zip(a, b, strict=True):
        strides = x.stride()
        width = x.shape[1]
        if strides[1] != 1 and width > 1:
            x = x.contiguous()
            copies.append(x)
            strides = x.stride()
        fields += (x.data_ptr(), strides[0], width, 0, 0, 0, 0)
        strides = y.stride()
        width = y.shape[-1]
        if strides[-1] != 1 and width > 1:
            y = y.contiguous()
            copies.append(y)
            strides = y.stride()
        fields[-4:] = (y.data_ptr(), strides[0], strides[1] if len(strides) == 3 else 0, width)
    return fields, copies


def ntk_gram_(
    kernel: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
    accumulate: bool,
) -> None:
    """CPU kernel of `catapult::ntk_gram_`, without the dispatcher."""
    n, c = _checks.ntk_gram(kernel, a, b, scale, beta)
    fields, _copies = _gram_terms(a, b)
    increment_version(kernel)
    if not _C.ntk_gram(
        _DTYPE_CODES[kernel.dtype], n, c, fields, scale, beta, kernel.data_ptr(), n * c, accumulate,
        torch.get_num_threads(),
    ):  # fmt: skip
        raise _non_finite("ntk_gram_", "the kernel")


def _ntk_gram_cross_(
    kernel: Tensor,
    xa: Sequence[Tensor],
    xb: Sequence[Tensor],
    za: Sequence[Tensor],
    zb: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
    accumulate: bool,
) -> None:
    n, m, c = _checks.ntk_gram_cross(kernel, xa, xb, za, zb, scale, beta)
    x_fields, _x_copies = _gram_terms(xa, xb)
    z_fields, _z_copies = _gram_terms(za, zb)
    increment_version(kernel)
    if not _C.ntk_gram_cross(
        _DTYPE_CODES[kernel.dtype], n, m, c, x_fields, z_fields, scale, beta, kernel.data_ptr(), m * c,
        accumulate, torch.get_num_threads(),
    ):  # fmt: skip
        raise _non_finite("ntk_gram_cross_", "the kernel")


# --- jacobian_accumulate ---


def _accumulate(
    kernel: Tensor, grad: Tensor | None, tile: Tensor, weight: Tensor | None, scale: float
) -> None:
    """K += scale^2 G G^T, grad += scale G^T w, arguments checked; tile [N, q] of any strides."""
    tile = _unit_stride(tile)
    if weight is not None:
        weight = _unit_stride(weight)
    increment_version([kernel] if grad is None else [kernel, grad])
    if not _C.jacobian_accumulate(
        _DTYPE_CODES[kernel.dtype],
        tile.shape[0],
        tile.shape[1],
        tile.data_ptr(),
        tile.stride(0),
        kernel.data_ptr(),
        kernel.shape[1],
        0 if weight is None else weight.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        scale,
        torch.get_num_threads(),
    ):
        raise _non_finite("jacobian_accumulate_", "the kernel or the gradient")


def _accumulate_tiles(
    kernel: Tensor,
    grad: Tensor | None,
    weight: Tensor | None,
    scale: float,
    parts: Iterable[tuple[slice, Tensor]],
) -> None:
    for rows, tile in parts:
        # Slices of the first dimension of a contiguous gradient are contiguous.
        _accumulate(kernel, None if grad is None else grad[rows], tile.flatten(1), weight, scale)


def _jacobian_accumulate_tile_(
    kernel: Tensor, grad: Tensor | None, tile: Tensor, weight: Tensor | None
) -> None:
    _checks.jacobian_tile(kernel, grad, tile, weight)
    _accumulate(kernel, grad, tile, weight, 1.0)


def _jacobian_accumulate_tokens_(
    kernel: Tensor,
    grad: Tensor | None,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
    tile_bytes: int,
) -> None:
    _checks.jacobian_tokens(kernel, grad, a, b, weight, tile_bytes)
    # The scale goes with the accumulation: no pass over the tile of its own.
    _accumulate_tiles(kernel, grad, weight, scale, tiles.token_tiles(a, b, tile_bytes=tile_bytes))


def _jacobian_accumulate_conv2d_(
    kernel: Tensor,
    grad: Tensor | None,
    input: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile_bytes: int,
) -> None:
    _checks.jacobian_conv2d(
        kernel, grad, input, b, weight, kernel_size, stride, padding, dilation, groups, tile_bytes
    )
    parts = tiles.conv_tiles(
        input, b, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
        tile_bytes=tile_bytes,
    )  # fmt: skip
    _accumulate_tiles(kernel, grad, weight, scale, parts)


# --- residual, rank_updates_ ---


def residual(prediction: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """(f - y, sum of its squares) of two contiguous tensors of one shape and dtype."""
    result = torch.empty_like(prediction)
    squares = _C.residual(
        _DTYPE_CODES[prediction.dtype], prediction.numel(), prediction.data_ptr(), target.data_ptr(),
        result.data_ptr(),
    )  # fmt: skip
    return result, squares


def rank_updates_(updates: Sequence[RankUpdate]) -> bool:
    """`ops.rank_updates_` in one call, or False (and nothing done) where the tensors are not laid out for it.

    Shapes have been checked.
    """
    fields: list[int] = []
    scales: list[float] = []
    dtype = updates[0][0].dtype
    for matrix, left, right, weight, scale in updates:
        strides, rows, width = matrix.stride(), right.stride(), right.shape[1]
        dense = strides[-1] == 1 and rows[1] == 1 and matrix.is_cpu and matrix.dtype == right.dtype == dtype
        if not dense or type(matrix) not in _PLAIN:
            return False
        height, pointer = 1, 0
        left_strides: tuple[int, ...] = (0, 0)
        if left is not None:
            height, pointer, left_strides = left.shape[1], left.data_ptr(), left.stride()
            if left.dtype != dtype or (strides[0] < width and height > 1):
                return False
        if weight is not None and weight.dtype != dtype:
            return False
        fields += (
            right.shape[0], height, width, pointer, *left_strides, right.data_ptr(), rows[0],
            0 if weight is None else weight.data_ptr(), 0 if weight is None else weight.stride(0),
            matrix.data_ptr(), strides[0],
        )  # fmt: skip
        scales.append(scale)
    _C.rank_updates(_DTYPE_CODES[dtype], fields, scales, torch.get_num_threads())
    increment_version([update[0] for update in updates])
    return True


# --- agop_reduce ---
#
# One thread, against `agop.addmm_(g.T, g)`: 1.5 times faster at 2000 rows of 100 or 3072 features, as fast at
# 128 rows of 100, .9 of its speed at 128 rows of 3072 (both then wait for memory) and half of it at 5 rows, where
# the call is what counts. There too the kernel stays: addmm_ does not promise a symmetric result.


def _agop_reduce_(agop: Tensor, g: Tensor, scale: float) -> None:
    _checks.agop_reduce(agop, g)
    g = _unit_stride(g)
    rows, d = g.shape
    increment_version(agop)
    if not _C.agop_reduce(
        _DTYPE_CODES[g.dtype], rows, d, g.data_ptr(), g.stride(0), scale, agop.data_ptr(), d,
        torch.get_num_threads(),
    ):  # fmt: skip
        raise _non_finite("agop_reduce_", "the AGOP")


def _agop_inner(g: Tensor, h: Tensor) -> Tensor:
    _checks.agop_inner(g, h)
    g, h = _unit_stride(g), _unit_stride(h)
    value = _C.agop_inner(
        _DTYPE_CODES[g.dtype], g.shape[0], h.shape[0], g.shape[1], g.data_ptr(), g.stride(0), h.data_ptr(),
        h.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    if value - value != 0.0:
        raise _non_finite("agop_inner", "the inner product")
    return torch.tensor(value, dtype=torch.float64)


# --- topk_eigh, spectral_norm ---


# EighMethod and the status of one matrix in csrc/core/topk_eigh.h.
_AUTO, _DIRECT = 0, 1
_UNSETTLED, _NON_FINITE = 1, 2


def _matrices(kernel: Tensor) -> Tensor:
    """View (or copy, where strides do not allow it) of [..., n, n] as one with dense rows and at most one batch."""
    return _unit_stride(kernel if kernel.dim() <= 3 else kernel.reshape(-1, *kernel.shape[-2:]))


def _run_topk_eigh(
    matrices: Tensor, results: tuple[Tensor, Tensor, Tensor], start: Tensor | None, tol: float, method: int
) -> list[int]:
    """Fill values [..., k], vectors [..., n, k] and residuals [..., k] of [n, n] or [batch, n, n].

    Returns the status of each matrix, or an empty list where all converged.
    """
    values, vectors, residuals = results
    strides, shape = matrices.stride(), matrices.shape
    batched = len(shape) == 3
    return _C.topk_eigh(
        _DTYPE_CODES[matrices.dtype], shape[0] if batched else 1, shape[-1], values.shape[-1],
        matrices.data_ptr(), strides[0] if batched else 0, strides[-2], 0 if start is None else start.data_ptr(),
        0 if start is None else start.shape[-1], tol, method, values.data_ptr(), vectors.data_ptr(),
        residuals.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _full_decomposition(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact pairs of one matrix [n, n]: LAPACK in float64, or the direct method where LAPACK gives up."""
    if not matrix.tril().isfinite().all():
        raise _non_finite("topk_eigh", "the kernel")
    try:
        return reference.topk_eigh(matrix, k, None, 0.0)
    except torch.linalg.LinAlgError:
        results = matrix.new_empty(k), matrix.new_empty((matrix.shape[0], k)), matrix.new_empty(k)
        if _run_topk_eigh(matrix, results, None, 0.0, _DIRECT):
            raise
        return results


def topk_eigh(kernel: Tensor, k: int, start: Tensor | None, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """CPU kernel of `catapult::topk_eigh`; callers inside the package may skip the dispatcher and call it."""
    _checks.topk_eigh(kernel, k, start)
    shape = kernel.shape
    few = (*shape[:-2], k)
    results = kernel.new_empty(few), kernel.new_empty((*shape[:-1], k)), kernel.new_empty(few)
    if k == 0 or kernel.numel() == 0:
        return results
    matrices = _matrices(kernel)
    if start is not None:
        start = start.contiguous()
    for item, status in enumerate(_run_topk_eigh(matrices, results, start, tol, _AUTO)):
        if status == _NON_FINITE:
            raise _non_finite("topk_eigh", "the kernel")
        if status == _UNSETTLED:
            n = shape[-1]
            exact = _full_decomposition(matrices.reshape(-1, n, n)[item], k)
            for result, part in zip(results, exact, strict=True):
                result.view(-1, *part.shape)[item] = part
    return results


def spectral_norm(kernel: Tensor, tol: float) -> Tensor:
    """CPU kernel of `catapult::spectral_norm`; callers inside the package may skip the dispatcher and call it."""
    _checks.spectral_norm(kernel)
    shape = kernel.shape
    if kernel.numel() == 0:
        return kernel.new_zeros(shape[:-2])
    values = kernel.new_empty(shape[:-2])
    matrices = _matrices(kernel)
    batch, strides, n = values.numel(), matrices.stride(), shape[-1]
    failed = _C.spectral_norm(
        _DTYPE_CODES[kernel.dtype], batch, n, matrices.data_ptr(), strides[0] if len(strides) == 3 else 0,
        strides[-2], tol, values.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    for item, status in enumerate(failed):
        if status == _NON_FINITE:
            raise _non_finite("spectral_norm", "the kernel")
        if status == _UNSETTLED:
            values.view(-1)[item] = _full_decomposition(matrices.reshape(-1, n, n)[item], 1)[0][0]
    return values


# --- chain_sgd_ ---


def chain_sgd_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_scale: Sequence[float],
    bias_scale: Sequence[float],
    slope: Sequence[float],
    trains_weight: Sequence[bool],
    trains_bias: Sequence[bool],
    x: Tensor,
    y: Tensor,
    batch_index: Tensor,
    batch_sizes: Tensor,
    rates: Tensor,
    observed: Tensor,
    loss_limit: float,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """CPU kernel of `catapult::chain_sgd_`, without the dispatcher. One thread, whatever torch is set to."""
    trains_bias = [flag and b.numel() > 0 for flag, b in zip(trains_bias, biases, strict=True)]
    _checks.chain_sgd(
        weights, biases, (weight_scale, bias_scale), slope, (trains_weight, trains_bias), x, y, batch_index,
        batch_sizes, rates, observed,
    )  # fmt: skip
    fields: list[int] = []
    numbers: list[float] = []
    written: list[Tensor] = []
    for weight, bias, *scales, trains_w, trains_b in zip(
        weights, biases, weight_scale, bias_scale, slope, trains_weight, trains_bias, strict=True
    ):
        out, width = weight.shape
        fields += (
            width, out, weight.data_ptr(), weight.stride(0), bias.data_ptr() if bias.numel() else 0, trains_w,
            trains_b,
        )  # fmt: skip
        numbers += scales
        written += ([weight] if trains_w else []) + ([bias] if trains_b else [])
    x, batch_index, batch_sizes = _unit_stride(x), batch_index.contiguous(), batch_sizes.contiguous()
    rates, observed = rates.contiguous(), observed.contiguous()
    losses, lambda_1 = x.new_empty(rates.shape), x.new_empty(rates.shape)
    _C.chain_sgd(
        _DTYPE_CODES[x.dtype], fields, numbers, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0),
        batch_index.data_ptr(), batch_sizes.data_ptr(), rates.data_ptr(), observed.data_ptr(), rates.shape[0],
        loss_limit, tol, losses.data_ptr(), lambda_1.data_ptr(),
    )  # fmt: skip
    increment_version(written)
    return losses, lambda_1


register_backend(
    "CPU",
    {
        "ntk_gram_": ntk_gram_,
        "ntk_gram_cross_": _ntk_gram_cross_,
        "jacobian_accumulate_.tile": _jacobian_accumulate_tile_,
        "jacobian_accumulate_.tokens": _jacobian_accumulate_tokens_,
        "jacobian_accumulate_.conv2d": _jacobian_accumulate_conv2d_,
        "topk_eigh": topk_eigh,
        "spectral_norm": spectral_norm,
        "agop_reduce_": _agop_reduce_,
        "agop_inner": _agop_inner,
        "chain_sgd_": chain_sgd_,
    },
)
