"""One base and any number of variants, scored side by side on the same windows.

    settings.py   what can be set; limits          models.py     what makes a file a variant of the base
    on_the_spot.py variants that are types         plan.py       pairs, and what is left of each
    worker.py     a shard through all models       decisions.py  when enough was seen
    statistics.py sketch.py bootstrap.py ladder.py sequence.py student.py    figures and their errors
    sensitivity.py swaps.py proposal.py       which tensors need bits; a mixture for a size
    conclude.py   tables -> figures                record.py     what stays
    run.py        all of it                        report/       what people see
    logit_files.py to_file.py from_file.py         llama.cpp's 16-bit logits, written and as a base

Importing this package is cheap; what is heavy is imported by `compare`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline import RunResult
    from pipeline.compare.settings import CompareSettings
    from pipeline.progress import Progress

__all__ = ["compare"]


def compare(settings: CompareSettings, progress: Progress | None = None) -> RunResult:
    """Figures of variants against their base; pairs that an earlier comparison computed are reused.

    Args:
        settings: validated here; relative paths are relative to the current folder.
        progress: told of every finished shard; None is silent.

    Returns:
        the JSON keys of contract.md 5; exit code 1 where a limit is broken, 3 where shards are missing.

    Raises:
        RefusedError: before any worker is started (exit 2).
        StorageFailure: results could not be written or read back (exit 3).
        KeyboardInterrupt: after the workers are stopped; finished shards stay.
    """
    from pipeline.compare.run import run

    return run(settings, progress)
