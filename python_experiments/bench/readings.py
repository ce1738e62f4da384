"""What an observation gives beside the kernel of a chain: other networks, outputs, AGOP of layers, sharpness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import catapult_ext as cx
from python_experiments.bench.cases import Case, Goal, job
from python_experiments.bench.steps import exact_kernel, kernel_error, plain_step

__all__: list[str] = []

_KERNEL_ERROR = "kernel, relative to sqrt(K_ii K_jj)"

_AGOP_ERROR = "AGOP of any layer times random vectors, relative"

#: Ours without what a job is about: the difference is its price. Goals leave it .15 of a plain step: the kernel alone
#: costs .62 of one for the FCN5, 1.07 for the CNN and 1.2 for the ViT.
_KERNEL_ALONE = "catapult_ext, kernel alone"


def _data(model: nn.Module, n: int, sample: tuple[int, ...], c: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(n, *sample, generator=generator), torch.randn(n, c, generator=generator)


def _fcn(s: Mapping[str, int]) -> tuple[nn.Module, Tensor, Tensor]:
    generator, c = torch.Generator().manual_seed(0), s.get("outputs", 1)
    model = cx.models.FCN(s["d"], s["width"], s["depth"], out_features=c, generator=generator)
    return _data(model, s["n"], (s["d"],), c)


def _cnn(s: Mapping[str, int]) -> tuple[nn.Module, Tensor, Tensor]:
    generator, c = torch.Generator().manual_seed(0), s.get("outputs", 1)
    model = cx.models.CNN(3, s["image"], s["channels"], s["depth"], out_features=c, generator=generator)
    return _data(model, s["n"], (3, s["image"], s["image"]), c)


def _vit(s: Mapping[str, int]) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side, width = s["patches"] * s["patch"], s["width"]
    model = cx.models.ViT(
        3, side, width, s["depth"], patch_size=s["patch"], heads=s["heads"], generator=generator
    )
    return _data(model, s["n"], (3, side, side), 1)


def _kernel(model: nn.Module, x: Tensor, y: Tensor, checked: int) -> Case:
    observer = cx.Observer(model)

    def error() -> float:
        return kernel_error(
            cx.observe(model, x[:checked], y[:checked]).kernel, exact_kernel(model, x[:checked])
        )

    return Case(
        {
            "torch step": plain_step(copy.deepcopy(model), x, y),
            "catapult_ext": lambda: observer(x, y).kernel,
        },
        {"catapult_ext": error},
    )


@job(
    "cnn-32-kernel",
    "CNN with three convolutions of 32 channels on 32 x 32, kernel",
    baseline="torch step",
    shapes={"n": 32, "channels": 32, "depth": 4, "image": 32},
    goals=(Goal(1.3, 1.3),),
    error=_KERNEL_ERROR,
)
@job(
    "cnn-10-outputs",
    "CNN with three convolutions of 32 channels on 32 x 32 and 10 outputs, kernel of 32 samples",
    baseline="torch step",
    shapes={"n": 32, "channels": 32, "depth": 4, "image": 32, "outputs": 10},
    goals=(Goal(10.0, 10.0),),
    error=_KERNEL_ERROR,
)
def _cnn_kernel(s: Mapping[str, int]) -> Case:
    return _kernel(*_cnn(s), checked=4)


@job(
    "fcn-10-outputs",
    "FCN5 with 10 outputs, kernel of 32 samples (320 rows)",
    baseline="torch step",
    shapes={"n": 32, "d": 3072, "width": 1024, "depth": 5, "outputs": 10},
    goals=(Goal(2.4, 2.4),),
    error=_KERNEL_ERROR,
)
def _fcn_kernel(s: Mapping[str, int]) -> Case:
    return _kernel(*_fcn(s), checked=4)


@job(
    "vit-kernel",
    "ViT with patches of 4 x 4 on 32 x 32, kernel",
    baseline="torch step",
    shapes={"n": 32, "patches": 8, "patch": 4, "width": 128, "depth": 4, "heads": 4},
    goals=(Goal(1.35, 1.35),),
    error=_KERNEL_ERROR,
)
def _vit_kernel(s: Mapping[str, int]) -> Case:
    return _kernel(*_vit(s), checked=4)


@job(
    "fcn5-layer-agop-parts",
    "FCN5, kernel with everything the AGOP of each layer needs, from one pass",
    baseline="torch step",
    shapes={"n": 128, "d": 3072, "width": 1024, "depth": 5},
    goals=(Goal(1.24, 1.24, _KERNEL_ALONE),),
    error=_AGOP_ERROR,
)
@job(
    "fcn5-layer-agop",
    "FCN5, kernel with the AGOP of each layer as factors F, F^T F the AGOP",
    baseline="torch step",
    shapes={"n": 128, "d": 3072, "width": 1024, "depth": 5, "formed": 1},
    goals=(Goal(1.24, 1.24, _KERNEL_ALONE),),
    error=_AGOP_ERROR,
)
def _fcn_layer_agop(s: Mapping[str, int]) -> Case:
    return _layer_agop(*_fcn(s), _factored if s.get("formed") else lambda observation: observation.kernel)


@job(
    "cnn-layer-agop",
    "CNN with three convolutions of 64 channels on 32 x 32, kernel with the patch AGOP of each layer as factors",
    baseline="torch step",
    shapes={"n": 32, "channels": 64, "depth": 4, "image": 32},
    goals=(Goal(1.14, 1.14, _KERNEL_ALONE),),
    error=_AGOP_ERROR,
)
@job(
    "cnn-32-layer-agop",
    "CNN with three convolutions of 32 channels on 32 x 32, kernel with the patch AGOP of each layer as factors",
    baseline="torch step",
    shapes={"n": 32, "channels": 32, "depth": 4, "image": 32},
    goals=(Goal(1.14, 1.14, _KERNEL_ALONE),),
    error=_AGOP_ERROR,
)
def _cnn_layer_agop(s: Mapping[str, int]) -> Case:
    return _layer_agop(*_cnn(s), _factored)


@job(
    "vit-layer-agop",
    "ViT with patches of 4 x 4 on 32 x 32, kernel with the AGOP of each layer",
    baseline="torch step",
    shapes={"n": 32, "patches": 8, "patch": 4, "width": 128, "depth": 4, "heads": 4},
    goals=(Goal(1.12, 1.12, _KERNEL_ALONE),),
    error=_AGOP_ERROR,
)
def _vit_layer_agop(s: Mapping[str, int]) -> Case:
    return _layer_agop(*_vit(s), lambda observation: observation.layer_agop())


def _factored(observation: cx.Observation) -> object:
    return observation.layer_agop(factored=True)


def _layer_agop(model: nn.Module, x: Tensor, y: Tensor, read: Callable[[cx.Observation], object]) -> Case:
    observer, plain = cx.Observer(model, agop="layers"), cx.Observer(model)

    return Case(
        {
            "torch step": plain_step(copy.deepcopy(model), x, y),
            _KERNEL_ALONE: lambda: plain(x, y).kernel,
            "catapult_ext": lambda: read(observer(x, y)),
        },
        {"catapult_ext": lambda: _layer_agop_error(model, x[:4], y[:4])},
    )


def _layer_agop_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest error of a layer's AGOP times a few random vectors: that of a convolutional head fills no memory."""
    ours = cx.observe(model, x, y, agop="layers").layer_agop(factored=True)
    exact = cx.observe(copy.deepcopy(model).double(), x.double(), y.double(), agop="layers")
    errors, generator = [], torch.Generator().manual_seed(2)
    for name, factor in exact.layer_agop(factored=True).items():
        f, g = factor.flatten(0, -2), ours[name].double().flatten(0, -2)  # [r, d]
        v = torch.randn(f.shape[1], 8, dtype=torch.float64, generator=generator)
        wanted = f.T @ (f @ v)  # [d, 8]
        errors.append(float((g.T @ (g @ v) - wanted).norm() / wanted.norm()))
    return max(errors)


