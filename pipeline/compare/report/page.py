"""The report as one HTML file; everything that came from a file, a name or a text is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.compare.report import sections
from pipeline.report import page

if TYPE_CHECKING:
    from pipeline.compare.report import Decoder, Pairs


def render(summary: Mapping[str, Any], pairs: Pairs, tokenizer: Decoder | None) -> str:
    """The whole page; the same arguments give the same text."""
    content = sections.gather(summary, pairs, tokenizer)
    body = "\n".join(section for section in (make(content) for make in sections.ORDER) if section)
    n = len(content.variants)
    title = f"{pairs.base} and {n} variant{'' if n == 1 else 's'} of it"
    return page.render(title, body, content.pictures, n)
