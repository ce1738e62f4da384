"""Largest eigenpairs of the tangent kernel from its products, against the dense kernel."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import catapult_ext as cx
from catapult_ext import lanczos

COUPLED = ["batch norm, training", "coupled samples", "scalar below coupling", "three outputs, batch norm"]


def kernel_of(model: nn.Module, x: Any, outputs: str | int = "all") -> Tensor:
    """K by autograd alone."""
    jacobian = cx.jacobian(model, x)  # [n, c, p]
    if outputs == "trace":
        return torch.einsum("icp,jcp->ij", jacobian, jacobian) / jacobian.shape[1]
    if outputs == "sum":
        flat = jacobian.sum(1)
    else:
        flat = jacobian.flatten(0, 1) if outputs == "all" else jacobian[:, int(outputs)]
    return flat @ flat.T


def check(found: cx.TopEigh, kernel: Tensor, tol: float = 1e-8) -> None:
    k, exact = len(found.values), torch.linalg.eigvalsh(kernel).flip(0)
    values, vectors = found.values.double(), found.vectors.double()
    size = float(exact[0])
    assert (values - exact[:k]).abs().max() <= tol * size
    norms = (kernel @ vectors - vectors * values).norm(dim=0)
    assert (found.residuals <= tol * size).all()
    assert (norms - found.residuals.double()).abs().max() <= 0.1 * tol * size
    assert (vectors.T @ vectors - torch.eye(k)).abs().max() <= (
        1e-10 if found.vectors.dtype == torch.float64 else 1e-6
    )


class Sizes(nn.Module):
    """Notes how many samples each forward got."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.model(x)


def smallest(model: nn.Module, x: Any, k: int = 1) -> int:
    with pytest.raises(
        ValueError, match=r"max_bytes: 1 is too small .* the smallest bound that works is"
    ) as caught:
        cx.ntk_top(model, x, k, max_bytes=1)
    return int(str(caught.value).rsplit(" ", 1)[1])


@pytest.mark.parametrize("name", networks.EXACT)
def test_every_network(name: str) -> None:
    model, x = networks.make(name, 3), torch.randn(7, 32, dtype=torch.float64)
    kernel = kernel_of(model, x)
    for k in (1, 3, len(kernel) - 1, len(kernel)):
        check(cx.ntk_top(model, x, k), kernel)
    check(cx.ntk_top(model, [x[:3], x[3:]], 2), kernel)
    if name in COUPLED:
        with pytest.raises(cx.UnsupportedModule, match=r"it couples its samples .* call model\.eval\(\)"):
            cx.ntk_top(model, x, max_bytes=1)
    else:
        sized = Sizes(model)
        bound = smallest(sized, x)
        sized.seen.clear()
        check(cx.ntk_top(sized, x, max_bytes=bound), kernel)
        # There the graph of all seven samples weighs less than what another forward and backward of four hold.
        whole = name in ("parametrizations", "scaled products", "checkpoint")
        assert sized.seen[-2:] == ([4, 7] if whole else [4, 3])
        assert whole or len(sized.seen) > 8  # anew for each product


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), max_size=3),
    n=st.integers(1, 7),
    c=st.integers(1, 4),
    k=st.integers(1, 28),
    outputs=st.sampled_from(["all", "sum", "trace", 0]),
    seed=st.integers(0, 2**31),
)
def test_random_networks(widths: list[int], n: int, c: int, k: int, outputs: str | int, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = [3, *widths, c]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model, x = nn.Sequential(*layers[:-1]).double(), torch.randn(n, 3, dtype=torch.float64)
    kernel = kernel_of(model, x, outputs)
    check(cx.ntk_top(model, x, min(k, len(kernel)), outputs=outputs), kernel)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 12, 60])
def test_eigenvalues_of_every_multiplicity(k: int) -> None:
    """One layer: each eigenvalue comes once for each of the outputs, exactly."""
    model, x = nn.Linear(6, 4).double(), torch.randn(15, 6, dtype=torch.float64)
    check(cx.ntk_top(model, x, k), kernel_of(model, x))
    identity = torch.eye(9, dtype=torch.float64)
    found = cx.ntk_top(nn.Linear(9, 1, bias=False).double(), identity, min(k, 9))
    assert torch.allclose(found.values, torch.ones(min(k, 9)).double(), rtol=1e-12)


