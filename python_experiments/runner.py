"""Runs many runs, several at a time; one that fails does not stop the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from python_experiments.config import RunConfig
from python_experiments.progress import Board
from python_experiments.registry import Request

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One run to be made.

    Attributes:
        config: what to run.
        seed: its seed.
        root: folder of all runs.
        data_root: folder of image sets.
        threads: torch threads.
        device: the device of the kind that `config` names.
        names: the experiments, groups and conditions that want it, in words.
    """

    config: RunConfig
    seed: int
    root: Path
    data_root: Path | None
    threads: int
    device: str
    names: tuple[str, ...] = field(compare=False)

    @property
    def size(self) -> float:
        """Rough cost, to start the longest runs first."""
        config = self.config
        network, samples = config.network, config.batch_size or config.task.train
        weights = network.depth * network.width
        if network.kind == "cnn":
            positions = 1024 if config.task.name == "cifar10" else 64
            weights *= 9 * network.width * positions
        elif network.depth > 2:
            weights *= network.width
        return samples * config.max_steps * weights


@dataclass(frozen=True)
class Outcome:
    """How a job ended: "done" or the one-line error, the full traceback, and the seconds it took."""

    job: Job
    error: str | None
    details: str
    seconds: float


def jobs_of(
    requests: Sequence[Request], root: Path, data_root: Path | None, threads: int, device: str = "cpu"
) -> tuple[list[Job], int]:
    """The unfinished runs of the requests, each once, the longest first; and the number of finished ones."""
    from python_experiments import training

    wanted: dict[tuple[RunConfig, int], list[str]] = {}
    for request in requests:
        for group, conditions in request.groups().items():
            for condition, members in conditions.items():
                for config, seed in members:
                    name = f"{request.name}, {group}: {condition}, seed {seed}"
                    wanted.setdefault((config, seed), []).append(name)
    jobs = [
        Job(config, seed, root, data_root, threads, device, tuple(names))
        for (config, seed), names in wanted.items()
        if not training.folder(root, config, seed).finished
    ]
    return sorted(jobs, key=lambda job: -job.size), len(wanted) - len(jobs)


def execute(jobs: Sequence[Job], workers: int, console: Console) -> list[Outcome]:
    """Run all jobs, `workers` at a time, and say how each one ended.

    One at a time they run in this process; several are processes of their own, so that a run which is killed (out of
    memory, for example) takes only itself down.
    """
    outcomes = []
    alone = min(workers, len(jobs)) <= 1
    with Board(console, len(jobs), enabled=not alone) as board:  # alone, each run shows its own steps
        results = _in_process(jobs) if alone else _in_workers(jobs, min(workers, len(jobs)), board)
        for outcome in results:
            outcomes.append(outcome)
            state = "done" if outcome.error is None else f"FAILED: {outcome.error}"
            console.print(
                f"  {outcome.job.names[0]}: {state} ({outcome.seconds:.1f} s)",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            board.done()
    return outcomes


def _run(job: Job, *, progress: bool = False) -> tuple[str | None, str]:
    """Make one run; the error in one line and in full, (None, "") without."""
    import torch

    from python_experiments import training

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(job.threads)
        training.train(job.config, job.seed, job.root, job.data_root, device=job.device, progress=progress)
    except Exception as error:  # one run of many: whatever it is, it is reported and the others go on
        text = str(error).splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}", traceback.format_exc()
    finally:
        torch.set_num_threads(before)
    return None, ""


def _in_process(jobs: Sequence[Job]) -> Iterator[Outcome]:
    for job in jobs:
        start = time.monotonic()
        error, details = _run(job, progress=True)
        yield Outcome(job, error, details, time.monotonic() - start)


def _serve(pipe: Connection) -> None:
    """A worker process: run the jobs that come through the pipe until it closes."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(_run(pipe.recv()))


def _place(job: Job) -> tuple[Path, int]:
    """Where a job's run is kept, and the steps that it makes at most."""
    from python_experiments import training

    return training.folder(job.root, job.config, job.seed).path, job.config.max_steps


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    start: float = 0.0

    @classmethod
    def started(cls) -> _Worker:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the pipe reports the end of the process
        return cls(process, ours)

    def give(self, job: Job) -> None:
        self.job, self.start = job, time.monotonic()
        self.pipe.send(job)

    def take(self) -> Outcome:
        """The outcome of the present job; the process may have ended instead."""
        assert self.job is not None
        seconds = time.monotonic() - self.start
        try:
            error, details = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            end = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            error = f"the process ended with {end}"
            details = ""
        outcome, self.job = Outcome(self.job, error, details, seconds), None
        return outcome

    def close(self) -> None:
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()


def _in_workers(jobs: Sequence[Job], count: int, board: Board) -> Iterator[Outcome]:
    pending = list(reversed(jobs))
    workers: list[_Worker] = []
    try:
        while pending or any(worker.job for worker in workers):
            workers = [worker for worker in workers if worker.job or worker.process.is_alive()]
            while len(workers) < count and pending:
                workers.append(_Worker.started())
            for worker in workers:
                if worker.job is None and pending:
                    worker.give(pending.pop())
            busy = {worker.pipe: worker for worker in workers if worker.job}
            for pipe in wait(list(busy), timeout=_POLL_SECONDS if board.shown else None):
                yield busy[pipe].take()
            if board.shown:
                board.show({worker.job.names[0]: _place(worker.job) for worker in workers if worker.job})
    finally:
        for worker in workers:
            worker.close()
