"""A comparison from settings to figures: workers, and what is concluded from the files they leave."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline import RunResult, handover, provenance
from pipeline.cluster import open_executor
from pipeline.compare import conclude, record, sensitivity
from pipeline.compare.decisions import Decisions
from pipeline.compare.logit_files import FORMAT
from pipeline.compare.needs import dry_plan, need_of
from pipeline.compare.overhead import overhead
from pipeline.compare.plan import Checked, Planned, begin, check, make_missing, planned, tasks
from pipeline.compare.settings import CompareSettings, broken_limits
from pipeline.compare.worker import FACTORY, CompareSpec, states_folder
from pipeline.errors import IncompleteError
from pipeline.executor import ShardFailure, Task
from pipeline.folders import folder_of, local_files, report_folder, tracking_folder
from pipeline.memory import process_memory
from pipeline.perplexity import no_idle_workers, told, unfetched
from pipeline.preflight import NotFetched, Preflight
from pipeline.run_lock import RunLocks
from pipeline.shards import Shard, n_abreast
from pipeline.tracking import Tracker, open_tracker
from pipeline.worker import ShardResult

if TYPE_CHECKING:
    from pipeline.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """What workers told; times by `time.perf_counter`.

    Attributes:
        n_tokens: read by each model, by the SHA-256 of its file.
    """

    n_tokens: dict[str, int] = field(default_factory=dict)
    began: float = math.inf
    ended: float = 0.0
    load_s: float | None = None
    compile_s: float | None = None
    n_workers: int = 0
    memory: list[dict[str, Any]] = field(default_factory=list)
    failures: list[ShardFailure] = field(default_factory=list)

    def take(self, spec: CompareSpec, result: ShardResult) -> None:
        """Count a shard that is finished."""
        each = result.n_tokens // len(spec.models)
        for _, sha256 in spec.models:
            self.n_tokens[sha256] = self.n_tokens.get(sha256, 0) + each
        self.ended = time.perf_counter()
        self.began = min(self.began, self.ended - result.wall_s)
        self.opened({"load_s": result.load_s, "compile_s": result.compile_s})

    def opened(self, info: dict[str, Any]) -> None:
        """Count what opening the models cost a worker."""
        self.load_s = max(self.load_s or 0.0, float(info["load_s"]))
        self.compile_s = max(self.compile_s or 0.0, float(info["compile_s"]))


def run(settings: CompareSettings, progress: Progress | None) -> RunResult:
    """See `pipeline.compare.compare`."""
    began_s, clock = time.time(), time.perf_counter()
    with ExitStack() as files, Preflight() as preflight:
        try:
            checked = check(settings, preflight, files)
        except NotFetched as error:
            nothing: dict[str, Any] = {"base": None, "variants": [], "report": None, "overhead": None}
            summary = unfetched(error) | {"job": "compare", **nothing}
            summary["wall_s"] = time.perf_counter() - clock
            return RunResult(summary, summary["warnings"], "", 0)
        swaps = sensitivity.check(checked)
        if settings.dry_run:
            summary = _told_plan(checked, len(swaps.groups) if swaps else 0) | (swaps.told() if swaps else {})
            summary["wall_s"] = time.perf_counter() - clock
            return RunResult(summary, summary["warnings"], summary["table"] or "", 0)
        written = _logits(checked, progress)
        if not checked.settings.variants:
            summary = _told_logits(checked, written) | {"wall_s": time.perf_counter() - clock}
            return RunResult(summary, summary["warnings"], "", 0)
        ready = make_missing(checked, files)
        swaps = swaps or sensitivity.check(ready)
        comparison = begin(planned(ready))
        files.enter_context(RunLocks()).take(comparison.folder)
        tracker = open_tracker(comparison.settings.tracking, tracking_folder(comparison.settings.paths))
        try:
            decisions = Decisions(comparison.pairs, comparison.settings.stop.alpha, comparison.order)
            finished = {pair.key: dict(pair.finished.paths) for pair in comparison.pairs}
            tally = _computed(comparison, finished, decisions, tracker, progress)
            swapping = partial(_swapped, comparison, swaps, tracker, progress)
            summary = _concluded(comparison, finished, decisions, tally, swapping)
            summary |= {"logits": written, "wall_s": time.perf_counter() - clock}
            artifacts = [record.commit(comparison, summary)]
            with local_files([*artifacts, *_reports(summary)], leave_out=True) as here:
                summary["mlflow_run_id"] = record.track(tracker, comparison, summary, here, began_s)
        finally:
            tracker.close()
    summary["warnings"] = list(dict.fromkeys([*summary["warnings"], *tracker.warnings]))
    summary["wall_s"] = time.perf_counter() - clock
    return RunResult(summary, summary["warnings"], summary["table"], int(summary["exit_code"]))


def _computed(
    comparison: Planned,
    finished: dict[str, dict[Shard, Path]],
    decisions: Decisions,
    tracker: Tracker,
    progress: Progress | None,
) -> Tally:
    """Compute what is missing, or as much of it as it takes to decide; `finished` gets what was."""
    tally, by_decision = Tally(), comparison.settings.stop.name == "decided"
    todo = tasks(comparison)
    if not todo or (by_decision and decisions.update(finished)):
        return tally

    def take(task: Task, result: ShardResult) -> bool:
        spec = cast(CompareSpec, task.spec)
        tally.take(spec, result)
        for pair in spec.pairs:
            finished[pair.key][task.shard] = folder_of(pair.run_dir) / task.shard.file_name
        if task.shard.resumes:
            for _, sha256 in spec.models:
                handover.drop(states_folder(handover.place(spec), sha256), [task.shard])
        if progress is not None:
            progress.advance(result.n_windows, result.n_scored, result.nll_sum_nats, result.n_tokens)
        return by_decision and decisions.update(finished)

    settings = comparison.asked.settings
    cluster = no_idle_workers(settings, n_abreast([task.shard for task in todo]))
    executor = open_executor(cluster, settings.engine, _factory(comparison), need_of(comparison))
    try:
        if progress is not None:
            progress.note(_starting(comparison))
        infos = executor.start(list({id(task.spec): task.spec for task in todo}.values()))
        tracker.prepare()
        if progress is not None:
            n_done = sum(shard.n_windows for shards in finished.values() for shard in shards)
            progress.start(comparison.n_windows * len(comparison.pairs), n_done, mixed=True)
        tally.failures = executor.run(todo, take)
        tally.memory = [*executor.memory(), {**process_memory(*_paths(comparison)), "driver": True}]
    finally:
        executor.close()
        if progress is not None:
            progress.stop()
    tally.n_workers = len(infos)
    for info in infos:
        tally.opened(info)
    return tally


def _concluded(
    comparison: Planned,
    finished: dict[str, dict[Shard, Path]],
    decisions: Decisions,
    tally: Tally,
    swapping: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """The summary: figures of the windows that count, or what is missing of them.

    Args:
        swapping: what more there is to say, given the summary and the tables of a comparison that is whole.
    """
    summary = _blank(comparison) | _figures(comparison, tally)
    for failure in tally.failures:  # which may have published the rows of some of its pairs
        for pair in comparison.pairs:
            path = pair.folder / failure.shard.file_name
            if failure.shard in pair.shards and path.exists():
                finished[pair.key][failure.shard] = path
    summary["shards_done"] = sum(len(shards) for shards in finished.values())
    if comparison.settings.stop.name == "decided":
        decisions.update(finished)
    counted = decisions.counted
    if lacking := conclude.missing(comparison, finished, counted):
        done = conclude.of_the_finished(comparison, finished, lacking)
        return summary | done | told(conclude.incomplete(lacking, tally.failures))
    for model in (comparison.base, *(pair.variant for pair in comparison.pairs)):
        shutil.rmtree(states_folder(comparison.states, model.sha256), ignore_errors=True)
    rows = conclude.tables(comparison, finished, counted)
    summary |= conclude.conclusion(comparison, rows, counted, decisions.at)
    summary |= _judged(comparison.settings, summary["variants"])
    summary |= swapping(summary, rows)
    return summary | _reported(comparison, summary, rows)


def _blank(comparison: Planned) -> dict[str, Any]:
    return conclude.blank(comparison) | sensitivity.BLANK


def _swapped(
    comparison: Planned,
    swaps: sensitivity.Swaps | None,
    tracker: Tracker,
    progress: Progress | None,
    summary: dict[str, Any],
    rows: dict[str, Any],
) -> dict[str, Any]:
    """What swapping groups of tensors says; exit code 3 where shards of that are missing."""
    if swaps is None:
        return {}

    def compute(stage: Planned, finished: dict[str, dict[Shard, Path]]) -> list[ShardFailure]:
        decisions = Decisions(stage.pairs, stage.settings.stop.alpha, stage.order)
        return _computed(stage, finished, decisions, tracker, progress).failures

    [pair], [whole] = comparison.pairs, summary["variants"]
    try:
        found = sensitivity.measured(comparison, swaps, whole, rows[pair.key], compute)
    except IncompleteError as error:
        found = told(error)
    return found | {"warnings": [*summary["warnings"], *swaps.remarks]}


def _judged(settings: CompareSettings, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Exit code 1 where a limit is not kept, saying which."""
    broken = broken_limits(settings.limits, variants)
    if not broken:
        return {}
    sentences = []
    for b in broken:
        value = "not known" if b["value"] is None else f"{b['value']:.6g}"
        sentences.append(f"{b['variant']}: {b['metric']} is {value}, expected {b['limit']}")
    error = {
        "type": "LimitBroken",
        "message": "; ".join(sentences),
        "hint": "these variants are further from the base than `limits` allows",
    }
    return {"ok": False, "exit_code": 1, "error": error, "limits_broken": broken}


