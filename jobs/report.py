"""A finished run for the person at the terminal: a table and where everything is, on standard error."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
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
