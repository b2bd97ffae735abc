"""Perplexities of models on texts: workers, and for each run one number from the files they leave.

A run is one model on one text; a sweep is several, whose shards share the workers (pipeline/sweep.py). Each
is concluded as soon as its last shard is there, while the workers go on with the next.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline import RunResult, handover, metrics, provenance, store
from pipeline.cluster import open_executor, plan_of
from pipeline.errors import IncompleteError, PipelineError, StorageFailure
from pipeline.estimate import Estimator, need_of
from pipeline.executor import ShardFailure, Task, shards_missing
from pipeline.folders import folder_of, tracking_folder
from pipeline.memory import process_memory
from pipeline.preflight import NotFetched, Preflight, Prepared
from pipeline.record import Journal
from pipeline.settings import ClusterSettings, PerplexitySettings
from pipeline.shards import Shard, n_abreast
from pipeline.topology import usable_cores
from pipeline.tracking import open_tracker
from pipeline.worker import ShardResult, in_line

if TYPE_CHECKING:
    from pipeline.progress import Progress

_MEMORY_EVERY_S = 1.0  # the kernel takes tens of milliseconds to add up a process's pages

HEADLINES = (
    "ppl",
    "ppl_stderr",
    "ppl_stderr_clustered",
    "nll_mean_nats",
    "bits_per_byte",
    "byte_ppl",
    "word_ppl",
    "nll_sha256",
    *metrics.HALVES,
)
"""Numbers of a finished run only; null in any other."""

_SUMMED = ("nll_sum_nats", "nll_sq_sum", "n_scored", "n_bytes", "n_words", "weight")
_HALVES = ("half_n_scored", "half_nll_sum_nats", "half_nll_sq_sum", "weight")
log = logging.getLogger(__name__)


@dataclass
class Scoring:
    """A run on its way: what workers told of its shards; times by `time.perf_counter`.

    Attributes:
        since: from when its `wall_s` counts, None for the beginning of its first shard.
        began, ended: of its first shard's work and its last one's.
        name: of a sweep's point, None for a run of its own.
        busy_s, idle_s: workers' time within shards, each worker's first one aside, and between them.
    """

    ready: Prepared
    since: float | None = None
    name: str | None = None
    n_left: int = 0
    n_tokens: int = 0
    began: float = math.inf
    ended: float = 0.0
    load_s: float | None = None
    model_open_s: float | None = None
    compile_s: float | None = None
    busy_s: float = 0.0
    idle_s: float = 0.0
    workers: set[str] = field(default_factory=set)
    failures: list[ShardFailure] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def take(self, result: ShardResult) -> None:
        """Count a shard that is finished."""
        self.n_left -= 1
        self.n_tokens += result.n_tokens
        self.ended = time.perf_counter()
        self.began = min(self.began, self.ended - result.wall_s)
        self.load_s = max(self.load_s or 0.0, result.load_s)
        self.model_open_s = max(self.model_open_s or 0.0, result.model_open_s)
        self.compile_s = max(self.compile_s or 0.0, result.compile_s)
        self.workers.add(result.worker)
        if result.idle_s is not None:
            self.busy_s += result.wall_s
            self.idle_s += result.idle_s

    def opened(self, infos: Sequence[dict[str, Any]]) -> None:
        """Count what opening its model cost workers that had no shard of it, or could finish none."""
        for info in infos:
            if info["model_path"] == self.ready.spec.model_path:
                self.load_s = max(self.load_s or 0.0, float(info["load_s"]))
                self.model_open_s = max(self.model_open_s or 0.0, float(info["model_open_s"]))
                self.compile_s = max(self.compile_s or 0.0, float(info["compile_s"]))


def run(settings: PerplexitySettings, progress: Progress | None) -> RunResult:
    """See `pipeline.evaluate`: a run of its own."""
    began_s, clock = time.time(), time.perf_counter()
    with Preflight() as preflight:
        try:
            ready = preflight.check(settings)
        except NotFetched as error:
            summary = unfetched(error) | {"wall_s": time.perf_counter() - clock}
            return RunResult(summary, summary["warnings"], settings.paths.results, 0)
        if ready.settings.dry_run:
            summary = planned(ready) | dry_plan([ready], Estimator(ready.settings))[0]
            summary |= {"wall_s": time.perf_counter() - clock}
            return RunResult(summary, ready.warnings, ready.spec.run_dir, 0)
        scoring = Scoring(preflight.begin(ready), since=clock)
        tracker = open_tracker(ready.settings.tracking, tracking_folder(ready.settings.paths))
        with Journal(tracker, None, began_s) as journal:
            score([scoring], journal, progress, began_s)
            _, problems = journal.end({}, complete=True)
    summary = scoring.summary
    warnings = summary["warnings"] + problems
    summary |= {"warnings": warnings, "wall_s": time.perf_counter() - clock}
    return RunResult(summary, warnings, ready.spec.run_dir, int(summary["exit_code"]))


def score(scorings: Sequence[Scoring], journal: Journal, progress: Progress | None, began_s: float) -> None:
    """Compute what is missing of every run, in the order given, and fill in the summaries.

    A run that cannot be concluded stops no other one: its summary says why. Alone, it raises.

    Raises:
        ClusterUnreachable, EngineError, ...: no worker could be started.
    """
    n_concluded, memory_now = 0, _Memory()

    def conclude(scoring: Scoring, n_workers: int, memory: list[dict[str, Any]]) -> None:
        nonlocal n_concluded
        try:
            _conclude(scoring, n_workers, memory, journal, began_s)
        except PipelineError as error:
            if len(scorings) == 1:
                raise
            scoring.summary = blank(scoring.ready) | told(error)
        n_concluded += 1
        if scoring.name is not None:
            _say(scoring, n_concluded, len(scorings))

    def take(task: Task, result: ShardResult) -> None:
        scoring = by_key[task.spec.run_key]
        scoring.take(result)
        handover.drop(handover.place(task.spec), [task.shard])
        if progress is not None:
            progress.advance(result.n_windows, result.n_scored, result.nll_sum_nats, result.n_tokens)
        if not scoring.n_left and n_concluded < len(scorings) - 1:  # the last one: below, with all memory
            conclude(scoring, len(scoring.workers), memory_now.of(scoring))

    for scoring in scorings:
        scoring.n_left = len(scoring.ready.todo)
        if not scoring.n_left:
            conclude(scoring, 0, [])
    todo = [scoring for scoring in scorings if scoring.n_left]
    if not todo:
        return
    by_key = {scoring.ready.spec.run_key: scoring for scoring in todo}
    specs = in_line([scoring.ready.spec for scoring in todo])
    tasks = [
        Task(spec, shard, spec.model_path)
        for spec, scoring in zip(specs, todo, strict=True)
        for shard in scoring.ready.todo
    ]
    abreast = sum(n_abreast(scoring.ready.todo) for scoring in todo)
    executor = open_executor(
        no_idle_workers(todo[0].ready.settings, abreast),
        specs[0].engine,
        need=need_of([scoring.ready for scoring in todo]),
    )
    try:
        if progress is not None:
            _tell_starting(todo, progress)
        infos = executor.start(
            [spec for i, spec in enumerate(specs) if spec.model_path != specs[i - 1].model_path or not i]
        )
        journal.begin()
        if progress is not None:
            _tell_done(scorings, progress)
        failures = executor.run(tasks, take)
        memory = executor.memory()
        memory += [_of_driver(scoring) for scoring in todo if not scoring.summary]
    finally:
        executor.close()
        if progress is not None:
            progress.stop()
    for failure in failures:
        by_key[failure.task.spec.run_key].failures.append(failure)
    for scoring in todo:
        if not scoring.summary:
            scoring.opened(infos)
            conclude(scoring, len(infos) if len(scorings) == 1 else len(scoring.workers), memory)


def told(error: PipelineError) -> dict[str, Any]:
    """What a summary says of an error."""
    return {
        "ok": False,
        "exit_code": error.exit_code,
        "error": {"type": error.kind, "message": str(error), "hint": error.hint},
    }


def _conclude(
    scoring: Scoring, n_workers: int, memory: list[dict[str, Any]], journal: Journal, began_s: float
) -> None:
    """One number from the files that are there, its row, its entry in MLflow."""
    ready = scoring.ready
    finished = store.finished_shards(folder_of(ready.spec.run_dir), ready.shards, ready.spec.run_key)
    missing = [shard for shard in ready.shards if shard not in finished.paths]
    summary = blank(ready) | _figures(scoring, n_workers, memory)
    summary |= {"shards_done": len(finished.paths), "shards_reused": len(ready.finished.paths)}
    summary["warnings"] = list(dict.fromkeys(ready.warnings + finished.remarks))
    windows = None
    if missing:
        handover.drop(handover.place(ready.spec), finished.paths)
        summary |= told(incomplete(ready, missing, scoring.failures))
    else:
        windows = store.read_windows(finished.paths)
        summary |= metrics.perplexity({name: windows.column(name).to_numpy() for name in _SUMMED})
        summary |= metrics.second_halves({name: windows.column(name).to_numpy() for name in _HALVES})
        summary["n_tokens"] = int(windows.column("n_tokens").to_numpy().sum())
        handover.drop_all(handover.place(ready.spec))
    now = time.perf_counter()
    since = scoring.since if scoring.since is not None else min(scoring.began, now)
    summary["wall_s"] = now - since
    scoring.summary = summary
    try:
        journal.enter(ready, summary, windows, max(began_s, time.time() - summary["wall_s"]), scoring.name)
    except StorageFailure:
        if summary["ok"]:
            raise
        # The disk is full, as the summary says already: of which shards there are, not only of this row.


def _say(scoring: Scoring, n: int, n_runs: int) -> None:
    """A line for each point of a sweep that ended."""
    ppl = scoring.summary["ppl"]
    what = f"perplexity {ppl:.4f}" if ppl is not None else "incomplete"
    log.info("%d of %d points: %s: %s", n, n_runs, scoring.name, what)


def _tell_starting(todo: Sequence[Scoring], progress: Progress) -> None:
    import engine

    compiled = all(engine.is_warm(file) for file in {id(s.ready.file): s.ready.file for s in todo}.values())
    progress.note(
        "starting workers" if compiled else "starting workers; kernels for this CPU are compiled once"
    )


def _tell_done(scorings: Sequence[Scoring], progress: Progress) -> None:
    """Begin the display with what an earlier run finished."""
    n_windows = sum(scoring.ready.n_windows for scoring in scorings)
    n_done = sum(shard.n_windows for scoring in scorings for shard in scoring.ready.finished.paths)
    if len(scorings) > 1:
        progress.start(n_windows, n_done, mixed=True)
        return
    done = scorings[0].ready.finished.paths
    rows = store.read_windows(done) if done else None
    sums = [0] if rows is None else rows.column("nll_sum_nats").to_pylist()
    counts = [0] if rows is None else rows.column("n_scored").to_pylist()
    progress.start(n_windows, n_done, n_scored=sum(counts), nll_sum=math.fsum(sums))


def no_idle_workers(settings: PerplexitySettings, n_shards: int) -> ClusterSettings:
    """A local cluster whose size was left open starts no more workers than shards can be in work at once."""
    cluster = settings.cluster
    if cluster.kind != "local" or cluster.workers is not None:
        return cluster
    fitting = max(1, usable_cores() // settings.engine.threads)
    return replace(cluster, workers=min(fitting, max(1, n_shards)))


class _Memory:
    """Memory of the workers and the driver while the workers compute: they cannot be asked, the kernel can.

    A worker that has gone on to the next file maps nothing of this one any more, so the shares still add up.
    """

    def __init__(self) -> None:
        self._latest: tuple[str, float, list[dict[str, Any]]] = "", -math.inf, []

    def of(self, scoring: Scoring) -> list[dict[str, Any]]:
        """All read at one moment; [] when a worker is on another host."""
        spec, here = scoring.ready.spec, socket.gethostname()
        file, when, measured = self._latest
        now = time.monotonic()
        if file == spec.model_path and now - when < _MEMORY_EVERY_S:
            return measured
        measured = [_of_driver(scoring)]
        for worker in scoring.workers:
            host, _, pid = worker.rpartition(":")
            if host != here:
                measured = []
                break
            try:
                found = process_memory(*scoring.ready.file.paths, pid=int(pid))
            except OSError:  # it died and was replaced
                continue
            measured.append({**found, "model_path": spec.model_path})
        self._latest = spec.model_path, now, measured
        return measured


def _of_driver(scoring: Scoring) -> dict[str, Any]:
    measured = process_memory(*scoring.ready.file.paths)
    return {**measured, "model_path": scoring.ready.spec.model_path, "driver": True}


def blank(ready: Prepared) -> dict[str, Any]:
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
        "n_documents": ready.stream.n_documents,
        "n_documents_short": ready.stream.n_short if ready.stream.is_apart else None,
        "tok_per_s": None,
        "worker_busy_share": None,
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
        "load_mode": ready.settings.engine.load,
        "model_open_s": None,
        "model_rss_bytes_max": None,
        "model_locked_bytes": None,
        "anonymous_bytes_max": None,
    }


def unfetched(error: NotFetched) -> dict[str, Any]:
    """A dry run's answer where the model would have to be fetched first."""
    import engine

    unknown = ("error", "run_key", "measure_key", "table", "mlflow_run_id", "compile_s", "load_s", *HEADLINES)
    nulls = dict.fromkeys((*unknown, "n_windows", "n_tokens", "n_workers", "n_shards", "shards_todo"))
    known = {"job": "perplexity", "ok": True, "exit_code": 0, "version": provenance.version()}
    found = {"warnings": [str(error)], "dry_run": True, "fetch_bytes": error.n_bytes}
    return {**known, **nulls, **found, "numerics": engine.NUMERICS}


