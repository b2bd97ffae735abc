"""Baselines: the run that a suite is judged against, found and made.

A baseline is a run's record (record.py), and is named by

    TAG            the run in MLflow whose tag `pagemill.baseline` is that, or has it among others, commas
                   between; a suite's usual one is called as the suite is
    RUN            32 hex digits, MLflow's id of any run of the suite
    FILE.parquet   a record that lies somewhere, in a repository, say; needs no MLflow

Promoting moves a tag from the run that has it, or replaces a file, and is refused for a run that is
incomplete or another suite's. A tag is given before it is taken away: whoever looks in between, or after a
promotion that was cut short, finds two runs and is told so, never the wrong one.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import RefusedError, SettingsError, StorageFailure, StoreError
from pipeline.regression import record
from pipeline.regression.outcome import Baseline, Measured
from pipeline.regression.settings import FILE_ENDING, is_file
from pipeline.run_index import LoggedRun, RunIndex, ServerDown, open_index
from pipeline.settings import PathsSettings, TrackingSettings, absolute, nearest, shown
from pipeline.tracking import open_tracker

TAG = "pagemill.baseline"

_RUN = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[\w.+@:-]+")


class NoBaseline(RefusedError):
    """There is none of that name, or what has the name can be none; the hint makes one."""


def find(name: str | None, suite: str, tracking: TrackingSettings, results: Path) -> Baseline:
    """What a suite is judged against.

    Args:
        name: a tag, a run or a file; None for the tag that the suite's name is.
        results: `paths.results`.

    Raises:
        NoBaseline: there is none of that name, or it is incomplete or another suite's.
        StoreError: there is one, but its record is gone or broken.
        SettingsError: nothing can have that name.
        ServerDown: MLflow does not answer.
    """
    called = name or suite
    command = _command(suite, called, tracking, results)
    if is_file(called):
        file = Path(absolute(called))
        if not file.exists():
            raise NoBaseline(f"baseline={called}: there is no such file{_near(file)}", f"make one: {command}")
        provenance, measured = record.read(file)
        _check(provenance, suite, f"baseline={called}", command)
        return Baseline(called, str(file), None, provenance, measured)
    _check_name(called)
    if tracking.kind == "none":
        raise NoBaseline(
            f"baseline={called}: tags and runs are MLflow's, and tracking=none",
            f"give a FILE{FILE_ENDING}; make one: "
            + _command(suite, f"baselines/{suite}{FILE_ENDING}", tracking, results),
        )
    with open_index(tracking, results) as index, tempfile.TemporaryDirectory() as folder:
        run = (
            _run(index, called, command) if _RUN.fullmatch(called) else _tagged(index, called, suite, command)
        )
        provenance, measured = _fetched(index, run, Path(folder), command)[1:]
        source = f"MLflow run {run.id} at {index.where}"
        _check(provenance, suite, f"baseline={called}: {source}", command)
    return Baseline(called, source, run.id, provenance, measured)


def promote(what: str, to: str | None, suite: str, tracking: TrackingSettings, results: Path) -> str:
    """Make a run of a suite the baseline of a name; returns a sentence that says so.

    A record that MLflow does not know, because it was made without it, is logged first.

    Args:
        what: MLflow's id of the run, or its record's file.
        to: a tag or a file; None for the tag that the suite's name is.
        suite: "" for whatever the run's is.
        results: `paths.results`.

    Raises:
        NoBaseline: the run is not there, incomplete, or another suite's.
        StoreError: its record is gone or broken, or what has the file's name is no baseline.
        SettingsError: the name is taken by another suite, or nothing can have it.
        StorageFailure: the file cannot be written.
        ServerDown: MLflow does not answer.
    """
    if to is not None and not is_file(to):
        _check_name(to)
    command = _command(suite or "SUITE", to, tracking, results)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if is_file(what):
            run_id, path = None, Path(absolute(what))
            provenance, _ = record.read(path)
        else:
            index = stack.enter_context(open_index(tracking, results))
            run = _run(index, what, command)
            run_id = run.id
            path, provenance, _ = _fetched(index, run, folder, command)
        _check(provenance, suite, f"run={what}", command)
        name = to or str(provenance["suite"])
        if is_file(name):
            return _to_file(path, Path(absolute(name)), provenance)
        _check_name(name)
        if run_id is None:
            index = stack.enter_context(open_index(tracking, results))
            run_id = _recorded(index, provenance)
        if run_id is None:
            run_id = _logged(path, tracking, results)
            index = stack.enter_context(open_index(tracking, results))
        return _to_tag(index, run_id, name, provenance["suite"])


def _run(index: RunIndex, run_id: str, command: str) -> LoggedRun:
    """The run of that id."""
    run = index.run(run_id) if _RUN.fullmatch(run_id) else None
    if run is None:
        raise NoBaseline(f"MLflow at {index.where} has no run {run_id}", f"make one: {command}")
    if run.deleted:
        raise NoBaseline(
            f"MLflow run {run_id} at {index.where} is deleted",
            f"restore it in MLflow, or make another: {command}",
        )
    return run


def _tagged(index: RunIndex, tag: str, suite: str, command: str) -> LoggedRun:
    """The one run that has the tag."""
    tagged = index.tagged(TAG)
    found = [run for run in tagged if tag in _tags(run)]
    if len(found) > 1:
        runs = ", ".join(run.id for run in found)
        raise NoBaseline(
            f"baseline={tag}: {len(found)} runs in MLflow at {index.where} have that tag: {runs}",
            f"say which is meant: {command} run={found[0].id}",
        )
    if not found:
        others = sorted({name for run in tagged if run.tags.get("suite") == suite for name in _tags(run)})
        raise NoBaseline(
            f"suite {suite} has no baseline {tag} in MLflow at {index.where}"
            + (nearest(tag, others) if others else ""),
            f"make one: {command}",
        )
    return found[0]


def _fetched(
    index: RunIndex, run: LoggedRun, folder: Path, command: str
) -> tuple[Path, dict[str, Any], list[Measured]]:
    """A run's record, from its artifacts: the file and what is in it."""
    if run.tags.get("job") != record.JOB or "record" not in run.tags:
        raise NoBaseline(
            f"MLflow run {run.id} ({run.name}) at {index.where} is no run of a suite", f"make one: {command}"
        )
    try:
        path = index.fetch(run.id, run.tags["record"], folder)
        return path, *record.read(path)
    except StoreError as error:
        said = str(error).replace(f"{folder}{os.sep}", f"MLflow run {run.id} at {index.where}: ")
        hint = f"make another: {command}; with run=FILE{FILE_ENDING} where its record is kept elsewhere"
        raise StoreError(f"the tables of a baseline are gone: {said}", hint) from error


