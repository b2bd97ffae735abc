"""Slow workers that tell what became of each file they published, and their driver: `test_network_cut.py`.

Beside the marks of `slow_workers`, `<paths.cache>/published/<first window>.<pid>.<1 or 0>`: 0 where another
worker had published the shard before.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from pipeline.cluster import open_executor
from pipeline.shards import Shard
from pipeline.worker import ShardResult
from tests.pipeline import slow_workers


class TellingWorker(slow_workers.SlowWorker):
    """Scores as its parent does, and says who was first."""

    def run(self, shard: Shard) -> ShardResult:
        result = super().run(shard)
        folder = Path(self.spec.cache_dir) / "published"
        folder.mkdir(exist_ok=True)
        (folder / f"{shard.first_window}.{os.getpid()}.{int(result.committed)}").touch()
        return result


if __name__ == "__main__":
    factory = "tests.pipeline.cut_off_workers:TellingWorker"
    slow_workers.slow_executor = partial(open_executor, factory=factory)
    sys.exit(slow_workers.main(Path(sys.argv[1]), *sys.argv[2:]))