def _reported(comparison: Planned, summary: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Write the report; the tables are complete, and nothing about a page may take them away."""
    from pipeline.compare import report

    asked, s = comparison.asked, comparison.settings
    pairs = report.Pairs(
        base=comparison.base.name,
        pairs=[report.Pair(pair.variant.name, rows[pair.key]) for pair in comparison.pairs],
        tokens=asked.stream.tokens,
        provenance={
            "command": _command(comparison),
            "data": s.data.name,
            **{name.replace("_", " "): value for name, value in comparison.measure.items()},
            "base SHA-256": comparison.base.sha256,
            "variants SHA-256": {pair.variant.name: pair.variant.sha256 for pair in comparison.pairs},
            "run key": comparison.run_key,
            "keys and values": s.engine.kv,
            "activations": s.engine.activations,
            "numerics": summary["numerics"],
            "processor": provenance.cpu_model(),
            "versions": provenance.versions(),
        },
    )
    try:
        folder = report_folder(s.paths, comparison.folder)
        path = report.write(summary, pairs, folder, tokenizer=asked.tokenizer)
    except Exception as error:
        log.debug("report", exc_info=error)
        warning = f"no report: {type(error).__name__}: {error}; the tables are complete"
        return {"warnings": [*summary["warnings"], warning]}
    return {"report": str(path)}


def _command(comparison: Planned) -> str:
    """What to type for the same figures; files by their names, for a page is shown to others."""
    s, protocol = comparison.settings, comparison.settings.protocol
    limit = "" if protocol.limit is None else f" protocol.limit={protocol.limit}"
    stop = f" stop=decided stop.alpha={s.stop.alpha} seed={s.seed}" if s.stop.name == "decided" else ""
    variants = ",".join(Path(variant).name for variant in s.variants)
    return (
        f"pagemill compare base.path={Path(s.base.path).name} 'variants=[{variants}]' data={s.data.name} "
        f"protocol={protocol.name} protocol.window={protocol.window}{limit}{stop}"
    )


def _reports(summary: dict[str, Any]) -> list[Path]:
    """The report, and what was written beside it."""
    if summary["report"] is None:
        return []
    path = Path(summary["report"])
    return sorted(found for found in path.parent.glob(f"{path.stem}.*") if not found.name.startswith("."))


def _figures(comparison: Planned, tally: Tally) -> dict[str, Any]:
    """Times and memory of the workers; null when none was needed."""
    if not tally.n_workers:
        return {"n_workers": 0}
    workers = [entry for entry in tally.memory if not entry.get("driver")]
    # Keyed by process: inline, the driver is the worker and must not count twice.
    each = {(entry["host"], entry["pid"]): entry for entry in tally.memory}.values()
    files = {model.sha256: model.file for model in _members(comparison)}.values()
    scoring_s, n_tokens = tally.ended - tally.began, sum(tally.n_tokens.values())
    return {
        "n_workers": tally.n_workers,
        "compile_s": tally.compile_s,
        "load_s": tally.load_s,
        "tok_per_s": n_tokens / scoring_s if n_tokens and scoring_s > 0 else None,
        "overhead": overhead(comparison.settings, tally.n_tokens, scoring_s, tally.n_workers),
        "model_resident_bytes": sum(file.resident_bytes() for file in files),
        "model_pss_sum_bytes": sum(int(entry["pss_bytes"]) for entry in each) if workers else None,
        "anonymous_bytes_max": max((int(entry["anonymous_bytes"]) for entry in workers), default=None),
    }


def _told_plan(checked: Checked, n_swaps: int) -> dict[str, Any]:
    """A dry run's answer: what would be computed, where and how long; nothing is made or started."""
    comparison = planned(checked)
    summary = _blank(comparison) | dry_plan(checked, comparison, n_swaps)
    for entry, pair in zip(summary["variants"], comparison.pairs, strict=True):
        entry["shards_todo"] = len(pair.todo)
    summary["variants"] += [
        {"name": name, "path": str(path), "type": name, "to_be_quantized": True}
        for name, path in checked.missing
    ]
    return summary | {
        "dry_run": True,
        "fetch_bytes": 0,
        "run_key": comparison.run_key if comparison.pairs and not checked.missing else None,
        "table": summary["table"] if comparison.pairs and not checked.missing else None,
        "shards_todo": sum(len(pair.todo) for pair in comparison.pairs),
    }


def _logits(checked: Checked, progress: Progress | None) -> dict[str, Any] | None:
    """Write the base's logits if that is asked for; what the summary says of them."""
    if checked.settings.logits.out is None:
        return None
    from pipeline.compare import to_file

    return to_file.write(checked, progress)


def _told_logits(checked: Checked, written: dict[str, Any] | None) -> dict[str, Any]:
    """The summary where logits are all that is asked for."""
    assert written is not None, "without variants there is logits.out"
    summary = _blank(planned(checked))
    known = {name: written[name] for name in ("n_windows", "n_scored")}
    base = summary["base"] | {"ppl": written["ppl"]}
    return summary | known | {"run_key": None, "table": None, "base": base, "logits": written}


def _factory(comparison: Planned) -> str:
    """Makes the workers."""
    if comparison.base.type != FORMAT:
        return FACTORY
    from pipeline.compare import from_file

    return from_file.FACTORY


def _starting(comparison: Planned) -> str:
    import engine

    models = [m for m in _members(comparison) if m.type != FORMAT]
    compiled = all(engine.is_warm(model.file) for model in models)
    return "starting workers" if compiled else "starting workers; kernels for this CPU are compiled once"


def _members(comparison: Planned) -> Sequence[Any]:
    return [comparison.base, *(pair.variant for pair in comparison.pairs)]


def _paths(comparison: Planned) -> list[str]:
    return list(dict.fromkeys(path for model in _members(comparison) for path in model.file.paths))
