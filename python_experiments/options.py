"""Options of the command line: their types, their checks, and the one line that a bad one gives."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from python_experiments import registry, sweep
from python_experiments.config import ImageSet


class PresetName(str, Enum):
    """Sizes of an experiment."""

    smoke = "smoke"
    cpu = "cpu"
    paper = "paper"


class RatesName(str, Enum):
    """Learning rates relative to the measured critical rate, or as printed."""

    relative = "relative"
    paper = "paper"


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


Out = Annotated[Path, typer.Option(help="Folder of runs, plots and the report.", file_okay=False)]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of image sets; default: $CATAPULT_DATA.")]
Data = Annotated[
    Literal["auto", ImageSet],
    typer.Option(
        help="Image set of the experiments that use images; auto: the paper's where it is found, else digits.",
    ),
]
Preset = Annotated[PresetName, typer.Option(help="Size: seconds, minutes, or the paper's exact sizes.")]
Jobs = Annotated[
    int,
    typer.Option(
        min=0, help="Runs side by side, each in a process of its own; 0: as many as the CPUs have room for."
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, help="torch threads of each run, whatever --jobs is: they decide the rounding.")
]
DeviceName = Annotated[
    str, typer.Option("--device", help="cpu, cuda, or one of several: cuda:0, cuda:1, ...")
]
RunName = Annotated[
    str, typer.Argument(help="A run folder, or how the path of one below OUT begins.", show_default=False)
]


def make_folder(out: Path) -> None:
    """Make the folder of results; one that cannot be made or written to is an error of one line."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: cannot write to {str(out)!r} ({error.strerror})")
    if not os.access(out, os.W_OK | os.X_OK):
        fail(f"--out: cannot write to {str(out)!r} ({os.strerror(errno.EACCES)})")


def seeds_of(text: str | None) -> tuple[int, ...] | None:
    """The seeds of `--seeds`, each once; None where it was not given."""
    if text is None:
        return None
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if any(seed < 0 for seed in seeds):
            raise ValueError
    except ValueError:
        fail(f"--seeds: expected integers >= 0 separated by commas, such as 0,1,2, got {text!r}")
    return seeds


def run_folder(name: str, out: Path, *, any_one: bool = False) -> Path:
    """The one run folder of that name; `any_one`: the first of several."""
    from catapult_ext.runs import find_runs

    found = find_runs(out, name)
    if not found:
        what = f"{name!r}, which none is" if name else "none"
        fail(f"RUN: expected a run folder, or how the path of one below {str(out)!r} begins, got {what}")
    if len(found) > 1 and not any_one:
        several = ", ".join(str(path) for path in sorted(found)[:4]) + (", ..." if len(found) > 4 else "")
        fail(f"RUN: expected one run, but {name!r} is how {len(found)} begin: {several}")
    return found[0]


def device_of(text: str) -> str:
    """A device that is there; "cuda:1" for one of several."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        fail(f"--device: expected cpu, cuda or cuda:0, cuda:1, ..., got {text!r}")
    if text != "cpu":
        import torch

        import catapult_ext as cx

        usable, count = cx.build_info()["cuda"], torch.cuda.device_count()
        if usable != "usable":
            fail(f"--device {text}: expected a usable CUDA device; CUDA here: {usable}")
        if not torch.cuda.is_available():
            fail(f"--device {text}: expected a torch that can use CUDA, got torch {torch.__version__}")
        if int(text.partition(":")[2] or 0) >= count:
            fail(f"--device {text}: expected one of the {count} CUDA devices, the first is cuda:0")
    return text


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def images_of(data: str, papers: Iterable[str], data_root: Path | None) -> dict[str, str]:
    """The image set to use in the place of each of the paper's.

    A set that was asked for and is not there is an error of one line.
    """
    import catapult_ext as cx
    from python_experiments import training

    root = training.data_root(data_root)
    if data_root is not None and not data_root.is_dir():
        fail(f"--data-root: expected a folder, got {str(data_root)!r}")
    chosen = {}
    for paper in papers:
        wanted = paper if data == "auto" else data
        problem = cx.data.available(root, [wanted])[0].problem
        if problem is not None and data != "auto":
            fail(f"--data {data}: {problem}")
        if problem is not None and root is not None:  # a folder was named: do not pass over it in silence
            print(f"using digits, since {root} has no {wanted}: {problem}", file=sys.stderr)
        chosen[paper] = wanted if problem is None else "digits"
    return chosen


def chosen(names: list[str]) -> list[registry.Experiment]:
    """The experiments of those names."""
    try:
        return registry.choose(names)
    except ValueError as error:
        fail(str(error))


def requests_of(
    experiments: list[registry.Experiment],
    preset: PresetName,
    rates: RatesName,
    data: str,
    data_root: Path | None,
    seeds: tuple[int, ...] | None,
    device: str,
    changes: list[str],
) -> list[registry.Request]:
    """What the options ask for: each experiment once, or once for each variant of a sweep."""
    papers = dict.fromkeys(experiment.images for experiment in experiments if experiment.images)
    images = images_of(data, papers, data_root)
    try:
        requests = [
            experiment.request(
                preset.value,
                rates=rates.value,
                images=images.get(experiment.images or "", "digits"),
                seeds=seeds,
                device="cpu" if device == "cpu" else "cuda",
                changes=variant,
            )
            for experiment in experiments
            for variant in sweep.variants(experiment.presets[preset.value].config, changes)
        ]
    except ValueError as error:
        fail(str(error))
    for request in requests if rates is RatesName.paper else ():
        groups = request.groups().values()
        if not all(c.printed for group in groups for members in group.values() for c, _ in members):
            fail(f"--rates paper: the paper does not print all rates of {request.name}; use --rates relative")
    return requests
