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
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pipeline.errors import SettingsError

PROTOCOLS = ("windows", "carry", "strided", "document")
DATA_FORMATS = ("text", "jsonl", "parquet")
DATA_DOCUMENTS = ("joined", "apart")
DATA_ERRORS = ("strict", "replace")
KV_TYPES = ("f32", "f16")
ACTIVATIONS = ("f32", "int8")
LOAD_MODES = ("mmap", "populate", "mlock", "copy", "prefetch")
CLUSTER_KINDS = ("inline", "local", "ray")
NUMA_STRATEGIES = ("none", "distribute", "isolate", "numactl", "mirror")
TRACKING_KINDS = ("none", "local", "server")
ON_BAD_POINT = ("refuse", "skip")
CONVERT_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
PYTHON_SOURCE = "python:"
"""A data path that starts so names a text inside an installed Python package, not a file."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_SEVERAL = re.compile(r", (?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::))")
_SECRETS = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B?", re.IGNORECASE)


@dataclass
class ModelSettings:
    """The GGUF file, by path or URL, optionally pinned by its SHA-256, as the JSON has it."""

    path: str = MISSING
    sha256: str | None = None


@dataclass
class DataSettings:
    """A text, by path or URL, optionally pinned by the SHA-256 of its bytes (pipeline/sources.py).

    `files` is a list in place of `path`. Null `documents`: apart for protocols `document` and `carry`, joined
    otherwise. `weight` names the column or key with a document's weight.
    """

    name: str = "text"
    path: str = MISSING
    sha256: str | None = None
    format: str = "text"
    files: list[str] = field(default_factory=list)  # before `field`, which hides the function
    field: str = "text"
    join: str = "\n\n"
    documents: str | None = None
    weight: str | None = None
    errors: str = "strict"


@dataclass
class ProtocolSettings:
    """How the text is cut and what is scored; `limit` keeps the first windows only.

    `stride` is of `protocol=strided` alone; null is half the window.
    """

    name: str = "windows"
    window: int = 512
    limit: int | None = None
    stride: int | None = None


@dataclass
class EngineSettings:
    """How one worker computes; nothing here but `kv` and `activations` can change a bit of a score."""

    threads: int = 1
    batch_tokens: int = 4096
    kv: str = "f32"
    activations: str = "f32"
    load: str = "mmap"


@dataclass
class ClusterSettings:
    """Where the workers live. Null workers: what cores and memory allow. Null threads: `engine.threads`.

    `numa` is how a host's workers are laid out over its NUMA nodes (pipeline/cpu_sets.py). `collect` has
    workers send finished shards to the driver, which alone writes under `paths.results`.
    """

    kind: str = "local"
    workers: int | None = None
    threads_per_worker: int | None = None
    windows_per_shard: int = 4
    address: str | None = None
    numa: str = "none"
    collect: bool = False


@dataclass
class TrackingSettings:
    """The MLflow index of runs; `local` is a SQLite file under `paths.results`."""

    kind: str = "local"
    uri: str | None = None
    experiment: str = "pagemill"


@dataclass
class PathsSettings:
    """Where tables go, and where tokens, digests and what was fetched are kept between runs.

    `results` is a folder or s3://BUCKET/PREFIX (pipeline/folders.py).
    `cache_limit` is of what was fetched: "200GB", "64GiB" or bytes; null is none.
    """

    results: str = "results"
    cache: str = "~/.cache/pagemill"
    cache_limit: str | None = None

    @property
    def limit_bytes(self) -> int | None:
        """`cache_limit` in bytes.

        Raises:
            SettingsError: it is no size.
        """
        if self.cache_limit is None:
            return None
        size = _SIZE.fullmatch(self.cache_limit.strip())
        if size is None:
            raise SettingsError(
                f"paths.cache_limit={self.cache_limit} is no size; expected for example 200GB or 64GiB",
                "leave it out for no limit",
            )
        number, prefix, binary = size.groups()
        return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


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
    sweep: dict[str, Any] = field(default_factory=dict)  # pipeline/sweep.py; empty in a point's settings
    sort: str | None = None
    on_bad_point: str = "refuse"
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
            data=_resolved_data(self.data, self.protocol),
            engine=replace(self.engine, threads=threads),
            cluster=replace(self.cluster, threads_per_worker=threads),
            paths=replace(self.paths, results=absolute(self.paths.results), cache=absolute(self.paths.cache)),
        )


@dataclass
class SourceSettings:
    """A Hugging Face checkpoint's folder."""

    dir: str = MISSING


