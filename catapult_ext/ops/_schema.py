"""Every op, declared once: schema, shape-only (fake) kernel, and the refusal to be differentiated.

Backends (`cpu.py`, `cuda.py`) register their implementations on the same library.
Letters: n samples, c outputs, N = n c kernel rows (index i c + j), q parameters in a tile, d input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LIBRARY", "OPS", "ChainLayer", "RankUpdate", "register_backend"]

# W, L, R, w, scale of `ops.rank_updates_`
RankUpdate = tuple[Tensor, Tensor | None, Tensor, Tensor | None, float]


class ChainLayer(NamedTuple):
    """A Linear layer of `ops.chain_sgd_` and the piecewise linear function behind it.

    z = weight_scale A W^T + bias_scale b; the next layer's input is z where z > 0, slope z elsewhere.

    Attributes:
        weight: W [out, in], rows dense.
        bias: b [out] contiguous, or None.
        weight_scale: factor of the weight.
        bias_scale: factor of the bias.
        slope: 0 is ReLU, 1 is linear, .01 a leaky ReLU; of the last layer it is not read.
        trains_weight: whether steps change the weight; where not, it is no part of the kernel either.
        trains_bias: the same of the bias.
    """

    weight: Tensor
    bias: Tensor | None = None
    weight_scale: float = 1.0
    bias_scale: float = 1.0
    slope: float = 0.0
    trains_weight: bool = True
    trains_bias: bool = True


LIBRARY = torch.library.Library("catapult", "DEF")

_TAGS = (torch.Tag.pt2_compliant_tag,)

# name (with overload) -> schema
OPS: dict[str, str] = {
    "ntk_gram_": (
        "(Tensor(a!) kernel, Tensor[] a, Tensor[] b, float[] scale, float[] beta, bool accumulate) -> ()"
    ),
    "ntk_gram_cross_": (
        "(Tensor(a!) kernel, Tensor[] xa, Tensor[] xb, Tensor[] za, Tensor[] zb, "
        "float[] scale, float[] beta, bool accumulate) -> ()"
    ),
    "jacobian_accumulate_.tile": "(Tensor(a!) kernel, Tensor(b!)? grad, Tensor tile, Tensor? weight) -> ()",
    "jacobian_accumulate_.tokens": (
        "(Tensor(a!) kernel, Tensor(b!)? grad, Tensor a, Tensor b, Tensor? weight, "
        "float scale, int tile_bytes) -> ()"
    ),
    "jacobian_accumulate_.conv2d": (
        "(Tensor(a!) kernel, Tensor(b!)? grad, Tensor input, Tensor b, Tensor? weight, float scale, "
        "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, int tile_bytes) "
        "-> ()"
    ),
    "topk_eigh": (
        "(Tensor kernel, int k, Tensor? start, float tol) "
        "-> (Tensor values, Tensor vectors, Tensor residuals)"
    ),
    "spectral_norm": "(Tensor kernel, float tol) -> Tensor",
    "agop_reduce_": "(Tensor(a!) agop, Tensor g, float scale) -> ()",
    "agop_inner": "(Tensor g, Tensor h) -> Tensor",
    "chain_sgd_": (
        "(Tensor(a!)[] weights, Tensor(b!)[] biases, float[] weight_scale, float[] bias_scale, float[] slope, "
        "bool[] trains_weight, bool[] trains_bias, Tensor x, Tensor y, Tensor batch_index, Tensor batch_sizes, "
        "Tensor rates, Tensor observed, float loss_limit, float tol) -> (Tensor losses, Tensor lambda_1)"
    ),
}


def register_backend(dispatch_key: str, implementations: Mapping[str, Callable[..., Any]]) -> None:
    """Register one function per op of `OPS` for a dispatch key; a missing or an extra name is an error."""
    if implementations.keys() != OPS.keys():
        raise RuntimeError(
            f"backend {dispatch_key}: expected implementations of {sorted(OPS)}, "
            f"got {sorted(implementations)}"
        )
    for name, function in implementations.items():
        LIBRARY.impl(name, function, dispatch_key)


# --- shape-only kernels: what torch.compile sees. The in-place ops return nothing. ---


def _fake_in_place(*args: object) -> None:
    return None


def _fake_topk_eigh(
    kernel: Tensor, k: int, start: Tensor | None, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    *batch, n, _ = kernel.shape
    return kernel.new_empty((*batch, k)), kernel.new_empty((*batch, n, k)), kernel.new_empty((*batch, k))


def _fake_spectral_norm(kernel: Tensor, tol: float) -> Tensor:
    return kernel.new_empty(kernel.shape[:-2])


def _fake_agop_inner(g: Tensor, h: Tensor) -> Tensor:
    return g.new_empty((), dtype=torch.float64)


def _fake_chain_sgd_(weights: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    steps = args[9].shape[0]  # rates
    return weights[0].new_empty(steps), weights[0].new_empty(steps)


_FAKES: dict[str, Callable[..., Any]] = {
    "topk_eigh": _fake_topk_eigh,
    "spectral_norm": _fake_spectral_norm,
    "agop_inner": _fake_agop_inner,
    "chain_sgd_": _fake_chain_sgd_,
}


# --- autograd: gradients through an op are refused, not silently dropped ---


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
            yield from arg


class _NotDifferentiable(torch.autograd.Function):
    """Runs an op below autograd and ties its results to its inputs, so that a backward reaches `backward`."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], name: str, mutable: int, args: Any, *tensors: Tensor
    ) -> Any:
        ctx.name = name
        result = run(*args)
        if not mutable:
            return result
        changed = tuple(_tensors(args[:mutable]))
        ctx.mark_dirty(*changed)
        return changed if result is None else (*changed, *result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"catapult::{ctx.name} is not differentiable: call it under torch.no_grad() or detach its inputs"
        )


def _autograd_kernel(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.catapult, packet), overload or "default")
    mutable = sum(arg.alias_info is not None and arg.alias_info.is_write for arg in op._schema.arguments)
    returns = len(op._schema.returns)
    # Bound here: small training steps come through once a step.
    redispatch, below, keys = (
        op.redispatch,
        torch._C._AutoDispatchBelowAutograd,
        torch._C._after_autograd_keyset,
    )
    recording = torch.is_grad_enabled

    def kernel(keyset: Any, *args: Any) -> Any:
        if recording() and any(tensor.requires_grad for tensor in _tensors(args)):

            def run(*args: Any) -> Any:
                with below():
                    return redispatch(keyset & keys, *args)

            result = _NotDifferentiable.apply(run, name, mutable, args, *_tensors(args))
            if not mutable:
                return result
            return result[-returns:] if returns else None
        with below():
            return redispatch(keyset & keys, *args)

    return kernel


for _name, _signature in OPS.items():
    LIBRARY.define(f"{_name}{_signature}", tags=_TAGS)
    torch.library.register_fake(f"catapult::{_name}", _FAKES.get(_name, _fake_in_place), lib=LIBRARY)
    LIBRARY.impl(_name, _autograd_kernel(_name), "Autograd", with_keyset=True)
