"""Vega-Lite specifications of the page's pictures, made with Altair (extra `report`).

Colours and widths are those of `pipeline.report.page`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from pipeline.regression.history import Series
from pipeline.regression.outcome import Measured, WindowSums
from pipeline.regression.report import words
from pipeline.report.html import Spec
from pipeline.report.page import finished

INK, FAINT, ACCENT, BROKEN = "var:--ink", "var:--muted", "var:--accent", "var:--broken"
_MOST_RUNS = 200
"""Runs that a picture of the history goes back."""


def history(found: Series, versions: Sequence[str], baseline: float | None) -> Spec:
    """A figure run by run with the levels that it kept, and where they changed.

    Args:
        versions: of the engine, whose rank is the colour of a point.
        baseline: the figure's value there, a line across; None for none.
    """
    first = max(0, len(found.rows) - _MOST_RUNS)
    rows = [
        {
            "run": at,
            "value": row.value,
            "level": float(found.levels[at]),
            "version": row.version or words.DASH,
            "when": f"{row.finished_at:%Y-%m-%d %H:%M}",
            "commit": words.commit(row.git_sha),
            "numerics": words.value(row.numerics),
            "cpu": words.value(row.cpu),
        }
        for at, row in enumerate(found.rows)
        if at >= first
    ]
    values = [*found.values[first:].tolist(), *([] if baseline is None else [baseline])]
    days = json.dumps([f"{row.finished_at:%m-%d}" for row in found.rows])
    x = alt.X(
        "run:Q",
        title=None,
        scale=alt.Scale(domain=[first - 0.6, len(found.rows) - 0.4], nice=False),
        axis=alt.Axis(labelExpr=f"{days}[datum.value]", tickMinStep=1, tickCount=6, grid=False),
    )
    y_scale = alt.Scale(domain=_roomy(values), nice=False, zero=False)

    def y(field: str) -> alt.Y:
        return alt.Y(
            f"{field}:Q", title=found.id[3], scale=y_scale, axis=alt.Axis(format=".6~g", tickCount=5)
        )

    colour = alt.Color(
        "version:N",
        scale=alt.Scale(domain=list(versions), range=[f"var:--s{at}" for at in range(len(versions))]),
        legend=None,
    )
    tooltip = [
        alt.Tooltip("value:Q", title=found.id[3], format=",.8~g"),
        alt.Tooltip("when:N", title="UTC"),
        *(alt.Tooltip(f"{name}:N") for name in ("version", "commit", "numerics", "cpu")),
    ]
    chart = alt.Chart(alt.Data(values=rows))
    layers: list[Any] = [
        chart.mark_line(color=FAINT, strokeWidth=1.5, interpolate="step").encode(x, y("level")),
        chart.mark_point(filled=True, size=34, opacity=1).encode(x, y("value"), colour, tooltip=tooltip),
    ]
    if baseline is not None:
        ruled = alt.Chart(alt.Data(values=[{"baseline": baseline, "said": "baseline"}]))
        layers.insert(0, ruled.mark_rule(color=FAINT, strokeDash=[2, 3]).encode(y("baseline")))
    if changes := _changes(found, first):
        marks = alt.Chart(alt.Data(values=changes))
        moved = [alt.Tooltip("moved:N", title="change"), alt.Tooltip("when:N", title="first run with it")]
        layers.insert(
            0, marks.mark_rule(color=BROKEN, strokeWidth=1.5, strokeDash=[6, 3]).encode(x, tooltip=moved)
        )
        for side, dx in (("left", 4), ("right", -4)):
            text = marks.transform_filter(f"datum.align == '{side}'").mark_text(
                color=BROKEN, align=side, dx=dx, dy=6, baseline="top", fontSize=12
            )
            layers.append(text.encode(x, y=alt.value(0), text="label:N"))
    return finished(alt.layer(*layers), 210)


def _changes(found: Series, first: int) -> list[dict[str, Any]]:
    """A mark between the runs of each change; the latest have labels first, others where there is room."""
    marks: list[dict[str, Any]] = []
    n = len(found.rows)
    room = (n - first) / 6
    free = float(n)
    for at in reversed([at for at in found.changes if at > first]):
        moved = words.per_cent(words.change(float(found.levels[at]), float(found.levels[at - 1])))
        align = "right" if n - at < room else "left"
        begin, end = (at - room, at) if align == "right" else (at, at + room)
        is_told = end <= free
        free = begin if is_told else free
        when = f"{found.rows[at].finished_at:%Y-%m-%d %H:%M}"
        label = moved if is_told else ""
        marks.append({"run": at - 0.5, "moved": moved, "label": label, "align": align, "when": when})
    return marks


def moved(then: WindowSums, now: WindowSums, named: Sequence[int]) -> Spec | None:
    """A bar for each window: how far its likelihood moved; None where windows are others, or none moved.

    Args:
        named: windows that the culprit names, which have another colour.
    """
    if not np.array_equal(then.window, now.window):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        diff = (now.nll_sum - then.nll_sum) / now.n_scored
    if not diff.any() or not np.isfinite(diff).all():
        return None
    rows = [
        {"window": int(w), "document": int(d), "diff": _rounded(x), "named": int(w) in named}
        for w, d, x in zip(now.window, now.document, diff.tolist(), strict=True)
    ]
    chart = alt.Chart(alt.Data(values=rows)).mark_bar(size=max(1.5, min(12, 300 / len(rows))))
    bars = chart.encode(
        alt.X("window:Q", title="window", scale=_places(now.window), axis=_whole),
        alt.Y("diff:Q", title="NLL less the baseline's", axis=alt.Axis(format=".4~g", tickCount=5)),
        alt.Color("named:N", scale=alt.Scale(domain=[False, True], range=[ACCENT, BROKEN]), legend=None),
        tooltip=[
            alt.Tooltip("window:Q"),
            alt.Tooltip("document:Q"),
            alt.Tooltip("diff:Q", title="nats a token", format="+.4~g"),
        ],
    )
    return finished(bars, 230)


_whole = alt.Axis(tickMinStep=1, tickCount=6, format="d", grid=False)


def _places(windows: Any) -> alt.Scale:
    return alt.Scale(domain=[int(windows.min()) - 1, int(windows.max()) + 1], nice=False, zero=False)


def samples(pairs: Sequence[tuple[Measured, Measured | None]], metric: str, names: Mapping[Any, str]) -> Spec:
    """Each round's value of a speed, today's and the baseline's, a pair of lines for each test.

    Args:
        pairs: today's measurement and the baseline's.
        names: id of a measurement -> what stands beside its line.
    """
    rounds: list[dict[str, Any]] = []
    medians: list[dict[str, Any]] = []
    for now, then in pairs:
        for run, found in (("now", now), ("baseline", then)):
            values = [] if found is None else list(found.samples.get(metric, ()))
            line = {"test": names[now.id], "run": run}
            rounds += [line | {"value": _rounded(value), "round": at + 1} for at, value in enumerate(values)]
            if values:
                medians.append(line | {"value": _rounded(statistics.median(values)), "n": len(values)})
    x = alt.X(
        "value:Q",
        title=metric,
        scale=alt.Scale(zero=False, padding=12),
        axis=alt.Axis(format=".4~g", tickCount=5),
    )
    y = alt.Y("test:N", title=None, sort=None, axis=alt.Axis(labelLimit=150, grid=False))
    offset = alt.YOffset("run:N", sort=["now", "baseline"], scale=alt.Scale(paddingOuter=0.5))
    colour = alt.Color(
        "run:N", scale=alt.Scale(domain=["now", "baseline"], range=[ACCENT, FAINT]), legend=None
    )
    point = alt.Chart(alt.Data(values=rounds)).mark_point(filled=True, size=44, opacity=0.55)
    tick = alt.Chart(alt.Data(values=medians)).mark_tick(thickness=3, size=18, opacity=1)
    told = [alt.Tooltip("test:N"), alt.Tooltip("run:N"), alt.Tooltip("value:Q", title=metric, format=".4~g")]
    layers = alt.layer(
        point.encode(x, y, offset, colour, tooltip=[*told, alt.Tooltip("round:Q")]),
        tick.encode(x, y, offset, colour, tooltip=[*told, alt.Tooltip("n:Q", title="median of")]),
    )
    return finished(layers, 54 * len(pairs) + 10)


def _roomy(values: Sequence[float]) -> list[float]:
    """A domain with a little room around the values, and more above, where changes are told."""
    low, high = min(values), max(values)
    room = (high - low) or 0.02 * abs(high) or 1.0
    return [low - 0.1 * room, high + 0.25 * room]


def _rounded(value: float) -> float:
    """Five digits: a picture shows no more."""
    return float(f"{value:.5g}")
