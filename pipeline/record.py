"""What stays of a run besides its windows: a row of `table=runs`, and an entry in MLflow.

Rows are written as soon as a run ends, by the driver; entries follow in a thread of their own, because MLflow
takes longer than a small run does. Those of a sweep are children of one parent.
"""

from __future__ import annotations

import datetime
import logging
import socket
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import provenance, store, tables
from pipeline.folders import folder_of, local_files
from pipeline.preflight import Prepared
from pipeline.settings import logged
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


@dataclass(frozen=True)
class Parent:
    """A sweep, as MLflow is told of it: its key, its name, its axes with their values."""

    sweep_key: str
    name: str
    params: Mapping[str, Any]


class Journal:
    """Rows and entries of the runs of one invocation.

    Args:
        tracker: closed with the journal.
        parent: the sweep that the runs are points of, None for a run of its own.
        began_s: when the invocation began, seconds since the epoch.
    """

    def __init__(self, tracker: Tracker, parent: Parent | None, began_s: float) -> None:
        self._tracker, self._parent, self._began_s = tracker, parent, began_s
        self._thread = ThreadPoolExecutor(1, "journal")
        self._parent_id: Future[str | None] | None = None
        self._entries: list[tuple[dict[str, Any], Future[str | None]]] = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of what is not written yet: after an interrupt nobody waits for MLflow."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._tracker.close()

    def begin(self) -> None:
        """Begin what takes long, once the workers have their work; may be called again."""
        if self._parent is None:
            self._thread.submit(self._tracker.prepare)
        elif self._parent_id is None:
            self._parent_id = self._thread.submit(self._open_parent, self._parent)

    def enter(
        self,
        ready: Prepared,
        summary: dict[str, Any],
        windows: pa.Table | None,
        began_s: float,
        name: str | None = None,
    ) -> None:
        """Publish the run's row, and have it logged; `summary` gets `mlflow_run_id` when the journal ends.

        Raises:
            StorageFailure: the row cannot be written.
        """
        sweep_key = None if self._parent is None else self._parent.sweep_key
        row = _commit_row(ready, summary, sweep_key)
        self.begin()
        known = dict(summary)  # as it is now: the driver goes on filling it
        self._entries.append(
            (summary, self._thread.submit(self._log, ready, known, row, windows, began_s, name))
        )

    def end(
        self, metrics: Mapping[str, float | int | None], *, complete: bool
    ) -> tuple[str | None, list[str]]:
        """Wait until everything is logged.

        Args:
            metrics: of the sweep.
            complete: False marks the sweep FAILED.

        Returns:
            MLflow's id of the sweep's parent, and what went wrong.
        """
        for summary, entry in self._entries:
            summary["mlflow_run_id"] = entry.result()
        parent_id = None if self._parent_id is None else self._parent_id.result()
        if parent_id is not None:
            self._thread.submit(self._tracker.end_run, parent_id, metrics, complete=complete).result()
        return parent_id, list(dict.fromkeys(self._tracker.warnings))

    def _open_parent(self, parent: Parent) -> str | None:
        tags = {"run_key": parent.sweep_key, "sweep_key": parent.sweep_key, "job": "perplexity"}
        tags |= {"git_sha": _surroundings()["git_sha"], "version": provenance.version()}
        tags["mlflow.source.name"] = "pagemill perplexity"
        try:
            return self._tracker.log_run(
                parent.name, parent.params, {}, tags, started_s=self._began_s, stays_open=True
            )
        except Exception as error:
            self._tell(error)
            return None

    def _log(
        self,
        ready: Prepared,
        summary: Mapping[str, Any],
        row: Path,
        windows: pa.Table | None,
        began_s: float,
        name: str | None,
    ) -> str | None:
        parent_id = None if self._parent_id is None else self._parent_id.result()
        if self._parent is not None and parent_id is None:
            return None  # the tracker has said why
        try:
            return _track(self._tracker, ready, summary, [row], windows, began_s, name, parent_id)
        except Exception as error:
            self._tell(error)
            return None

    def _tell(self, error: Exception) -> None:
        """The tables are complete; nothing about an index may take them away."""
        log.debug("tracking", exc_info=error)
        self._tracker.warnings.append(
            f"not logged to MLflow: {type(error).__name__}: {error}; the tables are complete"
        )


