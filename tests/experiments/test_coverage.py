"""`catapult coverage`: verdicts on planted answers, peers in their processes, and the page of the stored lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from python_experiments.coverage import lines, ours, page
from python_experiments.coverage.cases import CASES, select
from python_experiments.coverage.peer_process import Answer, PeerProcess
from python_experiments.coverage.peers import PEERS
from python_experiments.coverage.survey import ENGINE, judged
from tests.experiments.helpers import call

ROOT = Path(__file__).parents[2]


def test_an_answer_is_worth_what_it_is_off_by():
    case = CASES["three outputs"]
    reference = ours.reference(case)
    exact, n, c = reference.kernel, *reference.output.shape
    of = lambda kernel: judged(Answer(kernel, ""), reference, torch.float64)  # noqa: E731
    assert of(exact.clone())["verdict"] == "exact"
    assert of(exact * (1 + 1e-7))["verdict"] == "float32"
    off = of(exact * 1.25)
    assert off["verdict"] == "wrong"
    assert off["error"] == pytest.approx(0.25, rel=1e-6)
    assert of(exact.view(n, c, n, c).diagonal(dim1=1, dim2=3))["verdict"] == "blocks"
    for useless in (exact[1:, 1:], exact * float("nan")):
        assert of(useless)["verdict"] == "wrong"
        assert of(useless)["error"] is None
    assert judged(Answer(None, "no"), reference, torch.float64)["verdict"] == "refuses"
    assert judged(Answer(None, "no", False), reference, torch.float64)["verdict"] == "not applicable"
    assert judged(Answer(exact, ""), None, torch.float64)["verdict"] == "answers"


def test_a_peer_in_a_process_of_its_own():
    reference = ours.reference(CASES["linear"])
    with PeerProcess("jacrev") as process:
        answer = process.ask("linear", torch.float64)
        assert answer.kernel is not None
        assert reference.kernel_error(answer.kernel) <= 1e-10
        assert process.ask("checkpoint", torch.float64).message.startswith("RuntimeError: torch.func")
        assert "no answer within" in process.ask("convolution", torch.float64, 1e-6).message
        assert process.ask("linear", torch.float64).kernel is not None  # in a new process


def test_the_command_measures_a_network_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n    return torch.nn.Linear(5, 2), torch.randn(13, 5)\n"
        "def drop():\n    return torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.Dropout()), torch.randn(13, 5)\n"
    )
    out, names = tmp_path / "out", [f"{tmp_path}/mine.py:{name}" for name in ("make", "drop")]
    call("coverage", "--model", names[0], "--model", names[1], "--no-peers", "--out", out)
    found = lines.read(out)
    assert [(line["verdict"], line["dtype"]) for line in found] == [
        (verdict, dtype) for verdict in ("exact", "refuses") for dtype in ("float64", "float32")
    ]
    assert max(line["error"] for line in found[:2]) <= 1e-5
    assert "Your networks" in (out / "coverage.md").read_text()
    done = call("coverage", "--filter", "nowhere", "--out", out, code=2)
    assert "filter: expected a part of the name" in done.stderr


def test_lines_are_merged_by_case_and_tool():
    a, b, again = ({"case": c, "tool": "x", "error": e} for c, e in (("a", 1), ("b", 1), ("a", 2)))
    assert lines.merge([a, b], [again]) == [b, again]


def test_filters():
    assert len(select([])) == len(CASES)
    assert {case.name for case in select(["normalisation"])} >= {"layer norm", "group norm"}
    with pytest.raises(ValueError, match="filter: expected a part"):
        select(["nothing of the kind"])


def test_the_page_is_that_of_the_stored_lines():
    stored = lines.read(ROOT / "docs" / "results")
    assert (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8") == page.render(
        stored, f"results/{lines.FILE}"
    ), "run catapult coverage --out docs/results --page docs/coverage.md"
    assert {line["case"] for line in stored if line["tool"] == ENGINE} == set(CASES)
    assert {line["tool"] for line in stored} <= {ENGINE, *PEERS}
    assert {line["verdict"] for line in stored} <= set(page.LEGEND)
    assert all(json.dumps(line, allow_nan=False) for line in stored)
