"""The code in docs/data.md and docs/conventions.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "count", "shown"), [("data.md", 3, "embedded"), ("conventions.md", 1, "")])
def test_every_code_block_runs(page, count, shown, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    assert shown in capsys.readouterr().out


def test_the_table_of_image_sets_is_complete():
    import catapult_ext as cx

    text = (DOCS / "data.md").read_text(encoding="utf-8")
    for found in cx.data.available():
        assert f"| `{found.name}` |" in text
