"""What a model may be called with: one tensor, several, keywords, integer tokens."""

from __future__ import annotations

from typing import Any

import brute_force
import pytest
import torch
from torch import Tensor, nn

import catapult_ext as cx

N = 5


class Captioner(nn.Module):
    """An image [n, 3, 4, 4] and its tokens [n, 6]."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, 4, 2)
        self.read = nn.Embedding(9, 4, padding_idx=0, sparse=sparse)
        self.last = nn.Linear(4, 2)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.see(image)).mean((2, 3)) + self.read(tokens).mean(1)
        return self.last(torch.tanh(h))


def _data(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=generator)
    tokens = torch.randint(0, 9, (n, 6), generator=generator)
    return image, tokens, torch.randn(n, 2, dtype=torch.float64, generator=generator)


def _model(**options: Any) -> Captioner:
    torch.manual_seed(1)
    return Captioner(**options).double()


@pytest.mark.parametrize("named", [False, True])
def test_several_tensors_by_position_and_by_name(named: bool) -> None:
    model, (image, tokens, y), (other, words, _) = _model(), _data(), _data(7, 3)
    x = {"tokens": tokens, "image": image} if named else (image, tokens)
    z = {"tokens": words, "image": other} if named else (other, words)
    rows, columns = brute_force.jacobian(model, x), brute_force.jacobian(model, z)
    expected = brute_force.kernel_of(rows)
    observer = cx.Observer(model)
    for _ in range(3):
        observation = observer(x, y)
        assert brute_force.relative(observation.kernel, expected) <= 1e-10
    assert len(observer._plans) == 1, "one plan for one signature"
    loss = (model(image, tokens) - y).square().mean()
    for got, reference in zip(
        observation.gradients().values(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        assert brute_force.relative(got, reference) <= 1e-10
    assert brute_force.relative(cx.ntk(model, x), expected) <= 1e-10
    cross = sum(brute_force.flat_rows(rows[p]) @ brute_force.flat_rows(columns[p]).T for p in rows)
    assert brute_force.relative(cx.ntk(model, x, z), cross) <= 1e-10
    flat = torch.cat([brute_force.flat_rows(r) for r in rows.values()], 1)
    assert brute_force.relative(cx.jacobian(model, x).flatten(0, 1), flat) <= 1e-12
    assert float(cx.hessian_top(model, x, y).values[0]) > 0
    without = cx.observe(model, x, y, kernel=False)
    assert torch.equal(without.residual, observation.residual)


def test_integer_tokens_alone() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 1)).double()
    _, tokens, _ = _data()
    expected = brute_force.kernel_of(brute_force.jacobian(model, tokens))
    observation = cx.observe(model, tokens, torch.zeros(N, dtype=torch.float64))
    assert brute_force.relative(observation.kernel, expected) <= 1e-10
    with pytest.raises(
        TypeError, match=r"x: expected a floating-point tensor for input gradients, got torch.int64"
    ):
        cx.agop(model, tokens)


def test_sparse_embeddings() -> None:
    image, tokens, y = _data()
    dense, sparse = _model(), _model(sparse=True)
    for options in ({}, {"kernel": False}):
        one, other = (
            cx.observe(dense, (image, tokens), y, **options),
            cx.observe(sparse, (image, tokens), y, **options),
        )
        for a, b in zip(one.gradients().values(), other.gradients().values(), strict=True):
            assert brute_force.relative(b, a) <= 1e-12
    assert brute_force.relative(cx.ntk(sparse, (image, tokens)), cx.ntk(dense, (image, tokens))) <= 1e-12


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1, 2], TypeError, "x: expected a tensor of shape .* or a tuple or dict of such tensors, got list"),
        ((), TypeError, "x: .* got an empty tuple"),
        ((_data()[0], 3), TypeError, r"x\[1\]: expected a tensor"),
        ((_data()[0], _data()[1][:4]), ValueError, r"x\[1\]: expected n = 5 samples .* as x\[0\] has"),
        (
            {"image": _data()[0], "tokens": _data()[1][:0]},
            ValueError,
            r"x\['tokens'\]: expected at least one",
        ),
        ({0: _data()[0]}, TypeError, "x: expected the names of the model's arguments as keys"),
        ((_data()[0], _data()[1].to("meta")), ValueError, r"x\[1\]: expected a tensor on cpu"),
    ],
)
def test_bad_inputs_name_the_part(x: Any, error: type[Exception], message: str) -> None:
    for call in (lambda: cx.observe(_model(), x, _data()[2]), lambda: cx.ntk(_model(), x)):
        with pytest.raises(error, match=message):
            call()


def test_inputs_that_do_not_go_together() -> None:
    image, tokens, y = _data()
    with pytest.raises(
        ValueError, match=r"z: expected samples like those of x, \[0\] \(3, 4, 4\) torch.float64, \[1\]"
    ):
        cx.ntk(_model(), (image, tokens), (image, tokens[:, :5]))
    with pytest.raises(TypeError, match="x: expected a tensor of shape"):
        cx.Observer(_model(), agop=True)((image, tokens), y)
