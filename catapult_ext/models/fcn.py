"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from catapult_ext.models.layers import Parameterization, fix_layers, positive_int

__all__ = ["FCN"]


class FCN(nn.Module):
    """Fully connected ReLU network with a linear output layer: (n, ...) to (n, out_features).

    "L-layer" counts weight layers: the 5-layer network of the paper has `depth=5`, which is 4 hidden layers
    and the output layer. Layer l is `self.layers[l]`, also in `fixed_layers` and in the state dict.

    Args:
        in_features: numbers per sample; inputs of more than two dimensions are flattened to it.
        width: units of each hidden layer.
        depth: number of weight layers; 1 is a linear model.
        out_features: outputs c.
        parameterization: "ntk" (Appendix F of the paper, no sqrt(2)) or "standard" (PyTorch's default
            initialisation and scaling, with biases).
        bias_scale: factor of the NTK biases, which exist only where it is not 0. Biases of scale 1 bring the
            critical rate of every network tried down to .3 - .7, far from the paper's; hence none by default.
        weight_std: standard deviation of the initial NTK weights.
        fixed_layers: indices of layers that are not trained.
        generator: CPU generator that draws the initial values; the global one when None.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int = 1,
        *,
        parameterization: str = "ntk",
        bias_scale: float = 0.0,
        weight_std: float = 1.0,
        fixed_layers: Iterable[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        positive_int("width", width)
        positive_int("depth", depth)
        positive_int("out_features", out_features)
        kind = Parameterization(parameterization, bias_scale, weight_std, generator)
        sizes = [in_features, *[width] * (depth - 1), out_features]
        self.layers = nn.ModuleList(kind.linear(m, k) for m, k in pairwise(sizes))
        fix_layers(self.layers, fixed_layers)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (n, ...) with in_features numbers per sample, in the dtype of the weights, to (n, c)."""
        h = x.flatten(1) if x.dim() > 2 else x  # [n, d]
        if h.shape[1:] != (self.in_features,):
            raise ValueError(
                f"x must hold in_features={self.in_features} numbers per sample, "
                f"got a tensor of shape {tuple(x.shape)}"
            )
        *hidden, output = self.layers
        for layer in hidden:
            # Not in place: it saves no time here, and forward hooks would find their tensor overwritten.
            h = torch.relu(layer(h))  # [n, width]
        return output(h)  # [n, c]
