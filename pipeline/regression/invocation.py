"""One run of a suite on disk: its folder, its lock, and what one that did not finish left to go on from.

    <results>/v1/table=regressions/run_key=<key>/
        .driver.lock                  one run of a suite at a time
        run-<UTC>/                    `paths.results` of its checks, and the reports
            invocation.json           the engine that measures
            checks/<check>.parquet    a check that is done
        run-<UTC>.parquet             the record of a run that ended

A run that has no record yet, of the same engine and not `TOO_OLD_S` ago, is gone on with: its finished checks
and shards are kept. Any other run begins a folder of its own, so nothing is judged that was measured before.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import store
from pipeline.errors import StorageFailure, StoreError
from pipeline.regression import record
from pipeline.regression.outcome import Measured, Outcome
from pipeline.run_lock import RunLocks

TOO_OLD_S = 12 * 3600
"""A night's run is not gone on with the next night: speeds of another day are not today's."""
_FILE = "invocation.json"
_TIME = "%Y%m%dT%H%M%S.%fZ"

log = logging.getLogger(__name__)


class Invocation:
    """A run's folder, locked as long as this is open.

    Attributes:
        folder: `paths.results` of its checks.
        record: of the run, once it ended.
        warnings: what was taken over, and from whom.
    """

    def __init__(self, results: Path, suite: str, run_key: str) -> None:
        self._of, self._suite, self._run_key = store.regressions_folder(results, run_key), suite, run_key
        self._files = ExitStack()
        self.warnings: list[str] = []

    def __enter__(self) -> Invocation:
        """Lock the suite.

        Raises:
            RefusedError: another run of it is going on.
            StoreError, StorageFailure: the folder or the lock cannot be written.
        """
        try:
            self._of.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self._of}: cannot be created: {error.strerror}", "check paths.results"
            ) from error
        with ExitStack() as held:
            if held.enter_context(RunLocks()).take(self._of):
                self.warnings.append("the lock of a run that died was taken over")
            self.folder = self._left() or self._begun()
            self._files = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    @property
    def record(self) -> Path:
        """Where the record will be."""
        return self._of / f"{self.folder.name}.parquet"

    def done(self, check: str) -> list[Measured] | None:
        """What was measured of a check before the run died; None where it was not finished."""
        file = self.folder / "checks" / f"{check}.parquet"
        try:
            return record.read(file)[1] if file.exists() else None
        except StoreError as error:
            log.warning("%s; it is measured again", error)
            file.unlink(missing_ok=True)
            return None

    def keep(self, check: str, measured: Sequence[Measured]) -> None:
        """Keep what was measured of a check."""
        outcome = Outcome(self._suite, self._run_key, record.INCOMPLETE, {}, measured, [], [], None, {})
        record.write(self.folder / "checks", outcome, check)

    def end(self, outcome: Outcome) -> Path:
        """Write the run's record; it cannot be gone on with any more."""
        return record.write(self._of, outcome, self.folder.name)

    def _left(self) -> Path | None:
        """The folder of the last run, if that did not end and can be gone on with."""
        folders = sorted(path for path in self._of.glob("run-*") if path.is_dir())
        if not folders or (self._of / f"{folders[-1].name}.parquet").exists():
            return None
        last = folders[-1]
        try:
            told = json.loads((last / _FILE).read_text())
            began = datetime.datetime.fromisoformat(told["began"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        age_s = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
        if told.get("engine_digest") != engine_digest() or not 0 <= age_s < TOO_OLD_S:
            return None
        self.warnings.append(f"goes on with the run begun {began:%Y-%m-%d %H:%M:%S} UTC, which did not end")
        return last

    def _begun(self) -> Path:
        """A new folder."""
        now = datetime.datetime.now(datetime.UTC)
        folder = self._of / f"run-{now.strftime(_TIME)}"
        told = json.dumps({"began": now.isoformat(), "engine_digest": engine_digest()}) + "\n"
        try:
            folder.mkdir()
            store.publish(folder / _FILE, lambda file: file.write(told.encode()))
        except OSError as error:
            raise StorageFailure(
                f"{folder}: cannot be written: {error.strerror}", "check paths.results"
            ) from error
        return folder


@cache
def engine_digest() -> str:
    """SHA-256 of all sources of the engine: their names and bytes."""
    import engine

    root = Path(engine.__file__).parent
    digest = hashlib.sha256()
    for source in sorted(root.rglob("*.py")):
        digest.update(f"{source.relative_to(root)}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def of_today(settings: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a run that measures here and now.

    Args:
        settings, limits: of each check.
    """
    import socket

    import engine
    from pipeline import provenance
    from pipeline.bench.limits import vector_features

    return {
        "finished_at": datetime.datetime.now(datetime.UTC),
        "version": provenance.version(),
        "numerics": engine.NUMERICS,
        "git_sha": provenance.git_sha(),
        "engine_digest": engine_digest(),
        "host": socket.gethostname(),
        "cpu": provenance.cpu_model(),
        "features": vector_features(),
        "versions": provenance.versions(),
        "settings": dict(settings),
        "limits": dict(limits),
    }
