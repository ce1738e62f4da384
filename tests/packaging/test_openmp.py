"""One OpenMP runtime in the process: torch's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from catapult_ext import _C
from catapult_ext.build import openmp_libraries

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the rule is about GNU/Linux")


def in_fresh_process(code: str) -> object:
    """Run code in a new Python; it prints one line of JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


MAPS = """
import json, re
def openmp():
    lines = open("/proc/self/maps").read().splitlines()
    return sorted({line.split()[-1] for line in lines if re.search(r"/lib(gomp|omp|iomp)", line)})
"""


def test_the_extension_maps_no_further_runtime() -> None:
    before, after = in_fresh_process(
        MAPS
        + f"""
import torch
before = openmp()
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("catapult_ext._C", {_C.__file__!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
module.simd_level()
print(json.dumps([before, openmp()]))
"""
    )
    assert len(before) == 1
    assert after == before


def test_the_package_and_a_threaded_kernel_use_torchs_runtime_alone() -> None:
    paths, used, torch_folder = in_fresh_process(
        MAPS
        + """
import torch
import catapult_ext as cx
torch.set_num_threads(2)
a = torch.randn(64, 32)
kernel = cx.ops.ntk_gram([a], [torch.randn(64, 8)])
used = torch.isfinite(kernel).all().item()
print(json.dumps([openmp(), used, torch.__path__[0]]))
"""
    )
    assert used
    assert len(paths) == 1
    assert paths[0].startswith(torch_folder)


def test_build_info_names_that_runtime() -> None:
    paths = openmp_libraries()
    assert any("torch" in path for path in paths)
    assert all(Path(path).is_file() for path in paths)


def test_the_extension_is_not_linked_to_a_runtime() -> None:
    readelf = shutil.which("readelf")
    assert readelf, "readelf (binutils) comes with every C++ compiler on Linux"
    text = subprocess.run([readelf, "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libstdc++") for name in needed), needed
    assert not [name for name in needed if "omp" in name], needed


def test_the_extension_does_use_openmp() -> None:
    nm = shutil.which("nm")
    assert nm
    text = subprocess.run([nm, "-D", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "GOMP_parallel" in text
