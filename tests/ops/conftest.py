"""Every instruction set that this processor runs, switched within the process."""

from __future__ import annotations

import pytest

from catapult_ext import _C


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def simd(request: pytest.FixtureRequest) -> str:
    """Run the test at each SIMD level; levels that are missing here are skipped, and counted."""
    if request.param not in _C.available_simd_levels():
        pytest.skip(f"this processor does not run {request.param}")
    _C.set_simd_level(request.param)
    return str(request.param)
