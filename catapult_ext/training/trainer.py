"""The training loop: one pass a step, its observation handed to the recorders."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from catapult_ext.data import Dataset, Split
from catapult_ext.errors import NonFinite
from catapult_ext.observe import Observation, Observer
from catapult_ext.runs import RunFolder, RunSession
from catapult_ext.training.algorithms import GD, SGD
from catapult_ext.training.evaluation import Evaluation, evaluate
from catapult_ext.training.history import Best, History, MetricsTable
from catapult_ext.training.job import Job
from catapult_ext.training.progress import TrainingProgress
from catapult_ext.training.recorders import BatchCriticalRate, Recorder, Step
from catapult_ext.training.schedules import Schedule
from catapult_ext.training.stop import Stop

__all__ = ["train"]


def train(
    model: nn.Module,
    data: Split | Dataset,
    *,
    algorithm: GD | SGD,
    schedule: Schedule,
    stop: Stop,
    recorders: Sequence[Recorder] = (),
    probe: Dataset | None = None,
    seed: int = 0,
    run: RunFolder | None = None,
    validate_every: int | None = None,
    best_by: str = "loss",
    evaluation_chunk: int = 256,
    progress: bool = True,
) -> History:
    """Train a model on the mean squared error and record its tangent kernel on the way.

    The update of step t is w <- w - lr_t * gradient of L, L = mean over all n c entries of (f - y)^2, in the
    mode (training or evaluation) that the model is given in; buffer updates of that forward are committed.
    Sets are evaluated in evaluation mode, in chunks. A pass computes the kernel only when a recorder or a
    relative schedule needs it at that step.

    Args:
        model: Maps x (b, ...) to (b, c); changed in place. At the end it holds the final parameters.
        data: Training set, and validation and test sets where given; tensors on the model's device and dtype.
        algorithm: `GD()` or `SGD(batch_size)`.
        schedule: `Constant` or `Stepwise`, absolute or in units of the critical rate.
        stop: When the run ends.
        recorders: What to record beside the losses; each has its own cadence.
        probe: The set that `Spectrum` observes instead of the step's own samples. With SGD it is the only way
            to follow the spectrum of the training set: `probe=data.train`.
        seed: Of the shuffles of SGD. The caller's random state is neither used nor changed.
        run: Where to keep the run. A finished one is loaded instead of run (the model then gets its final
            parameters), an interrupted one goes on, to the same numbers bit by bit on the same machine,
            thread count and torch version.
        validate_every: Steps between two validations; None: 10 with GD, an epoch with SGD. The last row is
            always validated.
        best_by: "loss" or "error" (share of wrong classes): the validation number whose minimum decides which
            parameters are kept as `History.best`.
        evaluation_chunk: Samples per forward when sets are evaluated.
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
    )
    if run is None:
        return _Loop(job, None, progress).run()
    if not isinstance(run, RunFolder):
        raise TypeError(f"run: expected a RunFolder, got {type(run).__name__}")
    with run.open() as session:
        session.check("training", job.described)
        if run.finished:
            stored = run.read()
            _restore(model, stored.tensors["final"])
            return History.from_result(stored, next(model.parameters()).device)
        return _Loop(job, session, progress).run()


