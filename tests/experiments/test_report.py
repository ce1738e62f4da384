"""The report page: complete, self-contained, well-formed; what was not run is shown as such."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from python_experiments import registry, report, results, training
from tests.experiments.helpers import Page, letters

EXPERIMENTS = list(registry.all_experiments())


def rows_by_label(section):
    """The rows of a table of claims as label -> letters of the cell."""
    rows = []
    for row in section.all("tr"):
        cells = {cell.attributes.get("data-l"): letters(cell.text) for cell in row.all("td")}
        if "claim" in cells:
            rows.append(cells)
    return rows


def section_of(page, anchor):
    found = [s for s in page.root.all("section") if s.attributes.get("id") == anchor]
    assert len(found) == 1, anchor
    return found[0]


def media(page, condition):
    """The rules of an @media block of the page."""
    (style,) = page.root.all("style")
    start = style.text.index("{", style.text.index(f"@media {condition}")) + 1
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(style.text[end], 0)
        end += 1
    return style.text[start : end - 1]


def declarations(rules, selector):
    """The declarations that rules give to a selector."""
    found = ""
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", rules):
        if selector in (part.strip() for part in selectors.split(",")):
            found += body + ";"
    return dict(tuple(p.strip() for p in d.split(":", 1)) for d in found.split(";") if ":" in d)


def test_nothing_is_fetched_from_elsewhere(report_page, report_file):
    assert report_page.links
    assert all(link.startswith(("data:", "#")) for link in report_page.links)
    html = report_file.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|<script|<link|<iframe", html)
    ids = {e.attributes.get("id") for tag in ("section", "h2", "figure") for e in report_page.root.all(tag)}
    assert {link[1:] for link in report_page.links if link.startswith("#")} <= ids


def test_there_is_one_section_for_each_experiment(report_page):
    sections = [s.attributes.get("id") for s in report_page.root.all("section")]
    assert sections == ["overview"] + [registry.get(name).request("smoke").key for name in EXPERIMENTS]
    for name in EXPERIMENTS:
        experiment = registry.get(name)
        section = section_of(report_page, experiment.request("smoke").key)
        (heading,) = section.all("h2")
        assert heading.text == f"{experiment.figure}: {experiment.title}"
        (image,) = section.all("img")
        assert image.attributes["src"].startswith("data:image/png;base64,")
        assert image.attributes["alt"]
        for remark in experiment.remarks:
            assert letters(remark) in letters(section.text)


def test_the_overview_has_a_row_for_each_claim(smoke, report_page):
    bodies = section_of(report_page, "overview").all("tbody")
    assert len(bodies) == len(EXPERIMENTS)
    for name, body in zip(EXPERIMENTS, bodies, strict=True):
        experiment = registry.get(name)
        request = experiment.request("smoke")
        runs = [
            run
            for group in training.finished_groups(smoke.out, request).values()
            for members in group.values()
            for run in members
        ]
        (head,) = body.all("th")
        seconds = report.duration(sum(run.summary["seconds"] for run in runs))
        assert "preset smoke" in head.text
        assert str(request.config.task) in head.text
        assert f"{len(runs)} runs, {seconds}" in head.text
        assert runs[0].environment["cpu"] in head.text
        assert "1 thread," in head.text
        verdicts = results.verdicts(smoke.out, request)
        rows = rows_by_label(body)
        assert len(rows) == len(verdicts)
        for verdict, row in zip(verdicts, rows, strict=True):
            claim = verdict.claim
            assert row["claim"] == letters(claim.statement)
            assert row["paper"] == letters(claim.paper)
            assert row["ours"].startswith(letters(f"{results.number(claim, verdict.ours)}(≥{claim.bound:g})"))
            assert row["control"] == letters(results.number(claim, verdict.control))
            assert row["verdict"] == letters(f"{'✓' if verdict.word == 'holds' else '✗'}{verdict.word}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_plots_are_stored_as_png_and_svg(smoke, report_file, name):
    stem = smoke.out / "plots" / registry.get(name).request("smoke").key
    image = stem.with_name(stem.name + ".png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert min(width, height) > 400
    assert len(image) > 5000
    drawing = ET.parse(stem.with_name(stem.name + ".svg")).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(drawing.findall(".//{http://www.w3.org/2000/svg}path")) > 10


def test_it_reads_on_a_phone(report_page):
    (viewport,) = [m for m in report_page.root.all("meta") if m.attributes.get("name") == "viewport"]
    assert "width=device-width" in viewport.attributes["content"]
    rules = media(report_page, "(max-width")
    for tag in ("table", "tbody", "tr", "td", "tbody th"):  # cells below one another, not side by side
        assert declarations(rules, tag).get("display") == "block", tag
    assert declarations(rules, "td").get("white-space") != "nowrap"
    assert declarations(rules, "thead").get("display") == "none"


def test_it_prints(report_page):
    rules = media(report_page, "print")
    assert declarations(rules, "body")["max-width"] == "none"
    assert declarations(rules, "figure")["break-inside"] == "avoid"


def test_experiments_without_runs_are_shown_as_not_run(tmp_path):
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    assert [s.attributes.get("id") for s in page.root.all("section")] == ["overview", *EXPERIMENTS]
    for name, body in zip(EXPERIMENTS, section_of(page, "overview").all("tbody"), strict=True):
        rows = rows_by_label(body)
        assert len(rows) == len(registry.get(name).claims)
        assert all(row["verdict"] == row["control"] == "notrun" for row in rows)
        assert f"catapult run {name}" in section_of(page, name).text
    assert page.root.all("img") == []
    assert not (tmp_path / "plots").exists()


def test_text_from_the_results_is_escaped():
    assert str(report.formulas("L_<=5 & L_>5 <b>")) == (
        "<i>L</i><sub>≤5</sub> &amp; <i>L</i><sub>&gt;5</sub> &lt;b&gt;"
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.44, "0.4 s"), (12.3, "12 s"), (100, "1.7 min"), (210, "3.5 min")]
)
def test_times_are_words(seconds, words):
    assert report.duration(seconds) == words
