"""What a case of the catalogue is, and the few words in which networks are written down here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from catapult_ext.observe.inputs import Inputs

__all__ = ["Call", "Case", "Draw", "end", "exact", "integers", "normal", "parts", "quiet", "seq"]

#: Samples of a case: (n, generator) to what its model is called with, floating-point parts in float32.
Draw = Callable[[int, torch.Generator], Inputs]


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings that PyTorch gives for some networks here, whatever is done with them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths", UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # from torch.compile
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
        yield


@dataclass(frozen=True)
class Case:
    """A small network with one thing that a tool may get wrong.

    Attributes:
        name: of the row.
        make: the network, freshly initialised, in the mode in which it is observed.
        draw: its samples.
        matrix: rows of the published comparison of tools that this case is.
        slow: routes of `layer_report` that it may take besides the fast ones.
        coupled: every output depends on every sample, so that a kernel of x with other samples is none of its own.
        refused: what the `UnsupportedModule` says that it is answered with; empty where it has to be exact.
        context: what the engine is called in.
        vary: gains of one and shifts of zero would hide mistakes, so these are drawn at random.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Draw
    matrix: tuple[str, ...] = ()
    slow: frozenset[str] = frozenset()
    coupled: bool = False
    refused: str = ""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    vary: bool = True

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The network from a fixed seed."""
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = self.make()
            for parameter in model.parameters():
                if self.vary and parameter.dim() == 1:
                    nn.init.normal_(parameter, 0.5)
            for name, buffer in model.named_buffers():
                if self.vary and name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
        return model.to(dtype)

    def samples(self, n: int, seed: int, dtype: torch.dtype) -> Inputs:
        """N samples, integer parts as they are."""
        x = self.draw(n, torch.Generator().manual_seed(seed))
        cast = lambda part: part.to(dtype) if part.is_floating_point() else part  # noqa: E731
        if isinstance(x, Tensor):
            return cast(x)
        if isinstance(x, Mapping):
            return {name: cast(part) for name, part in x.items()}
        return tuple(cast(part) for part in x)


class Call(nn.Module):
    """A forward written as a function of `parts`, modules or bare parameters."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))
        self.function = function

    def forward(self, *x: Tensor, **named: Tensor) -> Tensor:
        """See the class."""
        return self.function(self, *x, **named)


def normal(*shape: int) -> Draw:
    """Standard normal samples [n, *shape]."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator)


def integers(high: int, *shape: int) -> Draw:
    """Tokens [n, *shape] below `high`."""
    return lambda n, generator: torch.randint(high, (n, *shape), generator=generator)


def parts(*draws: Draw, **named: Draw) -> Draw:
    """Several tensors, by position or by name."""
    if named:
        return lambda n, generator: {name: draw(n, generator) for name, draw in named.items()}  # type: ignore[misc]
    return lambda n, generator: tuple(draw(n, generator) for draw in draws)  # type: ignore[misc]


def seq(*layers: nn.Module) -> nn.Sequential:
    """Layers one after the other."""
    return nn.Sequential(*layers)


def end(width: int, outputs: int = 1) -> list[nn.Module]:
    """Non-linearity and output layer, so that the layers before them are in the middle of a network."""
    return [nn.Tanh(), nn.Flatten(), nn.Linear(width, outputs)]


def exact(
    name: str,
    make: Callable[[], nn.Module],
    draw: Draw | None = None,
    *matrix: str,
    slow: tuple[str, ...] = (),
    coupled: bool = False,
) -> Case:
    """A case that has to be exact; samples are [n, 32] where nothing else is said."""
    return Case(name, make, draw or normal(32), matrix, frozenset(slow), coupled)
