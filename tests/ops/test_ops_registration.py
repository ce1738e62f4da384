"""Every op: opcheck, torch.compile without a graph break, a backward that is refused, errors that teach."""

from __future__ import annotations

import math

import pytest
import torch

import catapult_ext as cx
from catapult_ext import ops
from catapult_ext.ops import _schema


def layers(n=5, c=2, dtype=torch.float32):
    a = [torch.randn(n, 3, dtype=dtype), torch.randn(n, 0, dtype=dtype)]
    return a, [torch.randn(n, c, 4, dtype=dtype), torch.randn(n, c, 6, dtype=dtype)]


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def kernel(n=6):
    root = torch.randn(n, n)
    return root @ root.T


def samples(name):
    """Return arguments of the op, twice where an optional argument makes a difference."""
    a, b = layers()
    za, zb = layers(3)
    numbers = [1.0, 0.5], [0.1, 0.2]
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    image, sensitivity = torch.randn(4, 2, 5, 5), torch.randn(4, 2, 3, 5, 5)
    tokens, token_sensitivity = torch.randn(4, 5, 3), torch.randn(4, 2, 5, 6)
    return {
        "ntk_gram_": [(zeros(10, 10), a, b, *numbers, False), (zeros(10, 10), a, b, *numbers, True)],
        "ntk_gram_cross_": [(zeros(10, 6), a, b, za, zb, *numbers, False)],
        "jacobian_accumulate_.tile": [
            (zeros(4, 4), None, torch.randn(4, 9), None),
            (zeros(4, 4), zeros(9), torch.randn(4, 9), torch.randn(4)),
        ],
        "jacobian_accumulate_.tokens": [
            (zeros(8, 8), None, tokens, token_sensitivity, None, 0.5, 100),
            (zeros(8, 8), zeros(6, 3), tokens, token_sensitivity, torch.randn(8), 0.5, 1000),
        ],
        "jacobian_accumulate_.conv2d": [
            (zeros(8, 8), None, image, sensitivity, None, 0.5, *geometry, 100),
            (zeros(8, 8), zeros(3, 2, 3, 3), image, sensitivity, torch.randn(8), 0.5, *geometry, 10000),
        ],
        "topk_eigh": [(kernel(), 2, None, 1e-6), (torch.stack([kernel(), kernel()]), 6, None, 1e-6)],
        "spectral_norm": [(kernel(), 1e-6), (torch.stack([kernel(), kernel()]), 1e-6)],
        "agop_reduce_": [(zeros(5, 5), torch.randn(7, 5), 0.1)],
        "agop_inner": [(torch.randn(7, 5), torch.randn(3, 5))],
        "chain_sgd_": [chain(False), chain(True)],
    }[name]


def chain(ragged):
    sizes, flags = torch.tensor([2, 1 if ragged else 2]), [True, ragged]
    return (
        [torch.randn(4, 3), torch.randn(1, 4)], [torch.randn(4), torch.randn(0)], [0.5, 1.0], [0.1, 1.0],
        [0.0, 0.0], flags, flags, torch.randn(7, 3), torch.randn(7), torch.tensor([5, 2, 0, 6])[: sizes.sum()],
        sizes, torch.full((2,), 0.1, dtype=torch.float64), torch.tensor([True, True]), math.inf, 1e-6,
    )  # fmt: skip


def overload(name):
    packet, _, kind = name.partition(".")
    return getattr(getattr(torch.ops.catapult, packet), kind or "default")


def clone(args):
    copy = lambda arg: arg.clone() if isinstance(arg, torch.Tensor) else arg  # noqa: E731
    return [[copy(item) for item in arg] if isinstance(arg, list) else copy(arg) for arg in args]


def tensors(args):
    return [
        item for arg in args for item in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(item)
    ]


NAMES = list(_schema.OPS)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for args in samples(name):
        results = torch.library.opcheck(overload(name), clone(args))
        assert set(results.values()) == {"SUCCESS"}, results


IN_PLACE = [name for name in NAMES if "!" in _schema.OPS[name]]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_autograd_sees_what_is_written(name, grad):
    for args in samples(name):
        written = tensors(args)
        before, versions = [t.clone() for t in written], [t._version for t in written]
        with torch.set_grad_enabled(grad):
            overload(name)(*args)
        changed = [not torch.equal(t, old) for t, old in zip(written, before, strict=True)]
        assert any(changed)
        assert [t._version > old for t, old in zip(written, versions, strict=True)] == changed


