"""Whether what a node writes where results go is what the driver sees there; and how far its clock is off.

Before work every node lays a file into the folder of the run's shards, and the driver looks for it: a path
that is a disk of the node's own, another mount, or not to be written by the node's user would otherwise lose
every shard that is computed there. The node's cache has to be writable as well. A run whose nodes fail is
refused, naming them; a node that joins later is asked too, and gets no worker when it fails. With
`cluster.collect=true` nodes write no results, and only the cache is tried.

A clock that is off spoils the columns with times, and signatures of requests to an object store; no score.
`ray` is handed in, connected, by `pipeline.cluster`.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, StoreError
from pipeline.folders import folder_of

ANSWER_TIMEOUT_S = 60.0  # the first task of a node starts a process and imports
SEEN_WITHIN_S = 5.0  # network file systems remember for seconds what they saw of a folder
MAX_OFF_S = 2.0  # more is not the time that an answer takes
_LOOK_S = 0.2
_NAMED_AT_MOST = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Left:
    """What a node says: its host, its clock (seconds since the epoch), what it could not do."""

    host: str
    clock_s: float
    problem: str | None = None


@dataclass(frozen=True)
class _Asked:
    """A node that was asked to lay a file, and when, by two clocks of the driver."""

    ref: Any
    file: Path | None
    at_s: float


@dataclass(frozen=True)
class _Awaited:
    """A node's file that is not seen yet, and since when it should be, by `time.monotonic`."""

    file: Path
    host: str
    since: float


def leave(folder: str | None, name: str, cache: str) -> Left:
    """Lay a file into the folder, as a shard would be, and try the cache; runs on a node.

    Args:
        folder: of the run's shards, None where the node is not to write there.
        name: of the file, which is what it says, too.
    """
    from pipeline import store

    host, clock_s = socket.gethostname(), time.time()
    try:
        store.probe(Path(cache), "paths.cache")
        if folder is not None:
            store.publish(folder_of(folder) / name, lambda file: file.write(name.encode()))
    except PipelineError as error:
        return Left(host, clock_s, str(error))
    except OSError as error:
        return Left(host, clock_s, f"cannot write to {folder}: {error.strerror or error}")
    return Left(host, clock_s)


