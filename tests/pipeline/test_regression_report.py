"""Reports of a regression run: Markdown for a pull request, JUnit XML for CI, and the page."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from regressions import passed, past, regression

from pipeline.regression import report
from pipeline.regression.history import Series, series, with_today
from pipeline.regression.outcome import Gate, Outcome
from pipeline.regression.report import junit, markdown, words
from pipeline.report.text import short_paths


def history(outcome: Outcome, n: int = 60) -> list[Series]:
    return series(with_today(past(n), outcome))


def many(n: int) -> Outcome:
    """A run with n broken limits and as many kept ones, all with long notes."""
    gates = [
        Gate(f"check{at}", "a|b_c", "<data>", "ppl", 1.0 + at, 1.0, "<= 1", bool(at % 2), "why `so` " * 100)
        for at in range(2 * n)
    ]
    return replace(passed(), verdict="regression", gates=gates, checks={f"check{at}": "x" for at in range(n)})


def test_the_verdict_counts_what_was_judged() -> None:
    assert words.verdict(regression()) == "4 of 6 limits are broken. 1 could not be judged."
    assert words.verdict(passed()) == "5 of 6 limits are kept. 1 could not be judged."
    one = replace(passed(), gates=passed().gates[:1])
    assert words.verdict(one) == "All 1 limit is kept."
    assert words.verdict(replace(one, verdict="promoted")).startswith("This run is the baseline from now on.")
    nothing = replace(passed(), gates=(), verdict="incomplete", baseline=None)
    assert words.verdict(nothing) == "Not everything could be measured. No limit was judged."
    assert words.against(nothing) == "Without a baseline."
    assert words.against(passed()) == "Against baseline smoke (2026-11-21 03:00 UTC, 0.1.0, 1a2b3c4d5e)."


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (20.123456789, "20.1235"),
        (1234567.0, "1,234,567"),
        (float("nan"), "-"),
        (None, "-"),
        ("ab" * 32, "abababababab…"),
        ("name", "name"),
        (["avx2", "amx"], "avx2, amx"),
        (3, "3"),
    ],
)
def test_values_are_read_by_people(value: Any, said: str) -> None:
    assert words.value(value) == said


def test_changes_keep_two_digits() -> None:
    fractions = (0.0021, -0.25, 0.098, 1.5, 0.0, 1e-17, None)
    told = ["+0.21 %", "-25 %", "+9.8 %", "+150 %", "0 %", "+0.000000000000 %", "-"]
    assert [words.per_cent(x) for x in fractions] == told
    assert [words.change(1.0, 0.0), words.change(None, 1.0), words.change("a", "b")] == [None] * 3


def test_a_change_names_what_was_new() -> None:
    found = next(s for s in history(passed()) if s.id[:4] == ("pydoc", "tiny", "pydoc", "ppl"))
    assert words.changes(found) == [
        "pydoc: tiny on pydoc: ppl 19.7108 → 19.6322 (-0.40 %) on 2026-10-23 with version 0.0.9 → 0.1.0, "
        "commit 1d1d1d1d1d → 1e1e1e1e1e."
    ]
    same = replace(found, rows=tuple(row._replace(version="1", git_sha="a") for row in found.rows))
    assert words.changes(same)[0].endswith("on 2026-10-23, with the same version, commit and processor.")


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("in /home/me/models/a.gguf; and 'file:///tmp/x/y.db'", "in a.gguf; and 'y.db'"),
        ("~/models/x.gguf", "x.gguf"),
        ("ratio/llama_cpp 3 tokens/s http://127.0.0.1:5000/a/b n/a </details>", None),
        ("data/a/b.txt ../c/d", None),
    ],
)
def test_absolute_paths_are_told_by_their_last_part(text: str, short: str | None) -> None:
    assert short_paths(text) == (short or text)


def test_the_summary_begins_with_the_verdict_and_what_is_broken() -> None:
    text = markdown.document(regression(), history(regression()))
    assert text.startswith(
        "## smoke: regression\n\n"
        "**4 of 6 limits are broken. 1 could not be judged.** "
        "Against baseline smoke (2026-11-21 03:00 UTC, 0.1.0, 1a2b3c4d5e).\n\n"
        "| check | variant | data | metric | value | baseline | change | limit |\n"
        "| :-- | :-- | :-- | :-- | --: | :-- | --: | :-- |\n"
        "| pydoc | tiny | pydoc | nll_sha256 | e1e1e1e1e1e1… | d1d1d1d1d1d1… | - | the baseline's bits |\n"
        "| pydoc | tiny | pydoc | ppl | 19.9788 | 19.6322 | +1.8 % | \\<= 1.002 x baseline |\n"
        "| speed | tiny | ppl512 | fma_share | 0.56 | 0.8 | -30 % | \\>= 0.85 x baseline |\n"
        "| speed | tiny | tg64 | fma_share | 0.21 | 0.3 | -30 % | \\>= 0.85 x baseline |\n\n"
        "- tiny on pydoc: bits differ from blk.2 on, in a tensor of tiny.gguf; document 1 moved most"
    )
    assert "Tensors whose bytes are others: blk.2.ffn_down.weight" in text
    assert "| 13 | 1 | 2600 | 100 | +0.12 |" in text
    assert "/home" not in text


@pytest.mark.parametrize("make", [passed, regression, lambda: many(30), lambda: many(2000)])
def test_the_summary_is_markdown_that_github_takes(make: Callable[[], Outcome]) -> None:
    """Parsed by markdown-it with tables: every table is one, every fold is opened and closed."""
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    outcome = make()
    text = markdown.document(outcome, history(outcome))
    assert len(text) < 65_536
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == len(re.findall(r"^\| (?::?--:? \| ?)*:?--:? \|$", text, re.MULTILINE))
    cells = [token.content for token in tokens if token.type == "inline"]
    assert not [cell for cell in cells if re.search(r"\|.*\|", cell) or cell.startswith("<details")]
    blocks = "".join(token.content for token in tokens if token.type == "html_block")
    assert blocks.count("<details>") == blocks.count("</details>") > 1
    assert "<data>" not in blocks
    inline = [child.type for token in tokens for child in token.children or ()]
    assert "html_inline" not in inline
    assert ("… and" in text) == (len(outcome.gates) > 100)


def test_a_run_without_gates_or_baseline_has_a_summary() -> None:
    bare = Outcome("s", "0" * 16, "incomplete", {}, (), (), (), None, {}, ["check a: out of memory"])
    assert markdown.document(bare, []) == (
        "## s: incomplete\n\n"
        "**Not everything could be measured. No limit was judged.** Without a baseline.\n\n"
        "- Warning: check a: out of memory\n"
    )


_CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "property": set(),
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
    "skipped": set(),
    "error": set(),
    "failure": set(),
    "system-err": set(),
}
_ATTRIBUTES = {
    "testsuites": ({"name"}, {"time", "tests", "failures", "disabled", "errors"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"time", "skipped", "timestamp", "hostname", "id", "package"},
    ),
    "properties": (set(), set()),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname"}, {"time"}),
    "skipped": (set(), {"message", "type"}),
    "error": (set(), {"message", "type"}),
    "failure": (set(), {"message", "type"}),
    "system-err": (set(), set()),
}


def follows_the_schema(text: str) -> ElementTree.Element:
    """Elements, attributes and counts as junit-10.xsd of Jenkins' xUnit plugin has them."""
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        assert {child.tag for child in element} <= _CHILDREN[element.tag]
        required, optional = _ATTRIBUTES[element.tag]
        assert required <= element.attrib.keys() <= required | optional, element.attrib
        if "time" in element.attrib:
            assert re.fullmatch(r"\d+\.\d{3}", element.attrib["time"])
    for of in (root, *root.iter("testsuite")):
        assert int(of.attrib["tests"]) == len(list(of.iter("testcase")))
        assert int(of.attrib["failures"]) == len(list(of.iter("failure")))
        assert int(of.attrib["errors"]) == len(list(of.iter("error")))
    for suite in root.iter("testsuite"):
        assert int(suite.attrib["skipped"]) == len(list(suite.iter("skipped")))
        if "timestamp" in suite.attrib:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
        for properties in suite.iter("properties"):
            assert len(properties)
    return root