def test_float32_and_several_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    model = cx.models.CNN(3, 12, 8, 4, 3, generator=generator)
    x = torch.randn(23, 3, 12, 12, generator=generator)
    kernel = kernel_of(copy.deepcopy(model).double(), x.double())
    found = cx.ntk_top(model, x, 9)
    assert found.values.dtype == found.vectors.dtype == found.residuals.dtype == torch.float32
    check(found, kernel, 1e-5)
    check(cx.ntk_top(model, x, 9, max_bytes=smallest(model, x, 9)), kernel, 1e-5)


def test_parts_of_the_parameters() -> None:
    model, x = networks.make("three outputs", 1), torch.randn(6, 32, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()][1:3]
    check(cx.ntk_top(model, x, 4, params=names), cx.ntk(model, x, params=names))


def test_tokens_tuples_dicts_and_loaders() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (9, 3))
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    kernel = kernel_of(model, tokens)
    check(cx.ntk_top(model, tokens, 3), kernel)
    loader = DataLoader(TensorDataset(tokens, torch.zeros(9)), batch_size=4)
    check(cx.ntk_top(model, loader, 3), kernel)
    check(cx.ntk_top(model, loader, 3, max_bytes=smallest(model, loader, 3)), kernel)
    with pytest.raises(ValueError, match="same batches in every pass"):
        cx.ntk_top(model, DataLoader(TensorDataset(tokens), batch_size=4, shuffle=True), 3)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(3, 2, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a, b)

    two, a, b = Two().double(), torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    kernel = kernel_of(two, (a, b))
    for x in ((a, b), {"b": b, "a": a}):
        check(cx.ntk_top(two, x, 2), kernel)
        check(cx.ntk_top(two, x, 2, max_bytes=smallest(two, x, 2)), kernel)


def test_a_bound_decides_the_blocks() -> None:
    model = Sizes(cx.models.FCN(5, 16, 3).double())
    x = torch.randn(50, 5, dtype=torch.float64)
    kernel, least = kernel_of(model, x), smallest(model, x)
    blocks = []
    for bound in (least, least + 10_000, least + 20_000, least + 10**7):
        model.seen.clear()
        check(cx.ntk_top(model, x, max_bytes=bound), kernel)
        blocks.append(max(model.seen))
    assert blocks[0] == 4 < blocks[1] < blocks[2] < blocks[3] == 50
    assert model.seen.count(50) == 1  # one forward serves all products


def test_fewer_products_than_arpack_and_fewer_still_from_the_last_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scipy.sparse.linalg import LinearOperator, eigsh

    data = cx.data.load("digits", train=40, validation=0, test=0, seed=0)
    generator = torch.Generator().manual_seed(1)
    model = cx.models.FCN(data.train.x[0].numel(), 64, 3, 10, generator=generator).double()
    x = data.train.x.double()
    kernel = cx.ntk(model, x)
    counts: dict[tuple[str, int], int] = {}
    expand = lanczos._Basis.expand

    def counted(basis: Any, directions: Tensor) -> None:
        before = basis.products
        expand(basis, directions)
        counts[who, k] = counts.get((who, k), 0) + basis.products - before

    monkeypatch.setattr(lanczos._Basis, "expand", counted)
    for k in (1, 10):
        who = "cold"
        found = cx.ntk_top(model, x, k, tol=1e-5)
        who = "warm"
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1e-4 * torch.randn(p.shape, generator=generator))
        cx.ntk_top(model, x, k, start=found, tol=1e-3)
        taken = [0]

        def times(v: Any, taken: list[int] = taken) -> Any:
            taken[0] += 1
            return kernel.numpy() @ v

        eigsh(LinearOperator(kernel.shape, times, dtype=float), k, which="LA", tol=1e-5)
        counts["arpack", k] = taken[0]
    assert counts["cold", 1] < counts["arpack", 1]
    assert counts["cold", 10] <= 1.2 * counts["arpack", 10]
    assert counts["warm", 1] <= 4


