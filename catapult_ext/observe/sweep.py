"""One forward, one walk, one backward per output: features and sensitivities of every site, certified."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from catapult_ext.errors import NonFinite, UnsupportedModule
from catapult_ext.graph import Plan, Walk, build_plan, nodes, refuse_lower_precision, walk
from catapult_ext.graph.certify import (
    distinct_scales,
    find_row_map,
    relative_tolerance,
    rounding_of_sums,
)
from catapult_ext.graph.plan import Use, find_own_inputs
from catapult_ext.observe.inputs import Inputs, signature
from catapult_ext.observe.model_state import ModelState
from catapult_ext.observe.outputs import output_weights, outputs_2d
from catapult_ext.rules.site_data import SiteData

__all__ = ["ROWS_PER_BACKWARD", "Sweep", "arriving"]

# How many kernel rows the exact fallback sends through one batched backward.
ROWS_PER_BACKWARD = 32

# Draws of signs from which the size of terms is estimated: by one alone a single number may come out small by chance.
_SIGNS = 4


def arriving(use: Use, parameter: Tensor) -> Tensor:
    """The parameter, or of what arrives in its place at a use the shape."""
    return parameter if use.through is None else parameter.new_empty(()).expand(use.shape)


class Sweep:
    """Everything that one pass leaves, before it is put together.

    Attributes:
        output: f [n, c] with its graph.
        plan: the structure, certified.
        sites: by site index, what the backward left there.
        input_gradients: d f_ij / d x_i as [n, c, *x.shape[1:]], where asked for.
        layer_inputs: by site, where asked for, the gradient of each output with respect to the left factor of a matrix
            product that nothing else takes, laid out as the sensitivities.
    """

    def __init__(
        self,
        state: ModelState,
        x: Inputs,
        plans: dict[Any, Plan],
        *,
        verify: str,
        outputs: str | int = "all",
        input_gradient: bool = False,
        layer_inputs: bool = False,
        keep_graph: bool = False,
    ) -> None:
        """Run the pass.

        Args:
            state: the model.
            x: what the model is called with.
            plans: known structures; new ones are added.
            verify: "first" (a plan's first use and its uses number 2, 4, 8, ...), "always" or "never" (only the
                first use, from which the row maps come).
            outputs: "all", "sum" (the c outputs count as their sum) or one of them.
            input_gradient: also return the gradient with respect to x.
            layer_inputs: also keep those with respect to the inputs of layers, which the backward passes.
            keep_graph: keep the graph alive (set where the fallback or a node is called later).
        """
        if input_gradient:
            if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"x: expected a floating-point tensor for input gradients, got {got}")
            x = x.detach().requires_grad_(True)
        output = outputs_2d(state.forward(x), x)
        self.state = state
        self.x = x
        self.output = output
        try:
            self._run(plans, verify, outputs, input_gradient, layer_inputs, keep_graph)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise UnsupportedModule(
                "model: the input of a layer is modified in place after the layer has used it, so that its gradient "
                f"cannot be formed (autograd refuses it too); use the out-of-place operation. PyTorch says: {error}"
            ) from error

    def _run(
        self,
        plans: dict[Any, Plan],
        verify: str,
        outputs: str | int,
        input_gradient: bool,
        layer_inputs: bool,
        keep_graph: bool,
    ) -> None:
        output = self.output
        c = output.shape[1]
        self.cotangents = output_weights(outputs, output)
        self.outputs = c if self.cotangents is None else 1
        graph = self._walk = walk(output)
        self.graph_nodes = graph.nodes
        key = (graph.key, signature(self.x), output.shape, output.dtype, output.device, input_gradient)
        plan = plans.get(key)
        if plan is None or not self._leaves_match(plan, graph):
            self.state.check_members()
            plan = plans[key] = build_plan(graph, self.state.parameters)
        self.plan = plan
        self.input_gradients: Tensor | None = None
        plan.observations += 1
        if self._due(plan, verify):
            plan = self._certified(plans, key, graph, input_gradient)
        features, gradients = self._read(plan, input_gradient, layer_inputs, keep_graph)
        if not plan.certified and self._has_woken(plan, gradients):
            plan = self._certified(plans, key, graph, input_gradient)
            features, gradients = self._read(plan, input_gradient, layer_inputs, keep_graph)
        layout, walked = plan.layout, graph.nodes
        self.sites: dict[int, SiteData] = {}
        for index, position, a, b in zip(layout.live, layout.nodes, features, gradients, strict=False):
            if b is not None:  # undefined gradient: this site does not reach any output
                self.sites[index] = SiteData(plan.sites[index], walked[position], a, b, self.outputs)
        if input_gradient:
            last = gradients[len(layout.live)]
            assert isinstance(self.x, Tensor)
            shape = (self.outputs, *self.x.shape)
            stacked = self.x.new_zeros(shape) if last is None else last.reshape(shape)
            self.input_gradients = stacked.transpose(0, 1)
        own = find_own_inputs(plan, graph) if layer_inputs else {}
        passed = gradients[len(gradients) - len(own) :]
        self.layer_inputs = {site: g for site, g in zip(own, passed, strict=True) if g is not None}

    def _certified(self, plans: dict[Any, Plan], key: Any, graph: Walk, input_gradient: bool) -> Plan:
        """The plan once it is certified, built anew where a parameter meets no samples at its site."""
        while True:
            plan = self.plan
            blind = self._certify(plan, input_gradient)
            if not blind:
                return plan
            self.plan = plans[key] = build_plan(graph, self.state.parameters, plan.passed | blind)
            self.plan.observations = plan.observations

    def _read(
        self, plan: Plan, input_gradient: bool, layer_inputs: bool, keep_graph: bool
    ) -> tuple[list[Tensor | tuple[Tensor, ...] | None], list[Tensor | None]]:
        """Features of the live sites, and the backward to them (and to x, and to the inputs of layers)."""
        layout = plan.layout
        # Saved tensors are read before the backward may free them.
        features = [
            None if argument is None else self._saved(site, argument)
            for site, argument in zip(layout.live, layout.with_features, strict=True)
        ]
        self.factors = {i: tuple([self._factor(use) for use in plan.uses[i]]) for i in layout.ruled}
        keep = keep_graph or layout.calls_nodes or bool(layout.rows) or not plan.certified
        own = find_own_inputs(plan, self._walk).values() if layer_inputs else ()
        further = [GradientEdge(self.graph_nodes[position], which) for position, which in own]
        return features, self._backward(self._unit_cotangents(), input_gradient, keep, further)

    def _has_woken(self, plan: Plan, gradients: list[Tensor | None]) -> bool:
        """Whether a row is live that was dead when its site's map was found, and not settled."""
        for index, b in zip(plan.layout.live, gradients, strict=False):
            row_map = plan.sites[index].row_map
            if b is None or row_map is None or row_map.dead is None or row_map.dead.numel() == 0:
                continue
            rows = b.flatten(1, row_map.lead) if self.outputs > 1 else b.flatten(0, row_map.lead - 1)
            if bool(rows.index_select(1 if self.outputs > 1 else 0, row_map.dead).any()):
                return True
        return False

    def _leaves_match(self, plan: Plan, graph: Any) -> bool:
        parameters = self.state.parameters
        return all(graph.nodes[position].variable is parameters[i] for position, i in plan.leaves)

    @staticmethod
    def _due(plan: Plan, verify: str) -> bool:
        """Whether this use of the plan is certified; a plan's first use is, since row maps come out of it."""
        if any(plan.sites[site].row_map is None for site in plan.layout.live):
            return True
        count = plan.observations
        if verify == "never" and count > 1:
            return False
        return verify == "always" or plan.data_dependent or (count & (count - 1)) == 0

    def _saved(self, index: int, argument: int) -> Tensor | tuple[Tensor, ...]:
        site = self.plan.sites[index]
        saved: Tensor | tuple[Tensor, ...] = site.rule.features(self.graph_nodes[site.node], argument)
        return saved.detach() if isinstance(saved, Tensor) else tuple([each.detach() for each in saved])

    def _unit_cotangents(self) -> Tensor:
        """[outputs, n, c]: row j asks for output j (or for the given weights of outputs) of every sample."""
        n, c = self.output.shape
        if self.cotangents is not None:
            return self.cotangents.unsqueeze(1).expand(-1, n, -1)
        if self.plan.unit is None:
            rows = torch.eye(c, dtype=self.output.dtype, device=self.output.device)
            self.plan.unit = rows.unsqueeze(1).expand(-1, n, -1)
        return self.plan.unit

    def _edges(self, input_gradient: bool) -> list[Any]:
        edges: list[Any] = [
            GradientEdge(self.graph_nodes[position], 0) for position in self.plan.layout.nodes
        ]
        if input_gradient:
            edges.append(self.x)
        return edges

    def _backward(
        self, cotangents: Tensor, input_gradient: bool, keep: bool, further: Sequence[Any] = ()
    ) -> list[Tensor | None]:
        """Gradients at the sites, x and further edges: in the node's shape, for several outputs [outputs, ...]."""
        edges = [*self._edges(input_gradient), *further]
        if not edges:
            return []
        count = cotangents.shape[0]
        if count == 1:
            return list(nodes.backward(self.output, cotangents[0], edges, keep_graph=keep))
        if self.plan.batched_cotangents:
            return list(
                torch.autograd.grad(
                    self.output,
                    edges,
                    cotangents,
                    retain_graph=keep,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            )
        stacked: list[Tensor | None] = [None] * len(edges)
        for j in range(count):
            retain = keep or j + 1 < count
            found = nodes.backward(self.output, cotangents[j], edges, keep_graph=retain)
            # Copied while they are in the cache, and let go of: the next output gets the same memory.
            for k, gradient in enumerate(found):
                whole = stacked[k]
                if gradient is None:
                    continue
                if whole is None:
                    shape = (count, *gradient.shape)
                    # Outputs before this one, if any, did not reach the edge.
                    make = gradient.new_empty if j == 0 else gradient.new_zeros
                    whole = stacked[k] = make(shape)
                whole[j] = gradient
            for k, gradient in enumerate(found):
                whole = stacked[k]
                if gradient is None and whole is not None:
                    whole[j] = 0.0
        return stacked

    def _certify(self, plan: Plan, input_gradient: bool) -> frozenset[int]:
        """Settle row maps and compare every assembled gradient with autograd's, for random cotangents.

        Returns:
            Nodes without a row map that may combine parameters alone: to be passed in another plan.
        """
        if not bool(torch.isfinite(self.output).all()):
            raise NonFinite("model: its output is not finite")
        refuse_lower_precision(self._walk, self.state.dtype)
        generator = torch.Generator().manual_seed(plan.observations)
        n, c = self.output.shape
        u = (torch.rand(c, generator=generator, dtype=torch.float64) + 0.5).to(self.output)
        s = distinct_scales(n, self.output, generator)
        layout = plan.layout
        plain = u.expand(1, n, c)
        first = self._backward(plain, input_gradient, True)
        second = self._backward(plain * s[:, None], input_gradient, True)
        if input_gradient and first[-1] is not None and second[-1] is not None:
            found = find_row_map(first[-1], second[-1], s, (1,))
            if isinstance(found, str):
                raise UnsupportedModule(
                    "model: it couples its samples (BatchNorm in training mode?), so that the AGOP, which is defined "
                    "sample by sample, does not exist; call model.eval()"
                )
        was_certified, settled = plan.certified, True
        problems: dict[int, str] = {}
        data: dict[int, SiteData] = {}
        for position, (index, argument) in enumerate(zip(layout.live, layout.with_features, strict=True)):
            site, b1, b2 = plan.sites[index], first[position], second[position]
            second[position] = None  # a third backward is to come, whose memory it would add to
            if b1 is None or b2 is None:
                settled = False
                continue
            found = find_row_map(b1, b2, s, site.rule.LEAD)
            if not isinstance(found, str) and hasattr(site.rule, "refuse_rows"):
                found = site.rule.refuse_rows(self.graph_nodes[site.node], found) or found
            if isinstance(found, str):
                problems[index] = found
            else:
                site.row_map = found
                settled &= found.settled
                saved = None if argument is None else self._saved(index, argument)
                data[index] = SiteData(site, self.graph_nodes[site.node], saved, b1, 1)
        if not was_certified:
            blind = frozenset(plan.sites[site].node for site in problems if site in plan.of_parameters)
            if blind - plan.passed:
                return blind
        for i in layout.ruled:
            bad = [problems[use.site] for use in plan.uses[i] if use.site in problems]
            if bad:
                self._demote(plan, i, bad[0], was_certified)
        self._check_gradients(plan, data, plain, s, was_certified)
        plan.certified = settled
        return frozenset()

    def _check_gradients(
        self, plan: Plan, data: dict[int, SiteData], plain: Tensor, s: Tensor, was_certified: bool
    ) -> None:
        ruled = plan.layout.ruled
        if not ruled:
            return
        parameters = [self.state.parameters[i] for i in ruled]
        expected = torch.autograd.grad(
            self.output, parameters, (plain * s[:, None])[0], retain_graph=True, allow_unused=True
        )
        with torch.no_grad():
            weights = s.unsqueeze(1)  # [n, 1]: the sensitivities are those of one weighted sum of outputs
            for i, parameter, reference in zip(ruled, parameters, expected, strict=True):
                if reference is None:
                    continue
                if reference.is_sparse:  # of an embedding
                    reference = reference.to_dense()
                if not bool(torch.isfinite(reference).all()):
                    raise NonFinite(f"model: the gradient of {self.state.names[i]} is not finite")
                total, size = self._assembled(i, data, weights)
                error = float(total.sub_(reference).norm())
                if error <= relative_tolerance(parameter.dtype) * max(size, float(reference.norm())):
                    continue
                # What cancels (the keys' bias in a softmax, a shift before a normalisation) is known to the rounding
                # of what is summed, and not to some part of itself.
                if not error <= rounding_of_sums(parameter.dtype) * self._size_of_terms(i, data, weights):
                    self._demote(plan, i, "its assembled gradient differs from autograd's", was_certified)

    def _assembled(self, i: int, data: dict[int, SiteData], weights: Tensor) -> tuple[Tensor, float]:
        """Gradient of sum_ij weights_ij f_ij with respect to parameter i by the rules, and the size of its parts."""
        parameter = self.state.parameters[i]
        total, size = torch.zeros_like(parameter), 0.0
        for use in self.plan.uses[i]:
            entry = data.get(use.site)
            if entry is None:
                continue
            factor = self._factor(use)
            part = entry.site.rule.gradient(entry, use, factor, weights, arriving(use, parameter))
            if use.through is not None:
                part = self.pull_back(use, parameter, part.unsqueeze(0)).squeeze(0)
            total += part
            size += float(part.norm())
        return total, size

    def _size_of_terms(self, i: int, data: dict[int, SiteData], weights: Tensor) -> float:
        """Root of the sum of squares of the terms whose sum is that gradient, whether they cancel or not.

        A rule is linear in the sensitivities: with a random sign on each of their entries no two terms cancel on
        average, and the mean square of what it gives is the sum of the squares.
        """
        generator = torch.Generator().manual_seed(i)
        total = 0.0
        for _ in range(_SIGNS):
            signed = {}
            for site in {use.site for use in self.plan.uses[i]} & data.keys():
                entry = data[site]
                b = entry.sensitivities
                signs = torch.randint(0, 2, b.shape, generator=generator, dtype=torch.int8).to(b) * 2 - 1
                signed[site] = SiteData(entry.site, entry.node, entry.features, b * signs, entry.outputs)
            total += float(self._assembled(i, signed, weights)[0].double().square().sum())
        return math.sqrt(total / _SIGNS)

    def _demote(self, plan: Plan, parameter: int, reason: str, was_certified: bool) -> None:
        name = self.state.names[parameter]
        if was_certified:
            raise UnsupportedModule(
                f"model: {name} was certified at an earlier step and fails now ({reason}): the network changed the way "
                'its rows belong to samples without changing its graph; use verify="always"'
            )
        plan.demote(parameter, reason)

    def _factor(self, use: Any) -> float:
        """Scalar between a parameter and its site: the site's own scale times the products on the way."""
        site = self.plan.sites[use.site]
        value: float = site.rule.scale(self.graph_nodes[site.node], use.role, use.argument)
        for node, argument in use.factors:
            value *= nodes.scalar_factor(self.graph_nodes[node], argument)
        return value

    def rows(self, parameters: list[int], keep: bool = False) -> Iterator[tuple[int, int, list[Tensor]]]:
        """The exact fallback: gradients of single outputs of single samples.

        Yields:
            (first kernel row, past the last, [rows, *parameter.shape] for each parameter).
        """
        unit = self._unit_cotangents()  # [outputs, n, c]
        n, total = self.output.shape[0], self.output.shape[0] * self.outputs
        tensors = [self.state.parameters[i] for i in parameters]
        for start in range(0, total, ROWS_PER_BACKWARD):
            stop = min(total, start + ROWS_PER_BACKWARD)
            cotangents = self.output.new_zeros(stop - start, n, self.output.shape[1])
            for row in range(start, stop):
                i, j = divmod(row, self.outputs)
                cotangents[row - start, i] = unit[j, i]
            yield start, stop, self._batched_rows(tensors, cotangents)

    def pull_back(self, use: Use, parameter: Tensor, gradients: Tensor) -> Tensor:
        """Gradients [rows, *parameter.shape] from those of what arrives at a use, [rows, *use.shape]."""
        assert use.through is not None
        edge = GradientEdge(self.graph_nodes[use.through[0]], use.through[1])
        return self._batched_rows([parameter], gradients, edge)[0]

    def _batched_rows(self, tensors: list[Tensor], cotangents: Tensor, output: Any = None) -> list[Tensor]:
        output = self.output if output is None else output
        try:
            found = torch.autograd.grad(
                output, tensors, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # a node without a batching rule: the same rows one by one, equally exact
            each = [
                torch.autograd.grad(output, tensors, row, retain_graph=True, allow_unused=True)
                for row in cotangents
            ]
            found = tuple(
                torch.stack([torch.zeros_like(tensor) if row is None else row for row in column])
                for tensor, column in zip(tensors, zip(*each, strict=True), strict=True)
            )
        return [
            tensor.new_zeros(cotangents.shape[0], *tensor.shape) if rows is None else rows.detach()
            for tensor, rows in zip(tensors, found, strict=True)
        ]
