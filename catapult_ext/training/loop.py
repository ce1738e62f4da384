"""The training loop: passes, decisions, updates, and what has to be stored to go on."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import numpy as np
import torch

from catapult_ext.data import Dataset
from catapult_ext.errors import NonFinite
from catapult_ext.observe import Observation, Observer
from catapult_ext.runs import RunSession
from catapult_ext.training.chain import Chain, chain_for
from catapult_ext.training.evaluation import Evaluation, evaluate
from catapult_ext.training.history import Best, History, MetricsTable
from catapult_ext.training.job import Job
from catapult_ext.training.progress import TrainingProgress
from catapult_ext.training.recorders import BatchCriticalRate
from catapult_ext.training.recording import ColdObserver, Recording
from catapult_ext.training.schedules import Measurement
from catapult_ext.training.update import Update, parameters_and_buffers, restore, to_device

__all__ = ["Loop"]

#: Steps in one native call: some tens of milliseconds, after which progress and run folder get their turn.
_LONGEST_STRETCH = 256


class Loop:
    """The state of one run, and its steps.

    Args:
        job: What to train, checked.
        session: Where the run is kept; None: nowhere.
        progress: Show a progress bar where there is a terminal.
    """

    def __init__(self, job: Job, session: RunSession | None, progress: bool) -> None:
        self.job, self.session, self.model = job, session, job.model
        self.config = job.described  # now: what has no description is an error before the first step
        self.train = job.data.train
        self.table = MetricsTable(job.columns)
        self.written = 0  # rows handed to the run folder
        self.step = 0  # updates made
        self.lr = math.nan
        self.schedule_state: dict[str, Any] = {}
        self.initial_loss = math.nan
        self.best: Best | None = None
        self.seconds = 0.0
        self.stopped = False
        whole = job.algorithm.batch_size is None
        self.order = None if whole else job.algorithm.order(len(self.train), job.seed, self.train.x.device)
        self.update = Update(job.algorithm, self.model)
        self.recording = Recording(job, self.table)
        self.engine: str | None = None  # decided before the first update
        self.chain: Chain | None = None
        self.plain_pass = Observer(self.model, kernel=False, captured=job.captured)
        self.whole_pass = ColdObserver(self.model, job.schedule.eigenpairs, captured=job.captured)
        self.measured: Measurement | None = None  # while the schedule decides
        self.shown_critical: float | None = None
        self.bar = TrainingProgress(progress, job.stop.max_steps)

    def run(self) -> History:
        """Resume or start, run to the end, and store what came out."""
        self._resume()
        for callback in self.job.callbacks:
            callback.on_start(self.model, self.step)
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
            engine=self.engine or "general",
            tensors=self.recording.tensors(),
        )
        if self.session is not None:
            self.session.finish(history.to_result(parameters_and_buffers(self.model)))
        for callback in self.job.callbacks:
            callback.on_end(history)
        return history

    # ---- one step

    def _guarded_step(self) -> str | None:
        self.table.begin_row()
        try:
            result = self._step()
        except NonFinite:
            if self.step == 0:
                raise  # nothing was trained: the model or the data is at fault
            result = "diverged"
        if result == "diverged":
            self.recording.look_back(self.table.rows - 1, diverged=True)
        return result

    def _step(self) -> str | None:
        """Row t: observe, decide, record, update. Returns the result when the run ends here."""
        t, job = self.step, self.job
        self.table.put(t, "step", t)
        passes: tuple[Observation, Observation | None] | None = None
        train_loss: float | None = None
        if self.order is None:
            passes = self._observe(self.train.x, self.train.y)
            train_loss = self._put("loss", passes[0].loss.item())
        elif t == job.stop.max_steps or self.stopped or t % job.check_every == 0:
            train_loss = self._evaluate(self.train).loss
        if train_loss is not None:
            self._put("train_loss", train_loss)
            if t == 0:
                if not math.isfinite(train_loss):
                    raise NonFinite(f"data.train: its loss before the first update is {train_loss}")
                self.initial_loss = train_loss
        best_step = None if self.best is None else self.best.step
        result = job.stop.verdict(t, train_loss, self.initial_loss, best_step)
        if self.stopped and result is None:
            result = "stopped"
        if result == "diverged":
            return result
        if job.data.validation is not None and (result is not None or t % job.validate_every == 0):
            self._validate(job.data.validation)
        self.recording.record_parameters(t, last=result is not None)
        if result is None:
            if self.engine is None or (self.engine == "native" and self.chain is None):
                self._choose_engine()
            return self._update(passes) if self.chain is None else self._stretch(self.chain)
        if self.order is None:
            self.recording.record_last_pass(t)
        self.recording.look_back(t)
        return result

    def _choose_engine(self) -> None:
        """What makes the updates; once more where an interrupted run goes on."""
        if self.job.captured:
            self.engine = "captured"
        else:
            self.chain = chain_for(self.job, self.engine or self.job.engine)
            self.engine = "general" if self.chain is None else "native"

    def _update(self, passes: tuple[Observation, Observation | None] | None) -> str | None:
        """Make update t from the pass over the training set, or over the next batch."""
        t, indices = self.step, None
        if self.order is not None:
            indices = next(self.order)
            x, y = self.train.x.index_select(0, indices), self.train.y.index_select(0, indices)
            passes = self._observe(x, y)
            loss = self._put("loss", passes[0].loss.item())
            if not loss <= self.job.stop.loss_limit(self.initial_loss):
                return "diverged"
        assert passes is not None
        stepping, kernel = passes
        self.lr = self._put("lr", self.job.schedule.lr(t, self.schedule_state, lambda: self._measure(kernel)))
        self.measured = None
        self.recording.record_batch(t, kernel, self.lr, indices)
        self.recording.push(t, self.lr, indices)
        self.update.step_(stepping, self.lr)
        self.recording.look_back(t)
        self._call_back(t)
        self.step = t + 1
        return None

    def _call_back(self, t: int) -> None:
        if self.job.callbacks:
            row = self.table.records(t, t + 1)[0]
            answers = [callback.on_step(row, self.model) for callback in self.job.callbacks]
            self.stopped = any(answers)

    def _stretch(self, chain: Chain) -> str | None:
        """Make update t and those behind it up to the next row that needs more than its batch."""
        assert self.order is not None
        t, schedule = self.step, self.job.schedule
        rates: list[float] = []
        batches: list[torch.Tensor] = []
        while not rates or self._is_quiet(t + len(rates), len(rates)):
            step = t + len(rates)
            batches.append(next(self.order))
            rates.append(schedule.lr(step, self.schedule_state, functools.partial(self._measure_at, step)))
        self.measured = None
        observed = [self.recording.wants_batch(t + i) for i in range(len(rates))]
        limit = self.job.stop.loss_limit(self.initial_loss)
        losses, critical_lr = chain.steps_(batches, rates, observed, limit)
        made = int(np.count_nonzero(losses <= limit))
        while self.table.rows < t + made:
            self.table.begin_row()
        lr = np.array(rates[:made])
        for column, values in (("step", np.arange(t, t + made)), ("loss", losses[:made]), ("lr", lr)):
            self.table.put_all(t, column, values)
        self.recording.record_stretch(t, lr, critical_lr[:made])
        if made:
            self.lr = rates[made - 1]
            self._call_back(t + made - 1)
        self.step = t + made
        if made == len(rates):
            return None
        if made:
            self.table.begin_row()
            self._put("step", self.step)
        if np.isnan(losses[made]):
            raise NonFinite(f"step {self.step}: the loss of its batch, or its kernel, is not finite")
        self._put("loss", losses[made])
        return "diverged"

    def _is_quiet(self, t: int, steps: int) -> bool:
        """Whether nothing happens between updates t - 1 and t; `steps` are in the stretch already."""
        job, session = self.job, self.session
        each = bool(job.callbacks) or (session is not None and session.folder.checkpoint_seconds == 0)
        return (
            not each
            and steps < _LONGEST_STRETCH
            and t % job.check_every != 0
            and (job.data.validation is None or t % job.validate_every != 0)
            and not self.recording.wants_parameters(t)
            and not job.schedule.measures(t, self.schedule_state)
            and job.stop.verdict(t, None, self.initial_loss, None if self.best is None else self.best.step)
            is None
        )

    def _measure_at(self, t: int) -> Measurement:
        """Only the first step of a stretch can: the parameters of the others are not there yet."""
        if t != self.step:
            raise ValueError(
                f"schedule: {type(self.job.schedule).__name__}.lr() measured at step {t}, for which its measures() is "
                "False"
            )
        return self._measure(None)

    def _observe(self, x: torch.Tensor, y: torch.Tensor) -> tuple[Observation, Observation | None]:
        """The pass that makes the update, and the one with the kernel where something reads it."""
        wanted = self.recording.wants_batch(self.step)
        if self.order is None and self.job.one_pass:
            wanted = wanted or self.job.schedule.measures(self.step, self.schedule_state)
        if wanted and self.job.one_pass:
            observation = self.recording.batch_pass(x, y)
            return observation, observation
        plain = self.plain_pass(x, y)
        plain.check()  # its loss is read on the host next
        return plain, self.recording.batch_pass(x, y) if wanted else None

    def _measure(self, observation: Observation | None) -> Measurement:
        """The whole training set, for the schedule; once a step, however often it is asked for."""
        if self.measured is None:
            if self.order is not None or not self.job.one_pass:
                observation = self.whole_pass(self.train.x, self.train.y)
            assert observation is not None, "a schedule measured at a step for which measures() is False"
            factor = self.job.algorithm.critical_factor
            assert factor is not None
            self.measured = Measurement(observation, factor, self.lr, self.order is None)
            self._put("measured_critical_lr", self.measured.critical_lr)
        return self.measured

    def _put(self, column: str, value: float) -> float:
        self.table.put(self.table.rows - 1, column, value)
        return value

    def _show(self) -> None:
        row = self.table.rows - 1
        for column in ("batch_critical_lr", "critical_lr", "measured_critical_lr"):
            if math.isfinite(value := self.table.get(row, column)):
                self.shown_critical = value
                break
        self.bar.show(self.step, self.table.get(row, "loss"), self.lr, self.shown_critical)

    # ---- validation

    def _evaluate(self, data: Dataset) -> Evaluation:
        return evaluate(self.model, data, labels=self.job.labels, chunk=self.job.evaluation_chunk)

    def _validate(self, data: Dataset) -> None:
        found = self._evaluate(data)
        if not math.isfinite(found.loss):
            raise NonFinite(f"validation loss: {found.loss} at step {self.step}")
        self._put("validation_loss", found.loss)
        if found.error is not None:
            self._put("validation_error", found.error)
        improved = self._is_better(found)
        if improved:
            state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = Best(self.step, found.loss, found.error, state)
        for callback in self.job.callbacks:
            callback.on_validation(self.table.records(self.step)[0], self.model, improved)

    def _is_better(self, found: Evaluation) -> bool:
        if self.best is None:
            return True
        if self.job.best_by == "loss":
            return found.loss < self.best.validation_loss
        assert found.error is not None
        assert self.best.validation_error is not None
        return found.error < self.best.validation_error

    def _complete_best(self) -> None:
        """Test the best parameters; the model keeps the final ones."""
        if self.best is None:
            return
        final = {name: value.clone() for name, value in parameters_and_buffers(self.model).items()}
        self.model.load_state_dict(self.best.state_dict)
        try:
            if self.job.data.test is not None:
                found = self._evaluate(self.job.data.test)
                self.best.test_loss, self.best.test_error = found.loss, found.error
            for recorder in self.recording.of_model:
                if recorder.at_best:
                    values = recorder.record(self.recording.step_of(self.best.step))
                    self.best.measures.update(zip(recorder.columns(), map(float, values), strict=True))
        finally:
            restore(self.model, final)

    def _catapult_count(self) -> int | None:
        if self.job.algorithm.critical_factor is None:
            return None
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
            # A row may still be added to as long as its state is held to be observed again.
            settled = max(self.written, self.step - self.recording.held)
            session.append(self.table.records(self.written, settled))
            self.written = settled
        if due:
            session.checkpoint(self._state())

    def _state(self) -> dict[str, Any]:
        """Everything from which the run goes on bit by bit; rows 0 to step - 1 are recorded."""
        return {
            "model": parameters_and_buffers(self.model),
            "update": self.update.state_dict(),
            "order": self.order.state_dict() if self.order is not None else None,
            "schedule": self.schedule_state,
            "recording": self.recording.state_dict(),
            "observer": self.plain_pass.state_dict(),  # the others begin each pass afresh
            "callbacks": self._callback_states(),
            "rows": self.table.records(self.written),
            "engine": self.engine,
            "step": self.step,
            "lr": self.lr,
            "stopped": self.stopped,
            "initial_loss": self.initial_loss,
            "best": vars(self.best) if self.best is not None else None,
            "seconds": self.seconds,
        }

    def _callback_states(self) -> dict[str, Any]:
        """By class, of those that have a state."""
        states: dict[str, Any] = {}
        for callback in self.job.callbacks:
            if (state := callback.state_dict()) is not None:
                name = type(callback).__name__
                if name in states:
                    raise ValueError(f"callbacks: expected one {name} with a state in a run folder, got two")
                states[name] = state
        return states

    def _resume(self) -> None:
        found = self.session.resume() if self.session is not None else None
        if found is None:
            return
        state, records = found
        restore(self.model, state["model"])
        device = self.train.x.device
        self.update.load_state_dict(state["update"])
        if self.order is not None:
            self.order.load_state_dict(state["order"])
        self.schedule_state = state["schedule"]
        self.recording.load_state_dict(state["recording"])
        self.plain_pass.load_state_dict(to_device(state["observer"], device))
        stored = state["callbacks"]
        for callback in self.job.callbacks:
            if type(callback).__name__ in stored:
                callback.load_state_dict(stored.pop(type(callback).__name__))
        if stored:
            raise ValueError(
                f"callbacks: expected also {sorted(stored)}, whose state the interrupted run stored"
            )
        self.step, self.lr, self.stopped = state["step"], state["lr"], state["stopped"]
        self.engine = state.get("engine", "general")  # of runs before there was another one
        self.initial_loss = state["initial_loss"]
        self.best = Best(**to_device(state["best"], device)) if state["best"] is not None else None
        self.seconds = state["seconds"]
        self.table.append_records(records)
        self.written = self.table.rows
        self.table.append_records(state["rows"])
