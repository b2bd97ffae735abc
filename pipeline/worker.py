"""What scores a shard: plain Python that runs in a loop, in a debugger or inside a Ray actor.

A worker maps the model and the token stream, scores windows with the engine, and commits its shard's file
itself, or hands its table to the driver (`cluster.collect`). Ray imports this module before a worker's
environment is set, so engine, Numba and Arrow are imported by `__init__`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import node_cache, numa
from pipeline.errors import ModelError, ScoreError
from pipeline.folders import folder_of
from pipeline.node_cache import Copy, Wanted
from pipeline.settings import EngineSettings, ProtocolSettings
from pipeline.shards import Shard

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    import engine
    from pipeline.scoring import Decode
    from pipeline.store import Unpublished
    from pipeline.windows import Window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker is told: paths, digests to check them by, settings; no arrays.

    Attributes:
        tokens_path, counts_path: the token stream's two files (pipeline/tokens.py).
        bos_id: the token that begins a sequence, as `windows.begin_id` says; None where nothing does.
        run_dir: folder of the run's shards.
        cache_dir: `paths.cache`, for the model's digest and the lock of the first compilation.
        columns: identity columns, the same in every row.
        wanted: the model, where each node fetches it; `model_path` then is the URL without its secrets.
        following: the next run's model, to be brought nearer while this one is scored.
        collect: tables go to the driver, which publishes them: `run_dir` need not be seen from here.
    """

    run_key: str
    model_path: str
    model_sha256: str
    tokens_path: str
    tokens_sha256: str
    counts_path: str
    bos_id: int | None
    protocol: ProtocolSettings
    engine: EngineSettings
    windows_per_shard: int
    run_dir: str
    cache_dir: str
    columns: Mapping[str, str | int | None] = field(default_factory=dict)
    wanted: Wanted | None = None
    following: Wanted | None = None
    collect: bool = False


@dataclass(frozen=True)
class ShardResult:
    """What a worker tells of a shard it finished; the rows are in `path`.

    `nll_sum_nats` is for the progress bar only. `load_s` and `compile_s` are what opening the worker's
    model cost, `model_open_s` is `engine.open` within `load_s`. `committed` is False when another process
    had published the shard, None while its tables are in `unpublished`, for the driver. `idle_s` is the
    worker's time since it finished its last shard of the run, None when this is its first.
    """

    shard: Shard
    n_windows: int
    n_scored: int
    n_tokens: int
    nll_sum_nats: float
    wall_s: float
    load_s: float
    compile_s: float
    worker: str
    path: str
    committed: bool | None
    model_open_s: float = 0.0
    idle_s: float | None = None
    unpublished: tuple[Unpublished, ...] = ()


