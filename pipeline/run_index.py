"""Runs that MLflow knows, looked up and tagged: the synchronous side of tracking.

Where tracking.py logs and never fails a run, here somebody waits for the answer, or the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import RefusedError, SettingsError, StoreError
from pipeline.mlflow_process import MlflowProcess, Unanswered, local_uri, server_uri
from pipeline.reachable import unreachable
from pipeline.settings import TrackingSettings, shown


class ServerDown(RefusedError):
    """MLflow does not answer: its server is down, or its database cannot be used."""


@dataclass(frozen=True)
class LoggedRun:
    """A run as MLflow has it.

    Attributes:
        status: MLflow's, as FINISHED.
        deleted: it is in MLflow's trash.
    """

    id: str
    name: str
    status: str
    started_ms: int
    deleted: bool
    tags: Mapping[str, str]


class RunIndex:
    """Runs of one experiment; a context manager that ends MLflow's process.

    Args:
        where: for messages.
        process: None for a database that does not exist yet: it has no runs, and is not made to say so.
    """

    def __init__(self, where: str, process: MlflowProcess | None) -> None:
        self.where = where
        self._process = process

    def __enter__(self) -> RunIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.close()

    def tagged(self, key: str, value: str | None = None) -> list[LoggedRun]:
        """Runs that carry a tag, of any value or of one, newest first; no deleted ones.

        Raises:
            ServerDown: MLflow does not answer.
        """
        assert value is None or "'" not in value, "MLflow's filters have no escape for it"
        return [_run(told) for told in self._ask({"tagged": key, "value": value}).get("runs", [])]

    def run(self, run_id: str) -> LoggedRun | None:
        """A run by its id, of any experiment; None when there is none.

        Raises:
            ServerDown: MLflow does not answer.
        """
        return next((_run(told) for told in self._ask({"run": run_id}).get("runs", [])), None)

    def fetch(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Copy an artifact of a run into a folder.

        Raises:
            StoreError: the run has no such artifact, or it cannot be read.
            ServerDown: MLflow does not answer.
        """
        said = self._ask({"fetch": run_id, "artifact": artifact, "folder": str(folder)}, fails=False)
        if "path" not in said:
            raise StoreError(
                f"MLflow run {run_id} at {self.where}: its {artifact} cannot be had: {said.get('error')}"
            )
        return Path(said["path"])

    def set_tag(self, run_id: str, key: str, value: str | None) -> None:
        """Give a run a tag, or take it away.

        Raises:
            ServerDown: MLflow does not answer.
        """
        self._ask({"tag": run_id, "key": key, "value": value})

    def _ask(self, message: Mapping[str, Any], *, fails: bool = True) -> dict[str, Any]:
        if self._process is None:
            return {}
        try:
            said = self._process.ask(message)
        except Unanswered as problem:
            raise _down(self.where, str(problem)) from problem
        if fails and "error" in said:
            raise _down(self.where, said["error"])
        return said


def open_index(settings: TrackingSettings, results: Path) -> RunIndex:
    """The runs that `open_tracker` with the same settings logs to.

    Raises:
        SettingsError: tracking=none.
        ServerDown: the server does not answer; it is asked once, shortly.
    """
    if settings.kind == "none":
        raise SettingsError("tracking=none: there are no runs to look up", "give tracking=local or server")
    if settings.kind == "local":
        uri, artifacts = local_uri(results), results.absolute() / "mlartifacts"
        is_there = (results / "mlflow.db").exists()
        return RunIndex(uri, MlflowProcess(uri, settings.experiment, artifacts) if is_there else None)
    uri = server_uri(settings)
    if problem := unreachable(uri):
        raise _down(shown(uri) or "no address", problem)
    return RunIndex(shown(uri), MlflowProcess(uri, settings.experiment))


def _down(where: str, problem: str) -> ServerDown:
    hint = "start the server, or give the address of one that runs as tracking.uri"
    return ServerDown(f"MLflow at {where}: {problem}", hint)


def _run(told: Mapping[str, Any]) -> LoggedRun:
    return LoggedRun(
        id=told["run_id"],
        name=told["name"] or "",
        status=told["status"],
        started_ms=told["started_ms"] or 0,
        deleted=told["deleted"],
        tags=told["tags"],
    )
