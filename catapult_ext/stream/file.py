"""A kernel on disk, panel by panel: rows of some samples at a time, taken up again after an interruption.

Beside the file lies another one, `<name>.json`, that says whose kernel it is, which panels are done and whether it is
finished. It is written first, and after each panel once the panel is on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from catapult_ext._version import __version__
from catapult_ext.runs.configuration import first_difference
from catapult_ext.runs.files import read_json, write_json, writing
from catapult_ext.stream.job import Job
from catapult_ext.stream.plan import NTKPlan
from catapult_ext.stream.samples import Part

__all__ = ["KernelFile"]

#: Columns that are turned at a time when a panel is written below the diagonal's mirror.
_TURNED = 256


class KernelFile:
    """One kernel of a job on its way into a .npy file."""

    def __init__(self, job: Job, path: Path, max_bytes: int | None) -> None:
        """Find out what is there already, and plan the rest.

        Raises:
            ValueError: the file belongs to another kernel, or is none of ours; nothing has been changed then.
        """
        self.job, self.path = job, path
        self.notes = path.with_name(path.name + ".json")
        self.fingerprint = _fingerprint(job)
        stored = self._stored(max_bytes)
        self.finished = bool(stored and stored["finished"])
        self.done: list[int] = stored["done"] if stored else []
        if self.finished:
            return
        self.max_bytes: int = stored["max_bytes"] if stored else job.bound(max_bytes)
        self.plan, self.panel = _plan(job, self.max_bytes)
        self.way = {
            "panel": self.panel,
            "block": self.plan.block,
            "passes": self.plan.passes,
            "groups": hashlib.blake2b(repr(self.plan._items).encode(), digest_size=8).hexdigest(),
        }
        if stored and stored["way"] != self.way:
            raise ValueError(
                f"path: {path} was begun otherwise ({first_difference(stored['way'], self.way, 'plan')}), so that "
                f"it cannot go on to the same bits; delete it and {self.notes.name}"
            )

    def _stored(self, max_bytes: int | None) -> dict[str, Any] | None:
        if not self.notes.exists():
            if self.path.exists():
                raise ValueError(
                    f"path: {self.path} exists and is no kernel that was written here (there is no {self.notes.name} "
                    "beside it); choose another path, or delete it"
                )
            return None
        stored: dict[str, Any] = read_json(self.notes)
        different = first_difference(stored["kernel"], self.fingerprint, "kernel")
        if different is None and max_bytes not in (None, stored["max_bytes"]) and not stored["finished"]:
            different = f"max_bytes: stored {stored['max_bytes']}, current {max_bytes}"
        if different is not None:
            raise ValueError(
                f"path: {self.path} holds another kernel ({different}); choose another path, or delete it and "
                f"{self.notes.name}"
            )
        return stored

    @property
    def shape(self) -> tuple[int, int]:
        """Of the kernel."""
        job = self.job
        c = 1 if job.trace else self.plan.outputs
        columns = job.rows if job.columns is None else job.columns
        return job.rows.count * c, columns.count * c

    def write(self, progress: bool) -> None:
        """Compute and write the panels that are missing."""
        if not self.done:
            self._note()
        with self._open() as (file, offset), writing(self.path), self._bar(progress) as bar:
            for index, samples in enumerate(self._panels()):
                if index in self.done:
                    bar(self._samples_of(samples))
                    continue
                self._write_panel(file, offset, samples, self._panel(samples, bar))
                os.fsync(file)
                self.done.append(index)
                self._note()
        self.finished = True
        self._note()

    def _note(self) -> None:
        write_json(
            self.notes,
            {
                "kernel": self.fingerprint,
                "max_bytes": self.max_bytes,
                "way": self.way,
                "done": self.done,
                "finished": self.finished,
            },
        )

    @contextmanager
    def _open(self) -> Iterator[tuple[int, int]]:
        """The file's descriptor and where its numbers begin."""
        dtype = np.dtype(str(self.job.dtype).removeprefix("torch."))
        with writing(self.path):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"path: another process is writing {self.path}") from None
            with writing(self.path):
                if not self.done:
                    with open(self.path, "wb") as fresh:
                        np.lib.format.write_array_header_2_0(
                            fresh, {"descr": dtype.str, "fortran_order": False, "shape": self.shape}
                        )
                with open(self.path, "rb") as header:
                    np.lib.format.read_magic(header)
                    np.lib.format.read_array_header_2_0(header)
                    offset = header.tell()
                os.posix_fallocate(file, 0, offset + self.shape[0] * self.shape[1] * dtype.itemsize)
            yield file, offset
        finally:
            os.close(file)

    # ---- panels

    def _panels(self) -> Iterator[slice]:
        n = self.job.rows.count
        for first in range(0, n, self.panel):
            yield slice(first, min(n, first + self.panel))

    def _samples_of(self, samples: slice) -> int:
        """How many samples go through the network for a panel."""
        columns = self.job.columns
        read = samples.stop if columns is None else samples.stop - samples.start + columns.count
        return read * self.plan.passes

    def _panel(self, samples: slice, bar: Any) -> Tensor:
        """Rows of some samples: all columns of K(x, z); of the symmetric kernel those up to the diagonal."""
        job = self.job
        if not self.plan.streamed:
            return job.compute(self.max_bytes)[0]
        stream = job.stream(self.plan, bar)
        if job.columns is not None:
            return stream.kernels(Part(job.rows, samples.start, samples.stop), job.columns)[0]
        if samples.start == 0:
            return stream.kernels(Part(job.rows, 0, samples.stop), None)[0]
        panel = stream.kernels(Part(job.rows, 0, samples.stop), None, samples)[0]
        diagonal = panel[:, panel.shape[1] - panel.shape[0] :]
        for row in range(1, len(diagonal)):  # rounding makes the two triangles differ
            diagonal[:row, row] = diagonal[row, :row]
        return panel

    def _write_panel(self, file: int, offset: int, samples: slice, panel: Tensor) -> None:
        """Rows of the panel, and as columns of the rows above, which are its mirror image."""
        values = panel.cpu()
        width, size = self.shape[1], values.element_size()
        first = samples.start * (self.shape[0] // self.job.rows.count)

        def put(rows: Tensor, row: int, column: int) -> None:
            for index, entries in enumerate(rows.contiguous().numpy()):
                place, data = offset + ((row + index) * width + column) * size, memoryview(entries).cast("B")
                while data:
                    written = os.pwrite(file, data, place)
                    place, data = place + written, data[written:]

        put(values, first, 0)
        if self.job.columns is None:
            for above in range(0, first, _TURNED):
                put(values[:, above : min(first, above + _TURNED)].t(), above, first)

    @contextmanager
    def _bar(self, enabled: bool) -> Iterator[Any]:
        """What advances a progress bar by a number of samples; nothing shows where there is no terminal."""
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("kernel"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} samples"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        total = sum(self._samples_of(samples) for samples in self._panels())
        task = bar.add_task("", total=total)
        with bar:
            yield lambda samples: bar.advance(task, samples)


def _plan(job: Job, max_bytes: int) -> tuple[NTKPlan, int]:
    """The cheapest plan over sizes of panels, and the size."""
    n = job.rows.count
    best: tuple[float, NTKPlan, int] | None = None
    problem: ValueError | None = None
    panel, waited = n, 0
    while waited < 4:
        try:
            plan = job.plan(max_bytes, None if panel == n else panel)
        except ValueError as error:
            problem = error
        else:
            cost = plan.sweep_flops * -(-n // panel)
            if best is None or cost < best[0]:
                best, waited = (cost, plan, panel), 0
            waited += 1
        if panel == 1:
            break
        panel = -(-panel // 2)
    if best is None:
        assert problem is not None
        raise problem
    return best[1], best[2]


def _fingerprint(job: Job) -> dict[str, Any]:
    """What makes a kernel this one: the model with all its values, the samples, and what is asked for."""
    model = job.state.model
    values = hashlib.blake2b(digest_size=16)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        values.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        values.update(flat.view(torch.uint8).numpy().data)
    modes = [int(module.training) for module in model.modules()]
    return {
        "model": type(model).__qualname__,
        "values": values.hexdigest(),
        "training": hashlib.blake2b(bytes(modes), digest_size=8).hexdigest(),
        "params": job.state.names,
        "x": {"samples": job.rows.count, "digest": job.rows.digest()},
        "z": None if job.columns is None else {"samples": job.columns.count, "digest": job.columns.digest()},
        "outputs": "trace" if job.trace else job.swept_outputs,
        "dtype": str(job.dtype),
        "versions": {"catapult_ext": __version__, "torch": torch.__version__},
    }
