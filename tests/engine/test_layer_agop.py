"""AGOP of every layer against autograd: each layer's input, or patch, is perturbed and differentiated by."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import brute_force
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import EXACT, Embedded, make
from torch import Tensor, nn

import catapult_ext as cx


class _Perturbed(nn.Module):
    """A layer in place of another: what its weight is multiplied with gets a leaf of zeros added."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.leaves: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return layer(x + self._leaf(x))
        assert isinstance(layer, nn.Conv2d)
        if layer.padding_mode == "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice)
        else:
            x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(
            1, 2
        )  # [n, T, C s s]
        patches = patches + self._leaf(patches)
        groups, outputs = layer.groups, layer.out_channels
        each = patches.unflatten(2, (groups, -1))  # [n, T, groups, C / groups s s]
        filters = layer.weight.flatten(1).unflatten(0, (groups, -1))  # [groups, O / groups, C / groups s s]
        out = torch.einsum("ntgd,god->ngot", each, filters).flatten(1, 2)
        if layer.bias is not None:
            out = out + layer.bias[:, None]
        size = [
            (x.shape[2 + a] - layer.dilation[a] * (layer.kernel_size[a] - 1) - 1) // layer.stride[a] + 1
            for a in (0, 1)
        ]
        return out.view(len(x), outputs, *size)

    def _leaf(self, like: Tensor) -> Tensor:
        self.leaves.append(torch.zeros_like(like, requires_grad=True))
        return self.leaves[-1]


