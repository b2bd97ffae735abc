"""Importance matrices: what the columns of weight matrices multiply, squared and summed over a text.

    settings.py    what can be set, and every check
    worker.py      a shard's windows -> exact sums, one row per input that matrices share
    sums.py        rows of such a table, and shards merged without rounding
    run.py         a run: checks, workers, the file

The file is llama.cpp's (pipeline/quantize/imatrix_file.py). Sums are integers until the last step, so its
bytes do not depend on workers, shards, threads or batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline import RunResult
    from pipeline.imatrix.settings import ImatrixSettings
    from pipeline.progress import Progress

__all__ = ["collect"]


def collect(settings: ImatrixSettings, progress: Progress | None = None) -> RunResult:
    """Write the importance matrix of a model on a text; resumes what an earlier run left unfinished.

    Args:
        settings: validated here; relative paths are relative to the current folder.
        progress: told of every finished shard; None is silent.

    Raises:
        RefusedError: before any worker is started (exit 2).
        StorageFailure: sums or the file could not be written, or sums not be read back (exit 3).
        KeyboardInterrupt: after the workers are stopped; finished shards stay.
    """
    from pipeline.imatrix.run import run

    return run(settings, progress)
