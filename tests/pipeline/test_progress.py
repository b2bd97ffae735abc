"""Laws of progress: what is shown follows from sums, and it is shown on standard error."""

from __future__ import annotations

import io
import logging
import math

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import BarProgress, LineProgress, Progress, Tally, make_progress


def test_perplexity_is_that_of_the_summed_likelihood() -> None:
    tally = Tally(4, 1, 10, 10 * math.log(8.0))
    tally.add(1, 30, 30 * math.log(8.0), 512)
    assert tally.perplexity() == "8.0000"
    assert Tally(4, 0, 0, 0.0).perplexity() == "-"
    assert Tally(4, 0, 1, 1e9).perplexity() == "-"


def test_pace_counts_only_windows_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tally = Tally(12, 2, 0, 0.0)
    assert (tally.tokens_per_s(), tally.eta()) == ("-", "-")
    now[0] += 10
    tally.add(2, 512, 1.0, 1024)
    assert (tally.tokens_per_s(), tally.eta()) == ("102", "0:40")
    tally.total += 1440
    assert tally.eta() == "2:00:40"


def test_lines_are_sparse_and_the_last_one_is_never_missing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = LineProgress(every_s=3600)
    lines.start(6, 2)
    for _ in range(4):
        lines.advance(1, 10, 10.0, 20)
    lines.stop()
    assert [record.getMessage()[:24] for record in caplog.records] == [
        "4 windows to score, 2 do",
        "6 of 6 windows, perplexi",
    ]
    assert "perplexity 2.7183" in caplog.text


def test_the_bar_shows_windows_and_running_perplexity() -> None:
    out = io.StringIO()
    bar = BarProgress(Console(file=out, force_terminal=True, width=120))
    bar.note("starting workers")
    bar.start(6, 2)
    bar.advance(3, 10, 10.0, 20)
    bar._display().refresh()
    bar.stop()
    bar.stop()
    assert "starting workers" in out.getvalue()
    assert "5/6" in out.getvalue()
    assert "2.7183" in out.getvalue()


@pytest.mark.parametrize(
    "shown", [LineProgress(), BarProgress(Console(file=io.StringIO(), force_terminal=True))]
)
def test_every_display_takes_any_order_of_calls(shown: Progress) -> None:
    shown.advance(1, 1, 1.0, 1)
    shown.note("early")
    shown.start(1)
    shown.start(1)
    shown.advance(1, 1, 1.0, 1)
    shown.stop()
    shown.stop()


def test_nothing_reaches_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(make_progress(), LineProgress)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    bar = make_progress()
    assert isinstance(bar, BarProgress)
    bar.start(2)
    bar.advance(1, 1, 1.0, 1)
    bar.stop()
    assert capsys.readouterr().out == ""


def test_windows_of_several_runs_have_no_perplexity_in_common(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lines = LineProgress(every_s=0)
    lines.start(2, mixed=True)
    lines.advance(1, 10, 10.0, 20)
    assert "1 of 2 windows, perplexity -, " in caplog.text
