"""A model's output as a matrix, and which outputs count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catapult_ext.observe.inputs import Inputs, count

__all__ = ["check_target", "output_weights", "outputs_2d"]


def outputs_2d(output: Any, x: Inputs) -> Tensor:
    """The model's output as [n, c].

    Raises:
        TypeError: the output is no floating-point tensor.
        ValueError: its shape is neither [n] nor [n, c], or no parameter that requires grad reaches it.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"model: expected a tensor as output, got {type(output).__name__}")
    if output.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model: expected a float32 or float64 output, got {output.dtype}")
    if output.dim() not in (1, 2) or output.shape[0] != count(x):
        raise ValueError(
            f"model: expected an output of shape (n,) or (n, c) with n = {count(x)}, got {tuple(output.shape)}"
        )
    if output.grad_fn is None:
        raise ValueError("model: its output does not depend on a parameter that requires grad")
    if output.dim() == 2:
        return output
    with torch.enable_grad():  # wherever the caller is: the view is part of the graph
        return output.unsqueeze(1)


def check_target(y: Any, output: Tensor) -> Tensor:
    """Y as [n, c]; (n,) is taken for one output only, everything else would broadcast silently.

    Raises:
        TypeError: y is no floating-point tensor of the output's dtype.
        ValueError: its shape or device differs from the output's.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor of shape {tuple(output.shape)}, got {type(y).__name__}")
    if y.dtype != output.dtype:
        raise TypeError(f"y: expected {output.dtype} as the model's output, got {y.dtype}")
    if y.device != output.device:
        raise ValueError(f"y: expected a tensor on {output.device} as the model is, got {y.device}")
    n, c = output.shape
    if y.shape == (n, c):
        return y
    if c == 1 and y.shape == (n,):
        return y.unsqueeze(1)
    expected = f"(n, c) = ({n}, {c})" + (f" or ({n},)" if c == 1 else "")
    raise ValueError(f"y: expected shape {expected}, got {tuple(y.shape)}")


def output_weights(outputs: str | int, output: Tensor) -> Tensor | None:
    """Output weights [1, c] of "sum" or of one output; None for all outputs."""
    c = output.shape[1]
    if outputs == "all":
        return None
    if outputs == "sum":
        return output.new_ones(1, c)
    if not isinstance(outputs, int) or isinstance(outputs, bool) or not 0 <= outputs < c:
        raise ValueError(
            f"outputs: expected 'all', 'trace', 'sum' or an integer in 0 .. {c - 1}, got {outputs!r}"
        )
    return torch.eye(c, dtype=output.dtype, device=output.device)[outputs : outputs + 1]