def test_junit_has_a_case_for_each_limit() -> None:
    outcome = regression()
    root = follows_the_schema(junit.document(outcome))
    cases = list(root.iter("testcase"))
    assert [case.attrib["classname"] for case in cases] == [f"smoke.{gate.name}" for gate in outcome.gates]
    assert len({(case.attrib["classname"], case.attrib["name"]) for case in cases}) == len(cases)
    assert cases[1].attrib["name"] == "ppl <= 1.002 x baseline [tiny, pydoc]"
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "ppl is 19.9788, expected <= 1.002 x baseline (baseline 19.6322)"
    assert "bits differ from blk.2 on, in a tensor of tiny.gguf" in str(failure.text)
    assert [case.attrib["time"] for case in cases[:2]] == ["12.250", "0.000"]
    (suite,) = root
    assert (suite.attrib["time"], suite.attrib["hostname"]) == ("61.500", "builder")
    assert suite.attrib["timestamp"] == "2026-11-22T03:00:07"
    told = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
    assert told["engine digest"] == "ef" * 32
    assert told["baseline engine digest"] == "ab" * 32


def test_junit_is_read_by_others(tmp_path: Path) -> None:
    junitparser = pytest.importorskip("junitparser", reason="the extra `dev` is not installed")
    file = tmp_path / "r.xml"
    file.write_text(junit.document(regression()), encoding="utf-8")
    (suite,) = junitparser.JUnitXml.fromfile(str(file))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (6, 4, 0, 1)
    results = [type(case.result[0]).__name__ if case.result else "passed" for case in suite]
    assert results == ["Failure", "Failure", "passed", "Skipped", "Failure", "Failure"]
    (skipped,) = (case for case in suite if case.is_skipped)
    assert skipped.result[0].message == "ik_llama_cpp did not run: it is not installed here"


