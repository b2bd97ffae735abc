"""What a regression run can be told; what its checks are told is theirs (suite.py, limits.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import SettingsError
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    TrackingSettings,
    absolute,
    nearest,
)

ACTIONS = ("check", "promote")
FILE_ENDING = ".parquet"
"""What names a baseline's or a run's file; anything else is a tag or a run of MLflow."""


@dataclass
class SuiteSettings:
    """A suite as its file has it: checks by name, each with `job`, `set`, `limits` and `trace`."""

    name: str = ""
    checks: dict[str, Any] = field(default_factory=dict)


@dataclass
class RegressionSettings:
    """Everything the regression job can be told.

    Attributes:
        baseline: an MLflow tag or run, or a FILE.parquet; null is the tag that the suite's name is.
        run: an MLflow run or a FILE.parquet, in place of measuring: what is promoted, or judged.
        cluster, tracking, paths, seed: of all checks.
    """

    suite: SuiteSettings = field(default_factory=SuiteSettings)
    baseline: str | None = None
    action: str = "check"
    run: str | None = None
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    seed: int = 0
    dry_run: bool = False

    def validate(self) -> list[str]:
        """Check every value that is not a check's; returns warnings.

        Raises:
            SettingsError: listing all problems at once.
        """
        problems = []
        if self.action not in ACTIONS:
            problems.append(f"action={self.action} is not known{nearest(self.action, ACTIONS)}")
        promotes = self.action == "promote" and self.run is not None
        if not self.suite.checks and not promotes:
            problems.append(
                f"suite {self.suite.name} has no checks"
                if self.suite.name
                else "suite is not set; give suite=smoke, or suite=FILE.yaml"
            )
        if not self.suite.name.strip() and self.suite.checks:
            problems.append("the suite has no name; begin its file with name: NAME")
        for key, named in (("baseline", self.baseline), ("run", self.run)):
            if named is not None and not named.strip():
                problems.append(f"{key} is empty; leave it out, or give a name or a file")
        no_mlflow = self.tracking.kind == "none"
        if no_mlflow and self.run is not None and not is_file(self.run):
            problems.append(f"run={self.run} is of MLflow, and tracking=none; give a FILE{FILE_ENDING}")
        if no_mlflow and not is_file(self.baseline or ""):
            told = (
                "no baseline is named" if self.baseline is None else f"baseline={self.baseline} is of MLflow"
            )
            problems.append(f"{told}, and tracking=none; give baseline=FILE{FILE_ENDING}")
        if problems:
            many = f"{len(problems)} settings cannot be used:\n  " if len(problems) > 1 else ""
            raise SettingsError(
                many + "\n  ".join(problems),
                "correct them on the command line; `pagemill regression --help` lists all keys",
            )
        return self._common().validate()

    def resolved(self) -> RegressionSettings:
        """A copy with `~` expanded and paths absolute; tags and runs stay as they are."""
        paths = replace(self.paths, results=absolute(self.paths.results), cache=absolute(self.paths.cache))
        return replace(self, paths=paths, baseline=_resolved(self.baseline), run=_resolved(self.run))

    def _common(self) -> PerplexitySettings:
        """What all jobs have, to be checked as theirs is."""
        return PerplexitySettings(
            model=ModelSettings("a check's"),
            data=DataSettings(path="a check's"),
            cluster=self.cluster,
            tracking=self.tracking,
            paths=self.paths,
            seed=self.seed,
        )


def is_file(named: str) -> bool:
    """Whether a baseline or a run is named by its file."""
    return named.endswith(FILE_ENDING)


def _resolved(named: str | None) -> str | None:
    return absolute(named) if named is not None and is_file(named) else named
