"""Networks: scaling, initial values, forward against plain formulas, fixed layers, error messages."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import catapult_ext as cx
from catapult_ext.models import CNN, FCN, Myrtle5, ViT, WideResNet


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_nets(**options) -> list[tuple[nn.Module, torch.Tensor]]:
    """One network of each kind, of odd sizes, with an input for each, in float64; no BatchNorm."""
    g = generator(5)
    nets = [
        (FCN(11, 7, 3, 2, generator=g, **options), (11,)),
        (CNN(3, (5, 4), 7, 3, 2, generator=g, **options), (3, 5, 4)),
        (Myrtle5(3, 7, 2, generator=g, **options), (3, 8, 4)),
        (WideResNet(3, 10, 2, 2, base_width=3, batch_norm=False, generator=g, **options), (3, 5, 4)),
        (ViT(3, (6, 4), 6, 2, 2, patch_size=2, heads=3, generator=g, **options), (3, 6, 4)),
    ]
    return [(net.double(), torch.randn(6, *shape, dtype=torch.float64, generator=g)) for net, shape in nets]


# ---- forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_scale", [0.0, 0.3])
def test_fcn_forward_is_the_formula(bias_scale):
    net = FCN(11, 7, 3, 2, bias_scale=bias_scale, weight_std=0.7, generator=generator(0)).double()
    x = torch.randn(6, 11, dtype=torch.float64, generator=generator(1))
    h = x
    for index, layer in enumerate(net.layers):
        h = torch.einsum("ni,oi->no", h, layer.weight) / math.sqrt(h.shape[1])
        if bias_scale:
            h = h + bias_scale * layer.bias
        if index < 2:
            h = h.clamp(min=0)
    torch.testing.assert_close(net(x), h, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bias_scale", [0.0, 0.3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_cnn_forward_is_the_formula(bias_scale, kernel_size):
    net = CNN(
        2, (5, 4), 3, 3, 2, kernel_size=kernel_size, bias_scale=bias_scale, generator=generator(2)
    ).double()
    x = torch.randn(4, 2, 5, 4, dtype=torch.float64, generator=generator(3))
    h, half = x, kernel_size // 2
    for layer in list(net.layers)[:-1]:
        padded = torch.zeros(4, h.shape[1], 5 + 2 * half, 4 + 2 * half, dtype=torch.float64)
        padded[:, :, half : half + 5, half : half + 4] = h
        patches = padded.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1)  # [n, c, 5, 4, s, s]
        h = torch.einsum("nchwpq,ocpq->nohw", patches, layer.weight)
        h = h / math.sqrt(layer.weight[0].numel())
        if bias_scale:
            h = h + bias_scale * layer.bias[:, None, None]
        h = h.clamp(min=0)
    output = net.layers[-1]
    f = h.reshape(4, -1) @ output.weight.T / math.sqrt(3 * 5 * 4)
    if bias_scale:
        f = f + bias_scale * output.bias
    torch.testing.assert_close(net(x), f, rtol=1e-13, atol=1e-13)


def test_standard_networks_are_pytorchs_own():
    torch.manual_seed(3)
    fcn = FCN(11, 7, 3, 2, parameterization="standard")
    cnn = CNN(3, 4, 5, 3, 2, kernel_size=5, parameterization="standard")
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 2))
    plain_cnn = nn.Sequential(
        nn.Conv2d(3, 5, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(5, 5, 5, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 4 * 4, 2),
    )
    for ours, theirs in ((fcn, plain), (cnn, plain_cnn)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    x = torch.randn(6, 11)
    assert torch.equal(fcn(x), plain(x))
    x = torch.randn(6, 3, 4, 4)
    assert torch.equal(cnn(x), plain_cnn(x))


def test_images_are_flattened():
    net = FCN(3 * 4 * 4, 8, 2, generator=generator(0))
    x = torch.randn(5, 3, 4, 4, generator=generator(1))
    assert torch.equal(net(x), net(x.reshape(5, 48)))


def test_empty_batch():
    assert FCN(4, 3, 2, 2)(torch.zeros(0, 4)).shape == (0, 2)
    assert CNN(1, 4, 3, 2, 2)(torch.zeros(0, 1, 4, 4)).shape == (0, 2)


# ---- statistics at initialisation -----------------------------------------------------------------------


def test_fcn_output_variance_and_kernel_at_initialisation():
    """E f(x)^2 = weight_std^(2 depth) (1/2)^(depth - 1) |x|^2 / d: each ReLU halves the second moment, and
    nothing makes up for it (no sqrt(2)). The kernel diagonal has the mean depth weight_std^(2 (depth - 1))
    (1/2)^(depth - 1) |x|^2 / d: every layer contributes the same."""
    d, width, depth, std, nets = 30, 200, 3, 0.8, 300
    x = torch.randn(1, d, generator=generator(0), dtype=torch.float64)
    squares, diagonals = [], []
    g = generator(1)
    for _ in range(nets):
        net = FCN(d, width, depth, weight_std=std, generator=g).double()
        f = net(x)
        grads = torch.autograd.grad(f.sum(), list(net.parameters()))
        squares.append(f.item() ** 2)
        diagonals.append(sum(grad.square().sum().item() for grad in grads))
    second_moment = 0.5 ** (depth - 1) * x.square().mean().item()
    squares, diagonals = torch.tensor(squares), torch.tensor(diagonals)
    # f is close to Gaussian: the mean of f^2 over the nets deviates by sqrt(2 / nets) = 8.2 %; 5 sigma.
    assert squares.mean() == pytest.approx(std ** (2 * depth) * second_moment, rel=0.41)
    # The kernel concentrates as 1 / sqrt(width): 5 standard errors, measured from the sample itself.
    expected = depth * std ** (2 * (depth - 1)) * second_moment
    error = diagonals.std() / math.sqrt(nets)
    assert error < 0.02 * expected
    assert abs(diagonals.mean() - expected) < 5 * error


def test_cnn_preactivations_at_initialisation():
    """With 1x1 filters (no border) each convolution halves the second moment, as in a fully connected net."""
    net = CNN(3, 6, 2000, 3, kernel_size=1, generator=generator(0)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator(1))
    first = net.layers[0](x)
    second = net.layers[1](torch.relu(first))
    per_pixel = x.square().mean(1, keepdim=True)  # [n, 1, h, w]
    # Means over 2000 nearly independent Gaussian channels: relative deviation sqrt(2 / 2000) = .032; the 72
    # pixels are combinations of 3 x 3 inner products, so 5 sigma covers them.
    torch.testing.assert_close(first.square().mean(1, keepdim=True), per_pixel, rtol=0.16, atol=0)
    torch.testing.assert_close(second.square().mean(1, keepdim=True), per_pixel / 2, rtol=0.25, atol=0)


@pytest.mark.parametrize("std", [1.0, 0.1])
def test_initial_weights_and_biases_are_gaussian(std):
    net = FCN(300, 300, 2, 300, weight_std=std, bias_scale=0.5, generator=generator(0))
    for layer in net.layers:
        w = layer.weight.detach().double()
        assert w.mean().abs() < 5 * std / 300  # 90,000 draws
        assert w.std() == pytest.approx(std, rel=5 / (300 * math.sqrt(2)))
        assert layer.bias.detach().double().std() == pytest.approx(
            1, rel=5 / math.sqrt(600)
        )  # bias_scale scales later


def test_generator_decides_the_initial_values():
    before = torch.get_rng_state()
    nets = [FCN(5, 4, 3, generator=generator(s), bias_scale=1.0) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    first, same, other = (torch.nn.utils.parameters_to_vector(n.parameters()) for n in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    default = FCN(5, 4, 3)
    assert torch.equal(default.layers[0].weight, torch.randn(4, 5, generator=generator(0)))


# ---- parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (FCN(100, 1024, 2), 100 * 1024 + 1024),
        (FCN(3072, 1024, 5), 3072 * 1024 + 3 * 1024**2 + 1024),
        (FCN(10, 7, 3, 4, bias_scale=1.0), 10 * 7 + 7 + 49 + 7 + 28 + 4),
        (FCN(10, 7, 3, 4, parameterization="standard"), 10 * 7 + 7 + 49 + 7 + 28 + 4),
        (FCN(10, 7, 1, 4), 40),
        (CNN(3, 32, 64), 27 * 64 + 3 * 9 * 64**2 + 64 * 1024),
        (CNN(2, (5, 4), 3, 3, 2, bias_scale=0.1), 54 + 3 + 81 + 3 + 120 + 2),
        (CNN(2, (5, 4), 3, 3, 2, parameterization="standard"), 54 + 3 + 81 + 3 + 120 + 2),
        (CNN(1, 8, 16, 2, kernel_size=5), 25 * 16 + 16 * 64),
    ],
)
def test_parameter_count(net, count):
    assert sum(p.numel() for p in net.parameters()) == count
    assert sum(v.numel() for v in net.state_dict().values()) == count  # nothing but parameters is stored


@pytest.mark.parametrize("options", [{"bias_scale": 0.5}, {"parameterization": "standard"}])
def test_fixed_layers_are_not_trained(options):
    for net, x in small_nets(fixed_layers=(0, 2), **options):
        net(x).square().sum().backward()
        for index, layer in enumerate(net.layers):
            for p in layer.parameters():
                assert p.requires_grad == (index not in (0, 2))
                assert (p.grad is not None) == (index not in (0, 2))
        assert all(p.grad.abs().sum() > 0 for p in net.layers[1].parameters())


# ---- what PyTorch users do with modules -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"bias_scale": 0.5, "fixed_layers": (1,)}, {"parameterization": "standard"}]
)
def test_copy_state_dict_and_pickle(options):
    for net, x in small_nets(**options):
        expected = net(x)
        clone = copy.deepcopy(net)
        assert torch.equal(clone(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
        with torch.no_grad():
            for p in clone.parameters():
                p.zero_()
        assert torch.equal(net(x), expected)  # the copy has its own parameters
        clone.load_state_dict(net.state_dict())
        assert torch.equal(clone(x), expected)
        assert [p.requires_grad for p in clone.parameters()] == [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize("options", [{}, {"bias_scale": 0.5}, {"parameterization": "standard"}])
def test_compiled_network_gives_the_same_output_and_gradients(options):
    for net, x in small_nets(**options):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        weights = list(net.parameters())
        cotangent = torch.randn(6, 2, dtype=torch.float64, generator=generator(9))
        f, g = net(x), compiled(x)
        torch.testing.assert_close(g, f, rtol=1e-14, atol=1e-14)
        for a, b in zip(
            torch.autograd.grad(g, weights, cotangent),
            torch.autograd.grad(f, weights, cotangent),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_conversion_takes_the_whole_layer_along():
    """Nothing of the old dtype or device may stay behind in a layer without bias."""
    net = FCN(4, 3, 2)
    assert not list(net.buffers())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert net.to(dtype)(torch.ones(2, 4, dtype=dtype)).dtype == dtype
    assert net.to("meta")(torch.ones(2, 4, device="meta")).shape == (2, 1)


def test_float32_and_float64_agree():
    for net, x in small_nets(bias_scale=0.5):
        exact = net(x)
        single = net.float()(x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias_scale": 0.5}])
def test_per_sample_gradients_by_vmap(options):
    """torch.func works on the networks, so that it can serve as a peer and as a check."""
    for net, x in small_nets(**options):
        values = {k: p.detach() for k, p in net.named_parameters()}

        def single(values, sample, net=net):
            return torch.func.functional_call(net, values, sample[None])[0, 0]

        rows = torch.func.vmap(torch.func.grad(single), (None, 0))(values, x)
        for name, p in net.named_parameters():
            (grad,) = torch.autograd.grad(net(x)[3, 0], p)
            torch.testing.assert_close(rows[name][3], grad, rtol=1e-12, atol=1e-12)


def test_forward_hooks_see_the_layer_output_untouched():
    for net, x in small_nets():
        seen = []
        handle = net.layers[0].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        )
        net(x)
        handle.remove()
        assert (seen[0] < 0).any()


def test_repr_names_sizes():
    assert "11, 7, bias_scale=0.5" in repr(FCN(11, 7, 2, bias_scale=0.5))
    assert "3, 7, kernel_size=3, stride=1, bias_scale=0.0" in repr(CNN(3, 4, 7))


# ---- errors ---------------------------------------------------------------------------------------------

GOOD_FCN = {"in_features": 4, "width": 3, "depth": 2}
GOOD_CNN = {"in_channels": 1, "image_size": 4, "width": 3, "depth": 2}


@pytest.mark.parametrize(("cls", "good"), [(FCN, GOOD_FCN), (CNN, GOOD_CNN)])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, "width must be an integer above 0, got 0"),
        ({"width": 2.5}, r"width must be an integer above 0, got 2\.5"),
        ({"depth": 0}, "depth must be an integer above 0, got 0"),
        ({"out_features": -1}, "out_features must be an integer above 0, got -1"),
        ({"parameterization": "mup"}, """parameterization must be "ntk" or "standard", got 'mup'"""),
        ({"bias_scale": -1.0}, r"bias_scale must be finite and at least 0, got -1\.0"),
        ({"bias_scale": math.nan}, "bias_scale must be finite and at least 0, got nan"),
        ({"weight_std": 0.0}, r"weight_std must be finite and above 0, got 0\.0"),
        ({"weight_std": math.inf}, "weight_std must be finite and above 0, got inf"),
        ({"parameterization": "standard", "bias_scale": 1.0}, "bias_scale belongs to parameterization="),
        ({"parameterization": "standard", "weight_std": 0.1}, "weight_std belongs to parameterization="),
        ({"fixed_layers": (2,)}, "fixed_layers must hold layer indices from 0 to 1, got 2"),
        ({"fixed_layers": (-1,)}, "fixed_layers must hold layer indices from 0 to 1, got -1"),
        ({"fixed_layers": ("output",)}, "fixed_layers must hold layer indices from 0 to 1, got 'output'"),
    ],
)
def test_wrong_arguments_are_named(cls, good, wrong, message):
    cls(**good)
    with pytest.raises(ValueError, match=message):
        cls(**{**good, **wrong})


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (FCN, {**GOOD_FCN, "in_features": 0}, "in_features must be an integer above 0, got 0"),
        (CNN, {**GOOD_CNN, "in_channels": 0}, "in_channels must be an integer above 0, got 0"),
        (CNN, {**GOOD_CNN, "image_size": 0}, "image_size must be an integer above 0, got 0"),
        (CNN, {**GOOD_CNN, "image_size": (3, -2)}, "image_size must be an integer above 0, got -2"),
        (CNN, {**GOOD_CNN, "depth": 1}, "depth must be at least 2"),
        (CNN, {**GOOD_CNN, "kernel_size": 2}, "kernel_size must be odd, .* got 2"),
        (
            CNN,
            {**GOOD_CNN, "kernel_size": 4, "parameterization": "standard"},
            "kernel_size must be odd, .* got 4",
        ),
    ],
)
def test_wrong_sizes_are_named(cls, wrong, message):
    with pytest.raises(ValueError, match=message):
        cls(**wrong)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"x must hold in_features=4 numbers per sample.*shape \(5, 3\)"):
        FCN(4, 3, 2)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"x must hold in_features=4 .*shape \(4,\)"):
        FCN(4, 3, 2)(torch.zeros(4))
    with pytest.raises(ValueError, match=r"x must hold in_features=4 .*shape \(2, 2, 2, 2\)"):
        FCN(4, 3, 2)(torch.zeros(2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"x must have shape \(n, 3, 8, 6\), got \(5, 3, 6, 8\)"):
        CNN(3, (8, 6), 4, 2)(torch.zeros(5, 3, 6, 8))


def test_models_are_exported():
    assert cx.models.FCN is FCN
    assert cx.models.CNN is CNN
    assert cx.models.WideResNet is WideResNet
    assert cx.models.ViT is ViT
    assert cx.models.Myrtle5 is Myrtle5