@cache
def _surroundings() -> dict[str, Any]:
    """What is the same for every run of a process, and costs tens of milliseconds to find out."""
    return {
        "host": socket.gethostname(),
        "cpu": provenance.cpu_model(),
        "git_sha": provenance.git_sha(),
        "versions": provenance.canonical_json(provenance.versions()),
    }


def _commit_row(ready: Prepared, summary: Mapping[str, Any], sweep_key: str | None) -> Path:
    """Publish the invocation's row of `table=runs`; returns its file.

    Raises:
        StorageFailure: it cannot be written.
    """
    s, told = ready.settings, logged(ready.settings)
    now = datetime.datetime.now(datetime.UTC)
    error = summary["error"]
    known = {name: summary[name] for name in summary.keys() & set(tables.RUNS_SCHEMA.names)}
    row = {
        **known,
        **ready.keys,
        "finished_at": now,
        "error": None if error is None else error["message"],
        "sweep_key": sweep_key,
        "model_path": told["model"]["path"],
        "data_name": s.data.name,
        "data_path": told["data"]["path"],
        "cluster": s.cluster.kind,
        "threads": s.engine.threads,
        "batch_tokens": s.engine.batch_tokens,
        "settings": provenance.canonical_json(told),
        **_surroundings(),
    }
    folder = store.runs_folder(folder_of(s.paths.results), ready.spec.run_key)
    path = folder / f"run-{now:%Y%m%dT%H%M%S.%fZ}.parquet"
    store.commit(tables.table([row], tables.RUNS_SCHEMA), path, {"run_key": ready.spec.run_key})
    return path


def _track(
    tracker: Tracker,
    ready: Prepared,
    summary: Mapping[str, Any],
    files: Sequence[Path],
    windows: pa.Table | None,
    began_s: float,
    name: str | None,
    parent: str | None,
) -> str | None:
    """Log the run to MLflow."""
    s, told = ready.settings, logged(ready.settings)
    tags = {key: summary[key] for key in _TAGGED} | {
        "git_sha": _surroundings()["git_sha"],
        "job": "perplexity",
        "mlflow.source.name": "pagemill perplexity",
        "mlflow.note.content": _note(summary),
    }
    figures = {key: x for key, x in summary.items() if isinstance(x, (int, float)) and key not in _TAGGED}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        if windows is not None:
            files = [*files, Path(folder) / "windows.parquet"]
            pq.write_table(windows, files[-1], compression="zstd")
        files = [*files, folder_of(ready.spec.run_dir) / "plan.json"]
        artifacts = held.enter_context(local_files(files, leave_out=True))
        return tracker.log_run(
            name or f"{Path(told['model']['path']).stem} on {s.data.name}",
            told,
            figures,
            tags,
            artifacts,
            DataInput(s.data.name, told["data"]["path"], ready.measure["data_sha256"]),
            complete=bool(summary["ok"]),
            started_s=began_s,
            parent=parent,
        )


def _note(summary: Mapping[str, Any]) -> str:
    """The run's description in MLflow: the headline in words, and where the table is."""
    table = f"Table: `{summary['table']}`"
    if summary["ppl"] is None:
        return f"Incomplete: no perplexity. {table}"
    spread = summary["ppl_stderr_clustered"]
    error = "" if spread is None else f" ± {spread:.4f} (clustered by window)"
    return f"Perplexity **{summary['ppl']:.4f}**{error}, {summary['n_windows']} windows. {table}"
