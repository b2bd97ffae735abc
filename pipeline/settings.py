"""What a user can set: plain dataclasses that are the Hydra schema, and every check between them.

Hydra composes by assigning into the schema's own nodes. A frozen dataclass becomes a read-only node there
(Hydra 1.3.8 with OmegaConf 2.3.1: `ReadonlyConfigError raised while composing config`), so these are not
frozen; nothing in the pipeline assigns to them, changes are made with `dataclasses.replace`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from pipeline.errors import SettingsError

PROTOCOLS = ("windows",)
DATA_FORMATS = ("text", "jsonl")
KV_TYPES = ("f32", "f16")
KV_TYPES_COMPUTED = ("f32",)
CLUSTER_KINDS = ("inline", "local", "ray")
TRACKING_KINDS = ("none", "local", "server")
PYTHON_SOURCE = "python:"
"""A data path that starts so names a text inside an installed Python package, not a file."""


@dataclass
class ModelSettings:
    """The GGUF file."""

    path: str = MISSING


@dataclass
class DataSettings:
    """A text, by path, optionally pinned by the SHA-256 of its bytes."""

    name: str = "text"
    path: str = MISSING
    sha256: str | None = None
    format: str = "text"
    field: str = "text"
    join: str = "\n\n"


@dataclass
class ProtocolSettings:
    """How the text is cut and what is scored; `limit` keeps the first windows only."""

    name: str = "windows"
    window: int = 512
    limit: int | None = None


@dataclass
class EngineSettings:
    """How one worker computes; nothing here but `kv` can change a bit of a score."""

    threads: int = 1
    batch_tokens: int = 4096
    kv: str = "f32"


@dataclass
class ClusterSettings:
    """Where the workers live. Null workers: as many as the cores allow. Null threads: `engine.threads`."""

    kind: str = "local"
    workers: int | None = None
    threads_per_worker: int | None = None
    windows_per_shard: int = 4
    address: str | None = None


@dataclass
class TrackingSettings:
    """The MLflow index of runs; `local` is a SQLite file under `paths.results`."""

    kind: str = "local"
    uri: str | None = None
    experiment: str = "pagemill"


@dataclass
class PathsSettings:
    """Where tables go, and where tokens and digests are kept between runs."""

    results: str = "results"
    cache: str = "~/.cache/pagemill"


@dataclass
class PerplexitySettings:
    """Everything the perplexity job can be told."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    paths: PathsSettings = field(default_factory=PathsSettings)
    seed: int = 0
    dry_run: bool = False

    def validate(self) -> list[str]:
        """Check every value and every pair; returns warnings.

        Raises:
            SettingsError: listing all problems at once, each with the key, its value and what would do.
        """
        problems = _missing(self) + _names(self) + _numbers(self) + _contradictions(self)
        if problems:
            many = f"{len(problems)} settings cannot be used:\n  " if len(problems) > 1 else ""
            raise SettingsError(
                many + "\n  ".join(problems),
                "correct them on the command line; `pagemill perplexity --help` lists all keys",
            )
        return _warnings(self)

    def resolved(self) -> PerplexitySettings:
        """A copy with `~` expanded, paths absolute, and the threads of a worker decided in one place."""
        threads = (
            self.engine.threads
            if self.cluster.threads_per_worker is None
            else self.cluster.threads_per_worker
        )
        return replace(
            self,
            model=replace(self.model, path=absolute(self.model.path)),
            data=replace(self.data, path=absolute(self.data.path)),
            engine=replace(self.engine, threads=threads),
            cluster=replace(self.cluster, threads_per_worker=threads),
            paths=replace(self.paths, results=absolute(self.paths.results), cache=absolute(self.paths.cache)),
        )


def absolute(path: str) -> str:
    """`~` expanded, absolute, links not followed; a text inside a Python package is left as it is."""
    return path if path.startswith(PYTHON_SOURCE) else str(Path(path).expanduser().absolute())


