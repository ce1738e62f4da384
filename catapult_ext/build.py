"""What is compiled in and what is in use."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from catapult_ext import _C
from catapult_ext._version import __version__

__all__ = ["TESTED_TORCH", "build_info", "openmp_libraries"]

#: Series of torch on which the whole test suite has passed. The engine reads names of the autograd graph that
#: torch does not promise to keep, so only these are claimed.
TESTED_TORCH = ("2.13",)

_OPENMP = re.compile(r"/lib(gomp|omp|iomp5)\b[^/]*$")


def openmp_libraries() -> list[str]:
    """Paths of the OpenMP runtimes that are mapped into this process, sorted.

    Returns:
        The paths; empty where the system has no `/proc` (then nothing is known).
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/") > 0}
    return sorted(path for path in paths if _OPENMP.search(path))


def build_info() -> dict[str, object]:
    """What is compiled in and what is in use, as plain values that go into JSON as they are.

    Returns:
        A dict with the keys

        - `version`, `extension` (path of the compiled module), `compiler`, `python`;
        - `torch`, and `torch_tested`: whether its series is one that the test suite has passed on;
        - `simd`: the instruction set in use (`CATAPULT_SIMD` forces one), `simd_available`: those that this
          build and this processor offer, lowest first;
        - `threads`: what the kernels are given, `torch.get_num_threads()`;
        - `openmp`: paths of the OpenMP runtimes in this process; kernels use the one that torch has loaded;
        - `cuda_archs` and `cuda_toolkit`: what the CUDA kernels were compiled for and with, empty where they
          are not compiled in;
        - `cuda`: "usable", or in a few words why CUDA tensors cannot be used here;
        - `cuda_driver`, `cuda_runtime`: versions, empty where there is none;
        - `cuda_devices`: name and compute capability of each device.
    """
    compiled: dict[str, str] = _C.compile_info()
    series = ".".join(torch.__version__.split(".")[:2])
    return {
        "version": __version__,
        "extension": _C.__file__,
        "compiler": compiled["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_tested": series in TESTED_TORCH,
        "simd": _C.simd_level(),
        "simd_available": _C.available_simd_levels(),
        "threads": torch.get_num_threads(),
        "openmp": openmp_libraries(),
        "cuda_archs": compiled["cuda_archs"],
        "cuda_toolkit": compiled["cuda_version"],
        **_cuda(compiled),
    }


def _cuda(compiled: dict[str, str]) -> dict[str, object]:
    """The state of CUDA: what the kernels find, and whether torch can make tensors for them."""
    if not compiled["cuda_archs"]:
        reason = "not compiled in (no CUDA compiler was found, or CATAPULT_CUDA=OFF)"
        return {"cuda": reason, "cuda_driver": "", "cuda_runtime": "", "cuda_devices": []}
    status = _C.cuda_status()
    reason = status["reason"]
    if not reason and not torch.cuda.is_available():
        reason = "the kernels find a device, but this torch cannot use it"
    return {
        "cuda": reason or "usable",
        "cuda_driver": status["driver"],
        "cuda_runtime": status["runtime"],
        "cuda_devices": status["devices"],
    }
