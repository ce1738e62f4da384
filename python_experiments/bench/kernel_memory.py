"""Predicted and measured memory of `ntk`, each case in a process of its own.

`python -m python_experiments.bench.kernel_memory` prints a table; with a text, only the cases that hold it, and
with `--device cuda` on the GPU, where measured is what PyTorch's allocator has given out at the highest.

On the CPU measured is the resident set at its highest minus before the call. glibc keeps freed blocks of less than
its mmap threshold for later (a threshold that grows to 32 MiB while a program runs), so a case is measured twice:
with the threshold fixed at 64 KiB, which shows what the call had allocated at a time, and as the system comes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import catapult_ext as cx
from python_experiments.bench.memory import _status, _warm_libraries

__all__ = ["CASES", "Case", "Measurement", "measure"]

#: glibc returns blocks of this size and more to the system as soon as they are freed.
_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        make: the model and its samples.
        outputs: as for `ntk`.
        bound: `max_bytes` as a part of the way from the smallest bound that works (0) to one sweep's peak (1), or
            as a number of bytes (an integer above 1); None for no bound.
        columns: how many of the samples are those of the columns of K(x, z); 0 for the symmetric kernel.
        hours: whether it takes hours on a CPU, so that it is only measured there when its whole name is given.
    """

    make: Callable[[], tuple[nn.Module, Tensor]]
    outputs: str | int = "all"
    bound: float | None = None
    columns: int = 0
    hours: bool = False


@dataclass(frozen=True)
class Measurement:
    """What one case took.

    Attributes:
        name: of the case.
        way: one sweep, or passes and samples in a block.
        bound: in bytes, None without one.
        predicted: peak of the plan in bytes.
        measured: peak in bytes.
        jacobian: size of the Jacobian in bytes, which the kernel is the Gram matrix of.
        seconds: of the call; one thread on the CPU.
    """

    name: str
    way: str
    bound: int | None
    predicted: int
    measured: int
    jacobian: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def _fcn(n: int, width: int, c: int = 1, d: int = 300) -> tuple[nn.Module, Tensor]:
    return cx.models.FCN(d, width=width, depth=5, out_features=c), torch.randn(n, d)


def _cnn(n: int, width: int, c: int = 1) -> tuple[nn.Module, Tensor]:
    return cx.models.CNN(3, 32, width=width, depth=5, out_features=c), torch.randn(n, 3, 32, 32)


def _vit(n: int, width: int, c: int = 1) -> tuple[nn.Module, Tensor]:
    model = cx.models.ViT(3, 32, width=width, depth=4, out_features=c, patch_size=4, heads=4)
    return model, torch.randn(n, 3, 32, 32)


def _cifar(width: int) -> tuple[nn.Module, Tensor]:
    split = cx.data.load("cifar10", classes=None, pool="pooled", train=5000, seed=0)  # labels do not enter
    return cx.models.CNN(3, 32, width=width, depth=5), split.train.x


CASES: dict[str, Case] = {
    "FCN, n = 2000": Case(lambda: _fcn(2000, 1024)),
    "FCN, n = 2000, smallest bound": Case(lambda: _fcn(2000, 1024), bound=0.0),
    "FCN, 10 outputs, n = 300": Case(lambda: _fcn(300, 1024, 10)),
    "FCN, 10 outputs, n = 300, bound": Case(lambda: _fcn(300, 1024, 10), bound=0.4),
    "FCN, 10 outputs, trace, n = 1000, bound": Case(lambda: _fcn(1000, 1024, 10), outputs="trace", bound=0.1),
    "CNN, 32 channels, n = 256": Case(lambda: _cnn(256, 32)),
    "CNN, 32 channels, n = 256, half": Case(lambda: _cnn(256, 32), bound=0.5),
    "CNN, 32 channels, n = 256, smallest bound": Case(lambda: _cnn(256, 32), bound=0.0),
    "CNN, 32 channels, K(x, z), 256 x 64, bound": Case(lambda: _cnn(320, 32), bound=0.3, columns=64),
    "CNN, 16 channels, 10 outputs, n = 96": Case(lambda: _cnn(96, 16, 10)),
    "CNN, 16 channels, 10 outputs, n = 96, bound": Case(lambda: _cnn(96, 16, 10), bound=0.2),
    "ViT-4, width 96, n = 128": Case(lambda: _vit(128, 96)),
    "ViT-4, width 96, n = 128, bound": Case(lambda: _vit(128, 96), bound=0.2),
    "ViT-4, width 96, 4 outputs, n = 64, bound": Case(lambda: _vit(64, 96, 4), bound=0.2),
    "CNN, 32 channels, CIFAR, n = 5000": Case(lambda: _cifar(32), bound=400 << 20),
    "CNN, 512 channels, n = 5000": Case(lambda: _cnn(5000, 512), bound=18 << 30, hours=True),
}