def test_what_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "_LARGEST_BASIS", 8)

    class Diagonal(nn.Module):
        """f_i = d_i w_i: K is diagonal."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1500).double())

        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0] * self.w

    diagonal = 1 - torch.linspace(0, 1, 1500, dtype=torch.float64).square() * 1e-3
    with pytest.warns(RuntimeWarning, match=r"ntk_top: \d of 2 eigenpairs have not converged") as warned:
        found = cx.ntk_top(Diagonal(), diagonal.sqrt().unsqueeze(1), 2, tol=1e-13)
    assert Path(warned[0].filename) == Path(__file__)
    norms = (diagonal[:, None] * found.vectors - found.vectors * found.values).norm(dim=0)
    assert norms.max() > 1e-13
    assert torch.allclose(found.residuals, norms, rtol=1e-3)


# ---- what is refused


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class _Once(_Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class _Detached(_Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (2 * grad * ctx.saved_tensors[0]).detach()


class _HalfDetached(_Square):
    """Its backward is right, the derivative of that is half of what it should be."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad + grad.detach()) * ctx.saved_tensors[0]


class _Clipped(_Square):
    """Its backward is not linear."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad.clamp(-1e-3, 1e-3) * ctx.saved_tensors[0]


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.last, self.function = nn.Linear(32, 4), nn.Linear(4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function.apply(self.a(x)))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: Applied(_Once), cx.UnsupportedModule, "marked once_differentiable"),
        (lambda: Applied(_Detached), cx.UnsupportedModule, r"gradient of a\.weight cannot be differentiated"),
        (lambda: Applied(_HalfDetached), cx.UnsupportedModule, "the derivative of its gradient .* is not J"),
        (lambda: Applied(_Clipped), cx.UnsupportedModule, "the derivative of its gradient .* is not J"),
        (lambda: networks.Checkpointed(True), cx.UnsupportedModule, "use_reentrant=False"),
        (lambda: nn.Sequential(nn.Linear(32, 1), nn.Dropout(0.5)), cx.UnsupportedModule, r"model.eval\(\)"),
    ],
)
def test_refused_with_a_reason(model: Any, error: type[Exception], message: str) -> None:
    network = model().double()
    x = torch.randn(6, 32, dtype=torch.float64)
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        cx.ntk_top(network, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_custom_function_with_a_right_backward() -> None:
    model, x = Applied(_Square).double(), torch.randn(6, 32, dtype=torch.float64)
    check(cx.ntk_top(model, x, 4), kernel_of(model, x))


@pytest.mark.parametrize("name", ["batch norm, training", "batch norm, eval", "parametrizations"])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_model_is_left_as_found(name: str, blocks: bool) -> None:
    model, x = networks.make(name, 2).train("training" in name), torch.randn(9, 32, dtype=torch.float64)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads, versions = [p.grad.clone() for p in model.parameters()], [p._version for p in model.parameters()]
    random, training = torch.get_rng_state(), model.training
    with torch.no_grad():
        if blocks:
            with pytest.raises((ValueError, cx.UnsupportedModule)):
                cx.ntk_top(model, x, max_bytes=1)
        else:
            cx.ntk_top(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training == training


MODEL = nn.Linear(32, 2).double()
X = torch.zeros(5, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cx.ntk_top(MODEL, X, 0), ValueError, "k: expected an integer from 1 to 10, got 0"),
        (lambda: cx.ntk_top(MODEL, X, 11), ValueError, "k: expected an integer from 1 to 10, got 11"),
        (lambda: cx.ntk_top(MODEL, X, 6, outputs=1), ValueError, "k: expected an integer from 1 to 5, got 6"),
        (lambda: cx.ntk_top(MODEL, X, tol=0.0), ValueError, "tol: expected a positive number"),
        (lambda: cx.ntk_top(MODEL, X, outputs=2), ValueError, "outputs: expected 'all'"),
        (lambda: cx.ntk_top(MODEL, X, start=X), ValueError, r"start: expected shape \(10, columns\)"),
        (lambda: cx.ntk_top(MODEL, X, start=X.float()), TypeError, r"start: expected torch\.float64"),
        (lambda: cx.ntk_top(MODEL, X, max_bytes=0), ValueError, "max_bytes: expected a positive integer"),
        (lambda: cx.ntk_top(MODEL, X[:0]), ValueError, "x: expected at least one sample"),
        (lambda: cx.ntk_top(MODEL, iter([X])), TypeError, "x: expected a loader that can be read again"),
        (lambda: cx.ntk_top(MODEL, X / 0), cx.NonFinite, "output is not finite"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
