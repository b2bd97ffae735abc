"""Pieces of a page: sections, notes, tables that sort, places for pictures. Texts are escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Spec = dict[str, Any]
"""A Vega-Lite specification; its `height` is in pixels."""


class Pictures(list[Spec]):
    """Specifications of the pictures of a page, in the order of their places."""

    def place(self, spec: Spec, caption: str, said: str = "") -> str:
        """A place for a picture; `said` is what it shows, for those who do not see it."""
        self.append(spec)
        return (
            f'<figure><div role="img" aria-label="{escape(f"{caption} {said}".strip())}"'
            f' data-spec="spec-{len(self) - 1}" style="min-height:{spec["height"] + 45}px">'
            f"<noscript>The picture needs a script, which may not run here.</noscript></div>\n"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def section(title: str, *parts: str) -> str:
    """A section of parts that are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def note(said: str) -> str:
    """A remark in small letters."""
    return f'<p class="note">{escape(said)}</p>'


def side_by_side(parts: Iterable[str]) -> str:
    """Parts in two columns where there is room."""
    return '<div class="charts">\n' + "\n".join(parts) + "\n</div>"


def row(name: str, cells: Iterable[str], *, inside: str | None = None, kind: str = "") -> str:
    """A row of a table: its name, shown as the HTML `inside` where that is given, and cells of `cell`."""
    head = escape(name)
    start = f"<tr class={kind}>" if kind else "<tr>"
    shown = head if inside is None else inside
    return f'{start}<th scope="row" data-value="{head}">{shown}</th>{"".join(cells)}</tr>'


def cell(heading: str, said: str, value: Any, *, is_text: bool) -> str:
    """A cell that sorts by its value; one without is left out where each row is a card."""
    is_known = value is not None and not (isinstance(value, float) and not math.isfinite(value))
    key = f' data-value="{escape(str(value))}"' if is_known else ""
    return f'<td{" class=text" if is_text else ""} data-label="{escape(heading)}"{key}>{escape(said)}</td>'


def grid(heads: Iterable[tuple[str, bool]], rows: Iterable[str], what: str) -> str:
    """A table that sorts; on a narrow screen each row is a card.

    Args:
        heads: heading of each column, and whether it holds words, which stand at the left.
        rows: as `row` makes them.
        what: the table's name for those who do not see it.
    """
    head = "".join(
        f"<th{' class=text' if is_text else ''} scope=col><button type=button>{escape(said)}</button></th>"
        for said, is_text in heads
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(what)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """Names of lines beside a stroke of each: name, colour, dashes."""
    items = "".join(
        '<li><svg width="26" height="8" aria-hidden="true"><line x1="0" y1="4" x2="26" y2="4" '
        f'stroke-width="3" style="stroke:{colour}" stroke-dasharray="{dashes}"/></svg>{escape(name)}</li>'
        for name, colour, dashes in entries
    )
    return f'<ul class="legend">{items}</ul>'


def lines(told: Iterable[tuple[str, str]], kind: str = "") -> str:
    """Labels and what is known of them."""
    items = "".join(f"<dt>{escape(said)}</dt><dd><code>{escape(value)}</code></dd>" for said, value in told)
    return f"<dl{f' class={kind}' if kind else ''}>{items}</dl>"
