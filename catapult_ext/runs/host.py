"""What a run ran on: versions, hardware, commit, build."""

from __future__ import annotations

import functools
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import catapult_ext

__all__ = ["bitwise_difference", "environment"]

_PACKAGES = ("torch", "numpy", "scipy", "pandas", "pyarrow", "safetensors", "scikit-learn")
# Numbers repeat bit by bit only where all of these are equal.
_BITWISE = ("catapult_ext", "torch", "cpu", "threads", "simd", "gpu")


def environment() -> dict[str, Any]:
    """Describe this process and machine.

    Returns:
        A JSON tree: time (UTC), command, host, pid, python, catapult_ext and torch versions, the other
        packages, cpu model and count, threads (of torch), memory in bytes, gpus, the gpu that this process
        uses (None where it uses none), commit of the package and of the working folder (None outside of git),
        simd level, build_info.
    """
    build = catapult_ext.build_info()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "catapult_ext": catapult_ext.__version__,
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "commit": {
            "catapult_ext": _commit(Path(catapult_ext.__file__).parent),
            "working_folder": _commit(Path.cwd()),
        },
        "simd": build["simd"],
        "build_info": build,
    }


def bitwise_difference(stored: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Name the first entry that differs and on which bitwise equality depends, or None."""
    for key in _BITWISE:
        if stored.get(key) != current.get(key):
            return f"{key}: {stored.get(key)!r} before, {current.get(key)!r} now"
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Name, with family and model where Linux gives them: a virtual machine may hide the rest of the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


@functools.cache  # the code in use is the one that was imported, whatever is committed meanwhile
def _commit(folder: Path) -> str | None:
    """Commit that the folder's files belong to, with "+changes" when tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "."):
            return None  # a checkout around a virtual environment is not the package's own history
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
