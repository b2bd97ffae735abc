"""The perplexity of one model on one text: plan, workers, and one number from the files they leave."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import RunResult, metrics, provenance, store
from pipeline.cluster import open_executor
from pipeline.errors import IncompleteError
from pipeline.executor import ShardFailure
from pipeline.memory import process_memory
from pipeline.preflight import Prepared, prepared
from pipeline.record import commit_row, track
from pipeline.runtime import available_cores
from pipeline.settings import ClusterSettings, PerplexitySettings
from pipeline.tracking import Tracker, open_tracker
from pipeline.worker import ShardResult

if TYPE_CHECKING:
    from pipeline.progress import Progress

_NAMED_AT_MOST = 5

HEADLINES = (
    "ppl",
    "ppl_stderr",
    "ppl_stderr_clustered",
    "nll_mean_nats",
    "bits_per_byte",
    "byte_ppl",
    "word_ppl",
    "nll_sha256",
)
"""Numbers of a finished run only; null in any other."""

_SUMMED = ("nll_sum_nats", "nll_sq_sum", "n_scored", "n_bytes", "n_words")


@dataclass
class Scoring:
    """What happened while workers ran."""

    wall_s: float = 0.0
    n_tokens: int = 0
    ready: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    failures: list[ShardFailure] = field(default_factory=list)


def run(settings: PerplexitySettings, progress: Progress | None) -> RunResult:
    """See `pipeline.evaluate`."""
    began_s, clock = time.time(), time.perf_counter()
    with prepared(settings) as ready:
        if ready.settings.dry_run:
            return _planned(ready, clock)
        tracker = open_tracker(ready.settings.tracking, Path(ready.settings.paths.results))
        try:
            scoring = _score(ready, tracker, progress) if ready.todo else Scoring()
            resident = ready.file.resident_bytes()
            return _concluded(ready, scoring, resident, tracker, began_s, clock)
        finally:
            tracker.close()


def _concluded(
    ready: Prepared, scoring: Scoring, resident: int, tracker: Tracker, began_s: float, clock: float
) -> RunResult:
    """One number from the files that are there, its row, its entry in MLflow."""
    finished = store.finished_shards(Path(ready.spec.run_dir), ready.shards, ready.spec.run_key)
    warnings = list(dict.fromkeys(ready.warnings + finished.remarks))
    missing = [shard for shard in ready.shards if shard not in finished.paths]
    summary = _blank(ready) | _figures(ready, scoring, resident)
    summary |= {"shards_done": len(finished.paths), "shards_reused": len(ready.finished.paths)}
    windows = None
    if missing:
        error = _incomplete(ready, missing, scoring.failures)
        summary |= {"ok": False, "exit_code": error.exit_code}
        summary["error"] = {"type": error.kind, "message": str(error), "hint": error.hint}
    else:
        windows = store.read_windows(finished.paths)
        summary |= metrics.perplexity({name: windows.column(name).to_numpy() for name in _SUMMED})
        summary["n_tokens"] = int(windows.column("n_tokens").to_numpy().sum())
    summary["wall_s"] = time.perf_counter() - clock
    row = commit_row(ready, summary, warnings)
    summary["mlflow_run_id"] = track(tracker, ready, summary, [row], windows, began_s)
    warnings += tracker.warnings
    summary |= {"warnings": warnings, "wall_s": time.perf_counter() - clock}
    return RunResult(summary, warnings, ready.spec.run_dir, int(summary["exit_code"]))


def _score(ready: Prepared, tracker: Tracker, progress: Progress | None) -> Scoring:
    """Start workers, hand out the shards that are left, measure memory while all are alive, and stop them."""
    import engine

    scoring = Scoring()

    def take(result: ShardResult) -> None:
        scoring.n_tokens += result.n_tokens
        if progress is not None:
            progress.advance(result.n_windows, result.n_scored, result.nll_sum_nats, result.n_tokens)

    executor = open_executor(_no_idle_workers(ready), ready.settings.engine)
    try:
        if progress is not None:
            compiled = engine.is_warm(ready.file)
            progress.note(
                "starting workers" if compiled else "starting workers; kernels for this CPU are compiled once"
            )
        scoring.ready = executor.start(ready.spec)
        tracker.prepare()
        if progress is not None:
            _tell_done(ready, progress)
        begun = time.perf_counter()
        scoring.failures = executor.run(ready.todo, take)
        scoring.wall_s = time.perf_counter() - begun
        scoring.memory = executor.memory()
        scoring.memory.append({**process_memory(ready.spec.model_path), "driver": True})
    finally:
        executor.close()
        if progress is not None:
            progress.stop()
    return scoring


def _tell_done(ready: Prepared, progress: Progress) -> None:
    """Begin the display with what an earlier run finished."""
    done = ready.finished.paths
    rows = store.read_windows(done) if done else None
    sums = [0] if rows is None else rows.column("nll_sum_nats").to_pylist()
    counts = [0] if rows is None else rows.column("n_scored").to_pylist()
    n_done = sum(shard.n_windows for shard in done)
    progress.start(ready.n_windows, n_done, n_scored=sum(counts), nll_sum=math.fsum(sums))


def _no_idle_workers(ready: Prepared) -> ClusterSettings:
    """A local cluster whose size was left open starts no more workers than there are shards to do."""
    cluster = ready.settings.cluster
    if cluster.kind != "local" or cluster.workers is not None:
        return cluster
    fitting = max(1, available_cores() // ready.settings.engine.threads)
    return replace(cluster, workers=min(fitting, max(1, len(ready.todo))))


def _blank(ready: Prepared) -> dict[str, Any]:
    """Every key of the contract's JSON, what is known at once filled in."""
    import engine

    return {
        "job": "perplexity",
        "ok": True,
        "exit_code": 0,
        "error": None,
        "run_key": ready.spec.run_key,
        "measure_key": ready.spec.columns["measure_key"],
        "table": ready.spec.run_dir,
        "mlflow_run_id": None,
        "wall_s": None,
        "compile_s": None,
        "load_s": None,
        "version": provenance.version(),
        "numerics": engine.NUMERICS,
        "warnings": ready.warnings,
        **dict.fromkeys(HEADLINES),
        "n_windows": ready.n_windows,
        "n_scored": None,
        "n_tokens": None,
        "n_tokens_text": int(ready.stream.tokens.size),
        "tok_per_s": None,
        "n_workers": None,
        "shards_done": len(ready.finished.paths),
        "shards_reused": len(ready.finished.paths),
        "n_shards": len(ready.shards),
        "windows_per_shard": ready.spec.windows_per_shard,
        "model_sha256": ready.spec.model_sha256,
        "data_sha256": ready.measure["data_sha256"],
        "tokens_sha256": ready.measure["tokens_sha256"],
        "model_resident_bytes": None,
        "model_pss_sum_bytes": None,
        "anonymous_bytes_max": None,
    }


