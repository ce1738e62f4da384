"""Every op in plain PyTorch: the readable twin of the compiled kernels and what they are tested against.

Shapes are those of the schemas in `_schema.py`. Nothing here is fast, and nothing here is approximate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "agop_inner",
    "agop_reduce_",
    "chain_sgd_",
    "conv2d_tiles",
    "jacobian_accumulate_conv2d_",
    "jacobian_accumulate_tile_",
    "jacobian_accumulate_tokens_",
    "ntk_gram_",
    "ntk_gram_cross_",
    "spectral_norm",
    "token_tiles",
    "topk_eigh",
]


def _product(xa: Tensor, xb: Tensor, za: Tensor, zb: Tensor, scale: float, beta: float) -> Tensor:
    """Return scale (A A'^T + beta) * (B B'^T) with the A part repeated over outputs: [n c, m c]."""
    xb = xb.unsqueeze(1) if xb.dim() == 2 else xb  # [n, c, mb]
    zb = zb.unsqueeze(1) if zb.dim() == 2 else zb  # [m, c, mb]
    n, c, _ = xb.shape
    m = zb.shape[0]
    features = xa @ za.T + beta  # [n, m]
    sensitivities = xb.reshape(n * c, -1) @ zb.reshape(m * c, -1).T  # [n c, m c]
    return scale * features.repeat_interleave(c, 0).repeat_interleave(c, 1) * sensitivities


def ntk_gram_(
    kernel: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
    accumulate: bool,
) -> None:
    """K (+)= sum_l scale_l (A_l A_l^T + beta_l) * (B_l B_l^T); a: [n, ma], b: [n, mb] or [n, c, mb]."""
    ntk_gram_cross_(kernel, a, b, a, b, scale, beta, accumulate)
    kernel.copy_(torch.tril(kernel) + torch.tril(kernel, -1).T)


def ntk_gram_cross_(
    kernel: Tensor,
    xa: Sequence[Tensor],
    xb: Sequence[Tensor],
    za: Sequence[Tensor],
    zb: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
    accumulate: bool,
) -> None:
    """K(x, z) (+)= sum_l scale_l (A_l A'_l^T + beta_l) * (B_l B'_l^T): [n c, m c]."""
    if not accumulate:
        kernel.zero_()
    for a, b, c, d, s, t in zip(xa, xb, za, zb, scale, beta, strict=True):
        kernel.add_(_product(a, b, c, d, s, t))


def jacobian_accumulate_tile_(
    kernel: Tensor, grad: Tensor | None, tile: Tensor, weight: Tensor | None
) -> None:
    """K += G G^T and grad += G^T w for a tile G [N, q]; kernel [N, N], grad [q], weight [N]."""
    gram = tile @ tile.T  # [N, N]
    kernel.add_(torch.tril(gram) + torch.tril(gram, -1).T)
    if grad is not None and weight is not None:
        grad.addmv_(tile.T, weight)


def _rows_per_tile(total: int, bytes_per_row: int, tile_bytes: int) -> int:
    return max(1, min(total, tile_bytes // max(1, bytes_per_row)))


def token_tiles(a: Tensor, b: Tensor, scale: float, tile_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows of the weight, G [N, rows, in]) of a Linear; a [n, T, in], b [n, c, T, out]."""
    n, c, positions, width = b.shape
    step = _rows_per_tile(width, n * c * a.shape[-1] * b.element_size(), tile_bytes)
    features = a.unsqueeze(1).expand(n, c, positions, a.shape[-1]).reshape(n * c, positions, -1)
    for first in range(0, width, step):
        rows = slice(first, min(width, first + step))
        part = b[..., rows].reshape(n * c, positions, -1)  # [N, T, rows]
        yield rows, torch.bmm(part.transpose(1, 2), features).mul_(scale)  # [N, rows, in]


def jacobian_accumulate_tokens_(
    kernel: Tensor,
    grad: Tensor | None,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
    tile_bytes: int,
) -> None:
    """K += G G^T, grad [out, in] += sum_N w G, G = scale sum_t b_t a_t^T; a [n, T, in], b [n, c, T, out]."""
    for rows, tile in token_tiles(a, b, scale, tile_bytes):
        part = None if grad is None else grad[rows].reshape(-1)
        jacobian_accumulate_tile_(kernel, part, tile.flatten(1), weight)
        if grad is not None and part is not None:
            grad[rows] = part.view_as(grad[rows])


