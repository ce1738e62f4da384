"""The native engine against the general path: step by step from equal state, in every cut, and where it is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training_reference import Recipe, flat

import catapult_ext as cx
from catapult_ext.data import Dataset
from catapult_ext.training import chain, loop
from catapult_ext.training.chain import SMALL_STEP, Chain, NotAChain

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
BATCHES: dict[str, Any] = {
    "algorithm": cx.SGD(4),  # 13 samples: 4, 4, 4, 1
    "schedule": cx.Constant(0.3, relative=True),
    "recorders": [cx.BatchCriticalRate()],
}


def fcn(depth: int = 3, **options: Any) -> cx.models.FCN:
    return cx.models.FCN(5, 16, depth, generator=torch.Generator().manual_seed(0), **options)


def leaky() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(5, 7, bias=False), nn.LeakyReLU(0.2), nn.Linear(7, 9), nn.Linear(9, 1)
    )


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "ntk": fcn,
    "ntk with biases": lambda: fcn(bias_scale=0.5),
    "standard": lambda: fcn(parameterization="standard"),
    "linear": lambda: fcn(1),
    "first layer fixed": lambda: fcn(fixed_layers=(0,), bias_scale=0.5),
    "middle layer fixed": lambda: fcn(4, fixed_layers=(2,), bias_scale=0.5),
    "leaky": leaky,
}


def run(model: nn.Module, data: Any, engine: str, steps: int = 9, **changes: Any) -> cx.History:
    arguments = {**BATCHES, "stop": cx.Stop(max_steps=steps), "seed": 3, **changes}
    return cx.train(model, data, engine=engine, progress=False, **arguments)


def assert_same_bits(one: cx.History, other: cx.History) -> None:
    assert one.metrics.equals(other.metrics)
    assert (one.result, one.engine, one.catapult_count) == (other.result, other.engine, other.catapult_count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHAINS)
def test_each_step_from_equal_state_agrees(name: str, dtype: torch.dtype) -> None:
    model, data = CHAINS[name]().to(dtype), Recipe(dtype).data()
    for seed in range(5):
        twin = copy.deepcopy(model)
        general = run(model, data, "general", 1, seed=seed)
        native = run(twin, data, "native", 1, seed=seed)
        assert (general.engine, native.engine) == ("general", "native")
        for column in ("loss", "lr", "batch_critical_lr", "train_loss"):
            np.testing.assert_allclose(
                native.metrics[column], general.metrics[column], rtol=BOUND[dtype], err_msg=column
            )
        assert native.metrics["catapult"].equals(general.metrics["catapult"])
        for (label, moved), expected in zip(twin.named_parameters(), model.parameters(), strict=True):
            error = (moved - expected).detach().norm()
            assert error <= BOUND[dtype] * expected.detach().norm(), label
            assert moved.requires_grad == expected.requires_grad
            assert moved.grad is None


def test_images_are_flattened_as_the_network_does() -> None:
    data = Recipe().data()
    images = Dataset(data.x[:, :4].reshape(-1, 2, 2), data.y, "images")
    model = cx.models.FCN(4, 8, 2, generator=torch.Generator().manual_seed(0)).double()
    twin = copy.deepcopy(model)
    general, native = run(model, images, "general", 3), run(twin, images, "native", 3)
    np.testing.assert_allclose(native.metrics["loss"], general.metrics["loss"], rtol=1e-10)
    torch.testing.assert_close(flat(twin), flat(model), rtol=1e-10, atol=1e-12)


SCHEDULES = {
    "constant": cx.Constant(0.5, relative=True),
    "steps": cx.Stepwise({0: 0.4, 3: 0.6, 7: 0.5}, relative=True),
    "cycle": cx.WarmUp(cx.Cyclical(0.1, 0.3, period=6), 4),
    "catapults": cx.CatapultSchedule(every=4, c=1.2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_are_those_of_the_general_path(name: str) -> None:
    recipe = Recipe()
    changes: dict[str, Any] = {
        "schedule": SCHEDULES[name],
        "recorders": [
            cx.BatchCriticalRate(every=2), cx.Spectrum(k=2, every=5), cx.ParameterNorms.of(recipe.model(), every=3)
        ],
        "probe": recipe.data(6, 9, "probe"),
        "validate_every": 4,
    }  # fmt: skip
    model, twin = recipe.model(), recipe.model()
    general = run(model, recipe.split(), "general", 14, **changes)
    native = run(twin, recipe.split(), "native", 14, **changes)
    assert general.metrics.columns.tolist() == native.metrics.columns.tolist()
    assert general.metrics.isna().equals(native.metrics.isna())
    for column in general.metrics:
        np.testing.assert_allclose(
            native.metrics[column].astype(float),
            general.metrics[column].astype(float),
            rtol=1e-8,
            err_msg=column,
        )
    torch.testing.assert_close(flat(twin), flat(model), rtol=1e-8, atol=1e-10)
    assert native.best is not None
    assert general.best is not None
    assert native.best.step == general.best.step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_cuts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, found = Recipe(dtype), []

    class Watch(cx.Callback):
        def on_step(self, row: dict[str, Any], model: nn.Module) -> None:
            assert row["lr"] > 0

    for longest, callbacks in ((256, []), (1, []), (3, []), (256, [Watch()])):
        monkeypatch.setattr(loop, "_LONGEST_STRETCH", longest)
        model = recipe.model()
        found.append((run(model, recipe.split(), "native", 30, callbacks=callbacks), flat(model)))
    for history, parameters in found[1:]:
        assert_same_bits(history, found[0][0])
        assert torch.equal(parameters, found[0][1])


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_resumed_run_has_the_same_bits_although_its_stretches_are_cut_elsewhere(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(torch.float32)
    changes: dict[str, Any] = {"stop": cx.Stop(max_steps=40, every=20), "validate_every": 17}
    whole_model, model = recipe.model(), recipe.model()
    whole = run(whole_model, recipe.split(), "auto", **changes)
    assert whole.engine == "native"
    folder = cx.RunFolder(tmp_path, "cut", {}, 3, checkpoint_seconds=1e-9)
    calls: list[int] = []
    original = Chain.steps_

    def crashing(self: Chain, batches: Any, *arguments: Any) -> Any:
        if len(calls) == after:
            raise Crash
        calls.append(len(batches))
        return original(self, batches, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_LONGEST_STRETCH", 7)
        patch.setattr(Chain, "steps_", crashing)
        with pytest.raises(Crash):
            run(recipe.model(), recipe.split(), "auto", run=folder, **changes)
    assert sum(calls) > 0
    resumed = run(model, recipe.split(), "auto", run=folder, **changes)
    assert_same_bits(resumed, whole)
    assert torch.equal(flat(model), flat(whole_model))
    again = run(recipe.model(), recipe.split(), "auto", run=folder, **changes)  # read from the folder
    assert again.engine == "native"


def test_an_interrupted_run_goes_on_with_the_engine_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe()
    folder = cx.RunFolder(tmp_path, "old", {}, 3, checkpoint_seconds=1e-9)

    class Stop5(cx.Callback):
        def on_step(self, row: dict[str, Any], model: nn.Module) -> None:
            if row["step"] == 5:
                raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(loop, "chain_for", lambda job, engine: None)  # as before there was another engine
        whole = run(recipe.model(), recipe.data(), "auto", 9)
        with pytest.raises(Crash):
            run(recipe.model(), recipe.data(), "auto", 9, run=folder, callbacks=[Stop5()])
    assert_same_bits(run(recipe.model(), recipe.data(), "auto", 9, run=folder), whole)
    assert whole.engine == "general"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_keeps_every_row_before_it(dtype: torch.dtype) -> None:
    recipe = Recipe(dtype)
    changes: dict[str, Any] = {"schedule": cx.Constant(8.0), "stop": cx.Stop(max_steps=200, every=50)}
    general = run(recipe.model(), recipe.data(), "general", **changes)
    native = run(recipe.model(), recipe.data(), "native", **changes)
    assert general.result == native.result == "diverged"
    assert abs(len(general.metrics) - len(native.metrics)) <= (0 if dtype == torch.float64 else 1)
    rows = native.metrics
    limit = 1e6 * rows["train_loss"][0]
    assert (rows["loss"][:-1] <= limit).all()
    assert not rows["loss"].iloc[-1] <= limit
    assert rows["lr"].notna().tolist() == [True] * (len(rows) - 1) + [False]
    assert rows["batch_critical_lr"].notna().tolist() == [True] * (len(rows) - 1) + [False]
    np.testing.assert_allclose(rows["loss"][:2], general.metrics["loss"][:2], rtol=BOUND[dtype])


def test_a_loss_that_is_not_finite_ends_the_run_at_its_row() -> None:
    recipe = Recipe(torch.float32)
    data = recipe.data()
    changes: dict[str, Any] = {
        "schedule": cx.Stepwise({0: 0.1, 6: 1e30}),
        "stop": cx.Stop(max_steps=50, every=50, diverged_above=1e300),
    }
    for engine in ("general", "native"):
        history = run(recipe.model(), data, engine, **changes)
        assert history.result == "diverged"
        assert history.metrics["step"].tolist() == list(range(8))
        assert history.metrics["loss"].notna().tolist() == [True] * 7 + [False]


def test_a_network_that_is_not_finite_at_the_start_is_an_error() -> None:
    recipe = Recipe(torch.float32)
    model = recipe.model()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    for engine in ("general", "native", "auto"):
        with pytest.raises(cx.NonFinite):
            run(model, recipe.data(), engine)


def test_a_stop_rule_between_two_looks_is_kept() -> None:
    recipe = Recipe()
    changes: dict[str, Any] = {
        "stop": cx.Stop(max_steps=60, every=60, patience=7),
        "validate_every": 50,
        "schedule": cx.Constant(1e-3),
    }
    general, native = (run(recipe.model(), recipe.split(), e, **changes) for e in ("general", "native"))
    assert general.result == native.result == "no_improvement"
    assert native.metrics["step"].tolist() == general.metrics["step"].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": cx.GD()}, "every step uses the whole training set"),
        ({"algorithm": cx.SGD(4, momentum=0.5)}, "takes no plain steps"),
        ({"algorithm": cx.Adam(4), "schedule": cx.Constant(0.1)}, "takes no plain steps"),
        ({"recorders": [cx.BatchHessian()]}, "BatchHessian looks at the pass of each step"),
        ({"recorders": [cx.BatchCriticalRate(every=cx.AroundSpikes())]}, "AroundSpikes observes steps again"),
    ],
)
def test_runs_that_it_cannot_make(changes: dict[str, Any], reason: str) -> None:
    recipe = Recipe()
    with pytest.raises(
        ValueError, match=rf'engine: expected "auto" or "general", since .*{reason}.*"native"'
    ):
        run(recipe.model(), recipe.data(), "native", 2, **changes)
    assert run(recipe.model(), recipe.data(), "auto", 2, **changes).engine == "general"


class Shifted(nn.Module):
    """Its graph is that of a chain, its output is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.shift, self.factor = nn.Linear(5, 8), nn.Linear(8, 1), 0.0, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.last(torch.relu(self.first(x * self.factor)))
        out.data.add_(self.shift)
        return out


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.last(h + torch.relu(self.first(h)))


