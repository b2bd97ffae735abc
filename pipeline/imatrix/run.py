"""A run of `pagemill imatrix`: checks, workers, and a file from the sums that they leave."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import RunResult, provenance, store
from pipeline.cluster import open_executor
from pipeline.estimate import Estimator, need_of
from pipeline.executor import Task
from pipeline.folders import folder_of, local_files, tracking_folder
from pipeline.gguf_writer import check_place
from pipeline.imatrix.settings import ImatrixSettings
from pipeline.imatrix.sums import IMATRIX, matrices, merged
from pipeline.imatrix.worker import WORKER
from pipeline.perplexity import (
    Scoring,
    blank,
    dry_plan,
    incomplete,
    no_idle_workers,
    planned,
    told,
    unfetched,
)
from pipeline.preflight import NotFetched, Preflight, Prepared
from pipeline.quantize.imatrix_file import write_imatrix
from pipeline.settings import logged
from pipeline.shards import n_abreast
from pipeline.tracking import DataInput, Tracker, open_tracker

if TYPE_CHECKING:
    from pipeline.progress import Progress
    from pipeline.worker import ShardResult

_KEYS = (
    *("run_key", "measure_key", "table", "mlflow_run_id", "wall_s", "compile_s", "load_s", "version"),
    *("numerics", "warnings", "n_windows", "n_tokens", "tok_per_s", "n_workers", "n_shards", "shards_done"),
    *("shards_reused", "windows_per_shard", "model_sha256", "data_sha256", "tokens_sha256"),
)
"""What its line has of a perplexity run's."""
_PLANNED = (
    *("dry_run", "n_tokens", "n_workers", "shards_todo", "nodes", "estimated_s", "estimated_from"),
    *("memory_bytes", "fetch_bytes"),
)
"""What a dry run's has besides."""
_TAGGED = (
    *("run_key", "measure_key", "sha256", "model_sha256", "tokens_sha256", "version", "numerics"),
    *("exit_code", "ok"),
)
log = logging.getLogger(__name__)


def run(settings: ImatrixSettings, progress: Progress | None) -> RunResult:
    """See `pipeline.imatrix.collect`."""
    began_s, clock = time.time(), time.perf_counter()
    settings.validate()
    settings = settings.resolved()
    check_place("imatrix.out", Path(settings.imatrix.out), 0, overwrite=settings.imatrix.overwrite)
    with Preflight(IMATRIX) as preflight:
        try:
            ready = preflight.check(settings.reading)
        except NotFetched as error:
            summary = unfetched(error) | {"job": "imatrix", "out": settings.imatrix.out}
            summary |= {"n_tensors": None, "sha256": None}
            summary["wall_s"] = time.perf_counter() - clock
            return RunResult(summary, summary["warnings"], "", 0)
        summary = _blank(ready, settings)
        if settings.dry_run:
            plan = planned(ready) | dry_plan([ready], Estimator(ready.settings), _sums_bytes(ready))[0]
            summary |= {key: plan[key] for key in _PLANNED}
        else:
            scoring = Scoring(preflight.begin(ready), since=clock)
            tracker = open_tracker(ready.settings.tracking, tracking_folder(ready.settings.paths))
            try:
                _compute(scoring, tracker, progress)
                summary |= _concluded(scoring, settings)
                summary |= _tracked(tracker, scoring.ready, settings, summary, began_s)
            finally:
                tracker.close()
    summary["wall_s"] = time.perf_counter() - clock
    return RunResult(summary, summary["warnings"], ready.spec.run_dir, int(summary["exit_code"]))


def _compute(scoring: Scoring, tracker: Tracker, progress: Progress | None) -> None:
    """Have workers sum up the shards that are missing; those set aside are noted."""
    ready = scoring.ready
    if not ready.todo:
        return
    spec = ready.spec

    def take(task: Task, result: ShardResult) -> None:
        scoring.take(result)
        if progress is not None:
            progress.advance(result.n_windows, result.n_scored, result.nll_sum_nats, result.n_tokens)

    executor = open_executor(
        no_idle_workers(ready.settings, n_abreast(ready.todo)),
        spec.engine,
        WORKER,
        need_of([ready], _sums_bytes(ready)),
    )
    try:
        if progress is not None:
            progress.note("starting workers")
        scoring.opened(executor.start([spec]))
        tracker.prepare()
        if progress is not None:
            done = sum(shard.n_windows for shard in ready.finished.paths)
            progress.start(ready.n_windows, done, mixed=True)
        tasks = [Task(spec, shard, spec.model_path) for shard in ready.todo]
        scoring.failures += executor.run(tasks, take)
    finally:
        executor.close()
        if progress is not None:
            progress.stop()


