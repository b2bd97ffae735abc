"""Everything about a run that can be refused before a worker is started, in order of cost.

A sweep checks all its points here before the first one starts. What consecutive points have in common, the
model's tokenizer, the text, its tokens, is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline import capacity, node_cache, provenance, store
from pipeline.datasets import Text, load_text
from pipeline.errors import DataError, ModelError, RefusedError, SettingsError, StoreError
from pipeline.folders import folder_of
from pipeline.run_lock import RunLocks
from pipeline.settings import DataSettings, PerplexitySettings, is_url, shown
from pipeline.shards import Shard, plan
from pipeline.tokens import TokenStream, token_stream
from pipeline.windows import begin_id, cache_shape, open_protocol
from pipeline.worker import WorkerSpec

if TYPE_CHECKING:
    import engine
    from pipeline.windows import ScoringProtocol

_UNSUPPORTED = "use a model of a supported architecture, quantization and tokenizer"


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, whose file is mapped, and with what it is asked; nothing of results yet."""

    settings: PerplexitySettings
    file: engine.GGUFFile
    tokenizer: engine.Tokenizer
    stream: TokenStream
    bos_id: int | None
    protocol: ScoringProtocol
    measure: dict[str, Any]
    n_windows: int
    warnings: list[str]


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against; the model file is mapped by the driver as long as it is open."""

    settings: PerplexitySettings
    file: engine.GGUFFile
    stream: TokenStream
    spec: WorkerSpec
    measure: dict[str, Any]
    subject: dict[str, Any]
    plan: dict[str, Any]
    n_windows: int
    shards: list[Shard]
    finished: store.Finished
    warnings: list[str]

    @property
    def keys(self) -> dict[str, Any]:
        """Identity columns: the two keys and all that they are made of."""
        return dict(self.spec.columns)

    @property
    def todo(self) -> list[Shard]:
        """Shards that are not finished, in window order."""
        return [shard for shard in self.shards if shard not in self.finished.paths]


class Preflight:
    """Checks runs; the driver has their model files mapped, and them locked, as long as this is open.

    Args:
        table: that they leave. What is not scores, the measure says, so that no key is shared.
    """

    def __init__(self, table: store.ShardTable = store.WINDOWS) -> None:
        self._table = table
        self._files = ExitStack()
        self._locks = self._files.enter_context(RunLocks())
        self._probed: set[Path] = set()
        self._latest: dict[str, tuple[Any, Any]] = {}  # what was read last, by kind: of what, and itself

    def __enter__(self) -> Preflight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def ask(
        self,
        settings: PerplexitySettings,
        read: Callable[[DataSettings, Path], Text] | None = None,
        tokenize: Callable[[Text, engine.Tokenizer, Path], TokenStream] | None = None,
    ) -> Asked:
        """Check settings, results folder, data and model; tokenize.

        Nothing is written under `paths.results` but the folder itself.

        Args:
            read, tokenize: in place of `load_text` and `token_stream`, where the data are no text.

        Raises:
            RefusedError: with all that a user needs to put it right.
        """
        warnings = settings.validate()
        s = settings.resolved()
        if s.cluster.kind != "ray":  # whose workers run where the CPUs are
            by_worker = settings.cluster.threads_per_worker is not None
            capacity.check_threads(
                s.engine.threads, "cluster.threads_per_worker" if by_worker else "engine.threads"
            )
        results, cache = folder_of(s.paths.results), Path(s.paths.cache)
        self._probe(results, "paths.results")
        self._probe(cache, "paths.cache")
        reader = read or partial(load_text, cache_limit=s.paths.limit_bytes)
        text: Text = self._once("text", s.data, lambda: reader(s.data, cache))
        file, tokenizer = self._once("model", s.model, lambda: self._open_model(s))
        warnings += _beyond_training(file, s.protocol.window)
        stream: TokenStream = self._once(
            "stream", (s.data, s.model), lambda: (tokenize or token_stream)(text, tokenizer, cache)
        )
        bos_id = begin_id(s.protocol, tokenizer)
        protocol = open_protocol(s.protocol, bos_id, stream)
        n_windows = protocol.n_windows(stream.tokens.size)
        if s.protocol.name == "carry":
            longest = protocol.longest(stream.tokens.size)
            _check_context(file, longest, s.protocol.window, stream.is_apart)
        measure = {
            **text.measure,
            "tokens_sha256": stream.sha256,
            **protocol.measure(stream.tokens.size),
            **({} if self._table is store.WINDOWS else {"statistic": self._table.name}),
        }
        warnings += text.remarks + protocol.remarks
        return Asked(s, file, tokenizer, stream, bos_id, protocol, measure, n_windows, warnings)

    def check(self, settings: PerplexitySettings) -> Prepared:
        """What `ask` checks, the memory that is left, and what is finished.

        Raises:
            RefusedError: with all that a user needs to put it right.
        """
        asked = self.ask(settings)
        s, file, stream, protocol = asked.settings, asked.file, asked.stream, asked.protocol
        measure, n_windows, warnings = asked.measure, asked.n_windows, asked.warnings
        results, cache = folder_of(s.paths.results), Path(s.paths.cache)
        subject = provenance.subject_of(model_digest(file.path, cache), s.engine.kv, s.engine.activations)
        run_key = provenance.run_key(measure, subject)
        folder = self._table.folder(results, run_key)
        wanted: dict[str, Any] = {
            "run_key": run_key,
            "n_windows": n_windows,
            "windows_per_shard": s.cluster.windows_per_shard,
            "measure": measure,
            "subject": subject,
            "version": provenance.version(),
        }
        per_shard = int((store.read_plan(folder, wanted) or wanted)["windows_per_shard"])
        if per_shard != s.cluster.windows_per_shard:
            warnings.append(
                f"cluster.windows_per_shard={s.cluster.windows_per_shard} is ignored: "
                f"this run was begun with {per_shard}"
            )
        shards = plan(n_windows, per_shard, protocol.begins(stream.tokens.size))
        finished = store.finished_shards(folder, shards, run_key, self._table)
        todo = [shard for shard in shards if shard not in finished.paths]
        shape = partial(cache_shape, protocol, stream.tokens.size, s.protocol, per_shard)
        capacity.check_run(file, s, min(1, len(todo)), shape)  # pipeline.placement starts more where they fit
        spec = WorkerSpec(
            run_key=run_key,
            model_path=shown(s.model.path),
            model_sha256=subject["model_sha256"],
            tokens_path=str(stream.tokens_path),
            tokens_sha256=stream.sha256,
            counts_path=str(stream.counts_path),
            bos_id=asked.bos_id,
            protocol=s.protocol,
            engine=s.engine,
            windows_per_shard=per_shard,
            run_dir=str(folder),
            cache_dir=s.paths.cache,
            columns={
                "measure_key": provenance.key_of(measure),
                "subject_key": provenance.key_of(subject),
                **measure,
                **subject,
                "version": provenance.version(),
            },
            wanted=wanted_model(s, subject["model_sha256"]),
            collect=s.cluster.collect,
        )
        warnings += finished.remarks
        return Prepared(
            s, file, stream, spec, measure, subject, wanted, n_windows, shards, finished, warnings
        )

    def begin(self, ready: Prepared) -> Prepared:
        """Make the run's folders, lock it and fix its plan; from here on it counts as begun.

        Raises:
            RefusedError: another driver computes it.
            StoreError, StorageFailure: a folder, the lock or the plan cannot be written.
        """
        folder = folder_of(ready.spec.run_dir)
        _make(folder)
        if self._table is store.WINDOWS:
            _make(store.runs_folder(folder_of(ready.settings.paths.results), ready.spec.run_key))
        was_taken_over = bool(ready.todo) and self._locks.take(folder)
        fixed = store.fix_plan(folder, ready.plan)
        if was_taken_over or int(fixed["windows_per_shard"]) != ready.spec.windows_per_shard:
            return self.check(ready.settings)  # another driver was at this run a moment ago, otherwise
        return ready

    def _probe(self, folder: Path, key: str) -> None:
        if folder not in self._probed:
            store.probe(folder, key)
            self._probed.add(folder)

    def _once(self, kind: str, what: Any, read: Callable[[], Any]) -> Any:
        """What was read last of this kind, or why it was refused; read anew when something else is asked."""
        if self._latest.get(kind, (None, None))[0] != what:
            self._latest.pop(kind, None)  # first: two tokenizers or texts at once are never needed
            try:
                self._latest[kind] = what, read()
            except RefusedError as error:
                self._latest[kind] = what, error
        found = self._latest[kind][1]
        if isinstance(found, RefusedError):
            raise found
        return found

    def _open_model(self, s: PerplexitySettings) -> tuple[engine.GGUFFile, engine.Tokenizer]:
        """The model, fetched if it is a URL, and checked against `model.sha256`."""
        cache, pinned = Path(s.paths.cache), s.model.sha256 and s.model.sha256.lower()
        wanted = wanted_model(s, pinned)
        with ExitStack() as held:
            if wanted is None:
                file, tokenizer = _open_model(s.model.path)
            else:
                if s.dry_run:
                    _check_fetched(wanted, cache)
                path = held.enter_context(node_cache.model_copy(wanted, cache)).path
                try:
                    file, tokenizer = _open_model(str(path))
                except ModelError as error:
                    hint = f"{error.hint}; it was fetched from {wanted.name}: remove it to fetch it again"
                    raise ModelError(str(error), hint, kind=error.kind) from error
            held.enter_context(file)
            if pinned is not None and (found := model_digest(file.path, cache)) != pinned:
                raise ModelError(
                    f"{s.model.path}: SHA-256 is {found}, expected {pinned} (model.sha256)",
                    "is it another version? drop model.sha256 to use this one",
                )
            self._files.push(held.pop_all())
        return file, tokenizer


class NotFetched(ModelError):
    """A dry run of a model that is not here yet; `n_bytes` would be fetched, None where nobody says."""

    def __init__(self, message: str, hint: str = "", *, kind: str | None = None) -> None:
        super().__init__(message, hint, kind=kind)
        self.n_bytes: int | None = None


def wanted_model(s: PerplexitySettings, sha256: str | None) -> node_cache.Wanted | None:
    """What every node is to fetch, None where the model is a path."""
    if not is_url(s.model.path):
        return None
    return node_cache.Wanted(s.model.path, sha256, s.paths.limit_bytes)


def _check_fetched(wanted: node_cache.Wanted, cache: Path) -> None:
    """Raise NotFetched unless the model is in the cache; ModelError when its source does not answer."""
    try:
        n_bytes = node_cache.missing_bytes(wanted.url, cache)
    except DataError as error:
        raise ModelError(str(error), error.hint) from error
    if n_bytes != 0:
        many = "an unknown number of" if n_bytes is None else f"{n_bytes:,}"
        refusal = NotFetched(
            f"{wanted.name}: {many} bytes to fetch; a dry run fetches no model, and the rest is known once "
            "it is there",
            "run without dry_run=true",
        )
        refusal.n_bytes = n_bytes
        raise refusal


def open_model(path: str) -> engine.GGUFFile:
    """The mapped file, known to be of an architecture and of types that the engine runs.

    Raises:
        ModelError: `kind` is the engine's error.
    """
    import engine

    try:
        file = engine.open(path)
    except engine.EngineError as error:
        raise _refused(path, error, "is it a GGUF model file, and did its download finish?") from error
    except OSError as error:
        hint = "set model.path to a GGUF file, or choose a model by model=NAME"
        raise ModelError(f"{path}: {error.strerror or error}", hint, kind=type(error).__name__) from error
    try:
        engine.check_supported(file)
    except engine.EngineError as error:
        file.close()
        raise _refused(path, error, _UNSUPPORTED) from error
    return file


def _open_model(path: str) -> tuple[engine.GGUFFile, engine.Tokenizer]:
    """The mapped file and its tokenizer, both known to be supported."""
    import engine

    file = open_model(path)
    try:
        tokenizer = engine.Tokenizer(file)
    except engine.EngineError as error:
        file.close()
        raise _refused(path, error, _UNSUPPORTED) from error
    if tokenizer.add_eos or (tokenizer.add_bos and tokenizer.bos_id is None):
        file.close()
        raise ModelError(
            f"{path}: its tokenizer appends an end-of-sequence token, or adds a BOS that it does not have",
            "the protocol `windows` is not defined for such models (protocol.md 2.2)",
        )
    return file, tokenizer


def _refused(path: str, error: Exception, hint: str) -> ModelError:
    message = str(error) if Path(path).name in str(error) else f"{path}: {error}"
    return ModelError(message, hint, kind=type(error).__name__)


def model_digest(path: str, cache: Path) -> str:
    """SHA-256 of a model that is open, kept in `cache`; ModelError when the file cannot be read."""
    try:
        return provenance.model_sha256(Path(path), cache)
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror}", "the file must stay readable", kind=type(error).__name__
        ) from error


def _beyond_training(file: engine.GGUFFile, window: int) -> list[str]:
    trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if not isinstance(trained, int) or window <= trained:
        return []
    return [
        f"protocol.window={window} is longer than the context the model was trained with, {trained} tokens; "
        "expect a perplexity worse than the model's own"
    ]


def _check_context(file: engine.GGUFFile, longest: int, window: int, is_apart: bool) -> None:
    """Refuse to carry attention's context further than the model was trained to.

    Raises:
        SettingsError: naming what fits.
    """
    import engine

    trained = engine.max_positions(file)
    if trained is None or longest <= trained:
        return
    limit = 0 if is_apart else (trained + 1) // window
    raise SettingsError(
        f"protocol=carry reads {'the longest document' if is_apart else 'the text'} as one sequence of "
        f"{longest:,} positions; {file.path} is a model of attention, trained for {trained:,}",
        f"use protocol=strided or protocol=windows, {f'protocol.limit={limit}, ' if limit else ''}shorter "
        "documents, or a recurrent model, which carries its state any distance",
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be created: {error.strerror}", "check paths.results") from error
