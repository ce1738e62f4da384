"""AGOP of every layer against autograd: each layer's input, or patch, is perturbed and differentiated by."""

from __future__ import annotations

import copy
import math

import brute_force
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_inputs import MODULES, NETWORKS, input_gradients, layer_names, outer, random_network, samples
from networks import EXACT, Embedded, make
from torch import nn

import catapult_ext as cx


@pytest.mark.parametrize("name", MODULES)
def test_every_layer_against_autograd(name: str) -> None:
    torch.manual_seed(1)
    model, x = MODULES[name](), samples(7)
    before = copy.deepcopy(model.state_dict())
    got = cx.layer_agop(model, x)
    assert list(got) == [p for p, _ in model.named_parameters() if p in layer_names(model)]
    expected = input_gradients(model, x, list(got))
    for layer, gradients in expected.items():
        assert brute_force.relative(got[layer], outer(gradients)) <= 1e-10, layer
        assert torch.equal(got[layer], got[layer].T)
    centered = cx.layer_agop(model, x, center=True, reduction="sum", positions="mean")
    for layer, gradients in expected.items():
        scale = len(x) / gradients.shape[2]
        reference = outer(gradients - gradients.mean(0)) * scale
        bound = 1e-10 * float(outer(gradients).abs().max()) * scale
        assert float((centered[layer] - reference).abs().max()) <= bound, layer
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["linear", "tokens", "called twice", "groups", "no padding, outputs"])
def test_gradients_and_alignment_without_the_matrices(name: str) -> None:
    torch.manual_seed(1)
    model, other, x = MODULES[name](), MODULES[name](), samples(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    got, others = cx.layer_gradients(model, x), cx.layer_gradients(other, x)
    g, h = cx.layer_agop(model, x), cx.layer_agop(other, x)
    for layer, gradients in input_gradients(model, x, list(g)).items():
        each = got[layer].view_as(gradients)
        if name == "called twice":  # in no particular order
            each, gradients = (t.gather(2, t[..., :1].argsort(2).expand_as(t)) for t in (each, gradients))
        assert brute_force.relative(each, gradients) <= 1e-10
        for kind in ("cosine", "pearson"):
            expected = float(cx.agop_alignment(g[layer], h[layer], correlation=kind))
            value = cx.agop_alignment(got[layer], others[layer], correlation=kind)
            assert float(value) == pytest.approx(expected, abs=1e-10)
    first = next(iter(got))
    assert torch.equal(cx.layer_gradients(model, x, params=[first])[first], got[first])


def test_first_layer_is_the_agop_of_the_input() -> None:
    for name in ("in-place relu", "three outputs"):
        model, x = make(name, 4), samples(6)
        for options in ({}, {"center": True}, {"reduction": "sum"}, {"power": 0.5, "normalize": "max"}):
            first = next(iter(cx.layer_agop(model, x, **options).values()))
            assert brute_force.relative(first, cx.agop(model, x, **options)) <= 1e-7, options


def test_layers_with_a_scale_and_untransposed_weights() -> None:
    model, x = make("scaled products", 2), samples(5)
    got = cx.layer_agop(model, x)
    # f = -1.3 relu(.3 x w^T + b) / 2 @ .7 v
    w, v, b = model.w.detach(), model.v.detach(), model.b.detach()
    gates = (F.linear(x, w * 0.3, b) > 0).double()  # [n, 16]
    factor = -1.3 * 0.7 / 2
    to_x = factor * 0.3 * (gates * v[:, 0]) @ w  # [n, 32]
    assert brute_force.relative(got["w"], to_x.T @ to_x / 5) <= 1e-12
    to_h = -1.3 * 0.7 * v.T.expand(5, -1)  # [n, 16]
    assert brute_force.relative(got["v"], to_h.T @ to_h / 5) <= 1e-12
    assert list(got) == ["w", "v"]
    fcn = cx.models.FCN(32, width=9, depth=3).double()
    first = fcn.layers[0].weight
    assert (
        brute_force.relative(cx.layer_agop(fcn, x, params=[first])["layers.0.weight"], cx.agop(fcn, x))
        <= 1e-10
    )


def test_one_dimensional_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (4, 8)),
        nn.Conv1d(4, 6, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 2),
    ).double()
    flat = nn.Sequential(  # the same as a convolution of images one row high
        nn.Unflatten(1, (4, 1, 8)),
        nn.Conv2d(4, 6, (1, 3), (1, 2), groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 2),
    ).double()
    with torch.no_grad():
        for p, q in zip(flat.parameters(), model.parameters(), strict=True):
            p.copy_(q.view(p.shape))
    x = samples(5)
    expected = input_gradients(flat, x, ["1.weight"])["1.weight"]
    assert brute_force.relative(cx.layer_agop(model, x)["1.weight"], outer(expected)) <= 1e-10


