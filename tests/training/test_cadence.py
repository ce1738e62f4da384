"""When recorders record, and that steps observed afterwards give the bits of steps observed at once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as brute
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_reference import Recipe

import catapult_ext as cx
from catapult_ext.training import AroundSpikes, LogSpaced


@given(per_decade=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_log_spaced_steps_are_the_rounded_powers(per_decade: int) -> None:
    cadence, last = LogSpaced(per_decade=per_decade), 3000
    powers = {round(10 ** (j / per_decade)) for j in range(math.ceil(4 * per_decade))}
    expected = [t for t in range(last) if t == 0 or t in powers]
    assert [t for t in range(last) if cadence.is_due(t)] == expected


def test_log_spaced_recorder_in_a_run(recipe: Recipe) -> None:
    history = cx.train(
        recipe.model(),
        recipe.data(),
        algorithm=cx.GD(),
        schedule=cx.Constant(0.1),
        recorders=[cx.CriticalRate(every=LogSpaced(per_decade=3))],
        stop=cx.Stop(max_steps=30),
    )
    column = history.metrics["critical_lr"]
    assert np.flatnonzero(column.notna()).tolist() == [0, 1, 2, 5, 10, 22, 30]


class KernelNorms(cx.Recorder):
    """A recorder of one's own that keeps a tensor."""

    observes = "batch"

    def columns(self) -> tuple[str, ...]:
        return ("kernel_sum",)

    def record(self, step: cx.training.Step) -> tuple[float]:
        assert step.observation is not None
        assert step.observation.kernel is not None
        step.keep("diagonal", step.observation.kernel.diagonal()[:1])
        return (step.observation.kernel.sum().item(),)


def recorders(every: object, model: nn.Module, d: int) -> list[cx.Recorder]:
    """All kinds: of the batch, of the probe, of the parameters, with tensors."""
    return [
        cx.Spectrum(k=3, s=2, every=every),
        cx.BatchCriticalRate(every=every),
        cx.AGOP(size=2, every=every),
        cx.AGOPAlignment(reference=torch.eye(d), every=every),
        cx.ParameterNorms.of(model, every=every),
        KernelNorms(every=every),
    ]


#: A push at step 20 and one at step 41, each followed by calm.
PUSHES = {
    "gd": cx.Stepwise({0: 0.3, 20: 6.0, 23: 0.3, 41: 9.0, 42: 0.3}, relative=True),
    "sgd": cx.Stepwise({0: 0.1, 20: 1.6, 23: 0.1, 41: 2.0, 42: 0.1}, relative=True),
    "adam": cx.Stepwise({0: 1e-3, 20: 0.3, 23: 1e-3, 41: 0.5, 42: 1e-3}),
}
PUSHES["batchnorm"] = PUSHES["gd"]
KINDS = {"gd": cx.GD(), "sgd": cx.SGD(4), "adam": cx.Adam(4), "batchnorm": cx.GD(momentum=0.3)}


def spiky_run(
    every: object, kind: str, recipe: Recipe | None = None, *, hessian: bool = False, **changes: object
) -> tuple[cx.History, nn.Module]:
    recipe = recipe or Recipe(torch.float32)
    data = recipe.split()
    model = recipe.model(norm=kind == "batchnorm")
    arguments: dict[str, object] = {
        "schedule": PUSHES[kind],
        "recorders": recorders(every, model, recipe.d) + [cx.Hessian(every=every)] * hessian,
        "probe": data.train if KINDS[kind].batch_size else None,
        "stop": cx.Stop(max_steps=60),
        "seed": 2,
        **changes,
    }
    return cx.train(model, data, algorithm=KINDS[kind], **arguments), model  # type: ignore[arg-type]