def _check(provenance: Mapping[str, Any], suite: str, where: str, command: str) -> None:
    """Whether a run can be a baseline of the suite."""
    if suite and provenance["suite"] != suite:
        raise NoBaseline(
            f"{where} is of suite {provenance['suite']}, expected {suite}",
            f"give suite={provenance['suite']}, or make one: {command}",
        )
    if provenance["verdict"] == record.INCOMPLETE:
        raise NoBaseline(f"{where} is incomplete: not all its checks were measured", f"make one: {command}")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"baseline={name} can be no tag: expected letters, digits and any of . _ - + @ :",
            f"give a TAG, a run's 32 hex digits, or FILE{FILE_ENDING}",
        )


def _recorded(index: RunIndex, provenance: Mapping[str, Any]) -> str | None:
    """MLflow's id of the run that has this record."""
    runs = index.tagged("record", str(provenance["record"]))
    return next((run.id for run in runs if run.tags.get("run_key") == provenance["run_key"]), None)


def _logged(path: Path, tracking: TrackingSettings, results: Path) -> str:
    tracker = open_tracker(tracking, results, "run the same command again")
    try:
        run_id = record.track_record(tracker, path)
    finally:
        tracker.close()
    if run_id is None:
        raise ServerDown("; ".join(tracker.warnings), "run the same command again when MLflow answers")
    return run_id


