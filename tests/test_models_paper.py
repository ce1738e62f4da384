"""Wide ResNet, ViT and Myrtle-5 against PyTorch's own modules, published sizes and their statistics."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.models import FCN, Myrtle5, NTKConv2d, NTKLinear, ViT, WideResNet
from python_experiments import initial_kernels

NTK = {"bias_scale": 0.3, "weight_std": 0.7}
STANDARD = {"parameterization": "standard"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, channels: int, *size: int) -> Tensor:
    return torch.randn(n, channels, *size, dtype=torch.float64, generator=generator(1))


def plain(layer: nn.Module) -> nn.Module:
    """The layer of PyTorch that computes the same: NTK scales are multiplied into its weights."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        return layer
    bias = layer.bias is not None
    if isinstance(layer, NTKLinear):
        same: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=bias)
    else:
        s = layer.kernel_size
        same = nn.Conv2d(layer.in_channels, layer.out_channels, s, layer.stride, s // 2, bias=bias)
    same.weight = nn.Parameter(layer.weight.detach() / math.sqrt(layer.weight[0].numel()))
    if bias:
        same.bias = nn.Parameter(layer.bias.detach() * layer.bias_scale)
    return same


# ---- forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [NTK, STANDARD])
def test_myrtle_is_its_layers_in_sequence(options):
    net = Myrtle5(2, 5, 3, generator=generator(0), **options).double()
    first, second, third, fourth, output = map(plain, net.layers)
    same = nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.AvgPool2d(2),
        third, nn.ReLU(), nn.AvgPool2d(2),
        fourth, nn.ReLU(), nn.AvgPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2), nn.Flatten(), output,
    )  # fmt: skip
    x = images(4, 2, 32, 32)
    torch.testing.assert_close(net(x), same(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [NTK, STANDARD])
def test_vit_is_pytorchs_encoder(options):
    net = ViT(2, (8, 12), 12, 3, 2, heads=3, mlp_width=20, generator=generator(0), **options).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "norm" in name:  # as initialised, gains and biases would not show where they are used
                p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator(2)))
    embedding, *blocks, head = net.layers
    x = images(4, 2, 8, 12)
    h = plain(embedding.linear)(F.unfold(x, 4, stride=4).transpose(1, 2))  # [n, 6, 12]
    token = embedding.class_token.expand(4, 1, 12)
    h = torch.cat([token, h], 1) + embedding.positions
    for block in blocks:
        layer = nn.TransformerEncoderLayer(
            12, 3, 20, dropout=0.0, activation="relu", batch_first=True, norm_first=True
        ).double()
        joint, output = plain(block.attention.queries_keys_values), plain(block.attention.output)
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = joint.weight, joint.bias
        layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias = output.weight, output.bias
        layer.linear1, layer.linear2 = plain(block.hidden), plain(block.output)
        layer.norm1, layer.norm2 = block.norm1, block.norm2
        h = layer(h)
    expected = plain(head.linear)(head.norm(h[:, 0]))
    torch.testing.assert_close(net(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("options", [NTK, STANDARD])
@pytest.mark.parametrize(
    ("depth", "strides", "shortcuts"),
    [(10, (1, 2, 2), (0, 1, 2)), (16, (1, 1, 2, 1, 2, 1), (0, 2, 4))],
)
def test_wide_resnet_is_the_formula(depth, strides, shortcuts, options, batch_norm):
    net = WideResNet(
        2, depth, 2, 3, base_width=3, batch_norm=batch_norm, generator=generator(0), **options
    ).double()
    x = images(4, 2, 9, 8)

    def active(h: Tensor) -> Tensor:
        if batch_norm:  # gains are 1 and biases 0
            mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
            h = (h - mean) / torch.sqrt(variance + 1e-5)
        return h.clamp(min=0)

    first, *blocks, head = net.layers
    widths = sorted([6, 12, 24] * (len(blocks) // 3))
    h = plain(first)(x)
    assert h.shape == (4, 3, 9, 8)
    for index, (block, stride, width) in enumerate(zip(blocks, strides, widths, strict=True)):
        rectified = active(h)
        inner = plain(block.conv1)(rectified)
        if index in shortcuts:
            h = F.conv2d(rectified, plain(block.shortcut).weight, plain(block.shortcut).bias, stride)
        h = h + plain(block.conv2)(active(inner))
        assert h.shape == (4, width, *{6: (9, 8), 12: (5, 4), 24: (3, 2)}[width])
    expected = plain(head.linear)(active(h).mean((2, 3)))
    torch.testing.assert_close(net(x), expected, rtol=1e-11, atol=1e-11)


def test_batch_norm_by_default():
    def normalised(**options):
        net = WideResNet(3, 10, 1, base_width=2, **options)
        biases = {name for name, _ in net.named_parameters() if "conv" in name and name.endswith("bias")}
        assert not (biases and any(isinstance(m, nn.BatchNorm2d) for m in net.modules()))
        return any(isinstance(m, nn.BatchNorm2d) for m in net.modules())

    assert not normalised()
    assert normalised(batch_norm=True)
    assert normalised(parameterization="standard")
    assert not normalised(parameterization="standard", batch_norm=False)


# ---- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "count"),
    [
        # The sizes that others print for the same networks, with 10 classes (with 1000 for the ViT, DeiT-Tiny).
        (lambda: WideResNet(3, 16, 2, 10, **STANDARD), 691_674),
        (lambda: WideResNet(3, 40, 1, 10, **STANDARD), 563_930),
        (lambda: WideResNet(3, 40, 2, 10, **STANDARD), 2_243_546),
        (lambda: WideResNet(3, 16, 8, 10, **STANDARD), 10_961_370),
        (lambda: ViT(3, 224, 192, 12, 1000, patch_size=16, heads=3, **STANDARD), 5_717_416),
        # Layer by layer.
        (
            lambda: WideResNet(3),
            27 * 16
            + 9 * 16 * 160 + 9 * 160**2 + 16 * 160
            + 9 * 160 * 320 + 9 * 320**2 + 160 * 320
            + 9 * 320 * 640 + 9 * 640**2 + 320 * 640
            + 640,
        ),
        (
            lambda: ViT(3, 32, 64),
            48 * 64 + 64 + 65 * 64 + 4 * (3 * 64**2 + 64**2 + 2 * 4 * 64**2 + 4 * 64) + 2 * 64 + 64,
        ),
        (lambda: Myrtle5(3, 64, 10), 27 * 64 + 3 * 9 * 64**2 + 64 * 10),
        (lambda: Myrtle5(3, 64, 10, **STANDARD), 27 * 64 + 3 * 9 * 64**2 + 4 * 64 + 64 * 10 + 10),
    ],
)  # fmt: skip
def test_parameter_count(make, count):
    assert sum(p.numel() for p in make().parameters()) == count


def documented():
    """Cells of the table of initial kernels by the Python that makes the network."""
    text = (Path(__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+\(.*?\))`[^|]* \| (.*) \|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def numbers(cell):
    return [float(number) for number in cell.split(",")]


def test_the_table_of_the_documentation_has_all_rows_and_sizes():
    table = documented()
    assert table.keys() == {row.name for row in initial_kernels.ROWS}
    for row in initial_kernels.ROWS:
        assert sum(p.numel() for p in row.make(0).parameters()) == int(table[row.name][0].replace(",", ""))
        assert table[row.name][4] == row.paper


def test_what_is_measured_at_initialisation():
    net = FCN(6, 40, 2, 2, generator=generator(0)).double()
    x = images(5, 1, 2, 3)
    found = initial_kernels.at_initialisation(net, x)
    jacobian = cx.jacobian(net, x).flatten(0, 1)
    kernel = jacobian @ jacobian.T
    lengths = jacobian.norm(dim=1)
    pairs = [kernel[i, j] / (lengths[i] * lengths[j]) for i in range(10) for j in range(10) if i != j]
    assert found.parameters == 6 * 40 + 80
    assert found.size == pytest.approx(float(kernel.trace()) / 10, rel=1e-12)
    assert found.cosine == pytest.approx(float(sum(pairs)) / 90, rel=1e-12)
    assert found.critical_lr == pytest.approx(10 / float(torch.linalg.eigvalsh(kernel)[-1]), rel=1e-10)


@pytest.mark.skipif("CATAPULT_DATA" not in os.environ, reason="CATAPULT_DATA is not set: no CIFAR-10 images")
@pytest.mark.parametrize(
    "row", [row for row in initial_kernels.ROWS if "FCN" in row.name], ids=lambda row: row.name
)
def test_the_table_of_the_documentation_is_measured(row):
    images = cx.data.load("cifar10", classes=row.classes, train=row.samples).train.x
    cells = initial_kernels.rendered(row, images).strip("| ").split("|")[1:]
    for cell, printed in zip(cells[1:4], documented()[row.name][1:4], strict=True):
        assert numbers(cell) == pytest.approx(
            numbers(printed), rel=0.1
        )  # the last of two digits, plus or minus one


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (16, 24)])
def test_output_shape_for_any_image(size):
    x = torch.randn(3, 1, *size, generator=generator(0))
    for net in (
        Myrtle5(1, 4, 5),
        WideResNet(1, 10, 1, 5, base_width=2),
        WideResNet(1, 10, 1, 5, base_width=2, **STANDARD),
        ViT(1, size, 8, 1, 5),
    ):
        assert net(x).shape == (3, 5)
        if not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
            assert net(x[:0]).shape == (0, 5)


# ---- statistics at initialisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1.0, 0.5])
@pytest.mark.parametrize("name", ["myrtle", "wide resnet", "vit"])
def test_every_ntk_layer_keeps_the_mean_square(name, std):
    """E (W h)^2 / fan-in = weight_std^2 mean h^2, of a convolution over the patch of h under the filter."""
    options = {"weight_std": std, "generator": generator(0)}
    net = {
        "myrtle": lambda: Myrtle5(3, 128, 128, **options),
        "wide resnet": lambda: WideResNet(3, 16, 4, 128, base_width=32, **options),
        "vit": lambda: ViT(3, 16, 128, 4, 128, **options),
    }[name]()
    seen = []

    def look(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        (h,) = args
        if isinstance(layer, NTKConv2d):
            s = layer.kernel_size
            h = F.unfold(h, s, padding=s // 2, stride=layer.stride)
        ratio = output.square().mean() / h.square().mean()
        outputs = layer.weight.shape[0]
        seen.append((float(ratio), outputs))

    for layer in net.modules():
        if isinstance(layer, (NTKConv2d, NTKLinear)):
            layer.register_forward_hook(look)
    with torch.no_grad():
        net(torch.randn(2, 3, 16, 16, generator=generator(1)))
    assert len(seen) == {"myrtle": 5, "wide resnet": 1 + 3 * 3 + 3 * 2 + 1, "vit": 1 + 4 * 4 + 1}[name]
    for ratio, outputs in seen:
        # A mean over `outputs` independent outputs, at worst each the square of one Gaussian: 5 sigma.
        assert ratio == pytest.approx(std**2, rel=5 * math.sqrt(2 / outputs))


def test_vit_output_has_variance_one():
    """LayerNorm before the output layer: E f^2 = 1 whatever the depth."""
    for depth in (1, 4):
        f = ViT(3, 16, 64, depth, 2000, generator=generator(depth))(torch.randn(3, 3, 16, 16))
        torch.testing.assert_close(f.square().mean(1), torch.ones(3), rtol=5 * math.sqrt(2 / 2000), atol=0)


@pytest.mark.parametrize("name", ["myrtle", "wide resnet", "vit"])
def test_kernel_keeps_its_size_under_ntk_parameterization_only(name):
    """Four times the width leaves the weights' part of K(x, x) as it is, and about quadruples the standard one.

    The images are so large that the standard biases, which shrink with the width, do not show.
    """
    make = {
        "myrtle": lambda w, **o: Myrtle5(3, 16 * w, **o),
        "wide resnet": lambda w, **o: WideResNet(3, 10, 2, base_width=8 * w, batch_norm=False, **o),
        "vit": lambda w, **o: ViT(3, 16, 32 * w, 2, **o),
    }[name]
    x = 10 * torch.randn(2, 3, 16, 16, generator=generator(0))

    def size(width: int, parameterization: str) -> float:
        nets = [make(width, parameterization=parameterization, generator=generator(s)) for s in range(8)]
        weights = [[p for p in net.parameters() if p.dim() > 1] for net in nets]
        kernels = [cx.ntk(net, x, params=w) for net, w in zip(nets, weights, strict=True)]
        return sum(float(kernel.diagonal().mean()) for kernel in kernels)

    # Measured: 1.09, .96, 1.00 and 5.3, 3.0, 3.9; the mean over 8 narrow nets scatters by some 15 %.
    assert size(4, "ntk") / size(1, "ntk") == pytest.approx(1, abs=0.5)
    assert size(4, "standard") / size(1, "standard") > 2.5


# ---- seeds, fixed layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, STANDARD])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: Myrtle5(3, 4, **o),
        lambda **o: WideResNet(3, 10, 1, base_width=2, **o),
        lambda **o: ViT(3, 8, 8, 1, **o),
    ],
)
def test_generator_decides_the_initial_values(make, options):
    before = torch.get_rng_state()
    first, same, other = (
        torch.nn.utils.parameters_to_vector(make(generator=generator(s), **options).parameters())
        for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_standard_layers_are_initialised_as_pytorchs():
    torch.manual_seed(3)
    net = Myrtle5(3, 4, 2, **STANDARD)
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)]
    for ours, theirs in zip(net.layers, layers, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    torch.manual_seed(3)
    first = WideResNet(3, 10, 1, base_width=2, **STANDARD).layers[0]
    torch.manual_seed(3)
    assert torch.equal(first.weight, nn.Conv2d(3, 2, 3, bias=False).weight)
    torch.manual_seed(3)
    embedding = ViT(3, 8, 8, 1, **STANDARD).layers[0]
    torch.manual_seed(3)
    assert torch.equal(embedding.linear.weight, nn.Linear(48, 8).weight)


def test_embeddings_are_gaussian():
    for options, std in (({}, 1.0), ({"weight_std": 0.1}, 0.1), (STANDARD, 1.0)):
        positions = ViT(3, 64, 64, 1, generator=generator(0), **options).layers[0].positions  # [257, 64]
        assert positions.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * positions.numel()))


def test_fixed_layers_count_blocks():
    net = WideResNet(3, 10, 1, base_width=2, batch_norm=True, fixed_layers=(0, 2))
    assert [all(p.requires_grad for p in layer.parameters()) for layer in net.layers] == [
        False, True, False, True, True,
    ]  # fmt: skip
    assert not any(p.requires_grad for p in net.layers[2].parameters())
    with pytest.raises(ValueError, match="fixed_layers must hold layer indices from 0 to 4, got 5"):
        WideResNet(3, 10, 1, base_width=2, fixed_layers=(5,))
    with pytest.raises(ValueError, match="fixed_layers must hold layer indices from 0 to 3, got 4"):
        ViT(3, 8, 8, 2, fixed_layers=(4,))


# ---- errors -------------------------------------------------------------------------------------------------

GOOD_WRN = {"in_channels": 1, "widen_factor": 1, "base_width": 2}
GOOD_VIT = {"in_channels": 1, "image_size": 8, "width": 8, "depth": 1}
GOOD_MYRTLE = {"in_channels": 1, "width": 2}


@pytest.mark.parametrize(
    ("cls", "good", "wrong", "message"),
    [
        (WideResNet, GOOD_WRN, {"in_channels": 0}, "in_channels must be an integer above 0, got 0"),
        (WideResNet, GOOD_WRN, {"depth": 4}, r"depth must be 6 N \+ 4 with N >= 1 .*, got 4"),
        (WideResNet, GOOD_WRN, {"depth": 12}, r"depth must be 6 N \+ 4 with N >= 1 .*, got 12"),
        (WideResNet, GOOD_WRN, {"depth": -2}, "depth must be an integer above 0, got -2"),
        (WideResNet, GOOD_WRN, {"widen_factor": 0.5}, r"widen_factor must be an integer above 0, got 0\.5"),
        (WideResNet, GOOD_WRN, {"base_width": 0}, "base_width must be an integer above 0, got 0"),
        (WideResNet, GOOD_WRN, {"out_features": 0}, "out_features must be an integer above 0, got 0"),
        (WideResNet, GOOD_WRN, {"batch_norm": "yes"}, "batch_norm must be True, False or None, got 'yes'"),
        (WideResNet, GOOD_WRN, {"parameterization": "mup"}, 'parameterization must be "ntk" or "standard"'),
        (ViT, GOOD_VIT, {"image_size": 0}, "image_size must be an integer above 0, got 0"),
        (ViT, GOOD_VIT, {"image_size": (8, 6)}, "image_size must be a multiple of patch_size=4 .* 8 x 6"),
        (ViT, GOOD_VIT, {"width": 12}, "width must be a multiple of heads=8, got 12"),
        (ViT, GOOD_VIT, {"depth": 0}, "depth must be an integer above 0, got 0"),
        (ViT, GOOD_VIT, {"patch_size": 0}, "patch_size must be an integer above 0, got 0"),
        (ViT, GOOD_VIT, {"heads": 0}, "heads must be an integer above 0, got 0"),
        (ViT, GOOD_VIT, {"mlp_width": 0}, "mlp_width must be an integer above 0, got 0"),
        (ViT, GOOD_VIT, {**STANDARD, "weight_std": 0.1}, "weight_std belongs to parameterization="),
        (Myrtle5, GOOD_MYRTLE, {"width": 0}, "width must be an integer above 0, got 0"),
        (Myrtle5, GOOD_MYRTLE, {"bias_scale": math.nan}, "bias_scale must be finite and at least 0, got nan"),
    ],
)
def test_wrong_arguments_are_named(cls, good, wrong, message):
    cls(**good)
    with pytest.raises(ValueError, match=message):
        cls(**{**good, **wrong})


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"\(n, 3, height, width\), got \(2, 1, 8, 8\)"):
        WideResNet(3, 10, 1, base_width=2)(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(n, 3, height, width\), got \(2, 192\)"):
        WideResNet(3, 10, 1, base_width=2)(torch.zeros(2, 192))
    with pytest.raises(ValueError, match=r"height and width multiples of 4, got \(2, 3, 8, 6\)"):
        Myrtle5(3, 4)(torch.zeros(2, 3, 8, 6))
    with pytest.raises(ValueError, match=r"\(n, 3, 8, 8\), got \(2, 3, 8, 12\)"):
        ViT(3, 8, 8, 1)(torch.zeros(2, 3, 8, 12))
