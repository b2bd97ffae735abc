"""What a run will take, before it is started: time and memory, and how they were estimated.

Time is tokens left / (tokens/s of a worker * workers). The rate comes from earlier rows of `table=runs` of
the same model on this host with as many threads, those of the same window first; without such rows, from the
machine's own speed: fused multiply-adds are timed here and now, a token takes one per weight of the model's
matrices, and the kernels reach about `SHARE` of the ceiling. Starting workers and compiling come on top.

Memory is the model file, which all workers of a host share, and for each worker what its model and its
cache allocate, which is known exactly, with `capacity.BASE_BYTES` for the interpreter and the libraries.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import results
from pipeline.capacity import worker_bytes
from pipeline.folders import folder_of
from pipeline.placement import Need
from pipeline.preflight import Prepared
from pipeline.settings import ClusterSettings, PathsSettings, PerplexitySettings
from pipeline.token_copies import CacheFile, files_of
from pipeline.tokens import TokenStream
from pipeline.topology import ModelFile
from pipeline.windows import cache_shape, open_protocol

if TYPE_CHECKING:
    import engine

SHARE = 0.5
_LATEST = 5
_ROWS = """
    select model_sha256, threads, protocol_window, tok_per_s / n_workers as rate
    from runs
    where host = $host and tok_per_s is not null and n_workers > 0
    order by finished_at desc
"""


class Estimator:
    """Estimates for the runs of one invocation: the store is read once, the machine timed at most once."""

    def __init__(self, settings: PerplexitySettings) -> None:
        folder = folder_of(settings.paths.results)
        self._rows = results.select(folder, _ROWS, {"host": socket.gethostname()})
        self._gflops: float | None = None

    def plan(self, ready: Prepared, n_workers: int) -> dict[str, Any]:
        """`estimated_s`, `estimated_from` in words, `model_bytes`, `worker_bytes`."""
        s = ready.settings
        rate, how = self.rate(ready.file, ready.spec.model_sha256, s.engine.threads, s.protocol.window)
        n_left = sum(shard.n_windows for shard in ready.todo) * ready.settings.protocol.window
        return {
            "estimated_s": n_left / (rate * max(1, min(n_workers, len(ready.todo)))),
            "estimated_from": how,
            "model_bytes": ready.file.n_bytes,
            "worker_bytes": own_bytes(ready),
        }

    def rate(self, file: engine.GGUFFile, sha256: str, threads: int, window: int) -> tuple[float, str]:
        """Tokens/s of one worker with that model, and where that comes from."""
        rows = [row for row in self._rows if row["model_sha256"] == sha256 and row["threads"] == threads]
        alike = [row["rate"] for row in rows if row["protocol_window"] == window][:_LATEST]
        if alike:
            rate = statistics.median(alike)
            return (
                rate,
                f"{_runs(len(alike))} of this model and window on this host: {rate:.0f} tok/s a worker",
            )
        if rows:
            rate = statistics.median(row["rate"] for row in rows[:_LATEST])
            n = min(len(rows), _LATEST)
            return (
                rate,
                f"{_runs(n)} of this model with other windows on this host: {rate:.0f} tok/s a worker",
            )
        gflops = self._ceiling(threads)
        n_weights = sum(math.prod(t.shape) for t in file.tensors.values() if len(t.shape) == 2)
        rate = SHARE * gflops * 1e9 / max(1, 2 * n_weights)
        return rate, (
            f"no earlier run of this model here: {SHARE:.0%} of {gflops:.0f} GFLOP/s measured now, "
            f"{2 * n_weights / 1e6:,.3g} MFLOP a token: {rate:.0f} tok/s a worker"
        )

    def _ceiling(self, threads: int) -> float:
        import engine

        if self._gflops is None:
            self._gflops = engine.fma_gflops(threads)
        return self._gflops


def need_of(runs: Sequence[Prepared], extra_bytes: int = 0) -> Need:
    """What workers take that score one run after another.

    Args:
        extra_bytes: that each allocates beside what it takes to score.

    Raises:
        StoreError: a token stream cannot be read.
    """
    s = runs[0].settings
    files = {ready.settings.model.path: ready for ready in runs}
    models = (
        ModelFile(
            path,
            ready.file.n_bytes,
            min(ready.file.n_bytes, ready.file.resident_bytes()),
            ready.spec.model_sha256,
        )
        for path, ready in files.items()
    )
    return Need(
        threads=s.engine.threads,
        worker_bytes=max(own_bytes(ready) for ready in runs) + extra_bytes,
        models=tuple(models),
        load=s.engine.load,
        cache=s.paths.cache,
        limit_bytes=s.paths.limit_bytes,
        cached=cached_files(s.cluster, s.paths, (ready.stream for ready in runs)),
    )


def cached_files(
    cluster: ClusterSettings, paths: PathsSettings, streams: Iterable[TokenStream]
) -> tuple[CacheFile, ...]:
    """What nodes may have to be sent of the driver's cache; nothing where workers are of this host.

    Raises:
        StoreError: a file cannot be read.
    """
    return files_of(streams, Path(paths.cache)) if cluster.kind == "ray" else ()


def own_bytes(ready: Prepared) -> int:
    """What a worker allocates."""
    s, spec, n_tokens = ready.settings, ready.spec, ready.stream.tokens.size
    protocol = open_protocol(s.protocol, spec.bos_id, ready.stream)
    shape = cache_shape(protocol, n_tokens, s.protocol, spec.windows_per_shard, s.engine.batch_tokens)
    return worker_bytes(ready.file, s.engine, s.engine.batch_tokens, shape)


def _runs(n: int) -> str:
    return "an earlier run" if n == 1 else f"{n} earlier runs"