def test_integer_inputs_and_tables() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    tokens = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(1))
    got = cx.layer_agop(model, tokens)
    assert list(got) == ["1.weight", "4.weight"]
    for layer, gradients in input_gradients(model, tokens, list(got)).items():
        assert brute_force.relative(got[layer], outer(gradients)) <= 1e-10


def test_float32_matches_float64() -> None:
    for name in ("in-place relu", "convolutions", "attention, batch first"):
        model, x = make(name, 3), samples(7)
        exact = cx.layer_agop(model, x)
        got = cx.layer_agop(copy.deepcopy(model).float(), x.float())
        for layer, matrix in got.items():
            assert matrix.dtype == torch.float32
            assert brute_force.relative(matrix.double(), exact[layer]) <= 2e-5


def test_every_layer_or_an_error_that_names_it() -> None:
    """On networks that hook-based tools get wrong: a finite AGOP of the right size, or a refusal with a name."""
    refused = set()
    for name in EXACT:
        model, x = make(name, 3), samples(7)
        try:
            got = cx.layer_agop(model, x)
        except cx.UnsupportedModule as error:
            refused.add(name)
            named_in_error = [p for p, _ in model.named_parameters() if p in str(error)]
            if not named_in_error:
                raise
            continue
        named = dict(model.named_parameters())
        for layer, matrix in got.items():
            shape = named[layer].shape
            assert matrix.shape[0] in (shape[-1], shape[0], math.prod(shape[1:]), 2 * math.prod(shape[1:]))
            assert bool(torch.isfinite(matrix).all())
    assert refused == {
        "tied and transposed",
        "parametrizations",
        "batch norm, training",
        "coupled samples",
        "three outputs, batch norm",
        "bilinear",
        "scalar below coupling",
        "transposed convolution",
    }


def test_memory_bound() -> None:
    for name in ("three outputs", "convolutions"):
        model, x = make(name, 1), samples(13)
        for options in ({}, {"center": True}, {"power": 0.5, "positions": "mean"}):
            whole = cx.layer_agop(model, x, **options)
            with pytest.raises(ValueError, match=r"max_bytes: 10 is too small .* works is (\d+)") as caught:
                cx.layer_agop(model, x, max_bytes=10, **options)
            smallest = int(str(caught.value).rsplit(" ", 1)[1])
            for bound in (smallest, 2 * smallest, 10**9):
                blocks = cx.layer_agop(model, x, max_bytes=bound, **options)
                for layer, matrix in whole.items():
                    assert brute_force.relative(blocks[layer], matrix) <= 1e-7


def test_blocks_of_a_coupled_network_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 1)).double().train()
    assert list(cx.layer_agop(model, samples(8))) == [
        "1.weight",
        "3.weight",
    ]  # above the coupling, of this batch
    with pytest.raises(cx.UnsupportedModule, match="couples its samples"):
        cx.layer_agop(model, samples(8), max_bytes=20_000)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "median"}, ValueError, "reduction: expected one of 'mean', 'sum', got 'median'"),
        ({"positions": "max"}, ValueError, "positions: expected one of 'sum', 'mean'"),
        ({"normalize": "l2"}, ValueError, "normalize: expected one of None, 'max', 'trace', 'frobenius'"),
        ({"power": 0}, ValueError, "power: expected a positive number, got 0"),
        ({"power": math.inf}, ValueError, "power: expected a positive number"),
        ({"power": True}, ValueError, "power: expected a positive number, got True"),
        ({"max_bytes": -1}, ValueError, "max_bytes: expected a positive integer"),
        ({"params": "0.weight"}, TypeError, "params: expected an iterable"),
        ({"params": ["9.weight"]}, ValueError, "params: expected parameters of the model, got '9.weight'"),
        ({"params": ["0.bias"]}, cx.UnsupportedModule, "no AGOP of 0.bias: it is used as no weight"),
    ],
)
def test_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    model = make("in-place relu", 1)
    with pytest.raises(error, match=message):
        cx.layer_agop(model, samples(4), **options)
    if not {"reduction", "positions", "normalize", "max_bytes"} & options.keys():
        with pytest.raises(error, match=message):
            cx.nfa_correlation(model, samples(4), **options)


