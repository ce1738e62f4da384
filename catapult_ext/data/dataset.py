"""What every loader returns: tensors with a name and a record of where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Dataset", "Split"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and targets of n samples; also a map-style dataset for `torch.utils.data.DataLoader`.

    Attributes:
        x: inputs (n, ...), floating.
        y: targets (n, c), dtype and device of `x`. Never (n,): f - y would broadcast to (n, n).
        name: short name, for tables and run folders.
        info: where the samples come from; anything that JSON can hold. `info["indices"]`, where present,
            lists the row of each sample in its source.

    Raises:
        TypeError: for values that are no tensors, integer tensors, or an `info` that JSON cannot hold.
        ValueError: for shapes, dtypes or devices that do not go together.
    """

    x: Tensor
    y: Tensor
    name: str = "custom"
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument, tensor in (("x", self.x), ("y", self.y)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{argument} must be a floating-point tensor, got {what}")
        if self.x.dim() < 2:
            raise ValueError(f"x must have shape (n, ...) with at least two dimensions, got {_shape(self.x)}")
        if self.y.dim() != 2 or len(self.y) != len(self.x):
            raise ValueError(
                f"y must have shape (n, c) = ({len(self.x)}, c), got {_shape(self.y)}"
                + ("; y[:, None] makes it one output" if self.y.dim() == 1 else "")
            )
        if (self.y.dtype, self.y.device) != (self.x.dtype, self.x.device):
            raise ValueError(
                f"y must have the dtype and device of x, {self.x.dtype} on {self.x.device}; "
                f"got {self.y.dtype} on {self.y.device}"
            )
        try:
            json.dumps(self.info, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"info must hold only what JSON can: {error}") from error
        if "indices" in self.info and len(self.info["indices"]) != len(self.x):
            raise ValueError(
                f'info["indices"] must name the source row of each of the {len(self.x)} samples, '
                f"got {len(self.info['indices'])}"
            )

    def __len__(self) -> int:
        """Number of samples n."""
        return len(self.x)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """`(x[index], y[index])`, as views where PyTorch gives views."""
        return self.x[index], self.y[index]

    def subset(self, indices: Tensor | Sequence[int] | slice) -> Dataset:
        """The samples at `indices` (integers or a slice), in that order, as a data set of their own.

        Raises:
            IndexError: for an index outside 0 ... n - 1.
        """
        n = len(self)
        if isinstance(indices, slice):
            rows = list(range(*indices.indices(n)))
        else:
            rows = torch.as_tensor(indices).tolist() if len(indices) else []
        for row in rows:
            if type(row) is not int or not 0 <= row < n:
                raise IndexError(f"indices must be integers from 0 to {n - 1}, got {row!r}")
        source = self.info.get("indices", range(n))
        index = torch.tensor(rows, dtype=torch.long, device=self.x.device)
        info = {**self.info, "indices": [source[row] for row in rows]}
        return replace(self, x=self.x[index], y=self.y[index], info=info)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dataset:
        """The same samples on another device or in another dtype; shares memory where nothing changes."""
        return replace(self, x=self.x.to(device, dtype), y=self.y.to(device, dtype))


@dataclass(frozen=True, eq=False)
class Split:
    """Training, validation and test samples of one task, without overlap; None where none were asked for."""

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Split:
        """All parts on another device or in another dtype."""
        parts = (self.train, self.validation, self.test)
        return Split(*(None if part is None else part.to(device, dtype) for part in parts))  # type: ignore[arg-type]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
