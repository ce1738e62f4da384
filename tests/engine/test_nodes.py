"""Names of autograd nodes and of what they save: fails loudly on a PyTorch where they changed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from catapult_ext.graph import nodes, walk


def test_matrix_products() -> None:
    x, w, b = torch.randn(5, 4), nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    node = torch.addmm(b, x, w.t(), beta=0.5, alpha=0.25).grad_fn
    assert nodes.type_name(node) == "AddmmBackward0"
    assert torch.equal(nodes.linear_features(node), x)
    assert nodes.linear_scale(node, "weight") == 0.25
    assert nodes.linear_scale(node, "bias") == 0.5
    node = F.linear(x, w).grad_fn
    assert nodes.type_name(node) == "MmBackward0"
    assert torch.equal(nodes.linear_features(node), x)
    assert nodes.linear_scale(node, "weight") == 1.0
    kinds = [nodes.type_name(n) for n in walk(F.linear(x, w, b)).nodes]
    assert kinds == ["AddmmBackward0", "AccumulateGrad", "TBackward0", "AccumulateGrad"]
    assert [nodes.is_leaf(n) for n in walk(F.linear(x, w, b)).nodes] == [False, True, False, True]


def test_transpositions() -> None:
    w, cube = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3, 4))
    for view in (w.t(), w.T, w.mT, w.transpose(0, 1), w.transpose(-1, -2), w.permute(1, 0), w.permute(-1, 0)):
        assert nodes.is_transpose(view.grad_fn), view.grad_fn
    for view in (
        w.transpose(0, 0),
        w.permute(0, 1),
        cube.transpose(0, 1),
        cube.permute(2, 1, 0),
        w.view(4, 3),
    ):
        assert not nodes.is_transpose(view.grad_fn) or view.grad_fn is None, view.grad_fn


def test_scalar_products() -> None:
    w, s = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.tensor(2.0))
    cases = [
        (w * 0.3, 0, 0.3),
        (0.3 * w, 0, 0.3),
        (w / 4, 0, 0.25),
        (-w, 0, -1.0),
        (w * torch.tensor(3.0), 0, 3.0),
    ]
    cases.append((torch.tensor(3.0) * w, 1, 3.0))
    for product, argument, factor in cases:
        assert nodes.is_scalar_product(product.grad_fn, argument), product.grad_fn
        assert abs(nodes.scalar_factor(product.grad_fn, argument) - factor) < 1e-7
    for product, argument in [(w * s, 0), (w * torch.randn(3, 4), 0), (1.0 / w, 1), (w + 1, 0), (w / s, 0)]:
        assert not nodes.is_scalar_product(product.grad_fn, argument), product.grad_fn


def test_convolutions() -> None:
    x, w = torch.randn(2, 4, 6, 6), nn.Parameter(torch.randn(4, 2, 3, 3))
    node = F.conv2d(x, w, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2).grad_fn
    assert nodes.type_name(node) == "ConvolutionBackward0"
    assert torch.equal(nodes.conv_input(node), x)
    stride, padding, dilation, groups = nodes.conv_geometry(node)
    assert (tuple(stride), tuple(padding), tuple(dilation), groups) == ((2, 1), (1, 2), (1, 2), 2)
    assert not nodes.is_transposed_convolution(node)
    node = F.conv_transpose1d(x[:, :, 0], w[:, :, 0], stride=2).grad_fn
    assert nodes.type_name(node) == "ConvolutionBackward0"
    assert nodes.is_transposed_convolution(node)
    assert [tuple(part) for part in nodes.conv_geometry(node)[:3]] == [(2,), (0,), (1,)]


def test_normalisations() -> None:
    x, w, b = torch.randn(2, 4, 6), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    for name, output in [
        ("NativeGroupNormBackward0", F.group_norm(x, 2, w, b)),
        ("NativeBatchNormBackward0", F.batch_norm(x, mean, var, w, b)),
        ("NativeBatchNormBackward0", F.batch_norm(x, mean.clone(), var.clone(), w, b, training=True)),
        ("NativeLayerNormBackward0", F.layer_norm(x.transpose(1, 2), (4,), w, b).transpose(1, 2).clone()),
    ]:
        node = output.grad_fn
        while nodes.type_name(node) in ("CloneBackward0", "TransposeBackward0"):
            node = node.next_functions[0][0]
        assert nodes.type_name(node) == name
        leaves = [None if n is None else n.variable for n, _ in node.next_functions]
        assert all(got is expected for got, expected in zip(leaves, (None, w, b), strict=True))
        given, middle, inverse = nodes.norm_saved(node)
        normalised = ((given - middle) * inverse).reshape(
            x.transpose(1, 2).shape if "Layer" in name else x.shape
        )
        normalised = normalised.transpose(1, 2) if "Layer" in name else normalised
        expected = normalised * w[:, None] + b[:, None]
        assert torch.allclose(expected, output, atol=1e-5)


def test_elementwise() -> None:
    x, w = torch.randn(3, 4), nn.Parameter(torch.randn(4))
    for output, name, argument, factor in [
        (torch.add(x, w, alpha=3), "AddBackward0", 1, 3.0),
        (w + x, "AddBackward0", 0, 1.0),
        (x - w, "SubBackward0", 1, -1.0),
        (w - x, "SubBackward0", 0, 1.0),
    ]:
        assert nodes.type_name(output.grad_fn) == name
        assert nodes.elementwise_scale(output.grad_fn, argument) == factor
    for output, name, argument, derivative in [
        (x * w, "MulBackward0", 1, x),
        (w * x, "MulBackward0", 0, x),
        (w / x, "DivBackward0", 0, 1 / x),
        (x / w, "DivBackward0", 1, -x / w**2),
    ]:
        assert nodes.type_name(output.grad_fn) == name
        assert nodes.elementwise_scale(output.grad_fn, argument) == 1.0
        got = nodes.elementwise_derivative(output.grad_fn, argument).expand(3, 4)
        assert torch.allclose(got, derivative.expand(3, 4))
    assert nodes.type_name(w.expand(3, 4).grad_fn) == "ExpandBackward0"
    assert nodes.repeats(w.repeat(3, 2).grad_fn) == (3, 2)
    assert nodes.repeats(w.expand(3, 4).grad_fn) is None


def test_embeddings() -> None:
    table, tokens = nn.Parameter(torch.randn(5, 3)), torch.tensor([[1, 4], [2, 2]])
    node = F.embedding(tokens, table).grad_fn
    assert nodes.type_name(node) == "EmbeddingBackward0"
    assert torch.equal(nodes.embedding_tokens(node), tokens)
    assert not nodes.embedding_scales_by_frequency(node)
    node = F.embedding(tokens, table, padding_idx=2).grad_fn
    assert nodes.embedding_tokens(node).tolist() == [[1, 4], [-1, -1]]
    assert nodes.embedding_scales_by_frequency(F.embedding(tokens, table, scale_grad_by_freq=True).grad_fn)


def test_data_dependent_nodes_have_these_names() -> None:
    w = nn.Parameter(torch.randn(3, 4))
    index = torch.tensor([1, 0, 2])
    made = {
        nodes.type_name(t.grad_fn).rstrip("0123456789")
        for t in (
            w[index],
            w.index_select(0, index),
            w.gather(0, index[None, :].expand(3, 3)[:, :3]),
            w.sort()[0],
            w.topk(2)[0],
            w.max(0)[0],
            w.min(0)[0],
            w.median(0)[0],
            w.kthvalue(1)[0],
            w.masked_select(w > -9),
            w.take(index),
            torch.zeros(3, 4).scatter(0, index[None, :].expand(3, 3), w),
            torch.zeros(3, 4).scatter_add(0, index[None, :].expand(3, 3), w),
            torch.zeros(3, 4).index_put((index,), w),
            torch.zeros(3, 4).masked_scatter(torch.ones(3, 4, dtype=torch.bool), w),
        )
    }
    assert made == nodes.DATA_DEPENDENT
    assert nodes.is_data_dependent(w.max().grad_fn)
    assert not nodes.is_data_dependent((w + 1).grad_fn)


def test_functions_of_parameters() -> None:
    w = nn.Parameter(torch.randn(6, 4))
    first, second = w.chunk(2)
    assert nodes.output_shape(first.grad_fn, 1) == (3, 4)
    assert second.grad_fn is first.grad_fn
    index = torch.tensor([1, 0])
    for output, expected in [
        (F.embedding(index, w), True),
        (w[index], True),
        (w.expand(2, 6, 4), True),
        (w.repeat(2, 1), True),
        (w[1:3], False),
        (w.view(3, 8), False),
        (w.exp(), False),
    ]:
        assert nodes.reads_data(output.grad_fn) == expected, output.grad_fn
    assert nodes.is_scaling((0.3 * w).grad_fn)
    assert nodes.is_scaling((-w).grad_fn)
    assert not nodes.is_scaling((w * torch.randn(6, 4)).grad_fn)
    assert not nodes.is_scaling((w * w).grad_fn)


def test_how_many_outputs_a_node_takes_gradients_for() -> None:
    x = nn.Parameter(torch.randn(3, 4))
    assert nodes.output_count(F.layer_norm(x, (4,)).grad_fn) == 1
    assert nodes.output_count((x + 1).grad_fn) == 1
    assert nodes.output_count(x.unbind(0)[0].grad_fn) == 3


def test_the_engine_entry_point_equals_autograd() -> None:
    w = nn.Parameter(torch.randn(3, 4))
    idle = nn.Parameter(torch.randn(2))
    x = torch.randn(5, 4)
    output = torch.tanh(F.linear(x, w))
    edge = torch.autograd.graph.GradientEdge(output.grad_fn.next_functions[0][0], 0)
    cotangent = torch.randn(5, 3)
    expected = torch.autograd.grad(output, [edge, w, idle], cotangent, retain_graph=True, allow_unused=True)
    got = nodes.backward(output, cotangent, [edge, w, idle], keep_graph=False)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[2] is None
    assert w.grad is None


def test_layers_and_entry_by_entry_operations() -> None:
    x, w = torch.randn(5, 4), nn.Parameter(torch.randn(3, 4))
    product, gain = F.linear(x, w).grad_fn, (torch.randn(3, 4) * w).grad_fn
    convolution = F.conv1d(torch.randn(2, 4, 6), nn.Parameter(torch.randn(3, 4, 3))).grad_fn
    assert nodes.is_layer_weight(product, 1)
    assert not nodes.is_layer_weight(product, 0)
    assert nodes.is_layer_weight(convolution, 1)
    assert not nodes.is_layer_weight(convolution, 2)
    assert [nodes.is_convolution(node) for node in (product, convolution)] == [False, True]
    tables = F.embedding(torch.tensor([1, 2]), nn.Parameter(torch.randn(5, 3))).grad_fn
    norm = F.layer_norm(x, (4,), nn.Parameter(torch.ones(4))).grad_fn
    assert all(
        map(nodes.takes_entry_by_entry, (gain, (x + nn.Parameter(torch.randn(4))).grad_fn, tables, norm))
    )
    assert not any(map(nodes.takes_entry_by_entry, (product, convolution)))


def test_what_a_chain_of_layers_is_read_off() -> None:
    x, w, b = torch.randn(5, 4), nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    with_bias, without = F.linear(x, w, b), F.linear(x, w)
    scaled = torch.addmm(torch.zeros(()), x, w.t(), beta=0.0, alpha=0.5)
    assert [nodes.linear_addend(out.grad_fn) for out in (with_bias, without, scaled)] == [1.0, 0.0, 0.0]
    assert [nodes.linear_source(out.grad_fn) for out in (with_bias, without, scaled)] == [None] * 3
    hidden = torch.relu(with_bias)
    for layer in (F.linear(hidden, nn.Parameter(torch.randn(2, 3))), torch.mm(hidden, torch.randn(3, 2))):
        assert nodes.linear_source(layer.grad_fn) is hidden.grad_fn
    assert nodes.negative_slope(hidden.grad_fn) == 0.0
    assert nodes.negative_slope(F.leaky_relu(with_bias, 0.25).grad_fn) == 0.25
    assert nodes.negative_slope(torch.tanh(with_bias).grad_fn) is None
