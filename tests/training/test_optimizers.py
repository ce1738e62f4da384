"""The optimizers of Table 3: every update against `torch.optim` driven by plain autograd, and their resumption."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import run_task
import torch
import training_reference as brute
from torch import nn
from training_reference import Recipe

import catapult_ext as cx
from catapult_ext.training import Algorithm

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
Parameters = list[torch.Tensor]

#: Algorithm, and what it stands for, written out with torch.optim's own settings.
RULES: dict[str, tuple[Algorithm, Callable[[Parameters], torch.optim.Optimizer], float]] = {
    "sgd": (cx.SGD(5), lambda p: torch.optim.SGD(p, lr=0.1), 0.1),
    "momentum": (cx.SGD(5, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 0.05),
    "gd-momentum": (cx.GD(momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), 0.1),
    "rmsprop": (cx.RMSprop(5), lambda p: torch.optim.RMSprop(p, lr=1e-2), 1e-2),
    "adagrad": (cx.Adagrad(5), lambda p: torch.optim.Adagrad(p, lr=0.1), 0.1),
    "adadelta": (cx.Adadelta(5), lambda p: torch.optim.Adadelta(p, lr=2.0), 2.0),
    "adam": (cx.Adam(5), lambda p: torch.optim.Adam(p, lr=1e-2), 1e-2),
    "adam-whole-set": (
        cx.Adam(None, betas=(0.8, 0.95)),
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95)),
        1e-2,
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kernel", [False, True])
def test_updates_equal_those_of_torch(name: str, kernel: bool, recipe: Recipe) -> None:
    """With and without the kernel in the pass that makes the update, and one parameter fixed."""
    algorithm, make, lr = RULES[name]
    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    for network in (model, twin):
        network[2].bias.requires_grad_(False)
    history = cx.train(
        model,
        data,
        algorithm=algorithm,
        schedule=cx.Constant(lr),
        recorders=[cx.BatchCriticalRate()] if kernel else [],
        stop=cx.Stop(max_steps=9),
        seed=6,
    )
    optimizer = make([p for p in twin.parameters() if p.requires_grad])
    order = algorithm.order(13, seed=6)
    losses = []
    for _ in range(9):
        batch = torch.arange(13) if algorithm.batch_size is None else next(order)
        optimizer.zero_grad()
        loss = brute.mse(twin, data.x[batch], data.y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(history.metrics["loss"][:9], losses, **CLOSE)
    torch.testing.assert_close(brute.flat(model), brute.flat(twin), **CLOSE)
    assert all(p.grad is None for p in model.parameters())
    assert history.metrics["lr"].tolist()[:9] == [lr] * 9


class Attention(nn.Module):
    """Layers without a rule, a parameter used twice and one that no output depends on.

    Without the bias of the keys: softmax ignores it, so its gradient is rounding, which Adam would blow up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, bias=False)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.full((6,), 0.7))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.attention(x, x, x, need_weights=False)
        return (self.norm(h + x) * self.scale * self.scale).mean(1)[:, :2]


@pytest.mark.parametrize("name", ["momentum", "rmsprop", "adagrad", "adadelta", "adam"])
def test_any_module_can_be_trained(name: str) -> None:
    algorithm, make, lr = RULES[name]
    torch.manual_seed(3)
    model = Attention().double()
    twin = Attention().double()
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(13, 4, 6, dtype=torch.float64), torch.randn(13, 2, dtype=torch.float64)
    mark = torch.full((3,), 5.0, dtype=torch.float64)
    model.unused.grad = mark
    cx.train(
        model,
        cx.data.Dataset(x, y),
        algorithm=algorithm,
        schedule=cx.Constant(lr),
        recorders=[cx.BatchCriticalRate(every=2)],
        stop=cx.Stop(max_steps=5),
    )
    optimizer, order = make(list(twin.parameters())), algorithm.order(13, seed=0)
    for _ in range(5):
        batch = next(order)
        optimizer.zero_grad()
        brute.mse(twin, x[batch], y[batch]).backward()
        optimizer.step()
    for (parameter, value), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, expected, msg=parameter, **CLOSE)
    assert model.unused.grad is mark  # the caller's own


