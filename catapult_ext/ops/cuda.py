"""CUDA implementations: checks, raw pointers to `_C`, workspaces from torch's caching allocator.

Nothing here waits for the device, so every op can be captured in a CUDA graph. What the CPU raises at once, a
kernel can only note: it sets bits in one status word per device, which `check` reads (and that waits). Call it
when a value is read on the host anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from catapult_ext import _C
from catapult_ext.errors import NonFinite
from catapult_ext.ops import _checks
from catapult_ext.ops._schema import OPS, register_backend

__all__ = ["VERSIONS", "check", "compiled", "select", "selected", "status"]

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1}  # DType in csrc/core/types.h
_NON_FINITE, _NOT_CONVERGED, _NO_SUCH_SAMPLE = 1, 2, 4  # Status in csrc/cuda/device.cuh

#: Implementations of an op, the simplest first: the default. The others have passed every test that needs no GPU.
#: That of "ntk_gram" is the one of every product G G^T: `agop_reduce_` and tiles of `jacobian_accumulate_` too.
VERSIONS: dict[str, tuple[str, ...]] = {
    "ntk_gram": ("simple", "ffma", "tf32x3", "cluster"),
    "jacobian_conv2d": ("simple", "ffma", "tf32x3"),
    "topk_eigh": ("simple", "fused"),
    "spectral_norm": ("simple", "warp"),
}

_native: Any = _C
_selected = dict.fromkeys(VERSIONS, 0)
_status: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def compiled() -> bool:
    """Whether the compiled module holds CUDA kernels."""
    return bool(_C.compile_info()["cuda_archs"])


def status(device: torch.device) -> Tensor:
    """Return the status word of a device: int32 [1], 1 non-finite, 2 an eigensolver did not converge, 4 no such sample.

    The word lives as long as the process, so that graphs may hold its address: the first op on a device must
    not run inside a capture.
    """
    word = _status.get(device)
    if word is None:
        with _lock:
            word = _status.get(device)
            if word is None:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"catapult_ext: the first op on {device} runs inside a graph capture; run it once "
                        "before capturing"
                    )
                word = torch.zeros(1, dtype=torch.int32, device=device)
                if device.type == "cuda":
                    # Once per process: other streams may use the word from now on.
                    torch.cuda.current_stream(device).synchronize()
                _status[device] = word
    return word


def check(device: torch.device) -> None:
    """Raise what the kernels that ran on a CUDA device since the last call have noted, and forget it.

    Waits for the current stream of the device. Does nothing for other devices, whose ops raise by themselves.

    Raises:
        ValueError: an index on the device named no sample.
        NonFinite: a NaN or an infinity was written.
        RuntimeError: an eigensolver did not converge; its residual norms say how far it came.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    word = _status.get(device)
    if word is None:
        return
    bits = int(word.item())
    if bits == 0:
        return
    word.zero_()
    if bits & _NO_SUCH_SAMPLE:
        raise ValueError(
            f"chain_sgd_: batch_index: expected samples of x, got one that it has not, on {device}"
        )
    if bits & _NON_FINITE:
        raise NonFinite(f"catapult_ext: a NaN or an infinity came up in an op on {device}")
    raise RuntimeError(f"topk_eigh: an eigensolver on {device} did not converge; look at the residual norms")


def select(op: str, version: str) -> None:
    """Choose the implementation that an op uses on every CUDA device, from the next call on.

    Args:
        op: a key of `VERSIONS`.
        version: one of `VERSIONS[op]`; all give the same result up to rounding.

    Raises:
        ValueError: no such op or version.
    """
    if op not in VERSIONS:
        raise ValueError(f"op: expected one of {', '.join(VERSIONS)}, got {op!r}")
    if version not in VERSIONS[op]:
        raise ValueError(f"version: expected one of {', '.join(VERSIONS[op])} for {op}, got {version!r}")
    _selected[op] = VERSIONS[op].index(version)


def selected(op: str) -> str:
    """Return the implementation that an op uses on CUDA devices, one of `VERSIONS[op]`."""
    return VERSIONS[op][_selected[op]]


def _version(op: str) -> int:
    return _selected[op]


