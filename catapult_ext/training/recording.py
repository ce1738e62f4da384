"""Hands passes to the recorders at the steps that their cadences name, some of them afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from catapult_ext.errors import NonFinite
from catapult_ext.observe import Observation, Observer
from catapult_ext.training.cadence import AroundSpikes, is_due
from catapult_ext.training.history import MetricsTable
from catapult_ext.training.job import Job
from catapult_ext.training.recorders import CATAPULT_MARGIN, Recorder, Step
from catapult_ext.training.ring import StateRing

__all__ = ["ColdObserver", "Recording"]


class ColdObserver:
    """An Observer whose numbers are a function of model and data alone.

    Otherwise the last bits of a record would depend on which steps were recorded before it, as large
    eigenproblems begin with the vectors of the pass before, and on what was read first, as lambda_1 comes from
    the eigenpairs where these are known.

    Args:
        model: To observe.
        pairs: Eigenpairs that will be read; 0: none, but the norm of the kernel may be.
        captured: Replay passes as CUDA graphs.
    """

    def __init__(self, model: nn.Module, pairs: int, *, captured: bool) -> None:
        self._pairs = pairs
        self._observer = Observer(model, k=max(1, pairs), captured=captured)
        self._cold = self._observer.state_dict()

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> Observation:
        """One pass."""
        self._observer.load_state_dict(self._cold)
        seen = self._observer(x, y)
        if self._pairs:
            _ = seen.eigen
        seen.check()  # its numbers are read on the host next
        return seen


class Recording:
    """The recorders of one run and what they have seen.

    Args:
        job: The run.
        table: Where numbers go; row t is that of step t.
    """

    def __init__(self, job: Job, table: MetricsTable) -> None:
        self._job, self._table, self._model = job, table, job.model
        self.of_batch, self._of_set, self.of_model = (
            [r for r in job.recorders if self._pass_of(r) == name] for name in ("batch", "set", None)
        )
        pairs = max((r.eigenpairs for r in self.of_batch), default=0)
        if job.algorithm.batch_size is None:
            pairs = max(pairs, job.schedule.eigenpairs)
        self.batch_pass = ColdObserver(self._model, pairs, captured=job.captured)
        probed = max((r.eigenpairs for r in self._of_set), default=0)
        self._probe_pass = ColdObserver(self._model, probed, captured=job.captured)
        self._dense_until = {r.every: -1 for r in job.recorders if isinstance(r.every, AroundSpikes)}
        # The step at which a spike is seen has been made when it can be observed: one state more than before it.
        self.held = max((every.before + 1 for every in self._dense_until), default=0)
        self._ring = StateRing(self._model, self.held) if self.held else None
        self._kept: dict[str, dict[int, torch.Tensor]] = {}

    def _pass_of(self, recorder: Recorder) -> str | None:
        # With GD and no probe, the pass over the batch is the one over the set.
        shared = recorder.observes == "set" and self._job.probe is None
        return "batch" if shared else recorder.observes

    # ---- as the steps are made

    def _due(self, recorder: Recorder, t: int) -> bool:
        every = recorder.every
        return is_due(every, t) or (isinstance(every, AroundSpikes) and t <= self._dense_until[every])

    def wants_batch(self, t: int) -> bool:
        """Whether step t needs a pass over its batch with the kernel."""
        return any(self._due(r, t) for r in self.of_batch)

    def record_batch(
        self, t: int, observation: Observation | None, lr: float, indices: torch.Tensor | None
    ) -> None:
        """Record what observes the batch of update t."""
        for recorder in self.of_batch:
            if self._due(recorder, t):
                self._record(recorder, t, lr, indices, observation)

    def record_stretch(self, t: int, lr: np.ndarray, critical_lr: np.ndarray) -> None:
        """Record the batches of updates t, t + 1, ... from b / lambda_1 of each, NaN where it was not asked for.

        The recorder of the batch, if there is one, is `BatchCriticalRate`.
        """
        factor = self._job.algorithm.critical_factor
        critical_lr = critical_lr * (np.nan if factor is None else factor)
        for recorder in self.of_batch:
            catapult = np.where(np.isnan(critical_lr), np.nan, lr - critical_lr > CATAPULT_MARGIN)
            for column, values in zip(recorder.columns(), (critical_lr, catapult), strict=True):
                self._table.put_all(t, column, values)

    def wants_parameters(self, t: int) -> bool:
        """Whether something observes the parameters before update t, or the probe with them."""
        return any(self._due(r, t) for r in (*self.of_model, *self._of_set))

    def record_parameters(self, t: int, *, last: bool) -> None:
        """Record what observes the parameters before update t or the probe; all of it in the last row."""
        for recorder in self.of_model:
            if last or self._due(recorder, t):
                self._record(recorder, t)
        due = [r for r in self._of_set if last or self._due(r, t)]
        if due:
            self._record_probe(due, t)

    def record_last_pass(self, t: int) -> None:
        """GD's last row: there is no update, but the spectrum of the final parameters is recorded."""
        due = [r for r in self.of_batch if r.observes == "set"]
        if due:
            train = self._job.data.train
            observation = self.batch_pass(train.x, train.y)
            for recorder in due:
                self._record(recorder, t, observation=observation)

    def _record_probe(self, recorders: Iterable[Recorder], t: int) -> None:
        probe = self._job.probe
        assert probe is not None
        observation = self._probe_pass(probe.x, probe.y)
        for recorder in recorders:
            self._record(recorder, t, observation=observation)

    def _record(
        self,
        recorder: Recorder,
        t: int,
        lr: float | None = None,
        indices: torch.Tensor | None = None,
        observation: Observation | None = None,
    ) -> None:
        step = self.step_of(t, lr, indices, observation)
        for column, value in zip(recorder.columns(), recorder.record(step), strict=True):
            self._table.put(t, column, value)

    def step_of(
        self,
        t: int,
        lr: float | None = None,
        indices: torch.Tensor | None = None,
        observation: Observation | None = None,
    ) -> Step:
        """What a recorder gets to see."""

        def keep(name: str, tensor: torch.Tensor) -> None:
            self._kept.setdefault(name, {})[t] = tensor.detach().to("cpu", copy=True)

        factor = self._job.algorithm.critical_factor
        return Step(t, self._model, self._job.data, keep, factor, lr, indices, observation)

    # ---- afterwards

    def push(self, t: int, lr: float, indices: torch.Tensor | None) -> None:
        """Remember what update t starts from, before it is made."""
        if self._ring is not None:
            recorded = [i for i, recorder in enumerate(self._job.recorders) if self._due(recorder, t)]
            self._ring.push(t, lr, indices, recorded)

    def look_back(self, t: int, *, diverged: bool = False) -> None:
        """When the loss of step t is in a spike, record the steps before it; on divergence what is finite."""
        if self._ring is None:
            return
        losses = self._table.column("loss")[: t + 1]
        spiked = [every for every in self._dense_until if diverged or every.sees_spike(losses)]
        missing: dict[int, list[Recorder]] = {}
        for every in spiked:
            self._dense_until[every] = t + every.after
            for state in self._ring:
                for number, recorder in enumerate(self._job.recorders):
                    if (
                        recorder.every == every
                        and state.step >= t - every.before
                        and number not in state.recorded
                    ):
                        missing.setdefault(state.step, []).append(recorder)
                        state.recorded.append(number)
        try:
            for state in self._ring.visit([state for state in self._ring if state.step in missing]):
                self._record_again(missing[state.step], state.step, state.lr, state.indices)
        except NonFinite:
            if not diverged:
                raise

    def _record_again(
        self, recorders: list[Recorder], t: int, lr: float, indices: torch.Tensor | None
    ) -> None:
        of_batch, of_set, of_model = (
            [r for r in recorders if self._pass_of(r) == name] for name in ("batch", "set", None)
        )
        if of_batch:
            train = self._job.data.train
            x = train.x if indices is None else train.x.index_select(0, indices)
            y = train.y if indices is None else train.y.index_select(0, indices)
            observation = self.batch_pass(x, y)
            for recorder in of_batch:
                self._record(recorder, t, lr, indices, observation)
        if of_set:
            self._record_probe(of_set, t)
        for recorder in of_model:
            self._record(recorder, t)

    # ---- what is left

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What recorders kept: by name the steps, (m,) int64, and the values, (m, ...)."""
        return {
            name: {
                "steps": torch.tensor(sorted(by_step)),  # (m,)
                "values": torch.stack([by_step[t] for t in sorted(by_step)]),  # (m, ...)
            }
            for name, by_step in self._kept.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Ring, cadences under way and kept tensors."""
        return {
            "dense_until": list(self._dense_until.values()),
            "ring": None if self._ring is None else self._ring.state_dict(),
            "kept": {
                name: {"steps": list(by_step), "values": list(by_step.values())}
                for name, by_step in self._kept.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._dense_until = dict(zip(self._dense_until, state["dense_until"], strict=True))
        if self._ring is not None:
            self._ring.load_state_dict(state["ring"], self._job.data.train.x.device)
        self._kept = {
            name: dict(zip(kept["steps"], kept["values"], strict=True))
            for name, kept in state["kept"].items()
        }
