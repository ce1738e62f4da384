"""One breadth-first walk over the graph behind a tensor, about 1 us a node."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Walk", "walk"]


class Walk:
    """Nodes in a deterministic order, and the key by which two walks have the same structure.

    Attributes:
        nodes: autograd nodes; position 0 is the output's.
        key: node classes and edges; equal keys mean that positions correspond.
    """

    __slots__ = ("key", "nodes")

    def __init__(self, nodes: list[Any], key: tuple[Any, ...]) -> None:
        self.nodes = nodes
        self.key = key


def walk(output: Tensor) -> Walk:
    """Walk from `output.grad_fn` to the leaves.

    The key lists, node by node, its class and for each edge the position of the next node and which of that
    node's outputs the edge belongs to (-1 where no gradient flows).
    """
    nodes: list[Any] = [output.grad_fn]
    position = {nodes[0]: 0}
    key: list[Any] = []
    for node in nodes:  # grows while it is read
        key.append(type(node))
        for following, which in node.next_functions:
            if following is None:
                key.append(-1)
                continue
            index = position.get(following)
            if index is None:
                index = position[following] = len(nodes)
                nodes.append(following)
            key.append((index, which))
    return Walk(nodes, tuple(key))
