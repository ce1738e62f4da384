"""A peer in a process of its own: what it imports, prints and breaks stays there, and it may take too long."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

import torch
from torch import Tensor

from python_experiments.coverage.cases import case_of
from python_experiments.coverage.ours import SAMPLES
from python_experiments.coverage.peers import PEERS, NotApplicable

__all__ = ["Answer", "PeerProcess"]

#: Seconds for one case, and for the first one, which imports the tool.
LIMIT, FIRST_LIMIT = 20.0, 40.0

_MESSAGE = 400  # characters of an error that are kept


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        kernel: as `Peer.kernel`, None where there is none.
        message: why there is none.
        applicable: False: the tool itself was never asked.
        late: it has not answered in time.
    """

    kernel: Tensor | None
    message: str
    applicable: bool = True
    late: bool = False


class PeerProcess:
    """A context manager that owns the process, which is started when it is first asked and again after it was ended.

    Args:
        name: of the peer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, case: str, dtype: torch.dtype, limit: float | None = None) -> Answer:
        """The kernel of a case; no exception of the tool comes out.

        Args:
            case: as `case_of` takes it.
            dtype: of its network.
            limit: seconds, `LIMIT` or `FIRST_LIMIT` where nothing is said.
        """
        first = self._process is None
        if self._process is None or self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self.name, theirs), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((case, dtype))
            seconds = limit or (FIRST_LIMIT if first else LIMIT)
            if not self._pipe.poll(seconds):
                self._end()
                return Answer(None, f"no answer within {seconds:g} s", late=True)
            kernel, message, applicable = self._pipe.recv()
        except (EOFError, OSError):
            self._end()
            return Answer(None, "its process ended")
        return Answer(None if kernel is None else torch.from_numpy(kernel), message, applicable)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _serve(name: str, pipe: Connection) -> None:
    """Answer until the other end is closed, without a word on the terminal."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        try:
            asked, dtype = pipe.recv()
        except EOFError:
            return
        case = case_of(asked)
        try:
            with case.context():
                kernel = PEERS[name].kernel(case.model(dtype), case.samples(SAMPLES, 8, dtype))
            pipe.send((kernel.detach().double().numpy(), "", True))
        except NotApplicable as error:
            pipe.send((None, _first_lines(str(error)), False))
        except Exception as error:  # whatever it is: this is what the tool says
            pipe.send((None, _first_lines(f"{type(error).__name__}: {error}"), True))


def _first_lines(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _MESSAGE else words[: _MESSAGE - 3] + "..."
