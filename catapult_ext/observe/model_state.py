"""What an observation must leave as it found it: parameters, buffers, random state; and what it may read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from catapult_ext import _C
from catapult_ext.errors import UnsupportedModule
from catapult_ext.observe.inputs import Inputs

__all__ = ["ModelState", "select_parameters"]


def select_parameters(model: nn.Module, params: Iterable[str | Tensor] | None) -> dict[str, nn.Parameter]:
    """The parameters to observe by name: all that require grad, or the given names or tensors.

    Raises:
        TypeError: `model` is no module, or `params` is one string or holds something else.
        ValueError: an unknown name, a tensor that is no parameter of the model, or none left.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    else:
        if isinstance(params, (str, Tensor)):
            raise TypeError("params: expected an iterable of names or parameters, got a single one")
        names_of = {id(p): name for name, p in named.items()}
        chosen = {}
        for entry in params:
            name = entry if isinstance(entry, str) else names_of.get(id(entry))
            if name is None or name not in named:
                shown = (
                    repr(entry) if isinstance(entry, str) else "a tensor that is no parameter of the model"
                )
                raise ValueError(f"params: expected parameters of the model, got {shown}")
            if not named[name].requires_grad:
                raise ValueError(f"params: {name} does not require grad")
            chosen[name] = named[name]
    if not chosen:
        raise ValueError("model: expected at least one parameter that requires grad, found none")
    return chosen


def _is_compiled(model: nn.Module) -> bool:
    optimized = torch._dynamo.OptimizedModule if "torch._dynamo" in _loaded() else ()
    return any(
        isinstance(module, optimized) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _loaded() -> dict[str, object]:
    import sys

    return sys.modules  # type: ignore[return-value]


class ModelState:
    """Parameters and buffers of one model, listed once; listing them at each step would cost more than a step."""

    def __init__(self, model: nn.Module, params: Iterable[str | Tensor] | None) -> None:
        chosen = select_parameters(model, params)
        self.model = model
        self.names = list(chosen)
        self.every = list(model.named_parameters())
        self.parameters: list[Tensor] = list(chosen.values())
        self._fixed = [(name, p) for name, p in self.every if not p.requires_grad] if params is None else []
        self._members = [
            (path, holder, dict(holder))
            for path, module in model.named_modules()
            for holder in (module._parameters, module._modules)
        ]
        self.buffers = self._buffers()
        for path, module in model.named_modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                raise UnsupportedModule(
                    f"model: {path or 'the model'} renormalises its weight in place in the forward (max_norm), so that "
                    "an observation would change it; set max_norm to None and call torch.renorm after each step"
                )
        self.compiled = _is_compiled(model)
        first = self.parameters[0]
        self.dtype, self.device = first.dtype, first.device
        if self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"model: expected float32 or float64 parameters, got {self.dtype}")
        for name, parameter in chosen.items():
            if parameter.dtype != self.dtype or parameter.device != self.device:
                raise TypeError(
                    f"model: expected parameters of one dtype and device, got {self.dtype} on {self.device} and "
                    f"{parameter.dtype} on {parameter.device} ({name})"
                )

    def find_buffers(self) -> None:
        """List the buffers anew where one of them is no longer there."""
        if not all([module._buffers.get(name) is buffer for module, name, buffer in self.buffers]):
            self.buffers = self._buffers()

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def check_members(self) -> None:
        """Whether the model still consists of the parameters and submodules that it had.

        A pass needs it where it meets a graph for the first time: another parameter is another leaf.

        Raises:
            ValueError: one was replaced, added or removed, or trains now and did not.
        """
        for name, parameter in self._fixed:
            if parameter.requires_grad:
                raise ValueError(
                    f"model: {name} requires grad now and did not when the Observer was made; make a new Observer"
                )
        for path, holder, held in self._members:
            changed = [
                name for name in {**held, **holder} if holder.get(name, self) is not held.get(name, self)
            ]
            if changed:
                raise ValueError(
                    f"model: {path + '.' if path else ''}{changed[0]} was replaced, added or removed since the "
                    "Observer was made; make a new Observer"
                )

    def forward(self, x: Inputs) -> Tensor:
        """Run the model with gradients enabled, eagerly even where it is compiled."""
        if not self.compiled:
            if torch.is_grad_enabled():
                return self._call(x)
            with torch.enable_grad():
                return self._call(x)
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            return self._call(x)

    def _call(self, x: Inputs) -> Tensor:
        output: Tensor
        if isinstance(x, Tensor):
            output = self.model(x)
        elif isinstance(x, tuple):
            output = self.model(*x)
        else:
            output = self.model(**x)
        return output

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """A forward inside writes to copies of the buffers, so that another one after it finds them as this one did.

        Copies, since restoring values would change tensors that the graph of the forward has saved.
        """
        copies = {id(buffer): buffer.clone() for _, _, buffer in self.buffers}
        for module, name, buffer in self.buffers:
            module._buffers[name] = copies[id(buffer)]
        try:
            yield
        finally:
            for module, name, buffer in self.buffers:
                module._buffers[name] = buffer

    def untouched(self) -> Untouched:
        """Context that restores buffers and random state on exit, also when an exception passes through."""
        return Untouched(self)


class Untouched:
    """Restores what a forward changes; a class, since a generator-based context costs more than it does.

    Entering gives a list that holds, after the block, (buffer, value that the forward gave it) for each buffer
    that the forward changed: what a training step commits.
    """

    __slots__ = ("_before", "_committed", "_generator", "_random", "_state", "_versions")

    def __init__(self, state: ModelState) -> None:
        self._state = state

    def __enter__(self) -> list[tuple[Tensor, Tensor]]:
        state = self._state
        if torch.is_autocast_enabled(state.device.type):
            raise UnsupportedModule(
                "model: autocast is enabled, and a kernel of mixed precisions would be approximate; observe outside "
                "of torch.autocast"
            )
        state.find_buffers()
        self._before = [buffer.clone() for _, _, buffer in state.buffers]
        self._versions = [parameter._version for _, parameter in state.every]
        self._generator = _generator(state.device)
        self._random = self._generator.get_state()
        self._committed: list[tuple[Tensor, Tensor]] = []
        return self._committed

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        before, now = (
            self._random,
            self._generator.get_state(),
        )  # [bytes] on the CPU, also for CUDA generators
        drew = not _C.same_bytes(before.data_ptr(), now.data_ptr(), before.numel())
        if drew:
            self._generator.set_state(before)
        if self._before:
            with torch.no_grad():
                self._restore_buffers()
        if kind is not None:
            return
        for (name, parameter), version in zip(self._state.every, self._versions, strict=True):
            if parameter._version != version:
                raise UnsupportedModule(
                    f"model: its forward wrote to the parameter {name}, which cannot be undone; change parameters "
                    "outside of the forward"
                )
        if drew:
            raise UnsupportedModule(
                "model: its forward draws random numbers (dropout in training mode?), so that its kernel is that of "
                "another network at every call; call model.eval(), or set the dropout rates to 0"
            )

    def _restore_buffers(self) -> None:
        # By value: batch_norm writes its running statistics without advancing their version counters.
        for (module, name, buffer), old in zip(self._state.buffers, self._before, strict=True):
            now = module._buffers[name]
            if now is not buffer:  # the forward assigned a new tensor
                module._buffers[name] = buffer
                if now is not None and now.shape == buffer.shape:
                    self._committed.append((buffer, now.clone()))
            if not torch.equal(buffer, old):
                if now is buffer:
                    self._committed.append((buffer, buffer.clone()))
                buffer.copy_(old)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
