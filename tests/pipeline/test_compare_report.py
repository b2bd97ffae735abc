"""What people see of a comparison: terminal, markdown, CSV, and the words and bins that they share."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console

from pipeline.compare import report
from pipeline.compare.kld_block import kld_block
from pipeline.compare.report import binned, columns, disagreements, markdown, terminal, words
from pipeline.compare.statistics import Targets, figures
from pipeline.report.text import flat
from tests.pipeline.comparisons import (
    N_SCORED,
    N_WINDOWS,
    PLACES,
    WINDOW,
    Letters,
    example,
    variant,
    windows,
)

MARKDOWN = """\
- Both variants are on the Pareto front: each step down in size costs divergence.
- Perplexity is higher than the base's beyond noise for Q4_0. Not told apart from the base by perplexity: \
Q8_0 (ln ratio +0.0012 ±0.0020).
- On the size ladder each differs in perplexity from the next smaller (Holm-corrected p \\< 0.05).

| variant | type | bpw | size | PPL | ln(PPL/base) | mean KLD | KLD p99 | RMS Δp % | same top % | p vs next |
| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
| tiny.F32 (base) | F32 | 32.00 | 67.1 MB | 20.0000 | - | - | - | - | - | - |
| tiny.Q8_0 | Q8_0 | 1.00 | 16.8 MB | 20.0240 | +0.0012 ±0.0020 | 0.00100 ±0.00005 | 0.009 \
| 0.791 | 99.90 | 0.012 |
| tiny.Q4_0 | Q4_0 | 0.50 | 8.39 MB | 20.8162 | +0.0400 ±0.0020 | 0.0500 ±0.0025 | 0.45 \
| 5.590 | 95.00 | 0.012 |

<sub>data name a\\|b.txt; data SHA-256 {digest}; numerics 1</sub>
"""


def test_markdown_is_this_text() -> None:
    summary, pairs = example()
    told = markdown.document(summary, pairs.base, flat(pairs.provenance))
    assert told == MARKDOWN.format(digest="ab" * 32)


def test_csv_is_this_text() -> None:
    variants = [
        {"name": 'a,"b"', "ln_ratio": 0.1, "kld_mean": None, "extra": 1, "bytes": 5, "dp_max": float("nan")},
        {"name": "c", "ln_ratio": 1e-17, "kld_mean": 2.0, "list": [1], "stopped": True},
    ]
    assert markdown.comma_separated({"variants": variants}) == (
        'name,bytes,stopped,ln_ratio,kld_mean,dp_max,extra\n"a,""b""",5,,0.1,,,1\nc,,True,1e-17,2.0,,\n'
    )


def test_markdown_ends_with_the_block_of_llama_perplexity() -> None:
    rng = np.random.default_rng(0)
    nll, window = rng.exponential(3.0, (2, 400)), np.repeat(np.arange(8), 50)
    known = figures(Targets(window, nll[0], nll[1], rng.exponential(0.1, 400), rng.random(400) < 0.9))
    summary, pairs = example()
    summary["variants"][0] |= known
    told = markdown.document(summary, pairs.base, [])
    assert told.endswith("```\n\n</details>\n")
    name = summary["variants"][0]["name"]
    assert f"```text\n{name}\n{kld_block(known)}".rstrip() in told
    assert f"Mean    KLD: {known['kld_mean']:10.6f}" in told


def test_without_the_extra_there_is_markdown_and_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("page", "sections", "charts"):
        monkeypatch.delitem(sys.modules, f"pipeline.compare.report.{name}", raising=False)
        monkeypatch.delattr(report, name, raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    summary, pairs = example()
    with caplog.at_level(logging.WARNING):
        path = report.write(summary, pairs, tmp_path)
    assert path.name == "comparison.md"
    assert [record.getMessage() for record in caplog.records] == [report.NO_EXTRA]
    assert sorted(found.name for found in tmp_path.iterdir()) == ["comparison.csv", "comparison.md"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        report.write(*example(), tmp_path / "file")


@pytest.mark.parametrize("width", [120, 100, 80, 64, 50, 40, 24])
def test_the_terminal_gets_what_fits(width: int) -> None:
    summary, pairs = example()
    out = io.StringIO()
    terminal.show(summary, pairs.base, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert all(name in text for name in ("tiny.F32", "Q8_0", "Q4_0", "0.0500 ±0.0025"))
    assert ("no room for:" in text) == (50 <= width < 100)
    assert ("RMS Δp %:" in text) == (width < 50)
    assert "Both variants are on the Pareto front" in text


def test_a_pipe_gets_a_hundred_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal.show(*(lambda summary, pairs: (summary, pairs.base))(*example()))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no room" not in captured.err
    assert "\x1b" not in captured.err
    assert 60 < max(map(cell_len, captured.err.splitlines())) <= 100


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0.0412, 0.009, "0.041 ±0.009"),
        (0.0412, 0.0030, "0.0412 ±0.0030"),
        (24.5264, 0.0951, "24.53 ±0.10"),
        (24.5264, 12.4, "25 ±12"),
        (1234.5, 432.1, "1,234 ±432"),
        (0.00111637, 4.3e-5, "0.00112 ±0.00004"),
        (0.5, 0.0, "0.5"),
        (0.123456789, None, "0.123457"),
        (None, 0.1, "-"),
    ],
)
def test_a_value_is_rounded_to_its_error(value: float | None, error: float | None, said: str) -> None:
    assert columns.with_error(value, error) == said


