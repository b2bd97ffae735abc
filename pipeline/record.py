"""What stays of a run besides its windows: a row of `table=runs`, and an entry in MLflow."""

from __future__ import annotations

import datetime
import logging
import socket
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import provenance, store, tables
from pipeline.preflight import Prepared
from pipeline.tracking import DataInput, Tracker

log = logging.getLogger(__name__)
_TAGGED = (
    "run_key",
    "measure_key",
    "nll_sha256",
    "model_sha256",
    "tokens_sha256",
    "version",
    "numerics",
    "exit_code",
    "ok",
)


def commit_row(ready: Prepared, summary: dict[str, Any], warnings: list[str]) -> Path:
    """Publish the invocation's row of `table=runs`; returns its file.

    Raises:
        StorageFailure: it cannot be written.
    """
    s = ready.settings
    now = datetime.datetime.now(datetime.UTC)
    error = summary["error"]
    known = {name: summary[name] for name in summary.keys() & set(tables.RUNS_SCHEMA.names)}
    row = {
        **known,
        **ready.keys,
        "finished_at": now,
        "error": None if error is None else error["message"],
        "warnings": warnings,
        "model_path": s.model.path,
        "data_name": s.data.name,
        "data_path": s.data.path,
        "host": socket.gethostname(),
        "cluster": s.cluster.kind,
        "cpu": provenance.cpu_model(),
        "threads": s.engine.threads,
        "batch_tokens": s.engine.batch_tokens,
        "git_sha": provenance.git_sha(),
        "versions": provenance.canonical_json(provenance.versions()),
        "settings": provenance.canonical_json(asdict(s)),
    }
    folder = store.runs_folder(Path(s.paths.results), ready.spec.run_key)
    path = folder / f"run-{now:%Y%m%dT%H%M%S.%fZ}.parquet"
    store.commit(tables.table([row], tables.RUNS_SCHEMA), path, {"run_key": ready.spec.run_key})
    return path


def track(
    tracker: Tracker,
    ready: Prepared,
    summary: dict[str, Any],
    files: list[Path],
    windows: pa.Table | None,
    began_s: float,
) -> str | None:
    """Log the run to MLflow; whatever goes wrong there costs a warning."""
    s = ready.settings
    tags = {name: summary[name] for name in _TAGGED} | {
        "git_sha": provenance.git_sha(),
        "job": "perplexity",
        "mlflow.source.name": "pagemill perplexity",
        "mlflow.note.content": _note(summary),
    }
    figures = {name: x for name, x in summary.items() if isinstance(x, (int, float)) and name not in _TAGGED}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if windows is not None:
                files = [*files, Path(folder) / "windows.parquet"]
                pq.write_table(windows, files[-1], compression="zstd")
            return tracker.log_run(
                f"{Path(s.model.path).stem} on {s.data.name}",
                asdict(s),
                figures,
                tags,
                [*files, Path(ready.spec.run_dir) / "plan.json"],
                DataInput(s.data.name, s.data.path, ready.measure["data_sha256"]),
                complete=bool(summary["ok"]),
                started_s=began_s,
            )
    except Exception as error:  # the tables are complete; nothing about an index may take them away
        log.debug("tracking", exc_info=True)
        tracker.warnings.append(
            f"not logged to MLflow: {type(error).__name__}: {error}; the tables are complete"
        )
        return None


def _note(summary: dict[str, Any]) -> str:
    """The run's description in MLflow: the headline in words, and where the table is."""
    table = f"Table: `{summary['table']}`"
    if summary["ppl"] is None:
        return f"Incomplete: no perplexity. {table}"
    spread = summary["ppl_stderr_clustered"]
    error = "" if spread is None else f" ± {spread:.4f} (clustered by window)"
    return f"Perplexity **{summary['ppl']:.4f}**{error}, {summary['n_windows']} windows. {table}"
