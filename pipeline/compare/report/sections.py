"""The sections of the page, each a function from what there is to show to its HTML, empty for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare.report import binned, charts, disagreements, swaps
from pipeline.compare.report.columns import (
    Column,
    Variant,
    base_row,
    by_size,
    keys,
    label,
    number,
    short_names,
    shown,
    telling,
)
from pipeline.compare.report.words import dominated, sentences
from pipeline.report.html import Pictures, cell, grid, legend, lines, note, row, section, side_by_side
from pipeline.report.text import flat

if TYPE_CHECKING:
    from pipeline.compare.report import Decoder, Pair, Pairs

NO_TOKENS = (
    "Values of single tokens were not kept (keep_tokens=false), so there is nothing to show here; the same "
    "command with keep_tokens=true scores again and keeps them."
)
NO_TEXT = "The text is not at hand, so tokens cannot be shown in it."


@dataclass
class Content:
    """What there is to show.

    Attributes:
        summary: the job's JSON object.
        variants: its variants, the largest first; `short` are their names for where there is little room.
        scored: their tables, in that order; `found` their targets, of those that kept them.
        pictures: specifications of the pictures that the sections drew so far.
    """

    summary: Mapping[str, Any]
    pairs: Pairs
    tokenizer: Decoder | None
    variants: Sequence[Variant]
    short: Mapping[str, str]
    scored: Sequence[Pair]
    found: Mapping[str, binned.Targets]
    pictures: Pictures = field(default_factory=Pictures)


def gather(summary: Mapping[str, Any], pairs: Pairs, tokenizer: Decoder | None) -> Content:
    """What there is to show, in the order that it is shown."""
    variants = by_size(summary["variants"])
    rank = {str(v["name"]): at for at, v in enumerate(variants)}
    scored = [pair for pair in pairs.pairs if pair.name in rank and pair.windows.num_rows]
    scored.sort(key=lambda pair: rank[pair.name])
    found = {pair.name: t for pair in scored if (t := binned.targets(pair.windows)) is not None}
    return Content(summary, pairs, tokenizer, variants, short_names(list(rank)), scored, found)


def headline(content: Content) -> str:
    """The answer in words."""
    base, variants = content.pairs.base, content.variants
    amounts = [(key, max((int(number(v, key) or 0) for v in variants), default=0)) for key in _AMOUNTS]
    scored = ", ".join(f"{n:,} {_AMOUNTS[key]}" for key, n in amounts if n) or "nothing scored"
    noun = "variant" if len(variants) == 1 else "variants"
    said = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences(content.summary, base))
    said += "".join(f"<p>Warning: {escape(str(w))}</p>\n" for w in content.summary.get("warnings") or ())
    return (
        f"<header>\n<h1>{escape(base)} and {len(variants)} {noun} of it</h1>\n"
        f'<p class="note">Each window through base and variants, token by token: {scored}.</p>\n</header>\n'
        f'<section class="short" aria-label="In short">\n{said}</section>'
    )


_AMOUNTS = {"n_windows": "windows", "n_scored": "scored tokens"}


def table(content: Content) -> str:
    """The columns that everybody sees."""
    beaten = dominated(content.variants)
    base = base_row(content.summary, content.pairs.base)
    columns = telling([base, *content.variants])
    rows = [_row(base, columns, after=" (base)")]
    for v in content.variants:
        is_on_front = number(v, "kld_mean") is not None and v["name"] not in beaten
        rows.append(_row(v, columns, kind="front" if is_on_front else ""))
    terms = "".join(f"<dt>{escape(c.heading)}</dt><dd>{escape(c.meaning)}</dd>" for c in columns[1:])
    return section(
        "The figures",
        note("A dot marks the Pareto front of size and mean KLD. Press a heading to sort."),
        grid([(c.heading, c.is_text) for c in columns], rows, "Figures of every variant"),
        f'<details><summary>What the columns are</summary>\n<dl class="inside">{terms}</dl></details>',
    )


def _row(variant: Variant, columns: Sequence[Column], *, kind: str = "", after: str = "") -> str:
    name = str(variant["name"])
    cells = [cell(c.heading, c.cell(variant), variant.get(c.key), is_text=c.is_text) for c in columns[1:]]
    inside = f'<span class="{kind}">{escape(name)}{after}</span>'
    return row(name, cells, inside=inside, kind="base" if after else "")


def sizes(content: Content) -> str:
    """Size against divergence and perplexity."""
    told = []
    for figure, title, caption in _SIZES:
        spec = charts.size_against(content.variants, content.short, figure, title)
        if spec is None:
            told.append(note(f"{caption} No variant has both a size and a {title} above zero."))
            continue
        values = [f"{v['name']} {shown(figure, v.get(figure))}" for v in content.variants]
        told.append(content.pictures.place(spec, caption, f"{'; '.join(values)}."))
    return section("What a size costs", side_by_side(told))


_SIZES = (
    (
        "kld_mean",
        "mean KLD, nats",
        "Size against mean KL divergence, 95 % intervals. Filled points, on the line, are the Pareto front.",
    ),
    (
        "ppl",
        "perplexity",
        "Size against perplexity. Bars are 95 % intervals of the paired difference to the base; perplexity "
        "by itself is less certain, because it moves with the text.",
    ),
)


def probabilities(content: Content) -> str:
    """How far the probability of the token that follows moved."""
    title = "How far probabilities move"
    drawn = [(pair.name, _histogram(content, pair)) for pair in content.scored]
    histograms = {name: shares for name, shares in drawn if shares is not None}
    if not histograms:
        return section(title, note(NO_TOKENS))
    rms = {
        str(v["name"]): f"RMS {100 * value:.2f} %"
        for v in content.variants
        if (value := number(v, "dp_rms")) is not None
    }
    spec = charts.probabilities(histograms, content.short, rms)
    said = "; ".join(f"{name} {rms[name]}" for name in histograms if name in rms)
    caption = (
        "Change of the probability given to the token that really follows, Δp: variant less base. The axis "
        "is logarithmic on either side of zero; areas are shares of the tokens, all to one scale."
    )
    return section(title, content.pictures.place(spec, caption, said))


def _histogram(content: Content, pair: Pair) -> binned.Reals | None:
    if pair.name in content.found:
        return binned.histogram(content.found[pair.name].dp)
    sketched = binned.changes_of_sketches(pair.windows)
    return None if sketched is None else binned.histogram(*sketched)


def places(content: Content) -> str:
    """Divergence by position in the window, and by document."""
    if not content.scored:
        return ""
    told = [_by_position(content), _by_document(content)]
    strokes = [
        (content.short[pair.name], f"var(--s{at})", " ".join(map(str, charts.dash(at))))
        for at, pair in enumerate(content.scored)
    ]
    return section("Where it happens", legend(strokes), side_by_side(told))


def _by_position(content: Content) -> str:
    if not content.found:
        return note(f"By position in the window: {NO_TOKENS}")
    means = {name: binned.by_position(found) for name, found in content.found.items()}
    noun = "document" if all(found.is_carried for found in content.found.values()) else "window"
    caption = f"By position: tokens of the {noun} before it. A state that drifts would rise to the right."
    return _lines(content, means, f"position in the {noun}", caption)


def _by_document(content: Content) -> str:
    grouped = [(pair.name, *binned.by_document(pair.windows)) for pair in content.scored]
    means = {name: of for name, of, _ in grouped}
    noun = "document" if all(is_apart for _, _, is_apart in grouped) else "window"
    caption = f"By {noun}, in the order of the data"
    caption += "." if noun == "document" else ", which is all one document."
    if any((of.to > of.x).any() for of in means.values()):
        caption += f" Neighbouring {noun}s are put together."
    elif noun == "document" and content.pairs.documents:
        caption += _farthest(means, content.pairs.documents)
    return _lines(content, means, noun, caption)


def _farthest(means: Mapping[str, binned.Means], documents: Sequence[str]) -> str:
    """The document on which most variants are farthest from the base."""
    worst = [int(of.x[int(np.nanargmax(of.kld))]) for of in means.values() if np.isfinite(of.kld).any()]
    if not worst or max(worst) >= len(documents):
        return ""
    often = max(worst, key=worst.count)
    return f" {worst.count(often)} of {len(means)} are farthest from the base on {documents[often]}."


def _lines(content: Content, means: Mapping[str, binned.Means], x_title: str, caption: str) -> str:
    order = [str(pair.name) for pair in content.scored]
    spec = charts.lines(means, order, x_title)
    if spec is None:
        return note(f"{caption} No divergence is above zero.")
    ends = "; ".join(f"{name} {_span(of.kld)}" for name, of in means.items() if np.isfinite(of.kld).any())
    return content.pictures.place(spec, f"Mean KLD. {caption}", f"Smallest to largest mean: {ends}.")


def _span(values: binned.Reals) -> str:
    return f"{np.nanmin(values):.3g} to {np.nanmax(values):.3g}"


def texts(content: Content) -> str:
    """The tokens where base and variant disagree most."""
    title, tokens, tokenizer = "Where they disagree most", content.pairs.tokens, content.tokenizer
    if not content.found:
        return section(title, note(NO_TOKENS))
    if tokenizer is None or tokens is None:
        return section(title, note(NO_TEXT))
    told: list[str] = []
    for pair in content.scored:
        if pair.name not in content.found:
            continue
        worst = disagreements.most(content.found[pair.name], tokens, tokenizer)
        rows = pair.windows["window"].to_pylist()
        items = "\n".join(_disagreement(d, rows[d.row]) for d in worst)
        told.append(
            f"<details{'' if told else ' open'}><summary>{escape(pair.name)} "
            f"<span>the {len(worst)} largest divergences</span></summary>\n"
            f'<ol class="tokens">\n{items}\n</ol></details>'
        )
    said = (
        "The token that really follows is marked. Below it, what base and variant found most likely in its "
        "place, and what the true one cost each: its NLL in nats. ␣ is a space, ↵ a new line."
    )
    return section(title, note(said), *told)


def _disagreement(d: disagreements.Disagreement, window: int) -> str:
    text = f"{escape(d.before.lstrip())}<mark>{escape(d.target)}</mark>{escape(d.after)}"
    told = [
        f"KLD {d.kld:.3f}",
        f"most likely: base <code>{escape(d.top_base)}</code>, variant <code>{escape(d.top)}</code>",
        f"NLL of the true token: base {d.nll_base:.2f}, variant {d.nll:.2f}",
        f"window {window:,}, position {d.position:,}",
    ]
    return f'<li><p class="quote"><bdi>{text}</bdi></p><p>{" · ".join(told)}</p></li>'


def sensitivity(content: Content) -> str:
    """Which tensors need bits, where groups of them were swapped."""
    summary = content.summary
    if not swaps.is_measured(summary):
        return ""
    entries, short = swaps.entries(summary), swaps.names(summary)
    columns = swaps.telling(entries)
    rows = []
    for e in entries:
        cells = [cell(c.heading, c.cell(e), swaps.value(e, c.key), is_text=False) for c in columns[1:]]
        rows.append(row(str(e["group"]), cells))
    heads = [(c.heading, c.key == "group") for c in columns]
    variant = swaps.variant_of(summary)
    parts = [
        *(f"<p>{escape(said)}</p>" for said in swaps.sentences(summary, content.pairs.base)),
        grid(heads, rows, "Divergence of each group of tensors"),
    ]
    caption = (
        f"Mean KLD of the base with a group of {variant}'s tensors, for each million bytes that they save, "
        "± two standard errors. The longest bars want to keep their bits."
    )
    spec = charts.swaps(entries, short)
    if spec is not None:
        told = "; ".join(
            f"{e['group']} {e['kld_per_mb']:.4g}" for e in entries if e["kld_per_mb"] is not None
        )
        parts.insert(-1, content.pictures.place(spec, caption, told))
    if made := swaps.command(summary):
        said = "The command that makes the mixture"
        parts.append(f"<details><summary>{said}</summary>\n<p><code>{escape(made)}</code></p></details>")
    return section(swaps.TITLE, *parts)


def throughput(content: Content) -> str:
    """Tokens per second, where the job measured them."""
    rates = {str(v["name"]): rate for v in content.variants if (rate := number(v, "tok_per_s"))}
    if not rates:
        return ""
    said = "; ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    caption = "Tokens per second through each variant."
    return section(
        "How fast each is", content.pictures.place(charts.throughput(rates, content.short), caption, said)
    )


def everything(content: Content) -> str:
    """Every figure of the summary."""
    names = [key for key in keys(content.variants) if key != "name"]
    rows = []
    for v in content.variants:
        cells = [cell(label(key), shown(key, v.get(key)), v.get(key), is_text=key == "type") for key in names]
        rows.append(row(str(v["name"]), cells))
    heads = [("variant", True), *((label(key), key == "type") for key in names)]
    figures = grid(heads, rows, "Every figure of every variant")
    said = f"All {len(names)} figures of each variant"
    return section("Every figure", f"<details><summary>{said}</summary>\n{figures}\n</details>")


def provenance(content: Content) -> str:
    """What made the numbers."""
    told = flat(content.pairs.provenance)
    return section("What made these numbers", lines(told)) if told else ""


ORDER = (
    headline,
    table,
    sizes,
    probabilities,
    places,
    sensitivity,
    texts,
    throughput,
    everything,
    provenance,
)