def _stream(device: torch.device) -> tuple[int, int]:
    """Device index and the current stream's handle, as every launcher takes them."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _launch(name: str, device: torch.device, arguments: tuple[Any, ...]) -> None:
    """Ask for the workspace of `_C.cuda_<name>`, then enqueue it on the current stream."""
    workspace = _workspace(getattr(_native, f"cuda_{name}_workspace")(*arguments), device)
    index, stream = _stream(device)
    word = status(device)
    getattr(_native, f"cuda_{name}")(index, stream, word.data_ptr(), workspace.data_ptr(), *arguments)


# --- ntk_gram ---

_Operand = tuple[int, int, int, int, int, int, int]


def _operand(a: Tensor, b: Tensor) -> _Operand:
    """Addresses and strides (in elements) of one layer; b [n, mb] counts as [n, 1, mb]."""
    strides = b.stride()
    output_stride = strides[1] if len(strides) == 3 else 0
    return (*_matrix(a), b.data_ptr(), strides[0], output_stride, strides[-1])


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return matrix.data_ptr(), matrix.stride(0), matrix.stride(1)


def _ntk_gram_(
    kernel: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
    accumulate: bool,
) -> None:
    n, c = _checks.ntk_gram(kernel, a, b, scale, beta)
    layers = [
        (*([_operand(x, y)] * 2), x.shape[1], y.shape[-1], s, t)
        for x, y, s, t in zip(a, b, scale, beta, strict=True)
    ]
    arguments = (
        _DTYPE_CODES[kernel.dtype], True, n, n, c, layers, kernel.data_ptr(), n * c, accumulate, _version("ntk_gram"),
    )  # fmt: skip
    increment_version(kernel)
    _launch("ntk_gram", kernel.device, arguments)


def _ntk_gram_cross_(
    kernel: Tensor,
    xa: Sequence[Tensor],
    xb: Sequence[Tensor],
    za: Sequence[Tensor],
    zb: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
    accumulate: bool,
) -> None:
    n, m, c = _checks.ntk_gram_cross(kernel, xa, xb, za, zb, scale, beta)
    layers = [
        (_operand(x, y), _operand(z, w), x.shape[1], y.shape[-1], s, t)
        for x, y, z, w, s, t in zip(xa, xb, za, zb, scale, beta, strict=True)
    ]
    arguments = (
        _DTYPE_CODES[kernel.dtype], False, n, m, c, layers, kernel.data_ptr(), m * c, accumulate, _version("ntk_gram"),
    )  # fmt: skip
    increment_version(kernel)
    _launch("ntk_gram", kernel.device, arguments)


# --- jacobian_accumulate ---


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _weight(weight: Tensor | None) -> tuple[int, int]:
    return _address(weight), 0 if weight is None else weight.stride(0)


def _jacobian_accumulate_tile_(
    kernel: Tensor, grad: Tensor | None, tile: Tensor, weight: Tensor | None
) -> None:
    _checks.jacobian_tile(kernel, grad, tile, weight)
    rows, columns = tile.shape
    code = _DTYPE_CODES[kernel.dtype]
    arguments = (
        code, rows, columns, *_matrix(tile), kernel.data_ptr(), rows, *_weight(weight), _address(grad),
        _version("ntk_gram"),
    )  # fmt: skip
    increment_version([kernel] if grad is None else [kernel, grad])
    _launch("jacobian_tile", kernel.device, arguments)


def _sweep(
    kernel: Tensor,
    grad: Tensor | None,
    input: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
    geometry: Sequence[int],
    tile_bytes: int,
) -> None:
    """Input [n, C, H, W], b [n, c, O, Ho, Wo]; geometry: groups, kernel size, stride, padding, dilation."""
    if b.numel() == 0 or input.numel() == 0:
        return  # no samples, outputs, channels or positions: nothing is added
    shape = [b.shape[0], b.shape[1], *input.shape[1:], *b.shape[2:]]
    arguments = (
        _DTYPE_CODES[kernel.dtype], shape, list(geometry), input.data_ptr(), input.stride(), b.data_ptr(),
        b.stride(), scale, kernel.data_ptr(), kernel.shape[1], *_weight(weight), _address(grad), tile_bytes,
        _version("jacobian_conv2d"),
    )  # fmt: skip
    increment_version([kernel] if grad is None else [kernel, grad])
    _launch("jacobian_conv2d", kernel.device, arguments)


def _jacobian_accumulate_tokens_(
    kernel: Tensor,
    grad: Tensor | None,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
    tile_bytes: int,
) -> None:
    _checks.jacobian_tokens(kernel, grad, a, b, weight, tile_bytes)
    # A Linear over T positions is a convolution of one tap over an image of T x 1.
    image = a.transpose(1, 2).unsqueeze(-1)  # [n, in, T, 1]
    sensitivities = b.transpose(2, 3).unsqueeze(-1)  # [n, c, out, T, 1]
    _sweep(kernel, grad, image, sensitivities, weight, scale, (1, 1, 1, 1, 1, 0, 0, 1, 1), tile_bytes)


def _jacobian_accumulate_conv2d_(
    kernel: Tensor,
    grad: Tensor | None,
    input: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile_bytes: int,
) -> None:
    _checks.jacobian_conv2d(
        kernel, grad, input, b, weight, kernel_size, stride, padding, dilation, groups, tile_bytes
    )
    geometry = (groups, *kernel_size, *stride, *padding, *dilation)
    _sweep(kernel, grad, input, b, weight, scale, geometry, tile_bytes)


# --- agop_reduce ---


def _agop_reduce_(agop: Tensor, g: Tensor, scale: float) -> None:
    _checks.agop_reduce(agop, g)
    rows, d = g.shape
    code = _DTYPE_CODES[g.dtype]
    arguments = (code, rows, d, *_matrix(g), scale, agop.data_ptr(), d, _version("ntk_gram"))
    increment_version(agop)
    _launch("agop_reduce", g.device, arguments)


def _agop_inner(g: Tensor, h: Tensor) -> Tensor:
    _checks.agop_inner(g, h)
    result = torch.empty((), dtype=torch.float64, device=g.device)
    arguments = (
        _DTYPE_CODES[g.dtype], g.shape[0], h.shape[0], g.shape[1], *_matrix(g), *_matrix(h), result.data_ptr(),
    )  # fmt: skip
    _launch("agop_inner", g.device, arguments)
    return result


# --- topk_eigh, spectral_norm ---


def _matrices(kernel: Tensor) -> Tensor:
    """View (or copy, where strides do not allow it) of [..., n, n] as [batch, n, n] with dense rows."""
    flat = kernel.reshape(-1, *kernel.shape[-2:])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _topk_eigh(kernel: Tensor, k: int, start: Tensor | None, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    _checks.topk_eigh(kernel, k, start)
    shape, device = kernel.shape, kernel.device
    n = shape[-1]
    values, residuals = kernel.new_empty((*shape[:-2], k)), kernel.new_empty((*shape[:-2], k))
    vectors = kernel.new_empty((*shape[:-1], k))
    if values.numel() == 0:
        return values, vectors, residuals
    matrices = _matrices(kernel)
    start = None if start is None else start.contiguous()
    code, batch = _DTYPE_CODES[kernel.dtype], matrices.shape[0]
    index, stream = _stream(device)
    version = _version("topk_eigh")
    workspace = _workspace(_native.cuda_topk_eigh_workspace(index, code, batch, n, k, version), device)
    word = status(device)
    _native.cuda_topk_eigh(
        index, stream, word.data_ptr(), workspace.data_ptr(), code, batch, n, k, matrices.data_ptr(),
        matrices.stride(0), matrices.stride(1), _address(start), 0 if start is None else start.shape[-1], tol,
        values.data_ptr(), vectors.data_ptr(), residuals.data_ptr(), version,
    )  # fmt: skip
    return values, vectors, residuals


def _spectral_norm(kernel: Tensor, tol: float) -> Tensor:
    _checks.spectral_norm(kernel)
    if kernel.numel() == 0:
        return kernel.new_zeros(kernel.shape[:-2])
    device, n = kernel.device, kernel.shape[-1]
    values = kernel.new_empty(kernel.shape[:-2])
    matrices = _matrices(kernel)
    code, batch = _DTYPE_CODES[kernel.dtype], matrices.shape[0]
    index, stream = _stream(device)
    version = _version("spectral_norm")
    workspace = _workspace(_native.cuda_spectral_norm_workspace(index, code, batch, n, version), device)
    word = status(device)
    _native.cuda_spectral_norm(
        index, stream, word.data_ptr(), workspace.data_ptr(), code, batch, n, matrices.data_ptr(),
        matrices.stride(0), matrices.stride(1), tol, values.data_ptr(), version,
    )  # fmt: skip
    return values


# --- chain_sgd_ ---


def _chain_sgd_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_scale: Sequence[float],
    bias_scale: Sequence[float],
    slope: Sequence[float],
    trains_weight: Sequence[bool],
    trains_bias: Sequence[bool],
    x: Tensor,
    y: Tensor,
    batch_index: Tensor,
    batch_sizes: Tensor,
    rates: Tensor,
    observed: Tensor,
    loss_limit: float,
    tol: float,
) -> tuple[Tensor, Tensor]:
    trains_bias = [flag and b.numel() > 0 for flag, b in zip(trains_bias, biases, strict=True)]
    _checks.chain_sgd(
        weights, biases, (weight_scale, bias_scale), slope, (trains_weight, trains_bias), x, y, batch_index,
        batch_sizes, rates, observed,
    )  # fmt: skip
    losses, lambda_1 = x.new_empty(rates.shape), x.new_empty(rates.shape)
    if not rates.numel():
        return losses, lambda_1
    device = x.device
    layers = [
        (
            weight.shape[1], weight.shape[0], weight.data_ptr(), weight.stride(0), w_scale,
            bias.data_ptr() if bias.numel() else 0, b_scale, negative, w_flag, b_flag,
        )
        for weight, bias, w_scale, b_scale, negative, w_flag, b_flag in zip(
            weights, biases, weight_scale, bias_scale, slope, trains_weight, trains_bias, strict=True
        )
    ]  # fmt: skip
    samples = batch_index.to(device, non_blocking=True).contiguous()
    rates = rates.to(device, non_blocking=True).contiguous()
    arguments = (
        _DTYPE_CODES[x.dtype], layers, x.data_ptr(), x.shape[0], *x.stride(), y.data_ptr(), y.stride(0),
        samples.data_ptr(), rates.data_ptr(), batch_sizes.tolist(), observed.long().tolist(), loss_limit, tol,
        losses.data_ptr(), lambda_1.data_ptr(), _version("ntk_gram"), _version("spectral_norm"),
    )  # fmt: skip
    index, stream = _stream(device)
    workspace = _workspace(_native.cuda_chain_sgd_workspace(index, *arguments), device)
    word = status(device)
    _native.cuda_chain_sgd(index, stream, word.data_ptr(), workspace.data_ptr(), *arguments)
    flags = zip((*weights, *biases), (*trains_weight, *trains_bias), strict=True)
    increment_version([tensor for tensor, trained in flags if trained])
    return losses, lambda_1


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "ntk_gram_": _ntk_gram_,
    "ntk_gram_cross_": _ntk_gram_cross_,
    "jacobian_accumulate_.tile": _jacobian_accumulate_tile_,
    "jacobian_accumulate_.tokens": _jacobian_accumulate_tokens_,
    "jacobian_accumulate_.conv2d": _jacobian_accumulate_conv2d_,
    "topk_eigh": _topk_eigh,
    "spectral_norm": _spectral_norm,
    "agop_reduce_": _agop_reduce_,
    "agop_inner": _agop_inner,
    "chain_sgd_": _chain_sgd_,
}


def _not_compiled(name: str) -> Callable[..., Any]:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(
            f"{name}: got CUDA tensors, but this catapult_ext was built without CUDA. Build it again where nvcc "
            "is found: CUDA_HOME=/usr/local/cuda pip install --no-cache-dir . (CATAPULT_CUDA=ON makes a missing "
            "nvcc an error)"
        )

    return refuse


register_backend("CUDA", IMPLEMENTATIONS if compiled() else {name: _not_compiled(name) for name in OPS})