def planned(ready: Prepared) -> dict[str, Any]:
    """A dry run's answer: the plan, and nothing started."""
    s = ready.settings
    cluster = no_idle_workers(s, n_abreast(ready.todo))
    return blank(ready) | {
        "dry_run": True,
        "n_tokens": ready.n_windows * s.protocol.window,
        "n_workers": 1 if cluster.kind == "inline" else cluster.workers,
        "shards_todo": len(ready.todo),
        "fetch_bytes": 0,
    }


def dry_plan(
    runs: Sequence[Prepared], estimator: Estimator, extra_bytes: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where workers would go, and what that takes: of all runs together, and of each.

    The plan is said line by line as a run says it before it starts; runs that are finished need none.

    Args:
        extra_bytes: see `estimate.need_of`.
    """
    todo = [ready for ready in runs if ready.todo]
    nodes, n_workers = [], 0
    if todo:
        cluster = no_idle_workers(runs[0].settings, sum(n_abreast(ready.todo) for ready in todo))
        made = plan_of(cluster, need_of(todo, extra_bytes))
        for line in (*made.lines(), *made.remarks):
            log.info("%s", line)
        nodes, n_workers = made.told(), len(made.places)
    plans = [estimator.plan(ready, n_workers) for ready in runs]
    return {
        "n_workers": n_workers,
        "nodes": nodes,
        "estimated_s": sum(plan["estimated_s"] for plan in plans),
        "estimated_from": list(dict.fromkeys(plan["estimated_from"] for plan in plans)),
        "memory_bytes": max(plan["model_bytes"] + n_workers * plan["worker_bytes"] for plan in plans),
    }, plans


def _figures(scoring: Scoring, n_workers: int, memory: list[dict[str, Any]]) -> dict[str, Any]:
    """Times and memory of the workers; null when none was needed."""
    ready = scoring.ready
    if not ready.todo:
        return {"n_workers": 0}
    memory = [entry for entry in memory if entry["model_path"] == ready.spec.model_path]
    workers = [entry for entry in memory if not entry.get("driver")]
    # Keyed by process: inline, the driver is the worker and must not count twice.
    each = {(entry["host"], entry["pid"]): entry for entry in memory}.values()
    wall_s = scoring.ended - scoring.began
    return {
        "n_workers": n_workers,
        "compile_s": scoring.compile_s,
        "load_s": scoring.load_s,
        "model_open_s": scoring.model_open_s,
        "tok_per_s": scoring.n_tokens / wall_s if scoring.n_tokens and wall_s > 0 else None,
        "worker_busy_share": scoring.busy_s / (scoring.busy_s + scoring.idle_s) if scoring.busy_s else None,
        "model_resident_bytes": ready.file.resident_bytes(),
        "model_pss_sum_bytes": sum(int(entry["pss_bytes"]) for entry in each) if workers else None,
        "model_rss_bytes_max": max((int(entry["rss_bytes"]) for entry in workers), default=None),
        "model_locked_bytes": sum(int(entry["locked_bytes"]) for entry in each) if workers else None,
        "anonymous_bytes_max": max((int(entry["anonymous_bytes"]) for entry in workers), default=None),
    }


def incomplete(
    ready: Prepared, missing: Sequence[Shard], failures: Sequence[ShardFailure]
) -> IncompleteError:
    """What is told of a run that lacks shards: which, and why."""
    what = f"{len(missing)} of {len(ready.shards)} shards were set aside"
    return shards_missing(what, {shard: shard.file_name for shard in missing}, failures)
