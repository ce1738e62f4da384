"""Command line: `catapult list | run | reproduce | report | bench | info | data`."""

from __future__ import annotations

import errno
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from python_experiments import registry

# click's ClickException, wherever this version of typer keeps it: BadParameter -> UsageError ->
# ClickException
_ClickException: Any = typer.BadParameter.__mro__[2]


class OneLineErrors(TyperGroup):
    """Commands whose bad input gives one line on standard error and exit code 2, without a usage block."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """See click's `Command.main`."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except _ClickException as error:
            print(f"error: {error.format_message()}", file=sys.stderr)
            code = error.exit_code
        except typer.Abort:
            print(
                "interrupted; finished runs are kept, and the others go on where they stopped",
                file=sys.stderr,
            )
            code = 130
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Catapults in SGD: run the paper's experiments, test its claims, render the report.",
)


class PresetName(str, Enum):
    """Sizes of an experiment."""

    smoke = "smoke"
    cpu = "cpu"
    paper = "paper"


class RatesName(str, Enum):
    """Learning rates relative to the measured critical rate, or as printed."""

    relative = "relative"
    paper = "paper"


class DataName(str, Enum):
    """Image sets; auto takes CIFAR-10 where it is found and digits otherwise."""

    auto = "auto"
    cifar10 = "cifar10"
    digits = "digits"


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


Out = Annotated[Path, typer.Option(help="Folder of runs, plots and the report.", file_okay=False)]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of image sets; default: $CATAPULT_DATA.")]
Data = Annotated[DataName, typer.Option(help="Image set of the experiments that use images.")]
Preset = Annotated[PresetName, typer.Option(help="Size: seconds, minutes, or the paper's exact sizes.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")]
Threads = Annotated[int, typer.Option(min=1, help="torch threads of each run.")]


@app.command("list")
def list_experiments() -> None:
    """List the experiments, their presets and their claims."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="experiments", title_justify="left")
    for column in ("name", "paper", "shows", "claims", "runs in preset cpu"):
        table.add_column(column, overflow="fold")
    for experiment in registry.all_experiments().values():
        request = experiment.request("cpu")
        runs = sum(len(m) for conditions in request.groups().values() for m in conditions.values())
        table.add_row(
            experiment.name, experiment.figure, experiment.title, str(len(experiment.claims)), str(runs)
        )
    console.print(table)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Experiments, or all.")],
    preset: Preset = PresetName.cpu,
    rates: Annotated[
        RatesName,
        typer.Option(help="Rates relative to the critical rate measured here, or as the paper prints."),
    ] = RatesName.relative,
    data: Data = DataName.auto,
    data_root: DataRoot = None,
    out: Out = Path("runs"),
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 0,1,2; default: the preset's.")] = None,
    jobs: Jobs = 1,
    threads: Threads = 1,
) -> None:
    """Run experiments and test their claims; finished runs are not run again, interrupted ones go on."""
    try:
        experiments = registry.choose(names)
    except ValueError as error:
        fail(str(error))
    requests = _requests(experiments, preset, rates, data, data_root, _seeds(seeds))
    _execute(requests, out, data_root, jobs, threads)


@app.command()
def reproduce(
    preset: Preset = PresetName.cpu,
    data: Data = DataName.auto,
    data_root: DataRoot = None,
    out: Out = Path("runs"),
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: one for each CPU.")] = 0,
    threads: Threads = 1,
) -> None:
    """Run every experiment, test the claims and write the report."""
    experiments = list(registry.all_experiments().values())
    requests = _requests(experiments, preset, RatesName.relative, data, data_root, None)
    _make_folder(out)  # before the runs: without it there is no report in the end either
    try:
        _execute(requests, out, data_root, jobs or _cpus(), threads)
    finally:
        report(out)


@app.command()
def report(out: Out = Path("runs")) -> None:
    """Render the stored results as one page, OUT/report.html, and their plots under OUT/plots."""
    from python_experiments.report import write

    _make_folder(out)
    Console().print(f"report: {write(out)}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Benchmarks, or how their names begin.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the measurements.", file_okay=False)] = Path(
        "results/bench"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds of each benchmark.")] = 40,
    seconds: Annotated[float, typer.Option(min=0, help="End a benchmark's rounds after so long.")] = 20.0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
) -> None:
    """Measure this machine beside plain PyTorch, one JSON line each, appended to OUT/lines.jsonl."""
    from python_experiments.bench import main

    _make_folder(out)
    try:
        main(names or [], out, repeats, threads, seconds=seconds, memory=memory)
    except ValueError as error:
        fail(str(error))


@app.command()
def info() -> None:
    """Print what is compiled in and what is in use, as JSON."""
    import catapult_ext as cx

    print(json.dumps(cx.build_info(), indent=2, default=str))


@app.command("data")
def data_sets(data_root: DataRoot = None) -> None:
    """List the image sets: what is found where, and what to put where for the others."""
    import catapult_ext as cx
    from python_experiments import training

    table = Table("name", "found", "files, or what to put where")
    for found in cx.data.available(training.data_root(data_root)):
        files = ", ".join(str(file["path"]) for file in found.files)
        images = f"{found.form}: {found.train} training and {found.test} test images"
        table.add_row(found.name, "no" if found.problem else images, found.problem or files)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _make_folder(out: Path) -> None:
    """Make the folder of results; one that cannot be made or written to is an error of one line."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: cannot write to {str(out)!r} ({error.strerror})")
    if not os.access(out, os.W_OK | os.X_OK):
        fail(f"--out: cannot write to {str(out)!r} ({os.strerror(errno.EACCES)})")


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        if any(seed < 0 for seed in seeds):
            raise ValueError
    except ValueError:
        fail(f"--seeds: expected integers >= 0 separated by commas, such as 0,1,2, got {text!r}")
    return seeds


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _images(data: DataName, data_root: Path | None) -> str:
    """The image set to use; a set that was asked for and is not there is an error of one line."""
    import catapult_ext as cx
    from python_experiments import training

    root = training.data_root(data_root)
    if data_root is not None and not data_root.is_dir():
        fail(f"--data-root: expected a folder, got {str(data_root)!r}")
    if data is DataName.digits:
        return "digits"
    problem = next(found.problem for found in cx.data.available(root) if found.name == "cifar10")
    if problem is None:
        return "cifar10"
    if data is DataName.cifar10:
        fail(f"--data cifar10: {problem}")
    if root is not None:  # a folder was named: do not pass over it in silence
        print(f"using digits, since {root} has no CIFAR-10: {problem}", file=sys.stderr)
    return "digits"


