"""The record of a regression run: one self-contained Parquet file, and an entry in MLflow.

A row per measurement with all that a later run is judged by: figures, digests, sums of every window, layers'
checksums. What holds for the whole run is repeated in each row's columns, for whoever queries the table, and
stands in the file's metadata, for `read`, which also has the SHA-256 of the measurements: a baseline that
changed on its way through a repository is told from one that the engine no longer agrees with.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import store
from pipeline.errors import StorageFailure, StoreError
from pipeline.provenance import canonical_json, key_of
from pipeline.redact import redacted
from pipeline.regression.outcome import Measured, Outcome, WindowSums
from pipeline.tables import REGRESSIONS_SCHEMA, SCHEMA_VERSION
from pipeline.tracking import Tracker

LATER = "the record is complete; action=promote run=RECORD.parquet logs it and makes it the baseline"
"""For `open_tracker`: how a run of a suite gets to MLflow after all."""
JOB = "regression"
INCOMPLETE = "incomplete"

_RUN, _SHA256, _VERSION = b"pagemill.record", b"pagemill.record_sha256", b"pagemill.schema_version"
_WHOLE = ("document", "first_token", "n_scored", "window")  # of WindowSums: int64
_SUMS = ("nll_sum", "kld_sum")  # float64
_MAPS = ("metrics", "bits", "samples", "tensors")
_NAMES = ("check", "job", "variant", "data")
_DIGESTED = (*_NAMES, "measure", "subject", *_MAPS, "layers", *_WHOLE, *_SUMS)
_OF_RUN = ("version", "numerics", "engine_digest", "git_sha", "host", "cpu", "features")
_AS_JSON = ("versions", "settings", "limits")
_TAGGED = ("run_key", "suite", "verdict", "version", "numerics", "engine_digest", "git_sha", "host", "record")
_NO_KEY = re.compile(r"[^\w.\- :/]")  # what MLflow refuses in the name of a metric or a parameter
_REMEDY = "give the run-*.parquet of a regression run, or promote a run anew"


def write(folder: Path, outcome: Outcome, stem: str | None = None) -> Path:
    """Publish a run's record; returns its file.

    Args:
        folder: `store.regressions_folder`.
        outcome: its provenance may have what `read` returns; `finished_at` is a datetime or ISO text, now
            where it is missing. Secrets in URLs are left out of what is kept.
        stem: the file's name without its ending; None for run-<UTC of finished_at>.

    Raises:
        StorageFailure: it cannot be written, or the name is taken.
    """
    finished_at = _moment(outcome.provenance.get("finished_at"))
    name = f"{stem or f'run-{finished_at:%Y%m%dT%H%M%S.%fZ}'}.parquet"
    run = redacted({**_of_run(outcome, name), "finished_at": finished_at.isoformat()})
    rows = [_row(outcome, one, run, finished_at) for one in outcome.measured]
    schema = REGRESSIONS_SCHEMA
    table = pa.table([pa.array([row.get(at.name) for row in rows], at.type) for at in schema], schema=schema)
    text = canonical_json(run)
    meta = {**schema.metadata, _RUN: text, _SHA256: _sha256(table.to_pylist(), text)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "give a folder that can be written as paths.results"
        raise StorageFailure(f"{folder}: cannot be made: {error.strerror}", hint) from error
    if not store.commit(table.replace_schema_metadata(meta), folder / name, {"run_key": outcome.run_key}):
        raise StorageFailure(f"{folder / name}: is there already", "run the same command again")
    return folder / name


def read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """What a record holds, to the bit.

    Returns:
        The run's provenance as `write` was given it, with: finished_at (a datetime, UTC), suite, run_key,
        verdict, checks, warnings, baseline (name, source, run; or None), record (the name that the file was
        published under); and its measurements.

    Raises:
        StoreError: it is not there, no record, broken, or of a newer Pagemill.
    """
    try:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "there is no such file"
            raise StoreError(f"{path}: {problem}, expected the record of a regression run", _REMEDY)
        with pq.ParquetFile(path) as file:
            table = file.read()
        meta = table.schema.metadata or {}
        if int(meta.get(_VERSION, 0)) > SCHEMA_VERSION:
            newer = f"has schema version {int(meta[_VERSION])}, expected {SCHEMA_VERSION} or less"
            raise StoreError(f"{path}: {newer}", "it is a newer Pagemill's: upgrade this one")
        if _RUN not in meta or not set(_DIGESTED) <= set(table.column_names):
            raise StoreError(f"{path}: is no record of a regression run", _REMEDY)
        rows = table.to_pylist()
        run = json.loads(meta[_RUN])
        if _sha256(rows, meta[_RUN].decode()) != meta.get(_SHA256, b"").decode():
            raise StoreError(f"{path}: is broken: its content has another SHA-256 than it says", _REMEDY)
        run["finished_at"] = _moment(run["finished_at"])
        return run, [_measured(row) for row in rows]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise StoreError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from error
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StoreError(f"{path}: is no record, or broken ({problem[:200]})", _REMEDY) from error


def track(tracker: Tracker, outcome: Outcome, files: Sequence[Path], began_s: float) -> str | None:
    """Log a run to MLflow: FINISHED whatever the verdict, FAILED where it is incomplete.

    Args:
        files: the record, named run-<...>.parquet, and the reports; the Markdown one becomes the run's note.
        began_s: seconds since the epoch.

    Returns:
        MLflow's id of the run, None where it was not logged.
    """
    record = next(path for path in files if path.suffix == ".parquet")
    notes = [path.read_text(encoding="utf-8") for path in files if path.suffix == ".md"]
    counts = {
        "n_gates": len(outcome.gates),
        "n_broken": sum(gate.passed is False for gate in outcome.gates),
    }
    run = _of_run(outcome, record.name)
    return _log(tracker, run, outcome.measured, counts, files, "\n".join(notes), began_s)


def track_record(tracker: Tracker, path: Path) -> str | None:
    """Log a run whose record alone is left: it ran without MLflow, or elsewhere.

    Raises:
        StoreError: see `read`.
    """
    run, measured = read(path)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(shutil.copyfile(path, Path(folder) / run["record"]))
        note = f"Logged from its record `{path.name}`, without reports."
        return _log(tracker, run, measured, {}, [artifact], note, run["finished_at"].timestamp())


def _log(
    tracker: Tracker,
    run: Mapping[str, Any],
    measured: Sequence[Measured],
    counts: Mapping[str, int],
    files: Sequence[Path],
    note: str,
    began_s: float,
) -> str | None:
    baseline = run["baseline"] or {}
    tags = {name: run.get(name) for name in _TAGGED} | {
        "job": JOB,
        "judged_against": baseline.get("run") or baseline.get("name"),
        "mlflow.source.name": f"pagemill {JOB}",
        "mlflow.note.content": note,
    }
    settings = run.get("settings") or {}
    return tracker.log_run(
        f"{run['suite']}: {run['verdict']}",
        {"suite": run["suite"], "checks": {_key(check): told for check, told in settings.items()}},
        {**_figures(measured), **counts},
        tags,
        files,
        complete=run["verdict"] != INCOMPLETE,
        started_s=began_s,
    )


def _figures(measured: Sequence[Measured]) -> dict[str, float]:
    """Metrics as MLflow's are named: METRIC/CHECK, and the variant and the data where a check has several."""
    figures: dict[str, float] = {}
    for one in measured:
        peers = [other for other in measured if other.check == one.check]
        parts = [one.check]
        parts += [one.variant] if len({other.variant for other in peers}) > 1 else []
        parts += [one.data] if len({other.data for other in peers}) > 1 else []
        figures |= {_key("/".join([metric, *parts])): value for metric, value in one.metrics.items()}
    return figures


