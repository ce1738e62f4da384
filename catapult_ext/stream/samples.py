"""Samples in blocks: of tensors, or of a loader that is read anew, and lazily, in every pass."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from catapult_ext.observe.inputs import Inputs, check_inputs, count, join, move, take, tensors

__all__ = [
    "Blocks",
    "Loader",
    "LoaderSamples",
    "Part",
    "Samples",
    "TensorSamples",
    "leaves_random_state",
    "samples_of",
    "together",
]

#: A `torch.utils.data.DataLoader`, or anything else that gives the same batches each time it is iterated over.
Loader = Iterable[Any]


P = ParamSpec("P")
R = TypeVar("R")


def leaves_random_state(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of functions that read loaders: a DataLoader without a generator of its own draws from the global one.

    Restored once at the end, also after an exception, and not after each pass: in the next pass a loader that shuffles
    would give the same order again and not be noticed.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.get_rng_state()
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_rng_state(before)

    return call


class Blocks(Protocol):
    """Samples that can be read again and again, always in the same order.

    Attributes:
        count: n.
        bytes_per_sample: of what is read for a block; 0 where it is in memory already.
        bytes_read: of what is read besides, such as a batch of the loader.
    """

    count: int
    bytes_per_sample: int
    bytes_read: int

    def blocks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Inputs]:
        """The samples [first, last) in blocks of `size`, the last one ragged."""


class Samples(Blocks, Protocol):
    """Those of a whole argument."""

    def digest(self) -> str:
        """Hash of all samples, their dtypes and shapes."""


def samples_of(x: Inputs | Loader, device: torch.device, name: str = "x") -> Samples:
    """Tensors as they are, everything else as a loader.

    Raises:
        TypeError, ValueError: neither fits; `name` is what the error calls it.
    """
    if isinstance(x, (Tensor, tuple, Mapping)) or not isinstance(x, Iterable):
        check_inputs(x, device, name)
        return TensorSamples(x)
    return LoaderSamples(x, device, name)


def together(samples: Samples) -> Inputs:
    """All samples at once."""
    return next(samples.blocks(samples.count))


class TensorSamples:
    """Samples of tensors in memory; a block is a view."""

    def __init__(self, x: Inputs) -> None:
        self._x = x
        self.count = count(x)
        self.bytes_per_sample = self.bytes_read = 0

    def blocks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Inputs]:
        """See `Samples`."""
        last = self.count if last is None else last
        for start in range(first, last, size):
            yield take(self._x, slice(start, min(last, start + size)))

    def digest(self) -> str:
        """See `Samples`."""
        return _digest(self._x)


class Part:
    """Some of the samples, [first, last)."""

    def __init__(self, samples: Blocks, first: int, last: int) -> None:
        self._samples, self._first = samples, first
        self.count = last - first
        self.bytes_per_sample, self.bytes_read = samples.bytes_per_sample, samples.bytes_read

    def blocks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Inputs]:
        """See `Samples`."""
        last = self.count if last is None else last
        return self._samples.blocks(size, self._first + first, self._first + last)


class LoaderSamples:
    """Samples of a loader: one pass counts them, and every later pass has to bring the same ones.

    A batch is what the model is called with, or a list or tuple whose first entry is (the targets behind it are not
    read).
    """

    def __init__(self, loader: Loader, device: torch.device, name: str = "x") -> None:
        """Read all batches once.

        Raises:
            TypeError: a batch is no tensor (nor tuple or dict of tensors), or the loader can be read only once.
            ValueError: no batches, or batches whose samples differ in shape.
        """
        if iter(loader) is loader:
            raise TypeError(
                f"{name}: expected a loader that can be read again in every pass, got {type(loader).__name__}, which "
                "can be read once; pass a DataLoader or a list of batches"
            )
        self._loader, self._device, self._name = loader, device, name
        self._digests: list[str] = []
        self.count = self.bytes_per_sample = self.bytes_read = 0
        for x in self._batches():
            self._digests.append(_digest(x))
            self.count += count(x)
            size = sum(part.numel() * part.element_size() for part in tensors(x))
            self.bytes_read = max(self.bytes_read, size)
            self.bytes_per_sample = max(self.bytes_per_sample, size // count(x))
        if not self._digests:
            raise ValueError(f"{name}: expected at least one batch, got a loader without batches")

    def _batches(self) -> Iterator[Inputs]:
        for index, batch in enumerate(self._loader):
            x = batch[0] if isinstance(batch, (list, tuple)) and len(batch) else batch
            x = tuple(x) if isinstance(x, list) else x
            if not isinstance(x, (Tensor, tuple, Mapping)):
                raise TypeError(
                    f"{self._name}: expected a tensor of shape (n, ...), or a tuple or dict of such tensors, got "
                    f"{type(self._loader).__name__}, whose entry {index} is no batch of these but {type(x).__name__}"
                )
            x = move(x, self._device)
            check_inputs(x, self._device, f"{self._name}, batch {index}")
            yield x

    def blocks(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Inputs]:
        """See `Samples`; raises ValueError where a batch is not that of the first pass."""
        held: list[Inputs] = []
        have = 0
        for x in self._within(first, self.count if last is None else last):
            held.append(x)
            have += count(x)
            if have < size:
                continue
            x = join(held)
            for start in range(0, have - size + 1, size):
                yield take(x, slice(start, start + size))
            have %= size
            held = [take(x, slice(count(x) - have, None))] if have else []
        if have:
            yield join(held)

    def _within(self, first: int, last: int) -> Iterator[Inputs]:
        """Those samples [first, last), batch by batch."""
        start = 0
        for x in self._checked():
            stop = start + count(x)
            if stop > first:
                yield take(x, slice(max(0, first - start), last - start))
            start = stop
            if start >= last < self.count:
                return

    def _checked(self) -> Iterator[Inputs]:
        seen = 0
        for index, x in enumerate(self._batches()):
            if index >= len(self._digests) or _digest(x) != self._digests[index]:
                raise self._changed(f"batch {index} differs from the first pass")
            seen += 1
            yield x
        if seen != len(self._digests):
            raise self._changed(f"there are {seen} batches after {len(self._digests)}")

    def _changed(self, what: str) -> ValueError:
        return ValueError(
            f"{self._name}: expected the loader to give the same batches in every pass, but {what}; "
            "use shuffle=False and no random augmentation"
        )

    def digest(self) -> str:
        """See `Samples`."""
        return hashlib.blake2b("".join(self._digests).encode(), digest_size=16).hexdigest()


def _digest(x: Inputs) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in tensors(x):
        total.update(f"{tuple(part.shape)} {part.dtype}".encode())
        total.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
