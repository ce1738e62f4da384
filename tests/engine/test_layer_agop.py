"""AGOP of every layer against autograd: each layer's input, or patch, is perturbed and differentiated by."""

from __future__ import annotations

import copy
import math
from typing import Any

import brute_force
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_inputs import (
    GEOMETRIES,
    MODULES,
    NETWORKS,
    Geometry,
    input_gradients,
    layer_names,
    outer,
    random_network,
    samples,
)
from networks import EXACT, Embedded, make
from torch import nn

import catapult_ext as cx
from catapult_ext.outer_products import power_rows


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_of_a_convolution_against_autograd(name: str) -> None:
    """In float64 and float32, with one output and with several, by the function and from an observation."""
    geometry = GEOMETRIES[name]
    seed = sum(map(ord, name))
    for outputs, n in ((1, 5), (3, 4)):
        torch.manual_seed(seed + outputs)
        model, x = geometry.make(outputs), torch.randn(n, *geometry.shape, dtype=torch.float64)
        got = cx.layer_agop(model, x)
        single = cx.layer_agop(copy.deepcopy(model).float(), x.float())
        seen, rows = observed(model, x).layer_agop(), cx.layer_gradients(model, x)
        expected = input_gradients(model, x, layer_names(model))
        assert list(got) == list(seen) == list(rows) == ["0.weight", "2.weight", "5.weight"]
        for layer, gradients in expected.items():
            reference = outer(gradients)
            assert float(reference.abs().max()) > 0
            assert brute_force.relative(got[layer], reference) <= 1e-10, layer
            assert brute_force.relative(seen[layer], reference) <= 1e-10, layer
            assert brute_force.relative(rows[layer].view_as(gradients), gradients) <= 1e-10, layer
            assert brute_force.relative(single[layer].double(), reference) <= 1e-5, layer


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_are_refused_and_those_beside_them_exact(dims: int) -> None:
    torch.manual_seed(dims)
    geometry = Geometry((3, 2, 2)[:dims], {"stride": (2, 1, 1)[:dims], "padding": 1, "groups": 2}, (2, 4))
    model, x = geometry.make(2, transposed=True), torch.randn(4, *geometry.shape, dtype=torch.float64)
    with pytest.raises(
        cx.UnsupportedModule, match=r"no AGOP of 2\.weight: it is used as no weight .*Convolution"
    ):
        cx.layer_agop(model, x)
    names = ["0.weight", "5.weight"]
    got = cx.layer_agop(model, x, params=names)
    for layer, gradients in input_gradients(model, x, names).items():
        assert brute_force.relative(got[layer], outer(gradients)) <= 1e-10, layer


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


def observed(model: nn.Module, x: torch.Tensor, **options: object) -> cx.Observation:
    output = model(x)
    y = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=output.dtype)
    return cx.observe(model, x, y, agop="layers", **options)  # type: ignore[arg-type]


CONVENTIONS: list[dict[str, object]] = [
    {},
    {"center": True, "reduction": "sum"},
    {"positions": "mean", "normalize": "max"},
    {"power": 0.5, "normalize": "trace"},
    {"power": 1.7, "normalize": "frobenius"},
    {"power": 0.7, "center": True, "positions": "mean"},
]