def shifted(**changes: float) -> Shifted:
    model = Shifted()
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def hooked() -> nn.Module:
    model = leaky()
    model[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), "TanhBackward0 is neither"),
        (
            lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 1)),
            "NativeLayerNormBackward0 is neither",
        ),
        (Residual, "no weight or bias of a Linear layer|is neither"),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), "the model has buffers"),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(-0.5), nn.Linear(8, 1)), "negative slope -0.5"),
        (hooked, "forward hooks"),
        (lambda: shifted(shift=0.1), "computes something else than the chain of its layers .loss"),
        (lambda: shifted(factor=2.0), "not given the samples as they are"),
    ],
)  # fmt: skip
def test_networks_that_it_cannot_train(make: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model, data = make().double(), Recipe().data()
    before = flat(model).clone()
    with pytest.raises(ValueError, match=f'since .*({reason}).*, got "native"'):
        run(model, data, "native", 2)
    assert torch.equal(flat(model), before)
    if not isinstance(model, Shifted) or model.shift == 0.0:  # that one autograd's graph does not describe
        assert run(model, data, "auto", 2).engine == "general"


def test_several_outputs_take_the_general_path() -> None:
    recipe = Recipe(c=3)
    with pytest.raises(ValueError, match="the network has 3 outputs"):
        run(recipe.model(), recipe.data(), "native", 2)
    assert run(recipe.model(), recipe.data(), "auto", 2).engine == "general"


def test_large_steps_take_the_general_path_unless_asked_for() -> None:
    recipe = Recipe(torch.float32, n=600)
    model = cx.models.FCN(5, 2400, 2)
    assert 600 * sum(p.numel() for p in model.parameters()) > SMALL_STEP
    assert run(model, recipe.data(), "auto", 1, algorithm=cx.SGD(600)).engine == "general"
    assert run(model, recipe.data(), "auto", 1, algorithm=cx.SGD(5)).engine == "native"
    assert run(model, recipe.data(), "native", 1, algorithm=cx.SGD(600)).engine == "native"


def test_a_network_that_changes_under_way_is_noticed() -> None:
    model, data = shifted().double(), Recipe().data()
    chain = Chain(model, data.x, data.y, 4)
    batch, none = [torch.arange(4)], [True]
    chain.steps_(batch, [0.1], none, 1e9)
    model.shift = 0.3
    with pytest.raises(NotAChain, match="computes something else"):
        chain.steps_(batch, [0.1], none, 1e9)


def test_a_schedule_that_measures_where_it_said_it_would_not_is_an_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Sly(cx.Schedule):
        def lr(self, step: int, state: dict[str, Any], measure: Callable[[], Any]) -> float:
            return 0.1 * float(measure().critical_lr) if step == 2 else 0.1

    with pytest.raises(
        ValueError, match=r"schedule: Sly.lr\(\) measured at step 2, for which its measures\(\)"
    ):
        cx.train(
            Recipe().model(), Recipe().data(), algorithm=cx.SGD(4), schedule=Sly(), stop=cx.Stop(max_steps=5)
        )  # fmt: skip


def test_the_engine_is_one_of_four() -> None:
    with pytest.raises(
        ValueError, match="engine: expected one of auto, general, native, captured, got 'fast'"
    ):
        run(Recipe().model(), Recipe().data(), "fast")


class Replayed:
    """Stands for a CUDA graph: makes the captured steps again."""

    def __init__(self, make: Callable[[], None]) -> None:
        self.replay = make


def test_stretches_that_come_again_are_captured_once_and_few_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe()
    model, data = recipe.model(), recipe.data()
    layers = [link.layer() for link in Chain(model, data.x, data.y, 4)._links]
    graphs, captured = chain._Graphs(data.x, data.y), []

    def capture(layers: Any, stretch: Any, index: torch.Tensor, rates: torch.Tensor) -> Any:
        captured.append(stretch.sizes)
        index, rates, found = index.clone(), rates.clone(), torch.empty(2, len(rates), dtype=data.x.dtype)
        again = lambda: found.copy_(stretch.make_(layers, data.x, data.y, index, rates))  # noqa: E731
        return Replayed(again), index, rates, found

    monkeypatch.setattr(graphs, "_capture", capture)

    def go(sizes: tuple[int, ...], seed: int = 0) -> bool:
        stretch = chain._Stretch(sizes, (True,) * len(sizes), 1e9)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(13, (sum(sizes),), generator=generator)
        rates = torch.full((len(sizes),), 0.01 * (seed + 1), dtype=torch.float64)
        with torch.no_grad():
            before = [layer.weight._version for layer in layers]
            kept = copy.deepcopy(layers)
            found = graphs.run(layers, stretch, index, rates)
            if found is None:
                assert [layer.weight._version for layer in layers] == before
                return False
            assert torch.equal(found, stretch.make_(kept, data.x, data.y, index, rates))
            assert all(
                torch.equal(layer.weight, twin.weight) for layer, twin in zip(layers, kept, strict=True)
            )
            assert all(layer.weight._version > old for layer, old in zip(layers, before, strict=True))
        return True

    assert [go((4, 4), seed) for seed in range(3)] == [False, True, True]
    assert captured == [(4, 4)]
    assert [go((4,)), go((4,))] == [False, True]
    layers[0] = layers[0]._replace(trains_bias=False)
    assert [go((4, 4)), go((4, 4))] == [False, True]
    layers[0] = layers[0]._replace(weight=layers[0].weight.clone())
    assert [go((4, 4)), go((4, 4))] == [False, True]
    for sizes in ((1,), (2,), (3,), (1, 2), (2, 1)):
        assert not go(sizes)
    assert not go((4, 4)), "what was not used for long is forgotten"
    assert len(graphs._captured) == chain._Graphs.KEPT


def test_what_the_device_notes_is_raised_unless_the_steps_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(device: torch.device) -> None:
        raise cx.NonFinite("noted")

    monkeypatch.setattr(chain.ops.cuda, "check", noted)
    stretch = chain._Stretch((4, 4), (True, True), 5.0)
    with pytest.raises(cx.NonFinite, match="noted"):
        stretch.read(torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    with pytest.raises(cx.NonFinite, match="noted"):
        stretch.read(torch.tensor([[9.0, float("nan")], [1.0, float("nan")]]))  # ended by its loss
    ended = torch.tensor([[1.0, float("nan")], [1.0, float("nan")]])
    assert torch.equal(stretch.read(ended)[0, :1], ended[0, :1])