def _gradients(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """[n, c, T, d] by parameter name, one sample at a time through perturbed layers."""
    model = copy.deepcopy(model)
    layers = {}
    for name in names:
        path = name.removesuffix(".weight")
        layers[name] = _Perturbed(model.get_submodule(path))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    for sample in x:
        for layer in layers.values():
            layer.leaves.clear()
        outputs = model(sample[None]).reshape(-1)
        for name, layer in layers.items():
            rows = []
            for output in outputs:
                parts = torch.autograd.grad(output, layer.leaves, retain_graph=True, allow_unused=True)
                flat = [
                    (torch.zeros_like(leaf) if part is None else part).reshape(-1, leaf.shape[-1])
                    for part, leaf in zip(parts, layer.leaves, strict=True)
                ]
                rows.append(torch.cat(flat))
            samples[name].append(torch.stack(rows))
    return {name: torch.stack(rows).detach() for name, rows in samples.items()}


def _outer(gradients: Tensor) -> Tensor:
    return torch.einsum("ictp,ictq->pq", gradients, gradients) / len(gradients)


def _x(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 32, dtype=dtype, generator=torch.Generator().manual_seed(n))


class _Tokens(nn.Module):
    """Linear layers on tokens with a residual branch, a layer norm and a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.norm = nn.Parameter(torch.randn(4, 8)), nn.LayerNorm((4, 8))
        self.a, self.b, self.last = nn.Linear(8, 5), nn.Linear(5, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x.view(-1, 4, 8) + self.position)
        z = z + self.b(torch.tanh(self.a(z)))
        return self.last(torch.tanh(z).mean(1))


def _convolution(
    groups: int = 1, stride: int = 1, padding: int = 0, dilation: int = 1, mode: str = "zeros", c: int = 1
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 4, 3, padding=1, groups=groups),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, stride, padding, dilation, groups, padding_mode=mode),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(c),
    )
    model(torch.zeros(1, 32))
    return model.double()


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: make("in-place relu", 3),
    "three outputs": lambda: make("three outputs", 3),
    "called twice": lambda: make("module called twice", 3),
    "token-major rows": lambda: make("token-major rows", 3),
    "shuffled samples": lambda: make("shuffled samples", 3),
    "unused layer": lambda: make("unused layer", 3),
    "bare parameters": lambda: make("bare parameters", 3),
    "batch norm, eval": lambda: make("batch norm, eval", 3),
    "tokens": lambda: _Tokens().double(),
    "lazy networks of the paper": lambda: cx.models.FCN(32, width=9, depth=3, out_features=2).double(),
    "convolutions": lambda: make("convolutions", 3),
    "circular": lambda: _convolution(padding=1, mode="circular"),
    "reflect": lambda: _convolution(padding=1, mode="reflect"),
    "stride": lambda: _convolution(stride=2, padding=1),
    "dilation": lambda: _convolution(dilation=2, padding=1),
    "groups": lambda: _convolution(groups=2, stride=2, c=3),
    "no padding, outputs": lambda: _convolution(c=3),
}


def _layers(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds) and name != "idle"]


@pytest.mark.parametrize("name", [name for name in _MODULES if name != "lazy networks of the paper"])
def test_every_layer_against_autograd(name: str) -> None:
    torch.manual_seed(1)
    model, x = _MODULES[name](), _x(7)
    before = copy.deepcopy(model.state_dict())
    got = cx.layer_agop(model, x)
    assert list(got) == [p for p, _ in model.named_parameters() if p in _layers(model)]
    expected = _gradients(model, x, list(got))
    for layer, gradients in expected.items():
        assert brute_force.relative(got[layer], _outer(gradients)) <= 1e-10, layer
        assert torch.equal(got[layer], got[layer].T)
    centered = cx.layer_agop(model, x, center=True, reduction="sum", positions="mean")
    for layer, gradients in expected.items():
        scale = len(x) / gradients.shape[2]
        reference = _outer(gradients - gradients.mean(0)) * scale
        bound = 1e-10 * float(_outer(gradients).abs().max()) * scale
        assert float((centered[layer] - reference).abs().max()) <= bound, layer
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["linear", "tokens", "called twice", "groups", "no padding, outputs"])
def test_gradients_and_alignment_without_the_matrices(name: str) -> None:
    torch.manual_seed(1)
    model, other, x = _MODULES[name](), _MODULES[name](), _x(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    got, others = cx.layer_gradients(model, x), cx.layer_gradients(other, x)
    g, h = cx.layer_agop(model, x), cx.layer_agop(other, x)
    for layer, gradients in _gradients(model, x, list(g)).items():
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
        model, x = make(name, 4), _x(6)
        for options in ({}, {"center": True}, {"reduction": "sum"}, {"power": 0.5, "normalize": "max"}):
            first = next(iter(cx.layer_agop(model, x, **options).values()))
            assert brute_force.relative(first, cx.agop(model, x, **options)) <= 1e-7, options


def test_layers_with_a_scale_and_untransposed_weights() -> None:
    model, x = make("scaled products", 2), _x(5)
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
    x = _x(5)
    expected = _gradients(flat, x, ["1.weight"])["1.weight"]
    assert brute_force.relative(cx.layer_agop(model, x)["1.weight"], _outer(expected)) <= 1e-10


def test_integer_inputs_and_tables() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    tokens = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(1))
    got = cx.layer_agop(model, tokens)
    assert list(got) == ["1.weight", "4.weight"]
    for layer, gradients in _gradients(model, tokens, list(got)).items():
        assert brute_force.relative(got[layer], _outer(gradients)) <= 1e-10


def test_float32_matches_float64() -> None:
    for name in ("in-place relu", "convolutions", "attention, batch first"):
        model, x = make(name, 3), _x(7)
        exact = cx.layer_agop(model, x)
        got = cx.layer_agop(copy.deepcopy(model).float(), x.float())
        for layer, matrix in got.items():
            assert matrix.dtype == torch.float32
            assert brute_force.relative(matrix.double(), exact[layer]) <= 2e-5


def test_every_layer_or_an_error_that_names_it() -> None:
    """On networks that hook-based tools get wrong: a finite AGOP of the right size, or a refusal with a name."""
    refused = set()
    for name in EXACT:
        model, x = make(name, 3), _x(7)
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
        model, x = make(name, 1), _x(13)
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
    assert list(cx.layer_agop(model, _x(8))) == ["1.weight", "3.weight"]  # above the coupling, of this batch
    with pytest.raises(cx.UnsupportedModule, match="couples its samples"):
        cx.layer_agop(model, _x(8), max_bytes=20_000)


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
        cx.layer_agop(model, _x(4), **options)
    if not {"reduction", "positions", "normalize", "max_bytes"} & options.keys():
        with pytest.raises(error, match=message):
            cx.nfa_correlation(model, _x(4), **options)


def test_refuses_by_name() -> None:
    with pytest.raises(cx.UnsupportedModule, match=r"first\.weight: it is used transposed as well"):
        cx.layer_agop(make("tied and transposed", 1), _x(4))
    with pytest.raises(cx.UnsupportedModule, match=r"0\.weight: its rows mix samples"):
        cx.layer_agop(make("batch norm, training", 1), _x(4))
    with pytest.raises(cx.UnsupportedModule, match=r"1\.weight: it is used as no weight .*Convolution"):
        cx.layer_agop(make("transposed convolution", 1), _x(4))
    assert list(cx.layer_agop(make("transposed convolution", 1), _x(4), params=["3.weight"])) == ["3.weight"]
    tied = Embedded().double()
    tied.last = nn.Linear(6, 11, bias=False).double()
    tied.a = nn.Linear(6, 6).double()
    tied.last.weight = tied.table.weight
    with pytest.raises(
        cx.UnsupportedModule, match=r"table\.weight: it is also used as no weight .*Embedding"
    ):
        cx.layer_agop(tied, _x(4))
    dead = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    nn.init.constant_(dead[0].bias, -1e3)
    assert float(cx.layer_agop(dead, _x(4))["0.weight"].abs().max()) == 0.0
    with pytest.raises(ValueError, match=r"normalize: the AGOP of 0\.weight is zero"):
        cx.layer_agop(dead, _x(4), normalize="trace")
    assert math.isnan(float(cx.nfa_correlation(dead, _x(4))["0.weight"]))


def _nfa(gradients: Tensor, weight: Tensor, power: float, pearson: bool) -> float:
    _, values, vectors = torch.linalg.svd(gradients.flatten(0, 2), full_matrices=False)
    agop = vectors.T * values ** (2 * power) @ vectors
    matrix = weight.T @ weight
    if pearson:
        agop, matrix = agop - agop.mean(), matrix - matrix.mean()
    return float((agop * matrix).sum() / (agop.norm() * matrix.norm()))


@pytest.mark.parametrize("name", ["linear", "three outputs", "convolutions", "called twice", "groups"])
@pytest.mark.parametrize("n", [3, 40])
def test_nfa_correlation(name: str, n: int) -> None:
    model, x = _MODULES[name](), _x(n)
    torch.manual_seed(5)
    initial = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    gradients = _gradients(model, x, _layers(model))
    # Where n c T >= d the power is that of a matrix, whose zero eigenvalues are rounding, raised to the power.
    for power, pearson, tolerance in (
        (0.5, True, 1e-7),
        (1.0, True, 1e-10),
        (1.0, False, 1e-10),
        (0.3, False, 2e-4),
    ):
        kind = "pearson" if pearson else "cosine"
        for start in (None, initial):
            got = cx.nfa_correlation(model, x, power=power, correlation=kind, initial=start)
            assert list(got) == list(gradients)
            for layer, value in got.items():
                weight = model.get_parameter(layer).detach() - (0.0 if start is None else start[layer])
                groups = getattr(model.get_submodule(layer.removesuffix(".weight")), "groups", 1)
                matrix = torch.block_diag(*weight.flatten(1).chunk(groups))
                expected = _nfa(gradients[layer], matrix, power, pearson)
                assert float(value) == pytest.approx(expected, abs=tolerance), (layer, power, kind)
    assert cx.nfa_correlation(model, x).keys() == got.keys()


def test_nfa_correlation_refuses_an_incomplete_start() -> None:
    model = make("in-place relu", 1)
    with pytest.raises(
        ValueError, match=r"initial: expected a tensor of shape \(8, 32\) for 0\.weight, got None"
    ):
        cx.nfa_correlation(model, _x(4), initial={})
    same = cx.nfa_correlation(model, _x(4), initial=model.state_dict())
    assert all(math.isnan(float(value)) for value in same.values())


@pytest.mark.parametrize("form", ["matrices", "gradients", "mixed"])
def test_pearson_alignment(form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(4, 1, 5, generator=generator, dtype=torch.float64)
    g, h = (torch.einsum("ica,icb->ab", t, t) for t in (a, b))
    expected = float(torch.corrcoef(torch.stack([g.flatten(), h.flatten()]))[0, 1])
    pair = {"matrices": (g, h), "gradients": (a, b), "mixed": (g, b)}[form]
    assert float(cx.agop_alignment(*pair, correlation="pearson")) == pytest.approx(expected, abs=1e-12)
    constant = torch.ones(1, 1, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="not zero or constant"):
        cx.agop_alignment(constant * math.pi, pair[1], correlation="pearson")
    with pytest.raises(ValueError, match="correlation: expected one of 'cosine', 'pearson', got 'spearman'"):
        cx.agop_alignment(*pair, correlation="spearman")


_NETWORKS = st.fixed_dictionaries(
    {
        "width": st.integers(1, 9),
        "tokens": st.sampled_from([1, 2, 4]),
        "outputs": st.integers(1, 3),
        "n": st.integers(2, 9),
        "seed": st.integers(0, 10**6),
        "convolution": st.booleans(),
    }
)


def _random(
    width: int, tokens: int, outputs: int, n: int, seed: int, convolution: bool
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    body: list[nn.Module]
    if convolution:
        body = [nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, width, 3, stride=2, padding=tokens % 2)]
    else:
        body = [nn.Unflatten(1, (tokens, 32 // tokens)), nn.Linear(32 // tokens, width)]
    model = nn.Sequential(*body, nn.Tanh(), nn.Flatten(), nn.LazyLinear(outputs)).double()
    model(torch.zeros(1, 32, dtype=torch.float64))
    return model, torch.randn(n, 32, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(_NETWORKS, st.floats(0.2, 3.0), st.sampled_from(["max", "trace", "frobenius"]))
def test_conventions_are_what_they_say(network: dict[str, int], power: float, normalize: str) -> None:
    model, x = _random(**network)  # type: ignore[arg-type]
    plain = cx.layer_agop(model, x)
    gradients = _gradients(model, x, list(plain))
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


@settings(max_examples=25, deadline=None)
@given(_NETWORKS, st.floats(0.1, 10.0))
def test_nfa_correlation_is_scale_free_and_exact_for_a_linear_layer(
    network: dict[str, int], factor: float
) -> None:
    model, x = _random(**network)  # type: ignore[arg-type]
    before = cx.nfa_correlation(model, x, correlation="cosine")
    with torch.no_grad():
        model[-1].weight.mul_(factor)  # scales every AGOP by its square
    after = cx.nfa_correlation(model, x, correlation="cosine")
    for name, value in before.items():
        assert 0.0 <= float(value) <= 1.0 + 1e-12
        assert float(after[name]) == pytest.approx(float(value), abs=1e-6)
    # The output layer's gradients are the rows of W themselves: its AGOP is W^T W.
    last = list(before)[-1]
    assert float(cx.nfa_correlation(model, x, power=1.0, correlation="cosine")[last]) == pytest.approx(
        1.0, rel=1e-12
    )
