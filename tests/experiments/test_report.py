"""The report page: complete, self-contained, well-formed; what was not run is shown as such."""

from __future__ import annotations

import base64
import re

import pytest

from python_experiments import readings, registry, report, results, style, sweep, training
from tests.experiments.helpers import Page, letters
from tests.experiments.synthetic import groups_of

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
        seconds = readings.duration(sum(run.summary["seconds"] for run in runs))
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


def size_of(image):
    """Width and height of a PNG in pixels."""
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    return tuple(int.from_bytes(image[at : at + 4], "big") for at in (16, 20))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_plot_is_stored_beside_the_report(smoke, report_file, name):
    request = registry.get(name).request("smoke")
    image = (smoke.out / "plots" / f"{request.key}.png").read_bytes()
    assert min(size_of(image)) > 2.5 * style.DPI
    assert len(image) > 5000
    assert base64.b64encode(image).decode() in report_file.read_text(encoding="utf-8")


def test_plots_are_stored_as_png_and_pdf(tmp_path, monkeypatch):
    monkeypatch.undo()  # in full, not as a draft
    figure = registry.get("fig3-fcn").plot(groups_of("fig3-fcn"))
    inches = figure.get_size_inches()
    files = style.save(figure, tmp_path / "plots" / "fig3-fcn")
    assert [file.name for file in files] == ["fig3-fcn.png", "fig3-fcn.pdf"]
    image, drawing = (file.read_bytes() for file in files)
    assert size_of(image) == pytest.approx(tuple(160 * inches), abs=1)
    assert drawing.startswith(b"%PDF-")
    assert drawing.rstrip().endswith(b"%%EOF")
    assert b"/FontFile2" in drawing  # letters stay letters
    assert b"/CreationDate" not in drawing  # the same results give the same file


def test_a_missing_run_is_shown_as_missing(tmp_path):
    request = registry.get("fig5").request("smoke")
    results.remember(tmp_path, request)
    training.train(*request.groups()["main"]["SGD, batch 1"][0], tmp_path, None)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    section = section_of(page, request.key)
    assert "2 of its runs are not finished" in section.text
    assert [row["verdict"] for row in rows_by_label(section)] == ["✗holds,controlnotrun"] * 2
    assert len(section.all("img")) == 1
    others = [name for name in EXPERIMENTS if name != request.experiment]
    assert [s.attributes.get("id") for s in page.root.all("section")] == ["overview", request.key, *others]


def test_a_sweep_has_its_own_section_and_says_in_how_many_variants_a_claim_holds(tmp_path):
    experiment = registry.get("fig5")
    config = experiment.presets["smoke"].config
    requests = [
        experiment.request("smoke", changes=changes)
        for changes in sweep.variants(config, ["network.width=4096,256", "max_steps=30"])
    ]
    for request in requests:
        results.remember(tmp_path, request)
        for conditions in request.groups().values():
            for config, seed in (member for members in conditions.values() for member in members):
                training.train(config, seed, tmp_path, None)
    page = Page(report.write(tmp_path).read_text(encoding="utf-8"))
    section = section_of(page, f"sweep-{requests[0].base.key}")
    names = [row.all("td")[0].text for row in section.all("tr")[1:]]
    assert names == ["network.width=256, max_steps=30", "network.width=4096, max_steps=30"]  # by size
    assert len(section.all("img")) == 2
    found = {request.changes: results.verdicts(tmp_path, request) for request in requests}
    (body,) = [b for b in section_of(page, "overview").all("tbody") if "sweep" in b.all("th")[0].text]
    assert "2 variants" in body.all("th")[0].text
    for i, row in enumerate(rows_by_label(body)):
        held = sum(verdicts[i].word == "holds" for verdicts in found.values())
        assert row["verdict"] == f"holdsin{held}of2"
    words = [v.word for verdicts in found.values() for v in verdicts]
    total = sum(len(e.claims) for e in registry.all_experiments().values()) - 2 + len(words)
    assert f"{total} claims: {words.count('holds')} hold" in page.root.text


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
    ("seconds", "words"),
    [
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (12.3, "12 s"),
        (99.6, "1.7 min"),
        (210, "3.5 min"),
        (596.9, "9.9 min"),
        (745, "12 min"),
        (7200, "2.0 h"),
        (90_000, "25 h"),
    ],
)
def test_times_are_words(seconds, words):
    assert readings.duration(seconds) == words