@dataclass
class ConvertChoices:
    """What becomes of a checkpoint; `tokenizer` is a file or folder in place of the checkpoint's own."""

    type: str = "f16"
    out: str = MISSING
    tokenizer: str | None = None
    overwrite: bool = False


@dataclass
class ConvertSettings:
    """Everything the convert job can be told."""

    source: SourceSettings = field(default_factory=SourceSettings)
    convert: ConvertChoices = field(default_factory=ConvertChoices)
    paths: PathsSettings = field(default_factory=PathsSettings)
    dry_run: bool = False

    def validate(self) -> None:
        """Check every value.

        Raises:
            SettingsError: the type is not known, or a path is empty.
        """
        if self.convert.type.lower() not in CONVERT_TYPES:
            raise SettingsError(
                f"convert.type={self.convert.type} is not known{nearest(self.convert.type, CONVERT_TYPES)}",
                "choose one of these",
            )
        for key, value in (("source.dir", self.source.dir), ("convert.out", self.convert.out)):
            if not value.strip() or value == MISSING:
                raise SettingsError(f"{key} is not set", f"give {key}=PATH")

    def resolved(self) -> ConvertSettings:
        """A copy with `~` expanded and paths absolute."""
        own = self.convert.tokenizer
        return replace(
            self,
            source=replace(self.source, dir=absolute(self.source.dir)),
            convert=replace(
                self.convert,
                type=self.convert.type.lower(),
                out=absolute(self.convert.out),
                tokenizer=None if own is None else absolute(own),
            ),
        )


def absolute(path: str) -> str:
    """`~` expanded, absolute, links not followed; a URL and a text inside a Python package are left alone."""
    return path if path.startswith(PYTHON_SOURCE) or is_url(path) else str(Path(path).expanduser().absolute())


def is_url(path: str) -> bool:
    """Whether the path is fsspec's to read: `https://...`, `s3://...`, `zip://a.txt::https://...`."""
    return _URL.match(path) is not None


def shown(path: str) -> str:
    """A path, or several with commas between, as it may be logged: no user, password or query in a URL.

    Queries of signed URLs are keys to what they name.
    """
    return ", ".join(
        "::".join(_SECRETS.sub("", part) for part in one.split("::")) if is_url(one) else one
        for one in _SEVERAL.split(path)
    )