def _key(name: str) -> str:
    return re.sub("/+", "/", _NO_KEY.sub("_", name)).strip("/")


def _of_run(outcome: Outcome, record: str) -> dict[str, Any]:
    """What holds for the whole run, as JSON can say it, but for `finished_at`."""
    base = outcome.baseline
    return {
        **outcome.provenance,
        "suite": outcome.suite,
        "run_key": outcome.run_key,
        "verdict": outcome.verdict,
        "checks": dict(outcome.checks),
        "warnings": list(outcome.warnings),
        "baseline": None if base is None else {"name": base.name, "source": base.source, "run": base.run},
        "record": record,
    }


def _row(
    outcome: Outcome, one: Measured, run: Mapping[str, Any], finished_at: datetime.datetime
) -> dict[str, Any]:
    windows = one.windows
    row: dict[str, Any] = {
        **{name: redacted(getattr(one, name)) for name in _NAMES},
        **{name: list(redacted(dict(getattr(one, name))).items()) for name in ("bits", "tensors")},
        "metrics": [(name, None if x is None else float(x)) for name, x in one.metrics.items()],
        "samples": [(name, [float(x) for x in values]) for name, values in one.samples.items()],
        "layers": [(int(window), list(layers.items())) for window, layers in one.layers.items()],
        "measure": canonical_json(redacted(dict(one.measure))),
        "measure_key": key_of(dict(one.measure)),
        "subject": canonical_json(redacted(dict(one.subject))),
        "subject_key": key_of(dict(one.subject)),
        "broken": [
            gate.metric
            for gate in outcome.gates
            if gate.passed is False and (gate.name, gate.variant, gate.data) == one.id
        ],
    }
    if windows is not None:
        row |= {name: np.asarray(getattr(windows, name), np.int64) for name in _WHOLE}
        row["nll_sum"] = np.asarray(windows.nll_sum, np.float64)
        row["kld_sum"] = None if windows.kld_sum is None else np.asarray(windows.kld_sum, np.float64)
    row |= {name: run.get(name) for name in _OF_RUN}
    row |= {name: canonical_json(run[name]) for name in _AS_JSON if run.get(name) is not None}
    row |= {"suite": run["suite"], "verdict": run["verdict"], "ok": run["verdict"] != INCOMPLETE}
    return row | {"finished_at": finished_at, "baseline": (run["baseline"] or {}).get("name")}


def _measured(row: Mapping[str, Any]) -> Measured:
    windows = None
    if row["nll_sum"] is not None:
        sums: dict[str, Any] = {name: np.array(row[name], np.int64) for name in _WHOLE}
        sums |= {name: None if row[name] is None else np.array(row[name], np.float64) for name in _SUMS}
        windows = WindowSums(**sums)
    known: dict[str, Any] = {name: row[name] for name in _NAMES}
    known |= {name: dict(row[name]) for name in _MAPS}
    known |= {name: json.loads(row[name]) for name in ("measure", "subject")}
    return Measured(
        **known, windows=windows, layers={window: dict(layers) for window, layers in row["layers"]}
    )


def _sha256(rows: Sequence[Mapping[str, Any]], run: str) -> str:
    """SHA-256 of the measurements, as Arrow hands them out, and of what holds for the whole run."""
    told = json.dumps([[row[name] for name in _DIGESTED] for row in rows])
    return hashlib.sha256(f"{run}\n{told}".encode()).hexdigest()


def _moment(when: datetime.datetime | str | None) -> datetime.datetime:
    """A time in UTC; one without a zone is meant so."""
    if when is None:
        return datetime.datetime.now(datetime.UTC)
    known = datetime.datetime.fromisoformat(when) if isinstance(when, str) else when
    return known.replace(tzinfo=known.tzinfo or datetime.UTC).astimezone(datetime.UTC)
