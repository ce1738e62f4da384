"""The package's torch ops (`torch.ops.catapult`), one schema each and one implementation per backend.

The functions here allocate the result and call the op. They and the ops are not differentiable.
Letters: n samples, c outputs, N = n c kernel rows (index i c + j), d input features, k eigenpairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from catapult_ext.errors import NonFinite
from catapult_ext.ops import cpu, cuda, reference
from catapult_ext.ops._schema import ChainLayer, RankUpdate
from catapult_ext.ops.tiles import CONV_CHANNELS, TILE_BYTES, conv_tile, conv_tiles, token_tile, token_tiles

__all__ = [
    "CONV_CHANNELS",
    "TILE_BYTES",
    "ChainLayer",
    "RankUpdate",
    "agop_inner",
    "agop_reduce",
    "chain_sgd_",
    "conv_tile",
    "conv_tiles",
    "cpu",
    "cuda",
    "jacobian_accumulate_",
    "jacobian_accumulate_conv2d_",
    "jacobian_accumulate_tokens_",
    "ntk_gram",
    "ntk_gram_",
    "ntk_gram_cross",
    "rank_updates_",
    "reference",
    "residual",
    "spectral_norm",
    "token_tile",
    "token_tiles",
    "topk_eigh",
]


def _rows(b: Sequence[Tensor], name: str) -> int:
    if not b:
        raise ValueError(f"{name}: expected at least one layer, got none")
    return b[0].shape[0] * (b[0].shape[1] if b[0].dim() == 3 else 1)


def _direct(tensor: Tensor, *others: Tensor) -> bool:
    """Whether the dispatcher, which costs more than a small Gram matrix or its norm, may be skipped.

    It may for plain CPU tensors while no graph is being traced and no gradient could be recorded.
    """
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (tensor, *others)))
    )


def ntk_gram_(
    kernel: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scale: list[float],
    beta: list[float],
    accumulate: bool = False,
) -> None:
    """`ntk_gram` into an existing kernel [n c, n c], for the path of every small training step.

    Skips the dispatcher where it can.

    Raises:
        ValueError, TypeError, NonFinite: as `ntk_gram`.
    """
    if _direct(kernel, *a, *b):
        cpu.ntk_gram_(kernel, a, b, scale, beta, accumulate)
    else:
        torch.ops.catapult.ntk_gram_.default(kernel, a, b, scale, beta, accumulate)


def ntk_gram(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[float] | None = None,
    beta: Sequence[float] | None = None,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Tangent kernel of layers that use their weight once per sample, without the n x p Jacobian.

    K = sum_l scale_l (A_l A_l^T + beta_l) * (B_l B_l^T), the A part repeated over outputs.

    Args:
        a: per layer the input A_l [n, m_l]; m_l = 0 leaves beta alone. Any strides.
        b: per layer d output_j / d (layer output) B_l [n, c, w_l], or [n, w_l] for one output. Any strides.
        scale: per layer the squared factor of the weight, default 1.
        beta: per layer the squared factor of the bias relative to scale, default 0 (no bias).
        out: kernel [n c, n c] to write, contiguous, of the dtype of `a` and `b`; allocated when None.
        accumulate: add to `out` (whose lower triangle is read) instead of overwriting it.

    Returns:
        [n c, n c], exactly symmetric. float32 sums are promoted to float64 at least every 2048 columns:
        |dK_ij| <= 2e-6 sqrt(K_ii K_jj) in float32, 1e-13 in float64. On the CPU the result does not depend on
        the thread count. n^2 (sum m_l + c^2 sum w_l) FLOP, no memory beyond the result.

    Raises:
        ValueError, TypeError: shapes, lengths, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the result holds a NaN or an infinity (`out` is then undefined).

    Source: the chain rule for Theta(x, z) = <df(x)/dw, df(z)/dw>, layer by layer.
    """
    if out is None:
        size = _rows(b, "b")
        out = b[0].new_empty((size, size))
    ones = [1.0] * len(a) if scale is None else list(scale)
    zeros = [0.0] * len(a) if beta is None else list(beta)
    ntk_gram_(out, list(a), list(b), ones, zeros, accumulate)
    return out


