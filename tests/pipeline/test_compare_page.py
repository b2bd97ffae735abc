"""The page of a comparison, which needs nothing but a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import browser
import numpy as np
import pyarrow as pa
import pytest

from pipeline.compare import report
from pipeline.compare.report import Pair, Pairs, binned, disagreements
from tests.pipeline.comparisons import (
    N_SCORED,
    N_WINDOWS,
    PROVENANCE,
    VARIANTS,
    Letters,
    example,
    variant,
    windows,
)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Renders the page without Vega's JavaScript, which takes a second and is not ours."""
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    from pipeline.compare.report import page as module
    from pipeline.report import page as frame

    monkeypatch.setattr(frame, "_library", lambda: "")
    return lambda summary, pairs, tokenizer=Letters(): module.render(summary, pairs, tokenizer)  # noqa: B008


def test_the_page_is_whole_and_names_no_address(page: Callable[..., str]) -> None:
    text = page(*example())
    parsed = browser.Tags(text)
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
    pictures = browser.specifications(text)
    assert len(pictures) == 5  # two of sizes, one of probabilities, two of places
    import altair

    for spec in pictures:
        altair.LayerChart.from_dict(spec, validate=True)
    assert all(name in json.dumps(spec) for spec in pictures for name, *_ in VARIANTS)
    hosts = [a for _, a in browser.Tags(text).tags if "data-spec" in a]
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
    tags = browser.Tags(text).tags
    assert not [tag for tag, a in tags if tag in ("img", "b") or "onerror" in a or "onclick" in a]
    assert "&lt;/script&gt;&lt;b onclick=x&gt;&amp;amp;" in text
    assert json.dumps(bad) in json.dumps(browser.specifications(text)[2])


def test_the_page_is_the_same_for_the_same_arguments(page: Callable[..., str]) -> None:
    assert page(*example()) == page(*example())


def test_without_tokens_the_page_says_so_and_shows_the_rest(page: Callable[..., str]) -> None:
    from pipeline.compare.report.sections import NO_TEXT, NO_TOKENS

    text = page(*example(tokens=False))
    assert text.count(NO_TOKENS) == 2  # by position, and in the text
    assert len(browser.specifications(text)) == 4  # Δp from the sketches
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_in_a_sandbox_without_a_network(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    text = report.write(*example(documents=2), tmp_path, tokenizer=Letters()).read_text()
    told = browser.told_by(text, WATCH, scheme, tmp_path)
    for frame in told:
        assert frame["faults"] == []
        assert frame["scroll"] <= frame["width"]
        assert frame["pictures"] == 5
        assert frame["words"] > 20
        assert frame["fetched"] == 0
        assert (frame["up"], frame["down"]) == ("tiny.Q8_0", "tiny.Q4_0")
        assert frame["ink"] == {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 233, 237)"}[scheme]
        assert frame["axis"] == {"light": "#57606a", "dark": "#a3adb8"}[scheme]
