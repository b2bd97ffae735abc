"""What sums up a shard's inputs: a worker of pipeline/worker.py that scores nothing."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.errors import ScoreError
from pipeline.worker import EvalWorker, ShardResult, WorkerSpec, told_of

if TYPE_CHECKING:
    import engine
    from pipeline.imatrix.sums import Limbs
    from pipeline.shards import Shard
    from pipeline.windows import Window

WORKER = "pipeline.imatrix.worker:ImatrixWorker"


class ImatrixWorker(EvalWorker):
    """Sums up the squares of every weight matrix' inputs over windows, all of their tokens.

    Opens, checks and maps what `EvalWorker` does, and raises as it does.
    """

    sums: engine.InputSums

    def _open(self, spec: WorkerSpec) -> None:
        super()._open(spec)
        import engine

        try:
            self.sums = engine.sum_inputs(self.model)
        except BaseException:
            self.close()
            raise

    def run(self, shard: Shard) -> ShardResult:
        """Sum up a shard's windows and publish its file; the first to publish wins.

        Raises:
            ScoreError: an input is not finite or too large; names its matrices.
            StorageFailure: the file cannot be written.
        """
        from pipeline.imatrix.sums import rows
        from pipeline.tables import IMATRIX_SCHEMA, table

        started = time.perf_counter()
        windows = self._windows(shard.first_window, shard.end)
        n_tokens, limbs = self._collect(windows)
        common = {
            **self.spec.columns,
            "shard": shard.id,
            "worker": self.name,
            "host": self.host,
            "cpu": self.cpu,
            "threads": self.spec.engine.threads,
            "batch_tokens": self.spec.engine.batch_tokens,
        }
        found = table(rows(self.sums, n_tokens, limbs, common), IMATRIX_SCHEMA)
        published = self._publish(found, self.spec.run_dir, shard, self.spec.run_key)
        return ShardResult(
            shard=shard,
            n_windows=len(windows),
            n_scored=0,
            n_tokens=n_tokens,
            nll_sum_nats=0.0,
            wall_s=time.perf_counter() - started,
            load_s=self.load_s,
            compile_s=self.compile_s,
            worker=self.name,
            path=f"{self.spec.run_dir}/{shard.file_name}",
            model_open_s=self.model_open_s,
            **told_of([published]),
        )

    def close(self) -> None:
        """See `EvalWorker.close`."""
        self.__dict__.pop("sums", None)
        super().close()

    def _collect(self, windows: list[Window]) -> tuple[int, list[Limbs]]:
        """Tokens and limbs of windows; without targets the output layer is not computed."""
        import numpy as np

        import engine

        with suppress(engine.EngineError):
            self.sums.drain()  # what a shard that failed has left
        try:
            self.scorer.scores([replace(w, targets=np.full_like(w.targets, -1)) for w in windows])
            n_tokens, limbs = self.sums.drain()
        except engine.EngineError as error:
            raise ScoreError(
                f"windows {windows[0].index} to {windows[-1].index}: {error}",
                "the model's weights overflow or hold NaN; check the file's SHA-256 and how it was made",
            ) from error
        expected = sum(window.tokens.size for window in windows)
        if n_tokens != expected:
            raise ScoreError(
                f"the engine summed up {n_tokens} tokens, expected {expected}; this is a bug of ours"
            )
        return n_tokens, limbs
