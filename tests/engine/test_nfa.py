"""Correlation of W^T W with the AGOP of a layer, and of AGOPs with each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_inputs import MODULES, NETWORKS, input_gradients, layer_names, random_network, samples
from networks import make
from torch import Tensor

import catapult_ext as cx


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
    model, x = MODULES[name](), samples(n)
    torch.manual_seed(5)
    initial = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    gradients = input_gradients(model, x, layer_names(model))
    for power, pearson in ((0.5, True), (1.0, True), (1.0, False), (0.3, False)):
        kind = "pearson" if pearson else "cosine"
        for start in (None, initial):
            got = cx.nfa_correlation(model, x, power=power, correlation=kind, initial=start)
            assert list(got) == list(gradients)
            for layer, value in got.items():
                weight = model.get_parameter(layer).detach() - (0.0 if start is None else start[layer])
                groups = getattr(model.get_submodule(layer.removesuffix(".weight")), "groups", 1)
                matrix = torch.block_diag(*weight.flatten(1).chunk(groups))
                expected = _nfa(gradients[layer], matrix, power, pearson)
                assert float(value) == pytest.approx(expected, abs=1e-9), (layer, power, kind)
    assert cx.nfa_correlation(model, x).keys() == got.keys()


def test_nfa_correlation_refuses_an_incomplete_start() -> None:
    model = make("in-place relu", 1)
    with pytest.raises(
        ValueError, match=r"initial: expected a tensor of shape \(8, 32\) for 0\.weight, got None"
    ):
        cx.nfa_correlation(model, samples(4), initial={})
    same = cx.nfa_correlation(model, samples(4), initial=model.state_dict())
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


@settings(max_examples=25, deadline=None)
@given(NETWORKS, st.floats(0.1, 10.0))
def test_nfa_correlation_is_scale_free_and_exact_for_a_linear_layer(
    network: dict[str, int], factor: float
) -> None:
    model, x = random_network(**network)  # type: ignore[arg-type]
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
