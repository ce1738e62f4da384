"""The documentation: its code runs as printed, its commands exist, and its site is complete and has no broken link."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer.main

import catapult_ext as cx
from python_experiments import registry
from python_experiments.cli import app

ROOT = Path(__file__).parents[1]
#: Pages with Python code, and a word that it has to print.
PAGES = {
    "README.md": "LayerReport",
    "docs/data.md": "embedded",
    "docs/conventions.md": "",
    "docs/models.md": "Myrtle-5",
    "docs/training.md": "kernel_trace",
    "docs/runs.md": "interrupted",
    "docs/memory.md": "tangent kernel of 200 x 200 samples, 1 output",
    "docs/tutorial.md": "catapult: starts at",
}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _pages() -> list[str]:
    """README and every page that is written by hand."""
    written = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
    return [
        "README.md",
        *(page.as_posix() for page in written if page.parts[1] not in ("experiments", "results")),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_runs(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [code for label, code in FENCE.findall(_text(page)) if label == "python"]
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert PAGES[page] in capsys.readouterr().out


def test_every_page_with_code_is_run() -> None:
    assert {page for page in _pages() if "```python" in _text(page)} == set(PAGES)


def _commands(text: str) -> list[list[str]]:
    """Every command of the shell blocks, as words without the comment behind them."""
    blocks = [code for label, code in FENCE.findall(text) if label in ("", "sh")]
    lines = [line for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _quoted(text: str) -> list[list[str]]:
    """Every command in a sentence; some of their words stand for something else, like NAME."""
    return [
        shlex.split(code) for code in re.findall(r"`((?:catapult|make)(?: [^`]*)?)`", FENCE.sub("", text))
    ]


def _check_make(words: list[str]) -> None:
    makefile = _text("Makefile")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    (variables,) = re.findall(r"^# Variables: (.*(?:\n# .*)*)", makefile, re.MULTILINE)
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert name in (re.findall(r"[A-Z_]+", variables) if is_variable else targets.split()), words


def _check_catapult(words: list[str], *, exactly: bool) -> None:
    """The command and its options exist; with `exactly` it is parsed as the command line would, and not run."""
    command = typer.main.get_command(app)
    words = list(words)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    if exactly:
        assert not getattr(command, "commands", {}) or command.invoke_without_command, words  # type: ignore[attr-defined]
        command.make_context(command.name, words)
        return
    options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, words
    takes_names = any(parameter.param_type_name == "argument" for parameter in command.params)
    assert takes_names or not words or words[0].startswith("-"), words


def _check_commands(text: str) -> int:
    for words in _quoted(text):
        _check_make(words[1:]) if words[0] == "make" else _check_catapult(words[1:], exactly=False)
    commands = _commands(text)
    for program, *words in commands:
        assert program in ("make", "catapult"), f"{program}: say here how this command is checked"
        _check_make(words) if program == "make" else _check_catapult(words, exactly=True)
    return len(commands)


def test_every_command_exists() -> None:
    counts = {page: _check_commands(_text(page)) for page in _pages()}
    assert {page for page, count in counts.items() if count} == {
        "README.md",
        "docs/development.md",
        "docs/runs.md",
    }


@pytest.mark.parametrize(
    "text",
    [
        "`make tset`",
        "`catapult rum fig2`",
        "`catapult report --ouut x`",
        "```\ncatapult run fig2 --preset big\n```",
    ],
)
def test_a_command_that_does_not_exist_is_found(text: str) -> None:
    with pytest.raises((AssertionError, typer.BadParameter)):
        _check_commands(text)


def test_links_lead_somewhere() -> None:
    rendered = ROOT / "docs" / "experiments"  # by the build, which checks links to it
    for page in _pages():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", _text(page))):
            path = ((ROOT / page).parent / target).resolve()
            if not target.startswith("http") and path.parent != rendered:
                assert path.exists(), f"{page} links to {target}"


def test_the_table_of_image_sets_is_complete() -> None:
    for found in cx.data.available():
        assert f"| `{found.name}` |" in _text("docs/data.md")


def test_the_citation_has_the_version_and_the_paper() -> None:
    citation = _text("CITATION.cff")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [cx.__version__]
    (bibtex,) = (code for label, code in FENCE.findall(_text("docs/citing.md")) if label == "bibtex")
    (title,) = re.findall(r'^  title: "(.*)"$', citation, re.MULTILINE)
    authors = re.findall(r"given-names: (.*)\n\s+family-names: (.*)", citation)
    bibtex = re.sub(r"\s+", " ", re.sub(r"[{}]", "", bibtex))
    assert title in bibtex
    assert " and ".join(f"{family}, {given}" for given, family in authors) in bibtex


@pytest.mark.skipif(
    find_spec("sphinx") is None, reason="no Sphinx here (Python 3.10): the site was not built"
)
def test_the_site_is_complete_and_needs_nothing_else(tmp_path: Path) -> None:
    site, cache = tmp_path / "site", tmp_path / "doctrees"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", "-d", cache]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, ROOT / "docs", site], capture_output=True, text=True, env=os.environ | hidden, timeout=300
    )
    assert done.returncode == 0, done.stderr

    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    documented = {name for kind in inventory.data for name in inventory.data[kind]}
    assert {f"catapult_ext.{name}" for name in cx.__all__} - documented == set()
    for room in ("data", "models", "observe", "ops", "runs", "training"):
        module = import_module(f"catapult_ext.{room}")
        values = {name: getattr(module, name) for name in module.__all__}
        names = {name for name, value in values.items() if not isinstance(value, ModuleType)}
        assert {
            n for n in names if not {f"catapult_ext.{n}", f"catapult_ext.{room}.{n}"} & documented
        } == set()

    for name, experiment in registry.all_experiments().items():
        page = (site / "experiments" / f"{name}.html").read_text(encoding="utf-8")
        assert experiment.figure in page
        assert page.count("has to fail on the control") == len(experiment.claims)
        assert _check_commands(_text(f"docs/experiments/{name}.md")) == 2
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="([^"]*)"', page.read_text("utf-8")
        )
        assert loaded
        assert [source for source in loaded if re.match(r"(https?:)?//", source)] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\W*(https?:)?//|@import", style.read_text("utf-8")), style.name
