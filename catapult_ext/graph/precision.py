"""Forwards that round to less than the precision of their parameters: `torch.autocast` inside of them, or casts."""

from __future__ import annotations

import torch

from catapult_ext.errors import UnsupportedModule
from catapult_ext.graph import nodes as names
from catapult_ext.graph.walk import Walk

__all__ = ["refuse_lower_precision"]


def refuse_lower_precision(graph: Walk, dtype: torch.dtype) -> None:
    """Raise UnsupportedModule where a node's output has fewer digits than `dtype`.

    Two backwards through such a node agree to its few digits only, so that no row map and no rule could be told from a
    wrong one, and the kernel of the network in full precision is another.

    Args:
        graph: the walk from the output.
        dtype: of the parameters.
    """
    finest = torch.finfo(dtype).eps
    for node in graph.nodes:
        for found in () if names.is_leaf(node) else names.output_dtypes(node):
            if torch.finfo(found).eps > finest:
                # A cast to float32 is what networks do that keep half-precision weights; there it loses nothing.
                single = ", or observe model.float()" if found in (torch.float32, torch.complex64) else ""
                raise UnsupportedModule(
                    f"model: its forward computes in {found} ({names.type_name(node)}), with fewer digits than its "
                    f"parameters have in {dtype}, so that its kernel would be approximate; switch off torch.autocast, "
                    f"or leave out the cast, inside of the forward{single}"
                )
