"""A suite from settings to a verdict.

    look        every check's own refusals, all at once; the baseline; whether it was asked the same
    measure     the checks, one after the other, each anew (invocation.py goes on with what died)
    confirm     a speed that breaks a limit is measured once more, and that time counts
    judge       limits, then what is to blame (judge.py, culprits.py)
    keep        record, reports, MLflow's run; with action=promote, the new baseline

A server of MLflow that is down costs neither results nor time: the suite runs, its record and its reports are
written, and exit code 2 says what to do.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import RunResult, store
from pipeline.errors import IncompleteError, PipelineError, RefusedError, SettingsError
from pipeline.folders import require_local
from pipeline.perplexity import told
from pipeline.regression import baselines, history, record, report
from pipeline.regression.culprits import culprits
from pipeline.regression.invocation import Invocation, of_today
from pipeline.regression.judge import judge, require_same_measures
from pipeline.regression.measure import Ahead, Jobs, Measurer
from pipeline.regression.outcome import Baseline, Measured, Outcome
from pipeline.regression.pairing import aligned
from pipeline.regression.settings import RegressionSettings, is_file
from pipeline.regression.suite import Check, suite_key
from pipeline.regression.told import blank, judged, planned
from pipeline.run_index import ServerDown
from pipeline.settings import logged
from pipeline.tracking import open_tracker

if TYPE_CHECKING:
    from pipeline.progress import Progress

PASSED, REGRESSION, PROMOTED, INCOMPLETE = "passed", "regression", "promoted", record.INCOMPLETE

log = logging.getLogger(__name__)
MakeProgress = Callable[[], "Progress | None"]


@dataclass
class _Found:
    """What a run came to, on its way.

    Attributes:
        failed: checks that could not be finished, and why.
        down: MLflow did not answer; why, and what to do.
    """

    measured: list[Measured] = field(default_factory=list)
    failed: dict[str, PipelineError] = field(default_factory=dict)
    down: PipelineError | None = None
    warnings: list[str] = field(default_factory=list)


def run(
    settings: RegressionSettings,
    checks: Sequence[Check],
    progress: MakeProgress = lambda: None,
    measurer: Measurer | None = None,
) -> RunResult:
    """Run a suite and judge it, or judge or promote a run that was.

    Args:
        settings: validated here; relative paths are relative to the current folder.
        checks: the suite's, composed; [] where a run is promoted.
        progress: makes the display of one check.
        measurer: how checks are made.

    Returns:
        the JSON keys of contract.md 5; exit code 0, 1 where a limit is broken, 3 where a check could not be
        finished, 2 where all is kept but MLflow did not answer.

    Raises:
        RefusedError: before anything is measured; or the windows turned out to be others (OtherMeasure).
        KeyboardInterrupt: finished checks and shards stay.
    """
    clock = time.perf_counter()
    warnings = settings.validate()
    s = settings.resolved()
    require_local(s.paths.results, "regression")
    found = _Found(warnings=[*warnings, *(remark for check in checks for remark in check.remarks)])
    if s.run is not None and s.action == "promote":
        summary = _promoted(s, s.run)
    elif s.run is not None:
        summary = _judged_again(s, s.run, checks, found)
    else:
        summary = _measured_and_judged(s, checks, found, progress, measurer or Jobs())
    summary["warnings"] = list(dict.fromkeys(summary["warnings"]))
    summary["wall_s"] = time.perf_counter() - clock
    return RunResult(summary, summary["warnings"], summary["table"] or "", int(summary["exit_code"]))


def _promoted(s: RegressionSettings, what: str) -> dict[str, Any]:
    """Nothing is measured: a run that is there becomes the baseline."""
    if s.dry_run:
        raise SettingsError("dry_run=true with action=promote run=...: there is nothing to plan", "drop one")
    said = baselines.promote(what, s.baseline, s.suite.name, s.tracking, Path(s.paths.results))
    log.info("%s", said)
    return blank(s) | {"verdict": PROMOTED, "promoted": said}


def _judged_again(s: RegressionSettings, what: str, checks: Sequence[Check], found: _Found) -> dict[str, Any]:
    """A run that was measured already, judged by the suite's limits of today; only reports are written."""
    results = Path(s.paths.results)
    now = baselines.find(what, s.suite.name, s.tracking, results)
    baseline = baselines.find(s.baseline, s.suite.name, s.tracking, results)
    baseline = aligned(baseline, [one.id for one in now.measured])
    require_same_measures(now.measured, baseline)
    found.measured = list(now.measured)
    outcome = _outcome(s, checks, found, baseline, now.provenance)
    folder = store.regressions_folder(results, outcome.run_key)
    store.probe(folder, "paths.results")
    reports = report.write(outcome, folder / f"judged-{Path(str(now.provenance['record'])).stem}", [])
    return judged(s, outcome, found.failed, found.down, found.warnings) | reports | {"record": now.source}


