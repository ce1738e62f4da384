"""Peak extra memory of one call, in a process of its own: resident set at its highest minus before the call."""

from __future__ import annotations

import functools
import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

__all__ = ["measure", "peak_extra_bytes"]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _warm_libraries() -> None:
    """Load what the first call of anything loads (BLAS, oneDNN, autograd), on tiny inputs."""
    x = torch.randn(2, 3, 8, 8)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 1)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(x).square().mean().backward()
    optimizer.step()
    torch.linalg.eigh(torch.eye(4))


def peak_extra_bytes(job: str, implementation: str, threads: int) -> int | None:
    """Measure the first call of an implementation in a fresh process; None where the system cannot tell.

    The call's result counts, and so do workspaces that it keeps for the next call.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with _server().Pool(1) as fresh:
        return fresh.apply(measure, (job, implementation, threads))


@functools.cache
def _server() -> ForkServerContext:
    """Makes processes that have imported everything and done nothing: imports would take most of the time."""
    server = multiprocessing.get_context("forkserver")
    # An optimizer's first step imports the compiler, whether it is used or not.
    server.set_forkserver_preload(["python_experiments.bench", "torch._dynamo"])
    return server


def measure(job: str, implementation: str, threads: int) -> int:
    """The same in this process, which must not have run the implementation before."""
    from python_experiments.bench import JOBS

    torch.set_num_threads(threads)
    case = JOBS[job].build(JOBS[job].shapes)
    _warm_libraries()
    call = case.implementations[implementation]
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)
