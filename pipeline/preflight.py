"""Everything about a run that can be refused before a worker is started, in order of cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import provenance, store
from pipeline.datasets import load_text
from pipeline.errors import ModelError, StoreError
from pipeline.settings import PerplexitySettings
from pipeline.shards import Shard, plan
from pipeline.tokens import TokenStream, token_stream
from pipeline.windows import open_protocol
from pipeline.worker import WorkerSpec

if TYPE_CHECKING:
    import engine


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against; the model file is mapped by the driver as long as it is open."""

    settings: PerplexitySettings
    file: engine.GGUFFile
    stream: TokenStream
    spec: WorkerSpec
    measure: dict[str, Any]
    subject: dict[str, Any]
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


@contextmanager
def prepared(settings: PerplexitySettings) -> Iterator[Prepared]:
    """Check settings, results folder, data and model; tokenize; fix the plan; list what is finished.

    A dry run writes nothing under `paths.results` but the folder itself.

    Raises:
        RefusedError: with all that a user needs to put it right.
    """
    warnings = settings.validate()
    s = settings.resolved()
    results, cache = Path(s.paths.results), Path(s.paths.cache)
    store.probe(results, "paths.results")
    store.probe(cache, "paths.cache")
    text = load_text(s.data)
    file, tokenizer = _open_model(s.model.path)
    with file:
        warnings += _beyond_training(file, s.protocol.window)
        stream = token_stream(text, tokenizer, cache)
        bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        protocol = open_protocol(s.protocol, bos_id)
        n_windows = protocol.n_windows(stream.tokens.size)
        measure = {
            "data_sha256": text.sha256,
            "tokens_sha256": stream.sha256,
            **protocol.measure(stream.tokens.size),
        }
        subject = provenance.subject_of(_digest(s.model.path, cache), s.engine.kv)
        run_key = provenance.run_key(measure, subject)
        folder = store.windows_folder(results, run_key)
        wanted: dict[str, Any] = {
            "run_key": run_key,
            "n_windows": n_windows,
            "windows_per_shard": s.cluster.windows_per_shard,
            "measure": measure,
            "subject": subject,
            "version": provenance.version(),
        }
        if s.dry_run:
            fixed = store.read_plan(folder, wanted) or wanted
        else:
            _make(folder)
            _make(store.runs_folder(results, run_key))
            fixed = store.fix_plan(folder, wanted)
        per_shard = int(fixed["windows_per_shard"])
        if per_shard != s.cluster.windows_per_shard:
            warnings.append(
                f"cluster.windows_per_shard={s.cluster.windows_per_shard} is ignored: "
                f"this run was begun with {per_shard}"
            )
        shards = plan(n_windows, per_shard)
        finished = store.finished_shards(folder, shards, run_key)
        spec = WorkerSpec(
            run_key=run_key,
            model_path=s.model.path,
            model_sha256=subject["model_sha256"],
            tokens_path=str(stream.tokens_path),
            tokens_sha256=stream.sha256,
            counts_path=str(stream.counts_path),
            bos_id=bos_id,
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
        )
        yield Prepared(
            s, file, stream, spec, measure, subject, n_windows, shards, finished, warnings + finished.remarks
        )


def _open_model(path: str) -> tuple[engine.GGUFFile, engine.Tokenizer]:
    """The mapped file and its tokenizer, both known to be supported."""
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
        tokenizer = engine.Tokenizer(file)
    except engine.EngineError as error:
        file.close()
        raise _refused(
            path, error, "use a model of a supported architecture, quantization and tokenizer"
        ) from error
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


def _digest(path: str, cache: Path) -> str:
    try:
        return provenance.file_sha256(Path(path), cache)
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


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be created: {error.strerror}", "check paths.results") from error
