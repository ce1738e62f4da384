"""The report in a real browser: nothing is cut off or overlaps on a desk, on a phone and on paper."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from python_experiments import registry, style

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: the report was not seen in a browser"
)

#: Runs in a copy of the page: what a reader would complain about, as JSON in an element around its frame.
MEASURE = """<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth, wide = [], small = [], images = [], overlaps = [];
  for (const e of document.querySelectorAll("body *")) {
    const box = e.getBoundingClientRect();
    if (box.right > width + 1 && !e.closest(".scroll")) wide.push(e.tagName + ": " + e.textContent.slice(0, 40));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (own && box.width && e.tagName !== "SUB" && parseFloat(getComputedStyle(e).fontSize) < 11)
      small.push(e.textContent.slice(0, 40));
  }
  for (const i of document.images) images.push([i.naturalWidth, i.getBoundingClientRect().width]);
  for (const row of document.querySelectorAll("#overview tbody tr")) {
    const cells = [...row.querySelectorAll("td")].map(c => c.getBoundingClientRect());
    for (let i = 1; i < cells.length; i++)
      if (cells[i].left < cells[i-1].right - 1 && cells[i].top < cells[i-1].bottom - 1)
        overlaps.push(row.textContent.slice(0, 40));
  }
  const found = document.createElement("pre");
  found.id = "measured";
  found.textContent = JSON.stringify({
    width, wide, small, images, overlaps,
    page: document.documentElement.scrollWidth,
    stacked: getComputedStyle(document.querySelector("#overview td")).display === "block",
    figures: document.querySelectorAll("figure").length,
    verdicts: [...document.querySelectorAll("#overview .v")].map(v => getComputedStyle(v).color),
  });
  parent.document.body.append(found);
});
</script>"""


def chromium(profile: Path, *arguments: str) -> str:
    """Run the browser without a window; what it prints."""
    assert CHROMIUM is not None
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root with one
    command = [CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [*command, *sandbox, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def measured(report_file: Path, tmp_path: Path, width: int) -> dict:
    """What the script finds on the page in a frame of that width; windows have a smallest one."""
    page = report_file.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>")
    frame = tmp_path / "frame.html"
    style = f"border: 0; width: {width}px; height: 1000px"
    frame.write_text(f'<iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>', encoding="utf-8")
    dom = chromium(tmp_path / "profile", "--window-size=1400,1200", "--dump-dom", frame.as_uri())
    (found,) = re.findall(r'<pre id="measured">(.*?)</pre>', dom, re.S)
    return json.loads(html.unescape(found))


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)])
def test_nothing_is_cut_off_too_small_or_overlapping(report_file, tmp_path, width, phone):
    found = measured(report_file, tmp_path, width)
    assert found["width"] == width
    assert found["page"] == width, "the page can be scrolled sideways"
    assert found["wide"] == []
    assert found["small"] == []
    assert found["overlaps"] == []
    assert found["stacked"] is phone  # cells below one another on a phone, side by side on a desk
    assert len(found["images"]) == found["figures"] == len(registry.all_experiments())
    for natural, shown in found["images"]:
        inches = natural / style.DPI
        assert inches > 2.5  # decoded
        # Letters of 10 points are at least 10 pixels high on a phone, 6.5 on a desk.
        assert shown / inches >= (70 if phone else 46)
    assert len(set(found["verdicts"])) >= 2  # what holds and what fails have colours of their own


def test_it_prints_each_figure_on_a_page_of_its_own(report_file, tmp_path):
    pdf = tmp_path / "report.pdf"
    chromium(tmp_path / "profile", f"--print-to-pdf={pdf}", "--no-pdf-header-footer", report_file.as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    experiments = len(registry.all_experiments())
    assert experiments + 1 <= pages <= 2 * experiments + 3