def nearest(name: str, valid: Sequence[str]) -> str:
    """'; did you mean X?' when one of the valid names is close, and the list of them."""
    close = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]}?" if close else "") + f" (known: {', '.join(valid)})"


def _missing(s: PerplexitySettings) -> list[str]:
    wanted = {
        "model.path": (s.model.path, "model.path=FILE.gguf"),
        "data.path": (s.data.path, "data.path=TEXT.txt, or a data set that needs none"),
        "paths.results": (s.paths.results, "paths.results=FOLDER"),
        "paths.cache": (s.paths.cache, "paths.cache=FOLDER"),
    }
    return [
        f"{key} is not set; give {how}"
        for key, (value, how) in wanted.items()
        if not value.strip() or value == MISSING
    ]


def _names(s: PerplexitySettings) -> list[str]:
    named = [
        ("protocol.name", s.protocol.name, PROTOCOLS),
        ("data.format", s.data.format, DATA_FORMATS),
        ("engine.kv", s.engine.kv, KV_TYPES),
        ("cluster.kind", s.cluster.kind, CLUSTER_KINDS),
        ("tracking.kind", s.tracking.kind, TRACKING_KINDS),
    ]
    problems = [
        f"{key}={value} is not known{nearest(value, valid)}"
        for key, value, valid in named
        if value not in valid
    ]
    if s.engine.kv in KV_TYPES and s.engine.kv not in KV_TYPES_COMPUTED:
        problems.append(f"engine.kv={s.engine.kv} is not computed by this version; use engine.kv=f32")
    if s.data.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", s.data.sha256):
        problems.append(f"data.sha256={s.data.sha256} is not a SHA-256; expected 64 hexadecimal digits")
    return problems


def _numbers(s: PerplexitySettings) -> list[str]:
    floors: list[tuple[str, int | None, int, str]] = [
        ("protocol.window", s.protocol.window, 3, "a window of n tokens scores those after its first half"),
        ("protocol.limit", s.protocol.limit, 1, "leave it out to score every window"),
        ("engine.threads", s.engine.threads, 1, ""),
        ("engine.batch_tokens", s.engine.batch_tokens, 1, "tokens the engine takes at once"),
        ("cluster.workers", s.cluster.workers, 1, "leave it out to use the machine's cores"),
        ("cluster.threads_per_worker", s.cluster.threads_per_worker, 1, "leave it out for engine.threads"),
        ("cluster.windows_per_shard", s.cluster.windows_per_shard, 1, ""),
        ("seed", s.seed, 0, ""),
    ]
    return [
        f"{key}={value} is too small; expected {floor} or more{f' ({why})' if why else ''}"
        for key, value, floor, why in floors
        if value is not None and value < floor
    ]


def _contradictions(s: PerplexitySettings) -> list[str]:
    problems = []
    if s.tracking.kind == "server" and not (s.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        problems.append(
            "tracking=server needs tracking.uri=http://HOST:PORT (or MLFLOW_TRACKING_URI in the environment)"
        )
    if s.data.format == "jsonl" and not s.data.field:
        problems.append("data.format=jsonl needs data.field, the name of the text's field")
    if s.data.format == "jsonl" and s.data.path.startswith(PYTHON_SOURCE):
        problems.append(f"data.path={s.data.path} is one text; use data.format=text")
    return problems


def _warnings(s: PerplexitySettings) -> list[str]:
    warnings = []
    if s.cluster.address and s.cluster.kind != "ray":
        warnings.append(
            f"cluster.address={s.cluster.address} is ignored: cluster.kind={s.cluster.kind}, not ray"
        )
    if s.tracking.uri and s.tracking.kind == "none":
        warnings.append(f"tracking.uri={s.tracking.uri} is ignored: tracking.kind=none")
    if s.cluster.kind == "inline" and (s.cluster.workers or 1) > 1:
        warnings.append(f"cluster.workers={s.cluster.workers} is ignored: cluster.kind=inline has one worker")
    return warnings