def conv2d_tiles(
    input: Tensor,
    b: Tensor,
    scale: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile_bytes: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (output channels, G [N, channels, in / groups, kh, kw]) of a convolution, by unfolding.

    input [n, C, H, W], b [n, c, O, Ho, Wo]. A tile never crosses a group.
    """
    n, c, width = b.shape[:3]
    per_group = width // groups
    columns = torch.nn.functional.unfold(
        input, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride)
    )
    positions = columns.shape[-1]
    columns = columns.view(n, groups, -1, positions)  # [n, groups, in / groups * kh * kw, Ho Wo]
    step = _rows_per_tile(per_group, n * c * columns.shape[2] * b.element_size(), tile_bytes)
    for group in range(groups):
        patches = columns[:, group].unsqueeze(1).expand(n, c, -1, positions).reshape(n * c, -1, positions)
        for first in range(0, per_group, step):
            rows = slice(group * per_group + first, group * per_group + min(per_group, first + step))
            part = b[:, :, rows].reshape(n * c, -1, positions)  # [N, rows, Ho Wo]
            tile = torch.bmm(part, patches.transpose(1, 2)).mul_(scale)
            yield rows, tile.view(n * c, -1, input.shape[1] // groups, *kernel_size)


def jacobian_accumulate_conv2d_(
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
    """K += G G^T, grad [O, C / groups, kh, kw] += sum_N w G, G the per-sample gradients of a convolution."""
    for rows, tile in conv2d_tiles(
        input, b, scale, kernel_size, stride, padding, dilation, groups, tile_bytes
    ):
        part = None if grad is None else grad[rows].reshape(-1)
        jacobian_accumulate_tile_(kernel, part, tile.flatten(1), weight)
        if grad is not None and part is not None:
            grad[rows] = part.view_as(grad[rows])


def topk_eigh(kernel: Tensor, k: int, start: Tensor | None, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Largest k eigenpairs by a full decomposition in float64; `start` and `tol` are not needed here."""
    matrix = torch.tril(kernel.double())
    matrix = matrix + torch.tril(matrix, -1).mT
    values, vectors = torch.linalg.eigh(matrix)
    values = values.flip(-1)[..., :k]  # [..., k]
    vectors = vectors.flip(-1)[..., :k]  # [..., n, k]
    if vectors.numel():
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    values, vectors = values.to(kernel.dtype), vectors.to(kernel.dtype)
    # of the pairs as returned, their rounding included
    residuals = (matrix @ vectors.double() - vectors.double() * values.double().unsqueeze(-2)).norm(dim=-2)
    return values, vectors, residuals.to(kernel.dtype)  # [..., k], [..., n, k], [..., k]


def spectral_norm(kernel: Tensor, tol: float) -> Tensor:
    """Largest eigenvalue [...] of symmetric positive semi-definite matrices [..., n, n]; 0 for n = 0."""
    if kernel.shape[-1] == 0:
        return kernel.new_zeros(kernel.shape[:-2])
    return torch.linalg.eigvalsh(kernel.double())[..., -1].to(kernel.dtype)


def agop_reduce_(agop: Tensor, g: Tensor, scale: float) -> None:
    """Agop [d, d] += scale G^T G for input gradients G [rows, d]."""
    gram = g.T @ g
    agop.add_(torch.tril(gram) + torch.tril(gram, -1).T, alpha=scale)


def agop_inner(g: Tensor, h: Tensor) -> Tensor:
    """<G^T G, H^T H>_F = ||G H^T||_F^2 as a float64 scalar; g [rows, d], h [rows', d]."""
    return (g.double() @ h.double().T).square().sum()


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
    """Losses and lambda_1 [steps] of gradient steps on batches of x [n, d], y [n]; see `ops.chain_sgd_`."""
    depth = len(weights)
    losses, lambda_1 = (x.new_full(rates.shape, float("nan")) for _ in range(2))
    for step, indices in enumerate(batch_index.split(batch_sizes.tolist())):
        a, b = (
            [x[indices]],
            [x.new_ones(len(indices), 1)],
        )  # inputs of the layers; sensitivities from the last on
        for layer in range(depth):
            z = weight_scale[layer] * a[-1] @ weights[layer].T
            if biases[layer].numel():
                z = z + bias_scale[layer] * biases[layer]
            a.append(z if layer == depth - 1 else torch.where(z < 0, slope[layer] * z, z))
        for layer in range(depth - 1, 0, -1):
            below = weight_scale[layer] * b[0] @ weights[layer]
            b.insert(0, torch.where(a[layer] > 0, below, slope[layer - 1] * below))
        residual = a[-1] - y[indices].view(-1, 1)  # [b, 1]
        loss = residual.square().mean()
        if not bool(loss.isfinite()):
            break
        if bool(observed[step]):
            has_bias = [flag and bias.numel() > 0 for flag, bias in zip(trains_bias, biases, strict=True)]
            scales = list(zip(weight_scale, bias_scale, trains_weight, has_bias, strict=True))
            parts = [
                ((w * tw) ** 2 * a[layer] @ a[layer].T + (s * tb) ** 2) * (b[layer] @ b[layer].T)
                for layer, (w, s, tw, tb) in enumerate(scales)
            ]
            kernel = torch.stack(parts).sum(0)  # [b, b]
            if not kernel.isfinite().all():
                break
            lambda_1[step] = spectral_norm(kernel, tol)
        losses[step] = loss
        if not float(loss) <= loss_limit:
            break
        for layer in range(depth):
            d = b[layer] * residual * (-2 * float(rates[step]) / len(indices))  # [b, out]
            if trains_weight[layer]:
                weights[layer].add_(d.T @ a[layer], alpha=weight_scale[layer])
            if trains_bias[layer] and biases[layer].numel():
                biases[layer].add_(d.sum(0), alpha=bias_scale[layer])
    return losses, lambda_1
