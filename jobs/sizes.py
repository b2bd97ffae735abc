"""What became of a model's tensors, for the person at the terminal, on standard error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

_HEADINGS = ("tensor", "shape", "from", "to", "bytes", "bits/weight")
_TEXTS = 4
"""Columns that are texts; numbers stand at the right."""


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `quantize` found out: every tensor in a dry run, always the types and what does not fit.

    Args:
        summary: the job's JSON object.
        console: where to; standard error when None.
    """
    console = console or Console(stderr=True, highlight=False)
    lines = _table(summary["tensors"]) if "tensors" in summary else []
    alike = Counter((row["type"], row["wanted"], row["why"]) for row in summary["fallbacks"])
    lines += [
        f"{count} tensors are {type_} instead of {wanted}: {why}"
        for (type_, wanted, why), count in alike.items()
    ]
    types = ", ".join(f"{name} {count}" for name, count in summary["types"].items())
    lines.append(f"{summary['n_tensors']} tensors: {types}")
    lines.append(f"{summary['out']}: {summary['bytes']:,} bytes, {summary['bpw']:.3f} bits per weight")
    for line in lines:  # unwrapped, so that a path can be copied whole
        console.print(escape(line), soft_wrap=True)


def _table(tensors: list[Mapping[str, Any]]) -> list[str]:
    """Aligned lines, however wide."""
    rows = [
        (
            row["name"],
            " x ".join(map(str, row["shape"])),
            row["from"],
            row["to"],
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.3f}",
        )
        for row in tensors
    ]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < _TEXTS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (_HEADINGS, *rows)
    ]