class _Peak:
    """Bytes at the highest since it was made, beyond what there was: of this process, or of a GPU's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _warm_libraries()
            self._before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def read(self) -> int:
        """Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return _status("VmHWM") - self._before


def _measure(name: str, device: torch.device) -> Measurement:
    """The same in this process, which has done nothing yet."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.make()
    model, x = model.to(device), x.to(device)
    sides = (x,) if not case.columns else (x[: -case.columns], x[-case.columns :])
    plan = cx.ntk_plan(model, *sides, outputs=case.outputs)
    bound: int | None = None
    if case.bound is not None:
        bound = int(case.bound)
        if case.bound <= 1:
            bound = plan.smallest_bytes + int(case.bound * (plan.peak_bytes - plan.smallest_bytes))
        plan = cx.ntk_plan(model, *sides, outputs=case.outputs, max_bytes=bound)
    peak = _Peak(device)
    start = time.perf_counter()
    kernel = cx.ntk(model, *sides, outputs=case.outputs, max_bytes=bound)
    taken = peak.read()
    seconds = time.perf_counter() - start
    assert isinstance(kernel, Tensor)
    assert bool(torch.isfinite(kernel).all())
    numbers = (
        len(x)
        * (1 if case.outputs in ("sum", 0) else plan.outputs)
        * sum(p.numel() for p in model.parameters())
    )
    way = f"{plan.passes} x {plan.block}" if plan.streamed else "one sweep"
    return Measurement(name, way, bound, plan.peak_bytes, taken, numbers * x.element_size(), seconds)


def measure(name: str, *, exact: bool, device: str = "cpu") -> Measurement | None:
    """Measure a case in a fresh process; None where the system cannot tell.

    Args:
        name: of the case.
        device: where it runs.
        exact: whether freed memory returns to the system at once, so that the peak is that of what is allocated.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    environment = os.environ | (_EXACT if exact else {}) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else _module(), "--child", name]
    command += ["--device", device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"memory of {name}: {done.stderr.strip().splitlines()[-1]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _module() -> str:
    return "python_experiments.bench.kernel_memory"


def _row(exact: Measurement, plain: Measurement) -> str:
    mib = 1 << 20
    bound = "" if exact.bound is None else f"{exact.bound / mib:.0f}"
    measured = [f"{each.measured / mib:.0f} ({each.ratio:.2f})" for each in (exact, plain)]
    cells = [exact.name, exact.way, bound, f"{exact.predicted / mib:.0f}", *measured]
    return f"| {' | '.join(cells)} | {exact.jacobian / mib:.0f} | {plain.seconds:.1f} |"


def main() -> None:
    """Print a table of all cases, or of those whose name holds the given text."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("text", nargs="?", default="")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(_measure(given.text, torch.device(given.device)).__dict__))
        return
    print(
        "| kernel | passes x block | bound | predicted | measured | glibc as it comes | Jacobian | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if given.text not in name or (case.hours and given.device == "cpu" and given.text != name):
            continue
        exact = measure(name, exact=True, device=given.device)
        plain = exact if given.device == "cuda" else measure(name, exact=False)
        if exact is not None and plain is not None:
            print(_row(exact, plain), flush=True)


if __name__ == "__main__":
    main()
