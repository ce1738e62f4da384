"""The source distribution builds, and its wheel works from a clean folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import catapult_ext

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, the wheel built from it, and the wheel's build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, str(folder), cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    # The wheel is built where nothing but the source distribution is, so nothing of this checkout leaks in.
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", str(folder), str(next((folder / "source").iterdir()))),
        cwd=folder,
        CATAPULT_CUDA="OFF",
        SKBUILD_BUILD_DIR=str(folder / "objects"),
    )
    return folder


@pytest.fixture(scope="module")
def wheel(build: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(build.glob("*.whl")))


def test_what_the_wheel_holds(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert [name for name in names if re.fullmatch(r"catapult_ext/_C\.[^/]*\.(so|pyd)", name)]
    for name in ("catapult_ext/py.typed", "catapult_ext/_C.pyi", "python_experiments/cli.py"):
        assert name in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "catapult_ext",
        "python_experiments",
    }
    package = {
        path.relative_to(ROOT).as_posix()
        for room in ("catapult_ext", "python_experiments")
        for path in (ROOT / room).rglob("*.py")
    }
    assert package <= set(names), f"not shipped: {sorted(package - set(names))}"


def test_metadata(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(names["METADATA"]).decode())
    assert metadata["Version"] == catapult_ext.__version__
    assert metadata["License-Expression"] == "MIT"
    assert "LICENSE" in names
    assert "catapult=python_experiments.cli:app" in wheel.read(names["entry_points.txt"]).decode().replace(
        " ", ""
    )


def test_installed_wheel_computes_from_a_clean_folder(build: Path, tmp_path: Path) -> None:
    target, clean = tmp_path / "target", tmp_path / "clean"
    clean.mkdir()
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
        ),
        str(next(build.glob("*.whl"))),
        cwd=clean,
    )
    code = """
import json
import torch
import catapult_ext as cx
torch.manual_seed(0)
a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
error = (cx.ops.ntk_gram([a], [b]) - (a @ a.T) * (b @ b.T)).abs().max().item()
print(json.dumps([cx.__file__, cx.build_info()["extension"], error, cx.build_info()["cuda"]]))
"""
    site = Path(torch.__file__).parents[1]
    # -S: no .pth file, so an editable install of this checkout cannot answer in the wheel's place.
    out = run(
        *(sys.executable, "-S", "-c", code), cwd=clean, PYTHONPATH=os.pathsep.join([str(target), str(site)])
    )
    package, extension, error, cuda = json.loads(out)
    assert Path(package).is_relative_to(target)
    assert Path(extension).is_relative_to(target)
    assert error < 1e-12
    assert cuda.startswith("not compiled in")


def test_no_code_of_an_instruction_set_can_leak(build: Path) -> None:
    """Objects of AVX files define no weak symbol that the linker could pick for the baseline."""
    objects = [path for path in (build / "objects").rglob("kernels_avx*.o")]
    if not objects:
        pytest.skip("no x86 kernels on this processor")
    nm = shutil.which("nm")
    assert nm
    for path in objects:
        out = run(nm, "--defined-only", "--demangle", str(path), cwd=build)
        weak = [line for line in out.splitlines() if re.search(r" [Wuv] ", line)]
        assert not weak, f"{path.name}: {weak}"
        assert re.search(r" [TDBR] .*kernel", out, re.IGNORECASE), out


def test_the_wheel_needs_no_torch_to_build(build: Path) -> None:
    """Neither the build requirements nor CMake know torch."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert requires
    assert "torch" not in requires.group(1)
    cache = next((build / "objects").rglob("CMakeCache.txt")).read_text()
    assert "torch/" not in cache.replace(str(ROOT), "")
