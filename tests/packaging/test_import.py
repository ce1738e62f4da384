"""Each thing that can be wrong with the installation is one clear line of its own, in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import catapult_ext
from catapult_ext import _C

PACKAGE = Path(catapult_ext.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the package's Python files and no compiled module."""
    shutil.copytree(
        PACKAGE, tmp_path / "catapult_ext", ignore=shutil.ignore_patterns("_C*.so", "__pycache__")
    )
    return tmp_path


def import_there(folder: Path, *, with_torch: bool = True, **environment: str) -> str:
    """Import catapult_ext from `folder` alone and return the last line that Python says ("" if it works)."""
    paths = [str(folder)] + ([str(Path(torch.__file__).parents[1])] if with_torch else [])
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import catapult_ext"],  # -S: no .pth file, so no editable install
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stderr.strip().splitlines()[-1] if done.stderr else ""


def put_extension(folder: Path) -> Path:
    return Path(shutil.copy(_C.__file__, folder / "catapult_ext" / f"_C{SUFFIX}"))


def test_complete_package(bare: Path) -> None:
    put_extension(bare)
    assert import_there(bare) == ""


def test_missing_extension(bare: Path) -> None:
    assert import_there(bare) == (
        "ImportError: catapult_ext: the compiled module catapult_ext._C is missing: "
        "build it with `pip install .` in the project's root"
    )


def test_extension_of_another_python(bare: Path) -> None:
    (bare / "catapult_ext/_C.cpython-300-x86_64-linux-gnu.so").write_bytes(b"")
    line = import_there(bare)
    assert "_C is missing (found _C.cpython-300-x86_64-linux-gnu.so, built for another Python)" in line


def test_broken_extension(bare: Path) -> None:
    path = bare / "catapult_ext" / f"_C{SUFFIX}"
    path.write_bytes(b"not a shared library")
    line = import_there(bare)
    assert line.startswith(f"ImportError: catapult_ext: the compiled module {path} cannot be loaded: ")


def test_stale_extension(bare: Path) -> None:
    path = put_extension(bare)
    (bare / "catapult_ext/_version.py").write_text('__version__ = "9.9.9"\n')
    line = import_there(bare)
    assert (
        f"the compiled module {path} is of version {catapult_ext.__version__}, the package of version 9.9.9"
        in line
    )


def test_missing_torch(bare: Path) -> None:
    put_extension(bare)
    line = import_there(bare, with_torch=False)
    assert line == "ImportError: catapult_ext needs PyTorch, which is not installed here: pip install torch"


@pytest.mark.parametrize(
    "error", ['OSError("libtorch_cpu.so: cannot open")', 'ImportError("libtorch_cpu.so: cannot open")']
)
def test_broken_torch(bare: Path, error: str) -> None:
    put_extension(bare)
    (bare / "torch").mkdir()
    (bare / "torch/__init__.py").write_text(f"raise {error}\n")
    line = import_there(bare)
    assert line == (
        "ImportError: catapult_ext: torch is installed but cannot be imported: libtorch_cpu.so: cannot open"
    )


@pytest.mark.parametrize("level", _C.available_simd_levels())
def test_forced_simd_level(bare: Path, level: str) -> None:
    put_extension(bare)
    assert import_there(bare, CATAPULT_SIMD=level) == ""


def test_unusable_simd_level_is_an_error_at_import(bare: Path) -> None:
    put_extension(bare)
    line = import_there(bare, CATAPULT_SIMD="sse9")
    assert line.startswith("ValueError: CATAPULT_SIMD: expected one of scalar")
    assert line.endswith("got 'sse9'")
