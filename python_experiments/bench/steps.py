"""Training steps: a plain eager step of torch beside the same step that also observes."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext.training.chain import Chain
from python_experiments.bench.cases import Case, Goal, job

__all__: list[str] = []

#: Steps in one stretch of the native engine, as between two looks at a training set of some hundred samples.
_STRETCH = 64

#: Small enough that the weights of thousands of steps stay where they were.
_LR = 1e-6


def plain_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One eager SGD step with `torch.optim`, as everybody writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)
    return lambda: sgd_step(model, optimizer, x, y)


def compiled_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The same with the forward and backward pass of `torch.compile`; the first call compiles (some 20 s)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR)

    @functools.cache
    def compiled() -> Callable[[Tensor], Tensor]:  # when it is wanted: this loads the whole compiler
        return torch.compile(model)

    return lambda: sgd_step(compiled(), optimizer, x, y)


def sgd_step(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> float:
    """Zero the gradients, forward, backward, step; the loss."""
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def func_kernel(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """K = J J^T with `torch.func`: per-sample gradients of every parameter, then the contraction."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def output(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (sample.unsqueeze(0),)).squeeze()

    rows = torch.func.vmap(torch.func.grad(output), (None, 0))

    def kernel() -> Tensor:
        return sum(g.flatten(1) @ g.flatten(1).T for g in rows(params, x).values())  # [n, n]

    return kernel


def exact_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """K in float64 by one backward per sample and output: [n c, n c]."""
    double = copy.deepcopy(model).double()
    params = list(double.parameters())
    out = double(x.double()).flatten()
    rows = [torch.autograd.grad(value, params, retain_graph=True) for value in out]
    flat = [torch.cat([g.flatten() for g in row]) for row in rows]
    jacobian = torch.stack(flat)  # [n c, p]
    return jacobian @ jacobian.T


def kernel_error(kernel: Tensor, exact: Tensor) -> float:
    """Return max |K - K*| / sqrt(K*_ii K*_jj)."""
    scale = exact.diagonal().sqrt()
    return float(((kernel.double() - exact).abs() / torch.outer(scale, scale)).max())


#: Samples whose kernel is checked by brute force; the kernel of a subset is a block of the whole.
_CHECKED = 16


def _step_case(
    model: nn.Module, x: Tensor, y: Tensor, observe: Callable[[cx.Observer], object], k: int = 1
) -> Case:
    observer = cx.Observer(model, k=k)
    return Case(
        {"torch step": plain_step(copy.deepcopy(model), x, y), "catapult_ext": lambda: observe(observer)},
        {
            "catapult_ext": lambda: kernel_error(
                cx.observe(model, x[:_CHECKED], y[:_CHECKED]).kernel, exact_kernel(model, x[:_CHECKED])
            )
        },
    )


#: Name of the peer that not every machine runs: it needs a compiler at run time.
_COMPILED = "torch.compile step"


