"""The comparison as text to paste: a GitHub table with its provenance in a line; CSV with every figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.compare.kld_block import kld_block
from pipeline.compare.report import swaps
from pipeline.compare.report.columns import COLUMNS, base_row, by_size, keys
from pipeline.compare.report.words import sentences
from pipeline.report.text import markdown_cell


def table(summary: Mapping[str, Any], base: str) -> str:
    """The figures as a table, the base first and then the variants by size; ends with a line end."""
    rows = [
        [markdown_cell(c.cell(row)) for c in COLUMNS]
        for row in (base_row(summary, base), *by_size(summary["variants"]))
    ]
    rows[0][0] += " (base)"
    head = [markdown_cell(c.heading) for c in COLUMNS]
    ruler = [":--" if c.is_text else "--:" for c in COLUMNS]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ruler, *rows))


def document(summary: Mapping[str, Any], base: str, provenance: Sequence[tuple[str, str]]) -> str:
    """What it says in sentences, the table, and what made it in one line."""
    said = "\n".join(f"- {markdown_cell(sentence)}" for sentence in sentences(summary, base))
    made = "; ".join(f"{name} {value}" for name, value in provenance)
    parts = [
        said,
        table(summary, base).rstrip("\n"),
        *_swapped(summary, base),
        f"<sub>{markdown_cell(made)}</sub>" if made else "",
        *_blocks(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _blocks(summary: Mapping[str, Any]) -> list[str]:
    """The block that llama-perplexity prints, of each variant whose figures are all known."""
    known = [variant for variant in summary["variants"] if variant.get("dp_p75") is not None]
    texts = [f"{variant['name']}\n{kld_block(variant)}".rstrip() for variant in known]
    told = "<details><summary>As llama-perplexity prints it</summary>"
    return [told, *(f"```text\n{text}\n```" for text in texts), "</details>"] if texts else []


def _swapped(summary: Mapping[str, Any], base: str) -> list[str]:
    """The groups of tensors as a table, and what they say; nothing where they were not asked for."""
    if not swaps.is_measured(summary):
        return []
    entries = swaps.entries(summary)
    columns = swaps.telling(entries)
    rows = [[markdown_cell(c.heading) for c in columns], [":--", *["--:"] * (len(columns) - 1)]]
    rows += [[markdown_cell(c.cell(entry)) for c in columns] for entry in entries]
    said = "\n".join(f"- {markdown_cell(sentence)}" for sentence in swaps.sentences(summary, base))
    made = swaps.command(summary)
    parts = [f"### {swaps.TITLE}", said, "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    return [part for part in [*parts, f"```sh\n{made}\n```" if made else ""] if part]


def comma_separated(summary: Mapping[str, Any]) -> str:
    """A row for each variant in the order of the summary, a column for each of its figures.

    Floats have all their digits; null, and what is not finite, is empty.
    """
    out = io.StringIO()
    names = keys(summary["variants"])
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for variant in summary["variants"]:
        writer.writerow([_exact(variant.get(name)) for name in names])
    return out.getvalue()


def _exact(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return repr(value) if isinstance(value, float) else str(value)
