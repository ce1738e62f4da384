"""Training a model with its tangent kernel in sight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from catapult_ext.data import Dataset, Split
from catapult_ext.runs import RunFolder
from catapult_ext.training.algorithms import Algorithm
from catapult_ext.training.callbacks import Callback
from catapult_ext.training.history import History
from catapult_ext.training.job import Job
from catapult_ext.training.loop import Loop
from catapult_ext.training.recorders import Recorder
from catapult_ext.training.schedules import Schedule
from catapult_ext.training.stop import Stop
from catapult_ext.training.update import restore

__all__ = ["train"]


def train(
    model: nn.Module,
    data: Split | Dataset,
    *,
    algorithm: Algorithm,
    schedule: Schedule,
    stop: Stop,
    recorders: Sequence[Recorder] = (),
    probe: Dataset | None = None,
    seed: int = 0,
    run: RunFolder | None = None,
    validate_every: int | None = None,
    best_by: str = "loss",
    evaluation_chunk: int = 256,
    one_pass: bool | None = None,
    callbacks: Sequence[Callback] = (),
    engine: str = "auto",
    progress: bool = True,
) -> History:
    """Train a model on the mean squared error and record its tangent kernel on the way.

    The update of step t is w <- w - lr_t * gradient of L (or the algorithm's rule for that gradient), L = mean
    over all n c entries of (f - y)^2, in the mode (training or evaluation) that the model is given in; buffer
    updates of that forward are committed. Sets are evaluated in evaluation mode, in chunks. A pass computes the
    kernel only when a recorder or a schedule needs it at that step.

    Args:
        model: Maps x (b, ...) to (b, c); changed in place. At the end it holds the final parameters.
        data: Training set, and validation and test sets where given; tensors on the model's device and dtype.
        algorithm: `GD()`, `SGD(batch_size)`, either with momentum, `RMSprop`, `Adagrad`, `Adadelta`, `Adam`.
        schedule: `Constant`, `Stepwise`, `Cyclical`, `WarmUp`, `DecayAfterCatapult` or `CatapultSchedule`.
        stop: When the run ends.
        recorders: What to record beside the losses; each has its own cadence.
        probe: The set that `Spectrum` observes instead of the step's own samples. With batches it is the only
            way to follow the spectrum of the training set: `probe=data.train`.
        seed: Of the shuffles of batches. The caller's random state is neither used nor changed.
        run: Where to keep the run. A finished one is loaded instead of run (the model then gets its final
            parameters), an interrupted one goes on, to the same numbers bit by bit on the same machine,
            thread count and torch version.
        validate_every: Steps between two validations; None: 10 with GD, an epoch with batches. The last row is
            always validated.
        best_by: "loss" or "error" (share of wrong classes): the validation number whose minimum decides which
            parameters are kept as `History.best`.
        evaluation_chunk: Samples per forward when sets are evaluated.
        one_pass: Whether a pass that a recorder or a schedule asks for also makes the update, so that nothing is
            computed twice; None: yes, unless a recorder's cadence is `AroundSpikes`. False: every update comes
            from a plain backward of its own, so that what is recorded, and how often, changes no bit of the
            training; a step with a record then costs one plain backward more.
        callbacks: Your own code at the events of the run; not part of what identifies it in a run folder.
        engine: What makes the updates. "general": a pass of the engine for every network. "native": stretches of
            steps in one compiled call, for plain SGD on the CPU with one output, a network of Linear layers with
            ReLU, leaky ReLU or nothing between them, and no recorder of batches but `BatchCriticalRate`; where it
            cannot be, the error says why. "captured": as "general", but each pass is the replay of a CUDA graph,
            captured at its first use; for models on CUDA that `Observer.capture` does not refuse. It keeps the memory
            of a pass for each kind of pass that the run makes (plain, with kernel, of the probe). "auto": "native"
            where it can be and a step is small (weights times batch up to 2^23), else "general". All agree in each
            step to 1e-5 (float32) or 1e-10 (float64), not over whole trajectories. `History.engine` says which it
            was; an interrupted run goes on with the one it began with.
        progress: Show a progress bar where there is a terminal.

    Returns:
        The history. Divergence is a result, "diverged", not an error.

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.
        NonFinite: Something is not finite before the first update already.
        RunError, UnreadableFile: The run folder cannot be used; the message names it.
    """
    job = Job.checked(
        model,
        data,
        algorithm,
        schedule,
        stop,
        recorders,
        probe,
        seed,
        validate_every,
        best_by,
        evaluation_chunk,
        one_pass,
        callbacks,
        engine,
    )
    if run is None:
        return Loop(job, None, progress).run()
    if not isinstance(run, RunFolder):
        raise TypeError(f"run: expected a RunFolder, got {type(run).__name__}")
    with run.open() as session:
        session.check("training", job.described)
        if run.finished:
            stored = run.read()
            restore(model, stored.tensors["final"])
            return History.from_result(stored, next(model.parameters()).device)
        return Loop(job, session, progress).run()
