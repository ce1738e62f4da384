"""The catalogue: every kind of layer, of parameter and of situation that the engine has to get right, or refuse.

A new one is a line in the file of its family; the command, the page and the tests of the engine all read this list.
"""

from __future__ import annotations

from python_experiments.coverage.cases import convolution, linear, norm, parameters, sequence, situations
from python_experiments.coverage.cases.build import Case

__all__ = ["CASES", "FAMILIES", "Case", "select"]

FAMILIES: dict[str, list[Case]] = {
    "Linear layers": linear.CASES,
    "Convolutions": convolution.CASES,
    "Normalisation": norm.CASES,
    "Attention, recurrence, embeddings": sequence.CASES,
    "Bare and computed parameters": parameters.CASES,
    "Situations": situations.CASES,
}

CASES: dict[str, Case] = {case.name: case for cases in FAMILIES.values() for case in cases}


def select(names: list[str]) -> list[Case]:
    """Cases by name or by how their names begin; all for an empty list.

    Raises:
        ValueError: a name fits none.
    """
    chosen: dict[str, Case] = {}
    for name in names or [""]:
        found = {each: case for each, case in CASES.items() if each == name or each.startswith(name)}
        if not found:
            raise ValueError(f"name: expected a case, or how its name begins, got {name!r}")
        chosen |= found
    return list(chosen.values())
