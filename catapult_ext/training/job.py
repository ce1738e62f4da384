"""The arguments of one training run, checked, and what follows from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from catapult_ext.data import Dataset, Split
from catapult_ext.runs import describe
from catapult_ext.training.algorithms import Algorithm
from catapult_ext.training.cadence import AroundSpikes
from catapult_ext.training.callbacks import Callback
from catapult_ext.training.evaluation import Labels
from catapult_ext.training.recorders import Recorder
from catapult_ext.training.schedules import Schedule, check_schedule
from catapult_ext.training.stop import Stop
from catapult_ext.training.update import parameters_and_buffers

__all__ = ["Job"]

ENGINES = ("auto", "general", "native", "captured")

# Columns of every run, in this order; those of the validation and of the recorders follow.
COLUMNS: tuple[str, ...] = ("step", "lr", "loss", "train_loss", "measured_critical_lr")


@dataclass(frozen=True)
class Job:
    """See `train` for the fields."""

    model: nn.Module
    data: Split
    algorithm: Algorithm
    schedule: Schedule
    stop: Stop
    recorders: tuple[Recorder, ...]
    probe: Dataset | None
    seed: int
    validate_every: int
    best_by: str
    evaluation_chunk: int
    one_pass: bool
    callbacks: tuple[Callback, ...]
    engine: str
    check_every: int
    columns: tuple[str, ...]
    labels: Labels | None

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        data: Split | Dataset,
        algorithm: Algorithm,
        schedule: Schedule,
        stop: Stop,
        recorders: Sequence[Recorder],
        probe: Dataset | None,
        seed: int,
        validate_every: int | None,
        best_by: str,
        evaluation_chunk: int,
        one_pass: bool | None,
        callbacks: Sequence[Callback],
        engine: str,
    ) -> Job:
        """Check every argument of `train`; errors name the argument, what was expected and what came."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(data, Dataset):
            data = Split(train=data, validation=None, test=None)
        if not isinstance(data, Split):
            raise TypeError(f"data: expected a Split or a Dataset, got {type(data).__name__}")
        if not isinstance(algorithm, Algorithm):
            raise TypeError(f"algorithm: expected one such as GD() or SGD(batch_size), got {algorithm!r}")
        if not isinstance(stop, Stop):
            raise TypeError(f"stop: expected a Stop, got {type(stop).__name__}")
        check_schedule(schedule)
        if schedule.relative_to_critical and algorithm.critical_factor is None:
            raise ValueError(
                f"schedule: expected absolute rates with {type(algorithm).__name__}, which rescales gradients and so "
                f"has no critical rate n c / lambda_1, got {schedule!r}"
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        n = len(data.train)
        for name, part in _parts(data, probe):
            _check_tensors(model, name, part, data.train)
        labels = Labels.of(data.train.y)
        if best_by not in ("loss", "error"):
            raise ValueError(f'best_by: expected "loss" or "error", got {best_by!r}')
        if best_by == "error" and labels is None:
            raise ValueError('best_by: expected "loss", since the targets are no class labels, got "error"')
        if engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
        if engine == "captured" and not _on_cuda(data.train):
            raise ValueError(
                f'engine: expected "auto", "general" or "native" for a model on {data.train.x.device}, got "captured"'
            )
        algorithm.order(n, seed)
        epoch = algorithm.steps_per_epoch(n)
        default = 10 if algorithm.batch_size is None else epoch
        if stop.patience is not None and data.validation is None:
            raise ValueError(
                f"patience: expected a validation set to go by, got none (patience={stop.patience})"
            )
        for name, value in (("validate_every", validate_every), ("evaluation_chunk", evaluation_chunk)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        recorders = tuple(recorders)
        _check_recorders(recorders, algorithm, data.train, probe)
        dense = [r.every for r in recorders if isinstance(r.every, AroundSpikes)]
        _check_memory(model, dense)
        if one_pass and dense:
            raise ValueError(
                "one_pass: expected None or False with AroundSpikes, which observes steps again, got True"
            )
        callbacks = tuple(callbacks)
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks: expected Callback objects, got {type(callback).__name__}")
        columns = COLUMNS
        if data.validation is not None:
            columns += ("validation_loss",) if labels is None else ("validation_loss", "validation_error")
        columns += tuple(column for recorder in recorders for column in recorder.columns())
        if len(set(columns)) < len(columns):
            twice = sorted({c for c in columns if columns.count(c) > 1})
            raise ValueError(f"recorders: expected different columns, got {twice} more than once")
        return cls(
            model=model,
            data=data,
            algorithm=algorithm,
            schedule=schedule,
            stop=stop,
            recorders=recorders,
            probe=probe,
            seed=seed,
            validate_every=validate_every or default,
            best_by=best_by,
            evaluation_chunk=evaluation_chunk,
            one_pass=not dense if one_pass is None else one_pass,
            callbacks=callbacks,
            engine=engine,
            check_every=stop.every or epoch,
            columns=columns,
            labels=labels,
        )

    @property
    def captured(self) -> bool:
        """Whether passes are replays of CUDA graphs."""
        return self.engine == "captured"

    @functools.cached_property
    def described(self) -> dict[str, Any]:
        """All that decides the numbers of the run, as plain values; tensors by checksum."""
        parameters = [
            [n, list(p.shape), str(p.dtype), p.requires_grad] for n, p in self.model.named_parameters()
        ]
        buffers = [[n, list(b.shape), str(b.dtype)] for n, b in self.model.named_buffers()]
        fields: tuple[str, ...] = (
            *("algorithm", "schedule", "stop", "recorders", "seed"),
            *("validate_every", "best_by", "evaluation_chunk", "one_pass"),
        )
        # What "auto" takes follows from the rest, so that runs from before there was a choice are known again.
        if self.engine != "auto":
            fields += ("engine",)
        return {
            **{name: describe(getattr(self, name), name) for name in fields},
            "model": {"type": type(self.model).__name__, "parameters": parameters, "buffers": buffers},
            "data": {name: _described_set(part) for name, part in _parts(self.data, self.probe)},
        }


def _parts(data: Split, probe: Dataset | None) -> list[tuple[str, Dataset]]:
    """The sets of a run under the names that errors use; those that are there."""
    named = {
        "data.train": data.train,
        "data.validation": data.validation,
        "data.test": data.test,
        "probe": probe,
    }
    return [(name, part) for name, part in named.items() if part is not None]


def _on_cuda(data: Dataset) -> bool:
    return data.x.is_cuda


def _described_set(data: Dataset) -> dict[str, Any]:
    return {"name": data.name, "x": describe(data.x, "x"), "y": describe(data.y, "y")}


def _check_tensors(model: nn.Module, name: str, data: Dataset, train: Dataset) -> None:
    if not isinstance(data, Dataset):
        raise TypeError(f"{name}: expected a Dataset, got {type(data).__name__}")
    if len(data) == 0:
        raise ValueError(f"{name}: expected at least one sample, got 0")
    if data.x.shape[1:] != train.x.shape[1:] or data.y.shape[1:] != train.y.shape[1:]:
        raise ValueError(
            f"{name}: expected samples shaped like the training set's, {tuple(train.x.shape[1:])} and "
            f"{tuple(train.y.shape[1:])}, got {tuple(data.x.shape[1:])} and {tuple(data.y.shape[1:])}"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model: expected at least one parameter, got none")
    for part, tensor in (("x", data.x), ("y", data.y)):
        if tensor.device != parameter.device or tensor.dtype != parameter.dtype:
            raise ValueError(
                f"{name}.{part}: expected the model's {parameter.dtype} on {parameter.device}, got "
                f"{tensor.dtype} on {tensor.device}"
            )


def _check_recorders(
    recorders: Sequence[Recorder], algorithm: Algorithm, train: Dataset, probe: Dataset | None
) -> None:
    for recorder in recorders:
        if not isinstance(recorder, Recorder):
            raise TypeError(f"recorders: expected Recorder objects, got {type(recorder).__name__}")
        rows = (train if probe is None else probe).y.numel()
        if recorder.observes == "set" and recorder.eigenpairs > rows:
            raise ValueError(f"k: expected at most the {rows} kernel rows, got {recorder.eigenpairs}")
    observers_of_sets = [type(r).__name__ for r in recorders if r.observes == "set"]
    if probe is None and algorithm.batch_size is not None and observers_of_sets:
        raise ValueError(
            f"probe: expected a Dataset for {observers_of_sets[0]}, since its steps see batches only; "
            "probe=data.train observes the whole training set"
        )
    if probe is not None and not observers_of_sets:
        raise ValueError("probe: expected a recorder that observes it, such as Spectrum(), got none")


def _check_memory(model: nn.Module, cadences: Sequence[AroundSpikes]) -> None:
    """Copies of the parameters and buffers have to fit into the bound of each cadence that keeps them."""
    size = sum(t.numel() * t.element_size() for t in parameters_and_buffers(model).values())
    for every in cadences:
        if (every.before + 1) * size > every.max_bytes:
            raise ValueError(
                f"max_bytes: expected at least {(every.before + 1) * size} bytes for {every.before + 1} copies of the "
                f"model, got {every.max_bytes}; before={max(0, every.max_bytes // size - 1)} fits"
            )
