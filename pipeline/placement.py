"""How many workers go where: what the nodes have, set against what a worker takes.

By default a node gets as many workers as its cores hold, fewer where memory or Ray's CPUs say so; asked for
a number, nodes take workers in turn. Which CPUs each is bound to, `pipeline.cpu_sets` decides. The plan is
printed before work starts, and is all that a dry run shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.capacity import BASE_BYTES, GB
from pipeline.cpu_sets import bound, groups_of, listed, room_of, spread
from pipeline.errors import ClusterUnreachable, SettingsError
from pipeline.settings import is_url, shown
from pipeline.token_copies import CacheFile
from pipeline.topology import ModelFile, NodeInfo

_NAMED_AT_MOST = 5
_CPUS_AT_MOST = 8  # workers whose CPUs a line names
MB = 1e6


@dataclass(frozen=True)
class Place:
    """Where one worker lives.

    `cpus` are the CPUs that its process is bound to, none when empty; `numa_node` is theirs, None when they
    are of several or nothing is bound; `mirror` is the folder of that NUMA node's own copies of the models,
    for `numa.use`.
    """

    node_id: str
    cpus: tuple[int, ...] = ()
    numa_node: int | None = None
    mirror: str | None = None


@dataclass(frozen=True)
class Need:
    """What the workers of a run take.

    Attributes:
        worker_bytes: that each allocates.
        models: that a worker opens, as the driver has them.
        load: `engine.load`.
        cache: `paths.cache`, where nodes keep digests and what they fetched.
        limit_bytes: `paths.cache_limit`.
        at_once: whether a worker has all models open at once, and not one after the other.
        files: that it reads through beside them.
        cached: what it reads of the driver's cache.
    """

    threads: int
    worker_bytes: int = BASE_BYTES
    models: tuple[ModelFile, ...] = ()
    load: str = "mmap"
    cache: str | None = None
    limit_bytes: int | None = None
    at_once: bool = False
    files: tuple[ModelFile, ...] = ()
    cached: tuple[CacheFile, ...] = ()

    @property
    def model_bytes(self) -> int:
        """Of all models."""
        return sum(model.n_bytes or 0 for model in self.models)

    @property
    def own_bytes(self) -> int:
        """Of a worker, with the weights that it copies."""
        return self.worker_bytes + (self._open_bytes if self.load == "copy" else 0)

    @property
    def locked_bytes(self) -> int:
        """Of a node, whatever its workers: what they lock."""
        return self._open_bytes if self.load == "mlock" else 0

    @property
    def _open_bytes(self) -> int:
        """Of the models that a worker has open at once."""
        each = [model.n_bytes or 0 for model in self.models]
        return sum(each) if self.at_once else max(each, default=0)


@dataclass(frozen=True)
class NodePlan:
    """What a node gets.

    Attributes:
        bytes: of memory that all of it takes.
        reason: why it gets less than it has cores for, "" where it does not.
        copies: NUMA nodes that get their own copy of the models.
        folders: where those are, once they are made.
        is_spare: nothing speaks against workers here, but there are enough.
    """

    node: NodeInfo
    places: tuple[Place, ...]
    bytes: int = 0
    reason: str = ""
    copies: tuple[int, ...] = ()
    folders: tuple[str, ...] = ()
    is_spare: bool = False

    @property
    def name(self) -> str:
        """Of the node, for people."""
        return name_of(self.node)


@dataclass(frozen=True)
class Plan:
    """Where the workers of a run go; `remarks` are what the user did not ask for but gets."""

    nodes: tuple[NodePlan, ...]
    need: Need
    remarks: tuple[str, ...] = ()

    @property
    def places(self) -> list[Place]:
        """Of all workers: of each node the first, then of each the second, and so on."""
        rounds = range(max((len(node.places) for node in self.nodes), default=0))
        return [node.places[turn] for turn in rounds for node in self.nodes if len(node.places) > turn]

    def on(self, node_id: str) -> Plan:
        """The plan of one host that had no id in Ray yet."""
        (only,) = self.nodes
        places = tuple(replace(place, node_id=node_id) for place in only.places)
        return replace(self, nodes=(replace(only, node=replace(only.node, node_id=node_id), places=places),))

    def lines(self) -> list[str]:
        """For people, one a node: workers, memory, the model, bytes to fetch."""
        return [_line(node, self.need) for node in self.nodes]

    def told(self) -> list[dict[str, Any]]:
        """For programs, one a node."""
        return [_told(node, self.need) for node in self.nodes]


def plan(
    nodes: Sequence[NodeInfo],
    need: Need,
    *,
    wanted: int | None = None,
    numa: str = "none",
    crowded: Collection[str] = (),
    absent: Mapping[str, str] | None = None,
) -> Plan:
    """Where the workers go.

    Args:
        wanted: workers of all nodes; None for as many as fit. More than there are cores are squeezed in as
            far as Ray has CPUs for them.
        numa: a strategy (pipeline/cpu_sets.py).
        crowded: hosts whose cores belong to others as well.
        absent: nodes that are not among `nodes`, and why.

    Raises:
        ClusterUnreachable: there is no node that can take a worker.
        SettingsError: no node has the memory for one; or a NUMA node has none for a copy of the model.
    """
    nodes, crowded = _shared_out(nodes, crowded)
    reasons = [_unusable(node, need) for node in nodes]
    room = [
        0 if reason else room_of(node, need.threads, numa, node.host in crowded)
        for node, reason in zip(nodes, reasons, strict=True)
    ]
    copies = [_copies(node, numa) for node in nodes]
    fits = [_fits(node, need, len(made)) for node, made in zip(nodes, copies, strict=True)]
    counts = _counts(nodes, need.threads, room, fits, wanted)
    if not sum(counts):
        _refuse(nodes, need, reasons, room, absent or {})
    planned = []
    for node, n, reason, fit, most, made in zip(nodes, counts, reasons, fits, room, copies, strict=True):
        places = tuple(
            Place(node.node_id, cpus, number)
            for cpus, number in bound(node, n, need.threads, numa, node.host in crowded)
        )
        used = tuple(sorted({p.numa_node for p in places if p.numa_node is not None} & set(made)))
        _check_copies(node, need, places, used)
        total = n * need.own_bytes + (need.locked_bytes + len(used) * need.model_bytes if n else 0)
        if not reason and not most:
            reason = _too_small(node, need.threads)
        elif not reason and fit is not None and n == fit < most:
            reason = f"a worker takes {_gb(need.own_bytes)}, {_gb(node.left_bytes)} are left"
        planned.append(NodePlan(node, places, total, reason, used, is_spare=not n and not reason))
    return Plan(tuple(planned), need, tuple(_remarks(planned, wanted, numa, absent or {})))


def _remarks(
    planned: Sequence[NodePlan], wanted: int | None, numa: str, absent: Mapping[str, str]
) -> Iterator[str]:
    yield from (f"{name}: {why}" for name, why in absent.items())
    n = sum(len(node.places) for node in planned)
    if wanted is not None and n < wanted:
        yield f"{wanted} workers are wanted, {n} fit"
    for node in planned:
        if node.places and numa == "mirror" and not node.copies:
            yield f"cluster.numa=mirror: {node.name} has one NUMA node, so its workers share the file itself"


def name_of(node: NodeInfo) -> str:
    """Host, and the beginning of Ray's id of the node."""
    return f"{node.host} ({node.node_id[:8]})" if node.node_id else node.host


