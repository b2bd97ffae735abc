"""A roofline of the engine as SVG: what its products reach beside what the process could, type by type.

On a shared machine the roofs move between one figure and the next. So every point is drawn at its share of
the ceiling that was measured beside it, times the median of the ceilings, all for one thread; the bandwidth
likewise. Needs matplotlib (extra `report`).

Source of the picture: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

MANY = 512  # tokens of the last point of a line
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c6d31", "#000000")


class Point(NamedTuple):
    """Operations for each byte of weights, GFLOP/s of a thread."""

    flop_per_byte: float
    gflops: float


class Roofs(NamedTuple):
    """Of one thread: GFLOP/s of float32 multiply-adds, GB/s of reading memory."""

    gflops: float
    gb_per_s: float


def roofs(bench: Mapping[str, Any]) -> Roofs:
    """Medians over all measurements of a bench on one thread (`jobs.bench_kernels`)."""
    single = [row for row in bench["few"] if row["threads"] == 1]
    gflops = median(row["ceiling"] for row in single)
    return Roofs(gflops, gflops * median(row["read_gb_per_s"] / row["ceiling"] for row in single))


def lines(bench: Mapping[str, Any]) -> dict[str, list[Point]]:
    """For each type the products with 1, 2, 4, 8 tokens and then with 512, at shares of `roofs`.

    Of several shapes of a matrix the median counts.
    """
    top = roofs(bench).gflops
    found: dict[str, dict[int, list[Point]]] = {}
    for row in (*bench["few"], *bench["gemm"]):
        if row["threads"] == 1 and row["n_tokens"] <= MANY:
            point = Point(row["flop_per_byte"], row["gflops"] / row["ceiling"] * top)
            found.setdefault(row["type"], {}).setdefault(row["n_tokens"], []).append(point)
    return {
        name: [Point(*map(median, zip(*points[n], strict=True))) for n in sorted(points)]
        for name, points in found.items()
    }


def passes(bench: Mapping[str, Any]) -> dict[str, Point]:
    """Whole passes by the length of their windows."""
    top = roofs(bench).gflops
    return {
        f"whole pass, windows of {done['window']:,}": Point(done["flop_per_byte"], done["fma_share"] * top)
        for done in bench["passes"]
    }


def bytes_products(bench: Mapping[str, Any]) -> dict[str, Point]:
    """Products with 8-bit activations."""
    top = roofs(bench).gflops
    return {row["type"]: Point(row["flop_per_byte"], row["over_f32"] * top) for row in bench["int8"]}


def draw(bench: Mapping[str, Any], target: Path) -> None:
    """Writes the figure; the same bench gives the same bytes.

    Args:
        bench: the JSON object of `jobs.bench_kernels`, its parts `few`, `gemm`, `int8` and `passes`.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    options: Any = {
        "svg.hashsalt": "pagemill",
        "svg.fonttype": "none",
        "font.size": 9,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(options):
        figure, axes = pyplot.subplots(figsize=(8.6, 5.0))
        top, bandwidth = roofs(bench)
        drawn = lines(bench)
        every = [point for points in drawn.values() for point in points] + list(passes(bench).values())
        left = min(point.flop_per_byte for point in every) / 1.6
        right, edge = max(point.flop_per_byte for point in every) * 1.6, top / bandwidth
        axes.set(
            xscale="log", yscale="log", xlim=(left, right), xlabel="operations for each byte of weights",
            ylabel="GFLOP/s of a thread",
        )  # fmt: skip
        roof: dict[str, Any] = {"color": "#555555", "linewidth": 1.6, "zorder": 1}
        axes.plot([left, edge, right], [left * bandwidth, top, top], **roof)
        colours = dict(zip(drawn, _COLOURS * 3, strict=False))
        for name, points in drawn.items():
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 0.9, "label": name}
            axes.plot(*_columns(points), color=colours[name], **style)
        for name, point in bytes_products(bench).items():
            axes.plot(*_columns([point]), marker="^", markersize=6, color=colours[name], linestyle="none")
        for (name, point), marker in zip(passes(bench).items(), "D*PX", strict=False):
            axes.plot(
                *_columns([point]), marker=marker, markersize=9, color="none", linestyle="none",
                markeredgecolor="#000000", label=name,
            )  # fmt: skip
        axes.plot([], [], marker="^", color="#777777", linestyle="none", label="8-bit activations")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.set_title(_title(bench), fontsize=9, loc="left")
        axes.grid(color="#e5e5e5", linewidth=0.6, which="major")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="lower right", ncols=2, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        (x0, y0), (x1, y1) = axes.transData.transform([(left, left * bandwidth), (edge, top)])
        said: dict[str, Any] = {
            "textcoords": "offset points",
            "color": roof["color"],
            "rotation_mode": "anchor",
        }
        axes.annotate(
            f"reading memory: {bandwidth:.1f} GB/s", (left * 1.2, left * 1.2 * bandwidth), (-4, 5),
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), **said,
        )  # fmt: skip
        axes.annotate(f"float32 multiply-adds: {top:.0f} GFLOP/s", (edge, top), (4, 5), **said)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _title(bench: Mapping[str, Any]) -> str:
    return (
        f"Products with 1, 2, 4, 8 and 512 tokens, by weight type; {bench['cpu']}, "
        f"{bench['measured_at'][:10]}.\n"
        "Each point at its share of the ceiling measured beside it"
    )


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.flop_per_byte for point in points], [point.gflops for point in points]
