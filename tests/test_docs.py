"""The code on the README and in docs/ runs as printed, block after block of a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import catapult_ext as cx

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "LayerReport",
    "docs/data.md": "embedded",
    "docs/conventions.md": "",
    "docs/training.md": "kernel_trace",
    "docs/runs.md": "interrupted",
}


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", _text(page), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert PAGES[page] in capsys.readouterr().out


def test_every_page_with_code_is_run() -> None:
    found = {"README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    assert {page for page in found if "```python" in _text(page)} == set(PAGES)


def test_links_lead_somewhere() -> None:
    for page in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", _text(page)):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_table_of_image_sets_is_complete() -> None:
    for found in cx.data.available():
        assert f"| `{found.name}` |" in _text("docs/data.md")
