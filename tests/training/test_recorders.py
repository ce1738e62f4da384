"""Critical rate, AGOP and parameter norms against plain autograd; tensors in the history and the run folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as brute
from torch import nn
from training_reference import Recipe

import catapult_ext as cx

ARGUMENTS = {"algorithm": cx.GD(), "schedule": cx.Constant(0.2), "stop": cx.Stop(max_steps=4)}


def agop(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    parts = []
    for output in model(x).unbind(1):
        (g,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        parts.append(g.t() @ g / len(x))
    return sum(parts)  # type: ignore[return-value]


@pytest.mark.parametrize("outputs", [1, 3])
def test_agop_and_its_kept_block(outputs: int) -> None:
    recipe = Recipe(c=outputs)
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    history = cx.train(model, data, recorders=[cx.AGOP(every=2, size=3)], **ARGUMENTS)
    kept = history.tensors["agop"]
    assert kept["steps"].tolist() == [0, 2, 4]
    for t in range(5):
        if t % 2 == 0:
            expected = agop(twin, data.x)
            np.testing.assert_allclose(history.metrics["agop_trace"][t], expected.trace(), rtol=1e-9)
            torch.testing.assert_close(kept["values"][t // 2], expected[:3, :3], rtol=1e-9, atol=1e-12)
        brute.descend(twin, data.x, data.y, 0.2)


def test_agop_of_other_inputs_in_evaluation_mode(recipe: Recipe) -> None:
    model, x = recipe.model(norm=True), recipe.data(7, 5).x
    expected = agop(recipe.model(norm=True).eval(), x)
    arguments = {**ARGUMENTS, "stop": cx.Stop(max_steps=0)}
    history = cx.train(model, recipe.data(), recorders=[cx.AGOP(x=x)], **arguments)
    torch.testing.assert_close(history.tensors["agop"]["values"][0], expected, rtol=1e-9, atol=1e-12)
    assert model.training


def test_parameter_norms(recipe: Recipe) -> None:
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    model[0].weight.requires_grad_(False)
    twin[0].weight.requires_grad_(False)
    history = cx.train(model, data, recorders=[cx.ParameterNorms.of(model)], **ARGUMENTS)
    for t in range(5):
        row = history.metrics.iloc[t]
        np.testing.assert_allclose(row["parameter_norm"], brute.flat(twin).norm().item(), rtol=1e-12)
        for name, value in twin.named_parameters():
            np.testing.assert_allclose(row[f"norm:{name}"], value.detach().norm().item(), rtol=1e-12)
        brute.descend(twin, data.x, data.y, 0.2)
    assert history.metrics["norm:0.weight"].nunique() == 1
    assert history.metrics["norm:2.weight"].nunique() == 5


def test_critical_rate_without_eigenvectors(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: cx.Observation) -> None:
        raise AssertionError("eigenvectors were computed")

    monkeypatch.setattr(cx.Observation, "eigen", property(forbidden))
    data = recipe.data()
    history = cx.train(recipe.model(), data, recorders=[cx.CriticalRate(every=3)], **ARGUMENTS)
    expected = brute.critical_lr(recipe.model(), data.x)
    np.testing.assert_allclose(history.metrics["critical_lr"][0], expected, rtol=1e-9)
    np.testing.assert_allclose(history.metrics["lambda_1"][0], 13 / expected, rtol=1e-9)
    assert history.metrics["critical_lr"].notna().tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("algorithm", [cx.GD(), cx.SGD(5)])
def test_several_splits_of_a_loss_with_several_outputs(algorithm: cx.Algorithm) -> None:
    recipe = Recipe(c=3)
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    probe = None if algorithm.batch_size is None else recipe.data(7, seed=4, name="probe")
    history = cx.train(
        model,
        data,
        algorithm=algorithm,
        schedule=cx.Constant(0.2),
        stop=cx.Stop(max_steps=3),
        recorders=[cx.Spectrum(k=15, s=2, splits=(3, 9, 15))],
        probe=probe,
        seed=6,
    )
    seen, order = probe or data, cx.SGD(5).order(13, seed=6)
    for t in range(4):
        vectors = torch.linalg.eigh(brute.kernel(twin, seen.x)).eigenvectors.flip(1)  # [n c, n c], descending
        r = (twin(seen.x) - seen.y).detach().reshape(-1)
        parts = (vectors.t() @ r).square() / len(r)
        for s, name in ((2, ""), (3, "_3"), (9, "_9"), (15, "_15")):
            row = history.metrics.iloc[t]
            np.testing.assert_allclose(row[f"top_loss{name}"], parts[:s].sum().item(), rtol=1e-8)
            np.testing.assert_allclose(row[f"rest_loss{name}"], parts[s:].sum().item(), rtol=1e-8)
        batch = slice(None) if probe is None else next(order)
        brute.descend(twin, data.x[batch], data.y[batch], 0.2)


@pytest.mark.parametrize("splits", [(1, 4), (0, 2), (2, 2), (3, 1), [1, 2], (1.5,), 2])
def test_splits_that_the_eigenpairs_do_not_cover_are_named(splits: object) -> None:
    with pytest.raises(
        ValueError, match="splits: expected a tuple of ascending integers from 1 to k = 3, got"
    ):
        cx.Spectrum(k=3, splits=splits)  # type: ignore[arg-type]


def hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of the Hessian of the loss, ascending; a backward per parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(brute.mse(model, x, y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = []
    for value in flat:
        second = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(second, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    return torch.linalg.eigvalsh(torch.stack(rows))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_hessian_of_the_training_set(momentum: float, recipe: Recipe) -> None:
    twin, data = recipe.model(), recipe.data()
    history = cx.train(
        recipe.model(),
        data,
        algorithm=cx.GD(momentum=momentum),
        schedule=cx.Constant(0.2),
        stop=cx.Stop(max_steps=2),
        recorders=[cx.Hessian(k=3, every=5)],
    )
    m = history.metrics
    expected = hessian(twin, data.x, data.y).flip(0)[:3]
    np.testing.assert_allclose(
        m.loc[0, ["hessian_1", "hessian_2", "hessian_3"]].astype(float), expected, rtol=1e-6
    )
    np.testing.assert_allclose(m["hessian_critical_lr"][0], (1 + momentum) * 2 / expected[0], rtol=1e-6)
    assert m["hessian_1"].notna().tolist() == [True, False, True]


def test_hessian_of_each_batch(recipe: Recipe) -> None:
    twin, data = recipe.model(), recipe.data()
    history = cx.train(
        recipe.model(),
        data,
        algorithm=cx.SGD(5),
        schedule=cx.Constant(0.2),
        stop=cx.Stop(max_steps=2),
        recorders=[cx.BatchHessian(every=1), cx.BatchCriticalRate()],
        seed=3,
    )
    order = cx.SGD(5).order(13, seed=3)
    for t in range(2):
        batch = next(order)
        expected = hessian(twin, data.x[batch], data.y[batch])[-1].item()
        row = history.metrics.iloc[t]
        np.testing.assert_allclose(row["batch_hessian_1"], expected, rtol=1e-6)
        np.testing.assert_allclose(row["batch_hessian_critical_lr"], 2 / expected, rtol=1e-6)
        brute.descend(twin, data.x[batch], data.y[batch], 0.2)


def test_kept_tensors_are_stored_with_the_run(recipe: Recipe, tmp_path: Path) -> None:
    folder = cx.RunFolder(tmp_path, "kept", {}, 0)
    first = cx.train(recipe.model(), recipe.data(), recorders=[cx.AGOP(every=1)], run=folder, **ARGUMENTS)
    again = cx.train(recipe.model(), recipe.data(), recorders=[cx.AGOP(every=1)], run=folder, **ARGUMENTS)
    for part in ("steps", "values"):
        assert torch.equal(again.tensors["agop"][part], first.tensors["agop"][part])
    assert first.tensors["agop"]["values"].shape == (5, 5, 5)


def test_settings_out_of_range_are_named(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="size: expected None or an integer >= 1, got 0"):
        cx.AGOP(size=0)
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        cx.Hessian(k=0)
    with pytest.raises(ValueError, match="names: expected parameters of the model, got 'nothing'"):
        cx.train(
            recipe.model(), recipe.data(), recorders=[cx.ParameterNorms(names=("nothing",))], **ARGUMENTS
        )
