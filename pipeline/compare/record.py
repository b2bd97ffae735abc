"""What stays of a comparison: rows of `table=comparisons`, and a run in MLflow with a child per variant."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import provenance, store, tables
from pipeline.compare.plan import Planned
from pipeline.compare.worker import identity
from pipeline.settings import logged
from pipeline.tracking import DataInput, Tracker

_TAGGED = ("run_key", "measure_key", "tokens_sha256", "version", "numerics", "exit_code", "ok")
_OF_ALL = ("overhead", "wall_s", "tok_per_s", "n_windows", "n_scored", "n_workers", "anonymous_bytes_max")


def commit(comparison: Planned, summary: Mapping[str, Any]) -> Path:
    """Publish a row per variant; returns their file.

    Raises:
        StorageFailure: it cannot be written.
    """
    s, base = comparison.settings, comparison.base
    now = datetime.datetime.now(datetime.UTC)
    schema = tables.COMPARISONS_SCHEMA
    common = {
        **{
            name: summary[name]
            for name in ("ok", "exit_code", "wall_s", "tok_per_s", "overhead", "n_workers")
        },
        "finished_at": now,
        "error": None if summary["error"] is None else summary["error"]["message"],
        "base_name": base.name,
        "base_path": base.path,
        "base_bytes": base.n_bytes,
        "data_name": s.data.name,
        "data_path": s.data.path,
        "threads": s.engine.threads,
        "batch_tokens": s.engine.batch_tokens,
        "settings": provenance.canonical_json(logged(s)),
        **_surroundings(),
    }
    rows = []
    for pair, told in zip(comparison.pairs, summary["variants"], strict=True):
        known = {name: told[name] for name in told.keys() & set(schema.names)}
        keys = identity(comparison.measure, base.subject, pair.variant.subject)
        rows.append({**known, **common, **keys, "variant_path": pair.variant.path})
    path = comparison.folder / f"run-{now:%Y%m%dT%H%M%S.%fZ}.parquet"
    store.commit(tables.table(rows, schema), path, {"run_key": comparison.run_key})
    return path


def track(
    tracker: Tracker, comparison: Planned, summary: Mapping[str, Any], files: Sequence[Path], began_s: float
) -> str | None:
    """Log the comparison and, as its children, the variants; returns MLflow's id of the parent."""
    s, base = comparison.settings, comparison.base
    complete = summary["exit_code"] in (0, 1)
    tags = {name: summary[name] for name in _TAGGED} | {
        "git_sha": _surroundings()["git_sha"],
        "job": "compare",
        "mlflow.source.name": "pagemill compare",
        "base_sha256": base.sha256,
    }
    data = DataInput(s.data.name, s.data.path, comparison.measure["data_sha256"])
    parent = tracker.log_run(
        f"{len(comparison.pairs)} variants of {base.name} on {s.data.name}",
        logged(s),
        {},
        {**tags, "mlflow.note.content": _note(summary)},
        data=data,
        started_s=began_s,
        stays_open=True,
    )
    if parent is None:
        return None
    for pair, told in zip(comparison.pairs, summary["variants"], strict=True):
        figures = {
            name: x for name, x in told.items() if isinstance(x, (int, float)) and not isinstance(x, bool)
        }
        tracker.log_run(
            pair.variant.name,
            {"variant": told["path"], "type": told["type"], "base": base.path},
            figures,
            {
                **tags,
                "run_key": pair.key,
                "model_sha256": told["model_sha256"],
                "nll_sha256": told["nll_sha256"],
                "kld_sha256": told["kld_sha256"],
            },
            data=data,
            complete=complete,
            started_s=began_s,
            parent=parent,
        )
    tracker.end_run(parent, {name: summary[name] for name in _OF_ALL}, files, complete=complete)
    return parent


def _note(summary: Mapping[str, Any]) -> str:
    """The parent's description in MLflow: a line for each variant."""
    lines = ["| variant | bytes | mean KLD | ln(PPL / base) |", "|---|---:|---:|---:|"]
    for told in summary["variants"]:
        figures = ["-" if told[name] is None else f"{told[name]:.5g}" for name in ("kld_mean", "ln_ratio")]
        lines.append(f"| {told['name']} | {told['bytes']:,} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", f"Table: `{summary['table']}`"])


@cache
def _surroundings() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "cpu": provenance.cpu_model(),
        "git_sha": provenance.git_sha(),
        "versions": provenance.canonical_json(provenance.versions()),
    }
