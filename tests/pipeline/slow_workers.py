"""The real worker, slowed, for tests that have to catch it in the middle of a shard.

`<paths.cache>/misfortune.json` says how: `seconds` that each shard takes besides its computation, `crawls`,
whether the first worker to come takes ten times as long, and `poison`, a first window whose shard ends every
process. Each attempt leaves a mark in `<paths.cache>/marks`: `<first window>.<pid>`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from pipeline import evaluate, perplexity
from pipeline.cluster import open_executor
from pipeline.errors import PipelineError
from pipeline.runtime import setup_logging
from pipeline.settings import (
    ClusterSettings,
    DataSettings,
    EngineSettings,
    ModelSettings,
    PathsSettings,
    PerplexitySettings,
    ProtocolSettings,
    TrackingSettings,
)
from pipeline.shards import Shard
from pipeline.worker import EvalWorker, ShardResult

FACTORY = "tests.pipeline.slow_workers:SlowWorker"


class SlowWorker(EvalWorker):
    """Scores as its parent does, and takes its time."""

    def run(self, shard: Shard) -> ShardResult:
        cache = Path(self.spec.cache_dir)
        how = json.loads((cache / "misfortune.json").read_text())
        (cache / "marks" / f"{shard.first_window}.{os.getpid()}").touch()
        time.sleep(how["seconds"] * (10 if how["crawls"] and self._is_first(cache) else 1))
        if shard.first_window == how["poison"]:
            os._exit(1)
        return super().run(shard)

    def _is_first(self, cache: Path) -> bool:
        with suppress(FileExistsError), (cache / "crawler").open("x") as file:
            file.write(str(os.getpid()))
        return (cache / "crawler").read_text() == str(os.getpid())


slow_executor = partial(open_executor, factory=FACTORY)


def prepare(folder: Path, *, seconds: float, crawls: bool = False, poison: int | None = None) -> None:
    """Say how slow workers are from now on; those that are at work hear of it with their next shard."""
    (folder / "cache" / "marks").mkdir(parents=True, exist_ok=True)
    how = {"seconds": seconds, "crawls": crawls, "poison": poison}
    new = folder / "cache" / "misfortune.json.new"
    new.write_text(json.dumps(how))
    new.replace(folder / "cache" / "misfortune.json")


def settings_of(folder: Path, results: str, cluster: ClusterSettings) -> PerplexitySettings:
    """A run of `tiny.gguf` on `t.txt`, both in the folder; a shard a window."""
    return PerplexitySettings(
        model=ModelSettings(str(folder / "tiny.gguf")),
        data=DataSettings(path=str(folder / "t.txt")),
        protocol=ProtocolSettings(window=32),
        engine=EngineSettings(batch_tokens=256),
        cluster=cluster,
        tracking=TrackingSettings("none"),
        paths=PathsSettings(str(folder / results), str(folder / "cache")),
    )


def main(folder: Path, results: str, address: str) -> int:
    """A driver in a process of its own, with slow workers; its last line is JSON."""
    setup_logging()
    perplexity.open_executor = slow_executor  # type: ignore[assignment]
    cluster = ClusterSettings("ray", windows_per_shard=1, threads_per_worker=1, address=address)
    try:
        summary = evaluate(settings_of(folder, results, cluster)).summary
    except PipelineError as error:
        print(json.dumps({"exit_code": error.exit_code, "kind": error.kind}), flush=True)  # noqa: T201
        return error.exit_code
    print(json.dumps(summary), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
