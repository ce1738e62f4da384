"""The smoke runs of every experiment and their report, made once for all tests of this folder."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from python_experiments import registry
from tests.experiments.helpers import Page, call, drafts


class Smoke(NamedTuple):
    """The folder of the smoke runs, and what the command line printed while it made them."""

    out: Path
    text: str


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image set but the embedded one, whatever the machine has."""
    monkeypatch.delenv("CATAPULT_DATA", raising=False)


@pytest.fixture(autouse=True)
def _drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots as the tests look at them: drawing them in full takes longer than all smoke runs."""
    drafts(monkeypatch)


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A folder and the JSON value that `make` returned for it; made by the first of several test processes."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the one that all pytest processes share
    folder, stored = root / name, root / f"{name}.json"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stored.exists():
            stored.write_text(json.dumps(make(folder)))
    return folder, json.loads(stored.read_text())


@pytest.fixture(scope="session")
def _smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    def make(out: Path) -> dict[str, dict[str, Any]]:
        made = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CATAPULT_DATA", raising=False)
            # Fig. 3a before Fig. 2, which only shows runs of Fig. 3a: each pays for all of its own.
            for name in reversed(registry.all_experiments()):
                start = time.process_time()  # not the clock on the wall: other processes run meanwhile
                text = call("run", name, "--preset", "smoke", "--data", "digits", "--out", out).stdout
                made[name] = {"text": text, "seconds": time.process_time() - start}
        return made

    return _once(tmp_path_factory, "smoke", make)


@pytest.fixture(scope="session")
def smoke(_smoke_runs: tuple[Path, dict[str, dict[str, Any]]]) -> Smoke:
    """Every experiment's smoke runs, on digits."""
    out, made = _smoke_runs
    return Smoke(out, "".join(entry["text"] for entry in made.values()))


@pytest.fixture(scope="session")
def smoke_seconds(_smoke_runs: tuple[Path, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Processor seconds of each experiment's smoke runs and claims."""
    return {name: entry["seconds"] for name, entry in _smoke_runs[1].items()}


@pytest.fixture(scope="session")
def report_file(smoke: Smoke, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the smoke runs."""
    from python_experiments import report

    def make(folder: Path) -> str:
        with pytest.MonkeyPatch.context() as patch:
            drafts(patch)
            return str(report.write(smoke.out))

    return Path(_once(tmp_path_factory, "report", make)[1])


@pytest.fixture(scope="session")
def report_page(report_file: Path) -> Page:
    """The report of the smoke runs, taken apart."""
    return Page(report_file.read_text(encoding="utf-8"))