def _shared_out(nodes: Sequence[NodeInfo], crowded: Collection[str]) -> tuple[list[NodeInfo], set[str]]:
    """Ray nodes of one host share its memory, and its cores if there are enough; else the host is crowded."""
    full, result = set(crowded), []
    together = Counter(node.host for node in nodes)
    slots = Counter[str]()
    for node in nodes:
        slots[node.host] += len(node.cores) if node.slots is None else node.slots
    begun = Counter[str]()
    for node in nodes:
        n = together[node.host]
        if n == 1:
            result.append(node)
            continue
        left = None if node.left_bytes is None else node.left_bytes // n
        if slots[node.host] > len(node.cores):
            full.add(node.host)
            result.append(replace(node, left_bytes=left))
            continue
        first = begun[node.host]
        begun[node.host] += node.slots or 0
        result.append(replace(node, left_bytes=left, cores=node.cores[first : begun[node.host]]))
    return result, full


def _unusable(node: NodeInfo, need: Need) -> str:
    """Why no worker can work on a node: a file is not there, or another one; "" when it can."""
    known = {file.path: file for file in (*need.models, *need.files)}
    for here in node.models:
        ours = known.get(here.path)
        if ours is None or is_url(here.path):  # fetched there, should it be missing or an old one
            continue
        if here.problem is not None:
            return f"the model cannot be opened there: {here.problem}"
        if (differs := _difference(here, ours)) is not None:
            return f"{shown(here.path)} is another file there: {differs}"
    return ""


