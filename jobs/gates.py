"""The gates of a regression run for the person at the terminal: broken ones first, on standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

MARKS = {False: ("broken", "red"), True: ("kept", "green"), None: ("not judged", "yellow")}
"""By `passed`, in the order in which they are shown."""
_ORDER = (False, None, True)
_HEADINGS = ("", "check", "metric", "today", "baseline", "limit")
_DIGEST = 40
"""Characters from which a value is a digest, and is cut."""


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print gates, culprits, and where the reports are.

    Args:
        summary: the job's JSON object.
        console: where to; standard error when None.
    """
    console = console or Console(stderr=True, highlight=False)
    for check in summary.get("plan", ()):
        _print(console, f"[bold]{escape(check['check'])}[/bold]  {escape(check['says'])}")
        for limit in check["limits"]:
            _print(console, f"  {escape(limit)}")
    _show_gates(summary["gates"], console, has_baseline=summary["baseline"] is not None)
    for culprit in summary["culprits"]:
        _print(console, f"[red]{escape(culprit['sentence'])}[/red]")
    if summary["verdict"] is not None:
        against = summary["baseline"]
        beside = f", beside {against['name']} ({against['source']})" if against else ""
        _print(console, f"[bold]{summary['verdict']}[/bold]{escape(beside)}")
    for key in ("promoted", "record", "summary", "junit", "report"):
        if summary[key] is not None:
            _print(console, f"{key}: {escape(str(summary[key]))}")


def _show_gates(gates: Sequence[Mapping[str, Any]], console: Console, *, has_baseline: bool) -> None:
    """A line for each gate, and what there is to say of one that is not kept; those that wait are counted."""
    shown = [gate for gate in gates if has_baseline or gate["passed"] is not None]
    if not shown:
        return
    shown.sort(key=lambda gate: _ORDER.index(gate["passed"]))
    rows = [_HEADINGS, *(_cells(gate) for gate in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    _print(console, f"[bold]{escape(lines[0])}[/bold]")
    for gate, line in zip(shown, lines[1:], strict=True):
        mark, color = MARKS[gate["passed"]]
        _print(console, f"[{color}]{mark}[/{color}]{escape(line[len(mark) :])}")
        if gate["note"] and gate["passed"] is not True:
            _print(console, f"  [dim]{escape(gate['note'])}[/dim]")
    if len(shown) < len(gates):
        _print(console, f"{len(gates) - len(shown)} limits wait for a baseline")


def _cells(gate: Mapping[str, Any]) -> tuple[str, ...]:
    of = " ".join(part for part in (gate["name"], gate["variant"], gate["data"]) if part)
    values = (_short(gate["value"]), _short(gate["baseline"]), gate["limit"])
    return MARKS[gate["passed"]][0], of, gate["metric"], *values


def _short(value: float | str | None) -> str:
    """A figure with six digits, the beginning of a digest."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return f"{value[:8]}.." if len(value) >= _DIGEST else value
    return f"{value:.6g}"


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)  # a line can be copied, and piped, whole