def _requests(
    experiments: list[registry.Experiment],
    preset: PresetName,
    rates: RatesName,
    data: DataName,
    data_root: Path | None,
    seeds: tuple[int, ...] | None,
) -> list[registry.Request]:
    images = _images(data, data_root) if any(e.uses_images for e in experiments) else "digits"
    for experiment in experiments:
        if rates is RatesName.paper and experiment.presets[preset.value].config.rate.paper is None:
            fail(f"--rates paper: the paper prints no rate for {experiment.name}; use --rates relative")
    return [e.request(preset.value, rates=rates.value, images=images, seeds=seeds) for e in experiments]


def _execute(
    requests: list[registry.Request], out: Path, data_root: Path | None, workers: int, threads: int
) -> None:
    """Make the runs, print each claim, exit with 1 when a run failed."""
    from python_experiments import results, runner, training

    console = Console(soft_wrap=True, highlight=False)
    _make_folder(out)
    for request in requests:
        results.remember(out, request)
    todo, finished = runner.jobs_of(requests, out, training.data_root(data_root), threads)
    console.print(f"{len(todo)} runs to make, {finished} already finished, {workers} at a time")
    outcomes = runner.execute(todo, workers, console)
    failed = [outcome for outcome in outcomes if outcome.error]
    words = []
    for request in requests:
        console.print(f"\n{request.key}", style="bold")
        for verdict in results.verdicts(out, request):
            console.print(f"  {results.line(verdict)}", markup=False)
            words.append(verdict.word)
    console.print(f"\n{words.count('holds')} of {len(words)} claims hold and fail on their controls")
    if failed:
        log = results.write_failures(out, failed)
        console.print(f"\n{len(failed)} of {len(outcomes)} runs failed ({log} has the details):")
        for outcome in failed:
            for name in outcome.job.names:
                console.print(f"  {name}: {outcome.error}", markup=False)
        raise typer.Exit(1)
