"""A benchmark for the person at the terminal: the table that llama-bench's users know, on standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.bench import report

NARROW = 79
"""Columns below which the figures of a row would be cut."""
_OWN = 3
"""Columns that say the same of all rows of a model, which are its table's title instead."""


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the rows of a summary, and what they were measured on.

    Args:
        summary: the job's JSON object.
        console: where to; standard error when None.
    """
    console = console or Console(stderr=True, highlight=False)
    for line in report.machine(summary):
        console.print(escape(line), soft_wrap=True)
    headings = report.HEADINGS[_OWN:]
    for title, rows in _by_model(summary["rows"]).items():
        console.print(escape(title), style="bold", soft_wrap=True)
        cells = [cells[_OWN:] for cells in report.cells({**summary, "rows": rows})]
        if console.width < NARROW:
            for row in cells:
                text = ", ".join(
                    f"{heading} {cell}" for heading, cell in zip(headings, row, strict=True) if cell
                )
                console.print(escape(text), soft_wrap=True)
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in headings:
            is_text = heading in report.TEXTS
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
        for row in cells:
            table.add_row(*map(escape, row))
        console.print(table)
    for plan in summary.get("plan", ()):
        console.print(escape(f"{plan['model']} {plan['test']}: {', '.join(plan['engines'])}"), soft_wrap=True)
    for name in ("markdown", "csv"):
        if summary[name]:
            console.print(escape(f"{name}: {summary[name]}"), soft_wrap=True)


def _by_model(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each model, under what the first columns say of it; the terminal is narrow."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(", ".join(report.of_model(row)), []).append(row)
    return found
