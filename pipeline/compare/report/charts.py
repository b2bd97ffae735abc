"""Vega-Lite specifications of the page's pictures, made with Altair (extra `report`).

A colour is `var:--name`, a custom property of the page's style sheet; page.js puts in what it is in the
light or the dark scheme. A width is the container's. A view named `labels` is text beside the points of the
view named `points`; page.js has Vega place it where it covers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from pipeline.compare.report import binned
from pipeline.compare.report.columns import Variant, first_known, number, shown, size
from pipeline.compare.report.words import dominated
from pipeline.report.html import Spec
from pipeline.report.page import finished

INK, FAINT, ACCENT = "var:--ink", "var:--muted", "var:--accent"
ROW_PX = 56
"""Height of a variant's row in the pictures that have one."""


def series(n: int) -> list[str]:
    """The colours of n variants in the order of the lists."""
    return [f"var:--s{at}" for at in range(n)]


def size_against(
    variants: Sequence[Variant], short: Mapping[str, str], figure: str, title: str
) -> Spec | None:
    """Size against `kld_mean` or `ppl`, with 95 % intervals and the Pareto front; None if under one point.

    The interval of a perplexity is that of its ratio to the base's, since both were scored on the same
    windows.
    """
    unit = "bpw" if all(number(v, "bpw") is not None for v in variants) else "bytes"
    scale = 1.0 if unit == "bpw" else 1e-6
    placed = [v for v in variants if number(v, unit) and (number(v, figure) or 0) > 0]
    if not placed:
        return None
    beaten = dominated(placed, figure)
    rows = []
    for v in placed:
        value = number(v, figure) or 0.0
        low, high = _interval(v, figure, value)
        rows.append(
            {
                "variant": v["name"],
                "label": short[str(v["name"])],
                "x": (number(v, unit) or 0.0) * scale,
                "y": value,
                "low": low,
                "high": high,
                "front": v["name"] not in beaten,
                "size": size(number(v, "bytes")),
                "told": shown(figure, value),
                "interval": f"{low:.5g} to {high:.5g}",
            }
        )
    rows.sort(key=lambda row: not row["front"])  # the first get their labels first
    base = number(placed[0], "ppl_base") if figure == "ppl" else None
    values = [row[key] for row in rows for key in ("low", "high")] + ([base] if base else [])
    y_scale, y_axis = _y(values)
    y = alt.Y("y:Q", title=title, scale=y_scale, axis=y_axis)
    x = alt.X(
        "x:Q",
        title="bits per weight" if unit == "bpw" else "size in MB",
        scale=alt.Scale(domain=_roomy([row["x"] for row in rows]), nice=False),
        axis=alt.Axis(tickCount=6, format=",~r"),
    )
    tooltip = [
        alt.Tooltip("variant:N"),
        alt.Tooltip("told:N", title=title),
        alt.Tooltip("interval:N", title="95 %"),
        alt.Tooltip("x:Q", title="bits per weight" if unit == "bpw" else "MB", format=",.3~f"),
        alt.Tooltip("size:N", title="size"),
    ]
    chart = alt.Chart(alt.Data(values=rows))
    on_front = chart.transform_filter("datum.front")
    layers: list[Any] = [
        on_front.mark_line(color=ACCENT, strokeWidth=1.5, opacity=0.6, interpolate="step-after")
        .encode(x, y)
        .properties(name="front"),
        chart.mark_rule(color=INK, opacity=0.7, strokeWidth=1.5).encode(
            x, alt.Y("low:Q", title=title, scale=y_scale, axis=y_axis), alt.Y2("high:Q")
        ),
        chart.mark_point(filled=True, size=80, opacity=1, strokeWidth=2, stroke=ACCENT)
        .encode(
            x,
            y,
            fill=alt.condition("datum.front", alt.value(ACCENT), alt.value("var:--paper")),
            tooltip=tooltip,
        )
        .properties(name="points"),
        chart.mark_text(color=INK, fontSize=12).encode(x, y, text="label:N").properties(name="labels"),
    ]
    if base:
        ruled = alt.Chart(alt.Data(values=[{"base": base, "said": f"base {base:,.4f}"}]))
        layers.insert(
            0,
            ruled.mark_rule(color=FAINT, strokeDash=[5, 4]).encode(
                alt.Y("base:Q", title=title, scale=y_scale, axis=y_axis)
            ),
        )
        layers.insert(
            1,
            ruled.mark_text(color=FAINT, align="left", dx=4, dy=9, fontSize=12).encode(
                alt.Y("base:Q", title=title, scale=y_scale, axis=y_axis), x=alt.value(0), text="said:N"
            ),
        )
    return finished(alt.layer(*layers), 320)