#: Steps of gradient descent before the sharpness is found, and their rate over the critical one, as in Fig. 3a: by then
#: the spike is over.
_CATAPULT_STEPS, _CATAPULT_RATE = 12, 6 / 3.6


@job(
    "hessian-from-last",
    "FCN5, sharpness (largest Hessian eigenvalue, residual 1e-2) behind a catapult, begun at the last vector",
    baseline="torch step",
    shapes={"n": 128, "d": 3072, "width": 1024, "depth": 5},
    goals=(Goal(6.0, 6.0),),
    error="lambda_1, relative",
)
@job(
    "hessian-from-kernel",
    "FCN5, the same begun at J^T u_1 of an observation's kernel; the observation is not counted",
    baseline="torch step",
    shapes={"n": 128, "d": 3072, "width": 1024, "depth": 5, "kernel": 1},
    goals=(Goal(6.0, 6.0),),
    error="lambda_1, relative",
)
def _hessian(s: Mapping[str, int]) -> Case:
    model, x, y = _fcn(s)
    # Variances of features that fall as those of images do, mean square 1: lambda_1 stands out.
    spread = torch.arange(1, s["d"] + 1, dtype=x.dtype) ** -0.5  # [d]
    x, y = x * spread / spread.square().mean().sqrt(), y.sign()  # [n, d], [n, 1]
    observer = cx.Observer(model, hessian=True)
    rate = _CATAPULT_RATE * float(observer(x, y).critical_lr)
    for step in range(_CATAPULT_STEPS):
        if step + 1 == _CATAPULT_STEPS:
            last = cx.hessian_top(model, x, y, tol=1e-2)
        observer(x, y).step_(rate)
    observation = observer(x, y)
    _ = observation.eigen  # found before the clock starts

    def call() -> cx.TopEigh:
        if s.get("kernel"):
            return copy.copy(observation).hessian  # a copy has not found it yet
        return cx.hessian_top(model, x, y, start=last, tol=1e-2)

    def error() -> float:
        exact = cx.hessian_top(model, x, y, start=last, tol=1e-4).values
        return float((call().values / exact - 1).abs())

    return Case(
        {"torch step": plain_step(copy.deepcopy(model), x, y), "catapult_ext": call}, {"catapult_ext": error}
    )
