"""A data set and settings in, a Parquet table and the numbers of a run out.

    settings.py    what can be set, and every check between settings
    datasets.py    text by path, pinned          tokens.py     one cached token stream
    windows.py     protocols/*.py                what a protocol is; the definition of each score
    preflight.py   everything that can be refused before a worker starts
    shards.py      store.py  tables.py           immutable files; a finished shard is its file
    worker.py      scores a shard                cluster.py    where workers live
    metrics.py     sums -> perplexity and errors
    perplexity.py  runs                          tracking.py   their entries in MLflow
    sweep.py       a grid of runs as one         results.py    the store read back

Importing this package is cheap; what is heavy is imported by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.progress import Progress
    from pipeline.settings import PerplexitySettings
    from pipeline.sweep import Point

__all__ = ["RunResult", "evaluate", "evaluate_all"]


@dataclass(frozen=True)
class RunResult:
    """What a run hands back.

    Attributes:
        summary: the JSON keys of contract.md 5, all present, None where unknown. `shards_done` counts every
        finished
            shard of the run, `shards_reused` those of them that were finished before this invocation.
        warnings: messages for a person, also in the summary.
        table: folder of the run's window table.
        exit_code: 0 done, 3 incomplete.
    """

    summary: dict[str, Any]
    warnings: list[str]
    table: str
    exit_code: int


def evaluate(settings: PerplexitySettings, progress: Progress | None = None) -> RunResult:
    """Perplexity of a model on a text; resumes what an earlier run with the same run key left unfinished.

    Args:
        settings: validated here; relative paths are relative to the current folder.
        progress: told of every finished shard; None is silent.

    Raises:
        RefusedError: before any worker is started (exit 2).
        StorageFailure: results could not be written or read back (exit 3).
        KeyboardInterrupt: after the workers are stopped; finished shards stay.
    """
    from pipeline.perplexity import run

    return run(settings, progress)


def evaluate_all(points: Sequence[Point], progress: Progress | None = None) -> RunResult:
    """Perplexities of many models, texts and settings on one pool of workers; see `pipeline.sweep`.

    Returns:
        a summary with `points`, the summaries of the single runs, each with its axes as `point`.

    Raises:
        SettingsError: points cannot run and `on_bad_point=refuse`, or none can (exit 2).
        ClusterUnreachable, EngineError: no worker could be started.
        KeyboardInterrupt: after the workers are stopped; finished shards stay.
    """
    from pipeline.sweep import run

    return run(points, progress)
