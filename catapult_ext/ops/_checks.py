"""What every backend demands of its arguments: errors name the argument, what was expected and what came.

The checks of `ntk_gram_` stand on the path of every small training step: plain comparisons, and text only on
failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

__all__ = [
    "agop_inner",
    "agop_reduce",
    "chain_sgd",
    "jacobian_conv2d",
    "jacobian_tile",
    "jacobian_tokens",
    "ntk_gram",
    "ntk_gram_cross",
    "spectral_norm",
    "topk_eigh",
]

_FLOATS = (torch.float32, torch.float64)


def _fail(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {name}: expected {expected}, got {got}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` has the dtype and the device of `other`."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name}: expected {other.dtype} as {other_name} has, got {tensor.dtype}")
    if tensor.device != other.device:
        _fail(op, name, f"a tensor on {other.device} as {other_name} is", tensor.device)


def _float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name}: expected torch.float32 or torch.float64, got {tensor.dtype}")


def _output(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """A result that is written in place: float, of this shape, contiguous."""
    _float(op, name, tensor)
    if tuple(tensor.shape) != shape:
        _fail(op, name, f"shape {shape}", _shape(tensor))
    if not tensor.is_contiguous():
        _fail(op, name, "a contiguous tensor", f"strides {tensor.stride()} for shape {_shape(tensor)}")


# --- ntk_gram ---


def _terms(
    op: str, names: tuple[str, str], kernel: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], count: int
) -> tuple[int, int]:
    """Check the (A, B) pairs of one side; return its samples n and outputs c."""
    a_name, b_name = names
    if len(a) != count or len(b) != count:
        _fail(op, f"{a_name}, {b_name}", f"{count} tensors each, one per scale", f"{len(a)} and {len(b)}")
    dtype, device = kernel.dtype, kernel.device
    shape = b[0].shape
    n, c = shape[0] if shape else 0, shape[1] if len(shape) == 3 else 1
    for index in range(count):
        x, y = a[index], b[index]
        if x.dtype != dtype or x.device != device:
            _like(op, f"{a_name}[{index}]", x, "kernel", kernel)
        if y.dtype != dtype or y.device != device:
            _like(op, f"{b_name}[{index}]", y, "kernel", kernel)
        shape = y.shape
        if not (len(shape) == 3 and shape[0] == n and shape[1] == c) and not (
            len(shape) == 2 and shape[0] == n and c == 1
        ):
            wanted = f"({n}, m) or ({n}, 1, m)" if c == 1 else f"({n}, {c}, m)"
            _fail(op, f"{b_name}[{index}]", f"shape {wanted} (samples, outputs, width)", _shape(y))
        shape = x.shape
        if len(shape) != 2 or shape[0] != n:
            _fail(op, f"{a_name}[{index}]", f"shape ({n}, m) with the samples of {b_name}", _shape(x))
    return n, c


def ntk_gram(
    kernel: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: Sequence[float], beta: Sequence[float]
) -> tuple[int, int]:
    """Check the arguments of `ntk_gram_`; return (n, c)."""
    count = len(scale)
    if len(beta) != count:
        _fail("ntk_gram_", "beta", f"{count} numbers, one per scale", len(beta))
    if not count:
        _fail("ntk_gram_", "a", "at least one layer", "none")
    n, c = _terms("ntk_gram_", ("a", "b"), kernel, a, b, count)
    size = n * c
    if kernel.dtype not in _FLOATS or kernel.shape != (size, size) or not kernel.is_contiguous():
        _output("ntk_gram_", "kernel", kernel, (size, size))
    return n, c


def ntk_gram_cross(
    kernel: Tensor,
    xa: Sequence[Tensor],
    xb: Sequence[Tensor],
    za: Sequence[Tensor],
    zb: Sequence[Tensor],
    scale: Sequence[float],
    beta: Sequence[float],
) -> tuple[int, int, int]:
    """Check the arguments of `ntk_gram_cross_`; return (n, m, c)."""
    op, count = "ntk_gram_cross_", len(scale)
    if len(beta) != count:
        _fail(op, "beta", f"{count} numbers, one per scale", len(beta))
    if not count:
        _fail(op, "xa", "at least one layer", "none")
    n, c = _terms(op, ("xa", "xb"), kernel, xa, xb, count)
    m, c_z = _terms(op, ("za", "zb"), kernel, za, zb, count)
    if c_z != c:
        _fail(op, "zb", f"{c} outputs as in xb", c_z)
    for index in range(count):
        for name, x, z in (("za", xa[index], za[index]), ("zb", xb[index], zb[index])):
            if x.shape[-1] != z.shape[-1]:
                _fail(op, f"{name}[{index}]", f"width {x.shape[-1]} as in x{name[1]}[{index}]", z.shape[-1])
    _output(op, "kernel", kernel, (n * c, m * c))
    return n, m, c


# --- jacobian_accumulate ---


def _sweep(
    kernel: Tensor, grad: Tensor | None, weight: Tensor | None, rows: int, shape: tuple[int, ...], op: str
) -> None:
    """Kernel [rows, rows], and either both of grad (of `shape`) and weight [rows] or neither."""
    _output(op, "kernel", kernel, (rows, rows))
    if (grad is None) != (weight is None):
        _fail(op, "grad, weight", "both or neither", "grad alone" if weight is None else "weight alone")
    if grad is not None and weight is not None:
        _like(op, "grad", grad, "kernel", kernel)
        _like(op, "weight", weight, "kernel", kernel)
        _output(op, "grad", grad, shape)
        if tuple(weight.shape) != (rows,):
            _fail(op, "weight", f"shape ({rows},), one per kernel row", _shape(weight))


def jacobian_tile(kernel: Tensor, grad: Tensor | None, tile: Tensor, weight: Tensor | None) -> None:
    """Check the arguments of `jacobian_accumulate_.tile`."""
    op = "jacobian_accumulate_"
    if tile.dim() != 2:
        _fail(op, "tile", "shape (N, q): kernel rows, parameters", _shape(tile))
    _like(op, "tile", tile, "kernel", kernel)
    _sweep(kernel, grad, weight, tile.shape[0], (tile.shape[1],), op)


def jacobian_tokens(
    kernel: Tensor, grad: Tensor | None, a: Tensor, b: Tensor, weight: Tensor | None, tile_bytes: int
) -> None:
    """Check the arguments of `jacobian_accumulate_.tokens`."""
    op = "jacobian_accumulate_"
    if b.dim() != 4:
        _fail(op, "b", "shape (n, c, T, out)", _shape(b))
    if a.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        _fail(
            op, "a", f"shape ({b.shape[0]}, {b.shape[2]}, in) with the samples and positions of b", _shape(a)
        )
    _like(op, "a", a, "kernel", kernel)
    _like(op, "b", b, "kernel", kernel)
    _positive(op, "tile_bytes", tile_bytes)
    _sweep(kernel, grad, weight, b.shape[0] * b.shape[1], (b.shape[3], a.shape[2]), op)


def jacobian_conv2d(
    kernel: Tensor,
    grad: Tensor | None,
    input: Tensor,
    b: Tensor,
    weight: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tile_bytes: int,
) -> None:
    """Check the arguments of `jacobian_accumulate_.conv2d`."""
    op = "jacobian_accumulate_"
    _positive(op, "groups", groups)
    _positive(op, "tile_bytes", tile_bytes)
    for name, pair, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            _fail(op, name, f"two numbers of at least {least}", list(pair))
    if input.dim() != 4:
        _fail(op, "input", "shape (n, C, H, W)", _shape(input))
    n, channels = input.shape[:2]
    if channels % groups:
        _fail(op, "input", f"a number of channels that {groups} groups divide", channels)
    sizes = tuple(
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    if b.dim() != 5 or b.shape[0] != n or tuple(b.shape[3:]) != sizes:
        _fail(op, "b", f"shape ({n}, c, O, {sizes[0]}, {sizes[1]}) for this input and geometry", _shape(b))
    if b.shape[2] % groups:
        _fail(op, "b", f"a number of output channels that {groups} groups divide", b.shape[2])
    _like(op, "input", input, "kernel", kernel)
    _like(op, "b", b, "kernel", kernel)
    _sweep(kernel, grad, weight, n * b.shape[1], (b.shape[2], channels // groups, *kernel_size), op)


def _positive(op: str, name: str, value: int) -> None:
    if value < 1:
        _fail(op, name, "a positive number", value)


# --- agop_reduce ---


def agop_reduce(agop: Tensor, g: Tensor) -> None:
    """Check the arguments of `agop_reduce_`."""
    op = "agop_reduce_"
    if g.dim() != 2:
        _fail(op, "g", "shape (rows, d)", _shape(g))
    _like(op, "g", g, "agop", agop)
    _output(op, "agop", agop, (g.shape[1], g.shape[1]))


def agop_inner(g: Tensor, h: Tensor) -> None:
    """Check the arguments of `agop_inner`."""
    op = "agop_inner"
    _float(op, "g", g)
    if g.dim() != 2:
        _fail(op, "g", "shape (rows, d)", _shape(g))
    if h.dim() != 2 or h.shape[1] != g.shape[1]:
        _fail(op, "h", f"shape (rows, {g.shape[1]})", _shape(h))
    _like(op, "h", h, "g", g)


# --- topk_eigh, spectral_norm ---


def _square(op: str, kernel: Tensor) -> None:
    _float(op, "kernel", kernel)
    if kernel.dim() < 2 or kernel.shape[-1] != kernel.shape[-2]:
        _fail(op, "kernel", "shape (..., n, n)", _shape(kernel))


def topk_eigh(kernel: Tensor, k: int, start: Tensor | None) -> None:
    """Check the arguments of `topk_eigh`."""
    _square("topk_eigh", kernel)
    n = kernel.shape[-1]
    if not 0 <= k <= n:
        _fail("topk_eigh", "k", f"a number of eigenpairs from 0 to {n}", k)
    if start is not None:
        _like("topk_eigh", "start", start, "kernel", kernel)
        if start.shape[:-1] != kernel.shape[:-1]:
            _fail("topk_eigh", "start", f"shape {(*kernel.shape[:-1], 'columns')}", _shape(start))


def spectral_norm(kernel: Tensor) -> None:
    """Check the arguments of `spectral_norm`."""
    _square("spectral_norm", kernel)


# --- chain_sgd_ ---


def chain_sgd(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[Sequence[float]],
    slope: Sequence[float],
    trains: Sequence[Sequence[bool]],
    x: Tensor,
    y: Tensor,
    batch_index: Tensor,
    batch_sizes: Tensor,
    rates: Tensor,
    observed: Tensor,
) -> None:
    """A chain of layers that fit each other and the data, and batches of existing samples."""
    op, depth = "chain_sgd_", len(weights)
    if not depth:
        _fail(op, "weights", "at least one layer", "none")
    for name, values in (("biases", biases), ("slope", slope), *(("scales", s) for s in scales)):
        if len(values) != depth:
            _fail(op, name, f"one entry for each of the {depth} layers", len(values))
    if any(len(flags) != depth for flags in trains) or not any(map(any, trains)):
        _fail(op, "trains", f"flags of {depth} layers, at least one of them set", trains)
    _float(op, "x", x)
    if x.dim() != 2 or x.shape[0] == 0:
        _fail(op, "x", "shape (n, d) with n >= 1", _shape(x))
    if tuple(y.shape) not in ((x.shape[0],), (x.shape[0], 1)):
        _fail(op, "y", f"shape ({x.shape[0]},) or ({x.shape[0]}, 1)", _shape(y))
    _like(op, "y", y, "x", x)
    width = x.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = 1 if layer == depth - 1 else weight.shape[0]
        for name, tensor, shapes in (
            (f"weights[{layer}]", weight, ((out, width),)),
            (f"biases[{layer}]", bias, ((out,), (0,))),
        ):
            _like(op, name, tensor, "x", x)
            if tuple(tensor.shape) not in shapes:
                _fail(op, name, f"shape {shapes[0]}", _shape(tensor))
            dense = all(s == 1 for s in tensor.shape) or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1
            if not dense or (tensor.dim() == 2 and out > 1 and tensor.stride(0) < width):
                _fail(op, name, "dense rows", f"strides {tensor.stride()} for shape {_shape(tensor)}")
        width = out
    if not all(0.0 <= value <= 1e30 for value in slope):
        _fail(op, "slope", "finite numbers >= 0", list(slope))
    written = [t.data_ptr() for t in (*weights, *biases) if t.numel() and not t.is_meta]
    if len(set(written)) < len(written):
        _fail(op, "weights", "different tensors", "one of them twice")
    _batches(x, batch_index, batch_sizes, rates, observed)


def _batches(x: Tensor, index: Tensor, sizes: Tensor, rates: Tensor, observed: Tensor) -> None:
    """`index` and `rates` may be where x is; what is on a GPU is not read here."""
    op, steps = "chain_sgd_", rates.shape[0] if rates.dim() == 1 else -1
    for name, tensor, dtype in (
        ("batch_index", index, torch.int64),
        ("batch_sizes", sizes, torch.int64),
        ("rates", rates, torch.float64),
        ("observed", observed, torch.bool),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}")
        movable = name in ("batch_index", "rates") and not x.is_cpu
        placed = tensor.is_cpu or (movable and tensor.device == x.device)
        if tensor.dim() != 1 or (name != "batch_index" and tensor.shape[0] != steps) or not placed:
            shape = "(samples of all batches,)" if name == "batch_index" else f"({max(steps, 0)},) as rates"
            where = f"on the CPU or on {x.device}" if movable else "on the CPU"
            _fail(op, name, f"shape {shape} {where}", f"{_shape(tensor)} on {tensor.device}")
    if steps == 0 and index.numel() == 0:
        return
    if int(sizes.min()) < 1 or int(sizes.sum()) != index.numel():
        _fail(op, "batch_sizes", f"sizes >= 1 that add up to {index.numel()}", f"a sum of {int(sizes.sum())}")
    if index.is_cpu:
        low, high = (int(value) for value in torch.aminmax(index))
        if low < 0 or high >= x.shape[0]:
            _fail(op, "batch_index", f"samples from 0 to {x.shape[0] - 1}", f"{low} to {high}")
    if rates.is_cpu and not bool(torch.isfinite(rates).all()):
        _fail(op, "rates", "finite numbers", "one that is not")
