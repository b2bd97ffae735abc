"""The page of a regression run, which needs nothing but a browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
from regressions import measured, passed, past, regression

from pipeline.regression import report
from pipeline.regression.history import Series, series, with_today
from pipeline.regression.outcome import Outcome


def two(outcome: Outcome) -> list[Series]:
    """The history of a perplexity and a speed: what is drawn takes time."""
    found = series(with_today(past(), outcome))
    return [s for s in found if s.id[2:4] in (("pydoc", "ppl"), ("ppl512", "fma_share"))][:2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Renders the page without Vega's JavaScript, which takes a second and is not ours."""
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    from pipeline.regression.report import page as module
    from pipeline.report import page as frame

    monkeypatch.setattr(frame, "_library", lambda: "")
    return module.render


def test_the_page_is_whole_and_names_no_address(page: Callable[..., str]) -> None:
    import altair

    outcome = regression()
    text = page(outcome, two(outcome))
    parsed = browser.Tags(text)
    assert parsed.open == []
    assert [a[key] for _, a in parsed.tags for key in ("src", "href") if key in a] == ["data:,"]
    assert "://" not in text
    assert "/home" not in text
    pictures = browser.specifications(text)
    assert len(pictures) == 4  # windows that moved, a speed, two figures over time
    for spec in pictures:
        (altair.LayerChart if "layer" in spec else altair.Chart).from_dict(spec, validate=True)
    hosts = [a for _, a in parsed.tags if "data-spec" in a]
    assert all(a["role"] == "img" and a["aria-label"] for a in hosts)
    assert "blk.2</code> is the first output that differs; 3 of 9 outputs come before it" in text
    rows = re.findall(r'<tr class=(\w+)><th scope="row" data-value="([^"]+)"', text)
    assert rows[:4] == [("broken", "pydoc")] * 2 + [("broken", "speed")] * 2
    assert {kind for kind, _ in rows} == {"broken", "open", "kept"}


def test_change_points_are_marked_between_runs(page: Callable[..., str]) -> None:
    found = browser.specifications(page(passed(), two(passed())))[1:]
    marks = [
        value
        for spec in found
        for layer in spec["layer"]
        for value in layer.get("data", {}).get("values", [])
        if "moved" in value and "label" in value
    ]
    assert {
        "run": 29.5,
        "moved": "-0.40 %",
        "label": "-0.40 %",
        "align": "left",
        "when": "2026-10-23 03:00",
    } in marks
    assert {mark["run"] for mark in marks if mark["moved"] != "-0.40 %"} <= {
        19.5,
        20.5,
        39.5,
        40.5,
        18.5,
        38.5,
    }


def test_nothing_that_is_named_becomes_markup(page: Callable[..., str]) -> None:
    bad = '<img src=x onerror=y>&"</script>'
    outcome = regression()
    gates = [replace(gate, name=bad, metric=bad, note=bad) for gate in outcome.gates]
    culprits = [
        replace(c, name=bad, sentence=bad, layer=bad, tensors=[bad], differs={bad: (bad, None)})
        for c in outcome.culprits
    ]
    now = [replace(m, check=bad, variant=bad) for m in outcome.measured]
    odd = replace(
        outcome, suite=bad, gates=gates, culprits=culprits, measured=now, checks={bad: bad}, warnings=[bad]
    )
    text = page(odd, two(odd))
    assert browser.Tags(text).open == []
    assert "<img" not in text.replace("\\u003cimg", "")


def test_a_first_run_and_an_empty_one_have_pages(page: Callable[..., str]) -> None:
    first = replace(passed(), baseline=None)
    text = page(first, series(with_today([], first)))
    assert "This run is the first that is recorded with these measures." in text
    assert len(browser.specifications(text)) == 1  # of the speed
    bare = Outcome("s", "0" * 16, "incomplete", {}, (), (), (), None, {}, ["check a: out of memory"])
    text = page(bare, [])
    assert "check a: out of memory" in text
    assert browser.specifications(text) == []


def test_windows_that_did_not_move_or_are_others_have_no_picture() -> None:
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    from pipeline.regression.report import charts

    sums = measured()[0].windows
    assert sums is not None
    assert charts.moved(sums, sums, []) is None
    fewer = replace(sums, window=sums.window + 1)
    assert charts.moved(sums, fewer, []) is None
    broken = replace(sums, nll_sum=np.full_like(sums.nll_sum, np.nan))
    assert charts.moved(sums, broken, []) is None


def test_only_todays_figures_have_pictures_and_no_more_than_there_is_room_for(
    page: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.regression.report import page as module

    outcome = passed()
    rows = past(8)
    other = [row._replace(measure="before", value=3.0) for row in rows]
    found = series(with_today([*other, *rows], outcome))
    monkeypatch.setattr(module, "MOST_PICTURES", 2)
    text = page(outcome, found)
    assert len(browser.specifications(text)) == 3
    assert "5 more figures have no picture here." in text


def test_everything_is_written_and_named(page: Callable[..., str], tmp_path: Path) -> None:
    folder, few = tmp_path / "new" / "folder", past(2)[-7:]
    paths = report.write(passed(), folder, few)
    assert paths == {
        "summary": str(folder / "regression.md"),
        "junit": str(folder / "regression.xml"),
        "report": str(folder / "regression.html"),
    }
    assert sorted(map(str, folder.iterdir())) == sorted(map(str, paths.values()))
    before = [file.read_bytes() for file in sorted(folder.iterdir())]
    report.write(passed(), folder, few)
    assert [file.read_bytes() for file in sorted(folder.iterdir())] == before


WATCH = """<script>
const faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...said) => faults.push(said.join(" "));
const count = (selector) => document.querySelectorAll(selector).length;
const watch = setInterval(() => {
  if (count("figure svg") < count("figure")) return;
  clearInterval(watch);
  setTimeout(() => parent.postMessage({
    faults, width: innerWidth, scroll: document.documentElement.scrollWidth,
    pictures: count("figure svg"), empty: count("figure svg:not(:has(path))"),
    ink: getComputedStyle(document.body).color, fetched: performance.getEntriesByType("resource").length,
  }, "*"), 500);
}, 100);
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_in_a_sandbox_without_a_network(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    file = Path(str(report.write(regression(), tmp_path, past())["report"]))
    assert file.stat().st_size < 3_000_000
    for frame in browser.told_by(file.read_text(), WATCH, scheme, tmp_path):
        assert frame["faults"] == []
        assert frame["scroll"] <= frame["width"]
        assert (frame["pictures"], frame["empty"], frame["fetched"]) == (9, 0, 0)
        assert frame["ink"] == {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 233, 237)"}[scheme]