def test_refuses_by_name() -> None:
    with pytest.raises(cx.UnsupportedModule, match=r"first\.weight: it is used transposed as well"):
        cx.layer_agop(make("tied and transposed", 1), samples(4))
    with pytest.raises(cx.UnsupportedModule, match=r"0\.weight: its rows mix samples"):
        cx.layer_agop(make("batch norm, training", 1), samples(4))
    with pytest.raises(cx.UnsupportedModule, match=r"1\.weight: it is used as no weight .*Convolution"):
        cx.layer_agop(make("transposed convolution", 1), samples(4))
    assert list(cx.layer_agop(make("transposed convolution", 1), samples(4), params=["4.weight"])) == [
        "4.weight"
    ]
    tied = Embedded().double()
    tied.last = nn.Linear(6, 11, bias=False).double()
    tied.a = nn.Linear(6, 6).double()
    tied.last.weight = tied.table.weight
    with pytest.raises(
        cx.UnsupportedModule, match=r"table\.weight: it is also used as no weight .*Embedding"
    ):
        cx.layer_agop(tied, samples(4))
    dead = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(dead[0].bias, -1e3)
    assert float(cx.layer_agop(dead, samples(4))["0.weight"].abs().max()) == 0.0
    with pytest.raises(ValueError, match=r"normalize: the AGOP of 0\.weight is zero"):
        cx.layer_agop(dead, samples(4), normalize="trace")
    assert math.isnan(float(cx.nfa_correlation(dead, samples(4))["0.weight"]))


@settings(max_examples=25, deadline=None)
@given(NETWORKS, st.floats(0.2, 3.0), st.sampled_from(["max", "trace", "frobenius"]))
def test_conventions_are_what_they_say(network: dict[str, int], power: float, normalize: str) -> None:
    model, x = random_network(**network)  # type: ignore[arg-type]
    plain = cx.layer_agop(model, x)
    gradients = input_gradients(model, x, list(plain))
    order = torch.randperm(len(x))
    permuted, total = cx.layer_agop(model, x[order]), cx.layer_agop(model, x, reduction="sum")
    centered, averaged = cx.layer_agop(model, x, center=True), cx.layer_agop(model, x, positions="mean")
    raised, normal = (
        cx.layer_agop(model, x, power=power),
        cx.layer_agop(model, x, power=power, normalize=normalize),
    )
    for name, g in plain.items():
        scale = float(g.norm())
        values = torch.linalg.eigvalsh(g)
        assert torch.equal(g, g.T)
        assert float(values[0]) >= -1e-12 * scale
        assert float(g.trace()) == pytest.approx(float(gradients[name].square().sum()) / len(x), rel=1e-10)
        assert torch.allclose(permuted[name], g, rtol=0, atol=1e-12 * scale)
        assert torch.allclose(total[name], g * len(x), rtol=0, atol=1e-12 * scale * len(x))
        assert torch.allclose(averaged[name] * gradients[name].shape[2], g, rtol=0, atol=1e-12 * scale)
        # Centering takes a positive semi-definite part away.
        assert float(torch.linalg.eigvalsh(g - centered[name])[0]) >= -1e-12 * scale
        spectrum = torch.linalg.eigvalsh(raised[name])
        assert torch.allclose(
            spectrum, values.clamp_min(0) ** power, rtol=0, atol=1e-3**power * float(spectrum[-1])
        )
        norm = {"max": normal[name].max(), "trace": normal[name].trace(), "frobenius": normal[name].norm()}[
            normalize
        ]
        assert float(norm) == pytest.approx(1.0, rel=1e-12)
        assert float(cx.agop_alignment(normal[name], raised[name])) == pytest.approx(1.0, rel=1e-12)
    squared = cx.layer_agop(model, x, power=2)
    for name, g in plain.items():
        assert torch.allclose(squared[name], g @ g, rtol=0, atol=1e-12 * float(g.norm()) ** 2)