def in_spike(loss: np.ndarray, every: AroundSpikes) -> list[int]:
    """Steps whose loss is in a spike, by the rule as it is written down."""
    return [
        t for t in range(1, len(loss)) if loss[t] > every.rise * np.median(loss[max(0, t - every.window) : t])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_dense_records_have_the_bits_of_recording_every_step(kind: str) -> None:
    every = AroundSpikes(before=6, after=3, every=25, rise=5.0, window=8)
    hessian = kind in ("gd", "sgd")
    sparse, sparse_model = spiky_run(every, kind, hessian=hessian)
    full, full_model = spiky_run(1, kind, hessian=hessian, one_pass=False)
    assert torch.equal(brute.flat(sparse_model), brute.flat(full_model))
    spikes = in_spike(full.metrics["loss"].to_numpy(), every)
    assert spikes
    expected = {0, 25, 50, 60}.union(*(range(t - 6, t + 4) for t in spikes))
    assert 15 < len(expected) < 50  # something was left out, something was recorded afterwards
    recorded = sparse.metrics["lambda_1"].notna().to_numpy()
    assert set(np.flatnonzero(recorded)) == expected
    assert sparse.metrics[recorded].equals(full.metrics[recorded])
    always = ["step", "lr", "loss", "train_loss", "measured_critical_lr", "validation_loss"]
    assert sparse.metrics[always].equals(full.metrics[always])
    others = [c for c in full.metrics if c not in always]
    assert sparse.metrics.loc[~recorded, others].isna().all(axis=None)
    for name in ("agop", "diagonal"):
        steps, values = sparse.tensors[name]["steps"], sparse.tensors[name]["values"]
        assert full.tensors[name]["steps"].tolist() == list(range(61 if name == "agop" else 60))
        assert set(steps.tolist()) == (expected if name == "agop" else expected - {60})
        assert torch.equal(values, full.tensors[name]["values"][steps])


def test_large_kernels_are_solved_afterwards_to_the_same_bits() -> None:
    """Above 320 rows eigenpairs come from an iteration, which must not begin where the last record ended."""
    recipe = Recipe(torch.float32, n=340)
    every = AroundSpikes(before=3, after=1, rise=5.0, window=8)
    stop = cx.Stop(max_steps=24)
    sparse, _ = spiky_run(every, "gd", recipe, stop=stop)
    full, _ = spiky_run(1, "gd", recipe, stop=stop, one_pass=False)
    recorded = sparse.metrics["lambda_1"].notna().to_numpy()
    assert 4 < recorded.sum() < 20
    assert sparse.metrics[recorded].equals(full.metrics[recorded])


@pytest.mark.parametrize("kind", ["gd", "sgd"])
def test_a_run_that_diverges_is_recorded_up_to_its_end(kind: str) -> None:
    every = AroundSpikes(before=4, after=0, rise=1e30)  # nothing but the divergence counts
    schedule = cx.Stepwise({0: 0.3, 20: 400.0}, relative=True)
    stop = cx.Stop(max_steps=60, diverged_above=1e3)
    sparse, _ = spiky_run(every, kind, schedule=schedule, stop=stop)
    full, _ = spiky_run(1, kind, schedule=schedule, stop=stop, one_pass=False)
    assert sparse.result == full.result == "diverged"
    last = len(full.metrics) - 1
    assert last > 20
    recorded = sparse.metrics["lambda_1"].notna().to_numpy()
    assert set(np.flatnonzero(recorded)) == {0, *range(last - 4, last)}
    assert sparse.metrics[recorded].equals(full.metrics[recorded])


@pytest.mark.parametrize(
    "recorders", [[], [cx.Spectrum(every=3)], [cx.AGOP(every=4), cx.BatchCriticalRate()]]
)
def test_without_one_pass_recording_changes_no_bit_of_the_training(recorders: list[cx.Recorder]) -> None:
    plain, model = spiky_run(1, "gd", recorders=[], one_pass=False)
    recorded, again = spiky_run(1, "gd", recorders=recorders, one_pass=False)
    assert torch.equal(brute.flat(model), brute.flat(again))
    assert recorded.metrics[plain.metrics.columns].equals(plain.metrics)


class Cut(Exception):
    pass


class Bomb(cx.Callback):
    """Ends the process, so to speak, after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, row: object, model: nn.Module) -> None:
        if row["step"] == self.step:  # type: ignore[index]
            raise Cut


@pytest.mark.parametrize("kind", ["gd", "sgd", "adam"])
def test_a_run_cut_just_before_a_spike_resumes_with_its_ring(kind: str, tmp_path: Path) -> None:
    """The states that are observed afterwards, and rows that were not written yet, come from the checkpoint."""
    every = AroundSpikes(before=6, after=3, every=25, rise=5.0, window=8)
    stop = cx.Stop(max_steps=32)
    whole, whole_model = spiky_run(every, kind, stop=stop)
    first = in_spike(whole.metrics["loss"].to_numpy(), every)[0]
    for cut in (first - 1, first + 2):
        folder = cx.RunFolder(tmp_path, f"{kind}{cut}", {}, 2, checkpoint_seconds=0)
        with pytest.raises(Cut):
            spiky_run(every, kind, stop=stop, run=folder, callbacks=[Bomb(cut)])
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == cut - 7  # rows that may still change are held back
        again, model = spiky_run(every, kind, stop=stop, run=folder)
        assert again.metrics.equals(whole.metrics), cut
        assert torch.equal(brute.flat(model), brute.flat(whole_model))
        stored = cx.History.from_result(folder.read())
        assert stored.metrics.equals(whole.metrics)
        for name, kept in whole.tensors.items():
            assert torch.equal(stored.tensors[name]["steps"], kept["steps"])
            assert torch.equal(stored.tensors[name]["values"], kept["values"])


def test_a_ring_that_does_not_fit_is_refused_at_the_start(recipe: Recipe) -> None:
    size = 8 * sum(p.numel() for p in recipe.model().parameters())
    arguments = {"algorithm": cx.GD(), "schedule": cx.Constant(0.1), "stop": cx.Stop(max_steps=1)}
    for bound, fits in ((9 * size, True), (9 * size - 1, False)):
        recorder = cx.Spectrum(every=AroundSpikes(before=8, max_bytes=bound))
        if fits:
            cx.train(recipe.model(), recipe.data(), recorders=[recorder], **arguments)
            continue
        message = f"max_bytes: expected at least {9 * size} bytes for 9 copies of the model, got {bound}; before=7 fits"
        with pytest.raises(ValueError, match=message):
            cx.train(recipe.model(), recipe.data(), recorders=[recorder], **arguments)
    with pytest.raises(ValueError, match="one_pass: expected None or False with AroundSpikes"):
        cx.train(
            recipe.model(),
            recipe.data(),
            recorders=[cx.Spectrum(every=AroundSpikes())],
            one_pass=True,
            **arguments,
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AroundSpikes(before=-1), "before: expected an integer >= 0, got -1"),
        (lambda: AroundSpikes(after=1.5), "after: expected an integer >= 0, got 1.5"),
        (lambda: AroundSpikes(rise=1.0), "rise: expected a finite number > 1, got 1.0"),
        (lambda: AroundSpikes(every=0), "every: expected an integer >= 1, got 0"),
        (lambda: LogSpaced(per_decade=0), "per_decade: expected an integer >= 1, got 0"),
        (lambda: cx.Spectrum(every="often"), "every: expected an integer >= 1, LogSpaced.. or AroundSpikes"),
    ],
)
def test_settings_out_of_range_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