def _sums_bytes(ready: Prepared) -> int:
    """The most that a worker's sums take: three int64 for each input of a layer's matrices, and a total.

    Matrices that multiply the same input share its sums; here each counts.
    """
    shapes = [
        tensor.shape
        for name, tensor in ready.file.tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    ]
    columns = max((shape[1] for shape in shapes), default=0)
    return (ready.settings.engine.threads + 1) * len(shapes) * (columns + 1) * 24


def _concluded(scoring: Scoring, settings: ImatrixSettings) -> dict[str, Any]:
    """The file, when no shard is missing, and what is known of the run now."""
    ready = scoring.ready
    folder = folder_of(ready.spec.run_dir)
    finished = store.finished_shards(folder, ready.shards, ready.spec.run_key, IMATRIX)
    missing = [shard for shard in ready.shards if shard not in finished.paths]
    wall_s = scoring.ended - scoring.began
    known: dict[str, Any] = {
        "shards_done": len(finished.paths),
        "shards_reused": len(ready.finished.paths),
        "n_workers": len(scoring.workers),
        "compile_s": scoring.compile_s,
        "load_s": scoring.load_s,
        "tok_per_s": scoring.n_tokens / wall_s if scoring.n_tokens and wall_s > 0 else None,
        "warnings": list(dict.fromkeys(ready.warnings + finished.remarks)),
    }
    if missing:
        return known | told(incomplete(ready, missing, scoring.failures))
    totals = merged(finished.paths[shard] for shard in ready.shards)
    n_tokens = next(iter(totals.values())).n_tokens
    out, s = Path(settings.imatrix.out), settings
    sha256 = write_imatrix(out, matrices(totals), [s.data.name], ready.n_windows, s.protocol.window)
    log.info("%s: %d matrices, %d windows, sha256 %s", out, len(totals), ready.n_windows, sha256)
    return known | {"n_tensors": len(totals), "n_tokens": n_tokens, "sha256": sha256}


def _blank(ready: Prepared, settings: ImatrixSettings) -> dict[str, Any]:
    """Every key of the contract's JSON, what is known at once filled in."""
    known = blank(ready)
    return {
        "job": "imatrix",
        "ok": True,
        "exit_code": 0,
        "error": None,
        **{key: known[key] for key in _KEYS},
        "out": settings.imatrix.out,
        "n_tensors": None,
        "sha256": None,
    }


def _tracked(
    tracker: Tracker, ready: Prepared, settings: ImatrixSettings, summary: dict[str, Any], began_s: float
) -> dict[str, Any]:
    """Log the run to MLflow, with the file."""
    tags = {key: summary[key] for key in _TAGGED} | {
        "git_sha": provenance.git_sha(),
        "job": "imatrix",
        "mlflow.source.name": "pagemill imatrix",
    }
    data = settings.data
    files = [folder_of(ready.spec.run_dir) / "plan.json", *([Path(summary["out"])] if summary["ok"] else [])]
    with local_files(files, leave_out=True) as artifacts:
        run_id = tracker.log_run(
            f"imatrix of {Path(ready.spec.model_path).stem} on {data.name}",
            logged(settings),
            {key: x for key, x in summary.items() if isinstance(x, (int, float)) and key not in _TAGGED},
            tags,
            artifacts,
            DataInput(data.name, ready.settings.data.path, ready.measure["data_sha256"]),
            complete=bool(summary["ok"]),
            started_s=began_s,
        )
    return {"mlflow_run_id": run_id, "warnings": [*summary["warnings"], *dict.fromkeys(tracker.warnings)]}
