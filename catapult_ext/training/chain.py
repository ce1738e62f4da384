"""The native engine: stretches of SGD steps of a chain of Linear layers, each stretch one call of `ops.chain_sgd_`.

At the batch sizes of the paper a step of a small network costs more in the interpreter than in arithmetic. Nothing
here is another trainer: the loop decides, measures and records as ever, and only the updates between two of its
decisions are made here. Whether a network is such a chain is read off the Plan of a pass over it, and what was read
is compared with a general pass before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from catapult_ext import ops
from catapult_ext.errors import NonFinite, UnsupportedModule
from catapult_ext.graph import nodes
from catapult_ext.graph.certify import relative_tolerance
from catapult_ext.graph.plan import Plan, Route
from catapult_ext.observe import Observer
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.sweep import Sweep
from catapult_ext.rules import linear
from catapult_ext.training.cadence import AroundSpikes
from catapult_ext.training.job import Job
from catapult_ext.training.recorders import BatchCriticalRate

__all__ = ["SMALL_STEP", "Chain", "NotAChain", "chain_for"]

#: Weights times samples of a batch up to which `engine="auto"` takes the native engine. Beyond it the products of a
#: step gain from more than one thread, and the interpreter no longer matters.
SMALL_STEP = 1 << 23

#: Pairs of passes that are compared before a chain counts as another network: a pre-activation within rounding of
#: zero may fall on either side, and does so for one draw of inputs, not for all.
_DRAWS = 3


class NotAChain(ValueError):
    """A run that the native engine cannot make; the message says why."""


def chain_for(job: Job, engine: str) -> Chain | None:
    """The chain that makes the updates of a run, or None where the general path does.

    Depends on nothing but what `train` was given, so that a run that goes on finds the same answer.

    Args:
        job: The run, before its first update.
        engine: "auto", or "native" where there is no choice.

    Raises:
        ValueError: "native" was asked for and cannot be; the message says why.
    """
    if engine == "general":
        return None
    try:
        if (reason := _refusal(job)) is not None:
            raise NotAChain(reason)
        assert job.algorithm.batch_size is not None
        chain = Chain(job.model, job.data.train.x, job.data.train.y, job.algorithm.batch_size)
    except NotAChain as error:
        if engine == "auto":
            return None
        raise ValueError(f'engine: expected "auto" or "general", since {error}, got "native"') from error
    return chain if engine == "native" or chain.weights * job.algorithm.batch_size <= SMALL_STEP else None


def _refusal(job: Job) -> str | None:
    """Why the native engine cannot make the updates of a run, as far as that does not depend on the network."""
    algorithm, train = job.algorithm, job.data.train
    if algorithm.batch_size is None:
        return "every step uses the whole training set"
    if algorithm.optimizer([nn.Parameter(torch.zeros(1))]) is not None:
        return f"{algorithm} takes no plain steps"
    if not (train.x.is_cpu or train.x.is_cuda):
        return f"the model is on {train.x.device}"
    if train.x.is_cuda and not ops.cuda.compiled():
        return "this catapult_ext was built without CUDA"
    if train.y.shape[1] != 1:
        return f"the network has {train.y.shape[1]} outputs"
    for recorder in job.recorders:
        if isinstance(recorder.every, AroundSpikes):
            return "AroundSpikes observes steps again"
        if recorder.observes == "batch" and type(recorder) is not BatchCriticalRate:
            return f"{type(recorder).__name__} looks at the pass of each step"
    return None


@dataclass(frozen=True)
class _Link:
    """One layer by its parameters, see `ops.ChainLayer`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: float
    bias_scale: float
    slope: float

    def layer(self, *, copies: bool = False) -> ops.ChainLayer:
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        return ops.ChainLayer(
            weight.clone() if copies else weight,
            bias.clone() if copies and bias is not None else bias,
            self.weight_scale,
            self.bias_scale,
            self.slope,
            self.weight.requires_grad,
            self.bias is not None and self.bias.requires_grad,
        )


class _Stretch(NamedTuple):
    """What decides the launches of a stretch of steps."""

    sizes: tuple[int, ...]  # samples of each batch
    observed: tuple[bool, ...]
    loss_limit: float

    def make_(
        self, layers: list[ops.ChainLayer], x: Tensor, y: Tensor, index: Tensor, rates: Tensor
    ) -> Tensor:
        """Make the steps: losses and lambda_1 [2, steps], where x is."""
        found = ops.chain_sgd_(
            layers, x.flatten(1), y, index, torch.tensor(self.sizes), rates, observed=torch.tensor(self.observed),
            loss_limit=self.loss_limit,
        )  # fmt: skip
        return torch.stack(found)

    def read(self, found: Tensor) -> Tensor:
        """What `make_` returned, on the host.

        Raises:
            NonFinite: the device has noted a value that is not finite, and not because of these steps.
        """
        read = found.cpu()  # [2, steps]
        try:
            ops.cuda.check(found.device)
        except NonFinite:
            made = int((read[0] <= self.loss_limit).sum())
            if made == read.shape[1] or not read[0, made].isnan():
                raise
        return read


