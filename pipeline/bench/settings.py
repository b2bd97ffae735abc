"""What a user can set of `pagemill throughput`, and every check between those settings.

Not frozen for the reason that pipeline/settings.py has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import SettingsError
from pipeline.settings import (
    ACTIVATIONS,
    CLUSTER_KINDS,
    KV_TYPES,
    LOAD_MODES,
    TRACKING_KINDS,
    ClusterSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    TrackingSettings,
    absolute,
    is_url,
    too_small,
    unknown,
)

KINDS = ("perplexity", "prompt", "generate", "batched")
_LISTS = ("prompt", "generate", "seqs")


@dataclass
class BenchSettings:
    """What is timed, and how often.

    Attributes:
        kinds: which of `KINDS`.
        prompt: tokens of prompts.
        generate: tokens generated after them, one by one.
        seqs: sequences that are generated side by side.
        repeats: timed rounds; in each every engine has its turn.
        window, windows: of kind `perplexity`, tokens and how many.
    """

    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    prompt: list[int] = field(default_factory=lambda: [512])
    generate: list[int] = field(default_factory=lambda: [64])
    seqs: list[int] = field(default_factory=lambda: [1, 4, 8])
    repeats: int = 5
    window: int = 512
    windows: int = 8


@dataclass
class ThroughputSettings:
    """Everything the throughput job can be told. `models` is a list in place of `model.path`."""

    model: ModelSettings = field(default_factory=lambda: ModelSettings(""))
    models: list[str] = field(default_factory=list)
    bench: BenchSettings = field(default_factory=BenchSettings)
    peer: list[str] = field(default_factory=list)
    engine: EngineSettings = field(default_factory=EngineSettings)
    cluster: ClusterSettings = field(default_factory=lambda: ClusterSettings("inline", workers=1))
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    seed: int = 0
    dry_run: bool = False

    @property
    def paths_of_models(self) -> list[str]:
        """The files, in the order given."""
        return self.models or [self.model.path]

    def validate(self) -> list[str]:
        """Check every value and every pair; returns warnings.

        Whether the machine has the cores and the peers is seen later (pipeline/bench/preflight.py).

        Raises:
            SettingsError: listing all problems at once, each with the key, its value and what would do.
        """
        problems = _files(self) + _names(self) + _numbers(self) + _lists(self)
        if problems:
            many = f"{len(problems)} settings cannot be used:\n  " if len(problems) > 1 else ""
            raise SettingsError(
                many + "\n  ".join(problems),
                "correct them on the command line; `pagemill throughput --help` lists all keys",
            )
        return _warnings(self)

    def resolved(self) -> ThroughputSettings:
        """A copy with `~` expanded, paths absolute, and the threads decided in one place."""
        threads = self.cluster.threads_per_worker or self.engine.threads
        return replace(
            self,
            model=replace(self.model, path=absolute(self.model.path) if self.model.path else ""),
            models=[absolute(path) for path in self.models],
            engine=replace(self.engine, threads=threads),
            cluster=replace(self.cluster, threads_per_worker=threads),
            paths=replace(self.paths, results=absolute(self.paths.results), cache=absolute(self.paths.cache)),
        )


def _files(s: ThroughputSettings) -> list[str]:
    problems = []
    given = [path for path in s.paths_of_models if path.strip()]
    if s.models and s.model.path:
        problems.append(f"model.path={s.model.path} and models={s.models} both name the model; give one")
    elif len(given) < len(s.paths_of_models):
        problems.append("model.path is not set; give model.path=FILE.gguf, or models=[A.gguf,B.gguf]")
    problems += [f"{path} is a URL; models are mapped, so give a file" for path in given if is_url(path)]
    problems += _twice("models", s.models)
    for key, value in (("paths.results", s.paths.results), ("paths.cache", s.paths.cache)):
        if not value.strip():
            problems.append(f"{key} is not set; give {key}=FOLDER")
    return problems


def _names(s: ThroughputSettings) -> list[str]:
    named = [
        ("engine.kv", s.engine.kv, KV_TYPES),
        ("engine.activations", s.engine.activations, ACTIVATIONS),
        ("engine.load", s.engine.load, LOAD_MODES),
        ("cluster.kind", s.cluster.kind, CLUSTER_KINDS),
        ("tracking.kind", s.tracking.kind, TRACKING_KINDS),
        *(("bench.kinds", kind, KINDS) for kind in s.bench.kinds),
    ]
    return unknown(named) + _twice("peer", s.peer) + _twice("bench.kinds", s.bench.kinds)


def _numbers(s: ThroughputSettings) -> list[str]:
    floors: list[tuple[str, int | None, int, str]] = [
        ("bench.repeats", s.bench.repeats, 1, ""),
        ("bench.window", s.bench.window, 3, "a window of n tokens scores those after its first half"),
        ("bench.windows", s.bench.windows, 1, ""),
        ("engine.threads", s.engine.threads, 1, ""),
        ("engine.batch_tokens", s.engine.batch_tokens, 1, "tokens the engine takes at once"),
        ("cluster.threads_per_worker", s.cluster.threads_per_worker, 1, "leave it out for engine.threads"),
        ("seed", s.seed, 0, ""),
    ]
    return too_small(floors)


def _lists(s: ThroughputSettings) -> list[str]:
    problems = [] if s.bench.kinds else [f"bench.kinds=[] is empty; expected some of {', '.join(KINDS)}"]
    for name in _LISTS:
        values: list[int] = getattr(s.bench, name)
        if not values:
            problems.append(f"bench.{name}=[] is empty; expected numbers, as in bench.{name}=[1,8]")
        problems += [
            f"bench.{name}={values}: {value} is too small; expected 1 or more"
            for value in values
            if value < 1
        ]
        problems += _twice(f"bench.{name}", values)
    return problems


def _twice(key: str, values: Sequence[object]) -> list[str]:
    again = list(dict.fromkeys(value for i, value in enumerate(values) if value in values[:i]))
    return [f"{key} names {value} twice; once is enough" for value in again]


def _warnings(s: ThroughputSettings) -> list[str]:
    warnings = []
    if s.cluster.kind != "inline" or (s.cluster.workers or 1) > 1 or s.cluster.address:
        warnings.append(
            "of cluster only threads_per_worker counts: every engine is one process on this machine, so that "
            "all are measured alike"
        )
    if s.tracking.uri and s.tracking.kind == "none":
        warnings.append(f"tracking.uri={s.tracking.uri} is ignored: tracking.kind=none")
    return warnings
