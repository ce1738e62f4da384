"""The catalogue: every kind of layer, of parameter and of situation that the engine has to get right, or refuse.

A new one is a line in the file of its family; the command, the page and the tests of the engine all read this list.
"""

from __future__ import annotations

from python_experiments.coverage.cases import convolution, linear, norm, own, parameters, sequence, situations
from python_experiments.coverage.cases.build import Case

__all__ = ["CASES", "FAMILIES", "Case", "case_of", "select"]

FAMILIES: dict[str, list[Case]] = {
    "Linear layers": linear.CASES,
    "Convolutions": convolution.CASES,
    "Normalisation": norm.CASES,
    "Attention, recurrence, embeddings": sequence.CASES,
    "Bare and computed parameters": parameters.CASES,
    "Situations": situations.CASES,
}

CASES: dict[str, Case] = {case.name: case for cases in FAMILIES.values() for case in cases}


def case_of(name: str) -> Case:
    """A case of the catalogue, or a network of one's own by FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        ValueError: it is neither.
    """
    return CASES[name] if name in CASES else own.case_of(name)


def select(words: list[str]) -> list[Case]:
    """Cases whose name, or whose family's, holds one of the words; all for an empty list.

    Raises:
        ValueError: a word is in none.
    """
    chosen: dict[str, Case] = {}
    for word in words or [""]:
        found = {
            case.name: case
            for family, cases in FAMILIES.items()
            for case in cases
            if word.lower() in f"{family}: {case.name}".lower()
        }
        if not found:
            raise ValueError(f"filter: expected a part of the name of a case or of a family, got {word!r}")
        chosen |= found
    return [case for name, case in CASES.items() if name in chosen]
