"""Tokens per second of our engine, and of others beside it in the same rounds.

    preflight.py   all that can be refused first      work.py     the tests, their arithmetic and reading
    players.py     an engine in a process of its own  rounds.py   engines in turns, the best settings of each
    limits.py      what the machine can do, meanwhile ready.py    how soon the first likelihoods are there
    rows.py  record.py  report.py                     what is kept, and the tables

One command is one run: a file of `table=throughput` with a row for each engine, model and test, the same as
Markdown and CSV under `paths.results/reports`, and an entry in MLflow, which is made when all is measured:
importing it costs seconds of a core.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import RunResult, provenance
from pipeline.bench import record, rows
from pipeline.bench.limits import Limits, case_of, pinned, vector_features
from pipeline.bench.preflight import OURS, Bench, Entrant, check
from pipeline.bench.ready import ready
from pipeline.bench.rounds import Contest
from pipeline.bench.settings import ThroughputSettings
from pipeline.tracking import open_tracker

LATER = "the other rows are kept; standard error says more, and peer=[] leaves the others out"

_MEASURED = ("gemm_gflops", "gemm_share", "open_ms", "ready_s", "ready_stages", "compile_s")
log = logging.getLogger(__name__)


def run(settings: ThroughputSettings) -> RunResult:
    """Measure every model in every test, and keep the rows.

    Raises:
        RefusedError: before any engine is started (exit 2).
        StorageFailure: the rows could not be written (exit 3).
        KeyboardInterrupt: after the engines are stopped; the rows of finished tests are kept.
    """
    began_s, clock = time.time(), time.perf_counter()
    bench = check(settings)
    summary = _blank(bench)
    if bench.settings.dry_run:
        summary |= {"dry_run": True, "plan": _plan(bench), "wall_s": time.perf_counter() - clock}
        return RunResult(summary, bench.warnings, summary["table"], 0)
    tracker = open_tracker(bench.settings.tracking, Path(bench.settings.paths.results))
    try:
        try:
            failures = _measure(bench, summary)
        except BaseException:
            if summary["rows"]:
                record.commit(bench, summary | {"ok": False})
            raise
        if failures:
            summary |= {"ok": False, "exit_code": 3, "error": _incomplete(failures)}
        file = record.commit(bench, summary)
        summary["mlflow_run_id"] = record.track(tracker, bench, summary, [file], began_s)
    finally:
        tracker.close()
    summary["warnings"] = [*bench.warnings, *tracker.warnings]
    summary["wall_s"] = time.perf_counter() - clock
    return RunResult(summary, summary["warnings"], summary["table"], int(summary["exit_code"]))


def _blank(bench: Bench) -> dict[str, Any]:
    """Every key of the contract's JSON, what is known at once filled in."""
    import engine

    features = vector_features()
    return {
        "job": "throughput",
        "ok": True,
        "exit_code": 0,
        "error": None,
        "run_key": bench.run_key,
        "measure_key": bench.measure_key,
        "table": str(record.folder(bench)),
        "mlflow_run_id": None,
        "wall_s": None,
        "compile_s": None,
        "load_s": None,
        "version": provenance.version(),
        "numerics": engine.NUMERICS,
        "warnings": bench.warnings,
        "rows": [],
        "ratios": [],
        **dict.fromkeys(("fma_gflops", "gemm_gflops", "read_gb_per_s", "open_ms", "ready_s")),
        "cpu": provenance.cpu_model(),
        "features": features,
        "case": case_of(features),
        "threads": bench.settings.engine.threads,
        "cores": bench.cores,
        "models": [_told(model) for model in bench.models],
        "markdown": None,
        "csv": None,
    }


def _told(model: Entrant) -> dict[str, Any]:
    work = model.work
    known: dict[str, Any] = {"model": work.name, "path": model.path, "sha256": model.sha256}
    known |= {"type": work.type, "bytes": work.n_bytes}
    return known | dict.fromkeys(_MEASURED)


def _plan(bench: Bench) -> list[dict[str, Any]]:
    """A dry run's answer: what would be run."""
    engines = [OURS, *bench.settings.peer]
    return [
        {
            "model": model.work.name,
            "test": case.name,
            "engines": engines,
            "repeats": bench.settings.bench.repeats,
        }
        for model in bench.models
        for case in bench.cases
    ]


def _measure(bench: Bench, summary: dict[str, Any]) -> list[str]:
    """Fill the summary, test by test; returns what went wrong."""
    s = bench.settings
    limits, failures = Limits(s.engine.threads, bench.cores), []
    for model, told in zip(bench.models, summary["models"], strict=True):
        log.info("%s: how soon it is ready, kernels compiled if they are not", model.work.name)
        found = ready(model.path, s.paths.cache, s.engine)
        told |= {key: found[key] for key in ("ready_s", "open_ms", "compile_s")}
        told |= {"ready_stages": found["stages"], **_gemm(model, limits)}
        contest = Contest(model.path, [OURS, *s.peer], bench.own, limits, s.bench.repeats)
        for case in bench.cases:
            done = contest.run(case)
            summary["rows"] += [rows.row(model, timed, s) for timed in done]
            summary["ratios"] += rows.ratios(model, done)
            _summarize(summary, limits)
            speeds = ", ".join(f"{timed.engine} {statistics.median(timed.speeds):,.1f}" for timed in done)
            log.info("%s %s: %s tokens/s", model.work.name, case.name, speeds or "nothing")
        failures += [f"{model.work.name}: {failure}" for failure in contest.failures]
    return failures


def _gemm(model: Entrant, limits: Limits) -> dict[str, float]:
    """GFLOP/s of the engine's products, and their share of the ceiling before and after them."""
    import engine

    begun = len(limits.gflops)
    limits.take()
    with engine.open(model.path) as file, pinned(limits.cores):
        gflops = float(engine.gemm_gflops(file, limits.threads))
    limits.take()
    return {"gemm_gflops": gflops, "gemm_share": gflops / limits.since(begun)[0]}


def _summarize(summary: dict[str, Any], limits: Limits) -> None:
    """The single figures; of several models the one that is worst off counts."""
    models = [model for model in summary["models"] if model["ready_s"] is not None]
    summary["fma_gflops"], summary["read_gb_per_s"] = limits.since(0)
    summary["gemm_gflops"] = min(model["gemm_gflops"] for model in models)
    for key in ("open_ms", "ready_s", "compile_s"):
        summary[key] = max(model[key] for model in models)
    loads = [row["load_s"] for row in summary["rows"] if row["engine"] == OURS and row["load_s"] is not None]
    summary["load_s"] = max(loads, default=None)


def _incomplete(failures: Sequence[str]) -> dict[str, Any]:
    message = f"{len(failures)} of the tests have no figure for an engine: " + "; ".join(failures)
    return {"type": "IncompleteError", "message": message, "hint": LATER}
