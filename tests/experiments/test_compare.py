"""Two runs side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from python_experiments import compare, registry, training
from tests.experiments.helpers import call


@pytest.fixture
def compared(smoke):
    """The catapult of Fig. 3a and its control below the critical rate, and what the command says of them."""
    groups = registry.get("fig3-fcn").request("smoke").groups()
    members = [groups["main"]["catapult"][0], groups["below the critical rate"]["no catapult"][0]]
    folders = [training.folder(smoke.out, *member).path for member in members]
    names = [folder.relative_to(smoke.out) for folder in folders]
    text = call("compare", *names, "--out", smoke.out).stdout
    return [training.read(smoke.out, *member) for member in members], folders, text


def cells(text, name):
    (line,) = [
        line for line in text.splitlines() if line.split("│")[1:2] and line.split("│")[1].strip() == name
    ]
    return [cell.strip() for cell in line.split("│")[2:4]]


def test_it_shows_what_differs_and_what_came_of_it(compared):
    (one, other), folders, text = compared
    assert cells(text, "rate.relative") == [f"{run.config.rate.relative:.6g}" for run in (one, other)]
    assert cells(text, "max_steps") == [str(run.config.max_steps) for run in (one, other)]
    assert "network.width" not in text  # equal
    assert "environment: no difference" in text
    assert cells(text, "steps") == [str(run.steps) for run in (one, other)]
    assert cells(text, "catapults") == ["1", "0"]
    for column in ("loss", "lambda_1", "critical_lr"):
        for cell, run in zip(cells(text, column), (one, other), strict=True):
            values = run.metrics[column].dropna()
            first, last = values.iloc[0], values.iloc[-1]
            assert cell == f"{first:.4g} to {last:.4g} ({values.min():.4g} to {values.max():.4g})"
    assert "The metrics differ from step 0 on, in lr" in text
    for letter, folder in zip("AB", folders, strict=True):
        assert f"{letter}: loss of {folder}" in text


def test_a_run_is_equal_to_itself(compared, smoke):
    _, folders, _ = compared
    text = call("compare", folders[0], folders[0].name, "--out", smoke.out).stdout
    assert "configuration: no difference" in text
    assert "equal bit by bit in all 41 rows." in text


def test_the_first_bit_that_differs_is_found():
    table = pd.DataFrame({"step": [0, 1, 2], "loss": [1.0, np.nan, 0.5], "lr": [0.1, 0.1, np.nan]})
    other = table.copy()
    other.loc[2, "loss"] = np.nextafter(0.5, 1)
    assert compare.agreement(table, other) == (
        "The metrics are equal bit by bit before step 2 and differ there in loss."
    )
    other.loc[1, ["loss", "lr"]] = 7.0
    assert "before step 1 and differ there in loss, lr." in compare.agreement(table, other)
    assert compare.agreement(table, table.iloc[:2]) == (
        "The metrics in common are equal bit by bit in all 2 rows; then only A goes on."
    )
    assert "no step or no column in common" in compare.agreement(table, table.iloc[:0])


def test_trees_become_dotted_names():
    tree = {"a": {"b": 1, "c": {"d": None}}, "e": [1, {"f": 2}]}
    assert compare.flat(tree) == {"a.b": 1, "a.c.d": None, "e": [1, {"f": 2}]}
    assert compare.differences({"x": 1, "y": 2}, {"y": 3, "z": None}) == {"x": (1, None), "y": (2, 3)}
