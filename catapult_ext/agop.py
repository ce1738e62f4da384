"""Average gradient outer product (paper eq. 5) and alignment (eq. 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from catapult_ext import ops
from catapult_ext.observe.inputs import check_input
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep

__all__ = [
    "agop",
    "agop_alignment",
    "check_conventions",
    "check_max_bytes",
    "correlation_or_nan",
    "input_gradients",
    "power_rows",
    "raised_and_normalized",
]

_REDUCTIONS = ("mean", "sum")
_NORMS = (None, "max", "trace", "frobenius")
_CORRELATIONS = ("cosine", "pearson")


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
        power: matrix power of the AGOP, > 0; 1/2 is the exponent of the neural feature ansatz.
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
    scale = 1.0 / n if reduction == "mean" else 1.0
    parts = []
    dtype = state.dtype if power == 1.0 else torch.float64  # roots enlarge the rounding of small eigenvalues
    total = torch.zeros(d, d, dtype=dtype, device=state.device)
    for first in range(0, n, block):
        gradients = input_gradients(model, x[first : first + block]).to(dtype)  # [block, c, d]
        if center:
            parts.append(gradients)  # the mean is over all samples
        else:
            ops.agop_reduce(gradients.flatten(0, 1), scale, out=total)
    if center:
        gradients = torch.cat(parts)
        ops.agop_reduce((gradients - gradients.mean(0)).flatten(0, 1), scale, out=total)
    return raised_and_normalized(total, power, normalize, "the AGOP of the input").to(state.dtype)


def check_conventions(**given: object) -> None:
    """Check the keywords that choose between conventions.

    Raises:
        ValueError: a value that is none of a keyword's.
    """
    allowed = {"reduction": _REDUCTIONS, "positions": ("sum", "mean"), "normalize": _NORMS}
    allowed["correlation"] = _CORRELATIONS
    for name, value in given.items():
        if name == "power":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
                raise ValueError(f"power: expected a positive number, got {value!r}")
        elif value not in allowed[name]:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed[name]))}, got {value!r}")


def raised_and_normalized(total: Tensor, power: float, normalize: str | None, what: str) -> Tensor:
    """(AGOP)^power [d, d], then divided by the chosen norm.

    Raises:
        ValueError: the norm is zero; `what` says of which matrix.
    """
    if power != 1.0:
        total = ops.agop_reduce(power_rows(total, power))
    if normalize is None:
        return total
    norm = {"max": total.max, "trace": total.trace, "frobenius": total.norm}[normalize]()
    if not bool(norm > 0):
        raise ValueError(f"normalize: {what} is zero and cannot be divided by its {normalize}")
    return total / norm


def power_rows(agop: Tensor, power: float) -> Tensor:
    """N [d, d] in float64 with N^T N = agop^power; negative eigenvalues, which are rounding, count as zero."""
    values, vectors = torch.linalg.eigh(agop.double())
    return (vectors * values.clamp_min(0) ** (power / 2)).t().contiguous()


def check_max_bytes(max_bytes: int) -> None:
    """Raise ValueError unless it is a positive integer."""
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a positive integer or None, got {max_bytes!r}")


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


def correlation_or_nan(g: Tensor, h: Tensor, correlation: str) -> Tensor:
    """`agop_alignment` of checked arguments, NaN where it is not defined."""
    means = correlation == "pearson"
    squares_g, squares_h = _inner(g, g, means), _inner(h, h, means)
    # A constant matrix leaves rounding when its mean is subtracted.
    least_g, least_h = (1e-13 * _inner(m, m, False) if means else 0.0 for m in (g, h))
    if not (bool(squares_g > least_g) and bool(squares_h > least_h)):
        return torch.full_like(squares_g, math.nan)
    return _inner(g, h, means) / (squares_g * squares_h).sqrt()


def _inner(g: Tensor, h: Tensor, means: bool) -> Tensor:
    """<G, H>_F in float64 for matrices [d, d] or gradients [n, c, d], without the means of their entries if wanted."""
    if g.dim() == 2 and h.dim() == 2:
        g, h = g.double(), h.double()
        return ((g - g.mean()) * (h - h.mean())).sum() if means else (g * h).sum()
    if g.dim() == 3 and h.dim() == 3:
        dtype = torch.promote_types(g.dtype, h.dtype)
        inner = ops.agop_inner(g.flatten(0, 1).to(dtype), h.flatten(0, 1).to(dtype))
    else:
        factor, matrix = (g, h) if g.dim() == 3 else (h, g)
        rows = factor.flatten(0, 1).double()  # [n c, d]
        inner = ((rows @ matrix.double()) * rows).sum()
    return inner - _sum(g) * _sum(h) / g.shape[-1] ** 2 if means else inner


def _sum(g: Tensor) -> Tensor:
    """Sum of all entries of an AGOP, 1^T G 1."""
    if g.dim() == 2:
        return g.double().sum()
    return g.double().sum(-1).square().sum()