def _with_compiled(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Case:
    return dataclasses.replace(
        case,
        implementations={**case.implementations, _COMPILED: compiled_step(copy.deepcopy(model), x, y)},
        optional=frozenset({_COMPILED}),
    )


def _fcn(depth: int, width: int, d: int, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = cx.models.FCN(d, width, depth, generator=generator)
    return model, torch.randn(n, d, generator=generator), torch.randn(n, 1, generator=generator)


@job(
    "fcn5-observed-step",
    "FCN5, one training step with loss, kernel, top 10 eigenpairs and loss split",
    baseline="torch step",
    shapes={"n": 128, "d": 3072, "width": 1024, "depth": 5, "k": 10},
    goals=(Goal(1.1, 1.0),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _fcn5(s: Mapping[str, int]) -> Case:
    model, x, y = _fcn(s["depth"], s["width"], s["d"], s["n"])

    def observe(observer: cx.Observer) -> float:
        observation = observer(x, y)
        top = float(observation.top_loss)  # decides the eigenpairs before the weights change
        observation.step_(_LR)
        return top

    return _with_compiled(_step_case(model, x, y, observe, s["k"]), model, x, y)


@job(
    "fcn2-kernel",
    "FCN2, kernel of 2,000 samples",
    baseline="torch step",
    shapes={"n": 2000, "d": 100, "width": 1024, "depth": 2},
    goals=(Goal(7.0, 6.0),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
@job(
    "fcn2-kernel-small",
    "FCN2, kernel of 256 samples",
    baseline="torch step",
    shapes={"n": 256, "d": 100, "width": 1024, "depth": 2},
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _fcn2(s: Mapping[str, int]) -> Case:
    return _kernel_case(*_fcn(s["depth"], s["width"], s["d"], s["n"]))


@job(
    "fcn2-kernel-top-10",
    "FCN2, kernel of 2,000 samples with its top 10 eigenpairs and the loss split",
    baseline="torch step",
    shapes={"n": 2000, "d": 100, "width": 1024, "depth": 2, "k": 10},
    goals=(Goal(8.5, 7.0),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _fcn2_top(s: Mapping[str, int]) -> Case:
    model, x, y = _fcn(s["depth"], s["width"], s["d"], s["n"])
    return _step_case(model, x, y, lambda observer: float(observer(x, y).top_loss), s["k"])


@job(
    "cnn-observed-step",
    "CNN with three convolutions of 64 channels on 32 x 32, one training step with loss, kernel, top 10 and loss split",
    baseline="torch step",
    shapes={"n": 32, "channels": 64, "depth": 4, "image": 32, "k": 10},
    goals=(Goal(1.35, 1.15),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _cnn_step(s: Mapping[str, int]) -> Case:
    model, x, y = _cnn_data(s)

    def observe(observer: cx.Observer) -> float:
        observation = observer(x, y)
        top = float(observation.top_loss)  # decides the eigenpairs before the weights change
        observation.step_(_LR)
        return top

    return _with_compiled(_step_case(model, x, y, observe, s["k"]), model, x, y)


@job(
    "cnn-kernel",
    "CNN with three convolutions of 64 channels on 32 x 32, kernel",
    baseline="torch step",
    shapes={"n": 32, "channels": 64, "depth": 4, "image": 32},
    goals=(Goal(1.3, 1.3),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _cnn(s: Mapping[str, int]) -> Case:
    return _kernel_case(*_cnn_data(s))


def _cnn_data(s: Mapping[str, int]) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = cx.models.CNN(3, s["image"], s["channels"], s["depth"], generator=generator)
    x = torch.randn(s["n"], 3, s["image"], s["image"], generator=generator)
    return model, x, torch.randn(s["n"], 1, generator=generator)


def _kernel_case(model: nn.Module, x: Tensor, y: Tensor) -> Case:
    case = _step_case(model, x, y, lambda observer: observer(x, y).kernel)
    func = func_kernel(copy.deepcopy(model), x)
    return Case(
        {**case.implementations, "torch.func": func},
        {
            **case.errors,
            "torch.func": lambda: kernel_error(
                func_kernel(model, x[:_CHECKED])(), exact_kernel(model, x[:_CHECKED])
            ),
        },
    )


@job(
    "sgd-step-5",
    "FCN2, one SGD step of batch 5 with the batch's kernel, lambda_1 and critical rate",
    baseline="torch step",
    shapes={"n": 5, "d": 100, "width": 1024, "depth": 2},
    goals=(Goal(0.95, 0.95),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
@job(
    "sgd-step-32",
    "FCN2, one SGD step of batch 32 with the batch's kernel, lambda_1 and critical rate",
    baseline="torch step",
    shapes={"n": 32, "d": 100, "width": 1024, "depth": 2},
    goals=(Goal(1.15, 1.15),),
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _sgd(s: Mapping[str, int]) -> Case:
    model, x, y = _fcn(s["depth"], s["width"], s["d"], s["n"])

    def observe(observer: cx.Observer) -> float:
        observation = observer(x, y)
        rate = float(observation.critical_lr)
        observation.step_(_LR)
        return rate

    case = _step_case(model, x, y, observe)
    peer, func = copy.deepcopy(model), func_kernel(copy.deepcopy(model), x)
    step = plain_step(peer, x, y)

    def separate() -> object:
        torch.linalg.eigvalsh(func())[-1].item()
        return step()

    case = Case({**case.implementations, "torch.func + eigvalsh + torch step": separate}, case.errors)
    return _with_compiled(case, model, x, y)


@job(
    "chain-fcn2-5",
    "FCN2, 64 SGD steps of batch 5, each with the batch's lambda_1 and critical rate",
    baseline="torch steps",
    shapes={"n": 2000, "batch": 5, "d": 100, "width": 1024, "depth": 2, "steps": _STRETCH},
    goals=(Goal(0.4, 0.2),),
    error="weights after one step, relative to the step",
)
@job(
    "chain-fcn2-32",
    "FCN2, 64 SGD steps of batch 32, each with the batch's lambda_1 and critical rate",
    baseline="torch steps",
    shapes={"n": 2000, "batch": 32, "d": 100, "width": 1024, "depth": 2, "steps": _STRETCH},
    goals=(Goal(0.7, 0.5),),
    error="weights after one step, relative to the step",
)
@job(
    "chain-fcn4-5",
    "FCN4, 64 SGD steps of batch 5, each with the batch's lambda_1 and critical rate",
    baseline="torch steps",
    shapes={"n": 2000, "batch": 5, "d": 100, "width": 256, "depth": 4, "steps": _STRETCH},
    goals=(Goal(0.4, 0.2),),
    error="weights after one step, relative to the step",
)
@job(
    "chain-fcn4-32",
    "FCN4, 64 SGD steps of batch 32, each with the batch's lambda_1 and critical rate",
    baseline="torch steps",
    shapes={"n": 2000, "batch": 32, "d": 100, "width": 256, "depth": 4, "steps": _STRETCH},
    goals=(Goal(0.7, 0.5),),
    error="weights after one step, relative to the step",
)
def _chain(s: Mapping[str, int]) -> Case:
    model, x, y = _fcn(s["depth"], s["width"], s["d"], s["n"])
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randint(s["n"], (s["steps"], s["batch"]), generator=generator))
    chain = Chain(copy.deepcopy(model), x, y, s["batch"])
    rates, observed = [_LR] * s["steps"], [True] * s["steps"]
    plain_model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=_LR)

    def plain() -> None:
        for batch in batches:
            sgd_step(plain_model, optimizer, x[batch], y[batch])

    observer = cx.Observer(copy.deepcopy(model))

    def general() -> None:
        for batch in batches:
            observation = observer(x[batch], y[batch])
            float(observation.critical_lr)
            observation.step_(_LR)

    return Case(
        {
            "torch steps": plain,
            "catapult_ext": lambda: chain.steps_(batches, rates, observed, 1e9),
            "catapult_ext, general engine": general,
        },
        {"catapult_ext": lambda: _step_error(model, x, y, batches[0])},
    )


def _step_error(model: nn.Module, x: Tensor, y: Tensor, batch: Tensor) -> float:
    """Error of the parameters after one native step that is as long as they are, relative to it."""
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    loss = (exact(x[batch].double()) - y[batch].double()).square().mean()
    gradients = torch.autograd.grad(loss, list(exact.parameters()))
    before = torch.cat([p.detach().flatten() for p in exact.parameters()])
    gradient = torch.cat([g.flatten() for g in gradients])
    rate = float(before.norm() / gradient.norm())
    Chain(ours, x, y, len(batch)).steps_([batch], [rate], [True], 1e30)
    after = torch.cat([p.detach().double().flatten() for p in ours.parameters()])
    return float((after - (before - rate * gradient)).norm() / (rate * gradient.norm()))
