"""The update of a step: in place where the rule is plain, through `torch.optim` elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from catapult_ext.observe import Observation
from catapult_ext.training.algorithms import Algorithm

__all__ = ["Update"]


class Update:
    """Applies an algorithm's rule to a model and holds the state of its optimizer.

    `.grad` of the parameters is left as it was found.
    """

    def __init__(self, algorithm: Algorithm, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = algorithm.optimizer(self._parameters)

    def step_(self, observation: Observation, lr: float) -> None:
        """One step along the gradient of the observation."""
        optimizer = self._optimizer
        if optimizer is None:
            observation.step_(lr)
            return
        for group in optimizer.param_groups:
            group["lr"] = lr
        found = [p.grad for p in self._parameters]
        observation.assign_grads_()
        optimizer.step()
        for parameter, gradient in zip(self._parameters, found, strict=True):
            parameter.grad = gradient

    def state_dict(self) -> dict[str, Any] | None:
        """What the optimizer has accumulated, by the parameter's number; its settings are the algorithm's."""
        if self._optimizer is None:
            return None
        return {str(number): entry for number, entry in self._optimizer.state_dict()["state"].items()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from `state_dict`; tensors move to the device of their parameter."""
        if self._optimizer is None or state is None:
            return
        accumulated = {int(number): entry for number, entry in state.items()}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": accumulated, "param_groups": groups})


@torch.no_grad()
def restore(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the values of `parameters_and_buffers` back in place."""
    for name, value in parameters_and_buffers(model).items():
        value.copy_(tensors[name])


def parameters_and_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, shared ones once; unlike `state_dict` also buffers that are not persistent."""
    return {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}


def to_device(tree: Any, device: torch.device) -> Any:
    """A tree of dicts with its tensors on a device."""
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {name: to_device(value, device) for name, value in tree.items()}
    return tree