def ntk_gram_cross(
    xa: Sequence[Tensor],
    xb: Sequence[Tensor],
    za: Sequence[Tensor],
    zb: Sequence[Tensor],
    scale: Sequence[float] | None = None,
    beta: Sequence[float] | None = None,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Tangent kernel between two sets of samples: `ntk_gram` with (xa, xb) for rows, (za, zb) for columns.

    Args:
        xa: per layer A_l of the n row samples [n, m_l].
        xb: per layer B_l of the row samples [n, c, w_l] or [n, w_l].
        za: per layer A_l of the m column samples [m, m_l].
        zb: per layer B_l of the column samples [m, c, w_l] or [m, w_l].
        scale: as in `ntk_gram`.
        beta: as in `ntk_gram`.
        out: [n c, m c] to write, contiguous; allocated when None.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        [n c, m c]; precision as in `ntk_gram`.

    Raises:
        ValueError, TypeError: shapes, lengths, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the result holds a NaN or an infinity.
    """
    if out is None:
        out = xb[0].new_empty((_rows(xb, "xb"), _rows(zb, "zb")))
    ones = [1.0] * len(xa) if scale is None else list(scale)
    zeros = [0.0] * len(xa) if beta is None else list(beta)
    torch.ops.catapult.ntk_gram_cross_.default(
        out, list(xa), list(xb), list(za), list(zb), ones, zeros, accumulate
    )
    return out


def jacobian_accumulate_(
    kernel: Tensor, tile: Tensor, *, grad: Tensor | None = None, weight: Tensor | None = None
) -> None:
    """K += G G^T and grad += G^T w in one sweep over a tile of per-sample gradients.

    Args:
        kernel: [N, N] contiguous, accumulated into; stays symmetric.
        tile: G [N, q], or [N, ...] with everything behind the first dimension being parameters.
        grad: as many contiguous numbers as a row of the tile, accumulated into; None to leave it.
        weight: w [N], for the mean squared error 2 r / (n c); given exactly when `grad` is.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the kernel holds a NaN or an infinity.
    """
    flat = None if grad is None else grad.view(-1)
    torch.ops.catapult.jacobian_accumulate_.tile(kernel, flat, tile.flatten(1), weight)


def jacobian_accumulate_tokens_(
    kernel: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    grad: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
    tile_bytes: int = TILE_BYTES,
) -> None:
    """`jacobian_accumulate_` of a Linear layer over T positions, tile by tile.

    Args:
        kernel: [n c, n c] contiguous, accumulated into.
        a: layer input [n, T, in].
        b: d output_j / d (layer output) [n, c, T, out].
        grad: [out, in] contiguous, accumulated into; None to leave it.
        weight: [n c], given exactly when `grad` is.
        scale: factor of the per-sample gradients (the weight's own factor).
        tile_bytes: bound of the extra memory of a tile (at least one row of the weight is made).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the kernel holds a NaN or an infinity.
    """
    torch.ops.catapult.jacobian_accumulate_.tokens(kernel, grad, a, b, weight, scale, tile_bytes)


def jacobian_accumulate_conv2d_(
    kernel: Tensor,
    input: Tensor,
    b: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    grad: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
    tile_bytes: int = TILE_BYTES,
) -> None:
    """`jacobian_accumulate_` of a 2d convolution with zero padding, tile by tile.

    Args:
        kernel: [n c, n c] contiguous, accumulated into.
        input: layer input [n, C, H, W].
        b: d output_j / d (layer output) [n, c, O, Ho, Wo].
        kernel_size: (kh, kw).
        stride: as in `torch.nn.functional.conv2d`, two numbers.
        padding: as there.
        dilation: as there.
        groups: as there.
        grad: [O, C / groups, kh, kw] contiguous, accumulated into; None to leave it.
        weight: [n c], given exactly when `grad` is.
        scale: factor of the per-sample gradients (the weight's own factor).
        tile_bytes: bound of the extra memory of a tile (at least one output channel is made).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the kernel holds a NaN or an infinity.
    """
    torch.ops.catapult.jacobian_accumulate_.conv2d(
        kernel, grad, input, b, weight, scale, kernel_size, stride, padding, dilation, groups, tile_bytes
    )


def agop_reduce(g: Tensor, scale: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """Average gradient outer product scale G^T G of input gradients.

    Args:
        g: G [rows, d], one row per sample and output.
        scale: 1 / n for the mean over n samples, summed over outputs.
        out: [d, d] contiguous to add to; zeros when None.

    Returns:
        [d, d], symmetric. Sums over samples are promoted to float64 at least every 256 rows. rows d^2 FLOP.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the result holds a NaN or an infinity.

    Source: AGOP = (1/n) sum_i grad f(x_i) grad f(x_i)^T.
    """
    if out is None:
        out = g.new_zeros((g.shape[-1], g.shape[-1]))
    torch.ops.catapult.agop_reduce_.default(out, g, scale)
    return out


def agop_inner(g: Tensor, h: Tensor) -> Tensor:
    """<G^T G, H^T H>_F = ||G H^T||_F^2: alignment of two AGOPs without a d x d matrix.

    Args:
        g: [rows, d].
        h: [rows', d].

    Returns:
        0-dim float64 tensor. 2 rows rows' d FLOP: cheaper than two AGOPs where rows are fewer than features.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        NonFinite: on the CPU, when the result is a NaN or an infinity.
    """
    return torch.ops.catapult.agop_inner.default(g, h)


_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def residual(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(r = f - y, sum of r^2): the loss, before the mean, of tensors of one shape, dtype and device.

    Not a registered op, as `rank_updates_`.

    Raises:
        NonFinite: on the CPU, when the sum is not finite.
    """
    if prediction.is_cpu and prediction.is_contiguous() and target.is_contiguous():
        result, squares = cpu.residual(prediction, target)
        if squares <= _LARGEST[prediction.dtype]:  # false for NaN
            return result, prediction.new_full((), squares)
    else:
        result = prediction - target
        flat = result.reshape(-1)
        total = torch.dot(flat, flat)
        # Elsewhere this would wait for the device; there it surfaces with the first value that is read.
        if not total.is_cpu or math.isfinite(total.item()):
            return result, total
    raise NonFinite("model: its output is not finite, or overflows when squared, and so does the loss")


def rank_updates_(updates: Sequence[RankUpdate]) -> None:
    """W += scale L^T diag(w) R in place for each (W, L, R, w, scale): the gradient step of layers.

    Not a registered op: it is the last part of a step, on tensors that no graph follows.

    Args:
        updates: per parameter W [p, q], L [rows, p], R [rows, q], w [rows, 1] or None (ones), scale; W [q] goes with
            L = None. No update may read what another one writes.

    Raises:
        ValueError: shapes that do not fit; nothing has been written then.

    Cost: 2 rows p q FLOP and one pass over W, without a temporary of its size. On the CPU zeros of L are passed over
    where they are three tenths of it or more, as behind a ReLU; 0 times an infinity then is no NaN.
    """
    for matrix, left, right, weight, _ in updates:
        rows, width = right.shape
        shape = (width,) if left is None else (left.shape[1], width)
        fits = matrix.shape == shape and (left is None or left.shape[0] == rows)
        if not fits or not (weight is None or weight.shape == (rows, 1)):
            given = [None if t is None else tuple(t.shape) for t in (matrix, left, weight)]
            raise ValueError(
                f"rank_updates_: expected a parameter of shape {shape} for {rows} rows, got parameter, left and weight "
                f"of shapes {given}"
            )
    if updates and not cpu.rank_updates_(updates):
        with torch.no_grad():
            for matrix, left, right, weight, scale in updates:
                _rank_update_(matrix, left, right, weight, scale)


def _rank_update_(
    matrix: Tensor, left: Tensor | None, right: Tensor, weight: Tensor | None, scale: float
) -> None:
    if left is None:
        matrix.add_((right if weight is None else right * weight).sum(0), alpha=scale)
        return
    if weight is not None:
        if left.shape[1] < right.shape[1]:
            left = left * weight
        else:
            right = right * weight
    matrix.addmm_(left.t(), right, alpha=scale)


def default_tolerance(dtype: torch.dtype) -> float:
    """Relative accuracy of eigenvalues that the eigensolvers keep unless told otherwise."""
    return 1e-6 if dtype == torch.float32 else 1e-12


def topk_eigh(
    kernel: Tensor, k: int, *, start: Tensor | None = None, tol: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest k eigenpairs of symmetric matrices (`catapult_ext.top_eigh` is the public form).

    Args:
        kernel: [..., n, n]; only the lower triangle is read.
        k: number of pairs, at most n.
        start: [..., n, columns] vectors of an earlier step that an iteration may begin with.
        tol: stop when ||K v - lambda v|| <= tol lambda_1 for every pair; None: 1e-6 (float32), 1e-12 (float64).

    Returns:
        values [..., k] descending, vectors [..., n, k] orthonormal, residuals [..., k] ||K v - lambda v||.
    """
    tol = default_tolerance(kernel.dtype) if tol is None else tol
    if _direct(kernel) and (start is None or _direct(start)):
        return cpu.topk_eigh(kernel, k, start, tol)
    return torch.ops.catapult.topk_eigh.default(kernel, k, start, tol)


def spectral_norm(kernel: Tensor, *, tol: float | None = None) -> Tensor:
    """Largest eigenvalue [...] of symmetric positive semi-definite matrices [..., n, n].

    `tol` bounds the relative error; None: 1e-6 (float32), 1e-12 (float64).
    """
    tol = default_tolerance(kernel.dtype) if tol is None else tol
    if _direct(kernel):
        return cpu.spectral_norm(kernel, tol)
    return torch.ops.catapult.spectral_norm.default(kernel, tol)


def chain_sgd_(
    layers: Sequence[ChainLayer],
    x: Tensor,
    y: Tensor,
    batch_index: Tensor,
    batch_sizes: Tensor,
    rates: Tensor,
    *,
    observed: Tensor | None = None,
    loss_limit: float = math.inf,
    tol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Many steps of gradient descent on batches, for a chain of Linear layers with one output, in one call.

    L = mean of (f - y)^2 over the batch; each parameter that is trained goes to w - rate dL/dw, in place. Each
    step is what an Observer and `step_` make of it, to rounding, and depends on nothing but the parameters, the
    batch and its rate: however steps are spread over calls, the results have the same bits. On CUDA nothing waits for
    the device, and a captured call replays with what `batch_index` and `rates` then hold, if they are there.

    Args:
        layers: from the input to the output; the last has one row.
        x: all samples [n, d], dtype of the layers.
        y: targets [n] or [n, 1].
        batch_index: samples of all batches, one batch after the other, int64; on the CPU or where x is.
        batch_sizes: b of each step [steps], int64, each >= 1; on the CPU.
        rates: learning rate of each step [steps], float64; on the CPU or where x is.
        observed: whether the kernel of each batch is asked for [steps], bool, on the CPU; None: of all.
        loss_limit: a step whose loss exceeds it is not made, and none after it.
        tol: relative error of lambda_1; None: 1e-6 (float32), 1e-12 (float64).

    Returns:
        losses [steps] and lambda_1 [steps], of the batch before its update; lambda_1 is NaN where not observed.
        The steps stop before the first whose loss or kernel is not finite, or whose loss exceeds the limit: its
        loss is then NaN, or that loss, and everything behind is NaN. On CUDA `cuda.check` raises NonFinite for the NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or samples that do not fit; nothing has been changed then. A
            `batch_index` on a GPU is not read here: a sample that x does not have ends the steps as a NaN does, and
            `cuda.check` raises ValueError.

    Cost of a step: 2 b FLOP per weight for each of forward, sensitivities (not of the first layer) and update, the
    Gram products of `ntk_gram`, and `spectral_norm`. One thread on the CPU. On CUDA three launches, two for each layer
    but the last, and those of the two ops; steps that are not made cost as much. Memory: activations of the largest
    batch.
    """
    observed = torch.ones(rates.shape, dtype=torch.bool) if observed is None else observed
    none = x.new_empty(0)
    arguments = (
        [layer.weight for layer in layers],
        [none if layer.bias is None else layer.bias for layer in layers],
        [layer.weight_scale for layer in layers],
        [layer.bias_scale for layer in layers],
        [layer.slope for layer in layers],
        [layer.trains_weight for layer in layers],
        [layer.trains_bias for layer in layers],
        x, y, batch_index, batch_sizes, rates, observed, loss_limit,
        default_tolerance(x.dtype) if tol is None else tol,
    )  # fmt: skip
    if _direct(x, y, *arguments[0], *arguments[1]):
        return cpu.chain_sgd_(*arguments)
    return torch.ops.catapult.chain_sgd_.default(*arguments)
