"""What stays of a benchmark: rows of `table=throughput`, the same as Markdown and CSV, an entry in MLflow."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import provenance, store, tables
from pipeline.bench import report
from pipeline.bench.preflight import Bench
from pipeline.errors import StorageFailure
from pipeline.settings import logged
from pipeline.tracking import Tracker


def folder(bench: Bench) -> Path:
    """Where the run's rows are."""
    return store.throughput_folder(Path(bench.settings.paths.results), bench.run_key)


def commit(bench: Bench, summary: dict[str, Any]) -> Path:
    """Publish the rows, and the two texts; returns the rows' file.

    Raises:
        StorageFailure: one of them cannot be written.
    """
    s = bench.settings
    now = datetime.datetime.now(datetime.UTC)
    common = {
        "measured_at": now,
        "measure_key": bench.measure_key,
        "ok": summary["ok"],
        "case": summary["case"],
        "cpu": summary["cpu"],
        "features": summary["features"],
        "host": socket.gethostname(),
        "version": summary["version"],
        "numerics": summary["numerics"],
        "git_sha": provenance.git_sha(),
        "versions": provenance.canonical_json(provenance.versions()),
        "settings": provenance.canonical_json(logged(s)),
    }
    rows = [{**row, **common} for row in summary["rows"]]
    file = folder(bench) / f"run-{now:%Y%m%dT%H%M%S.%fZ}.parquet"
    reports = Path(s.paths.results) / "reports"
    name = f"throughput-{now:%Y%m%dT%H%M%S}-{bench.run_key}"
    title = "Throughput of " + ", ".join(model.work.name for model in bench.models)
    texts = {
        "markdown": (reports / f"{name}.md", report.markdown(summary, title)),
        "csv": (reports / f"{name}.csv", report.comma_separated(summary["rows"])),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        reports.mkdir(parents=True, exist_ok=True)
        for key, (path, text) in texts.items():
            path.write_text(text, encoding="utf-8")
            summary[key] = str(path)
    except OSError as error:
        raise StorageFailure(
            f"{error.filename or reports}: cannot be written: {error.strerror}", "check paths.results"
        ) from error
    store.commit(tables.table(rows, tables.THROUGHPUT_SCHEMA), file, {"run_key": bench.run_key})
    return file


def track(
    tracker: Tracker, bench: Bench, summary: Mapping[str, Any], files: Sequence[Path], began_s: float
) -> str | None:
    """Log the run to MLflow; returns its id."""
    several = len(bench.models) > 1
    metrics: dict[str, float | int | None] = {
        key: summary[key] for key in ("fma_gflops", "gemm_gflops", "read_gb_per_s", "open_ms", "ready_s")
    }
    for key, entries in (("tok_per_s", summary["rows"]), ("ratio", summary["ratios"])):
        for entry in entries:
            test = entry["test"].replace("@", " x")  # a character that MLflow's names may not have
            model = f"{entry['type']} {entry['model_sha256'][:8]}/" if several else ""
            metrics[f"{key}/{model}{test} {entry['engine' if key == 'tok_per_s' else 'peer']}"] = entry[key]
    tags = {key: summary[key] for key in ("run_key", "measure_key", "version", "numerics", "exit_code", "ok")}
    tags |= {key: summary[key] for key in ("cpu", "case")}
    tags |= {
        "job": "throughput",
        "git_sha": provenance.git_sha(),
        "mlflow.source.name": "pagemill throughput",
    }
    tags |= {"model_sha256": " ".join(model.sha256 for model in bench.models)}
    tags |= {"mlflow.note.content": Path(summary["markdown"]).read_text(encoding="utf-8")}
    return tracker.log_run(
        "throughput of " + ", ".join(model.work.name for model in bench.models),
        logged(bench.settings),
        metrics,
        tags,
        [*files, Path(summary["markdown"]), Path(summary["csv"])],
        complete=bool(summary["ok"]),
        started_s=began_s,
    )