def test_figures_have_words() -> None:
    assert columns.label("kld_p999") == "KLD p99.9"
    assert columns.label("kld_p001") == "KLD p0.1"
    assert columns.label("dp_p50") == "Δp % median"
    assert columns.label("dp_min") == "Δp % smallest"
    assert columns.label("ln_ratio_stderr_clustered") == "ln(PPL / base) ± clustered"
    assert columns.label("kld_mean_low") == "mean KLD, 95 % from"
    assert columns.label("something_new") == "something new"
    assert [columns.size(n) for n in (None, 12, 1234, 144_811_872, 7.16e9, 2.5e14)] == [
        "-", "12 B", "1.23 kB", "145 MB", "7.16 GB", "250 TB",
    ]  # fmt: skip
    assert [columns.probability(p) for p in (None, 1e-9, 0.0123, 0.999)] == ["-", "<1e-4", "0.012", "1"]
    assert [columns.shown("dp_rms", v) for v in (0.5, None, float("inf"))] == ["50", "-", "-"]


def test_short_names_differ_and_lose_what_all_begin_with() -> None:
    assert columns.short_names(["m.Q8_0", "m.Q4_K_M"]) == {"m.Q8_0": "Q8_0", "m.Q4_K_M": "Q4_K_M"}
    assert columns.short_names(["alone-Q8_0"]) == {"alone-Q8_0": "alone-Q8_0"}
    long = [f"{letter}{'x' * 40}{end}" for letter in "ab" for end in "12"]
    short = columns.short_names(long)
    assert len(set(short.values())) == 4
    assert all(len(name) == 24 for name in short.values())
    twins = [f"a{'x' * 20}{middle}{'x' * 20}" for middle in "12"]
    assert columns.short_names(twins) == dict(zip(twins, twins, strict=True))  # cut, they would be one


def test_the_front_is_beaten_by_none() -> None:
    ladder = [
        variant("big", 100, 0.1, 0.1),
        variant("bad", 80, 0.5, 0.1),
        variant("twin", 80, 0.5, 0.1),
        variant("good", 60, 0.2, 0.1),
        variant("unknown", 50, 0.1, 0.1, kld_mean=None),
    ]
    assert words.dominated(ladder) == {"bad": "good", "twin": "good"}
    said = words.sentences({"base": {"bytes": 100}, "variants": ladder}, "base")
    assert said[0] == (
        "On the Pareto front of size and divergence: big and good. Not on it: bad (good is no larger and "
        "nearer to the base) and twin (good is no larger and nearer to the base)."
    )
    assert said[1] == "big is no smaller than the base itself: nothing is saved."


def test_what_is_noise_is_called_so() -> None:
    near, far = variant("near", 100, 0.001, 0.003), variant("far", 50, 0.1, 0.1, p_vs_next=None)
    better = variant("better", 70, 0.01, -0.1, p_vs_next=0.4, smallest_ln_ratio=0.01, stopped=True)
    assert [words.is_beyond_noise(v) for v in (near, far, better)] == [False, True, True]
    assert words.is_beyond_noise(near | {"ln_ratio_low": 0.001, "ln_ratio_high": 0.005}) is True
    assert words.is_beyond_noise({"ln_ratio": 1.0}) is None
    assert words.sentences({"base": "x", "variants": [far, near, better]}, "x")[1:] == [
        "Perplexity is higher than the base's beyond noise for far. It is lower than the base's beyond noise "
        "for better. Not told apart from the base by perplexity: near (ln ratio +0.0030 ±0.0020).",
        "On the size ladder not told apart by perplexity after Holm's correction: better from far (p = 0.4).",
        "The smallest difference in perplexity that 6 windows show in four of five such runs is 1 % "
        "for better.",
        "All neighbours on the size ladder were told apart after 6 windows; scoring stopped there.",
    ]


def test_the_worst_targets_come_first_in_their_text() -> None:
    _, pairs = example()
    found = binned.targets(pairs.pairs[1].windows)
    assert found is not None
    np.testing.assert_array_equal(found.place, PLACES.ravel())
    tokens = pairs.tokens.copy()
    worst = int(found.place[np.argmax(found.kld)])
    tokens[worst], tokens[worst - 1] = 9, 8
    told = disagreements.most(found, tokens, Letters())
    assert [d.kld for d in told] == sorted(found.kld, reverse=True)[: disagreements.N_SHOWN]
    first = told[0]
    assert first.target == "⟨9⟩"  # it stands for no text
    assert first.before.endswith("↵")
    assert (first.row, first.position) == divmod(worst, WINDOW)
    assert len(first.before) == len(Letters().decode(tokens[worst - disagreements.N_CONTEXT : worst]))
    assert first.top_base == f"␣{chr(97 + int(found.top_base[np.argmax(found.kld)]))}"


