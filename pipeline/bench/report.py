"""The benchmark as tables: one for a person, the same as Markdown, and everything as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

MB, MILLISECONDS = 1e6, 1e3
HEADINGS = (
    "model", "size", "threads", "test", "engine", "t/s", "median", "p10-p90", "ceiling", "read", "ours/its",
)  # fmt: skip
"""As llama-bench has them; then the shares of float32's ceiling and of the bandwidth of reading memory."""
CASES = {
    "f32": "no VNNI and no AMX: an engine's bytes are no faster than float32",
    "vnni": "VNNI: engines that round activations to bytes can pass float32's ceiling",
    "amx": "AMX: engines that round activations to bytes can pass float32's ceiling",
}
TEXTS = ("model", "engine", "test")
"""Headings of columns that are no figures."""


def cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a summary under `HEADINGS`."""
    ratios = {_place(ratio, ratio["peer"]): ratio["ratio"] for ratio in summary["ratios"]}
    return [_cells(row, ratios.get(_place(row, row["engine"]))) for row in summary["rows"]]


def machine(summary: Mapping[str, Any]) -> list[str]:
    """What the figures were measured on, in sentences."""
    lines = [f"{summary['cpu']}, {len(summary['cores'])} of its cores; {CASES[summary['case']]}"]
    if summary["fma_gflops"] is not None:
        lines.append(
            f"ceiling {summary['fma_gflops']:.0f} GFLOP/s of float32 multiply-adds, reading memory "
            f"{summary['read_gb_per_s']:.1f} GB/s"
        )
    for model in summary["models"]:
        if model["ready_s"] is not None:
            stages = ", ".join(f"{name} {s * MILLISECONDS:.0f}" for name, s in model["ready_stages"].items())
            lines.append(f"{model['model']}: first likelihoods after {model['ready_s']:.2f} s (ms: {stages})")
            lines.append(
                f"{model['model']}: GEMM from its weights {model['gemm_gflops']:.0f} GFLOP/s, "
                f"{model['gemm_share']:.0%} of the ceiling beside it"
            )
    return lines


def markdown(summary: Mapping[str, Any], title: str) -> str:
    """A page of Markdown."""
    lines = [f"# {title}", ""]
    lines += [f"- {line}" for line in machine(summary)]
    lines += ["", *_table(HEADINGS, TEXTS, cells(summary)), "", "Settings of each engine:", ""]
    for row in summary["rows"]:
        said = ", ".join(f"{key}={value}" for key, value in json.loads(row["options"]).items())
        lines.append(f"- {row['model']} {row['test']}, {row['engine']} {row['engine_version']}: {said}")
    return "\n".join(lines) + "\n"


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """All columns of the rows, figures with all their digits."""
    text = io.StringIO()
    names = list(rows[0]) if rows else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_exact(row[name]) for name in names])
    return text.getvalue()


def of_model(row: Mapping[str, Any]) -> list[str]:
    """The first cells of a row, which are those of all its model's rows."""
    return [
        f"{row['model']} {row['type']}",
        f"{row['model_bytes'] / MB:,.1f} MB",
        f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}",
    ]


def _cells(row: Mapping[str, Any], ratio: float | None) -> list[str]:
    return [
        *of_model(row),
        row["test"],
        row["engine"],
        f"{row['tok_per_s_mean']:,.2f} ± {row['tok_per_s_stdev']:.2f}",
        f"{row['tok_per_s']:,.2f}",
        f"{row['p10']:,.1f}-{row['p90']:,.1f}",
        f"{row['fma_share']:.0%}",
        f"{row['read_share']:.0%}",
        "" if ratio is None else f"{ratio:.2f}",
    ]


def _place(row: Mapping[str, Any], engine: str) -> tuple[Any, ...]:
    sizes = (row["n_prompt"], row["n_generate"], row["n_seqs"])
    return row["model_sha256"], row["kind"], *sizes, engine


def _table(headings: Sequence[str], texts: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, figures to the right."""
    rules = ["---" if heading in texts else "---:" for heading in headings]
    lines = [list(headings), rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _exact(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return "" if value is None else str(value)