def by_convention(
    gradients: torch.Tensor,
    center: bool = False,
    reduction: str = "mean",
    positions: str = "sum",
    normalize: str | None = None,
    power: float = 1.0,
) -> torch.Tensor:
    """[d, d] from gradients [n, c, T, d] as the words say; singular values have no rounding that a root enlarges."""
    n, _, count, _ = gradients.shape
    rows = (gradients - gradients.mean(0) if center else gradients).flatten(0, 2)
    rows = rows / math.sqrt((n if reduction == "mean" else 1) * (count if positions == "mean" else 1))
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    matrix = vectors.T * values ** (2 * power) @ vectors
    norms = {None: 1.0, "max": matrix.max(), "trace": matrix.trace(), "frobenius": matrix.norm()}
    return matrix / norms[normalize]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_observed_layers_against_autograd(name: str, kernel: bool) -> None:
    torch.manual_seed(1)
    model, x = MODULES[name](), samples(7)
    seen = observed(model, x, kernel=kernel)
    expected = input_gradients(model, x, list(seen.layer_agop()))
    rows, factors = seen.layer_gradients(), seen.layer_agop(factored=True)
    for layer, gradients in expected.items():
        reference = outer(gradients)
        assert brute_force.relative(seen.layer_agop()[layer], reference) <= 1e-10, layer
        assert brute_force.relative(factors[layer][0].T @ factors[layer][0], reference) <= 1e-10, layer
        assert rows[layer].shape == (7, gradients.shape[1:3].numel(), gradients.shape[3])
        assert brute_force.relative(outer(rows[layer].unsqueeze(1)), reference) <= 1e-10, layer
    assert seen.input_gradients is None
    assert seen.agop is None


