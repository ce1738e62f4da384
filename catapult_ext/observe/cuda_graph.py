"""A CUDA graph with one side branch, and the guard that finds what cannot be in one before it is captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from catapult_ext.errors import UnsupportedModule

__all__ = ["CudaGraph", "WithoutHost"]

_Result = TypeVar("_Result")

_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPIES = ("aten::copy_", "aten::_to_copy")
_MASKS = (torch.bool, torch.uint8)


class WithoutHost(TorchDispatchMode):
    """Inside, an operation that a replay could not repeat without the host is refused.

    Those are reads of a tensor's values, results whose shape depends on values, and copies between the host and the
    device: a graph would hold the address of host memory that is gone by the time of a replay. Reads of tensors on the
    host count as well: nothing waits there, but a replay goes on with the value of the capture.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation if it is none of these."""
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and not isinstance(args[0], Tensor):
            return args[0]  # a Python number that autograd has saved: modes get it as the number
        self._refuse_reads(name, func, args)
        result = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        # A number in a tensor of its own goes along with the launch.
        if len({tensor.device for tensor in found if tensor.dim() or name in _COPIES}) > 1:
            self._refuse(name, "copies between the host and the device")
        return result

    def _refuse_reads(self, name: str, func: Any, args: tuple[Any, ...]) -> None:
        if torch.Tag.data_dependent_output in func.tags:
            self._refuse(name, "reads the values of a tensor")
        if name in _INDEXED:
            by_values = any(isinstance(i, Tensor) and i.dtype in _MASKS for i in args[1])
        else:
            by_values = torch.Tag.dynamic_output_shape in func.tags
        if by_values:
            self._refuse(name, "has a result whose shape depends on values")

    @staticmethod
    def _refuse(name: str, what: str) -> None:
        raise UnsupportedModule(
            f"model: a step of it cannot be captured, since {name} {what}, for which every replay would need the host; "
            "observe it without a capture"
        )


@contextmanager
def _refused(word: str) -> Iterator[None]:
    """Errors of PyTorch with this word in them say that the model cannot be captured."""
    try:
        yield
    except RuntimeError as error:
        if word not in str(error):
            raise
        raise UnsupportedModule(
            "model: a step of it cannot be captured in a CUDA graph; observe it without a capture. PyTorch says: "
            f"{error}"
        ) from error


class CudaGraph:
    """Captures a function that may run part of its work on a second stream.

    Memory that the function returns, and what it used on the way, belongs to the graph and is the same at each replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._side = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Run the function eagerly, on the stream of the capture, so that libraries have set up what they need."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            outside.wait_stream(self._stream)

    def rehearse(self, function: Callable[[], _Result]) -> _Result:
        """`run`, where an operation that waits for the device is an error: an aborted capture leaves more behind.

        Raises:
            UnsupportedModule: there is one.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            # PyTorch says that it may overlook a wait: the capture does not.
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        try:
            with _refused("synchronizing"):
                return self.run(function)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def record(self, function: Callable[[], _Result]) -> _Result:
        """Capture the function, which does not run yet.

        Raises:
            UnsupportedModule: something in it cannot be captured.
        """
        # A capture that fails leaves its stream as the current one: the outer context brings the caller's back.
        outside = torch.cuda.stream(torch.cuda.current_stream(self._device))
        with _refused("captur"), outside, torch.cuda.graph(self._graph, stream=self._stream):
            return function()

    def replay(self) -> None:
        """Enqueue what was captured on the current stream."""
        self._graph.replay()

    @contextmanager
    def branch(self) -> Iterator[None]:
        """What is enqueued inside needs what is enqueued so far, and runs beside what follows up to `join`."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """What follows needs the branch as well."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)
