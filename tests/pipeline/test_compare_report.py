"""What people see of a comparison: terminal, markdown, CSV, and a page that needs nothing but a browser."""

from __future__ import annotations

import asyncio
import html.parser
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console

from pipeline.compare import report
from pipeline.compare.kld_block import kld_block
from pipeline.compare.report import Pair, Pairs, binned, columns, disagreements, markdown, terminal, words
from pipeline.compare.sketch import sketch
from pipeline.compare.statistics import Targets, figures

N_WINDOWS, N_SCORED, WINDOW = 6, 20, 32
PLACES = np.arange(N_WINDOWS)[:, None] * WINDOW + (WINDOW - N_SCORED) + np.arange(N_SCORED)


class Letters:
    """Token 7 is markup, 8 a line end, 9 nothing; the others are a space and a letter."""

    def decode(self, ids: Iterable[int]) -> bytes:
        special = {7: b"</script><b onclick=x>&amp;", 8: b"\n", 9: b""}
        return b"".join(special.get(int(i), b" " + bytes([97 + int(i) % 26])) for i in ids)


def variant(name: str, n_bytes: int, kld: float, ln_ratio: float, **more: Any) -> dict[str, Any]:
    """A variant with the figures that everybody sees."""
    return {
        "name": name,
        "type": name.rpartition(".")[2],
        "bytes": n_bytes,
        "bpw": n_bytes / 2**24,
        "ppl": 20.0 * float(np.exp(ln_ratio)),
        "ppl_base": 20.0,
        "ln_ratio": ln_ratio,
        "ln_ratio_stderr_clustered": 0.002,
        "kld_mean": kld,
        "kld_stderr_clustered": kld / 20,
        "kld_p99": 9 * kld,
        "dp_rms": kld**0.5 / 4,
        "same_top": 1 - kld,
        "p_vs_next": 0.0123,
        "n_windows": N_WINDOWS,
        "n_scored": N_WINDOWS * N_SCORED,
        **more,
    }


def windows(seed: int, kld: float, *, tokens: bool = True, documents: int = 1) -> pa.Table:
    """A pair's table, with tokens or with the sketch in their place."""
    rng = np.random.default_rng(seed)
    shape = (N_WINDOWS, N_SCORED)
    base = rng.exponential(3.0, shape)
    nll = np.maximum(base + rng.normal(0, kld**0.5, shape), 0)
    divergence = rng.exponential(kld, shape)
    lists = {"nll_base": base, "nll": nll, "kld": divergence}
    lists |= {name: rng.integers(0, 26, shape) for name in ("top_base", "top")}
    kinds = {"kld": pa.float32(), "top_base": pa.int32(), "top": pa.int32()}
    sketches = [sketch(np.exp(-q) - np.exp(-b)) for q, b in zip(nll, base, strict=True)]
    return pa.table(
        {
            "window": np.arange(N_WINDOWS),
            "document": np.arange(N_WINDOWS) * documents // N_WINDOWS,
            "first_token": np.arange(N_WINDOWS) * WINDOW,
            "first_scored": PLACES[:, 0],
            "distance": pa.nulls(N_WINDOWS, pa.int64()),
            "n_scored": np.full(N_WINDOWS, N_SCORED),
            "kld_sum": divergence.sum(axis=1),
            **{
                name: pa.array(
                    values.tolist() if tokens else [None] * N_WINDOWS, pa.list_(kinds.get(name, pa.float64()))
                )
                for name, values in lists.items()
            },
            "dp_keys": pa.array(
                [None if tokens else s.keys.tolist() for s in sketches], pa.list_(pa.int32())
            ),
            "dp_counts": pa.array(
                [None if tokens else s.counts.tolist() for s in sketches], pa.list_(pa.int32())
            ),
        }
    )


VARIANTS = (("tiny.Q8_0", 2**24, 0.001, 0.0012), ("tiny.Q4_0", 2**23, 0.05, 0.04))
PROVENANCE = {"data": {"name": "a|b.txt", "SHA-256": "ab" * 32}, "numerics": 1, "command": None}


