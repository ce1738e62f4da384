"""Many runs at once: a process that dies takes only its own run down; nothing is run twice; longest first."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

from python_experiments import registry, runner, training
from tests.experiments.helpers import ExitsWhenUsed

SHORT = replace(registry.get("fig5").presets["smoke"].config, max_steps=3)


def job(root, seed=0, config=SHORT):
    return runner.Job(config, seed, root, None, 1, "cpu", (f"run {seed}",))


def holder(folder):
    """The process that writes the metrics of a run."""
    file = str((folder / "metrics.jsonl").resolve())
    while True:
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError):
                links = (f"/proc/{child.pid}/fd/{n}" for n in os.listdir(f"/proc/{child.pid}/fd"))
                if file in map(os.path.realpath, links):
                    return child.pid
        time.sleep(0.02)


def test_a_run_that_dies_takes_only_itself_down(tmp_path):
    """One process exits, one is killed, one raises; all others are done, and each says what became of it."""
    endless = replace(
        registry.get("table1").presets["cpu"].config, batch_size=5, max_steps=10**6, stop_loss=None
    )
    missing = replace(SHORT, task=replace(SHORT.task, name="cifar10", classes=(7, 9)))
    jobs = [
        job(tmp_path, 8, endless),
        job(ExitsWhenUsed(), 9),
        job(tmp_path, 7, missing),
        *(job(tmp_path, seed) for seed in range(3)),
    ]
    folder = training.folder(tmp_path, endless, 8).path
    killer = threading.Thread(target=lambda: os.kill(holder(folder), signal.SIGKILL), daemon=True)
    killer.start()
    printed = io.StringIO()
    outcomes = {o.job.names[0]: o for o in runner.execute(jobs, 2, Console(file=printed))}
    killer.join(timeout=5)
    assert set(outcomes) == {f"run {n}" for n in (0, 1, 2, 7, 8, 9)}
    assert outcomes["run 8"].error == "the process ended with signal 9"
    assert outcomes["run 9"].error == "the process ended with exit code 3"
    assert outcomes["run 7"].error.startswith("FileNotFoundError: cifar10: no data root")
    for name in ("run 7", "run 8", "run 9"):
        assert f"{name}: FAILED: {outcomes[name].error}" in printed.getvalue()
    for seed in range(3):
        assert outcomes[f"run {seed}"].error is None
        assert f"run {seed}: done" in printed.getvalue()
        assert training.read(tmp_path, SHORT, seed).steps == 3


@pytest.mark.parametrize("error", [ValueError("first line\nsecond line"), MemoryError()])
def test_an_error_in_this_process_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, error):
    real = training.train

    def train(config, seed, *args, **kwargs):
        if seed == 0:
            raise error
        return real(config, seed, *args, **kwargs)

    monkeypatch.setattr(training, "train", train)
    failed, done = runner.execute([job(tmp_path, 0), job(tmp_path, 1)], 1, Console(file=io.StringIO()))
    assert failed.error == f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    assert str(error) in failed.details
    assert "Traceback" in failed.details
    assert (done.error, done.details) == (None, "")
    assert training.folder(tmp_path, SHORT, 1).finished
    assert not training.folder(tmp_path, SHORT, 0).finished


def test_nothing_to_do_starts_nothing(tmp_path):
    assert runner.execute([], 2, Console(file=io.StringIO())) == []


def test_finished_runs_are_skipped_and_the_others_are_not(smoke):
    smoked = [experiment.request("smoke") for experiment in registry.all_experiments().values()]
    jobs, finished = runner.jobs_of(smoked, smoke.out, None, 1)
    assert jobs == []
    wanted = {m for r in smoked for c in r.groups().values() for members in c.values() for m in members}
    assert finished == len(wanted) > 0
    seeds = registry.get("fig5").presets["smoke"].seeds
    more = registry.get("fig5").request("smoke", seeds=(*seeds, max(seeds) + 1))
    jobs, finished = runner.jobs_of([more], smoke.out, None, 1)
    assert [j.seed for j in jobs] == [max(seeds) + 1]
    assert finished == len(seeds) + 2  # the figure's, and one of each control


def test_the_longest_run_comes_first(tmp_path):
    requests = [experiment.request("cpu") for experiment in registry.all_experiments().values()]
    jobs, finished = runner.jobs_of(requests, tmp_path, None, 1)
    assert finished == 0
    assert all(a.size >= b.size for a, b in itertools.pairwise(jobs))
    assert jobs[0].size > jobs[-1].size
    assert len({(j.config, j.seed) for j in jobs}) == len(jobs)


#: Experiments that show runs of another one; the groups of which all are that one's, the conditions of a group.
SHARED = [
    ("fig2", "fig3-fcn", ["main", "below the critical rate"]),
    ("fig13-fcn", "fig3-fcn", ["main", "below the critical rate"]),
    ("fig13-cnn", "fig3-cnn", ["main", "below the critical rate"]),
    ("fig17-fcn", "fig4-fcn", ["main", "below the critical rate"]),
    ("fig17-cnn", "fig4-cnn", ["main", "below the critical rate"]),
    ("fig18-fcn", "fig4-fcn", ["main: by catapults", "below the critical rate: by catapults"]),
    ("fig18-cnn", "fig4-cnn", ["main: by catapults", "below the critical rate: by catapults"]),
    ("fig26", "fig8", ["main", "without catapults"]),
    ("table2-2-layer", "fig6", ["main"]),
]


@pytest.mark.parametrize(("name", "of", "shared"), SHARED)
@pytest.mark.parametrize("preset", registry.PRESETS)
def test_a_run_that_two_experiments_show_is_made_once(tmp_path, name, of, shared, preset):
    requests = [registry.get(experiment).request(preset) for experiment in (name, of)]
    (mine, _), (theirs, _), (both, _) = (
        runner.jobs_of(wanted, tmp_path, None, 1) for wanted in ([requests[0]], [requests[1]], requests)
    )
    common = {(j.config, j.seed) for j in mine} & {(j.config, j.seed) for j in theirs}
    assert common == {
        member
        for group, conditions in requests[0].groups().items()
        for condition, members in conditions.items()
        for member in members
        if group in shared or f"{group}: {condition}" in shared
    }
    assert len(both) == len(mine) + len(theirs) - len(common) < len(mine) + len(theirs)
    for made in both:
        named = {words.split(",")[0] for words in made.names}
        assert (named == {name, of}) == ((made.config, made.seed) in common)


def test_smoke_runs_of_a_figure_are_there_once_another_has_made_them(smoke):
    """The figures were run in turn, the last of the paper first: Fig. 26 before Fig. 8, Fig. 18 before Fig. 4."""
    for name in ("fig8", "fig4-fcn", "fig4-cnn", "fig17-fcn", "fig2"):
        request = registry.get(name).request("smoke")
        (head,) = (text for text in smoke.text.split(" runs to make, ") if f"\n{request.key}\n" in text)
        count = len({m for c in request.groups().values() for members in c.values() for m in members})
        assert head.startswith(f"{count} already finished")


@pytest.mark.parametrize(
    "longer",
    [
        replace(SHORT, max_steps=SHORT.max_steps + 1),
        replace(SHORT, batch_size=2),
        replace(SHORT, network=replace(SHORT.network, width=SHORT.network.width * 2)),
        replace(SHORT, network=replace(SHORT.network, kind="cnn")),
    ],
)
def test_more_steps_samples_units_or_positions_take_longer(tmp_path, longer):
    assert job(tmp_path, config=longer).size > job(tmp_path).size
