"""Kernels of all samples at once: one forward and c backwards for each side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from catapult_ext import ops
from catapult_ext.observe.assemble import Assembler
from catapult_ext.observe.inputs import Inputs
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep

__all__ = ["one_sweep"]


def one_sweep(
    state: ModelState,
    x: Inputs,
    z: Inputs | None,
    kernels: Sequence[frozenset[int]],
    *,
    outputs: str | int,
    trace: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """For each wanted kernel, by the parameters that it includes, [n c, m c], or [n, m] of a trace."""
    found = []
    with state.untouched():
        other = None
        if z is not None:
            with state.own_buffers():
                other = Sweep(state, z, {}, verify="first", outputs=outputs)
        sweep = Sweep(state, x, {}, verify="first", outputs=outputs)
        with torch.no_grad():
            for only in kernels:
                first = Assembler(sweep, dtype=dtype, only=only)
                if other is None:
                    kernel = first.build_kernel()
                else:
                    kernel = _cross(first, Assembler(other, dtype=dtype, only=only))
                found.append(_trace(kernel, sweep.outputs) if trace else kernel)
    return found


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