class Probes:
    """Asks nodes, each once.

    Args:
        ray: the module, connected.
        folder: of the run's shards, None where nodes do not write there.
        cache: `paths.cache`, as every node knows it.
    """

    def __init__(self, ray: Any, folder: str | None, cache: str) -> None:
        self._ray, self._folder, self._cache = ray, folder, cache
        self._asked: dict[str, _Asked] = {}
        self._awaited: dict[str, _Awaited] = {}
        self._admitted: dict[str, bool] = {}

    def require(self, nodes: Sequence[Mapping[str, Any]], timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Ask all nodes and wait for answers and files; one that does not answer in time is left for later.

        Args:
            nodes: entries of `ray.nodes()` that are to have workers.

        Raises:
            StoreError: naming the nodes that cannot write, or whose files the driver does not see.
        """
        wrong: list[str] = []
        for node in nodes:
            self._ask(node)
        deadline = time.monotonic() + timeout_s
        while (self._asked or self._awaited) and time.monotonic() < deadline:
            if refs := [asked.ref for asked in self._asked.values()]:
                self._ray.wait(refs, num_returns=1, timeout=_LOOK_S)
            else:
                time.sleep(_LOOK_S / 4)
            wrong += [problem for node in nodes if (problem := self._settle(node)) is not None]
        for node in nodes:
            if node["NodeID"] in self._asked:
                log.warning("%s has not tried yet where it can write; its workers wait for that", _name(node))
        if wrong:
            more = f"; and {len(wrong) - _NAMED_AT_MOST} more" if len(wrong) > _NAMED_AT_MOST else ""
            raise StoreError(
                f"paths: {len(wrong)} of {len(nodes)} nodes cannot be used: "
                + "; ".join(wrong[:_NAMED_AT_MOST])
                + more,
                "paths.results must be the same folder for the driver and every node, or s3://BUCKET/PREFIX; "
                "cluster.collect=true has the driver alone write there. paths.cache is each node's own",
            )

    def admits(self, node: Mapping[str, Any]) -> bool:
        """Whether what a node writes is seen; asks one that is new, and waits for nothing."""
        self._ask(node)
        problem = self._settle(node)
        if problem is not None:
            log.warning("%s; no worker is started there", problem)
        return self._admitted.get(node["NodeID"], False)

    def _ask(self, node: Mapping[str, Any]) -> None:
        key = node["NodeID"]
        if key in self._admitted or key in self._asked or key in self._awaited:
            return
        name = f".probe-{uuid.uuid4().hex}"
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(key, soft=False)
        task = self._ray.remote(leave).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        at_s = time.time()
        file = None if self._folder is None else folder_of(self._folder) / name
        self._asked[key] = _Asked(task.remote(self._folder, name, self._cache), file, at_s)

    def _settle(self, node: Mapping[str, Any]) -> str | None:
        """Take a node's answer, or see its file, if it is there: what is wrong, None while nothing is."""
        key, errors = node["NodeID"], self._ray.exceptions
        asked = self._asked.get(key)
        if asked is not None:
            if not self._ray.wait([asked.ref], num_returns=1, timeout=0)[0]:
                return None
            del self._asked[key]
            try:
                left: Left = self._ray.get(asked.ref)
            except errors.RayTaskError as error:
                self._admitted[key] = False
                return f"{_name(node)}: cannot try where it can write ({error.cause or type(error).__name__})"
            except errors.RayError as error:  # the node is going: asked again if it stays
                log.warning("%s did not try where it can write: %s", _name(node), type(error).__name__)
                return None
            _check_clock(node, left.clock_s, asked.at_s, time.time())
            if left.problem is not None or asked.file is None:
                self._admitted[key] = left.problem is None
                return None if left.problem is None else f"{_name(node)}: {left.problem}"
            self._awaited[key] = _Awaited(asked.file, left.host, time.monotonic())
        awaited = self._awaited.get(key)
        if awaited is None:
            return None
        is_seen = _is_seen(awaited.file)
        waited_s = time.monotonic() - awaited.since
        if not is_seen and waited_s < SEEN_WITHIN_S:
            return None
        del self._awaited[key]
        self._admitted[key] = is_seen
        if is_seen:
            return None
        return (
            f"{_name(node)}: what it wrote to {awaited.file.parent} is not seen by the driver on "
            f"{socket.gethostname()} after {waited_s:.0f} s, so that path is another folder there"
        )


def _is_seen(file: Path) -> bool:
    """Whether the file is there; taken away then."""
    with suppress(OSError):
        next(iter(file.parent.iterdir()), None)  # has network file systems look anew
        if file.read_bytes() == file.name.encode():
            file.unlink(missing_ok=True)
            return True
    return False


def _check_clock(node: Mapping[str, Any], there_s: float, asked_s: float, answered_s: float) -> None:
    """Say how far a node's clock is off, at least: it was read between the question and the answer."""
    off_s = min(0.0, there_s - asked_s) + max(0.0, there_s - answered_s)
    if abs(off_s) > MAX_OFF_S:
        side = "ahead of" if off_s > 0 else "behind"
        log.warning(
            "%s: its clock is %.1f s %s the driver's; times of its rows are off by that, scores are not",
            _name(node),
            abs(off_s),
            side,
        )


def _name(node: Mapping[str, Any]) -> str:
    """A node as people know it: host, address, the beginning of its id."""
    host, address = node.get("NodeManagerHostname", "?"), node.get("NodeManagerAddress", "?")
    return f"node {host} ({address}, {node['NodeID'][:8]})"
