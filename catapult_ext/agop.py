"""Average gradient outer product (paper eq. 5) and alignment (eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catapult_ext import ops
from catapult_ext.observe.inputs import check_input
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep
from catapult_ext.outer_products import (
    average,
    check_conventions,
    correlation_or_nan,
    raised_and_normalized,
)
from catapult_ext.stream.job import check_max_bytes

__all__ = [
    "agop",
    "agop_alignment",
    "input_gradients",
]


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


def agop(
    model: nn.Module,
    x: Tensor,
    *,
    center: bool = False,
    reduction: str = "mean",
    normalize: str | None = None,
    power: float = 1.0,
    max_bytes: int | None = None,
) -> Tensor:
    """Average gradient outer product: mean over samples of J_x^T J_x, summed over outputs (paper eq. 5).

    Args:
        model: separable over samples, output (n,) or (n, c); left exactly as found.
        x: samples [n, ...], floating point; flattened per sample to d features.
        center: subtract the mean Jacobian over samples first.
        reduction: "mean" or "sum" over samples.
        normalize: divide the result by its largest entry ("max"), its trace ("trace") or its Frobenius norm
            ("frobenius"); done last, so that the result has that quantity equal to 1.
        power: matrix power of the AGOP, > 0; 1/2 is the exponent of the neural feature ansatz. Precision as for
            `layer_agop`.
        max_bytes: bound of the memory beyond the model's own forward and backward: samples then go through the
            model in blocks (its activations shrink with them as well). Not together with a model that depends on
            the block size; the check for coupled samples sees to that.

    Returns:
        [d, d], symmetric positive semi-definite, dtype of the model.

    Raises:
        TypeError, ValueError: an argument that does not fit; `max_bytes` too small names the smallest that works; an
            AGOP of zero that is to be normalized.
        UnsupportedModule: the model couples its samples, or its forward draws random numbers.
        NonFinite: the output or the result is not finite.

    Cost: one forward, c backwards to the input and n c d^2 multiply-adds; a power other than 1 an eigendecomposition.

    Source: paper eq. 5 (the defaults). Centering, scale and power differ between published programs; see
    Radhakrishnan et al., Science 2024, and its code.
    """
    check_conventions(reduction=reduction, normalize=normalize, power=power)
    state = ModelState(model, None)
    check_input(x, state.device)
    n, d = x.shape[0], x[0].numel()
    block = n if max_bytes is None else _block(state, x, center, power, max_bytes)
    blocks = x.split(block)
    what = "the AGOP of the input"
    if center or len(blocks) == 1:  # the mean is over all samples
        gradients = torch.cat([input_gradients(model, each) for each in blocks])  # [n, c, d]
        return average(
            gradients, center=center, reduction=reduction, normalize=normalize, power=power, what=what
        )
    scale = 1.0 / n if reduction == "mean" else 1.0
    dtype = state.dtype if power == 1.0 else torch.float64  # roots enlarge the rounding of small eigenvalues
    total = torch.zeros(d, d, dtype=dtype, device=state.device)
    for each in blocks:
        ops.agop_reduce(input_gradients(model, each).to(dtype).flatten(0, 1), scale, out=total)
    return raised_and_normalized(total, power, normalize, what).to(state.dtype)


def _block(state: ModelState, x: Tensor, center: bool, power: float, max_bytes: int) -> int:
    """Samples per block that keep the d x d result and the gradients of a block within the bound."""
    check_max_bytes(max_bytes)
    size = torch.finfo(state.dtype).bits // 8
    n, d = x.shape[0], x[0].numel()
    with state.untouched(), torch.no_grad():
        output = state.model(x[:1])
    c = output.shape[1] if output.dim() == 2 else 1
    # A block's gradients exist once per output and once stacked.
    per_sample = (2 if power == 1.0 else 4) * c * d * size
    fixed = d * d * (size if power == 1.0 else 48) + (2 * n * c * d * size if center else 0)
    if max_bytes < fixed + per_sample:
        raise ValueError(
            f"max_bytes: {max_bytes} is too small for d = {d} and c = {c}; the smallest bound that works is "
            f"{fixed + per_sample}"
        )
    return max(1, min(n, (max_bytes - fixed) // per_sample))


def agop_alignment(g: Tensor, h: Tensor, *, correlation: str = "cosine") -> Tensor:
    """Cosine of two AGOPs, tr(G^T H) / (||G||_F ||H||_F) (paper eq. 6), or the correlation of their entries.

    Args:
        g: AGOP [d, d], or gradients [n, c, d] (`input_gradients`) of which G = sum of outer products. A weight
            [1, w, d] stands for W^T W.
        h: the same for the other; either may be given in either form.
        correlation: "cosine", or "pearson", which subtracts the mean of all entries from each matrix first.

    Returns:
        0-dim float64, a cosine in [0, 1] or a Pearson correlation in [-1, 1]; scale-free. NaN for a zero AGOP (for
        "pearson" a constant one) is refused, not returned.

    Raises:
        ValueError: shapes that do not fit, or an AGOP that is zero or, for "pearson", constant.
        TypeError: no floating-point tensors.

    Cost: 2 d^2 for two matrices; with gradients on both sides 2 rows rows' d instead of anything d x d.

    Source: paper eq. 6 (cosine); the code of Radhakrishnan et al., Science 2024, correlates (Pearson).
    """
    check_conventions(correlation=correlation)
    for name, value in (("g", g), ("h", h)):
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: expected a float32 or float64 tensor, got {getattr(value, 'dtype', type(value))}"
            )
        if value.dim() not in (2, 3) or (value.dim() == 2 and value.shape[0] != value.shape[1]):
            raise ValueError(f"{name}: expected shape (d, d) or (n, c, d), got {tuple(value.shape)}")
    if g.shape[-1] != h.shape[-1]:
        raise ValueError(f"h: expected d = {g.shape[-1]} features as g has, got {h.shape[-1]}")
    result = correlation_or_nan(g, h, correlation)
    if bool(result.isnan()):
        kind = "zero or constant" if correlation == "pearson" else "zero"
        raise ValueError(f"g, h: expected AGOPs that are not {kind}, got one that is")
    return result
