"""The wheel works from a clean folder; the source distribution is complete."""

from __future__ import annotations

import json
import os
import re
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this checkout.

    The build folder of the Makefile is used where it is up to date, so that nothing is compiled a second time.
    """
    folder = tmp_path_factory.mktemp("wheel")
    built = ROOT / "build/make"
    environment = {"SKBUILD_BUILD_DIR": str(built if built.exists() else folder / "objects")}
    if not built.exists():
        environment["CATAPULT_CUDA"] = "OFF"
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", str(folder), str(ROOT)),
        cwd=folder,
        **environment,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(folder: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(folder.glob("*.whl")))


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


def test_installed_wheel_computes_from_a_clean_folder(folder: Path, tmp_path: Path) -> None:
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
        str(next(folder.glob("*.whl"))),
        cwd=clean,
    )
    code = """
import json
import torch
import catapult_ext as cx
torch.manual_seed(0)
a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
error = (cx.ops.ntk_gram([a], [b]) - (a @ a.T) * (b @ b.T)).abs().max().item()
print(json.dumps([cx.__file__, cx.build_info()["extension"], error]))
"""
    site = Path(torch.__file__).parents[1]
    # -S: no .pth file, so an editable install of this checkout cannot answer in the wheel's place.
    out = run(
        *(sys.executable, "-S", "-c", code), cwd=clean, PYTHONPATH=os.pathsep.join([str(target), str(site)])
    )
    package, extension, error = json.loads(out)
    assert Path(package).is_relative_to(target)
    assert Path(extension).is_relative_to(target)
    assert error < 1e-12


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, str(tmp_path), cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        path.relative_to(ROOT).as_posix()
        for room in ("csrc", "cmake", "catapult_ext", "python_experiments")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    needed |= {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert len(needed) > 50
    assert needed <= held, f"not in the source distribution: {sorted(needed - held)}"
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_building_needs_no_torch() -> None:
    """Neither the build requirements nor CMake know torch, so one build serves every torch."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert requires
    assert "torch" not in requires.group(1)
    for path in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")]:
        code = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
        assert "torch" not in code.lower(), path
