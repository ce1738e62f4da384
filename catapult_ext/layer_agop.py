"""AGOP of every layer's input, and its correlation with the layer's own W^T W (neural feature ansatz)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from catapult_ext.errors import UnsupportedModule
from catapult_ext.graph import Plan
from catapult_ext.observe.inputs import check_input
from catapult_ext.observe.layer_features import add_outer_products, correlations, finished
from catapult_ext.observe.layer_gradients import LayerGradients
from catapult_ext.observe.layer_gradients import layer_gradients as factors_of
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep
from catapult_ext.outer_products import check_conventions
from catapult_ext.stream.job import check_max_bytes

__all__ = ["layer_agop", "layer_gradients", "nfa_correlation"]


def layer_gradients(
    model: nn.Module, x: Tensor, *, params: Iterable[str | Tensor] | None = None
) -> dict[str, Tensor]:
    """D f_ij / d (input of a layer) for every layer: what `layer_agop` averages the outer products of.

    `agop_alignment` takes these themselves, so that two layers' AGOPs are compared without a d x d matrix; for the
    linear layer behind a flattened map (d = 32768 at 32 channels of 32 x 32) that matrix would have 4 GiB.

    Args:
        model: as for `layer_agop`; left exactly as found.
        x: samples [n, ...].
        params: names or tensors of the layers; default all layers that require grad.

    Returns:
        By parameter name [n, c T, d], index j T + t in the middle; several uses of a weight follow each other in no
        particular order. The AGOP is G^T G / n of the rows.

    Raises:
        TypeError, ValueError, UnsupportedModule, NonFinite: as `layer_agop`.

    Cost: the sweep of `layer_agop`, then n c T w d multiply-adds for each layer.
    """
    state = ModelState(model, params)
    check_input(x, state.device)
    with state.untouched(), torch.no_grad():
        layers = next(_Source(state, x, params is not None).blocks(len(x)))
        return {name: layer.gradients().unflatten(0, (len(x), -1)) for name, layer in layers.items()}


def layer_agop(
    model: nn.Module,
    x: Tensor,
    *,
    params: Iterable[str | Tensor] | None = None,
    center: bool = False,
    reduction: str = "mean",
    positions: str = "sum",
    normalize: str | None = None,
    power: float = 1.0,
    max_bytes: int | None = None,
) -> dict[str, Tensor]:
    """AGOP with respect to the input of every layer, from the sensitivities of one sweep.

    A layer is a parameter that acts as the weight W of matrix products or convolutions (not transposed ones). Its
    AGOP is the mean over samples of the outer products of the gradients B W with respect to what W is multiplied
    with, through this layer alone (where a residual branch takes the same input, its part is not included), summed
    over outputs and positions:

    - a linear layer: its input vector, at each of T tokens; d = in_features;
    - a convolution: the patch under the filters at each output position (patch AGOP), entries ordered as the filters,
      (channel, row, column). Entries that lie on the padding count. With groups a patch still holds all channels;
    - a weight used several times: all its uses, each a set of positions more.

    Biases, gains, lookup tables (`nn.Embedding`) and added or multiplied parameters are no layers and left out, and so
    are parameters that the output does not depend on and vectors on the exact fallback.

    Args:
        model: output (n,) or (n, c); left exactly as found.
        x: samples [n, ...]; integer tokens as well.
        params: names or tensors of the layers; default all layers that require grad.
        center: subtract the mean over samples of each output's gradient at each position first.
        reduction: "mean" or "sum" over samples.
        positions: "sum" or "mean" over the positions of a sample (of all uses together).
        normalize: as in `agop`: None, "max", "trace" or "frobenius", done last.
        power: matrix power of the AGOP, > 0. Powers of 1/2 and more are within 1e-10 in float64 and 1e-5 in float32,
            relative to the largest entry; smaller ones p enlarge the rounding of float32 to (6e-8)^(2 p). Eigenvalues
            below d + 8 roundings of the largest (2e-16 each, also from float32) count as zero.
        max_bytes: bound of the memory beyond the model's own forward and backward: samples then go through the
            model in blocks, twice with `center`.

    Returns:
        By parameter name [d, d], symmetric positive semi-definite, dtype of the model. For the first layer of a
        network that takes x in no other place this is `agop`. Where d is too large for d x d: `layer_gradients`.

    Raises:
        TypeError, ValueError: an argument that does not fit; `max_bytes` too small names the smallest that works; an
            AGOP of zero that is to be normalized.
        UnsupportedModule: a layer whose sensitivities are not known sample by sample (it takes the exact fallback, or
            the network couples its samples behind it), a matrix used in another way than above, or a parameter of
            `params` that is no layer. The message names it.
        NonFinite: the output or a result is not finite.

    Cost: one forward and c backwards to the layers (twice more for certification), then for each layer with
    W [w, d] and n c T rows of B the cheaper of n c T d (w + d / 2) and n c T w^2 / 2 + w d (w + d) multiply-adds.

    Source: paper eq. 5; Radhakrishnan et al., Science 2024, for the layers; Beaglehole et al. 2023 for patches.
    """
    check_conventions(reduction=reduction, positions=positions, normalize=normalize, power=power)
    state = ModelState(model, params)
    check_input(x, state.device)
    with state.untouched():
        source = _Source(state, x, params is not None)
        block = len(x) if max_bytes is None else source.block(center, power, max_bytes)
        means = source.means(block) if center and block < len(x) else {}
        total: dict[str, Tensor] = {}
        # Roots enlarge the rounding of small eigenvalues.
        dtype = state.dtype if power == 1.0 else torch.float64
        scale = 1.0 / len(x) if reduction == "mean" else 1.0
        for layers in source.blocks(block):
            if center and block >= len(x):
                means = {name: layer.sensitivities.mean(0) for name, layer in layers.items()}
            add_outer_products(
                total, layers, scale=scale, positions=positions, means=means or None, dtype=dtype
            )
    return finished(total, power, normalize, state.dtype)


class _Source:
    """Layer gradients of x, block by block."""

    def __init__(self, state: ModelState, x: Tensor, strict: bool) -> None:
        self._state = state
        self._x = x
        self._names = state.names if strict else None
        self._plans: dict[object, Plan] = {}

    def _sweep(self, x: Tensor, check_coupling: bool) -> dict[str, LayerGradients]:
        sweep = Sweep(
            self._state, x, self._plans, verify="first", input_gradient=check_coupling, layer_inputs=True
        )
        with torch.no_grad():
            return factors_of(sweep, self._names)

    def blocks(self, size: int) -> Iterator[dict[str, LayerGradients]]:
        """The layers of x[0 : size], x[size : 2 size], ..."""
        parts = self._x.split(size)
        shapes = None
        for part in parts:
            # Blocks of a network that couples its samples are another network's.
            layers = self._sweep(part, len(parts) > 1 and part.dtype.is_floating_point)
            found = {name: layer.sensitivities.shape[1:] for name, layer in layers.items()}
            if shapes not in (None, found):
                raise UnsupportedModule(
                    "model: its layers differ from block to block of the samples; leave out max_bytes"
                )
            shapes = found
            yield layers

    def means(self, size: int) -> dict[str, Tensor]:
        """Means over all samples of B, [c, T, w]."""
        total: dict[str, Tensor] = {}
        for layers in self.blocks(size):
            for name, layer in layers.items():
                part = layer.sensitivities.sum(0)
                total[name] = total[name] + part if name in total else part
        return {name: part / len(self._x) for name, part in total.items()}

    def block(self, center: bool, power: float, max_bytes: int) -> int:
        """Samples per block that keep results, sensitivities and temporaries within the bound."""
        check_max_bytes(max_bytes)
        few = self._x[:2]  # a normalisation over the batch refuses a single one
        layers = self._sweep(few, False).values()
        size = torch.finfo(self._state.dtype).bits // 8 if power == 1.0 else 8
        kept = working = fixed = temporary = 0
        for layer in layers:
            w, d = layer.weight.shape
            kept += layer.sensitivities.numel() + (0 if layer.formed is None else layer.formed.numel())
            # B in the order of rows, or centred, and B W.
            working = max(working, 2 * layer.sensitivities.numel() + layer.rows * d)
            fixed += d * d
            # B^T B and its product with W; W in float64 or an eigendecomposition for a power.
            temporary = max(temporary, w * (w + d) + d * d + (0 if power == 1.0 else w * d + 4 * d * d))
        kept, working = -(-kept // len(few)), -(-working // len(few))  # of one sample
        per_sample = (kept + working) * size
        fixed = (fixed + temporary + (2 * kept if center else 0)) * size
        if max_bytes < fixed + per_sample:
            raise ValueError(
                f"max_bytes: {max_bytes} is too small for the AGOPs of {len(layers)} layers; the smallest bound that "
                f"works is {fixed + per_sample}"
            )
        return max(1, min(len(self._x), (max_bytes - fixed) // max(1, per_sample)))


def nfa_correlation(
    model: nn.Module,
    x: Tensor,
    *,
    params: Iterable[str | Tensor] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    center: bool = False,
    power: float = 0.5,
    correlation: str = "pearson",
) -> dict[str, Tensor]:
    """Correlation of each layer's W^T W with a power of its AGOP: how well the neural feature ansatz holds.

    The ansatz says that training makes W^T W (the neural feature matrix) proportional to a power of the AGOP with
    respect to the layer's input. Layers, patches and positions are those of `layer_agop`; scales do not matter.

    Args:
        model: as for `layer_agop`; left exactly as found.
        x: samples [n, ...].
        params: names or tensors of the layers; default all layers that require grad.
        initial: values by parameter name (a state dict will do) to subtract from the weights first, so that
            (W - W_0)^T (W - W_0) is compared; every layer must be in it.
        center: as in `layer_agop`.
        power: of the AGOP, > 0. The default, 1/2, is the exponent for which the ansatz was proved for two-layer linear
            networks.
        correlation: "pearson" or "cosine"; see `agop_alignment`.

    Returns:
        By parameter name 0-dim float64 in [-1, 1] ([0, 1] for "cosine"). NaN where it is not defined: a weight, its
        change or an AGOP that is zero (or, for "pearson", constant, as for a layer with one input).

    Raises:
        TypeError, ValueError: an argument that does not fit.
        UnsupportedModule, NonFinite: as `layer_agop`.

    Cost: that of `layer_agop`; a power other than 1 an eigendecomposition or SVD of each layer's AGOP, in float64. No
    d x d matrix is formed for a layer with n c T < d and w < d.

    Source: Radhakrishnan et al., "Mechanism for feature learning in neural networks and backpropagation-free machine
    learning models", Science 2024, and its code, whose conventions are the defaults (its convolutions take power 1).
    """
    check_conventions(power=power, correlation=correlation)
    state = ModelState(model, params)
    check_input(x, state.device)
    with state.untouched():
        layers = next(_Source(state, x, params is not None).blocks(len(x)))
    named = dict(zip(state.names, state.parameters, strict=True))
    with torch.no_grad():
        return correlations(
            layers,
            initial=initial,
            parameters=named,
            center=center,
            power=power,
            correlation=correlation,
        )
