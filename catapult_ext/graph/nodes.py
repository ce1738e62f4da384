"""The only file that knows names of autograd nodes, of the tensors they save, and of the engine's entry point.

All are semi-private in PyTorch; `tests/engine/test_nodes.py` fails loudly on a version where they changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

__all__ = [
    "COUPLING_REFUSED",
    "DATA_DEPENDENT",
    "NO_SECOND_DERIVATIVE",
    "backward",
    "bag_tokens",
    "conv_geometry",
    "conv_input",
    "elementwise_derivative",
    "elementwise_scale",
    "embedding_scales_by_frequency",
    "embedding_tokens",
    "is_bag",
    "is_convolution",
    "is_data_dependent",
    "is_layer_weight",
    "is_leaf",
    "is_matrix_product",
    "is_scalar_product",
    "is_scaling",
    "is_transpose",
    "is_transposed_convolution",
    "linear_addend",
    "linear_features",
    "linear_input",
    "linear_scale",
    "linear_source",
    "negative_slope",
    "norm_saved",
    "output_count",
    "output_dtypes",
    "output_shape",
    "reads_data",
    "repeats",
    "scalar_factor",
    "takes_entry_by_entry",
    "type_name",
]

Node = Any  # torch.autograd.graph.Node; its classes are created at run time

# Routing that depends on values: the same node sequence may connect other rows next time. Overloads of one
# operation differ in a trailing number (MaxBackward0, MaxBackward1).
DATA_DEPENDENT = frozenset(
    {
        "IndexBackward",
        "IndexPutBackward",
        "IndexSelectBackward",
        "GatherBackward",
        "ScatterBackward",
        "ScatterAddBackward",
        "SortBackward",
        "TopkBackward",
        "MaxBackward",
        "MinBackward",
        "MedianBackward",
        "KthvalueBackward",
        "MaskedSelectBackward",
        "MaskedScatterBackward",
        "TakeBackward",
    }
)

# Nodes in the graph of a gradient at which PyTorch's second derivative ends, or is wrong, without an error.
NO_SECOND_DERIVATIVE = {
    "Error": "the backward of a custom function is marked once_differentiable",
    "WeightNormInterfaceBackward": (
        "torch's weight_norm takes the norm of its weight for a constant there; write weight * gain / weight.norm() "
        "in a parametrization of your own"
    ),
}

_SUM, _MEAN = 0, 1  # modes of an embedding bag

# (class, argument): see `is_layer_weight`.
_LAYER_WEIGHTS = {("AddmmBackward0", 2), ("MmBackward0", 1), ("ConvolutionBackward0", 1)}

_ENTRY_BY_ENTRY = {
    "AddBackward0",
    "SubBackward0",
    "MulBackward0",
    "EmbeddingBackward0",
    "NativeLayerNormBackward0",
}

# Nodes that hide part of the graph: parameters behind them would be reported as unused.
COUPLING_REFUSED = {
    "CheckpointFunctionBackward": (
        "reentrant checkpointing hides the parameters inside it from the autograd graph; "
        "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    ),
}


def backward(
    output: Tensor, cotangent: Tensor, edges: Sequence[Any], *, keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad(..., allow_unused=True)` for one output and one cotangent of its shape.

    The engine's entry point without the general checks around it, which cost more than the backward of a small
    network; a cotangent of another shape would be an internal error here.
    """
    return _engine_run_backward(
        (output,),
        (cotangent,),
        keep_graph,
        False,
        tuple(edges),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def type_name(node: Node) -> str:
    """Class name of a node, e.g. 'AddmmBackward0'."""
    return type(node).__name__


def is_data_dependent(node: Node) -> bool:
    """True for nodes whose routing depends on values."""
    return type_name(node).rstrip("0123456789") in DATA_DEPENDENT


def is_leaf(node: Node) -> bool:
    """True for the node that accumulates into a leaf tensor (`node.variable`)."""
    return type(node).__name__ == "AccumulateGrad"


def output_count(node: Node) -> int:
    """How many outputs of the forward operation a node takes gradients for."""
    return len(node._input_metadata)


def is_transpose(node: Node) -> bool:
    """True when the node swaps the two dimensions of a matrix."""
    name = type_name(node)
    if name == "TBackward0":
        return True
    if len(node._input_metadata[0].shape) != 2:
        return False
    # Dimensions are saved as unsigned 64-bit: -1 arrives as 2**64 - 1.
    if name == "TransposeBackward0":
        return _signed(node._saved_dim0) % 2 != _signed(node._saved_dim1) % 2
    if name == "PermuteBackward0":
        return _signed(node._saved_dims[0]) % 2 == 1
    return False


def _signed(dimension: int) -> int:
    return dimension - 2**64 if dimension >= 2**63 else dimension


def is_scalar_product(node: Node, argument: int) -> bool:
    """True for tensor * scalar, tensor / scalar and -tensor, `argument` being the tensor's position."""
    name = type_name(node)
    if name == "NegBackward0":
        return True
    if name not in ("MulBackward0", "DivBackward0"):
        return False
    if name == "DivBackward0" and argument != 0:
        return False
    other = 1 - argument
    if node.next_functions[other][0] is not None:
        return False
    saved = node._saved_other if argument == 0 else node._saved_self
    return isinstance(saved, Tensor) and saved.dim() == 0


def is_scaling(node: Node) -> bool:
    """True for a tensor times a number."""
    return any(is_scalar_product(node, k) for k, (n, _) in enumerate(node.next_functions) if n is not None)


def scalar_factor(node: Node, argument: int) -> float:
    """Factor of a node that `is_scalar_product`."""
    name = type_name(node)
    if name == "NegBackward0":
        return -1.0
    value = float(node._saved_other if argument == 0 else node._saved_self)
    return 1.0 / value if name == "DivBackward0" else value


def output_shape(node: Node, which: int) -> tuple[int, ...]:
    """Shape of one output of the forward operation."""
    return tuple(node._input_metadata[which].shape)


def output_dtypes(node: Node) -> set[torch.dtype]:
    """Dtypes of the outputs of the forward operation that have digits: real and complex ones."""
    found = {each.dtype for each in node._input_metadata}
    return {dtype for dtype in found if dtype.is_floating_point or dtype.is_complex}


def reads_data(node: Node) -> bool:
    """True for nodes whose output may hold samples although no activation reaches them through an edge."""
    name = type_name(node)
    gathers = ("EmbeddingBackward0", "EmbeddingBagBackward0", "ExpandBackward0", "RepeatBackward0")
    return is_data_dependent(node) or name in gathers


def is_matrix_product(node: Node) -> bool:
    """True for products of two matrices, with or without an addend."""
    return type_name(node) in ("AddmmBackward0", "MmBackward0")


def linear_features(node: Node) -> Tensor:
    """Left factor A [rows, in] of a matrix product; raises where it was changed in place after use."""
    return node._saved_mat1 if type_name(node) == "AddmmBackward0" else node._saved_self


def linear_scale(node: Node, role: str) -> float:
    """Factor of the product (role "weight") or of the addend (role "bias") of a matrix product."""
    if type_name(node) != "AddmmBackward0":
        return 1.0
    return float(node._saved_alpha if role == "weight" else node._saved_beta)


def linear_addend(node: Node) -> float:
    """Factor of what a matrix product is added to; 0 where there is nothing."""
    return float(node._saved_beta) if type_name(node) == "AddmmBackward0" else 0.0


def linear_source(node: Node) -> Node | None:
    """The node that made the left factor of a matrix product, None for an input of the network."""
    return linear_input(node)[0]


def linear_input(node: Node) -> tuple[Node | None, int]:
    """Where the left factor of a matrix product came out: (node, which of its outputs), (None, 0) for an input."""
    following: tuple[Node | None, int] = node.next_functions[1 if type_name(node) == "AddmmBackward0" else 0]
    return following


def negative_slope(node: Node) -> float | None:
    """Slope below zero of a piecewise linear function that is the identity above: ReLU, leaky ReLU. None for others."""
    if type_name(node) == "ReluBackward0":
        return 0.0
    return float(node._saved_negative_slope) if type_name(node) == "LeakyReluBackward0" else None


def is_transposed_convolution(node: Node) -> bool:
    """True for a transposed convolution, whose weight is [C, O / groups, ...]."""
    return bool(node._saved_transposed)


def is_convolution(node: Node) -> bool:
    """True for convolutions of any dimension, transposed ones included."""
    return type_name(node) == "ConvolutionBackward0"


def is_layer_weight(node: Node, argument: int) -> bool:
    """True where input `argument` of a node is the right factor of a matrix product or the filters of a convolution."""
    return (type_name(node), argument) in _LAYER_WEIGHTS


def takes_entry_by_entry(node: Node) -> bool:
    """True for operations that take a parameter entry by entry, or a table row by row: none sums over its entries."""
    return type_name(node) in _ENTRY_BY_ENTRY


def conv_geometry(node: Node) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
    """(stride, padding, dilation, groups) of a convolution, one number for each dimension of its maps."""
    sizes = node._saved_stride, node._saved_padding, node._saved_dilation
    # padding="valid" saves one number for all dimensions.
    dims = max(map(len, sizes))
    stride, padding, dilation = ([*size] * (dims // len(size)) for size in sizes)
    return stride, padding, dilation, node._saved_groups


def conv_input(node: Node) -> Tensor:
    """Input [n, C, ...] of a convolution; raises where it was changed in place after use."""
    return node._saved_input


def norm_saved(node: Node) -> tuple[Tensor, Tensor, Tensor]:
    """Input, mean and 1 / deviation of a normalisation, such that (input - mean) * inverse is normalised.

    LayerNorm [..., *normalized]; GroupNorm as [n, groups, rest]; BatchNorm [n, C, ...], whose statistics are those of
    the batch in training mode and the running ones in eval mode.
    """
    name = type_name(node)
    if name == "NativeBatchNormBackward0":
        shape = (-1,) + (1,) * (node._saved_input.dim() - 2)
        if node._saved_training:
            mean, inverse = node._saved_result1, node._saved_result2
        else:
            mean, inverse = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()
        return node._saved_input, mean.view(shape), inverse.view(shape)
    if name == "NativeGroupNormBackward0":
        grouped = node._saved_input.reshape(node._saved_N, node._saved_group, -1)
        return grouped, node._saved_result1.unsqueeze(2), node._saved_result2.unsqueeze(2)
    return node._saved_input, node._saved_result1, node._saved_result2


def elementwise_scale(node: Node, argument: int) -> float:
    """Number by which a sum or difference multiplies an argument, 1 for other nodes."""
    if argument == 0 or type_name(node) not in ("AddBackward0", "SubBackward0"):
        return 1.0
    return -float(node._saved_alpha) if type_name(node) == "SubBackward0" else float(node._saved_alpha)


def elementwise_derivative(node: Node, argument: int) -> Tensor:
    """Derivative of a product, quotient or PReLU by an argument, of a shape that goes with the node's."""
    if type_name(node) == "PreluKernelBackward0":
        return node._saved_self.clamp_max(0)
    this, other = node._saved_self, node._saved_other
    if type_name(node) == "MulBackward0":
        return other if argument == 0 else this
    return 1.0 / other if argument == 0 else -this / other.square()


def repeats(node: Node) -> tuple[int, ...] | None:
    """How often each dimension of a `Tensor.repeat` was repeated, None for other nodes."""
    return tuple(node._saved_repeats) if type_name(node) == "RepeatBackward0" else None


def embedding_tokens(node: Node) -> Tensor:
    """Tokens [...] of an embedding, those of the padding replaced by -1."""
    tokens: Tensor = node._saved_indices
    padding = _signed(node._saved_padding_idx)
    return tokens if padding < 0 else tokens.masked_fill(tokens == padding, -1)


def is_bag(node: Node) -> bool:
    """True for embedding bags."""
    return type_name(node) == "EmbeddingBagBackward0"


def bag_tokens(node: Node) -> tuple[Tensor, Tensor] | None:
    """Tokens [bags, P] of bags of one length and the share [bags, P], in double, that each has in its bag's output.

    None where bags differ in length, or are not sums or means. Tokens of the padding are replaced by -1.
    """
    offsets, mode = node._saved_offsets, node._saved_mode
    bags, weights = offsets.numel(), node._saved_per_sample_weights
    tokens = node._saved_indices
    size = tokens.numel() // max(1, bags)
    even = torch.equal(offsets, torch.arange(bags, device=offsets.device, dtype=offsets.dtype) * size)
    if not (even and bags * size == tokens.numel() and mode in (_SUM, _MEAN)):
        return None
    tokens = tokens.view(bags, size)
    padding = _signed(node._saved_padding_idx)
    if padding >= 0:
        tokens = tokens.masked_fill(tokens == padding, -1)
    share = (tokens >= 0).double()
    if weights is not None:
        share = share * weights.detach().view(bags, size)
    return tokens, share / share.sum(1, keepdim=True).clamp_min(1) if mode == _MEAN else share


def embedding_scales_by_frequency(node: Node) -> bool:
    """True where the embedding divides its gradient by how often a token came."""
    return bool(node._saved_scale_grad_by_freq)
