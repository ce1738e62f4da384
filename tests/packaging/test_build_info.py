"""build_info: what it says agrees with what is there."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

import catapult_ext as cx
from catapult_ext import _C
from catapult_ext.build import TESTED_TORCH, build_info


def test_the_version_has_one_place() -> None:
    text = (Path(__file__).parents[2] / "catapult_ext/_version.py").read_text()
    assert f'__version__ = "{cx.__version__}"' in text
    assert build_info()["version"] == cx.__version__ == _C.compile_info()["version"]


def test_it_is_plain_values_and_true() -> None:
    info = cx.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["torch"] == torch.__version__
    assert info["python"] == platform.python_version()
    assert Path(str(info["extension"])).is_file()
    assert str(info["compiler"]).split()[0] in {"GNU", "Clang", "AppleClang", "MSVC", "IntelLLVM"}


def test_this_torch_is_a_tested_one() -> None:
    assert cx.build_info()["torch_tested"] is (torch.__version__.rpartition(".")[0] in TESTED_TORCH)


def test_threads_follow_torch() -> None:
    torch.set_num_threads(2)
    assert cx.build_info()["threads"] == 2
    torch.set_num_threads(1)
    assert cx.build_info()["threads"] == 1


def test_simd_level_in_use_is_an_available_one() -> None:
    available = _C.available_simd_levels()
    assert available[0] == "scalar"
    for level in available:
        _C.set_simd_level(level)
        assert cx.build_info()["simd"] == level
    assert cx.build_info()["simd_available"] == available


def test_unknown_simd_level_names_the_known_ones() -> None:
    before = _C.simd_level()
    with pytest.raises(ValueError, match=r"expected one of scalar.*, got 'sse9'"):
        _C.set_simd_level("sse9")
    assert _C.simd_level() == before


def test_cuda_state_is_said_in_words() -> None:
    info = cx.build_info()
    assert str(info["cuda"]).strip()
    if not info["cuda_archs"]:
        assert str(info["cuda"]).startswith("not compiled in")
        assert info["cuda_toolkit"] == info["cuda_runtime"] == ""
    else:
        assert info["cuda_toolkit"]
        assert info["cuda_runtime"]
    usable = info["cuda"] == "usable"
    assert usable == (bool(info["cuda_devices"]) and torch.cuda.is_available())


@pytest.mark.parametrize(
    ("status", "torch_can", "expected"),
    [
        (
            {"reason": "no CUDA driver: no usable device", "devices": []},
            False,
            "no CUDA driver: no usable device",
        ),
        ({"reason": "", "devices": ["X, sm_90"]}, True, "usable"),
        (
            {"reason": "", "devices": ["X, sm_90"]},
            False,
            "the kernels find a device, but this torch cannot use it",
        ),
    ],
)
def test_each_state_of_cuda(
    status: dict[str, object], torch_can: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {**_C.compile_info(), "cuda_archs": "80-real 90-virtual", "cuda_version": "13.0"}
    monkeypatch.setattr(_C, "compile_info", lambda: compiled)
    monkeypatch.setattr(_C, "cuda_status", lambda: {"driver": "", "runtime": "13.0", **status}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_can)
    info = cx.build_info()
    assert info["cuda"] == expected
    assert info["cuda_devices"] == status["devices"]
    assert (info["cuda_archs"], info["cuda_toolkit"]) == ("80-real 90-virtual", "13.0")