def _measured_and_judged(
    s: RegressionSettings,
    checks: Sequence[Check],
    found: _Found,
    progress: MakeProgress,
    measurer: Measurer,
) -> dict[str, Any]:
    """The whole way."""
    results = Path(s.paths.results)
    store.probe(results, "paths.results")
    ahead = _look(checks, results, measurer)
    baseline = _baseline(s, [one.id for one in ahead], found)
    if baseline is not None:
        require_same_measures(ahead, baseline)
    if s.dry_run:
        return _plan(s, checks, ahead, baseline, found)
    began_s, clock = time.time(), time.perf_counter()
    with Invocation(results, s.suite.name, suite_key(s.suite, checks)) as invocation:
        found.warnings += invocation.warnings
        _measure(checks, found, invocation, progress, measurer)
        today = of_today(
            {check.name: {"job": check.job, **_logged(check)} for check in checks},
            {check.name: [f"{limit.metric} {limit}" for limit in check.limits] for check in checks},
        ) | {"wall_s": time.perf_counter() - clock}
        if baseline is not None:
            _require_same_windows(s, checks, found, baseline, today, invocation)
        outcome = _outcome(s, checks, found, baseline, today)
        if slow := _slow(checks, outcome):
            _measure_again(slow, found, invocation, progress, measurer)
            outcome = _outcome(s, checks, found, baseline, today)
        return _kept(s, outcome, found, invocation, began_s)


def _logged(check: Check) -> dict[str, Any]:
    """What a suite sets of a check, under names that MLflow takes: `model@base` is `model_base`."""
    return {key.replace("@", "_"): logged(value) for key, value in check.given.items()}


def _look(checks: Sequence[Check], results: Path, measurer: Measurer) -> list[Ahead]:
    """What will be measured; SettingsError with every check that cannot be."""
    ahead, errors = [], {}
    with tempfile.TemporaryDirectory(prefix=".look-", dir=results) as folder:
        for check in checks:
            try:
                ahead += measurer.look(check, Path(folder))
            except RefusedError as error:
                errors[check.name] = error
    if errors:
        hints = list(dict.fromkeys(error.hint for error in errors.values() if error.hint))[:2]
        name = next(iter(errors))
        hints.append(f"suite.checks.{name}.set.KEY=VALUE changes a check, ~suite.checks.{name} leaves it out")
        kinds = {error.kind for error in errors.values()}
        many = f"{len(errors)} of {len(checks)} checks cannot run:\n  " if len(errors) > 1 else ""
        raise SettingsError(
            many + "\n  ".join(f"{name}: {error}" for name, error in errors.items()),
            "; ".join(hints),
            kind=kinds.pop() if len(kinds) == 1 else None,
        )
    return ahead


def _baseline(s: RegressionSettings, ids: Sequence[tuple[str, str, str]], found: _Found) -> Baseline | None:
    """What today is judged against; None where a baseline is made, or where MLflow does not answer."""
    if s.action == "promote":
        return None
    try:
        baseline = baselines.find(s.baseline, s.suite.name, s.tracking, Path(s.paths.results))
    except ServerDown as error:
        log.warning("%s; the suite runs, and is judged later", error)
        found.down = error
        return None
    return aligned(baseline, ids)


def _measure(
    checks: Sequence[Check],
    found: _Found,
    invocation: Invocation,
    progress: MakeProgress,
    measurer: Measurer,
) -> None:
    """All checks, in their order; one that fails leaves the others to be made.

    Raises:
        RefusedError: the first one cannot even be started.
    """
    for i, check in enumerate(checks, 1):
        measured = invocation.done(check.name)
        if measured is not None:
            log.info("check %d of %d: %s: was finished before", i, len(checks), check.name)
            found.measured += measured
            continue
        log.info("check %d of %d: %s: %s", i, len(checks), check.name, check.says)
        try:
            measured = measurer.measure(check, invocation.folder, progress())
        except (IncompleteError, RefusedError) as error:
            if isinstance(error, RefusedError) and not found.measured and i == 1:
                raise
            log.warning("%s: %s", check.name, error)
            found.failed[check.name] = error
            continue
        invocation.keep(check.name, measured)
        found.measured += measured


def _slow(checks: Sequence[Check], outcome: Outcome) -> list[Check]:
    """Checks of a speed that break a limit: a neighbour on the machine may have, for minutes."""
    red = {gate.name for gate in outcome.gates if gate.passed is False}
    return [check for check in checks if check.job == "throughput" and check.name in red]


def _measure_again(
    checks: Sequence[Check],
    found: _Found,
    invocation: Invocation,
    progress: MakeProgress,
    measurer: Measurer,
) -> None:
    """Checks a second time, in place of the first; one that fails now keeps what it was."""
    order = list(dict.fromkeys(one.check for one in found.measured))
    for check in checks:
        said = f"{check.name} broke a limit and was measured again; the second time counts"
        log.info("%s", said)
        try:
            measured = measurer.measure(check, invocation.folder, progress())
        except (IncompleteError, RefusedError) as error:
            log.warning("%s, again: %s", check.name, error)
            continue
        found.warnings.append(said)
        others = [one for one in found.measured if one.check != check.name]
        found.measured = sorted(others + measured, key=lambda one: order.index(one.check))