@pytest.mark.parametrize("options", CONVENTIONS)
@pytest.mark.parametrize("name", ["three outputs", "tokens", "called twice", "groups", "stride", "circular"])
def test_every_convention_against_autograd(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model, x = MODULES[name](), samples(9)
    seen, double, single = observed(model, x), 1e-10, 1e-5
    alone = cx.layer_agop(model, x, **options)
    matrices, factors = seen.layer_agop(**options), seen.layer_agop(factored=True, **options)
    rounded = cx.layer_agop(copy.deepcopy(model).float(), x.float(), **options)
    for layer, gradients in input_gradients(model, x, list(alone)).items():
        expected = by_convention(gradients, **options)
        # An output layer's gradients are all alike: centered, rounding is left of them.
        scale = float(by_convention(gradients, **{**options, "center": False}).abs().max())
        for got in (alone[layer], matrices[layer], factors[layer][0].T @ factors[layer][0]):
            assert float((got - expected).abs().max()) <= double * scale, layer
        assert float((rounded[layer].double() - expected).abs().max()) <= single * scale, layer


@pytest.mark.parametrize("power", [0.1, 0.25, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("d", "rank"), [(1, 1), (2, 1), (5, 3), (40, 4), (40, 40)])
def test_a_root_of_a_singular_matrix_is_no_root_of_rounding(d: int, rank: int, power: float) -> None:
    generator = torch.Generator().manual_seed(d)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0][:, :rank]
    values = torch.logspace(0, -6, rank, dtype=torch.float64)
    rows = values.sqrt()[:, None] * basis.T  # [rank, d]
    for matrix in (rows.T @ rows, basis * values @ basis.T):
        n = power_rows(matrix, power)
        assert float((n.T @ n - basis * values**power @ basis.T).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["three outputs", "tokens", "called twice", "groups", "stride"])
def test_observed_correlations_are_those_of_the_function(name: str) -> None:
    torch.manual_seed(2)
    model, x = MODULES[name](), samples(9)
    initial = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    seen = observed(model, x)
    for options in ({}, {"power": 1.0}, {"correlation": "cosine", "power": 0.7}, {"initial": initial}):
        got, expected = seen.nfa_correlation(**options), cx.nfa_correlation(model, x, **options)
        assert list(got) == list(expected)
        for layer, value in expected.items():
            assert float(got[layer]) == pytest.approx(float(value), abs=1e-10), layer


def test_factors_are_small_where_positions_are_many() -> None:
    """More rows than 16 w or 16 d: then a factor of B^T B, or of the AGOP itself, has fewer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5, 7)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 20, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(700, 2),
    ).double()
    x = torch.randn(11, 35, dtype=torch.float64)
    factors = observed(model, x).layer_agop(factored=True)
    shapes = {"1.weight": (1, 3, 9), "3.weight": (1, 3, 3), "6.weight": (1, 22, 700)}
    assert {layer: tuple(factor.shape) for layer, factor in factors.items()} == shapes
    for layer, expected in input_gradients(model, x, list(shapes)).items():
        reference = outer(expected)
        assert brute_force.relative(factors[layer][0].T @ factors[layer][0], reference) <= 1e-10, layer
        for kind in ("cosine", "pearson"):
            to_itself = cx.agop_alignment(factors[layer], reference, correlation=kind)
            assert float(to_itself) == pytest.approx(1.0, abs=1e-10)
    single, exact = copy.deepcopy(model).float(), factors
    for layer, factor in observed(single, x.float()).layer_agop(factored=True).items():
        assert factor.dtype == torch.float32
        g, h = (t[0].double().T @ t[0].double() for t in (factor, exact[layer]))
        assert brute_force.relative(g, h) <= 2e-5


def test_layers_change_nothing_else_in_an_observation() -> None:
    for name in ("in-place relu", "convolutions", "tokens", "three outputs"):
        model, x = MODULES[name]() if name in MODULES else make(name, 3), samples(6)
        output = model(x)
        y = torch.randn(output.shape, dtype=output.dtype)
        plain, layers, both = (cx.observe(model, x, y, k=3, agop=agop) for agop in (True, "layers", "all"))
        for other in (layers, both):
            assert torch.equal(plain.kernel, other.kernel)
            for gradient, expected in zip(
                other.gradients().values(), plain.gradients().values(), strict=True
            ):
                assert torch.equal(gradient, expected)
        assert torch.equal(both.agop, plain.agop)
        for layer, matrix in layers.layer_agop().items():
            assert brute_force.relative(both.layer_agop()[layer], matrix) <= 1e-12
        both.step_(0.1)
        assert torch.equal(both.agop, plain.agop)  # no weight in it


def test_observed_layers_of_integer_inputs_and_within_a_bound() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    tokens = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(1))
    got = observed(model, tokens, max_bytes=10**8).layer_agop()
    for layer, gradients in input_gradients(model, tokens, ["1.weight", "4.weight"]).items():
        assert brute_force.relative(got.pop(layer), outer(gradients)) <= 1e-10
    assert not got
    with pytest.raises(TypeError, match="x: expected a floating-point tensor for input gradients"):
        cx.observe(model, tokens, model(tokens).detach(), agop="all")


def test_observed_layers_are_those_of_the_observed_parameters() -> None:
    model, x = make("in-place relu", 3), samples(4)
    seen = observed(model, x, params=["2.weight", "4.bias"])
    assert list(seen.layer_agop()) == ["2.weight"]
    assert brute_force.relative(seen.layer_agop()["2.weight"], cx.layer_agop(model, x)["2.weight"]) <= 1e-12


def test_observed_layers_refuse_what_is_over() -> None:
    model, x = make("in-place relu", 3), samples(4)
    y = torch.randn_like(model(x))
    for read in ("layer_agop", "layer_gradients", "nfa_correlation"):
        with pytest.raises(ValueError, match=rf"{read}\(\): the observation was made without agop='layers'"):
            getattr(cx.observe(model, x, y, agop=True), read)()
        seen = cx.observe(model, x, y, agop="layers")
        seen.step_(0.1)
        with pytest.raises(ValueError, match=rf"{read}\(\): this observation has made its step already"):
            getattr(seen, read)()
        seen = cx.observe(model, x, y, agop="all")
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        with pytest.raises(ValueError, match=rf"{read}\(\): the parameters have changed since"):
            getattr(seen, read)()
    with pytest.raises(ValueError, match=r"input_agop\(\): the observation was made without agop=True"):
        cx.observe(model, x, y, agop="layers").input_agop()
    with pytest.raises(ValueError, match="agop: expected False, True, 'layers' or 'all', got 'layer'"):
        cx.Observer(model, agop="layer")
    tied = make("tied and transposed", 1)
    seen = observed(tied, x)  # the kernel is exact all the same
    with pytest.raises(cx.UnsupportedModule, match=r"first\.weight: it is used transposed as well"):
        seen.layer_agop()
    dead = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(dead[0].bias, -1e3)
    with pytest.raises(ValueError, match=r"normalize: the AGOP of 0\.weight is zero"):
        observed(dead, x).layer_agop(normalize="max", factored=True)


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
