"""The tangent kernel and the Jacobian of a model, without training it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from catapult_ext import ops
from catapult_ext.observe.assemble import Assembler
from catapult_ext.observe.inputs import Inputs, check_inputs, describe, same_samples
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.outputs import outputs_2d
from catapult_ext.observe.sweep import Sweep

__all__ = ["jacobian", "ntk"]


def ntk(
    model: nn.Module,
    x: Inputs,
    z: Inputs | None = None,
    *,
    outputs: str | int = "all",
    params: Iterable[str | Tensor] | None = None,
    per_parameter: bool = False,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Tangent kernel K(x, z) = <df(x)/dw, df(z)/dw> (paper, definition 1), without the n x p Jacobian.

    Args:
        model: output (n,) or (n, c), float32 or float64; left exactly as found.
        x: samples [n, ...] for model(x); a tuple of such tensors for model(*x), a dict for model(**x).
        z: samples of the columns, m of them; x when None (the kernel is then exactly symmetric).
        outputs: "all" for every pair of outputs; "trace" for the mean over outputs of the diagonal blocks; "sum"
            for the kernel of the summed outputs; an integer for that output. Only "all" gives the critical rate of
            a network with several outputs.
        params: names or tensors of the parameters to include, default all that require grad.
        per_parameter: return one kernel per parameter; they add up to the whole.
        dtype: torch.float64 accumulates and returns double also for a float32 model.
        max_bytes: bound of the memory beyond the model's own forward and backward.

    Returns:
        "all": [n c, m c], row index i c + j (sample-major); otherwise [n, m]. With `per_parameter` a dict of
        such kernels by parameter name.

    Raises:
        TypeError, ValueError: an argument that does not fit; `max_bytes` too small names the smallest that works.
        UnsupportedModule: the model cannot be treated exactly; the message says what to do.
        NonFinite: the output or the kernel is not finite.

    Cost: one forward and c backwards to the layers, then n m (fan-in + c^2 width) multiply-adds a layer (half of
    it without z), or the exact fallback of n c backwards for parameters that no rule covers.
    """
    state = ModelState(model, params)
    check_inputs(x, state.device)
    if z is not None:
        check_inputs(z, state.device, "z")
        if not same_samples(x, z):
            raise ValueError(f"z: expected samples like those of x, {describe(x)}, got {describe(z)}")
    if dtype not in (None, torch.float32, torch.float64) or (
        dtype == torch.float32 and state.dtype == torch.float64
    ):
        raise ValueError(f"dtype: expected None, the model's dtype or torch.float64, got {dtype}")
    with state.untouched():
        wanted = "all" if outputs == "trace" else outputs
        sweep = Sweep(state, x, {}, verify="first", outputs=wanted)
        other = None if z is None else Sweep(state, z, {}, verify="first", outputs=wanted)
        groups = (
            [(i,) for i in range(len(state.names))] if per_parameter else [tuple(range(len(state.names)))]
        )
        kernels = []
        with torch.no_grad():
            for group in groups:
                only = frozenset(group)
                first = Assembler(sweep, dtype=dtype, max_bytes=max_bytes, only=only)
                if other is None:
                    kernel = first.build_kernel()
                else:
                    kernel = _cross(first, Assembler(other, dtype=dtype, max_bytes=max_bytes, only=only))
                kernels.append(_trace(kernel, sweep.outputs) if outputs == "trace" else kernel)
    if per_parameter:
        return dict(zip(state.names, kernels, strict=True))
    return kernels[0]


def _trace(kernel: Tensor, c: int) -> Tensor:
    """Mean over outputs of the diagonal blocks: [n c, m c] -> [n, m]."""
    n, m = kernel.shape[0] // c, kernel.shape[1] // c
    blocks = kernel.view(n, c, m, c)
    return blocks.diagonal(dim1=1, dim2=3).mean(-1)


def _cross(first: Assembler, second: Assembler) -> Tensor:
    """K(x, z): Gram products where both sides have one row per sample, per-sample gradients otherwise."""
    kernel = first.sweep.output.new_zeros((first.rows, second.rows), dtype=first.dtype)
    x_terms, z_terms = first.terms(), second.terms()
    shared = [group for group in x_terms if group in z_terms and x_terms[group][2:] == z_terms[group][2:]]
    if shared:
        xa, xb, scale, beta = zip(*(x_terms[group] for group in shared), strict=True)
        za, zb, _, _ = zip(*(z_terms[group] for group in shared), strict=True)
        ops.ntk_gram_cross(xa, xb, za, zb, scale, beta, out=kernel)
    covered = {i for group in shared for i in group}
    ruled = set(first.kept(first.layout.ruled)) & set(second.layout.ruled)
    for i in sorted(ruled - covered):
        step = first.tile_step(i, second.rows)
        # A side that does not reach the parameter yields no tiles, and its part of the kernel is zero.
        for (_, tile), (_, other) in zip(first.tiles(i, step), second.tiles(i, step), strict=False):
            kernel.addmm_(tile.flatten(1), other.flatten(1).t())
    fallback = {*first.kept(first.layout.rows), *second.kept(second.layout.rows)}
    for i in sorted(fallback):
        left, right = first.whole_jacobian(i), second.whole_jacobian(i)
        kernel.addmm_(left.reshape(first.rows, -1), right.reshape(second.rows, -1).t())
    return kernel


def jacobian(model: nn.Module, x: Inputs, *, params: Iterable[str | Tensor] | None = None) -> Tensor:
    """Jacobian of the outputs with respect to the parameters, row by row through autograd alone.

    For small cases and for tests: it uses none of the rules behind `ntk`.

    Args:
        model: output (n,) or (n, c); left exactly as found.
        x: samples, as for `ntk`.
        params: names or tensors of the parameters, default all that require grad.

    Returns:
        [n, c, p], parameters flattened in the order of `model.named_parameters()`. For a model that couples its
        samples this is the Jacobian of the batch map.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        UnsupportedModule: the forward draws random numbers, or autocast is enabled.

    Cost: one forward and n c backwards; n c p numbers.
    """
    state = ModelState(model, params)
    check_inputs(x, state.device)
    with state.untouched():
        output = outputs_2d(state.forward(x), x)
        n, c = output.shape
        total = sum(p.numel() for p in state.parameters)
        jacobian = torch.empty(n, c, total, dtype=state.dtype, device=state.device)
        cotangent = torch.zeros_like(output)
        for i in range(n):
            for j in range(c):
                cotangent[i, j] = 1.0
                rows = torch.autograd.grad(
                    output, state.parameters, cotangent, retain_graph=True, allow_unused=True
                )
                cotangent[i, j] = 0.0
                flat = [
                    torch.zeros_like(p).reshape(-1) if row is None else row.reshape(-1)
                    for p, row in zip(state.parameters, rows, strict=True)
                ]
                jacobian[i, j] = torch.cat(flat).detach()
    return jacobian
