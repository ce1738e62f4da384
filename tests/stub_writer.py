"""Writes `catapult_ext/_C.pyi` from the compiled module; `make stub` runs it.

A build without CUDA lacks the functions named `cuda_*`; their lines are then kept from the present stub.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

from catapult_ext import _C

STUB = Path(__file__).parents[1] / "catapult_ext/_C.pyi"
CUDA_PREFIX = "cuda_"

_HEAD = '''"""Signatures of the compiled module, written by `make stub` and kept equal by a test."""

from collections.abc import Sequence
'''
# What pybind11 says an argument may be -> what our own callers pass.
_TYPES = (
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"collections\.abc\.", ""),
)


def live_lines(module: ModuleType) -> dict[str, str]:
    """Name -> line of the stub, for everything public in the compiled module."""
    lines = {}
    for name, value in vars(module).items():
        if name.startswith("__") or name == "_pybind11_conduit_v1_":
            continue
        if inspect.isclass(value) and issubclass(value, BaseException):
            lines[name] = f"class {name}({value.__base__.__name__}): ..."
        elif callable(value):
            signature = value.__doc__.splitlines()[0]
            if signature == f"{name}(*args, **kwargs)":
                raise TypeError(f"{name} is overloaded; give each overload a name of its own")
            for pattern, replacement in _TYPES:
                signature = re.sub(pattern, replacement, signature)
            lines[name] = ast.unparse(ast.parse(f"def {signature}: ..."))
        else:
            lines[name] = f"{name}: {type(value).__name__}"
    return lines


def stub_lines() -> dict[str, str]:
    """The same of the present stub."""
    lines = {}
    for node in ast.parse(STUB.read_text()).body if STUB.exists() else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = ast.unparse(node).replace(":\n    ...", ": ...")
        elif isinstance(node, ast.AnnAssign):
            lines[ast.unparse(node.target)] = ast.unparse(node)
    return {name: line.replace("\n    ", " ") for name, line in lines.items()}


def normalised(lines: dict[str, str]) -> dict[str, str]:
    """Lines without differences of layout."""
    return {name: re.sub(r"\s+", " ", line) for name, line in lines.items()}


def render(lines: dict[str, str]) -> str:
    """Return the text of the stub."""
    ordered = sorted(normalised(lines).items(), key=lambda item: (item[1].split()[0], item[0]))
    return _HEAD + "\n" + "\n".join(line for _, line in ordered) + "\n"


if __name__ == "__main__":
    kept = {name: line for name, line in stub_lines().items() if name.startswith(CUDA_PREFIX)}
    STUB.write_text(render(kept | live_lines(_C)))