class _Graphs:
    """Stretches on a GPU, captured: one that comes again in the same form is one launch of a CUDA graph.

    Args:
        x: the samples of the run [n, ...].
        y: targets [n, 1].
    """

    #: Forms that are kept. A run alternates between few: whole epochs, and what is left before a look at the network.
    KEPT = 4

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y
        self._captured: dict[Any, tuple[Any, Tensor, Tensor, Tensor] | None] = {}  # None: seen once

    def run(
        self, layers: list[ops.ChainLayer], stretch: _Stretch, index: Tensor, rates: Tensor
    ) -> Tensor | None:
        """What `_Stretch.make_` returns, or None where the form was not seen before: nothing was done then.

        The result is overwritten by the next run of this form.
        """
        key = (
            stretch, ops.cuda.selected("ntk_gram"), ops.cuda.selected("spectral_norm"),
            *((w.data_ptr(), b is not None and b.data_ptr(), *rest) for w, b, *rest in layers),
        )  # fmt: skip
        known = key in self._captured
        captured = self._captured.pop(key, None)
        if known and captured is None:
            captured = self._capture(layers, stretch, index, rates)
        self._captured[key] = captured  # the last one is the one used last
        if len(self._captured) > self.KEPT:
            del self._captured[next(iter(self._captured))]
        if captured is None:
            return None
        graph, index_of_graph, rates_of_graph, found = captured
        index_of_graph.copy_(index)
        rates_of_graph.copy_(rates)
        graph.replay()
        increment_version(
            [w for w, *_, trains, _ in layers if trains]
            + [b for _, b, *_, trains in layers if trains and b is not None]
        )
        return found

    def _capture(
        self, layers: list[ops.ChainLayer], stretch: _Stretch, index: Tensor, rates: Tensor
    ) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The graph, where it reads indices and rates, and where it leaves its results."""
        index, rates = index.clone(), rates.to(index.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = stretch.make_(layers, self._x, self._y, index, rates)
        return graph, index, rates, found


class Chain:
    """A network whose SGD steps are made by `ops.chain_sgd_`.

    Args:
        model: a chain of Linear layers with ReLU, leaky ReLU or nothing between them, and one output.
        x: the samples of the run [n, ...].
        y: targets [n, 1].
        batch: samples of a batch.

    Raises:
        NotAChain: the network is something else; the message says what was found.
        NonFinite: its output or its kernel is not finite.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
        self._model, self._x, self._y, self._batch = model, x, y, batch
        self._calls = 0
        self._graphs = _Graphs(x, y)
        self._links = _links(model, x[: min(batch, len(x))])
        self.weights = sum(link.weight.numel() for link in self._links)
        with torch.no_grad():
            self._certify()

    @torch.no_grad()
    def steps_(
        self, batches: Sequence[Tensor], rates: Sequence[float], observed: Sequence[bool], loss_limit: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make one step for each batch, up to the first that cannot be made.

        The second, fourth, eighth, ... call compares a step with the general path before.

        Args:
            batches: sample indices of each step.
            rates: its learning rate.
            observed: whether the critical rate of its batch is asked for.
            loss_limit: see `ops.chain_sgd_`.

        Returns:
            losses [steps] as from `ops.chain_sgd_`, and b / lambda_1 [steps] of the batches, infinite where lambda_1
            is 0 and NaN where not asked for; float64.

        Raises:
            NotAChain: the chain no longer computes what the model does.
        """
        self._calls += 1
        if self._calls > 1 and self._calls & (self._calls - 1) == 0:
            self._certify()
        stretch = _Stretch(tuple(len(batch) for batch in batches), tuple(observed), loss_limit)
        index = torch.cat(list(batches))  # samples of all steps
        rate = torch.tensor(rates, dtype=torch.float64)  # [steps]
        layers = [link.layer() for link in self._links]
        found = self._graphs.run(layers, stretch, index, rate) if index.is_cuda else None
        if found is None:
            found = stretch.make_(layers, self._x, self._y, index, rate)
        losses, lambda_1 = stretch.read(found)
        sizes = torch.tensor(stretch.sizes)  # [steps]
        critical_lr = (sizes / lambda_1.double().clamp_min(0.0)).to(
            lambda_1.dtype
        )  # as Observation rounds it
        return losses.double().numpy(), critical_lr.double().numpy()

    def _certify(self) -> None:
        """Compare one step on random samples and targets with the general path, from the same parameters."""
        generator = torch.Generator().manual_seed(self._calls)
        problem: str | None = None
        for _ in range(_DRAWS):
            rows = torch.randint(len(self._x), (min(self._batch, len(self._x)),), generator=generator)
            x, y = self._x[rows], self._y[rows]
            x = x * (1 + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))
            y = y + torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
            try:
                problem = self._difference(x, y)
            except NonFinite:
                if self._calls > 0:
                    return  # the run itself is about to notice
                raise
            if problem is None:
                return
        raise NotAChain(f"the model computes something else than the chain of its layers ({problem})")

    def _difference(self, x: Tensor, y: Tensor) -> str | None:
        """What differs by more than rounding, or None."""
        with torch.enable_grad():
            seen = Observer(self._model)(x, y)
        gradients = seen.gradients()
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        layers = [link.layer(copies=True) for link in self._links]
        before = {
            names[id(parameter)]: (parameter.detach(), copy)
            for link, layer in zip(self._links, layers, strict=True)
            for parameter, copy in ((link.weight, layer.weight), (link.bias, layer.bias))
            if parameter is not None and copy is not None
        }
        # As long a step as the parameters are: nothing of the gradient is lost in the rounding of the difference.
        size = _norm(parameter for parameter, _ in before.values())
        slope = _norm(gradients.values())
        rate = size / slope if slope > 0 else 1.0
        one = _Stretch((len(x),), (True,), math.inf)
        step = torch.tensor([rate], dtype=torch.float64)
        losses, lambda_1 = one.read(one.make_(layers, x, y, torch.arange(len(x)), step))
        tolerance = relative_tolerance(x.dtype)
        for name, found, expected in (
            ("loss", losses[0], seen.loss),
            ("lambda_1", lambda_1[0], seen.spectral_norm),
        ):
            if not abs(float(found) - float(expected)) <= tolerance * abs(float(expected)):
                return f"{name} {found:.6g} instead of {expected:.6g}"
        for name, (parameter, moved) in before.items():
            step = -rate * gradients[name] if name in gradients else torch.zeros_like(parameter)
            error = float((moved - parameter - step).norm())
            if not error <= tolerance * (float(step.norm()) + float(parameter.norm())):
                return f"the gradient of {name}"
        return None


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all of them together."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def _links(model: nn.Module, x: Tensor) -> list[_Link]:
    """The layers of a chain from the input to the output, read off the Plan of a pass over x."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        raise NotAChain("the model has forward hooks, which would no longer be called")
    if next(model.buffers(), None) is not None:
        raise NotAChain("the model has buffers, which its forward may change")
    parameters = list(model.parameters())
    fixed = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in fixed:
        parameter.requires_grad_(True)  # or the graph would begin behind them
    try:
        state = ModelState(model, None)
        with state.untouched():
            sweep = Sweep(state, x, {}, verify="first")
            return _Reader(sweep, parameters).links(x.flatten(1))
    except UnsupportedModule as error:
        raise NotAChain(str(error)) from error
    finally:
        for parameter in fixed:
            parameter.requires_grad_(False)


class _Reader:
    """Follows a chain from the output down to the input."""

    def __init__(self, sweep: Sweep, parameters: list[nn.Parameter]) -> None:
        self.sweep, self.parameters = sweep, parameters
        self.plan: Plan = sweep.plan
        self.position = {node: index for index, node in enumerate(sweep.graph_nodes)}
        self.site = {site.node: index for index, site in enumerate(self.plan.sites)}
        self.roles: dict[int, dict[str, int]] = {}
        for i, uses in enumerate(self.plan.uses):
            name = sweep.state.names[i]
            if self.plan.routes[i] != Route.GRAM:
                raise NotAChain(f"{name} is no weight or bias of a Linear layer ({self.plan.reasons[i]})")
            self.roles.setdefault(uses[0].site, {})[uses[0].role] = i

    def links(self, x: Tensor) -> list[_Link]:
        """Layers in the order of the forward; x [n, d] is what the first one must have been given."""
        found: list[_Link] = []
        node, slope = self.sweep.graph_nodes[0], 1.0
        while True:
            link, site = self._link(node, slope)
            found.insert(0, link)
            below = nodes.linear_source(node)
            if below is None:
                break
            known = nodes.negative_slope(below)
            slope, node = (1.0, below) if known is None else (known, below.next_functions[0][0])
            if not slope >= 0.0:
                raise NotAChain(f"a leaky ReLU has the negative slope {slope}")
        features = self.sweep.sites[site].features
        if not (isinstance(features, Tensor) and torch.equal(features, x)):
            raise NotAChain("the first layer is not given the samples as they are")
        return found

    def _link(self, node: Any, slope: float) -> tuple[_Link, int]:
        site = self.site.get(self.position[node])
        name = nodes.type_name(node)
        if site is None or self.plan.sites[site].rule is not linear or "weight" not in self.roles[site]:
            raise NotAChain(
                f"{name} is neither a Linear layer nor ReLU, leaky ReLU or nothing between two of them"
            )
        row_map, roles = self.plan.sites[site].row_map, self.roles[site]
        weight = self.plan.uses[roles["weight"]][0]
        if row_map is None or row_map.kind != "sample" or not weight.transposed:
            raise NotAChain(
                f"{self.sweep.state.names[roles['weight']]} is not used as a Linear layer's weight"
            )
        if "bias" not in roles and nodes.linear_addend(node) != 0.0:
            raise NotAChain(f"{name} adds what is no parameter")
        bias = roles.get("bias")
        link = _Link(
            self.parameters[roles["weight"]],
            None if bias is None else self.parameters[bias],
            self.sweep.factors[roles["weight"]][0],
            1.0 if bias is None else self.sweep.factors[bias][0],
            slope,
        )
        return link, site
