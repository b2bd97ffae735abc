"""Workers for the executors' tests: they score nothing, and fail where their spec says so.

A spec is a dict: `folder` for marks, and for each misfortune the first windows of the shards that it befalls.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.node_cache import Wanted
from pipeline.shards import Shard


class FetchedSpec(dict[str, Any]):
    """A spec whose model nodes fetch."""

    def __init__(self, url: str, cache_dir: str, **rest: Any) -> None:
        super().__init__(rest)
        self.wanted: Wanted | None = Wanted(url)
        self.cache_dir = cache_dir


@dataclass(frozen=True)
class FakeResult:
    shard: Shard
    pid: int
    threads: str


class FakeWorker:
    """Leaves one mark per attempt: `<first window>.<pid>` in the folder."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        if spec.get("refuses"):
            raise ValueError("this model is not for me")
        if spec.get("dies_at_start"):
            os._exit(1)

    def ready(self) -> dict[str, Any]:
        started = time.time_ns()
        time.sleep(self.spec.get("warm_up_s", 0.0))
        return {
            "pid": os.getpid(),
            "started": started,
            "ready": time.time_ns(),
            "compile_s": 0.0,
            "load_s": 0.0,
        }

    def turn_to(self, spec: dict[str, Any]) -> None:
        """Leaves a mark `turned.<file>.<pid>.<time>`, so that tests can count how often a file was opened."""
        self.spec = spec
        Path(spec["folder"], f"turned.{spec.get('file')}.{os.getpid()}.{time.time_ns()}").touch()
        if spec.get("refuses"):
            raise ValueError("this model is not for me")

    def run(self, shard: Shard) -> FakeResult:
        spec, first = self.spec, shard.first_window
        Path(spec["folder"], f"{first}.{os.getpid()}").touch()
        print("a worker's standard output")  # noqa: T201
        logging.getLogger(__name__).info("a worker's log")
        time.sleep(spec.get("seconds", 0.0))
        if first in spec.get("poison", ()):
            os._exit(1)
        if first in spec.get("faulty", ()):
            raise ValueError(f"window {first} is wrong")
        if shard.resumes and not Path(spec["folder"], f"state-{first}").exists():
            raise ValueError(f"window {first} is too early")
        if shard.hands_on:
            Path(spec["folder"], f"state-{shard.end}").touch()
        sys.stdout.flush()
        return FakeResult(shard, os.getpid(), os.environ.get("NUMBA_NUM_THREADS", ""))

    def memory(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "pss_bytes": 1, "anonymous_bytes": 1}

    def close(self) -> None:
        self.spec = {}
