"""Command line: `catapult list | run | reproduce | report | watch | compare | bench | coverage | info | data`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from python_experiments import registry
from python_experiments.options import (
    Data,
    DataRoot,
    DeviceName,
    Jobs,
    Out,
    Preset,
    PresetName,
    RatesName,
    RunName,
    Threads,
    chosen,
    cpus,
    device_of,
    fail,
    make_folder,
    requests_of,
    run_folder,
    seeds_of,
)

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
        except RuntimeError as error:
            from catapult_ext.runs import RunError, UnreadableFile, UnwritableFile

            if not isinstance(error, (RunError, UnreadableFile, UnwritableFile)):
                raise
            print(f"error: {error}", file=sys.stderr)
            code = 1
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
    data: Data = "auto",
    data_root: DataRoot = None,
    out: Out = Path("runs"),
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 0,1,2; default: the preset's.")] = None,
    jobs: Jobs = 1,
    threads: Threads = 1,
    device: DeviceName = "cpu",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE,...",
            help="Set a field of the configuration; several values, or several --set, make a sweep over all "
            "combinations. Such as network.width=256,512 or batch_size=5.",
        ),
    ] = None,
) -> None:
    """Run experiments and test their claims; finished runs are not run again, interrupted ones go on."""
    experiments = chosen(names)
    device = device_of(device)
    requests = requests_of(
        experiments, preset, rates, data, data_root, seeds_of(seeds), device, changes or []
    )
    _execute(requests, out, data_root, jobs, threads, device)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Experiments, or all; default: the main ones."),
    ] = None,
    preset: Preset = PresetName.cpu,
    data: Data = "auto",
    data_root: DataRoot = None,
    out: Out = Path("runs"),
    jobs: Jobs = 0,
    threads: Threads = 1,
    device: DeviceName = "cpu",
) -> None:
    """Run the main experiments, or those given, test the claims and write the report."""
    experiments = chosen(names) if names else registry.main_experiments()
    device = device_of(device)
    requests = requests_of(experiments, preset, RatesName.relative, data, data_root, None, device, [])
    make_folder(out)  # before the runs: without it there is no report in the end either
    try:
        _execute(requests, out, data_root, jobs, threads, device)
    finally:
        report(out)


@app.command()
def report(out: Out = Path("runs")) -> None:
    """Render the stored results as one page, OUT/report.html, and their plots under OUT/plots."""
    from python_experiments.report import write

    make_folder(out)
    try:
        file = write(out)
    except OSError as error:
        fail(f"--out: cannot write the report to {str(out)!r} ({error.strerror or error})")
    Console().print(f"report: {file}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(help="As for compare; default: the run written to last.")] = "",
    out: Out = Path("runs"),
) -> None:
    """Show a run in the terminal while it lasts: loss, norm of K, critical rate, catapults."""
    from catapult_ext.runs import StoredRun
    from python_experiments.watch import show

    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it; the run itself goes on
        show(StoredRun(run_folder(run, out, any_one=not run)), Console(highlight=False))


@app.command()
def compare(a: RunName, b: RunName, out: Out = Path("runs")) -> None:
    """Put two runs side by side: what differs in their configurations, what came of them, their metrics."""
    from catapult_ext.runs import StoredRun
    from python_experiments.compare import show

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    show(StoredRun(run_folder(a, out)), StoredRun(run_folder(b, out)), console)


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
    simd: Annotated[
        list[str] | None,
        typer.Option(help="Instruction set of our kernels: scalar, avx2 or avx512; may be repeated."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure; without, only draw and write what is stored.")
    ] = True,
    plots: Annotated[bool, typer.Option("--plots", help="Draw OUT/roofline and OUT/scaling.")] = False,
    tables: Annotated[
        bool,
        typer.Option(
            "--tables", help="Write the tables of README.md and docs/kernels.md anew from the lines."
        ),
    ] = False,
) -> None:
    """Measure this machine beside plain PyTorch, one JSON line each, appended to OUT/lines.jsonl."""
    from python_experiments.bench import main, publish

    make_folder(out)
    try:
        if measure:
            main(names or [], out, repeats, threads, seconds=seconds, memory=memory, simd=simd or ())
        for path in publish(out, plots=plots, tables=tables):
            typer.echo(f"written: {path}")
    except ValueError as error:
        fail(str(error))


@app.command()
def coverage(
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="WORD", help="A part of the name of a case or of a family; may be repeated."
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="FILE.py:FUNCTION",
            help="A network of your own instead of the catalogue, or MODULE:FUNCTION; returns model and samples.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the lines, coverage.jsonl.", file_okay=False)] = Path(
        "results"
    ),
    page: Annotated[
        Path | None, typer.Option(help="Markdown page; default: OUT/coverage.md.", dir_okay=False)
    ] = None,
    peers: Annotated[bool, typer.Option(help="Ask the other tools that are installed too.")] = True,
) -> None:
    """Measure on which networks the engine is exact, beside its peers; exit with 1 when it is not in one of them."""
    from python_experiments.coverage import main
    from python_experiments.coverage.survey import is_wrong

    make_folder(out)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        lines = main(words or [], models or [], out, page or out / "coverage.md", console, peers=peers)
    except ValueError as error:
        fail(str(error))
    if any(map(is_wrong, lines)):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Print what is compiled in and what is in use, as JSON."""
    import catapult_ext as cx

    print(json.dumps(cx.build_info(), indent=2, default=str))


_data = typer.Typer(invoke_without_command=True)
app.add_typer(_data, name="data")


@_data.callback()
def data_sets(context: typer.Context, data_root: DataRoot = None) -> None:
    """List the image sets: what is found where, with checksums, and what to put where for the others."""
    if context.invoked_subcommand is not None:
        return
    from python_experiments import data_command, training

    console = Console(width=None if sys.stdout.isatty() else 160)
    data_command.show(training.data_root(data_root), console)


@_data.command("fetch")
def fetch_data(
    context: typer.Context,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Image sets, as `catapult data` lists them.")
    ],
    data_root: DataRoot = None,
) -> None:
    """Fetch official files, check them against the published sums; an interrupted fetch goes on where it was."""
    from python_experiments import data_command, training

    assert context.parent is not None
    root = training.data_root(data_root or context.parent.params["data_root"])
    try:
        data_command.fetch(names, root, Console())
    except (ValueError, OSError) as error:
        fail(str(error))


def _execute(
    requests: list[registry.Request], out: Path, data_root: Path | None, jobs: int, threads: int, device: str
) -> None:
    """Make the runs, print each claim, exit with 1 when a run failed."""
    from python_experiments import results, runner, training

    console = Console(soft_wrap=True, highlight=False)
    make_folder(out)
    for request in requests:
        results.remember(out, request)
    todo, finished = runner.jobs_of(requests, out, training.data_root(data_root), threads, device)
    workers = jobs or max(1, cpus() // threads)
    console.print(f"{len(todo)} runs to make, {finished} already finished, {workers} at a time")
    if min(workers, len(todo)) * threads > cpus():
        console.print(
            f"{workers} runs with {threads} threads each share {cpus()} CPUs and wait for one another"
        )
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
