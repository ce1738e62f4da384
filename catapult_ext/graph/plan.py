"""What a walk means: the uses of every parameter and the route that each parameter takes.

A *site* is a node at which parameters meet activations (a matrix product, a convolution, any other node that
takes a parameter). A *use* is one parameter at one site, with the transpositions and scalar factors between
the two. The Plan is structure alone: positions in the walk and indices of parameters, no tensors, so that it
serves every later forward with the same key.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from catapult_ext.errors import UnsupportedModule
from catapult_ext.graph import nodes as names
from catapult_ext.graph.certify import RowMap
from catapult_ext.graph.walk import Walk

__all__ = ["Layout", "Plan", "Route", "Site", "Use", "build_plan", "find_own_inputs"]


class Route:
    """How a parameter's part of the kernel is computed."""

    GRAM = "gram"  # (A A^T) * (B B^T): one use, one row per sample
    TILES = "tiles"  # per-sample gradients, tile by tile, summed over all uses
    ROWS = "rows"  # one backward per kernel row: the exact fallback
    UNUSED = "unused"


@dataclass(slots=True)
class Site:
    """A node where parameters meet activations."""

    node: int  # position in the walk
    rule: Any  # module of catapult_ext.rules
    row_map: RowMap | None = None  # set by certification


@dataclass(frozen=True, slots=True)
class Use:
    """One parameter at one site."""

    site: int
    role: str  # "weight", "bias" or, for a node without a rule of its own, "argument"
    argument: int  # which input of the node
    transposed: bool  # the parameter reaches the node transposed
    factors: tuple[tuple[int, int], ...]  # (node, argument) of scalar products on the way
    # What arrives (before transpositions and factors) is a function of parameters alone, such as a slice or a
    # normalised weight: (node, output) where it comes out, and its shape. None for the parameter itself.
    through: tuple[int, int] | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """What each pass does with a plan, listed once: at a step of a small network the lists would dominate.

    Attributes:
        live: sites whose sensitivities a parameter off the fallback needs.
        nodes: their positions in the walk.
        with_features: for each live site, the argument whose gradient needs its features, or None.
        calls_nodes: some site calls its node, so that the graph must outlive the backward.
        gram: for each site with parameters on the Gram route, {role: parameter}.
        tiles: parameters on the tile route.
        rows: parameters on the exact fallback.
        ruled: parameters that are not on the fallback.
    """

    live: tuple[int, ...]
    nodes: tuple[int, ...]
    with_features: tuple[int | None, ...]
    calls_nodes: bool
    gram: dict[int, dict[str, int]]
    tiles: tuple[int, ...]
    rows: tuple[int, ...]
    ruled: tuple[int, ...]


@dataclass(slots=True)
class Plan:
    """The structure of one forward pass."""

    sites: list[Site] = field(default_factory=list)
    uses: list[list[Use]] = field(default_factory=list)  # by parameter
    routes: list[str] = field(default_factory=list)  # by parameter
    reasons: list[str] = field(default_factory=list)  # by parameter: why this route
    leaves: list[tuple[int, int]] = field(default_factory=list)  # (position, parameter)
    passed: frozenset[int] = frozenset()  # nodes found by certification to see no samples
    of_parameters: frozenset[int] = frozenset()  # sites that would see none if they have no row map
    data_dependent: bool = False
    batched_cotangents: bool = False  # several outputs: one batched backward instead of a loop
    certified: bool = False  # every row map was settled by live rows
    observations: int = 0
    unit: torch.Tensor | None = None  # cotangents [c, n, c], one output at a time
    own_inputs: dict[int, tuple[int, int]] | None = None  # see `find_own_inputs`

    _layout: Layout | None = None

    def demote(self, parameter: int, reason: str) -> None:
        """Send a parameter to the exact fallback."""
        self.routes[parameter] = Route.ROWS
        self.reasons[parameter] = reason
        self._layout = None

    @property
    def layout(self) -> Layout:
        """What each pass does; rebuilt when a parameter was demoted."""
        if self._layout is None:
            self._layout = self._build_layout()
        return self._layout

    def _build_layout(self) -> Layout:
        on = {
            route: tuple(i for i, r in enumerate(self.routes) if r == route)
            for route in (Route.GRAM, Route.TILES, Route.ROWS)
        }
        ruled = tuple(sorted(on[Route.GRAM] + on[Route.TILES]))
        uses = [use for i in ruled for use in self.uses[i]]
        live = tuple(sorted({use.site for use in uses}))
        fed = {use.site: use.argument for use in uses if use.role == "weight"}
        gram: dict[int, dict[str, int]] = {}
        for i in on[Route.GRAM]:
            use = self.uses[i][0]
            gram.setdefault(use.site, {})[use.role] = i
        return Layout(
            live=live,
            nodes=tuple(self.sites[site].node for site in live),
            with_features=tuple(fed.get(site) for site in live),
            calls_nodes=any(self.sites[site].rule.CALLS_NODE for site in live)
            or any(use.through is not None for use in uses),
            gram=gram,
            tiles=on[Route.TILES],
            rows=on[Route.ROWS],
            ruled=ruled,
        )