class EvalWorker:
    """Scores shards of one run after another, with one model open at a time.

    Raises (on construction, and by `turn_to`):
        ScoreError: this host has another model file or another token stream under the driver's paths.
        EngineError, OSError: the model cannot be opened here.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        from pipeline.provenance import cpu_model

        self.host = socket.gethostname()
        self.name = f"{self.host}:{os.getpid()}"
        self.cpu = cpu_model()
        self.file: engine.GGUFFile | None = None
        self.copy: Copy | None = None
        self.spec = spec
        self.turn_to(spec)

    def turn_to(self, spec: WorkerSpec) -> None:
        """Score shards of another run from now on; the model stays open when it is the same one.

        Should that fail there is no model open, and the worker can be turned to another run.
        """
        if self.file is not None and _of_model(spec) == _of_model(self.spec):
            del self.scorer  # before the next one is made: a worker's memory is that of one run
        else:
            if self.file is not None:
                self.close()
            try:
                self._open(spec)
            except BaseException:
                self.close()
                raise
        try:
            self._read(spec)
        except BaseException:
            self.close()
            raise
        self.spec = spec
        if spec.following is not None:
            n_bytes = 0 if self.file is None else self.file.n_bytes
            node_cache.prefetch(spec.following, Path(spec.cache_dir), n_bytes)

    def _open(self, spec: WorkerSpec) -> None:
        """Map the model and make ready what computes with it."""
        cache = Path(spec.cache_dir)
        path = self._here(spec, cache)
        started = time.perf_counter()
        import engine
        from pipeline.provenance import model_sha256

        same(
            spec.model_path,
            "SHA-256",
            model_sha256(path, cache),
            spec.model_sha256,
            self.host,
        )
        opening = time.perf_counter()
        file = engine.open(numa.own_copy(str(path)), load=spec.engine.load)
        self.model_open_s = time.perf_counter() - opening
        try:
            queued = time.perf_counter()
            with first_compiles(cache / "locks"):
                waited_s = time.perf_counter() - queued
                self.compile_s = float(engine.warm_up(file, spec.engine.activations))
            self.model = engine.load_model(
                file,
                threads=spec.engine.threads,
                batch_tokens=spec.engine.batch_tokens,
                activations=spec.engine.activations,
            )
        except BaseException:
            file.close()
            raise
        self.file = file
        self.open_s = max(0.0, time.perf_counter() - started - waited_s - self.compile_s)

    def _here(self, spec: WorkerSpec, cache: Path) -> Path:
        """The model on this host, fetched if need be; what was fetched stays as long as the model is open."""
        if spec.wanted is not None:
            self.copy = node_cache.model_copy(spec.wanted, cache)
            return self.copy.path
        if not Path(spec.model_path).exists():
            raise ModelError(
                f"{spec.model_path}: there is no such file on {self.host}",
                "copy it to every node, lay it where all see it, or give model.path as a URL",
                kind="FileNotFoundError",
            )
        return Path(spec.model_path)

    def _read(self, spec: WorkerSpec) -> None:
        """Map the run's token stream and make the cache that its windows need."""
        started = time.perf_counter()
        from pipeline.scoring import Scorer
        from pipeline.tokens import open_stream
        from pipeline.windows import cache_shape, open_protocol

        self.stream = open_stream(Path(spec.tokens_path), Path(spec.counts_path))
        same(spec.tokens_path, "SHA-256 of tokens", self.stream.sha256, spec.tokens_sha256, self.host)
        self.protocol = open_protocol(spec.protocol, spec.bos_id, self.stream)
        n_tokens, batch_tokens = self.stream.tokens.size, spec.engine.batch_tokens
        shape = cache_shape(self.protocol, n_tokens, spec.protocol, spec.windows_per_shard, batch_tokens)
        cache = self.model.new_cache(shape.n_slots, shape.capacity, spec.engine.kv, fleeting=shape.fleeting)
        self.scorer = Scorer(self._decode, cache, shape.n_slots, batch_tokens)
        self.load_s = self.open_s + time.perf_counter() - started
        self._ended: float | None = None

    @property
    def _decode(self) -> Decode:
        """What scores a batch."""
        return self.model.nll

    def ready(self) -> dict[str, Any]:
        """Who this is and what starting cost; `load_s` has neither compiling nor waiting for it."""
        return {
            "host": self.host,
            "pid": os.getpid(),
            "model_path": self.spec.model_path,
            "load_s": self.load_s,
            "model_open_s": self.model_open_s,
            "compile_s": self.compile_s,
            "threads": self.spec.engine.threads,
            "cpu": self.cpu,
        }

    def run(self, shard: Shard) -> ShardResult:
        """Score a shard's windows and publish its file; the first to publish wins.

        Raises:
            ScoreError: a negative log-likelihood is not finite; names window and position.
            StorageFailure: the file, or the state for the next shard, cannot be written.
        """
        from pipeline import handover
        from pipeline.tables import WINDOWS_SCHEMA, table

        started = time.perf_counter()
        idle_s = None if self._ended is None else started - self._ended
        windows = self._windows(shard.first_window, shard.end)
        if shard.resumes:
            self._go_on(windows[0])
        scores = self.scorer.scores(windows)
        rows = [self._row(window, nll, shard) for window, nll in zip(windows, scores, strict=True)]
        if shard.hands_on:  # first: behind a finished shard there is a state
            states = handover.prepared(self.spec)
            handover.leave(states, shard.end, self.scorer.cache, self.scorer.slot, self.spec.model_sha256)
        published = self._publish(table(rows, WINDOWS_SCHEMA), self.spec.run_dir, shard, self.spec.run_key)
        if handover.is_own(self.spec):  # nobody else sees it
            handover.drop(handover.place(self.spec), [shard])
        self._ended = time.perf_counter()
        return ShardResult(
            shard=shard,
            n_windows=len(windows),
            n_scored=sum(row["n_scored"] for row in rows),
            n_tokens=sum(row["n_tokens"] for row in rows),
            nll_sum_nats=sum(row["nll_sum_nats"] for row in rows),
            wall_s=self._ended - started,
            load_s=self.load_s,
            compile_s=self.compile_s,
            worker=self.name,
            path=f"{self.spec.run_dir}/{shard.file_name}",
            model_open_s=self.model_open_s,
            idle_s=idle_s,
            **told_of([published]),
        )

    def memory(self) -> dict[str, Any]:
        """This process's memory, as `pipeline.memory` reads it from the kernel."""
        from pipeline.memory import process_memory

        paths = () if self.file is None else self.file.paths
        return {**process_memory(*paths), "model_path": self.spec.model_path}

    def close(self) -> None:
        """Give the mapping back; the worker cannot score before it is turned to a run again."""
        file, self.file = self.file, None
        if file is not None:
            for held in ("model", "scorer"):
                self.__dict__.pop(held, None)
            file.close()
        copy, self.copy = self.copy, None
        if copy is not None:
            copy.close()

    def _publish(self, rows: pa.Table, run_dir: str, shard: Shard, run_key: str) -> bool | Unpublished:
        """Publish a shard's file, or have its table travel to the driver; the first to publish wins.

        Returns:
            whether this was the first, or the table.

        Raises:
            StorageFailure: the file cannot be written.
        """
        from pipeline import store

        meta = store.shard_meta(shard, run_key)
        if self.spec.collect:
            return store.unpublished(rows, f"{run_dir}/{shard.file_name}", meta)
        return store.commit(rows, folder_of(run_dir) / shard.file_name, meta)

    def _windows(self, first: int, end: int) -> list[Window]:
        return [self.protocol.window(self.stream.tokens, index) for index in range(first, end)]

    def _go_on(self, window: Window) -> None:
        """Have the cache hold what the document of a window has before it."""
        import numpy as np

        from pipeline import handover

        spec, scorer, index = self.spec, self.scorer, window.index
        scorer.slot = 0
        if not handover.take_up(
            handover.place(spec), index, scorer.cache, scorer.slot, spec.model_sha256, window.position
        ):
            n_before = (window.distance or 0) // spec.protocol.window
            before = self._windows(index - n_before, index)
            scorer.scores([replace(w, targets=np.full_like(w.targets, -1)) for w in before])

    def _row(self, window: Window, nll: npt.NDArray[np.float64], shard: Shard) -> dict[str, Any]:
        import numpy as np

        from pipeline.metrics import window_sums
        from pipeline.scoring import first_broken

        wrong = np.flatnonzero(~np.isfinite(nll))
        if wrong.size:
            position = window.position + int(np.flatnonzero(window.targets >= 0)[wrong[0]])
            raise ScoreError(
                f"window {window.index}: negative log-likelihood at position {position} is {nll[wrong[0]]}, "
                f"expected a finite number ({wrong.size} of {nll.size} are not)"
                f"{first_broken(self.model, window)}",
                "the model's weights overflow or hold NaN; check the file's SHA-256 and how it was made",
            )
        total, squares = window_sums(nll)
        half = None if window.half is None else nll[window.half :]
        half_total, half_squares = (None, None) if half is None else window_sums(half)
        return {
            **self.spec.columns,
            "window": window.index,
            **self.stream.counted(window),
            "n_scored": int(nll.size),
            "nll_sum_nats": total,
            "nll_sq_sum": squares,
            "half_n_scored": None if half is None else int(half.size),
            "half_nll_sum_nats": half_total,
            "half_nll_sq_sum": half_squares,
            "distance": window.distance,
            "n_tokens": int(window.tokens.size),
            "first_token": window.first_token,
            "shard": shard.id,
            "worker": self.name,
            "host": self.host,
            "cpu": self.cpu,
            "threads": self.spec.engine.threads,
            "batch_tokens": self.spec.engine.batch_tokens,
        }


