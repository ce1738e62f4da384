"""One thread, a header that says what is tested, the devices, and a time budget per suite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import catapult_ext as cx
except (
    ImportError
) as error:  # missing, broken or stale extension: its one line, not a traceback per test file
    raise pytest.UsageError(str(error)) from None
import torch

ROOT = Path(__file__).parent.parent
GPU_SKIP = "no CUDA device"

#: Seconds that a suite (a folder of tests, or "tests" for the files beside this one) may take on two cores.
BUDGET = {
    "tests": 60,
    "tests/data": 30,
    "tests/engine": 90,
    "tests/experiments": 150,
    "tests/gpu": 30,
    "tests/ops": 90,
    "tests/packaging": 120,
    "tests/runs": 30,
    "tests/training": 60,
}


def pytest_configure(config: pytest.Config) -> None:
    """Run every test on one thread, so that timings and rounding are those of the stored results."""
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is compiled in and in use."""
    info = cx.build_info()
    tested = "" if info["torch_tested"] else " (not a tested version)"
    return [
        f"catapult_ext {info['version']}: {info['extension']} ({info['compiler']})",
        f"torch {info['torch']}{tested}, {info['threads']} thread, SIMD {info['simd']} "
        f"of {', '.join(_strings(info['simd_available']))}",
        f"CUDA: {info['cuda']}",
    ]


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return [str(item) for item in value]


def _cuda_usable() -> bool:
    return cx.build_info()["cuda"] == "usable"


@pytest.fixture(scope="session")
def devices() -> list[str]:
    """Every device on which ops can be tested here: "cpu", and "cuda" where the kernels and a GPU are."""
    return ["cpu", "cuda"] if _cuda_usable() else ["cpu"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; "cuda" is skipped, and counted, where there is none."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if _cuda_usable():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=GPU_SKIP))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Undo what a test did to the thread count and the SIMD level."""
    level = cx._extension._C.simd_level()
    yield
    torch.set_num_threads(1)
    cx._extension._C.set_simd_level(level)


def _suite(nodeid: str) -> str:
    return str(Path(nodeid.split("::")[0]).parent.as_posix())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print seconds spent per suite beside its budget, and how many tests wait for a GPU."""
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, set[str]] = defaultdict(set)
    gpu_skips = 0
    for category in ("passed", "failed", "error", "skipped", "xfailed", "xpassed", ""):
        for report in terminalreporter.getreports(category):
            if not isinstance(report, pytest.TestReport):
                continue
            seconds[_suite(report.nodeid)] += report.duration
            tests[_suite(report.nodeid)].add(report.nodeid)
            gpu_skips += report.skipped and GPU_SKIP in str(report.longrepr)
    if not tests:
        return
    terminalreporter.section("time per suite")
    for suite in sorted(tests):
        budget = BUDGET.get(suite)
        late = "  OVER BUDGET" if budget is not None and seconds[suite] > budget else ""
        terminalreporter.line(
            f"{suite:20} {seconds[suite]:7.1f} s of {budget or '?':>4} s  {len(tests[suite]):5} tests{late}"
        )
    total = sum(seconds.values())
    terminalreporter.line(
        f"{'all':20} {total:7.1f} s of {sum(BUDGET.values()):>4} s  {sum(map(len, tests.values())):5} tests"
    )
    terminalreporter.line(f"tests that wait for a CUDA device: {gpu_skips}")