def _parents(walk: Walk) -> list[list[tuple[int, int, int]]]:
    """For each node, who consumes it: (consumer, argument, which output of the node)."""
    position = {node: index for index, node in enumerate(walk.nodes)}
    parents: list[list[tuple[int, int, int]]] = [[] for _ in walk.nodes]
    for index, node in enumerate(walk.nodes):
        for argument, (following, which) in enumerate(node.next_functions):
            if following is not None:
                parents[position[following]].append((index, argument, which))
    return parents


class _Builder:
    def __init__(self, walk: Walk, parameters: list[torch.Tensor], passed: frozenset[int]) -> None:
        from catapult_ext.rules import find_rule  # rules build on the graph room; only this call looks up

        self.find_rule = find_rule
        self.walk = walk
        self.parents = _parents(walk)
        self.plan = Plan(
            uses=[[] for _ in parameters],
            routes=[Route.UNUSED] * len(parameters),
            reasons=["the output does not depend on it"] * len(parameters),
            passed=passed,
        )
        self.position = {node: index for index, node in enumerate(walk.nodes)}
        self.known: dict[int, bool] = {}
        self.index = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.site_of: dict[tuple[int, str], int] = {}
        self.argument_of: dict[tuple[int, str], int] = {}

    def build(self) -> Plan:
        for position, node in enumerate(self.walk.nodes):
            name = names.type_name(node)
            if name in names.COUPLING_REFUSED:
                raise UnsupportedModule(f"model: {names.COUPLING_REFUSED[name]}")
            self.plan.data_dependent |= names.is_data_dependent(node)
            if names.is_leaf(node):
                parameter = self.index.get(id(node.variable))
                if parameter is not None:
                    self.plan.leaves.append((position, parameter))
                    self._route(position, parameter)
        self.plan.batched_cotangents = bool(self.plan.sites) and all(
            site.rule.BATCHED_COTANGENTS for site in self.plan.sites
        )
        return self.plan

    def _route(self, position: int, parameter: int) -> None:
        uses, problem = self._uses(position, False, ())
        self.plan.uses[parameter] = uses
        if problem is not None:
            self.plan.demote(parameter, problem)
            return
        if any(self.argument_of.setdefault((u.site, u.role), u.argument) != u.argument for u in uses):
            # A site keeps the features of one argument, and one Gram term for each role.
            self.plan.demote(parameter, "two arguments of one operation are parameters")
            return
        rules = [self.plan.sites[use.site].rule for use in uses]
        single = len(uses) == 1 and rules[0].SHORTCUT and uses[0].through is None
        self.plan.routes[parameter] = Route.GRAM if single else Route.TILES
        self.plan.reasons[parameter] = " + ".join(dict.fromkeys(rule.NAME for rule in rules))

    def _of_parameters(self, position: int) -> bool:
        """Whether a node's output is a function of parameters alone, as far as the edges of the graph tell."""
        if position not in self.known:
            node = self.walk.nodes[position]
            if names.is_leaf(node):
                self.known[position] = id(node.variable) in self.index
            else:
                below = [following for following, _ in node.next_functions]
                known = position in self.plan.passed or not (
                    names.reads_data(node) or (None in below and not names.is_scaling(node))
                )
                self.known[position] = known and all(
                    self._of_parameters(self.position[following])
                    for following in below
                    if following is not None
                )
        return self.known[position]

    def _uses(
        self,
        position: int,
        transposed: bool,
        factors: tuple[tuple[int, int], ...],
        through: tuple[int, int] | None = None,
        inside: bool = False,
    ) -> tuple[list[Use], str | None]:
        """Follow transpositions and scalar factors from a parameter up to the sites that take it.

        `inside`: the node at `position` computes something from parameters alone, which is what its sites take.
        """
        found: dict[tuple[int, int], Use] = {}
        for consumer, argument, which in self.parents[position]:
            node = self.walk.nodes[consumer]
            if inside:
                through = (position, which)
            on_the_way = names.is_transpose(node) or names.is_scalar_product(node, argument)
            if on_the_way:
                swap = names.is_transpose(node)
                step = factors if swap else (*factors, (consumer, argument))
                uses, problem = self._uses(consumer, transposed ^ swap, step, through)
            elif self._of_parameters(consumer):
                uses, problem = self._uses(consumer, False, (), inside=True)
            else:
                uses, problem = self._site(consumer, argument, transposed, factors, through)
            for use in uses:  # two ways through functions of parameters end in one use
                found[use.site, use.argument] = use
            if problem is not None:
                return list(found.values()), problem
        return list(found.values()), None

    def _site(
        self,
        consumer: int,
        argument: int,
        transposed: bool,
        factors: tuple[tuple[int, int], ...],
        through: tuple[int, int] | None,
    ) -> tuple[list[Use], str | None]:
        node = self.walk.nodes[consumer]
        rule, role, problem = self.find_rule(
            node, argument, self.parents[consumer], bool(factors), transposed
        )
        if problem is not None:
            return [], problem
        key = (consumer, rule.NAME)
        if key not in self.site_of:
            self.site_of[key] = len(self.plan.sites)
            self.plan.sites.append(Site(consumer, rule))
        site = self.site_of[key]
        others = [following for k, (following, _) in enumerate(node.next_functions) if k != argument]
        if rule.MEETS_ANYTHING and all(n is None or self._of_parameters(self.position[n]) for n in others):
            self.plan.of_parameters |= {site}
        shape = () if through is None else names.output_shape(self.walk.nodes[through[0]], through[1])
        return [Use(site, role, argument, transposed, factors, through, shape)], None


