"""The kernel of one network by every tool that gives it, where it is installed; none of them is needed otherwise.

The networks are made of layers of torch alone, which all of these tools know.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import catapult_ext as cx
from python_experiments.bench.cases import Case, job
from python_experiments.bench.steps import exact_kernel, kernel_error, plain_step
from python_experiments.coverage.peers import PEERS, versions

__all__: list[str] = []

#: Peers of the layer coverage that give the whole kernel, and what the lines call them.
_TOOLS = {
    "jacrev": "torch.func.jacrev",
    "NTK-vp": "torch.func NTK-vp",
    "nngeometry": "nngeometry",
    "BackPACK": "BackPACK",
    "Opacus": "Opacus",
}
#: Those that come with torch, which have to run.
_NEEDED = frozenset({"torch.func.jacrev", "torch.func NTK-vp"})
_NEURAL_TANGENTS = "neural-tangents"


@job(
    "peers-fcn2",
    "FCN2, kernel of 32 samples by each tool",
    baseline="torch step",
    shapes={"n": 32, "d": 100, "width": 1024, "depth": 2},
    error="kernel, relative to sqrt(K_ii K_jj)",
)
@job(
    "peers-fcn5",
    "FCN5, kernel of 32 samples by each tool",
    baseline="torch step",
    shapes={"n": 32, "d": 100, "width": 128, "depth": 5},
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _fcn(s: Mapping[str, int]) -> Case:
    widths = [s["d"], *[s["width"]] * (s["depth"] - 1), 1]
    torch.manual_seed(0)
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return _case(nn.Sequential(*layers[:-1]), torch.randn(s["n"], s["d"]))


@job(
    "peers-cnn",
    "CNN with three convolutions of 16 channels on 16 x 16, kernel of 16 samples by each tool",
    baseline="torch step",
    shapes={"n": 16, "channels": 16, "depth": 4, "image": 16},
    error="kernel, relative to sqrt(K_ii K_jj)",
)
def _cnn(s: Mapping[str, int]) -> Case:
    channels = [3, *[s["channels"]] * (s["depth"] - 1)]
    torch.manual_seed(0)
    layers = [
        layer
        for pair in itertools.pairwise(channels)
        for layer in (nn.Conv2d(*pair, kernel_size=3, padding=1), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * s["image"] ** 2, 1))
    return _case(model, torch.randn(s["n"], 3, s["image"], s["image"]))


def _case(model: nn.Module, x: Tensor) -> Case:
    y = torch.randn(len(x), 1)
    observer = cx.Observer(model)
    kernels: dict[str, Callable[[], Tensor]] = {"catapult_ext": lambda: observer(x, y).kernel}
    for tool, name in _TOOLS.items():
        if versions(PEERS[tool]) is not None:
            kernels[name] = functools.partial(PEERS[tool].kernel, copy.deepcopy(model), x)
    if versions(PEERS[_NEURAL_TANGENTS]) is not None:
        kernels[_NEURAL_TANGENTS] = _neural_tangents(model, x)
    exact = functools.cache(functools.partial(exact_kernel, copy.deepcopy(model), x))

    def error(kernel: Callable[[], Tensor]) -> Callable[[], float]:
        return lambda: kernel_error(kernel().detach(), exact())

    return Case(
        {"torch step": plain_step(copy.deepcopy(model), x, y), **kernels},
        {name: error(kernel) for name, kernel in kernels.items()},
        optional=frozenset(kernels) - _NEEDED - {"catapult_ext"},
    )


def _neural_tangents(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """`empirical_ntk_fn` by Jacobian contraction, translated and compiled at the first call, on one thread as ours."""

    @functools.cache
    def compiled() -> Callable[[], Any]:
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
        import jax
        import neural_tangents
        from torch2jax import t2j

        array = lambda t: jax.numpy.asarray(t.detach().numpy())  # noqa: E731
        parameters = {name: array(p) for name, p in model.named_parameters()}
        state = {name: array(t) for name, t in model.state_dict().items() if name not in parameters}
        translated, samples = t2j(model), array(x)

        def function(p: dict[str, Any], z: Any) -> Any:
            return translated(z, state_dict={**state, **p}).reshape(len(z), -1)

        kernel = neural_tangents.empirical_ntk_fn(
            function,
            trace_axes=(),
            vmap_axes=0,
            implementation=neural_tangents.NtkImplementation.JACOBIAN_CONTRACTION,
        )
        fast = jax.jit(lambda p, z: kernel(z, None, p))
        return lambda: fast(parameters, samples).block_until_ready()

    return lambda: torch.from_numpy(compiled()().__array__().copy())[:, :, 0, 0]
