"""A command line whose pipeline is replaced, so that what is tested is the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline import RunResult
from pipeline.settings import PerplexitySettings

SUMMARY = {
    "job": "perplexity",
    "ok": True,
    "exit_code": 0,
    "error": None,
    "run_key": "0123456789abcdef",
    "measure_key": "fedcba9876543210",
    "table": "results/v1/table=windows/run_key=0123456789abcdef",
    "mlflow_run_id": None,
    "wall_s": 12.5,
    "compile_s": 0.0,
    "load_s": 0.25,
    "warnings": [],
    "ppl": 24.497366123456789,
    "ppl_stderr": 0.8,
    "ppl_stderr_clustered": 0.9,
    "bits_per_byte": 0.98,
    "n_windows": 6,
    "n_scored": 1530,
    "n_tokens": 3072,
    "tok_per_s": 245.7,
    "n_workers": 2,
    "shards_done": 6,
    "shards_reused": 0,
    "model_resident_bytes": 98_000_000,
    "model_pss_sum_bytes": 98_100_000,
    "anonymous_bytes_max": 150_000_000,
}


@dataclass
class Pipeline:
    """Stands in for `pipeline.evaluate`: remembers the settings, and answers or raises."""

    seen: list[PerplexitySettings] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=lambda: dict(SUMMARY))
    raises: BaseException | None = None

    def evaluate(self, settings: PerplexitySettings, progress: object = None) -> RunResult:
        self.seen.append(settings)
        if self.raises is not None:
            raise self.raises
        return RunResult(self.answer, [], "results", int(self.answer["exit_code"]))


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    stand_in = Pipeline()
    monkeypatch.setattr("pipeline.evaluate", stand_in.evaluate)
    return stand_in


@pytest.fixture(autouse=True)
def _logging_as_it_was(logging_as_it_was: None) -> None:
    """After every test of a command line."""
