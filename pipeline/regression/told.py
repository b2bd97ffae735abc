"""What the JSON line says of a regression run (contract.md 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import provenance, store
from pipeline.errors import IncompleteError, PipelineError
from pipeline.perplexity import told
from pipeline.regression.measure import Ahead
from pipeline.regression.outcome import Outcome
from pipeline.regression.settings import RegressionSettings
from pipeline.regression.suite import Check

_NAMED_AT_MOST = 5


def blank(s: RegressionSettings, outcome: Outcome | None = None) -> dict[str, Any]:
    """Every key of the contract's JSON."""
    import engine

    baseline = None if outcome is None else outcome.baseline
    measures = [] if outcome is None else sorted(provenance.key_of(dict(m.measure)) for m in outcome.measured)
    return {
        "job": "regression",
        "ok": True,
        "exit_code": 0,
        "error": None,
        "run_key": None if outcome is None else outcome.run_key,
        "measure_key": provenance.key_of(measures) if measures else None,
        "table": None,
        "mlflow_run_id": None,
        "wall_s": None,
        "compile_s": None,
        "load_s": None,
        "version": provenance.version(),
        "numerics": engine.NUMERICS,
        "warnings": [],
        "suite": s.suite.name or None,
        "verdict": None,
        "gates": [],
        "culprit": None,
        "culprits": [],
        "baseline": None
        if baseline is None
        else {"name": baseline.name, "source": baseline.source, "run": baseline.run},
        "record": None,
        "promoted": None,
        "summary": None,
        "junit": None,
        "report": None,
    }


def judged(
    s: RegressionSettings,
    outcome: Outcome,
    failed: Mapping[str, PipelineError],
    down: PipelineError | None,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The summary of a run that was judged, with its exit code: 3, 1, 2 or 0.

    Args:
        failed: checks that could not be finished.
        down: why MLflow did not answer.
    """
    red = [gate for gate in outcome.gates if gate.passed is False]
    summary = blank(s, outcome) | {
        "table": str(store.regressions_folder(Path(s.paths.results), outcome.run_key)),
        "warnings": list(warnings),
        "verdict": outcome.verdict,
        "gates": [asdict(gate) for gate in outcome.gates],
        "n_gates": len(outcome.gates),
        "n_broken": len(red),
        "culprits": [asdict(culprit) for culprit in outcome.culprits],
        "checks": dict(outcome.checks),
    }
    if outcome.culprits:
        summary["culprit"] = summary["culprits"][0]
    if failed:
        lines = [f"{name}: {error}" for name, error in failed.items()]
        error = IncompleteError(
            f"{len(failed)} of {len(outcome.checks)} checks are incomplete:\n  " + "\n  ".join(lines),
            "finished checks are kept: remove the cause and run the same command again",
        )
        return summary | told(error)
    if red:
        return summary | {"ok": False, "exit_code": 1, "error": _broken(s, outcome, len(red))}
    return summary if down is None else summary | told(down)


def _broken(s: RegressionSettings, outcome: Outcome, n: int) -> dict[str, str]:
    """The error of broken limits: who is to blame."""
    sentences = [culprit.sentence for culprit in outcome.culprits[:_NAMED_AT_MOST]]
    if len(outcome.culprits) > _NAMED_AT_MOST:
        sentences.append(f"and {len(outcome.culprits) - _NAMED_AT_MOST} more")
    message = f"{n} of {len(outcome.gates)} limits are broken:\n  " + "\n  ".join(sentences)
    hint = "the report says more; if it is meant so, make this run the baseline"
    if s.action == "promote":
        hint = "a baseline has to keep its own limits: change what broke them, or the limits"
    return {"type": "Regression", "message": message, "hint": hint}


def planned(
    s: RegressionSettings, outcome: Outcome, checks: Sequence[Check], ahead: Sequence[Ahead]
) -> dict[str, Any]:
    """A dry run's answer: what would be measured, and judged against what."""
    plan = [
        {
            "check": check.name,
            "job": check.job,
            "says": check.says,
            "measures": [one.id[1:] for one in ahead if one.id[0] == check.name],
            "limits": [f"{limit.metric} {limit}" for limit in check.limits],
        }
        for check in checks
    ]
    return blank(s, outcome) | {"dry_run": True, "plan": plan, "warnings": list(outcome.warnings)}
