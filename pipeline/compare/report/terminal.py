"""The comparison for the person at the terminal: sentences and a table, on standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.compare.report import swaps
from pipeline.compare.report.columns import COLUMNS, Column, Variant, base_row, by_size, short_names, telling
from pipeline.compare.report.words import sentences

NARROW = 50
"""Columns below which each variant is a block of lines."""

_GROUPS = 30
"""Groups of tensors that are shown at most."""

_NAME = 12
"""Columns that a name gets at least; a longer one is folded."""


def show(summary: Mapping[str, Any], base: str, console: Console | None = None) -> None:
    """Print the comparison; a narrow terminal gets fewer columns, which is said, a pipe always 100.

    Args:
        summary: the job's JSON object (contract.md 5, `compare`).
        base: name of the base.
        console: where to; standard error when None.
    """
    console = console or _standard_error()
    rows: list[Variant] = [base_row(summary, base), *by_size(summary["variants"])]
    short = short_names([str(row["name"]) for row in rows[1:]])
    console.print(f"base: {escape(base)}")
    if console.width < NARROW:
        _print_blocks(rows, console)
    else:
        chosen = _fitting(rows, console.width)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in chosen:
            table.add_column(
                _in_two_lines(column.heading),
                justify="left" if column.is_text else "right",
                no_wrap=column.key != "name",
                overflow="fold",
            )
        for at, row in enumerate(rows):
            cells = [column.cell(row) for column in chosen]
            cells[0] = short[str(row["name"])] if at else "(base)"
            table.add_row(*map(escape, cells), style=None if at else "dim")
        console.print(table)
        if left := [column.heading for column in telling(rows) if column not in chosen]:
            console.print(escape(f"no room for: {', '.join(left)}; they are in the report"), style="dim")
    for sentence in sentences(summary, base):
        console.print(escape(sentence))
    if swaps.is_measured(summary):
        _print_swaps(summary, base, console)


def _print_swaps(summary: Mapping[str, Any], base: str, console: Console) -> None:
    """Groups of tensors, what needs its bits most first; a narrow terminal gets the first columns by rank."""
    entries, short = swaps.entries(summary), swaps.names(summary)
    columns = swaps.telling(entries)
    cells = {
        c.key: [short[str(e["group"])] if c.key == "group" else c.cell(e) for e in entries] for c in columns
    }

    def width(column: Column) -> int:
        return max(map(cell_len, [*_in_two_lines(column.heading).splitlines(), *cells[column.key]])) + 1

    while len(columns) > 1 and sum(map(width, columns)) > console.width:
        columns.remove(max(columns, key=lambda c: c.rank))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for at, column in enumerate(columns):
        table.add_column(
            _in_two_lines(column.heading),
            justify="right" if at else "left",
            no_wrap=bool(at),
            overflow="fold",
        )
    for row in list(zip(*(cells[c.key] for c in columns), strict=True))[:_GROUPS]:
        table.add_row(*map(escape, row))
    console.print(f"\n[bold]{swaps.TITLE}[/bold]")
    console.print(table)
    if len(entries) > _GROUPS:
        console.print(f"and {len(entries) - _GROUPS} more, which are in the report", style="dim")
    for sentence in swaps.sentences(summary, base):
        console.print(escape(sentence))
    if made := swaps.command(summary):
        console.print(escape(made), soft_wrap=True)


def _standard_error() -> Console:
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=100)


def _print_blocks(rows: Sequence[Variant], console: Console) -> None:
    for row in rows:
        console.print(f"[bold]{escape(str(row['name']))}[/bold]", overflow="fold")
        for column in telling(rows)[1:]:
            if row.get(column.key) is not None:
                console.print(escape(f"  {column.heading}: {column.cell(row)}"))


def _in_two_lines(heading: str) -> str:
    """Broken at the space that makes it narrowest."""
    breaks = [at for at, c in enumerate(heading) if c == " "]
    at = min(breaks, key=lambda at: max(at, len(heading) - at), default=None)
    return heading if at is None else f"{heading[:at]}\n{heading[at + 1 :]}"


def _fitting(rows: Sequence[Variant], width: int) -> list[Column]:
    """The columns that fit, by rank, in the order of the table; without those that tell nothing."""
    chosen, left = [], width
    for column in sorted(telling(rows), key=lambda c: c.rank):
        cells = [*_in_two_lines(column.heading).splitlines(), *(column.cell(row) for row in rows)]
        wanted = max(map(cell_len, cells)) + 1
        if column.key == "name":
            wanted = min(wanted, _NAME + 1)
        if wanted > left:
            break
        chosen.append(column)
        left -= wanted
    return [column for column in COLUMNS if column in chosen]