def example(*, tokens: bool = True, documents: int = 1) -> tuple[dict[str, Any], Pairs]:
    """Two variants of a base: the summary, and what is behind it."""
    summary = {
        "base": {"name": "tiny.F32", "type": "F32", "bytes": 2**26, "bpw": 32.0},
        "variants": [variant(*told) for told in VARIANTS],
        "warnings": [],
    }
    pairs = [
        Pair(name, windows(at, kld, tokens=tokens, documents=documents))
        for at, (name, _, kld, _) in enumerate(VARIANTS)
    ]
    stream = np.arange(N_WINDOWS * WINDOW, dtype=np.int32) % 26
    return summary, Pairs("tiny.F32", pairs, stream, PROVENANCE)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Renders the page without Vega's JavaScript, which takes a second and is not ours."""
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    from pipeline.compare.report import page as module

    monkeypatch.setattr(module, "_library", lambda: "")
    return lambda summary, pairs, tokenizer=Letters(): module.render(summary, pairs, tokenizer)  # noqa: B008


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and the text of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def specifications(text: str) -> list[dict[str, Any]]:
    """The pictures' data, as the page's script reads them."""
    return [
        json.loads(found) for found in re.findall(r'type="application/json" id="[^"]+">(.*?)</script>', text)
    ]


def test_the_page_is_whole_and_names_no_address(page: Callable[..., str]) -> None:
    text = page(*example())
    parsed = Tags(text)
    assert parsed.open == []
    addresses = [a[key] for _, a in parsed.tags for key in ("src", "href", "action", "data") if key in a]
    assert addresses == ["data:,"]
    assert "://" not in text
    assert not re.search(r"@import|url\(", text)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie", text)


def test_every_variant_is_in_the_tables_and_pictures(page: Callable[..., str]) -> None:
    text = page(*example())
    rows = re.findall(r'<th scope="row" data-value="([^"]+)"', text)
    assert rows == [
        "tiny.F32",
        "tiny.Q8_0",
        "tiny.Q4_0",
        "tiny.Q8_0",
        "tiny.Q4_0",
    ]  # the second has every figure
    pictures = specifications(text)
    assert len(pictures) == 5  # two of sizes, one of probabilities, two of places
    import altair

    for spec in pictures:
        altair.LayerChart.from_dict(spec, validate=True)
    assert all(name in json.dumps(spec) for spec in pictures for name, *_ in VARIANTS)
    hosts = [a for _, a in Tags(text).tags if "data-spec" in a]
    assert all(a["role"] == "img" and a["aria-label"] for a in hosts)
    assert "0.05" in next(
        str(a["aria-label"]) for a in hosts
    )  # the figures, for those who do not see the picture


def test_texts_and_names_are_escaped(page: Callable[..., str]) -> None:
    summary, pairs = example()
    bad = '<img src=x onerror=y>&"'
    summary["variants"][0]["name"] = bad
    pairs = Pairs(
        bad, [Pair(bad, pairs.pairs[0].windows), pairs.pairs[1]], np.full_like(pairs.tokens, 7), {bad: bad}
    )
    text = page(summary, pairs)
    tags = Tags(text).tags
    assert not [tag for tag, a in tags if tag in ("img", "b") or "onerror" in a or "onclick" in a]
    assert "&lt;/script&gt;&lt;b onclick=x&gt;&amp;amp;" in text
    assert json.dumps(bad) in json.dumps(specifications(text)[2])


def test_the_page_is_the_same_for_the_same_arguments(page: Callable[..., str]) -> None:
    assert page(*example()) == page(*example())


def test_without_tokens_the_page_says_so_and_shows_the_rest(page: Callable[..., str]) -> None:
    from pipeline.compare.report.sections import NO_TEXT, NO_TOKENS

    text = page(*example(tokens=False))
    assert text.count(NO_TOKENS) == 2  # by position, and in the text
    assert len(specifications(text)) == 4  # Δp from the sketches
    assert NO_TEXT not in text

    summary, pairs = example()
    assert NO_TEXT in page(summary, Pairs("tiny.F32", pairs.pairs))
    assert NO_TEXT in page(summary, pairs, None)
    bare = [
        Pair(pair.name, pair.windows.drop_columns([*binned.LISTS, "dp_keys", "dp_counts"]))
        for pair in pairs.pairs
    ]
    assert page(summary, Pairs("tiny.F32", bare)).count(NO_TOKENS) == 3


def test_a_variant_that_is_the_base_has_a_page_too(page: Callable[..., str]) -> None:
    summary, pairs = example()
    floor = variant("tiny.F32", 2**26, 0.0, 0.0, kld_p99=0.0, ln_ratio_stderr_clustered=0.0, p_vs_next=None)
    table = windows(3, 0.1).to_pydict()
    table["kld"] = [[0.0] * N_SCORED] * N_WINDOWS
    table["nll"] = table["nll_base"]
    table["kld_sum"] = [0.0] * N_WINDOWS
    same = Pair("tiny.F32", pa.table(table))
    text = page(summary | {"variants": [floor]}, Pairs("base", [same], pairs.tokens))
    assert "No variant has both a size and a mean KLD, nats above zero." in text
    assert text.count("No divergence is above zero.") == 2
    assert "tiny.F32 is no smaller than the base itself" in text


