"""Exact, or refused with a reason and a remedy; bad input names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Checkpointed, Mutated, make
from torch import Tensor, nn

import catapult_ext as cx


def _x(n: int = 5) -> Tensor:
    return torch.randn(n, 32, dtype=torch.float64)


def _y(n: int = 5) -> Tensor:
    return torch.randn(n, 1, dtype=torch.float64)


def _model() -> nn.Module:
    return make("in-place relu", 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Mutated().double(), "modified in place after the layer has used it"),
        (lambda: Checkpointed(True).double(), "use_reentrant=False"),
        (
            lambda: nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double(),
            r"model.eval\(\)",
        ),
    ],
)
def test_refused_with_a_remedy(model: Any, message: str) -> None:
    with pytest.raises(cx.UnsupportedModule, match=message):
        cx.observe(model(), _x(), _y())


def test_dropout_is_fine_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double().eval()
    rows = cx.jacobian(model, _x()).flatten(1)
    assert rows.shape == (5, 32 * 8 + 8 + 8 + 1)


def test_autocast_is_refused() -> None:
    model = nn.Linear(32, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(cx.UnsupportedModule, match="autocast"):
        cx.observe(model, torch.randn(3, 32), torch.randn(3, 1))


def test_lower_precision_inside_of_a_forward_is_refused_wherever_it_would_count() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.last, self.rounds = nn.Linear(32, 8), nn.Linear(8, 1), True

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.rounds):
                h = torch.tanh(self.a(x))
            return self.last(h.to(x))

    x, y = _x().float(), _y().float()
    model = Mixed()
    for call in (
        lambda: cx.observe(model, x, y),
        lambda: cx.observe(model, x, y, kernel=False, agop="layers"),
        lambda: cx.observe(model, x, y, kernel=False, hessian=True).hessian,
        lambda: cx.Observer(model, verify="never")(x, y),
        lambda: cx.ntk(model, x),
        lambda: cx.ntk_plan(model, x),
        lambda: cx.ntk_top(model, x),
        lambda: cx.jacobian(model, x),
        lambda: cx.agop(model, x),
        lambda: cx.layer_agop(model, x),
        lambda: cx.hessian_top(model, x, y),
    ):
        with pytest.raises(
            cx.UnsupportedModule, match=r"computes in torch.bfloat16 .*switch off torch\.autocast"
        ):
            call()
    # What is autograd's own gradient in any case remains.
    gradients = cx.observe(model, x, y, kernel=False).gradients()
    expected = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
    assert all(torch.allclose(g, e, rtol=1e-5) for g, e in zip(gradients.values(), expected, strict=True))
    # Autocast leaves float64 as it is, and a plan that was certified is looked at again.
    exact = cx.ntk(model.double(), x.double())
    model.float().rounds = False
    assert torch.allclose(cx.ntk(model, x).double(), exact, rtol=1e-5)


def test_a_cast_to_single_precision_inside_of_a_forward_says_in_what_it_would_be_exact() -> None:
    class Upcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.last = nn.Linear(32, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.softmax(self.a(x), 1, dtype=torch.float32).to(x))

    model = Upcast()
    assert cx.observe(model, _x().float(), _y().float()).layer_report[0].route == "gram"
    with pytest.raises(cx.UnsupportedModule, match=r"torch.float32 .*or observe model\.float\(\)"):
        cx.observe(model.double(), _x(), _y())


def test_input_gradients_of_coupled_samples_are_refused() -> None:
    for name in ("batch norm, training", "coupled samples"):
        with pytest.raises(cx.UnsupportedModule, match=r"couples its samples.*model.eval\(\)"):
            cx.agop(make(name, 0), _x())


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (_x(), torch.randn(5, 5, dtype=torch.float64), ValueError, r"y: expected shape \(n, c\) = \(5, 1\)"),
        (_x(), torch.randn(1, 5, dtype=torch.float64), ValueError, "y: expected shape"),
        (_x(), torch.randn(4, dtype=torch.float64), ValueError, "y: expected shape"),
        (_x(), torch.randn(5, 1), TypeError, "y: expected torch.float64"),
        (_x(), [1.0] * 5, TypeError, "y: expected a tensor"),
        (_x(0), _y(0), ValueError, "x: expected at least one sample"),
        (_x().tolist(), _y(), TypeError, "x: expected a tensor"),
        (_x().to("meta"), _y(), ValueError, "x: expected a tensor on cpu"),
    ],
)
def test_bad_input_names_the_argument(x: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cx.observe(_model(), x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected a positive integer, got 0"),
        ({"k": 1.5}, "k: expected a positive integer"),
        ({"loss": "hinge"}, "loss: expected 'mse'"),
        ({"verify": "sometimes"}, "verify: expected one of first, always, never"),
        ({"max_bytes": -1}, "max_bytes: expected a positive integer"),
        ({"params": ["nowhere"]}, "params: expected parameters of the model, got 'nowhere'"),
        ({"params": [torch.zeros(1)]}, "params: expected parameters of the model, got a tensor"),
        ({"params": []}, "at least one parameter"),
    ],
)
def test_bad_options_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cx.Observer(_model(), **options)


def test_models_that_cannot_be_observed_say_why() -> None:
    class Strange(nn.Module):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.a, self.what = nn.Linear(32, 6, dtype=torch.float64), what

        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return {"cube": h.view(-1, 2, 3), "tuple": (h, h), "scalar": h.sum(), "detached": h.detach()}[
                self.what
            ]

    for what, error, message in [
        ("cube", ValueError, r"expected an output of shape \(n,\) or \(n, c\)"),
        ("scalar", ValueError, r"expected an output of shape"),
        ("detached", ValueError, "does not depend on a parameter"),
        ("tuple", TypeError, "expected a tensor as output, got tuple"),
    ]:
        with pytest.raises(error, match=message):
            cx.observe(Strange(what), _x(), _y())
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        cx.observe(lambda x: x, _x(), _y())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float32 or float64"):
        cx.observe(nn.Linear(32, 1).half(), _x(), _y())
    mixed = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 1).double())
    with pytest.raises(TypeError, match=r"one dtype and device.*1\.weight"):
        cx.Observer(mixed)


def test_not_finite_is_an_error_not_a_number() -> None:
    model, x = _model(), _x()
    x[2, 3] = float("nan")
    with pytest.raises(cx.NonFinite, match="output is not finite"):
        cx.observe(model, x, _y())
    model = _model().float()
    with torch.no_grad():
        for p in model.parameters():
            p *= 1e30
    with pytest.raises(cx.NonFinite):
        cx.observe(model, torch.randn(5, 32), torch.randn(5, 1))


def test_a_stale_observation_is_an_error() -> None:
    model, x, y = _model(), _x(), _y()
    observation = cx.observe(model, x, y)
    observation.step_(0.1)
    with pytest.raises(ValueError, match=r"step_\(\): this observation has made its step already"):
        observation.step_(0.1)
    observation = cx.observe(model, x, y)
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    for call in (lambda: observation.step_(0.1), observation.assign_grads_, observation.gradients):
        with pytest.raises(ValueError, match="the parameters have changed since the observation"):
            call()
    observation = cx.observe(model, x, y)
    x += 1.0
    with pytest.raises(ValueError, match="modified in place after the observation"):
        observation.step_(0.1)
    for rate in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lr: expected a finite number"):
            cx.observe(model, x, y).step_(rate)
    with pytest.raises(ValueError, match="eigen: the observation was made with kernel=False"):
        cx.observe(model, x, y, kernel=False).eigen  # noqa: B018


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_exact(backend: str) -> None:
    plain = make("in-place relu", 3)
    x, y = _x(), _y()
    expected = cx.observe(plain, x, y)
    compiled = torch.compile(plain, backend=backend)
    inner = nn.Sequential(nn.Identity(), make("in-place relu", 3))
    inner[1].compile(backend=backend)
    for model in (compiled, inner):
        got = cx.observe(model, x, y)
        assert torch.equal(got.kernel, expected.kernel)
        for a, b in zip(got.gradients().values(), expected.gradients().values(), strict=True):
            assert torch.equal(a, b)
