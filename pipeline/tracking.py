"""The MLflow index of runs. The one door to MLflow.

Parquet is the truth; MLflow is where runs are found and compared, so nothing here may cost a result: a server
that does not answer costs a message. MLflow is imported in a process of its own (mlflow_process.py), while
the workers compute (`Tracker.prepare`); it is the only one that writes. Run as a program, this module is that
process. run_index.py asks it for runs that were logged before.

A sweep is a parent run that stays open while its points are logged as children (tag `mlflow.parentRunId`).
Should the driver die, its process sees the end of its input and marks the parent KILLED.

    message                                   answer, besides {"error": ...}; {"fatal": ...} is the last one
    {"log": a Record}                         {"run_id": ...}
    {"end": run, metrics, artifacts, status}  {"run_id": ...}
    {"tagged": key, "value": text or null}    {"runs": [...]}; null: any value
    {"run": run}                              {"runs": [...]}; [] when there is no such run
    {"fetch": run, "artifact", "folder"}      {"path": ...}
    {"tag": run, "key", "value"}              {"run_id": ...}; null: the tag is taken away
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.mlflow_process import MlflowProcess, Unanswered, local_uri, send, server_uri
from pipeline.reachable import unreachable
from pipeline.redact import redacted
from pipeline.settings import TrackingSettings, shown

MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 5000, 250  # MLflow's limits for a value and a key
MAX_DIGEST = 32  # characters of a data set's digest; a whole SHA-256 is refused, so it is a tag as well
LATER = "run the same command again: finished shards are reused, nothing is computed twice"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInput:
    """The data set of a run: a name, where it came from, its SHA-256 in hexadecimal."""

    name: str
    source: str
    sha256: str


@dataclass(frozen=True)
class Record:
    """What is logged of one run, ready for MLflow."""

    name: str
    run_key: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    artifacts: Sequence[str] = ()
    data: DataInput | None = None
    status: str = "FINISHED"
    parent: str | None = None
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)


class Tracker(Protocol):
    """Where runs are logged; `warnings` says what went wrong, for the run's own list."""

    warnings: list[str]

    def prepare(self) -> None:
        """Begin what takes long, in the background; call it when the workers have their work."""
        ...

    def log_run(
        self,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | int | None],
        tags: Mapping[str, Any],
        artifacts: Sequence[Path] = (),
        data: DataInput | None = None,
        *,
        complete: bool = True,
        started_s: float | None = None,
        parent: str | None = None,
        stays_open: bool = False,
    ) -> str | None:
        """Log one run; never raises.

        Args:
            name: of the run, for people.
            params: the resolved settings, nested as they are.
            metrics: None and what is not finite is left out.
            tags: `run_key` must be among them; runs that carry the same and were left RUNNING, by a driver
                that was killed, are marked KILLED.
            artifacts: small files.
            complete: False marks the run FAILED.
            started_s: when it began, seconds since the epoch.
            parent: MLflow's id of the run that this one is a point of.
            stays_open: it is a parent, RUNNING until `end_run`.

        Returns:
            MLflow's id of the run, None where it was not logged.
        """
        ...

    def end_run(
        self,
        run_id: str,
        metrics: Mapping[str, float | int | None],
        artifacts: Sequence[Path] = (),
        *,
        complete: bool = True,
    ) -> None:
        """End a run that stayed open, with what became known since; never raises."""
        ...

    def close(self) -> None:
        """Let go; without `log_run` nothing was logged."""
        ...