def test_twenty_variants_with_long_names_stay_small(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    names = [f"{'a-model-with-a-long-name-' * 2}{at:02d}.Q4_K_M"[-60:] for at in range(20)]
    variants = [
        variant(name, 2**24 + at * 10**6, 0.2 / (at + 1), 0.1 / (at + 1)) for at, name in enumerate(names)
    ]
    summary, pairs = example()
    many = Pairs("base", [Pair(name, pairs.pairs[0].windows) for name in names], pairs.tokens, PROVENANCE)
    path = report.write(
        summary | {"variants": variants}, many, tmp_path / "new" / "folder", tokenizer=Letters()
    )
    text = path.read_text()
    assert path.name == "comparison.html"
    assert path.stat().st_size < 5_000_000
    assert "vegaEmbed" in text
    assert all(text.count(f'data-value="{name}"') == 2 for name in names)
    assert "--s19:" in text
    assert text.count('class="quote"') == 20 * disagreements.N_SHOWN
    assert {found.name for found in path.parent.iterdir()} == {
        f"comparison.{kind}" for kind in ("csv", "html", "md")
    }


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
    told = markdown.document(summary, pairs.base, markdown.flat(pairs.provenance))
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


WRAPPED = """<!doctype html><meta charset="utf-8"><body><pre id="out"></pre><script>
const page = {page}, out = [];
addEventListener("message", (event) => {{
  out.push(event.data);
  if (out.length === 2) document.getElementById("out").textContent = JSON.stringify(out);
}});
for (const width of [390, 1280]) {{
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-scripts";
  frame.style = `width:${{width}}px;height:800px;border:0`;
  frame.src = URL.createObjectURL(new Blob([page], {{ type: "text/html" }}));
  document.body.append(frame);
}}
</script>"""

WATCH = """<script>
const faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...said) => faults.push(said.join(" "));
const count = (selector) => document.querySelectorAll(selector).length;
const tell = () => {
  document.querySelectorAll("details").forEach((found) => { found.open = true; });
  const sort = document.querySelectorAll("th button")[5], body = sort.closest("table").tBodies[0];
  const first = () => { sort.click(); return body.rows[0].cells[0].dataset.value; };
  parent.postMessage({
    faults, up: first(), down: first(), width: innerWidth, scroll: document.documentElement.scrollWidth,
    pictures: count("figure svg"),
    words: count("figure text"),
    ink: getComputedStyle(document.body).color,
    axis: document.querySelector("figure svg text").getAttribute("fill"),
    fetched: performance.getEntriesByType("resource").length,
  }, "*");
};
let waited = 0;
const watch = setInterval(() => {
  if (count("figure svg") < count("figure") && ++waited < 200) return;
  clearInterval(watch);
  setTimeout(tell, 300);
}, 100);
</script>"""


async def _told_by(port_file: Path, limit_s: float = 60.0) -> str:
    """What the page that a browser shows writes into its `#out`."""
    ask = {"expression": 'document.getElementById("out")?.textContent', "returnByValue": True}
    async with asyncio.timeout(limit_s):
        while not port_file.exists() or "\n" not in port_file.read_text():
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                pages = [found for found in await answer.json() if found["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"]) as socket:
                while True:
                    await socket.send_json({"id": 1, "method": "Runtime.evaluate", "params": ask})
                    if told := (await socket.receive_json())["result"]["result"].get("value"):
                        return str(told)
                    await asyncio.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_in_a_sandbox_without_a_network(scheme: str, tmp_path: Path) -> None:
    """As MLflow's artifact view does: a blob in an iframe that may do nothing but run scripts."""
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text = report.write(*example(documents=2), tmp_path, tokenizer=Letters()).read_text()
    watched = json.dumps(text.replace("<head>", f"<head>{WATCH}", 1)).replace("</", "<\\/")
    (tmp_path / "wrapped.html").write_text(WRAPPED.format(page=watched))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}"]
    command += [(tmp_path / "wrapped.html").as_uri()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            told = json.loads(asyncio.run(_told_by(tmp_path / "profile" / "DevToolsActivePort")))
        finally:
            process.terminate()
    assert sorted(frame["width"] for frame in told) == [390, 1280]
    for frame in told:
        assert frame["faults"] == []
        assert frame["scroll"] <= frame["width"]
        assert frame["pictures"] == 5
        assert frame["words"] > 20
        assert frame["fetched"] == 0
        assert (frame["up"], frame["down"]) == ("tiny.Q8_0", "tiny.Q4_0")
        assert frame["ink"] == {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 233, 237)"}[scheme]
        assert frame["axis"] == {"light": "#57606a", "dark": "#a3adb8"}[scheme]
