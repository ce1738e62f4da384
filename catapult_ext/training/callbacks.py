"""The caller's own code at the events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from catapult_ext.training.history import History

__all__ = ["Callback"]


class Callback:
    """Base of all callbacks: `train` calls these methods; each does nothing unless overridden.

    A row is the numbers known of a step, by column of `History.metrics`, columns without a number left out.
    The model is not to be changed. An exception ends the run and reaches the caller of `train`; with a run
    folder the run can then be resumed from its last checkpoint. A run that is loaded because it is finished
    calls nothing.
    """

    def on_start(self, model: nn.Module, step: int) -> None:
        """Before the first update of this process: number `step`, 0 unless the run was resumed."""

    def on_step(self, row: Mapping[str, float], model: nn.Module) -> bool | None:
        """After an update; the row is that of the update, the model holds the parameters after it.

        Returns:
            True ends the run as "stopped", its last row describing these parameters.
        """
        return None

    def on_validation(self, row: Mapping[str, float], model: nn.Module, improved: bool) -> None:
        """After a validation, before the update of its step; `improved`: these parameters are the best so far."""

    def on_end(self, history: History) -> None:
        """After the last row; the model holds the final parameters."""

    def state_dict(self) -> Any:
        """What a resumed run needs: a tree of dicts, lists, tensors and JSON scalars; None: nothing.

        A resumed run finds it by the name of the class.
        """
        return None

    def load_state_dict(self, state: Any) -> None:
        """Go on from `state_dict`; called before `on_start`."""
