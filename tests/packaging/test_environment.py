"""The pinned environment, and a build for a processor that is not an x86."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from catapult_ext.build import TESTED_TORCH

ROOT = Path(__file__).parents[2]


def pins() -> dict[str, str]:
    """Name -> version of the lines of constraints.txt that apply to this Python; each must be exact."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), line
            if requirement.marker is None or requirement.marker.evaluate():
                assert requirement.name not in found, line
                found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def declared() -> set[str]:
    """Every distribution that pyproject.toml asks for: to build, to run, to test, to develop."""
    names = re.findall(r'"([A-Za-z][A-Za-z0-9-]*)>=[0-9]', (ROOT / "pyproject.toml").read_text())
    assert {"torch", "pybind11", "pytest", "ruff"} <= set(names)
    return {canonicalize_name(name) for name in names}


def test_every_requirement_is_pinned() -> None:
    assert declared() <= pins().keys()


def test_the_pinned_torch_is_a_tested_one() -> None:
    assert pins()["torch"].rpartition(".")[0] in TESTED_TORCH


@pytest.mark.skipif("CI" not in os.environ, reason="another environment may hold other versions")
def test_this_environment_is_the_pinned_one() -> None:
    installed = {canonicalize_name(found.name): found.version.partition("+")[0] for found in distributions()}
    # torch builds for CUDA bring these, and pin them themselves.
    ours = {name for name in installed if not name.startswith(("nvidia-", "cuda-", "triton"))}
    expected = pins()
    assert declared() <= ours
    assert {name: installed[name] for name in ours - {"catapult-ext", "setuptools"}} == {
        name: expected.get(name) for name in ours - {"catapult-ext", "setuptools"}
    }


@pytest.mark.skipif(sys.platform != "linux", reason="cross configuration is tried on Linux")
def test_another_processor_gets_the_scalar_kernels(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    assert cmake
    configure = [
        *(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), "-DCATAPULT_PYTHON=OFF"),
        *("-DCATAPULT_CUDA=OFF", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=riscv64"),
        *("-DCMAKE_CXX_FLAGS=-O0", "-DCMAKE_BUILD_TYPE=None"),
    ]
    for command in (configure, [cmake, "--build", str(tmp_path), "--target", "catapult_cpu"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    built = {path.name for path in tmp_path.rglob("*.o")}
    assert "kernels_scalar.cpp.o" in built
    assert not {name for name in built if "avx" in name}
