"""AGOPs of layers and their correlation with W^T W, from the gradients that a sweep has left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.observe.layer_gradients import LayerGradients
from catapult_ext.outer_products import (
    check_norm,
    correlation_or_nan,
    power_rows,
    raised_and_normalized,
)

__all__ = ["add_outer_products", "correlations", "factors", "finished"]


def add_outer_products(
    total: dict[str, Tensor],
    layers: Mapping[str, LayerGradients],
    *,
    scale: float,
    positions: str,
    means: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
) -> None:
    """Total [d, d] of each layer += scale G^T G of some samples.

    Args:
        total: by name; what is missing is made.
        layers: of these samples.
        scale: 1 or 1 / n.
        positions: "sum" or "mean".
        means: of B over all samples, [c, T, w] by name, to subtract; None for none.
        dtype: of what is made.
    """
    for name, layer in layers.items():
        d = layer.weight.shape[1]
        if name not in total:
            total[name] = layer.weight.new_zeros((d, d), dtype=dtype)
        centered = layer if means is None else layer.centered(means[name])
        centered.add_outer_product(total[name], scale / (layer.positions if positions == "mean" else 1))


def finished(
    total: Mapping[str, Tensor], power: float, normalize: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """AGOPs by name, raised to the power and normalized.

    Raises:
        ValueError: one that is zero is to be normalized.
    """
    return {
        name: raised_and_normalized(matrix, power, normalize, f"the AGOP of {name}").to(dtype)
        for name, matrix in total.items()
    }


def factors(
    layers: Mapping[str, LayerGradients],
    *,
    scale: float,
    positions: str,
    center: bool,
    power: float,
    normalize: str | None,
) -> dict[str, Tensor]:
    """Factors F [1, r, d] of AGOPs F^T F by the same conventions, without any matrix d x d where r < d.

    Raises:
        ValueError: an AGOP that is zero is to be normalized.
    """
    result = {}
    for name, layer in layers.items():
        centered = layer.centered(layer.sensitivities.mean(0)) if center else layer
        each = scale / (layer.positions if positions == "mean" else 1)
        factor = _powered(centered, power, each ** (power / 2))
        if normalize is not None:
            factor = factor / _norm(factor, normalize, f"the AGOP of {name}").sqrt()
        result[name] = factor.to(layer.weight.dtype).unsqueeze(0)
    return result


def _norm(factor: Tensor, normalize: str, what: str) -> Tensor:
    """Norm of F^T F, 0-dim float64."""
    if normalize == "frobenius":
        norm = ops.agop_inner(factor, factor).sqrt()
    else:  # the largest entry of a positive semi-definite matrix is on its diagonal
        diagonal = factor.square().sum(0, dtype=torch.float64)  # [d]
        norm = diagonal.max() if normalize == "max" else diagonal.sum()
    return check_norm(norm, normalize, what)


def correlations(
    layers: Mapping[str, LayerGradients],
    *,
    initial: Mapping[str, Tensor] | None,
    parameters: Mapping[str, Tensor],
    center: bool,
    power: float,
    correlation: str,
) -> dict[str, Tensor]:
    """Correlation of each layer's W^T W with a power of its AGOP: what `nfa_correlation` returns.

    Args:
        layers: of all samples.
        initial: values to subtract from the weights first, by name.
        parameters: by name.
        center: subtract the mean over samples of each output's gradient at each position.
        power: of the AGOP.
        correlation: "pearson" or "cosine".

    Raises:
        ValueError: a layer without a value in `initial`.
    """
    result = {}
    for name, layer in layers.items():
        weight = layer.weight
        if initial is not None:
            weight = weight - layer.as_matrix(_initial(initial, name, parameters[name]))
        if center:
            layer = layer.centered(layer.sensitivities.mean(0))
        result[name] = correlation_or_nan(_smaller(_powered(layer, power)), _smaller(weight), correlation)
    return result


def _initial(initial: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    value = initial.get(name)
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        raise ValueError(
            f"initial: expected a tensor of shape {tuple(parameter.shape)} for {name}, got "
            f"{tuple(value.shape) if isinstance(value, Tensor) else value!r}"
        )
    return value.detach().to(parameter)


def _smaller(rows: Tensor) -> Tensor:
    """G^T G of rows [r, d]: as [1, r, d], or the matrix [d, d] where that is smaller."""
    return rows.unsqueeze(0) if rows.shape[0] < rows.shape[1] else ops.agop_reduce(rows.contiguous())


def _powered(layer: LayerGradients, power: float, scale: float = 1.0) -> Tensor:
    """Scale N [r, d], N^T N = (G^T G)^power, in float64 for a power other than 1: roots enlarge rounding."""
    if power == 1.0:
        return layer.factor(layer.weight.dtype, scale)
    factor = layer.factor(torch.float64)  # [r, d]
    if factor.shape[0] >= factor.shape[1]:
        return power_rows(ops.agop_reduce(factor), power) * scale
    # F = U S V^T, so that (F^T F)^p = V S^2p V^T: with N = S^p V^T it is N^T N.
    _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
    return (values.pow(power) * scale).unsqueeze(1) * vectors