def _planned(ready: Prepared, clock: float) -> RunResult:
    """A dry run's answer: the plan, and nothing started."""
    s = ready.settings
    cluster = _no_idle_workers(ready)
    plan = {
        "dry_run": True,
        "n_tokens": ready.n_windows * s.protocol.window,
        "n_workers": 1 if cluster.kind == "inline" else cluster.workers,
        "shards_todo": len(ready.todo),
        "wall_s": time.perf_counter() - clock,
    }
    return RunResult(_blank(ready) | plan, ready.warnings, ready.spec.run_dir, 0)


def _figures(ready: Prepared, scoring: Scoring, resident: int) -> dict[str, Any]:
    """Times and memory of the workers; null when none was needed."""
    if not ready.todo:
        return {"n_workers": 0}
    workers = [entry for entry in scoring.memory if not entry.get("driver")]
    # Keyed by process: inline, the driver is the worker and must not count twice.
    shares = {(entry["host"], entry["pid"]): int(entry["pss_bytes"]) for entry in scoring.memory}
    return {
        "n_workers": len(scoring.ready),
        "compile_s": max((float(info["compile_s"]) for info in scoring.ready), default=None),
        "load_s": max((float(info["load_s"]) for info in scoring.ready), default=None),
        "tok_per_s": scoring.n_tokens / scoring.wall_s if scoring.n_tokens and scoring.wall_s > 0 else None,
        "model_resident_bytes": resident,
        "model_pss_sum_bytes": sum(shares.values()) if workers else None,
        "anonymous_bytes_max": max((int(entry["anonymous_bytes"]) for entry in workers), default=None),
    }


def _incomplete(ready: Prepared, missing: Sequence[Any], failures: Sequence[ShardFailure]) -> IncompleteError:
    causes = {failure.shard: failure for failure in failures}
    named = []
    for shard in missing[:_NAMED_AT_MOST]:
        failure = causes.get(shard)
        why = "was not finished"
        if failure is not None:
            why = f"{failure.cause} ({failure.kind}, attempts: {failure.attempts})"
        named.append(f"{shard.file_name}: {why}")
    if len(missing) > _NAMED_AT_MOST:
        named.append(f"and {len(missing) - _NAMED_AT_MOST} more")
    return IncompleteError(
        f"{len(missing)} of {len(ready.shards)} shards were set aside: " + "; ".join(named),
        "finished shards are kept: remove the cause and run the same command again",
    )
