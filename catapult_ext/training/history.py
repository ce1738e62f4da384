"""What a run leaves: the metrics of every step, the result, the best parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from catapult_ext.runs import RunResult

__all__ = ["Best", "History", "MetricsTable"]

# Every other column holds float64 with NaN where nothing was recorded.
_DTYPES = {"step": "int64", "catapult": "boolean"}


@dataclass
class Best:
    """The parameters with the best validation, the first of equals.

    Attributes:
        step: Updates made before they were reached.
        validation_loss: Mean squared error over all entries of the validation set.
        validation_error: Share of wrong classes; None when the task is no classification.
        test_loss: The same on the test set; None without one, or while the run is under way.
        test_error: The same.
        measures: What recorders with `at_best` say of these parameters, by column name.
        state_dict: For `model.load_state_dict`; tensors on the model's device, copies.
    """

    step: int
    validation_loss: float
    validation_error: float | None
    state_dict: dict[str, torch.Tensor]
    test_loss: float | None = None
    test_error: float | None = None
    measures: dict[str, float] = field(default_factory=dict)


@dataclass
class History:
    """The outcome of `train`.

    Attributes:
        metrics: One row per step. Row t describes the parameters before update t and that update: `step`;
            `lr`; `loss`, the mean loss that the update saw (GD: the training set, SGD: the batch);
            `train_loss` of the whole training set; `measured_critical_lr` that a relative schedule measured
            at this step; `validation_loss`, `validation_error`; the recorders' columns. The last row
            describes the final parameters: no update, so no `lr`, and with SGD no `loss`. NaN (for
            `catapult`: NA) stands where nothing was recorded. A diverged run ends with the row that diverged.
        result: "converged", "max_steps", "no_improvement" (`Stop(patience=...)`), "stopped" (by a callback) or
            "diverged".
        best: At the best validation; None without a validation set.
        catapult_count: Steps before the best validation (without validation: all steps) whose rate exceeds
            the critical rate of the batch by more than 1e-8. None unless `BatchCriticalRate()` recorded every
            step.
        config: What `train` was given, as plain values.
        seconds: Time spent in the loop, over all interruptions.
        engine: What made the updates: "general", "native" or "captured", see `train`.
        tensors: What recorders kept, by name: "steps", (m,) int64, and "values", (m, ...); on the CPU.
    """

    metrics: pd.DataFrame
    result: str
    best: Best | None
    catapult_count: int | None
    config: dict[str, Any]
    seconds: float
    engine: str = "general"
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def to_result(self, final_state: dict[str, torch.Tensor]) -> RunResult:
        """The parts as a run folder stores them; `final_state` are the parameters and buffers at the end."""
        summary = {
            "result": self.result,
            "catapult_count": self.catapult_count,
            "seconds": self.seconds,
            "engine": self.engine,
            "config": self.config,
            "best": None,
        }
        if (best := self.best) is not None:
            summary["best"] = {name: value for name, value in vars(best).items() if name != "state_dict"}
        tensors = {
            "final": final_state,
            "best": best.state_dict if best else None,
            "recorded": self.tensors,
        }
        return RunResult(self.metrics, tensors, summary)

    @classmethod
    def from_result(cls, stored: RunResult, device: torch.device | str = "cpu") -> History:
        """The history of a finished run, from `RunFolder.read()`."""
        summary = stored.summary
        best = None
        if summary["best"] is not None:
            state = {name: value.to(device) for name, value in stored.tensors["best"].items()}
            best = Best(state_dict=state, **summary["best"])
        return cls(
            metrics=stored.metrics,
            result=summary["result"],
            best=best,
            catapult_count=summary["catapult_count"],
            config=summary["config"],
            seconds=summary["seconds"],
            engine=summary.get("engine", "general"),  # runs before there was another one
            tensors=stored.tensors.get("recorded", {}),  # runs before recorders could keep tensors
        )


class MetricsTable:
    """Rows of numbers under fixed column names; setting one costs a tenth of a microsecond.

    Numbers that are not finite count as not recorded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._at = {name: i for i, name in enumerate(self.names)}
        self.rows = 0
        self._data = np.empty((1024, len(names)))

    def begin_row(self) -> None:
        """Add a row in which nothing is known yet."""
        if self.rows == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self.rows] = math.nan
        self.rows += 1

    def put(self, row: int, column: str, value: float) -> None:
        """Set one number."""
        self._data[row, self._at[column]] = value

    def put_all(self, first: int, column: str, values: np.ndarray) -> None:
        """Set one column of rows first, first + 1, ..."""
        self._data[first : first + len(values), self._at[column]] = values

    def get(self, row: int, column: str) -> float:
        """One number; NaN for a column that is not there."""
        return float(self._data[row, self._at[column]]) if column in self._at else math.nan

    def append_records(self, records: list[dict[str, Any]]) -> None:
        """Add what `records` gave."""
        for record in records:
            self.begin_row()
            for name, value in record.items():
                self.put(self.rows - 1, name, value)

    def records(self, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
        """The rows from `start` on, up to `stop`, as JSON objects without what is not known."""
        result = []
        for row in self._data[start : self.rows if stop is None else stop].tolist():
            record: dict[str, Any] = {n: v for n, v in zip(self.names, row, strict=True) if math.isfinite(v)}
            for name, dtype in _DTYPES.items():
                if name in record:
                    record[name] = int(record[name]) if dtype == "int64" else bool(record[name])
            result.append(record)
        return result

    def column(self, name: str) -> np.ndarray:
        """One column, (rows,) float64, NaN where nothing was recorded."""
        return self._data[: self.rows, self._at[name]]

    def frame(self) -> pd.DataFrame:
        """All rows."""
        data = self._data[: self.rows].copy()
        data[~np.isfinite(data)] = np.nan
        frame = pd.DataFrame(data, columns=list(self.names))
        for name, dtype in _DTYPES.items():
            if name in frame:
                column = frame[name]
                frame[name] = column.astype(dtype) if dtype == "int64" else _booleans(column)
        return frame


def _booleans(column: pd.Series) -> pd.Series:
    """Nullable booleans from 0, 1 and NaN."""
    values = column.to_numpy()
    missing = np.isnan(values)
    return pd.Series(pd.arrays.BooleanArray(np.where(missing, 0, values).astype(bool), missing))