class NoTracker:
    """Logs nothing: `tracking=none`, or a server that does not answer."""

    def __init__(self, *warnings: str) -> None:
        self.warnings = list(warnings)

    def prepare(self) -> None:
        pass

    def log_run(self, *_: Any, **__: Any) -> str | None:
        return None

    def end_run(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        pass


def open_tracker(settings: TrackingSettings, results: Path, later: str = LATER) -> Tracker:
    """The tracker that the settings name; a server is asked once, shortly, whether it is there.

    Args:
        results: `paths.results`; tracking=local keeps `mlflow.db` and `mlartifacts/` in it.
        later: how a run that could not be logged is logged after all.
    """
    if settings.kind == "none":
        return NoTracker()
    if settings.kind == "local":
        folder = results.absolute() / "mlartifacts"
        return MlflowTracker(local_uri(results), settings.experiment, folder, later)
    uri = server_uri(settings)
    if problem := unreachable(uri):
        warning = f"MLflow at {shown(uri) or 'no address'}: {problem}; this run is not logged. Later: {later}"
        log.warning("%s", warning)
        return NoTracker(warning)
    return MlflowTracker(uri, settings.experiment, later=later)


class MlflowTracker:
    """Logs to a tracking URI through a child process.

    Args:
        artifacts: folder for the artifacts of an experiment that is new; None leaves it to the server.
        later: how a run that could not be logged is logged after all.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None, later: str = LATER) -> None:
        self.warnings: list[str] = []
        self._uri, self._later = uri, later
        self._process = MlflowProcess(uri, experiment, artifacts)
        self._given_up = False  # what did not answer once is not asked again

    def prepare(self) -> None:
        if self._given_up:
            return
        try:
            self._process.start()
        except Unanswered as problem:
            self._give_up(problem)

    def log_run(
        self,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | int | None],
        tags: Mapping[str, Any],
        artifacts: Sequence[Path] = (),
        data: DataInput | None = None,
        *,
        complete: bool = True,
        started_s: float | None = None,
        parent: str | None = None,
        stays_open: bool = False,
    ) -> str | None:
        record = Record(
            name=name,
            run_key=str(tags["run_key"]),
            params={key: _cut(value, MAX_PARAM) for key, value in flattened(params).items()},
            metrics=_finite(metrics),
            tags={key: _cut(value, MAX_TAG) for key, value in tags.items() if value is not None},
            artifacts=[str(path) for path in artifacts],
            data=data,
            status="RUNNING" if stays_open else "FINISHED" if complete else "FAILED",
            parent=parent,
            started_ms=int((time.time() if started_s is None else started_s) * 1000),
        )
        said = self._ask({"log": redacted(asdict(record))})
        if parent is None and not stays_open:
            self._process.dismiss()
        run_id: str | None = said.get("run_id")
        return run_id

    def end_run(
        self,
        run_id: str,
        metrics: Mapping[str, float | int | None],
        artifacts: Sequence[Path] = (),
        *,
        complete: bool = True,
    ) -> None:
        status = "FINISHED" if complete else "FAILED"
        paths = [str(path) for path in artifacts]
        self._ask({"end": run_id, "metrics": _finite(metrics), "artifacts": paths, "status": status})
        self._process.dismiss()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer; {} where there is none, which costs a warning."""
        if self._given_up:
            return {}
        try:
            said = self._process.ask(message)
        except Unanswered as problem:
            self._give_up(problem)
            return {}
        if "error" in said:
            self._warn(said["error"])
        return said

    def close(self) -> None:
        self._process.close()

    def _give_up(self, problem: Unanswered) -> None:
        self._given_up = True
        self._warn(str(problem))

    def _warn(self, problem: str) -> None:
        warning = f"MLflow at {shown(self._uri)}: {problem}; this run is not logged. Later: {self._later}"
        self.warnings.append(warning)
        log.warning("%s", warning)


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `group.key`: text, as MLflow's parameters are."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat


def _finite(metrics: Mapping[str, float | int | None]) -> dict[str, float]:
    return {key: float(x) for key, x in metrics.items() if x is not None and math.isfinite(x)}


def _cut(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _log(client: Any, experiment: str, record: dict[str, Any]) -> str:
    """One MLflow run in as few requests as it takes; returns its id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    orphans = f"attributes.status = 'RUNNING' AND tags.run_key = '{record['run_key']}'"
    for orphan in client.search_runs([experiment], orphans):
        client.set_terminated(orphan.info.run_id, "KILLED")
    run = client.create_run(experiment, start_time=record["started_ms"], run_name=record["name"])
    run_id = str(run.info.run_id)
    data = record["data"]
    tags = record["tags"] | ({"data.sha256": data["sha256"]} if data else {})
    tags |= {"mlflow.parentRunId": record["parent"]} if record["parent"] else {}
    try:
        client.log_batch(
            run_id,
            metrics=_metrics(record["metrics"]),
            params=[Param(key[:MAX_KEY], value) for key, value in record["params"].items()],
            tags=[RunTag(key[:MAX_KEY], value) for key, value in tags.items()],
        )
        if data:
            source = json.dumps({"uri": data["source"]})
            entity = Dataset(data["name"], data["sha256"][:MAX_DIGEST], "local", source)
            client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "eval")])])
        for artifact in record["artifacts"]:
            client.log_artifact(run_id, artifact)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    if record["status"] != "RUNNING":
        client.set_terminated(run_id, record["status"])
    return run_id


def _end(client: Any, message: dict[str, Any]) -> None:
    """End a run that stayed open."""
    client.log_batch(message["end"], metrics=_metrics(message["metrics"]))
    for artifact in message["artifacts"]:
        client.log_artifact(message["end"], artifact)
    client.set_terminated(message["end"], message["status"])


def _metrics(values: Mapping[str, float]) -> list[Any]:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [Metric(key, value, now, 0) for key, value in values.items()]


def _experiment(client: Any, target: dict[str, Any], *, make: bool) -> str | None:
    """Id of the experiment, None where it is not there yet and not to be made."""
    if "id" not in target and (found := client.get_experiment_by_name(target["experiment"])):
        target["id"] = str(found.experiment_id)
    if "id" not in target and make:
        kind = {"mlflow.experimentKind": "custom_model_development"}  # opens as runs with metrics, not traces
        target["id"] = str(
            client.create_experiment(target["experiment"], artifact_location=target["artifacts"], tags=kind)
        )
    return target.get("id")


def _child() -> None:
    """The child process: reads its target, then messages, a line each; writes an answer to each."""
    from pipeline.runtime import setup_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which closes the pipe
    os.nice(5)  # the workers come first
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever MLflow prints goes to standard error
    target = json.loads(sys.stdin.readline() or "null")
    if target is None:
        return
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", GIT_PYTHON_REFRESH="quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    setup_logging()
    try:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=target["uri"], registry_uri=target["uri"])
        _experiment(client, target, make=False)  # asks the server, which may not be there
    except Exception as error:
        if sys.stdin.readline():
            send(answer, {"fatal": _told(error)})
        os._exit(0)
    still_open: list[str] = []
    for line in sys.stdin:
        message = json.loads(line)
        try:
            said = _answer(client, target, message)
            if "end" in message:
                still_open.remove(message["end"])
            elif message.get("log", {}).get("status") == "RUNNING":
                still_open.append(said["run_id"])
        except Exception as error:
            said = {"error": _told(error)}
        with suppress(OSError):  # a driver that is gone: its runs are ended below
            send(answer, said)
    for run_id in still_open:
        client.set_terminated(run_id, "KILLED")
    os._exit(0)  # everything is written; MLflow's exit handlers would take half a second of the driver's time


def _answer(client: Any, target: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """Do what a message asks for."""
    if "log" in message:
        experiment = _experiment(client, target, make=True)
        assert experiment is not None, "made"
        return {"run_id": _log(client, experiment, message["log"])}
    if "end" in message:
        _end(client, message)
        return {"run_id": message["end"]}
    if "tagged" in message:
        return {"runs": _tagged(client, _experiment(client, target, make=False), message)}
    if "run" in message:
        return {"runs": _known(client, message["run"])}
    if "fetch" in message:
        return {"path": client.download_artifacts(message["fetch"], message["artifact"], message["folder"])}
    if message["value"] is None:
        client.delete_tag(message["tag"], message["key"])
    else:
        client.set_tag(message["tag"], message["key"], message["value"])
    return {"run_id": message["tag"]}


def _tagged(client: Any, experiment: str | None, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs that carry a tag, newest first."""
    if experiment is None:
        return []
    value = message["value"]
    condition = f"tags.`{message['tagged']}` " + ("LIKE '%'" if value is None else f"= '{value}'")
    newest = ["attributes.start_time DESC"]
    return [_run(run) for run in client.search_runs([experiment], condition, order_by=newest)]


def _known(client: Any, run_id: str) -> list[dict[str, Any]]:
    from mlflow.exceptions import MlflowException

    try:
        return [_run(client.get_run(run_id))]
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise


def _run(run: Any) -> dict[str, Any]:
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "started_ms": run.info.start_time,
        "deleted": run.info.lifecycle_stage == "deleted",
        "tags": dict(run.data.tags),
    }


def _told(error: Exception) -> str:
    log.debug("MLflow", exc_info=True)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    _child()