def _difference(here: ModelFile, ours: ModelFile) -> str | None:
    """What shows that a node has another file; None where nothing does."""
    if here.n_bytes != ours.n_bytes:
        found = "no" if here.n_bytes is None else f"{here.n_bytes:,}"
        return f"{found} bytes, expected {ours.n_bytes or 0:,}"
    if None not in (here.sha256, ours.sha256) and here.sha256 != ours.sha256:
        return f"SHA-256 {here.sha256}, expected {ours.sha256}"
    return None


def _fits(node: NodeInfo, need: Need, n_copies: int) -> int | None:
    """Workers for whom a node has memory; None where that is not known."""
    if node.left_bytes is None:
        return None
    shared = need.locked_bytes + n_copies * need.model_bytes
    return max(0, node.left_bytes - shared) // need.own_bytes


def _counts(
    nodes: Sequence[NodeInfo],
    threads: int,
    room: Sequence[int],
    fits: Sequence[int | None],
    wanted: int | None,
) -> list[int]:
    """Workers of each node: first those that have cores, then those that Ray has CPUs for."""

    def least(n: int, fit: int | None) -> int:
        return n if fit is None else min(n, fit)

    able = [least(n, fit) for n, fit in zip(room, fits, strict=True)]
    counts = spread(able, wanted)
    missing = 0 if wanted is None else wanted - sum(counts)
    if missing > 0:
        most = [
            least(missing + n if node.slots is None else node.slots // threads, fit) if n else 0
            for node, n, fit in zip(nodes, room, fits, strict=True)
        ]
        more = spread([max(0, m - n) for m, n in zip(most, counts, strict=True)], missing)
        counts = [n + extra for n, extra in zip(counts, more, strict=True)]
    return counts


def _copies(node: NodeInfo, numa: str) -> tuple[int, ...]:
    """The NUMA nodes that get their own copy of the model: those with cores, if they are several."""
    groups = groups_of(node, numa)
    return tuple(groups) if numa == "mirror" and len(groups) > 1 else ()


def _check_copies(node: NodeInfo, need: Need, places: Sequence[Place], copies: Sequence[int]) -> None:
    """Refuse a NUMA node that is too small for its workers and their copy of the model."""
    free = {numa.id: numa.free_bytes for numa in node.numa_nodes}
    for number in copies:
        left, n = free.get(number), sum(place.numa_node == number for place in places)
        wanted = need.model_bytes + n * need.own_bytes
        if left is not None and wanted > left:
            raise SettingsError(
                f"cluster.numa=mirror: NUMA node {number} of {name_of(node)} has {_gb(left)} left; a copy of "
                f"{_models(need)} takes {_gb(need.model_bytes)}, {n} workers take {_gb(n * need.own_bytes)}",
                "cluster.numa=distribute shares one copy; fewer cluster.workers take less",
            )


def _refuse(
    nodes: Sequence[NodeInfo],
    need: Need,
    reasons: Sequence[str],
    room: Sequence[int],
    absent: Mapping[str, str],
) -> None:
    """Raise why no node can take a worker."""
    if any(room):
        left = [
            f"{name_of(node)} has {_gb(node.left_bytes)}" for node, n in zip(nodes, room, strict=True) if n
        ]
        raise SettingsError(
            f"no node has the memory of one worker, {_gb(need.own_bytes)}"
            + (f" beside {_gb(need.locked_bytes)} of locked weights" if need.locked_bytes else "")
            + f": {_some(left)}",
            "a smaller engine.batch_tokens or protocol.window, engine.kv=f16, or more memory",
        )
    told = [
        f"{name_of(node)}: {reason or _too_small(node, need.threads)}"
        for node, reason in zip(nodes, reasons, strict=True)
    ] + [f"{name}: {why}" for name, why in absent.items()]
    raise ClusterUnreachable(
        f"no node can take a worker: {_some(told)}" if told else "the cluster has no node",
        "every node needs the model under the same path, and the CPUs of one worker: "
        "see cluster.threads_per_worker and `ray status`",
    )


def _too_small(node: NodeInfo, threads: int) -> str:
    if node.slots is not None and node.slots < threads:
        return f"Ray has {node.slots} CPUs there, a worker wants {threads}"
    return f"{node.n_cpus} CPUs may be used, a worker has {threads} threads"


def _some(told: Sequence[str]) -> str:
    more = f"; and {len(told) - _NAMED_AT_MOST} more" if len(told) > _NAMED_AT_MOST else ""
    return "; ".join(told[:_NAMED_AT_MOST]) + more


def _gb(n_bytes: int | None) -> str:
    return "an unknown amount" if n_bytes is None else f"{n_bytes / GB:,.1f} GB"


def _line(planned: NodePlan, need: Need) -> str:
    node, n = planned.node, len(planned.places)
    if not n:
        return f"{planned.name}: no worker, {planned.reason or 'there are enough'}"
    parts = [f"{n} worker{'s' if n != 1 else ''} of {need.threads} thread{'s' if need.threads != 1 else ''}"]
    if planned.places[0].cpus:
        parts[0] += f" on CPUs {'; '.join(listed(place.cpus) for place in planned.places[:_CPUS_AT_MOST])}"
        parts[0] += "; ..." if n > _CPUS_AT_MOST else ""
    parts.append(f"{_gb(planned.bytes)} of {_gb(node.left_bytes)} of memory")
    if node.models:
        in_cache = sum(model.cached_bytes for model in node.models)
        parts.append(
            f"{in_cache / MB:,.0f} of {need.model_bytes / MB:,.0f} MB of {_models(need)} in the page cache"
        )
    parts.append(f"{fetch_bytes(node, need) / MB:,.0f} MB to fetch")
    if node.lacking:
        parts.append(f"{sent_bytes(node, need) / MB:,.1f} MB of tokens to send")
    if planned.copies:
        parts.append(f"{len(planned.copies)} copies of {_models(need)}, one for each NUMA node")
    return f"{planned.name}: {', '.join(parts)}" + (f" ({planned.reason})" if planned.reason else "")


def _models(need: Need) -> str:
    return "the model" if len(need.models) == 1 else f"{len(need.models)} models"


def _told(planned: NodePlan, need: Need) -> dict[str, Any]:
    node = planned.node
    return {
        "node": node.node_id or None,
        "host": node.host,
        "n_workers": len(planned.places),
        "threads": need.threads,
        "n_cores": len(node.cores),
        "n_cpus": sum(len(core.cpus) for core in node.cores),
        "n_numa_nodes": len(node.numa_nodes),
        "cpus": [listed(place.cpus) for place in planned.places],
        "numa_nodes": [place.numa_node for place in planned.places],
        "memory_left_bytes": node.left_bytes,
        "memory_bytes": planned.bytes,
        "model_cached_bytes": sum(model.cached_bytes for model in node.models) if node.models else None,
        "fetch_bytes": fetch_bytes(node, need),
        "sent_bytes": sent_bytes(node, need),
        "n_copies": len(planned.copies),
        "reason": planned.reason or None,
    }


def fetch_bytes(node: NodeInfo, need: Need) -> int:
    """Bytes of models that the node does not have yet, or an older version of."""
    here = {model.path: model for model in node.models}
    return sum(
        model.n_bytes or 0
        for model in need.models
        if model.path not in here or _difference(here[model.path], model) is not None
    )


def sent_bytes(node: NodeInfo, need: Need) -> int:
    """Bytes of the driver's cache that the node lacks."""
    return sum(file.n_bytes for file in need.cached if file.path in node.lacking)