def test_every_algorithm_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after an update in the middle of an epoch, with checkpoints at every step."""

    class Cut(Exception):
        pass

    class Bomb(cx.Callback):
        def on_step(self, row: object, model: nn.Module) -> None:
            if row["step"] == 6:  # type: ignore[index]
                raise Cut

    for name, (algorithm, _, lr) in RULES.items():
        arguments = {
            "algorithm": algorithm,
            "schedule": cx.Constant(lr),
            "recorders": [cx.BatchCriticalRate(every=2)],
            "probe": None,
            "steps": 9,
        }
        whole_model, model = run_task.model("sgd"), run_task.model("sgd")
        whole = run_task.run(tmp_path / name / "whole", "sgd", network=whole_model, **arguments)
        with pytest.raises(Cut):
            run_task.run(tmp_path / name / "cut", "sgd", callbacks=[Bomb()], **arguments)
        again = run_task.run(tmp_path / name / "cut", "sgd", network=model, **arguments)
        assert again.metrics.equals(whole.metrics), name
        assert torch.equal(brute.flat(model), brute.flat(whole_model)), name
        assert again.metrics["loss"].iloc[7:9].notna().all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_critical_rate_of_momentum_is_where_a_linear_model_stops_converging(momentum: float) -> None:
    """Just below (1 + m) n / lambda_1 the loss of a linear model falls for good, just above it blows up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    data = cx.data.Dataset(x, x @ torch.randn(5, 1, generator=generator, dtype=torch.float64))
    outcome = {}
    for multiple in (0.97, 1.03):
        torch.manual_seed(1)
        model = nn.Linear(5, 1, bias=False).double()
        history = cx.train(
            model,
            data,
            algorithm=cx.GD(momentum=momentum),
            schedule=cx.Constant(multiple, relative=True),
            recorders=[cx.Spectrum()],
            stop=cx.Stop(max_steps=1500),
        )
        outcome[multiple] = history.metrics["loss"].iloc[-1] / history.metrics["loss"].iloc[0]
        lambda_1 = torch.linalg.eigvalsh(x @ x.t())[-1].item()
        expected = (1 + momentum) * 20 / lambda_1
        np.testing.assert_allclose(history.metrics["critical_lr"][0], expected, rtol=1e-9)
        np.testing.assert_allclose(history.metrics["measured_critical_lr"][0], expected, rtol=1e-9)
    assert outcome[0.97] < 1e-6
    assert outcome[1.03] > 1e3


def test_momentum_counts_in_the_definition_of_a_catapult(recipe: Recipe) -> None:
    data = recipe.data()
    plain = brute.critical_lr(recipe.model(), data.x)
    for momentum, expected in ((0.0, True), (0.9, False)):
        history = cx.train(
            recipe.model(),
            data,
            algorithm=cx.GD(momentum=momentum),
            schedule=cx.Constant(1.5 * plain),
            recorders=[cx.BatchCriticalRate()],
            stop=cx.Stop(max_steps=1),
        )
        assert history.metrics["catapult"][0] == expected
        assert history.metrics["batch_critical_lr"][0] == pytest.approx((1 + momentum) * plain)


def test_algorithms_that_rescale_gradients_have_no_critical_rate(recipe: Recipe) -> None:
    arguments = {"algorithm": cx.Adam(5), "stop": cx.Stop(max_steps=3), "probe": recipe.data()}
    history = cx.train(
        recipe.model(),
        recipe.data(),
        schedule=cx.Constant(1e-3),
        recorders=[cx.Spectrum(), cx.BatchCriticalRate()],
        **arguments,
    )
    assert history.metrics[["critical_lr", "batch_critical_lr"]].isna().all(axis=None)
    assert history.metrics["catapult"].isna().all()
    assert history.metrics["lambda_1"].notna().all()
    assert history.catapult_count is None
    for schedule in (cx.Constant(0.5, relative=True), cx.WarmUp(cx.CatapultSchedule(), 3)):
        with pytest.raises(ValueError, match="schedule: expected absolute rates with Adam"):
            cx.train(recipe.model(), recipe.data(), schedule=schedule, recorders=[cx.Spectrum()], **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cx.SGD(5, momentum=1.0), r"momentum: expected a number in \[0, 1\), got 1.0"),
        (lambda: cx.GD(momentum=-0.1), r"momentum: expected a number in \[0, 1\), got -0.1"),
        (lambda: cx.Adam(0), "batch_size: expected an integer >= 1, got 0"),
        (lambda: cx.Adadelta(True), "batch_size: expected an integer >= 1, got True"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimizer_of_ones_own(recipe: Recipe) -> None:
    @dataclasses.dataclass(frozen=True)
    class Rprop(cx.Algorithm):
        def optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
            return torch.optim.Rprop(parameters, lr=0.0)

    model, twin, data = recipe.model(), recipe.model(), recipe.data()
    cx.train(model, data, algorithm=Rprop(None), schedule=cx.Constant(0.01), stop=cx.Stop(max_steps=6))
    optimizer = torch.optim.Rprop(twin.parameters(), lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        brute.mse(twin, data.x, data.y).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    torch.testing.assert_close(brute.flat(model), brute.flat(twin), **CLOSE)
