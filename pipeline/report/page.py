"""A report as one HTML file: it asks the network for nothing, and for no permission but to run scripts.

Altair's specifications and Vega's JavaScript (vl-convert's bundle) are inside; without scripts the tables and
texts remain. A colour in a specification is `var:--name`, a custom property of the style sheet; page.js puts
in what it is in the light or the dark scheme.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

import altair as alt
import numpy as np
import vl_convert

from pipeline.report.html import Spec

_LIGHT = ("#1f57c3", "#7b3fc4", "#c0317c", "#c4471b", "#8a6400", "#2f7d32")
_DARK = ("#7fb0ff", "#b995ff", "#ff86bd", "#ff9d6e", "#e3c04a", "#7fd08a")


def render(title: str, body: str, pictures: Sequence[Spec], n_series: int, style: str = "") -> str:
    """The whole page; the same arguments give the same text.

    Args:
        body: HTML; its places for pictures are those of `html.Pictures`.
        n_series: colours --s0, --s1, ... that the pictures use.
        style: of this page alone, after the common style sheet.
    """
    data = "\n".join(
        f'<script type="application/json" id="spec-{at}">{_json(spec)}</script>'
        for at, spec in enumerate(pictures)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_resource("page.css")}{_series_colours(n_series)}{style}</style>
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


def finished(chart: alt.Chart | alt.LayerChart, height: int) -> Spec:
    """The specification, without Altair's own theme and without an address; as wide as its place.

    A test holds it against Vega-Lite's schema; to do that here would take as long as all the rest.
    """
    with alt.theme.enable("none"):
        spec: Spec = chart.properties(width="container", height=height).to_dict(validate=False)
    spec.pop("$schema", None)
    return spec


def _series_colours(n: int) -> str:
    """Custom properties --s0, --s1, ...: a walk through the hues, in the order of the series."""

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
    return files("pipeline.report").joinpath(name).read_text(encoding="utf-8")