def find_own_inputs(plan: Plan, walk: Walk) -> dict[int, tuple[int, int]]:
    """Where the left factor of a matrix product came out, for every live site that alone takes it.

    There the backward passes the gradient with respect to the layer's input, through this layer alone.

    Returns:
        By site (position in the walk, which output of that node).
    """
    if plan.own_inputs is None:
        position = {node: index for index, node in enumerate(walk.nodes)}
        takers = Counter(edge for node in walk.nodes for edge in node.next_functions)
        products = {s: walk.nodes[plan.sites[s].node] for s in plan.layout.live}
        edges = {s: names.linear_input(node) for s, node in products.items() if names.is_matrix_product(node)}
        plan.own_inputs = {
            s: (position[edge[0]], edge[1])
            for s, edge in edges.items()
            if edge[0] is not None and takers[edge] == 1
        }
    return plan.own_inputs


def build_plan(walk: Walk, parameters: list[torch.Tensor], passed: frozenset[int] = frozenset()) -> Plan:
    """Find every use of `parameters` in the walk and choose each parameter's route.

    Args:
        walk: of the output.
        parameters: those to observe.
        passed: positions of nodes that take a parameter and, as certification found, see no samples.

    Raises:
        UnsupportedModule: a node hides part of the graph (reentrant checkpointing).
    """
    return _Builder(walk, parameters, passed).build()