def _interval(variant: Variant, figure: str, value: float) -> tuple[float, float]:
    """95 %, the block bootstrap's where there is one; it stays above zero, for the logarithmic axis."""
    key = "ln_ratio" if figure == "ppl" else figure
    middle = number(variant, key)
    error = first_known(variant, f"{key}_stderr_clustered", f"{key.removesuffix('_mean')}_stderr_clustered")
    low, high = number(variant, f"{key}_low"), number(variant, f"{key}_high")
    if middle is None or ((low is None or high is None) and error is None):
        return value, value
    if low is None or high is None:
        low, high = middle - 1.96 * (error or 0.0), middle + 1.96 * (error or 0.0)
    if figure == "ppl":
        return float(value * np.exp(low - middle)), float(value * np.exp(high - middle))
    return max(low, value / 20), high


def _y(values: Sequence[float]) -> tuple[alt.Scale, alt.Axis]:
    """Scale and axis for positive values: logarithmic where they span more than a factor of three."""
    if max(values) <= 3 * min(values):
        scale = alt.Scale(domain=_roomy(values), nice=False, zero=False)
        return scale, alt.Axis(format=",.5~g", tickCount=5)
    room = max((max(values) / min(values)) ** 0.08, 1.15)
    domain = [min(values) / room, max(values) * room]
    low, high = math.log10(domain[0]), math.log10(domain[1])
    steps = [1] if high - low >= 2.5 else [1, 2, 5]
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    axis = alt.Axis(values=[tick for tick in ticks if domain[0] <= tick <= domain[1]], format=",~r")
    return alt.Scale(type="log", domain=domain, nice=False), axis


