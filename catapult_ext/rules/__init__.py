"""One small file per layer family; a registry line and a test are all that a new one needs besides.

A rule is a module with

- `NAME`: how `layer_report` calls it; `NODES`: {(node class, argument): role of a parameter there};
- `SHORTCUT`: a single use with one row per sample may go through the Gram product;
- `BATCHED_COTANGENTS`: its backward is fast and exact under `is_grads_batched`;
- `CALLS_NODE`: it calls the node after the backward, so that the graph must outlive it;
- `SWEEPS_GRADIENT`: the kernel's sweep forms the loss gradient of its weight on the way;
- `HOLDS_WHOLE`: it forms per-sample gradients of the whole parameter, not of a slice;
- `MEETS_ANYTHING`: its node may as well combine parameters with parameters or constants (a mask, a frozen weight);
- `TILE_ROWS`: rows of the parameter in a tile that is fast, where memory allows it;
- `LEAD`: how many leading dimensions of its sensitivities may be rows;
- `refuse(node, ...)`: why it does not cover this node, or None; `refuse_rows(node, row_map)`, where there is one: why
  not with these rows;
- `features(node, argument)`: A, read from the node's saved tensors; `scale(node, role, argument)`: factor of the use;
- `terms(...)`: the parts that are products of Gram matrices; `sweep_weight(...)`: K += G G^T for a weight that
  is no such part; `tile(...)`: per-sample gradients of a slice; `rank_factors(...)`: the two factors
  of the gradient, where it is a product that a step may apply in place; `gradient(...)`, `work(...)` (route and
  cost): see `rules/linear.py`, and `rules/positions.py` for the choice between two exact routes.

A rule whose per-sample gradients are small gives `jacobian(...)` instead: see `rules/per_sample.py`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from catapult_ext.graph.nodes import type_name
from catapult_ext.rules import convolution, elementwise, embedding, linear, node_call, norm

__all__ = ["RULES", "find_rule"]

RULES: tuple[ModuleType, ...] = (linear, convolution, norm, elementwise, embedding)

_TABLE = {key: (rule, role) for rule in RULES for key, role in rule.NODES.items()}


def find_rule(
    node: Any, argument: int, parents: list[tuple[int, int, int]], scaled: bool, transposed: bool
) -> tuple[ModuleType, str, str | None]:
    """Rule and role of a parameter at a node, or (third) why only the exact fallback is left."""
    if any(which != 0 for _, _, which in parents):
        return node_call, "argument", f"{type_name(node)} has several outputs in use"
    entry = _TABLE.get((type_name(node), argument))
    if entry is not None:
        rule, role = entry
        if rule.refuse(node, role, transposed) is None:
            return rule, role, None
    problem = node_call.refuse(node, scaled, transposed)
    return node_call, "argument", problem