def _to_tag(index: RunIndex, run_id: str, tag: str, suite: str) -> str:
    """Give a run the tag and take it from those that have it."""
    if _RUN.fullmatch(tag):
        raise SettingsError(
            f"baseline={tag} is a run's id, expected a tag to give", "leave baseline out, say"
        )
    holders = {run.id: run for run in index.tagged(TAG)}
    others = [run for run in holders.values() if tag in _tags(run) and run.id != run_id]
    for other in others:
        if (owner := other.tags.get("suite")) != suite:
            raise SettingsError(
                f"baseline={tag} is a tag of suite {owner}, on MLflow run {other.id}",
                f"give suite {suite} another tag as baseline=TAG",
            )
    own = _tags(holders[run_id]) if run_id in holders else []
    index.set_tag(run_id, TAG, ", ".join(dict.fromkeys([*own, tag])))
    for other in others:
        index.set_tag(other.id, TAG, ", ".join(name for name in _tags(other) if name != tag) or None)
    before = f", in place of {', '.join(other.id for other in others)}" if others else ""
    return f"baseline {tag} of suite {suite} is MLflow run {run_id} now{before}"


def _to_file(path: Path, file: Path, provenance: Mapping[str, Any]) -> str:
    """Put a record in a file's place, all or nothing."""
    suite = provenance["suite"]
    ended = f"{provenance['finished_at']:%Y-%m-%d %H:%M} UTC"
    done = f"baseline {file} is the run of suite {suite} that ended {ended}"
    if file.exists():
        try:
            before, _ = record.read(file)
        except StoreError as error:
            raise StoreError(
                f"{error}; it is not replaced", f"give another FILE{FILE_ENDING}, or move that one away"
            ) from error
        if before["suite"] != suite:
            raise SettingsError(
                f"baseline={file} is of suite {before['suite']}, not {suite}; it is not replaced",
                f"give another FILE{FILE_ENDING}",
            )
        if path.samefile(file):
            return done
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, temporary)
        with temporary.open("rb+") as copy:
            os.fsync(copy.fileno())
        temporary.replace(file)
    except OSError as error:
        raise StorageFailure(
            f"{file}: cannot be written: {error.strerror}", f"give another FILE{FILE_ENDING} as baseline"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return done


def _tags(run: LoggedRun) -> list[str]:
    return [name.strip() for name in run.tags.get(TAG, "").split(",") if name.strip()]


def _near(file: Path) -> str:
    """'; did you mean X?' when a file beside has a name like it."""
    with suppress(OSError):
        names = [path.name for path in file.parent.iterdir() if is_file(path.name)]
        if close := difflib.get_close_matches(file.name, names, n=1):
            return f"; did you mean {file.with_name(close[0])}?"
    return ""


def _command(suite: str, baseline: str | None, tracking: TrackingSettings, results: Path) -> str:
    """The command line that runs the suite and makes its run the baseline."""
    usual = TrackingSettings()
    words = [f"suite={suite}", "action=promote"]
    words += (
        [f"baseline={baseline}"] if baseline not in (None, suite) and not _RUN.fullmatch(baseline) else []
    )
    words += [f"tracking={tracking.kind}"] if tracking.kind != usual.kind else []
    words += [f"tracking.uri={shown(tracking.uri)}"] if tracking.kind == "server" and tracking.uri else []
    words += [f"tracking.experiment={tracking.experiment}"] if tracking.experiment != usual.experiment else []
    words += [f"paths.results={results}"] if str(results) != absolute(PathsSettings().results) else []
    return " ".join(["pagemill regression", *map(shlex.quote, words)])
