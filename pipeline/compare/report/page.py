"""The report as one HTML file: it asks the network for nothing, and for no permission but to run scripts.

Altair's specifications and Vega's JavaScript (vl-convert's bundle) are inside; without scripts the tables and
texts remain. Everything that came from a file, a name or a text is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import vl_convert

from pipeline.compare.report import sections

if TYPE_CHECKING:
    from pipeline.compare.report import Decoder, Pairs
    from pipeline.compare.report.charts import Spec

_LIGHT = ("#1f57c3", "#7b3fc4", "#c0317c", "#c4471b", "#8a6400", "#2f7d32")
_DARK = ("#7fb0ff", "#b995ff", "#ff86bd", "#ff9d6e", "#e3c04a", "#7fd08a")


def render(summary: Mapping[str, Any], pairs: Pairs, tokenizer: Decoder | None) -> str:
    """The whole page; the same arguments give the same text."""
    content = sections.gather(summary, pairs, tokenizer)
    body = "\n".join(section for section in (make(content) for make in sections.ORDER) if section)
    n = len(content.variants)
    data = "\n".join(
        f'<script type="application/json" id="spec-{at}">{_json(spec)}</script>'
        for at, spec in enumerate(content.pictures)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(pairs.base)} and {n} variant{"" if n == 1 else "s"} of it</title>
<style>
{_resource("page.css")}{_series_colours(n)}</style>
</head>
<body>
<main>
{body}
</main>
{data}
<script>{_library()}</script>
<script>
{_resource("page.js")}</script>
</body>
</html>
"""


def _series_colours(n: int) -> str:
    """Custom properties --s0, --s1, ...: a walk through the hues, in the order of the ladder."""

    def properties(anchors: Sequence[str]) -> str:
        at = np.linspace(0, len(anchors) - 1, n) if n > len(anchors) else np.arange(n)
        channels = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors], float).T
        mixed = np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in channels], axis=1)
        colours = mixed.round().astype(int).tolist()
        return " ".join(f"--s{i}: #{r:02x}{g:02x}{b:02x};" for i, (r, g, b) in enumerate(colours))

    return (
        f":root {{ {properties(_LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {properties(_DARK)} }} }}\n"
    )


def _json(spec: Spec) -> str:
    """JSON that can stand in a script element, whatever its strings contain."""
    text = json.dumps(spec, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed; what would end a script element is written another way."""
    source: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _resource(name: str) -> str:
    return files("pipeline.compare.report").joinpath(name).read_text(encoding="utf-8")
