"""Imports torch, then the compiled module `_C`, or says in one line which of the two is wrong and why.

The order matters: `_C` is compiled with OpenMP but linked to no OpenMP library, so that its symbols resolve
to the runtime that torch has loaded. Two runtimes in one process would fight over the cores.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from catapult_ext._version import __version__

__all__: list[str] = []

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise ImportError(
            f"catapult_ext: torch is installed but cannot be imported: {error}", name="torch"
        ) from error
    raise ImportError(
        "catapult_ext needs PyTorch, which is not installed here: pip install torch", name="torch"
    ) from None
except (ImportError, OSError) as error:
    raise ImportError(
        f"catapult_ext: torch is installed but cannot be imported: {error}", name="torch"
    ) from error

_REBUILD = "build it with `pip install .` in the project's root"


def _missing() -> str:
    others = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
    found = f" (found {', '.join(others)}, built for another Python)" if others else ""
    return f"catapult_ext: the compiled module catapult_ext._C is missing{found}: {_REBUILD}"


_spec: ModuleSpec | None = find_spec("catapult_ext._C")
if _spec is None:
    raise ImportError(_missing(), name="catapult_ext._C")
try:
    from catapult_ext import _C
except ImportError as error:
    raise ImportError(
        f"catapult_ext: the compiled module {_spec.origin} cannot be loaded: {error}; {_REBUILD}",
        name="catapult_ext._C",
        path=_spec.origin,
    ) from error

_built = _C.compile_info()["version"]
if _built != __version__:
    raise ImportError(
        f"catapult_ext: the compiled module {_spec.origin} is of version {_built}, the package of version "
        f"{__version__}: {_REBUILD}",
        name="catapult_ext._C",
        path=_spec.origin,
    )

_C.simd_level()  # an unusable CATAPULT_SIMD is an error now, not in the middle of the first kernel
