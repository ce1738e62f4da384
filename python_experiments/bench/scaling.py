"""How the cost of a kernel grows with one size at a time: the family `scaling-`, which `--plots` draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

import catapult_ext as cx
from python_experiments.bench.cases import Case, job
from python_experiments.bench.steps import exact_kernel, kernel_error, plain_step
from python_experiments.coverage.peers import PEERS

__all__ = ["BASE", "PEER", "SIZES"]

#: The network and its samples where no other size is said.
BASE = {"n": 128, "d": 100, "width": 256, "depth": 3, "outputs": 1}
#: What each size is changed to, the others as in `BASE`.
SIZES = {
    "n": (64, 128, 256, 512, 1024),
    "width": (64, 128, 256, 512, 1024),
    "depth": (2, 3, 5, 9, 17),
    "outputs": (1, 2, 4, 8, 16),
}
PEER = "torch.func.jacrev"
#: Numbers of a Jacobian that torch.func is asked for: more would take minutes.
_LARGEST_JACOBIAN = 1 << 27
#: Samples whose kernel is checked by brute force.
_CHECKED = 8


def _fcn(s: Mapping[str, int]) -> Case:
    generator = torch.Generator().manual_seed(0)
    model = cx.models.FCN(s["d"], s["width"], s["depth"], s["outputs"], generator=generator)
    x = torch.randn(s["n"], s["d"], generator=generator)
    y = torch.randn(s["n"], s["outputs"], generator=generator)
    observer = cx.Observer(model)
    calls = {
        "torch step": plain_step(copy.deepcopy(model), x, y),
        "catapult_ext": lambda: observer(x, y).kernel,
    }
    parameters = sum(p.numel() for p in model.parameters())
    if s["n"] * s["outputs"] * parameters <= _LARGEST_JACOBIAN:
        calls[PEER] = lambda: PEERS["jacrev"].kernel(model, x)
    part = x[:_CHECKED]
    return Case(
        calls,
        {
            "catapult_ext": lambda: kernel_error(
                cx.observe(model, part, y[:_CHECKED]).kernel, exact_kernel(model, part)
            ),
        },
    )


for _size, _values in SIZES.items():
    for _value in _values:
        job(
            f"scaling-{_size}-{_value}",
            f"FCN, kernel, {_size} {_value}",
            baseline="torch step",
            shapes={**BASE, _size: _value},
            error="kernel, relative to sqrt(K_ii K_jj)",
            rounds=7,
            memory=False,
        )(_fcn)