def _require_same_windows(
    s: RegressionSettings,
    checks: Sequence[Check],
    found: _Found,
    baseline: Baseline,
    today: Mapping[str, Any],
    invocation: Invocation,
) -> None:
    """That what was measured can be compared; if not, the record is kept, for it is a run that ended."""
    try:
        require_same_measures(found.measured, baseline)
    except SettingsError:
        says = {check.name: check.says for check in checks}
        key = suite_key(s.suite, checks)
        invocation.end(
            Outcome(s.suite.name, key, INCOMPLETE, says, found.measured, [], [], None, today, found.warnings)
        )
        raise


def _outcome(
    s: RegressionSettings,
    checks: Sequence[Check],
    found: _Found,
    baseline: Baseline | None,
    today: Mapping[str, Any],
) -> Outcome:
    """Gates, what is to blame, and the verdict."""
    before = None if baseline is None else baseline.provenance.get("engine_digest")
    gates = judge(
        {check.name: check.limits for check in checks if check.name not in found.failed},
        found.measured,
        baseline,
        (before, today.get("engine_digest")),
    )
    is_red = any(gate.passed is False for gate in gates)
    if found.failed or (found.down is not None and not is_red):
        verdict = INCOMPLETE
    else:
        verdict = REGRESSION if is_red else PROMOTED if s.action == "promote" else PASSED
    return Outcome(
        suite=s.suite.name,
        run_key=suite_key(s.suite, checks),
        verdict=verdict,
        checks={check.name: check.says for check in checks},
        measured=found.measured,
        gates=gates,
        culprits=culprits(gates, found.measured, baseline, today),
        baseline=baseline,
        provenance=today,
        warnings=[*found.warnings, *(f"{name}: {error}" for name, error in found.failed.items())],
    )


def _kept(
    s: RegressionSettings, outcome: Outcome, found: _Found, invocation: Invocation, began_s: float
) -> dict[str, Any]:
    """The record, the reports, the entry in MLflow, and with action=promote the baseline.

    A run that lacks a check has no record: the same command goes on with it.
    """
    results = Path(s.paths.results)
    reports = report.write(outcome, invocation.folder, history.read(results, outcome.suite))
    if found.failed:
        return judged(s, outcome, found.failed, found.down, found.warnings) | reports
    # What MLflow keeps away from being judged was measured whole; it can be promoted, or judged later.
    whole = outcome if found.down is None else replace(outcome, verdict=PASSED)
    file = invocation.end(whole)
    run_id = None
    if s.tracking.kind != "none":
        tracker = open_tracker(s.tracking, results, _later(s, file))
        try:
            files = [file, *(Path(path) for path in reports.values() if path is not None)]
            run_id = record.track(tracker, whole, files, began_s)
        finally:
            tracker.close()
        found.warnings += tracker.warnings
        if run_id is None and found.down is None:
            found.down = ServerDown("; ".join(tracker.warnings) or "MLflow did not answer", _later(s, file))
    summary = (
        judged(s, outcome, found.failed, found.down, found.warnings)
        | reports
        | {"record": str(file), "mlflow_run_id": run_id}
    )
    if found.down is not None and summary["exit_code"] == 2:
        summary["error"]["hint"] = _later(s, file)
    if s.action == "check" and summary["exit_code"] == 1:
        summary["error"]["hint"] += f": the same command with action=promote run={run_id or file}"
    to_file = is_file(s.baseline or "")
    if s.action == "promote" and (summary["exit_code"] == 0 or (to_file and summary["exit_code"] == 2)):
        what = str(file) if to_file or run_id is None else run_id
        try:
            summary["promoted"] = baselines.promote(what, s.baseline, s.suite.name, s.tracking, results)
        except RefusedError as error:
            return summary | told(error) | {"verdict": INCOMPLETE}
        log.info("%s", summary["promoted"])
    return summary


def _later(s: RegressionSettings, file: Path) -> str:
    """What to do when MLflow answers again."""
    how = f"action={s.action} run={file}"
    return f"all is kept; when MLflow answers: the same command with {how}"


def _plan(
    s: RegressionSettings,
    checks: Sequence[Check],
    ahead: Sequence[Ahead],
    baseline: Baseline | None,
    found: _Found,
) -> dict[str, Any]:
    """A dry run's answer; nothing is started."""
    if found.down is not None:
        found.warnings.append(f"{found.down}; there would be nothing to judge against")
    says = {check.name: check.says for check in checks}
    key = suite_key(s.suite, checks)
    outcome = Outcome(s.suite.name, key, "", says, [], [], [], baseline, {}, found.warnings)
    return planned(s, outcome, checks, ahead)