def test_autograd_sees_what_is_written_without_the_dispatcher():
    a, b = torch.randn(5, 3), torch.randn(5, 4)
    kernel, factor = torch.zeros(5, 5), torch.ones(5, 5, requires_grad=True)
    product = (kernel * factor).sum()
    ops.ntk_gram([a], [b], out=kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    op = overload(name)
    first = lambda args: args[0][0] if isinstance(args[0], list) else args[0]  # noqa: E731
    compiled = torch.compile(lambda *args: (op(*args), first(args) + 1), fullgraph=True, backend="aot_eager")
    args = samples(name)[-1]
    eager_args, compiled_args = clone(args), clone(args)
    expected = op(*eager_args), first(eager_args) + 1
    torch.testing.assert_close(compiled(*compiled_args), expected, rtol=0, atol=0)
    torch.testing.assert_close(tensors(compiled_args), tensors(eager_args), rtol=0, atol=0)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_wrappers_compile(backend):
    a, b = layers(c=1)

    def statistics(a, b):
        gram = ops.ntk_gram(a, b, beta=[0.5, 1.0])
        return gram, ops.spectral_norm(gram), ops.topk_eigh(gram, 2)[0], ops.agop_reduce(a[0], 0.2)

    compiled = torch.compile(statistics, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(a, b), statistics(a, b))
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_backward_is_refused(name):
    op = overload(name)
    args = clone(samples(name)[-1])
    mutable = [arg.alias_info is not None for arg in op._schema.arguments]
    inputs = [
        item for arg, changed in zip(args, mutable, strict=True) if not changed for item in tensors([arg])
    ]
    inputs[0].requires_grad_()
    result = op(*args)
    changed = [arg for arg, written in zip(args, mutable, strict=True) if written]
    outputs = [*tensors(changed), *tensors([list(result) if isinstance(result, tuple) else result])]
    for output in outputs:
        assert output.requires_grad
        with pytest.raises(NotImplementedError, match=rf"catapult::{name} is not differentiable.*no_grad"):
            (output * torch.randn_like(output)).sum().backward()
    assert inputs[0].grad is None


@pytest.mark.parametrize("name", NAMES)
def test_no_grad_and_detached_inputs_record_nothing(name):
    op = overload(name)
    args = clone(samples(name)[-1])
    with torch.no_grad():
        expected = op(*args)
    assert not any(item.requires_grad for item in tensors(args))
    again = clone(samples(name)[-1])
    for item in tensors(again[-1:]):
        item.requires_grad_()
    with torch.no_grad():
        result = op(*again)
    assert (result is None) == (expected is None)
    if torch.is_tensor(result):
        assert not result.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_covers_every_op(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(overload(name).name(), "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(overload(name).name(), "Autograd")


def test_backend_with_a_missing_op_is_refused():
    with pytest.raises(RuntimeError, match="backend XPU: expected implementations of"):
        _schema.register_backend("XPU", {"agop_inner": lambda g, h: g})


# --- errors: the op, the argument, what was expected, what came ---

A, B = torch.randn(5, 3), torch.randn(5, 2, 4)
GEOMETRY = {"kernel_size": (3, 3), "padding": (1, 1)}
IMAGE, SENSITIVITY = torch.randn(4, 2, 5, 5), torch.randn(4, 1, 3, 5, 5)

ERRORS = {
    "gram length": (
        lambda: ops.ntk_gram([A], [B, B]),
        ValueError,
        r"ntk_gram_: a, b: expected 1 tensors each, one per scale, got 1 and 2",
    ),
    "gram scale length": (
        lambda: ops.ntk_gram([A], [B], scale=[1.0, 2.0]),
        ValueError,
        r"ntk_gram_: beta: expected 2 numbers, one per scale, got 1",
    ),
    "gram nothing": (lambda: ops.ntk_gram([], []), ValueError, r"b: expected at least one layer, got none"),
    "gram samples": (
        lambda: ops.ntk_gram([torch.randn(4, 3)], [B]),
        ValueError,
        r"ntk_gram_: a\[0\]: expected shape \(5, m\) with the samples of b, got \(4, 3\)",
    ),
    "gram outputs": (
        lambda: ops.ntk_gram([A, A], [B, torch.randn(5, 3, 4)]),
        ValueError,
        r"ntk_gram_: b\[1\]: expected shape \(5, 2, m\) \(samples, outputs, width\), got \(5, 3, 4\)",
    ),
    "gram one-dimensional": (
        lambda: ops.ntk_gram([torch.randn(5)], [B]),
        ValueError,
        r"ntk_gram_: a\[0\]: expected shape \(5, m\) .* got \(5,\)",
    ),
    "gram dtype": (
        lambda: ops.ntk_gram([A.double()], [B]),
        TypeError,
        r"ntk_gram_: a\[0\]: expected torch.float32 as kernel has, got torch.float64",
    ),
    "gram half": (
        lambda: ops.ntk_gram([A.half()], [B.half()]),
        TypeError,
        r"ntk_gram_: kernel: expected torch.float32 or torch.float64, got torch.float16",
    ),
    "gram out shape": (
        lambda: ops.ntk_gram([A], [B], out=zeros(5, 5)),
        ValueError,
        r"ntk_gram_: kernel: expected shape \(10, 10\), got \(5, 5\)",
    ),
    "gram out strides": (
        lambda: ops.ntk_gram([A], [B], out=zeros(10, 20)[:, ::2]),
        ValueError,
        r"ntk_gram_: kernel: expected a contiguous tensor, got strides \(20, 2\)",
    ),
    "cross widths": (
        lambda: ops.ntk_gram_cross([A], [B], [torch.randn(2, 7)], [torch.randn(2, 2, 4)]),
        ValueError,
        r"ntk_gram_cross_: za\[0\]: expected width 3 as in xa\[0\], got 7",
    ),
    "cross outputs": (
        lambda: ops.ntk_gram_cross([A], [B], [A], [B[:, :1]], out=zeros(10, 10)),
        ValueError,
        r"ntk_gram_cross_: zb: expected 2 outputs as in xb, got 1",
    ),
    "tile rows": (
        lambda: ops.jacobian_accumulate_(zeros(3, 3), torch.randn(4, 5)),
        ValueError,
        r"jacobian_accumulate_: kernel: expected shape \(4, 4\), got \(3, 3\)",
    ),
    "grad alone": (
        lambda: ops.jacobian_accumulate_(zeros(4, 4), torch.randn(4, 5), grad=zeros(5)),
        ValueError,
        r"jacobian_accumulate_: grad, weight: expected both or neither, got grad alone",
    ),
    "weight length": (
        lambda: ops.jacobian_accumulate_(zeros(4, 4), torch.randn(4, 5), grad=zeros(5), weight=zeros(5)),
        ValueError,
        r"jacobian_accumulate_: weight: expected shape \(4,\), one per kernel row, got \(5,\)",
    ),
    "grad shape": (
        lambda: ops.jacobian_accumulate_(zeros(4, 4), torch.randn(4, 5), grad=zeros(4), weight=zeros(4)),
        ValueError,
        r"jacobian_accumulate_: grad: expected shape \(5,\), got \(4,\)",
    ),
    "tokens positions": (
        lambda: ops.jacobian_accumulate_tokens_(zeros(4, 4), torch.randn(4, 6, 2), torch.randn(4, 1, 5, 3)),
        ValueError,
        r"jacobian_accumulate_: a: expected shape \(4, 5, in\) .* got \(4, 6, 2\)",
    ),
    "conv geometry": (
        lambda: ops.jacobian_accumulate_conv2d_(zeros(4, 4), IMAGE, SENSITIVITY, kernel_size=(3, 3)),
        ValueError,
        r"jacobian_accumulate_: b: expected shape \(4, c, O, 3, 3\) .* got \(4, 1, 3, 5, 5\)",
    ),
    "conv groups": (
        lambda: ops.jacobian_accumulate_conv2d_(zeros(4, 4), IMAGE, SENSITIVITY, **GEOMETRY, groups=2),
        ValueError,
        r"jacobian_accumulate_: b: expected a number of output channels that 2 groups divide, got 3",
    ),
    "conv stride": (
        lambda: ops.jacobian_accumulate_conv2d_(zeros(4, 4), IMAGE, SENSITIVITY, **GEOMETRY, stride=(0, 1)),
        ValueError,
        r"jacobian_accumulate_: stride: expected two numbers of at least 1, got \[0, 1\]",
    ),
    "tile bytes": (
        lambda: ops.jacobian_accumulate_conv2d_(zeros(4, 4), IMAGE, SENSITIVITY, **GEOMETRY, tile_bytes=0),
        ValueError,
        r"jacobian_accumulate_: tile_bytes: expected a positive number, got 0",
    ),
    "agop": (
        lambda: ops.agop_reduce(torch.randn(4, 3), out=zeros(4, 4)),
        ValueError,
        r"agop_reduce_: agop: expected shape \(3, 3\), got \(4, 4\)",
    ),
    "agop integers": (
        lambda: ops.agop_reduce(torch.ones(4, 3, dtype=torch.int64)),
        TypeError,
        r"agop_reduce_: agop: expected torch.float32 or torch.float64, got torch.int64",
    ),
    "inner widths": (
        lambda: ops.agop_inner(torch.randn(4, 3), torch.randn(4, 2)),
        ValueError,
        r"agop_inner: h: expected shape \(rows, 3\), got \(4, 2\)",
    ),
    "inner dtypes": (
        lambda: ops.agop_inner(torch.randn(4, 3), torch.randn(4, 3).double()),
        TypeError,
        r"agop_inner: h: expected torch.float32 as g has, got torch.float64",
    ),
    "topk too many": (
        lambda: ops.topk_eigh(kernel(), 7),
        ValueError,
        r"topk_eigh: k: expected a number of eigenpairs from 0 to 6, got 7",
    ),
    "norm shape": (
        lambda: ops.spectral_norm(torch.randn(3, 4)),
        ValueError,
        r"spectral_norm: kernel: expected shape \(\.\.\., n, n\), got \(3, 4\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_errors_name_the_argument(case):
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_failed_call_leaves_the_output_alone():
    out = torch.full((10, 10), math.pi)
    with pytest.raises(ValueError, match="a\\[1\\]"):
        ops.ntk_gram([A, A[:4]], [B, B], out=out)
    assert (out == math.pi).all()


def test_non_finite_is_an_arithmetic_error():
    with pytest.raises(ArithmeticError):
        ops.agop_inner(torch.full((1, 1), math.nan), torch.ones(1, 1))
    assert issubclass(cx.NonFinite, ArithmeticError)