class _Loop:
    """The state of one run, and its steps."""

    def __init__(self, job: Job, session: RunSession | None, progress: bool) -> None:
        self.job, self.session, self.model = job, session, job.model
        self.config = job.described  # now: what has no description is an error before the first step
        self.train, self.probe = job.data.train, job.probe
        self.table = MetricsTable(job.columns)
        self.at = {name: i for i, name in enumerate(job.columns)}
        self.row: list[float] = []
        self.written = 0  # rows handed to the run folder
        self.step = 0  # updates made
        self.lr = math.nan
        self.initial_loss = math.nan
        self.best: Best | None = None
        self.seconds = 0.0
        self.order = None
        if isinstance(job.algorithm, SGD):
            self.order = job.algorithm.order(len(self.train), job.seed, self.train.x.device)
        by_pass: dict[str | None, list[Recorder]] = {"batch": [], "set": [], None: []}
        for recorder in job.recorders:
            # With GD and no probe, the pass that makes the step is the pass over the set.
            shared = recorder.observes == "set" and self.probe is None
            by_pass["batch" if shared else recorder.observes].append(recorder)
        self.of_batch, self.of_set, self.of_model = by_pass["batch"], by_pass["set"], by_pass[None]
        self.observers = {
            "plain": Observer(self.model, kernel=False),
            "kernel": Observer(self.model, k=max((r.eigenpairs for r in self.of_batch), default=1)),
            "probe": Observer(self.model, k=max((r.eigenpairs for r in self.of_set), default=1)),
        }
        self.shown_critical: float | None = None
        self.bar = TrainingProgress(progress, job.stop.max_steps)

    def run(self) -> History:
        """Resume or start, run to the end, and store what came out."""
        self._resume()
        started = time.monotonic() - self.seconds
        with self.bar:
            result = None
            while result is None:
                self.seconds = time.monotonic() - started
                self._save_if_due()
                result = self._guarded_step()
                if self.bar.due():
                    self._show()
        self._complete_best()
        self.seconds = time.monotonic() - started
        history = History(
            metrics=self.table.frame(),
            result=result,
            best=self.best,
            catapult_count=self._catapult_count(),
            config=self.config,
            seconds=self.seconds,
        )
        if self.session is not None:
            self.session.finish(history.to_result(_parameters_and_buffers(self.model)))
        return history

    # ---- one step

    def _guarded_step(self) -> str | None:
        try:
            return self._step()
        except NonFinite:
            if self.step == 0:
                raise  # nothing was trained: the model or the data is at fault
            self.table.append(self.row)
            return "diverged"

    def _step(self) -> str | None:
        """Row t: observe, decide, record, update. Returns the result when the run ends here."""
        t, job = self.step, self.job
        self.row = [math.nan] * len(job.columns)
        self.row[0] = t
        observation: Observation | None = None
        train_loss: float | None = None
        if self.order is None:
            observation = self._observe_batch(self.train.x, self.train.y)
            train_loss = self._put("loss", observation.loss.item())
        elif t == job.stop.max_steps or t % job.check_every == 0:
            train_loss = self._evaluate(self.train).loss
        if train_loss is not None:
            self._put("train_loss", train_loss)
            if t == 0:
                if not math.isfinite(train_loss):
                    raise NonFinite(f"data.train: its loss before the first update is {train_loss}")
                self.initial_loss = train_loss
        result = job.stop.verdict(t, train_loss, self.initial_loss)
        if result != "diverged":
            self._describe_parameters(last=result is not None)
        if result is not None:
            if self.order is None and result != "diverged":
                self._record_last_pass()
            self.table.append(self.row)
            return result
        return self._update(observation)

    def _update(self, observation: Observation | None) -> str | None:
        """Make update t from the pass over the training set, or over the next batch."""
        t, indices = self.step, None
        if self.order is not None:
            indices = next(self.order)
            x, y = self.train.x.index_select(0, indices), self.train.y.index_select(0, indices)
            observation = self._observe_batch(x, y)
            loss = self._put("loss", observation.loss.item())
            if not loss <= self.job.stop.loss_limit(self.initial_loss):
                self.table.append(self.row)
                return "diverged"
        assert observation is not None
        self.lr = self._put("lr", self.job.schedule.lr(t, self.lr, lambda: self._critical_lr(observation)))
        for recorder in self.of_batch:
            if t % recorder.every == 0:
                self._record(recorder, Step(t, self.model, self.job.data, self.lr, indices, observation))
        observation.step_(self.lr)
        self.table.append(self.row)
        self.step = t + 1
        return None

    def _observe_batch(self, x: torch.Tensor, y: torch.Tensor) -> Observation:
        """The pass that makes the update; with the kernel only where something reads it."""
        t = self.step
        wanted = any(t % r.every == 0 for r in self.of_batch)
        if self.order is None:
            wanted = wanted or self.job.schedule.measures(t)
        observation = self.observers["kernel" if wanted else "plain"](x, y)
        observation.check()  # its loss is read on the host next
        return observation

    def _show(self) -> None:
        for column in ("batch_critical_lr", "critical_lr", "measured_critical_lr"):
            if column in self.at and math.isfinite(value := self.row[self.at[column]]):
                self.shown_critical = value
                break
        self.bar.show(self.step, self.row[self.at["loss"]], self.lr, self.shown_critical)

    def _critical_lr(self, observation: Observation) -> float:
        """Critical rate of the whole training set, for a relative schedule."""
        if self.order is not None:
            observation = Observer(self.model)(self.train.x, self.train.y)
        return self._put("measured_critical_lr", observation.critical_lr.item())

    # ---- what is recorded

    def _put(self, column: str, value: float) -> float:
        self.row[self.at[column]] = value
        return value

    def _record(self, recorder: Recorder, step: Step) -> None:
        columns = recorder.columns()
        values = recorder.record(step)
        for column, value in zip(columns, values, strict=True):
            self._put(column, value)

    def _describe_parameters(self, last: bool) -> None:
        """Validation and the recorders that look at the parameters, not at the update."""
        t, job = self.step, self.job
        if job.data.validation is not None and (last or t % job.validate_every == 0):
            self._validate(job.data.validation)
        for recorder in self.of_model:
            if last or t % recorder.every == 0:
                self._record(recorder, Step(t, self.model, job.data))
        due = [r for r in self.of_set if last or t % r.every == 0]
        if due:
            assert self.probe is not None
            observation = self.observers["probe"](self.probe.x, self.probe.y)
            for recorder in due:
                self._record(recorder, Step(t, self.model, job.data, observation=observation))

    def _record_last_pass(self) -> None:
        """GD's last row: there is no update, but the spectrum of the final parameters is recorded."""
        due = [r for r in self.of_batch if r.observes == "set"]
        if due:
            observation = self.observers["kernel"](self.train.x, self.train.y)
            for recorder in due:
                self._record(recorder, Step(self.step, self.model, self.job.data, observation=observation))

    def _evaluate(self, data: Dataset) -> Evaluation:
        return evaluate(self.model, data, labels=self.job.labels, chunk=self.job.evaluation_chunk)

    def _validate(self, data: Dataset) -> None:
        found = self._evaluate(data)
        if not math.isfinite(found.loss):
            raise NonFinite(f"validation loss: {found.loss} at step {self.step}")
        self._put("validation_loss", found.loss)
        if found.error is not None:
            self._put("validation_error", found.error)
        if self.best is not None:
            by_loss = self.job.best_by == "loss"
            old = self.best.validation_loss if by_loss else self.best.validation_error
            new = found.loss if by_loss else found.error
            assert old is not None
            assert new is not None
            if not new < old:
                return
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.best = Best(self.step, found.loss, found.error, state)

    def _complete_best(self) -> None:
        """Test the best parameters; the model keeps the final ones."""
        if self.best is None:
            return
        final = {name: value.clone() for name, value in _parameters_and_buffers(self.model).items()}
        self.model.load_state_dict(self.best.state_dict)
        try:
            if self.job.data.test is not None:
                found = self._evaluate(self.job.data.test)
                self.best.test_loss, self.best.test_error = found.loss, found.error
            for recorder in self.of_model:
                if recorder.at_best:
                    values = recorder.record(Step(self.best.step, self.model, self.job.data))
                    self.best.measures.update(zip(recorder.columns(), map(float, values), strict=True))
        finally:
            _restore(self.model, final)

    def _catapult_count(self) -> int | None:
        if not any(isinstance(r, BatchCriticalRate) and r.every == 1 for r in self.job.recorders):
            return None
        steps = self.step if self.best is None else self.best.step
        return int(np.nansum(self.table.column("catapult")[:steps]))

    # ---- run folder

    def _save_if_due(self) -> None:
        session = self.session
        if session is None:
            return
        due = session.checkpoint_due() and self.step > 0
        if due or session.flush_due():
            session.append(self.table.records(self.written))
            self.written = self.table.rows
        if due:
            session.checkpoint(self._state())

    def _state(self) -> dict[str, Any]:
        """Everything from which the run goes on bit by bit; rows 0 to step - 1 are recorded."""
        return {
            "model": _parameters_and_buffers(self.model),
            "observers": {name: observer.state_dict() for name, observer in self.observers.items()},
            "order": self.order.state_dict() if self.order is not None else None,
            "step": self.step,
            "lr": self.lr,
            "initial_loss": self.initial_loss,
            "best": vars(self.best) if self.best is not None else None,
            "seconds": self.seconds,
        }

    def _resume(self) -> None:
        found = self.session.resume() if self.session is not None else None
        if found is None:
            return
        state, records = found
        _restore(self.model, state["model"])
        device = self.train.x.device
        for name, observer in self.observers.items():
            observer.load_state_dict(_to(state["observers"][name], device))
        if self.order is not None:
            self.order.load_state_dict(state["order"])
        self.step, self.lr, self.initial_loss = state["step"], state["lr"], state["initial_loss"]
        self.best = Best(**_to(state["best"], device)) if state["best"] is not None else None
        self.seconds = state["seconds"]
        self.table.append_records(records)
        self.written = self.table.rows


def _parameters_and_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, shared ones once; unlike `state_dict` also buffers that are not persistent."""
    return {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def _restore(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the values of `_parameters_and_buffers` back in place."""
    for name, value in _parameters_and_buffers(model).items():
        value.copy_(tensors[name])


def _to(tree: Any, device: torch.device) -> Any:
    """A tree with its tensors on a device."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {name: _to(value, device) for name, value in tree.items()}
    return tree