def test_ties_and_ends_of_the_stream() -> None:
    found = binned.Targets(
        row=np.array([0, 0, 1]),
        place=np.array([0, 1, 2]),
        position=np.array([0, 1, 0]),
        nll_base=np.zeros(3),
        nll=np.ones(3),
        kld=np.array([0.5, 0.5, np.nan]),
        top_base=np.array([0, 0, 0]),
        top=np.array([1, 1, 1]),
        is_carried=False,
    )
    told = disagreements.most(found, np.arange(3, dtype=np.int32), Letters())
    assert [(d.before, d.target, d.after) for d in told] == [
        (" a b", "␣c", ""),  # what is no number comes first
        ("", "␣a", " b c"),
        (" a", "␣b", " c"),
    ]


def test_nothing_in_a_text_turns_the_page_around() -> None:
    class Odd:
        def decode(self, ids: Iterable[int]) -> bytes:
            return "a\u202eb\x00c\td\x85".encode() + b"\xff"

    assert disagreements.token(Odd(), 1) == "a\ufffdb␀c⇥d\ufffd\ufffd"


def test_means_by_place_are_those_of_the_targets() -> None:
    table = windows(0, 0.1, documents=3)
    found = binned.targets(table)
    assert found is not None
    kld = np.array(table["kld"].to_pylist(), float)
    means = binned.by_position(found)
    assert means.x[0] == WINDOW - N_SCORED
    assert means.to[-1] == WINDOW - 1
    for begin, end, value in zip(*means, strict=True):
        of = slice(int(begin) - (WINDOW - N_SCORED), int(end) + 1 - (WINDOW - N_SCORED))
        assert value == pytest.approx(kld[:, of].mean())
    by_document, is_apart = binned.by_document(table)
    assert is_apart
    np.testing.assert_allclose(
        by_document.kld, table["kld_sum"].to_numpy().reshape(3, 2).sum(1) / (2 * N_SCORED)
    )
    by_window, is_apart = binned.by_document(windows(0, 0.1))
    assert not is_apart
    np.testing.assert_allclose(by_window.kld, table["kld_sum"].to_numpy() / N_SCORED)


def test_many_documents_are_put_together_in_order() -> None:
    n = 100
    table = pa.table(
        {
            "window": np.arange(n),
            "document": np.arange(n) + 5,
            "n_scored": np.full(n, 2),
            "kld_sum": np.arange(n, dtype=float),
        }
    )
    means, is_apart = binned.by_document(table)
    assert is_apart
    assert means.x.size == binned.N_GROUPS
    assert (means.x[0], means.to[-1]) == (5, n + 4)
    np.testing.assert_array_equal(means.x[1:], means.to[:-1] + 1)
    np.testing.assert_allclose(means.kld, ((means.x + means.to) / 2 - 5) / 2)


def test_windows_that_carry_on_count_from_the_document() -> None:
    table = windows(0, 0.1)
    carried = table.set_column(4, "distance", pa.array(np.arange(N_WINDOWS) * WINDOW))
    found = binned.targets(carried)
    assert found is not None
    assert found.is_carried
    expected = np.arange(N_SCORED) + np.maximum(np.arange(N_WINDOWS) * WINDOW, 1)[:, None]
    np.testing.assert_array_equal(found.position, expected.ravel())


def test_windows_without_tokens_are_left_out() -> None:
    whole, without = windows(0, 0.1), windows(0, 0.1, tokens=False)
    mixed = pa.concat_tables([without.slice(0, 2), whole.slice(2)])
    found = binned.targets(mixed)
    assert found is not None
    np.testing.assert_array_equal(np.unique(found.row), np.arange(2, N_WINDOWS))
    np.testing.assert_array_equal(found.place, PLACES[2:].ravel())
    assert binned.targets(without) is None


def test_the_histogram_of_sketches_is_that_of_the_targets() -> None:
    borders = binned.probability_bins()
    assert (borders[0], borders[-1]) == (-1.0, 1.0)
    np.testing.assert_allclose(borders, -borders[::-1], atol=1e-15)
    found = binned.targets(windows(1, 0.1))
    sketched = binned.changes_of_sketches(windows(1, 0.1, tokens=False))
    assert found is not None
    assert sketched is not None
    exact, close = binned.histogram(found.dp), binned.histogram(*sketched)
    assert exact.sum() == pytest.approx(1)
    assert np.abs(exact - close).sum() < 0.1  # values near a border may change sides
    assert binned.histogram(np.array([-1.5, 1.0 + 1e-12])).tolist() == [0.5, *[0.0] * 59, 0.5]
