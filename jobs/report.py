"""A finished run for the person at the terminal: a table and where everything is, on standard error."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MB = 1e6
NARROW = 50
"""Columns below which two of them side by side would cut figures in half."""


def show(summary: Mapping[str, Any], results: Path | None, console: Console | None = None) -> None:
    """Print a run's summary; keys that it lacks, or that are null, leave their line out.

    Args:
        summary: the job's JSON object (contract.md 5).
        results: the folder of the tables, for the command that opens MLflow.
        console: where to; standard error when None.
    """
    console = console or Console(stderr=True, highlight=False)
    if "points" in summary:
        _show_points(summary["points"], console, planned=bool(summary.get("dry_run")))
    lines = _lines(summary)
    if console.width < NARROW:
        for label, text in lines:
            console.print(f"[bold]{label.strip()}[/bold] {escape(text)}")
    elif lines:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", overflow="fold")
        table.add_column(overflow="fold")
        for label, text in lines:
            table.add_row(label, escape(text))
        console.print(table)
    for text in _afterwards(summary, results):  # unwrapped, so that a path can be copied whole
        console.print(escape(text), soft_wrap=True)


def _show_points(points: Sequence[Mapping[str, Any]], console: Console, *, planned: bool) -> None:
    """A sweep's points in the order they have, a column for each axis whose value differs between them."""
    axes = [key for key in points[0]["point"] if len({str(point["point"][key]) for point in points}) > 1]
    columns = _PLANNED if planned else _SCORED
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for key in axes:
        table.add_column(_heading(key), overflow="fold")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        cells = [_shown(key, point["point"][key]) for key in axes]
        if point["ok"]:
            cells += [figure(point) for _, figure in columns]
        else:
            cells.append("failed")  # why is in the error that ends the run
        table.add_row(*cells)
    console.print(table)


def _heading(key: str) -> str:
    """`model` of model.path, `window` of protocol.window."""
    group, _, leaf = key.rpartition(".")
    return group if leaf == "path" else leaf


def _shown(key: str, value: Any) -> str:
    """An axis's value; of a path the last part."""
    text = str(value)
    return escape(Path(text).name or text if key.endswith(".path") else text)


def _figure(key: str, form: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    """A cell with that key of a point; "-" where it is unknown."""

    def cell(point: Mapping[str, Any]) -> str:
        value = point.get(key)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return "-"
        return format(value if scale == 1.0 else value / scale, form)

    return cell


_SCORED = (
    ("perplexity", _figure("ppl", ",.4f")),
    ("± clustered", _figure("ppl_stderr_clustered", ",.4f")),
    ("windows", _figure("n_windows", ",")),
    ("tok/s", _figure("tok_per_s", ",.0f")),
    ("s", _figure("wall_s", ",.1f")),
)
_PLANNED = (
    ("windows", _figure("n_windows", ",")),
    ("tokens", _figure("n_tokens", ",")),
    ("left", _figure("shards_todo", ",")),
    ("model MB", _figure("model_bytes", ",.1f", MB)),
    ("MB/worker", _figure("worker_bytes", ",.1f", MB)),
    ("est. s", _figure("estimated_s", ",.1f")),
)


def _lines(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    def told(*keys: str) -> bool:
        return all(isinstance(s.get(key), (int, float)) and math.isfinite(s[key]) for key in keys)

    lines = []
    if told("ppl"):
        lines.append(("perplexity", f"{s['ppl']:.4f}"))
    if told("ppl_stderr"):
        lines.append(("  ± tokens independent", f"{s['ppl_stderr']:.4f}  (as llama.cpp prints it)"))
    if told("ppl_stderr_clustered"):
        lines.append(("  ± clustered by window", f"{s['ppl_stderr_clustered']:.4f}"))
    if told("half_ppl", "half_n_scored"):
        lines.append(
            ("  on second halves", f"{s['half_ppl']:.4f}  ({s['half_n_scored']:,} tokens, as windows)")
        )
    if told("bits_per_byte"):
        lines.append(("bits per byte", f"{s['bits_per_byte']:.4f}"))
    if told("n_scored", "n_windows"):
        of_all = f" of {s['n_tokens']:,}" if told("n_tokens") else ""
        lines.append(("tokens scored", f"{s['n_scored']:,}{of_all}, {s['n_windows']:,} windows"))
    if told("tok_per_s"):
        workers = (
            f", {s['n_workers']} worker{'s' if s['n_workers'] != 1 else ''}" if told("n_workers") else ""
        )
        lines.append(("tokens/s", f"{s['tok_per_s']:,.1f}{workers}"))
    if told("shards_done") and s.get("shards_reused"):
        lines.append(("shards", f"{s['shards_done']}, of them finished before: {s['shards_reused']}"))
    if told("model_resident_bytes", "model_pss_sum_bytes"):
        lines.append(
            (
                "model pages",
                f"{s['model_resident_bytes'] / MB:,.1f} MB resident, shared"
                f" ({s['model_pss_sum_bytes'] / MB:,.1f} MB summed over processes)",
            )
        )
    if told("anonymous_bytes_max"):
        lines.append(("memory of each worker", f"{s['anonymous_bytes_max'] / MB:,.1f} MB at most"))
    if told("n_points", "n_runs") and not s.get("dry_run"):
        lines.append(("points", f"{s['n_points_done']} of {len(s['points'])} done"))
    if told("estimated_s", "n_workers"):
        estimate = f"{s['estimated_s']:,.1f} s and the start of {s['n_workers']} workers"
        lines += [("estimated time", estimate), *(("  from", how) for how in s["estimated_from"])]
    if told("memory_bytes"):
        lines.append(("memory", f"{s['memory_bytes'] / MB:,.1f} MB at most, the model's pages included"))
    parts = [f"{s[key]:.1f} s {name}" for key, name in _TIMES if told(key)]
    if parts:
        lines.append(("time", ", ".join(parts)))
    return lines


_TIMES = (("wall_s", "in all"), ("compile_s", "compiling kernels"), ("load_s", "loading the model"))


def _afterwards(s: Mapping[str, Any], results: Path | None) -> list[str]:
    lines = []
    if s.get("table"):
        lines.append(f"Parquet: {s['table']}")
    if s.get("mlflow_run_id"):
        folder = "" if results in (None, Path("results")) else f" RESULTS={shlex.quote(str(results))}"
        lines.append(f"MLflow:  make mlflow{folder}, then http://127.0.0.1:5000 (run {s['mlflow_run_id']})")
    lines += [f"warning: {warning}" for warning in s.get("warnings") or ()]
    return lines