def _roomy(values: Sequence[float]) -> list[float]:
    """A domain with a little room around the values."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.02 * high
    return [low - room, high + room]


def probabilities(
    histograms: Mapping[str, binned.Reals], short: Mapping[str, str], remarks: Mapping[str, str]
) -> Spec:
    """A ridge for each variant: how far the probability of the token that follows moved.

    Args:
        histograms: name -> (61,) shares, as `binned.histogram` makes them.
        short: name -> what stands at the ridge's left end.
        remarks: name -> what stands at its right end.
    """
    borders = 100 * binned.probability_bins()
    tallest = max(float(shares.max()) for shares in histograms.values()) or 1.0
    ridges, texts = [], []
    for row, (name, shares) in enumerate(histograms.items()):
        ground = len(histograms) - 1 - row
        heights = np.append(shares, shares[-1])
        ridges += [
            {
                "variant": name,
                "x": _rounded(x),
                "ground": ground,
                "top": _rounded(ground + 0.62 * h / tallest),
                "share": _rounded(100 * h),
            }
            for x, h in zip(borders, heights, strict=True)
        ]
        texts.append(
            {"variant": name, "label": short[name], "y": ground + 0.92, "remark": remarks.get(name, "")}
        )
    x_title = "change of probability in percentage points"
    x = alt.X(
        "x:Q",
        title=x_title,
        scale=alt.Scale(type="symlog", constant=100 * binned.SMALLEST, domain=[-100, 100], nice=False),
        axis=alt.Axis(
            values=[-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100],
            labelExpr="datum.value ? format(datum.value, '+~r') : '0'",
        ),
    )
    y_scale = alt.Scale(domain=[0, len(histograms)], nice=False)
    names = list(histograms)
    colour = alt.Color("variant:N", scale=alt.Scale(domain=names, range=series(len(names))), legend=None)
    ridge = (
        alt.Chart(alt.Data(values=ridges))
        .mark_area(interpolate="step-after", opacity=0.85, line=False)
        .encode(
            x,
            alt.Y("ground:Q", scale=y_scale, axis=None),
            alt.Y2("top:Q"),
            colour,
            tooltip=[alt.Tooltip("variant:N")],
        )
    )
    written = alt.Chart(alt.Data(values=texts)).encode(alt.Y("y:Q", scale=y_scale, axis=None))
    layers = [
        ridge,
        alt.Chart(alt.Data(values=[{"zero": 0}]))
        .mark_rule(color=FAINT)
        .encode(alt.X("zero:Q", title=x_title)),
        written.mark_text(align="left", baseline="top", dx=2, fontSize=12, fontWeight=600, limit=230).encode(
            colour, x=alt.value(0), text="label:N"
        ),
        written.mark_text(align="right", baseline="top", color=FAINT, fontSize=12).encode(
            x=alt.value("width"), text="remark:N"
        ),
    ]
    return finished(alt.layer(*layers), ROW_PX * len(histograms))


def dash(at: int) -> list[int]:
    """The stroke of the variant of that rank: colour alone does not tell neighbours apart for everybody."""
    return ([1, 0], [7, 3], [2, 2])[at % 3]


def lines(means: Mapping[str, binned.Means], names: Sequence[str], x_title: str) -> Spec | None:
    """Mean divergence along something, a line for each variant; None where nothing is above zero.

    `names` are all variants in their order, which gives the colours.
    """
    rows: list[dict[str, Any]] = [
        {
            "variant": name,
            "x": float((begin + end) / 2),
            "where": f"{begin:,.0f} to {end:,.0f}" if end > begin else f"{begin:,.0f}",
            "y": _rounded(kld),
        }
        for name in means
        for begin, end, kld in zip(*means[name], strict=True)
        if kld > 0
    ]
    if not rows:
        return None
    dashes = [dash(at) for at in range(len(names))]
    y_scale, y_axis = _y([float(row["y"]) for row in rows])
    chart = alt.Chart(alt.Data(values=rows)).encode(
        alt.X(
            "x:Q",
            title=x_title,
            scale=alt.Scale(zero=False, nice=False),
            axis=alt.Axis(tickCount=5, format=",~d", tickMinStep=1),
        ),
        alt.Y("y:Q", title="mean KLD, nats", scale=y_scale, axis=y_axis),
        alt.Color("variant:N", scale=alt.Scale(domain=names, range=series(len(names))), legend=None),
    )
    layered = alt.layer(
        chart.mark_line(strokeWidth=2).encode(
            strokeDash=alt.StrokeDash("variant:N", scale=alt.Scale(domain=names, range=dashes), legend=None)
        ),
        chart.mark_point(filled=True, size=36, opacity=1).encode(
            tooltip=[
                alt.Tooltip("variant:N"),
                alt.Tooltip("where:N", title=x_title),
                alt.Tooltip("y:Q", title="mean KLD", format=".4~g"),
            ]
        ),
    )
    return finished(layered, 300)


GROUPS = 40
"""Groups of tensors that are drawn at most."""


def swaps(entries: Sequence[Mapping[str, Any]], short: Mapping[str, str]) -> Spec | None:
    """A bar for each of the first groups of tensors: divergence for each million bytes; None for no bar."""
    rows = []
    for entry in entries[:GROUPS]:
        value, saved = number(entry, "kld_per_mb"), number(entry, "bytes_saved")
        if value is None or not saved:
            continue
        error = 2e6 * (number(entry, "kld_stderr_clustered") or 0.0) / saved
        rows.append(
            {
                "label": short[str(entry["group"])],
                "group": entry["group"],
                "value": _rounded(value),
                "low": _rounded(max(0.0, value - error)),
                "high": _rounded(value + error),
                "kld": _rounded(entry["kld_mean"]),
                "saved": size(saved),
            }
        )
    if not rows:
        return None
    x_title = "mean KLD per MB saved, nats"
    axis = alt.Axis(tickCount=5, format=",~g")
    y = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=180))
    tooltip = [
        alt.Tooltip("group:N"),
        alt.Tooltip("value:Q", title=x_title, format=".4~g"),
        alt.Tooltip("kld:Q", title="mean KLD", format=".4~g"),
        alt.Tooltip("saved:N", title="saved"),
    ]
    chart = alt.Chart(alt.Data(values=rows))
    layers = alt.layer(
        chart.mark_bar(color=ACCENT, opacity=0.8).encode(
            alt.X("value:Q", title=x_title, axis=axis), y, tooltip=tooltip
        ),
        chart.mark_rule(color=INK, strokeWidth=1.5).encode(
            alt.X("low:Q", title=x_title, axis=axis), alt.X2("high:Q"), y
        ),
    )
    return finished(layers, 26 * len(rows) + 10)


def throughput(rates: Mapping[str, float], short: Mapping[str, str]) -> Spec:
    """Tokens per second, a bar for each."""
    rows = [{"variant": name, "label": short[name], "rate": rate} for name, rate in rates.items()]
    chart = alt.Chart(alt.Data(values=rows)).encode(
        alt.X("rate:Q", title="tokens/s", axis=alt.Axis(tickCount=5, format=",~r")),
        alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=180)),
        tooltip=[alt.Tooltip("variant:N"), alt.Tooltip("rate:Q", title="tokens/s", format=",.1f")],
    )
    return finished(chart.mark_bar(color=ACCENT), 28 * len(rows) + 10)


def _rounded(value: float) -> float:
    """Five digits: a picture shows no more, and the page is a third smaller."""
    return float(f"{value:.5g}")
