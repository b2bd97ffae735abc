"""What a process's runs came to, told as one JSON object at the end (contract.md 4, 5)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jobs.failures import DONE, Failure

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from pipeline import RunResult

Settings = TypeVar("Settings")

COMMON_KEYS = (
    "job", "ok", "exit_code", "error", "run_key", "measure_key", "table", "mlflow_run_id",
    "wall_s", "compile_s", "load_s", "version", "numerics", "warnings",
)  # fmt: skip
"""In every job's line, null where unknown."""


class Stopped(BaseException):
    """A job's exception on its way through Hydra, which reports every Exception that it sees."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class Outcome:
    """The runs of this process so far: one, or several with Hydra's `--multirun`.

    `text` is for standard output, before the JSON line.
    """

    results: Path | None = None
    summaries: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Around a job's work: what it raises reaches the command line without Hydra's comments on it."""
        try:
            yield
        except Exception as error:
            raise Stopped(error) from error

    def begin(self, cfg: DictConfig, schema: type[Settings]) -> Settings:
        """The composed config as the job's settings dataclass.

        Raises:
            SettingsError: naming a key that Hydra's `+` added, or every required key that has no value.
        """
        from omegaconf import OmegaConf

        from pipeline.errors import SettingsError
        from pipeline.folders import tracking_folder

        _check_keys(cfg, schema)
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise SettingsError(
                f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set",
                "give "
                + " ".join(f"{key}=..." for key in missing)
                + ", or choose a group option that has them",
            )
        settings = OmegaConf.to_object(cfg)
        self.results = tracking_folder(settings.paths).expanduser()  # type: ignore[union-attr]
        return cast(Settings, settings)

    def swept(self, cfg: DictConfig, schema: type) -> bool:
        """Whether the config is a sweep: its points are checked one by one, so required keys may be missing.

        Raises:
            SettingsError: as `begin`, for a key that is not known.
        """
        from omegaconf import OmegaConf

        from pipeline.settings import is_url

        _check_keys(cfg, schema)
        results = OmegaConf.select(cfg, "paths.results")
        self.results = None if results is None or is_url(results) else Path(results).expanduser()
        return bool(OmegaConf.select(cfg, "sweep"))

    def answer(self, text: str, summary: Mapping[str, Any]) -> None:
        """Keep what a question was answered: text for standard output, and keys for the JSON line."""
        self.text += text
        self.summaries.append(dict(summary))

    def finish(self, result: RunResult) -> None:
        """Keep a finished run's summary and show it to the person at the terminal."""
        from jobs.report import show

        summary = dict(result.summary)
        self.summaries.append(summary)
        show(summary, self.results)

    def line(self, job: str, failure: Failure | None) -> dict[str, Any]:
        """The JSON object of the whole process."""
        if failure is None and len(self.summaries) == 1:
            return _complete(job, self.summaries[0])
        codes = [summary.get("exit_code", DONE) for summary in self.summaries]
        exit_code = failure.exit_code if failure else max(codes, default=DONE)
        line = {
            "ok": exit_code == DONE,
            "exit_code": exit_code,
            "error": failure.as_error() if failure else None,
        }
        if self.summaries:
            line["runs"] = [_complete(job, summary) for summary in self.summaries]
        return _complete(job, line)


CURRENT = Outcome()
"""This process's; the command line starts it afresh for each call."""


def _check_keys(cfg: DictConfig, schema: type) -> None:
    from omegaconf import OmegaConf

    from jobs.schema import keys, nearest, unknown
    from pipeline.errors import SettingsError

    for key in unknown(OmegaConf.to_container(cfg, resolve=False), schema):
        raise SettingsError(f"unknown key {key}", f"did you mean {nearest(key, keys(schema))}?")


def _complete(job: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    from engine import NUMERICS

    known: dict[str, Any] = {
        **dict.fromkeys(COMMON_KEYS),
        "job": job,
        "exit_code": DONE,
        "version": _version(),
        "numerics": NUMERICS,
        "warnings": [],
    }
    known |= summary
    known["ok"] = known["exit_code"] == DONE
    return known


def _version() -> str | None:
    try:
        return version("pagemill")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return None