def logged(value: Any) -> Any:
    """Settings, or a part of them, as they may be logged: dataclasses as dicts, every path as `shown`."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: logged(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, dict):
        return {key: logged(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [logged(part) for part in value]
    return shown(value) if isinstance(value, str) else value


def _resolved_data(data: DataSettings, protocol: ProtocolSettings) -> DataSettings:
    """Paths absolute; `path` names several files as well; documents joined or apart, said."""
    files = [absolute(file) for file in data.files]
    by_protocol = "apart" if protocol.name in ("document", "carry") else "joined"
    path = ", ".join(files) if files else absolute(data.path)
    return replace(data, path=path, files=files, documents=data.documents or by_protocol)


def nearest(name: str, valid: Sequence[str]) -> str:
    """'; did you mean X?' when one of the valid names is close, and the list of them."""
    close = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]}?" if close else "") + f" (known: {', '.join(valid)})"


def unknown(named: Sequence[tuple[str, str, Sequence[str]]]) -> list[str]:
    """A sentence for each (key, value, valid values) whose value is not valid."""
    return [
        f"{key}={value} is not known{nearest(value, valid)}"
        for key, value, valid in named
        if value not in valid
    ]


def too_small(floors: Sequence[tuple[str, int | None, int, str]]) -> list[str]:
    """A sentence for each (key, value or None, least value, why) whose value is below the least."""
    return [
        f"{key}={value} is too small; expected {floor} or more{f' ({why})' if why else ''}"
        for key, value, floor, why in floors
        if value is not None and value < floor
    ]


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
        if (not value.strip() or value == MISSING) and not (key == "data.path" and s.data.files)
    ]


def _names(s: PerplexitySettings) -> list[str]:
    named = [
        ("protocol.name", s.protocol.name, PROTOCOLS),
        ("data.format", s.data.format, DATA_FORMATS),
        ("data.documents", s.data.documents or "joined", DATA_DOCUMENTS),
        ("data.errors", s.data.errors, DATA_ERRORS),
        ("engine.kv", s.engine.kv, KV_TYPES),
        ("engine.activations", s.engine.activations, ACTIVATIONS),
        ("engine.load", s.engine.load, LOAD_MODES),
        ("cluster.kind", s.cluster.kind, CLUSTER_KINDS),
        ("cluster.numa", s.cluster.numa, NUMA_STRATEGIES),
        ("tracking.kind", s.tracking.kind, TRACKING_KINDS),
        ("on_bad_point", s.on_bad_point, ON_BAD_POINT),
    ]
    problems = unknown(named)
    for key, digest in (("data.sha256", s.data.sha256), ("model.sha256", s.model.sha256)):
        if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            problems.append(f"{key}={digest} is not a SHA-256; expected 64 hexadecimal digits")
    return problems


def _numbers(s: PerplexitySettings) -> list[str]:
    floors: list[tuple[str, int | None, int, str]] = [
        ("protocol.window", s.protocol.window, 3, "a window of n tokens scores those after its first half"),
        ("protocol.limit", s.protocol.limit, 1, "leave it out to score every window"),
        ("protocol.stride", s.protocol.stride, 1, "leave it out for half the window"),
        ("engine.threads", s.engine.threads, 1, ""),
        ("engine.batch_tokens", s.engine.batch_tokens, 1, "tokens the engine takes at once"),
        ("cluster.workers", s.cluster.workers, 1, "leave it out to use the machine's cores"),
        ("cluster.threads_per_worker", s.cluster.threads_per_worker, 1, "leave it out for engine.threads"),
        ("cluster.windows_per_shard", s.cluster.windows_per_shard, 1, ""),
        ("seed", s.seed, 0, ""),
    ]
    problems = too_small(floors)
    try:
        _ = s.paths.limit_bytes
    except SettingsError as error:
        problems.append(str(error))
    return problems


def _contradictions(s: PerplexitySettings) -> list[str]:
    problems = []
    if s.tracking.kind == "server" and not (s.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        problems.append(
            "tracking=server needs tracking.uri=http://HOST:PORT (or MLFLOW_TRACKING_URI in the environment)"
        )
    if s.cluster.numa == "mirror" and s.engine.load in ("copy", "mlock"):
        problems.append(
            f"cluster.numa=mirror and engine.load={s.engine.load}: a mirror is in memory, and pages that a "
            "worker copies are its NUMA node's already; use one of them"
        )
    return problems + _data_contradictions(s.data, s.protocol)


def _data_contradictions(data: DataSettings, protocol: ProtocolSettings) -> list[str]:
    problems = []
    if data.format != "text" and not data.field:
        problems.append(f"data.format={data.format} needs data.field, the name of the text's field")
    if data.format != "text" and data.path.startswith(PYTHON_SOURCE):
        problems.append(f"data.path={data.path} is one text; use data.format=text")
    if data.files and data.path not in (MISSING, "", ", ".join(data.files)):
        path, files = logged([data.path, data.files])
        problems.append(f"data.path={path} and data.files={files} both name the text; give one")
    if data.weight is not None and data.format == "text":
        problems.append(
            f"data.weight={data.weight} needs data.format=jsonl or parquet; a text has no columns"
        )
    if data.weight is not None and _resolved_data(data, protocol).documents == "joined":
        problems.append(
            f"data.weight={data.weight} needs data.documents=apart: "
            "a window over documents that are joined has no one weight"
        )
    if protocol.name == "strided" and protocol.stride is not None and protocol.stride >= protocol.window:
        problems.append(
            f"protocol.stride={protocol.stride} is too large; expected less than protocol.window="
            f"{protocol.window}, so that every scored token has context"
        )
    return problems


def _warnings(s: PerplexitySettings) -> list[str]:
    warnings = []
    if s.tracking.kind == "local" and is_url(s.paths.results):
        warnings.append(
            f"tracking=local keeps MLflow's database, which needs a folder, in {s.paths.cache}/tracking: "
            f"paths.results={shown(s.paths.results)} is none"
        )
    if s.cluster.address and s.cluster.kind != "ray":
        warnings.append(
            f"cluster.address={s.cluster.address} is ignored: cluster.kind={s.cluster.kind}, not ray"
        )
    if s.tracking.uri and s.tracking.kind == "none":
        warnings.append(f"tracking.uri={shown(s.tracking.uri)} is ignored: tracking.kind=none")
    if s.protocol.stride is not None and s.protocol.name != "strided":
        warnings.append(
            f"protocol.stride={s.protocol.stride} is ignored: protocol.name={s.protocol.name}, not strided"
        )
    if s.cluster.kind == "inline" and (s.cluster.workers or 1) > 1:
        warnings.append(f"cluster.workers={s.cluster.workers} is ignored: cluster.kind=inline has one worker")
    if s.cluster.kind == "inline" and s.cluster.numa != "none":
        warnings.append(f"cluster.numa={s.cluster.numa} is ignored: cluster.kind=inline has one worker")
    return warnings
