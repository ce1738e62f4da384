"""Average gradient outer product (paper eq. 5) and alignment (eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catapult_ext import ops
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.observer import check_input
from catapult_ext.observe.sweep import Sweep

__all__ = ["agop", "agop_alignment", "input_gradients"]


def input_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """D f_ij / d x_i for every sample and output.

    The AGOP is G^T G / n for G these gradients with one row per sample and output; where n c is smaller than d,
    `agop_alignment` takes G itself and never forms a d x d matrix.

    Args:
        model: separable over samples, output (n,) or (n, c); left exactly as found.
        x: samples [n, ...], floating point.

    Returns:
        [n, c, d], x flattened per sample.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        UnsupportedModule: the model couples its samples, or its forward draws random numbers.
        NonFinite: the output is not finite.

    Cost: one forward and c backwards to the input (three of each while the model is certified).
    """
    state = ModelState(model, None)
    check_input(x, state.device)
    with state.untouched():
        sweep = Sweep(state, x, {}, verify="first", input_gradient=True)
        assert sweep.input_gradients is not None
        return sweep.input_gradients.detach().flatten(2)


def agop(model: nn.Module, x: Tensor, *, center: bool = False, max_bytes: int | None = None) -> Tensor:
    """Average gradient outer product: mean over samples of J_x^T J_x, summed over outputs (paper eq. 5).

    Args:
        model: separable over samples, output (n,) or (n, c); left exactly as found.
        x: samples [n, ...], floating point; flattened per sample to d features.
        center: subtract the mean Jacobian over samples first.
        max_bytes: bound of the memory beyond the model's own forward and backward: samples then go through the
            model in blocks (its activations shrink with them as well). Not together with a model that depends on
            the block size; the check for coupled samples sees to that.

    Returns:
        [d, d], symmetric positive semi-definite, dtype of the model.

    Raises:
        TypeError, ValueError: an argument that does not fit; `max_bytes` too small names the smallest that works.
        UnsupportedModule: the model couples its samples, or its forward draws random numbers.
        NonFinite: the output or the result is not finite.

    Cost: one forward, c backwards to the input and n c d^2 multiply-adds.
    """
    state = ModelState(model, None)
    check_input(x, state.device)
    n, d = x.shape[0], x[0].numel()
    block = n if max_bytes is None else _block(state, x, center, max_bytes)
    parts = []
    total = torch.zeros(d, d, dtype=state.dtype, device=state.device)
    for first in range(0, n, block):
        gradients = input_gradients(model, x[first : first + block])  # [block, c, d]
        if center:
            parts.append(gradients)  # the mean is over all samples
        else:
            ops.agop_reduce(gradients.flatten(0, 1), 1.0 / n, out=total)
    if center:
        gradients = torch.cat(parts)
        ops.agop_reduce((gradients - gradients.mean(0)).flatten(0, 1), 1.0 / n, out=total)
    return total


def _block(state: ModelState, x: Tensor, center: bool, max_bytes: int) -> int:
    """Samples per block that keep the d x d result and the gradients of a block within the bound."""
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a positive integer or None, got {max_bytes!r}")
    size = torch.finfo(state.dtype).bits // 8
    n, d = x.shape[0], x[0].numel()
    with state.untouched(), torch.no_grad():
        output = state.model(x[:1])
    c = output.shape[1] if output.dim() == 2 else 1
    # A block's gradients exist once per output and once stacked.
    per_sample = 2 * c * d * size
    fixed = d * d * size + (2 * n * c * d * size if center else 0)
    if max_bytes < fixed + per_sample:
        raise ValueError(
            f"max_bytes: {max_bytes} is too small for d = {d} and c = {c}; the smallest bound that works is "
            f"{fixed + per_sample}"
        )
    return max(1, min(n, (max_bytes - fixed) // per_sample))


def agop_alignment(g: Tensor, h: Tensor) -> Tensor:
    """Cosine of two AGOPs, tr(G^T H) / (||G||_F ||H||_F) (paper eq. 6).

    Args:
        g: AGOP [d, d], or gradients [n, c, d] (`input_gradients`) of which G = sum of outer products.
        h: the same for the other; either may be given in either form.

    Returns:
        0-dim float64 in [0, 1]; scale-free. NaN for a zero AGOP is refused, not returned.

    Raises:
        ValueError: shapes that do not fit, or an AGOP that is zero.
        TypeError: no floating-point tensors.

    Cost: 2 d^2 for two matrices; with gradients on both sides 2 rows rows' d instead of anything d x d.
    """
    for name, value in (("g", g), ("h", h)):
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: expected a float32 or float64 tensor, got {getattr(value, 'dtype', type(value))}"
            )
        if value.dim() not in (2, 3) or (value.dim() == 2 and value.shape[0] != value.shape[1]):
            raise ValueError(f"{name}: expected shape (d, d) or (n, c, d), got {tuple(value.shape)}")
    if g.shape[-1] != h.shape[-1]:
        raise ValueError(f"h: expected d = {g.shape[-1]} features as g has, got {h.shape[-1]}")
    inner = _inner(g, h)
    squares = _inner(g, g) * _inner(h, h)
    if not bool(squares > 0):
        raise ValueError("g, h: expected AGOPs that are not zero, got one whose norm is zero")
    return inner / squares.sqrt()


def _inner(g: Tensor, h: Tensor) -> Tensor:
    """<G, H>_F in float64 for matrices [d, d] or gradients [n, c, d]."""
    if g.dim() == 2 and h.dim() == 2:
        return (g.double() * h.double()).sum()
    if g.dim() == 3 and h.dim() == 3:
        dtype = torch.promote_types(g.dtype, h.dtype)
        return ops.agop_inner(g.flatten(0, 1).to(dtype), h.flatten(0, 1).to(dtype))
    factor, matrix = (g, h) if g.dim() == 3 else (h, g)
    rows = factor.flatten(0, 1).double()  # [n c, d]
    return ((rows @ matrix.double()) * rows).sum()
