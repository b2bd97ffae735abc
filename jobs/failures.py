"""From an exception to an exit code, a message and a way on (contract.md 4)."""

from __future__ import annotations

import datetime
import errno
import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.schema import explain
from pipeline.redact import redacted

DONE, REFUSED, INCOMPLETE, BUG, INTERRUPTED = 0, 2, 3, 4, 130
_STORAGE_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@dataclass(frozen=True)
class Failure:
    """What the JSON line and the person at the terminal are told."""

    exit_code: int
    type: str
    message: str
    hint: str = ""

    def as_error(self) -> dict[str, Any]:
        """The `error` object of the JSON line."""
        return {"type": self.type, "message": self.message, "hint": self.hint or None}


def from_interrupt() -> Failure:
    """Ctrl-C or SIGTERM."""
    return Failure(
        INTERRUPTED,
        "Interrupted",
        "interrupted before the end",
        "run the same command again: what is finished is kept and not computed twice",
    )


def from_exception(error: Exception, schema: type, words: Sequence[str], results: Path | None) -> Failure:
    """Classify `error`, raised while a job was composed from `words` or was running.

    Args:
        error: the exception as it arrived.
        schema: the job's settings dataclass.
        words: the command line after the job.
        results: the results folder, where it is known already; a bug's traceback is kept there.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from engine import EngineError
    from pipeline.errors import PipelineError

    if isinstance(error, PipelineError) and error.exit_code != BUG:
        return Failure(error.exit_code, error.kind, str(error), error.hint)
    if isinstance(error, EngineError):
        return Failure(REFUSED, type(error).__name__, str(error))
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _from_composing(error, schema, words)
    if isinstance(error, OSError) and error.errno is not None:
        return _from_os(error)
    return _bug(error, results)


def _from_composing(error: Exception, schema: type, words: Sequence[str]) -> Failure:
    message, hint = explain(schema, words) or _in_hydras_words(error)
    return Failure(
        REFUSED, "ConfigError", message, hint or "`pagemill JOB --help` lists groups, keys and values"
    )


def _in_hydras_words(error: Exception) -> tuple[str, str]:
    from hydra.errors import OverrideParseException

    where = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = [line.strip() for line in str(error.__cause__ or "").splitlines() if line.strip()]
    return where + ": ".join(lines[:1] + cause[:1]) or type(error).__name__, " ".join(lines[1:])


def _from_os(error: OSError) -> Failure:
    where = f"{error.filename}: " if error.filename else ""
    message = where + (error.strerror or str(error))
    if error.errno in _STORAGE_FULL:
        return Failure(INCOMPLETE, type(error).__name__, message, "make room and run the same command again")
    return Failure(REFUSED, type(error).__name__, message, "check the path and its permissions")


def _bug(error: Exception, results: Path | None) -> Failure:
    text = redacted("".join(traceback.format_exception(error)))
    kept = _keep(text, results)
    hint = f"the traceback is in {kept}; please report it" if kept else "PAGEMILL_DEBUG=1 shows the traceback"
    return Failure(BUG, type(error).__name__, f"a bug of Pagemill: {error or type(error).__name__}", hint)


def _keep(text: str, results: Path | None) -> Path | None:
    name = f"pagemill-bug-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    for folder in (results, Path(tempfile.gettempdir())):
        try:
            if folder is not None and folder.is_dir():
                (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
                return folder / name
        except OSError:
            continue
    return None
