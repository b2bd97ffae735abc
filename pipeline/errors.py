"""Everything the pipeline raises on purpose; a job turns `exit_code` into the process's.

PipelineError                4  base; a bug of ours when nothing below fits
├── RefusedError             2  nothing expensive was started, the user can act on it
│   ├── SettingsError           a value, or two that contradict each other
│   ├── ModelError              the model is missing, broken or not supported; `kind`: engine's error
│   ├── DataError               the text is missing, too short, badly encoded or not the one meant
│   ├── StoreError              the results or the cache folder cannot be used
│   └── ClusterUnreachable      no executor could be started
└── IncompleteError          3  the run started; finished shards are kept
    ├── ScoreError              a worker computed something that is no score, or its tokens changed under it
    └── StorageFailure          results could not be written any more, or what was written cannot be read
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base: `str()` says where, what and what was expected; `hint` is a way on; `kind` names it in JSON."""

    exit_code = 4

    def __init__(self, message: str, hint: str = "", *, kind: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.kind = kind or type(self).__name__

    def __reduce__(self) -> tuple[object, ...]:
        """Ray pickles errors: the hint and the kind have to travel too."""
        return _rebuild, (type(self), str(self), self.hint, self.kind)


def _rebuild(cls: type[PipelineError], message: str, hint: str, kind: str) -> PipelineError:
    return cls(message, hint, kind=kind)


class RefusedError(PipelineError):
    """Refused before work."""

    exit_code = 2


class SettingsError(RefusedError):
    """Settings that cannot be run; the message lists every problem."""


class ModelError(RefusedError):
    """The model cannot be used."""


class DataError(RefusedError):
    """The data cannot be used."""


class StoreError(RefusedError):
    """The results or cache folder cannot be used."""


class ClusterUnreachable(RefusedError):
    """No worker could be started."""


class IncompleteError(PipelineError):
    """The run began and could not be finished; what was finished is kept."""

    exit_code = 3


class ScoreError(IncompleteError):
    """A worker's result is no score."""


class StorageFailure(IncompleteError):
    """Results could not be written or read back."""