def told_of(published: Sequence[bool | Unpublished]) -> dict[str, Any]:
    """What `ShardResult` says of a shard's tables, given what `EvalWorker._publish` said of each."""
    sent = tuple(one for one in published if not isinstance(one, bool))
    return {"committed": None if sent else all(published), "unpublished": sent}


def in_line(specs: Sequence[WorkerSpec]) -> list[WorkerSpec]:
    """Each told which model the next one wants, should it be another one."""
    line: list[WorkerSpec] = []
    following = None
    for spec in reversed(specs):
        if line and line[-1].model_path != spec.model_path:
            following = line[-1].wanted or Wanted(line[-1].model_path, line[-1].model_sha256)
        line.append(replace(spec, following=following))
    return line[::-1]


def _of_model(spec: WorkerSpec) -> tuple[str, str, EngineSettings]:
    """What decides whether a model that is open can be used for another run."""
    return spec.model_path, spec.model_sha256, spec.engine


def same(path: str, what: str, found: str, expected: str, host: str) -> None:
    """Refuse a file that is not the driver's; ScoreError."""
    if found != expected:
        raise ScoreError(
            f"{path} on {host}: {what} is {found}, expected {expected} as the driver has it",
            "every node needs the same file under that path; did it change while the run was going?",
        )


@contextmanager
def first_compiles(folder: Path) -> Iterator[None]:
    """On each host one worker enters alone and compiles; the others wait for it, then enter together.

    Kernels that several processes compile into one cache at once can crash later (numba #4807). An exclusive
    lock is for whoever comes first; whoever finds it taken waits for a shared one, so warm starts do not
    queue.
    """
    path = folder / f"compile.{socket.gethostname()}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("%s: no lock for the first compilation (%s)", path, error.strerror)
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
