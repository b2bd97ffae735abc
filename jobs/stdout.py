"""Standard output belongs to one JSON line: everything else that a run prints goes to standard error.

Ray, Hydra, MLflow and the libraries below them write to file descriptor 1 as they please, from C++ too, so
the descriptor itself is turned round while a job runs and the line is written to what it was before.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class StdoutGuard:
    """Within it descriptor 1 leads to standard error; `write` reaches the real standard output."""

    def __init__(self) -> None:
        self._real: int | None = None

    def __enter__(self) -> StdoutGuard:
        _open_standard_streams()
        _flush()
        self._real = os.dup(1)
        divert_stdout()
        return self

    def write(self, text: str) -> None:
        """Write text; a reader that has gone away is no error."""
        _flush()
        data = memoryview(text.encode(errors="backslashreplace"))
        try:
            while self._real is not None and data:
                data = data[os.write(self._real, data) :]
        except OSError:
            return

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _flush()
        if self._real is not None:
            os.dup2(self._real, 1)
            os.close(self._real)
            self._real = None


def divert_stdout() -> None:
    """Lead descriptor 1 to standard error."""
    _flush()
    os.dup2(2, 1)


def to_json(summary: Mapping[str, Any]) -> str:
    """One line of strict JSON; floats in the fewest digits that read back the same, NaN and infinity null."""
    return json.dumps(_plain(summary), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):  # a NumPy scalar
        return _plain(value.item())
    return str(value)


def _open_standard_streams() -> None:
    """Open to nowhere what was closed when the process started: the next file would get its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a closed pipe, a closed file
            continue
