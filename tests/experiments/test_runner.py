"""Many runs at once: a process that dies takes only its own run down; nothing is run twice; longest first."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
from rich.console import Console

from python_experiments import registry, runner, training
from tests.experiments.helpers import ExitsWhenUsed

SHORT = replace(registry.get("fig5").presets["smoke"].config, max_steps=3)


def job(root, seed=0, config=SHORT):
    return runner.Job(config, seed, root, None, 1, (f"run {seed}",))


def test_a_process_that_exits_is_reported_and_the_others_go_on(tmp_path):
    jobs = [job(ExitsWhenUsed(), 9), *(job(tmp_path, seed) for seed in range(3))]
    printed = io.StringIO()
    outcomes = {o.job.names[0]: o for o in runner.execute(jobs, 2, Console(file=printed, width=200))}
    assert set(outcomes) == {"run 9", "run 0", "run 1", "run 2"}
    assert "exit code 3" in outcomes["run 9"].error
    assert f"run 9: FAILED: {outcomes['run 9'].error}" in printed.getvalue()
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