def test_an_incomplete_run_is_not_green_in_ci() -> None:
    outcome = replace(passed(), verdict="incomplete", warnings=["q4: out of memory"])
    root = follows_the_schema(junit.document(outcome))
    (error,) = root.iter("error")
    assert error.text == "q4: out of memory"
    bare = replace(outcome, gates=(), measured=(), baseline=None, provenance={}, warnings=())
    follows_the_schema(junit.document(bare))


def test_junit_is_well_formed_whatever_the_names() -> None:
    odd = 'a<b>&"\x00\x1b\ud800 /home/me/x/y.gguf\n'
    gate = Gate(odd, odd, odd, odd, None, None, odd, False, odd)
    outcome = replace(regression(), suite=odd, gates=[gate], warnings=[odd], provenance={"host": odd})
    text = junit.document(outcome)
    root = follows_the_schema(text.encode("utf-8").decode())
    assert "y.gguf" in text
    assert "/home/me" not in text
    assert next(root.iter("testcase")).attrib["classname"].startswith('a<b>&"\ufffd\ufffd\ufffd a<b'[:9])


def test_without_the_extra_there_is_the_rest_and_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("regression.report.page", "regression.report.charts"):
        monkeypatch.delitem(sys.modules, f"pipeline.{name}", raising=False)
    for name in ("page", "charts"):
        monkeypatch.delattr(report, name, raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with caplog.at_level(logging.WARNING):
        paths = report.write(passed(), tmp_path, [])
    assert paths["report"] is None
    assert [record.getMessage() for record in caplog.records] == [report.NO_EXTRA]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["regression.md", "regression.xml"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        report.write(passed(), tmp_path / "file", [])
