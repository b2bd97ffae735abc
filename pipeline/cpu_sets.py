"""Which CPUs each of a node's workers is bound to, by NUMA strategy.

A worker is given the CPUs of cores side by side in one NUMA node. Where workers are fewer than cores, the
cores are shared out among them, so that the kernel can still move a worker away from what else runs there.
Where the cores are not the workers' alone (a quota, more workers than cores) none is bound to single cores.

    strategy     workers of a node go to                       and are bound to
    none         NUMA nodes in order, each filled first        cores
    distribute   NUMA nodes in turn                            cores, at least their NUMA node
    isolate      the NUMA node that the driver's task ran on   the same
    numactl      wherever the CPUs that Ray was started with   nothing: they inherit CPUs and memory policy
    mirror       NUMA nodes in turn                            as distribute; each node has its own model
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from pipeline.topology import Core, NodeInfo

_BY_NUMA_NODE = ("distribute", "isolate", "mirror")
Bound = tuple[tuple[int, ...], int | None]
"""CPUs, () for all; and the NUMA node that they are of, None for several."""


def room_of(node: NodeInfo, threads: int, numa: str, is_crowded: bool) -> int:
    """Workers for whom a node has cores, and Ray the CPUs.

    Args:
        is_crowded: its cores belong to others as well.
    """
    slots = None if node.slots is None else node.slots // threads
    if is_crowded and slots is not None:
        return slots
    cores = node.n_cores // threads
    if numa in _BY_NUMA_NODE:
        cores = min(cores, sum(len(group) // threads for group in groups_of(node, numa).values()))
    if not cores and (slots is None or node.n_cpus >= threads):
        cores = 1
    return cores if slots is None else min(cores, slots)


def groups_of(node: NodeInfo, numa: str) -> dict[int, list[Core]]:
    """The cores that a strategy uses, by NUMA node."""
    groups: dict[int, list[Core]] = {}
    for core in node.cores:
        groups.setdefault(core.numa_node, []).append(core)
    if numa == "isolate" and groups:
        chosen = node.here if node.here in groups else min(groups)
        return {chosen: groups[chosen]}
    return dict(sorted(groups.items()))


def bound(node: NodeInfo, n: int, threads: int, numa: str, is_crowded: bool) -> list[Bound]:
    """What each of a node's n workers is bound to, as `room_of` counted them or more."""
    groups = groups_of(node, numa)
    if numa == "numactl" or not groups:
        return [((), None)] * n
    room = [len(cores) // threads for cores in groups.values()]
    alone = not is_crowded and node.quota is None
    if alone and n <= sum(room):
        counts = _in_order(room, n) if numa == "none" else spread(room, n)
        return [
            _bound(share)
            for cores, k in zip(groups.values(), counts, strict=True)
            for share in _shares(cores, k)
        ]
    if numa == "none":
        if not alone or n * threads > len(node.cores):
            return [((), None)] * n
        return [_bound(share) for share in _shares([core for group in groups.values() for core in group], n)]
    if len(groups) == 1 and numa != "isolate":
        return [((), None)] * n
    counts = spread([n] * len(groups), n)
    return [_bound(cores) for cores, k in zip(groups.values(), counts, strict=True) for _ in range(k)]


def spread(capacity: Sequence[int], wanted: int | None) -> list[int]:
    """How many of at most `wanted` go to each of several places with room for so many, in turn."""
    rounds = range(max(capacity, default=0))
    order = [i for turn in rounds for i, room in enumerate(capacity) if room > turn]
    taken = Counter(order if wanted is None else order[:wanted])
    return [taken[i] for i in range(len(capacity))]


def listed(cpus: Iterable[int]) -> str:
    """The numbers as the kernel writes a list, "0-3,8"."""
    runs = groupby(enumerate(sorted(cpus)), key=lambda pair: pair[1] - pair[0])
    ends = [(members[0][1], members[-1][1]) for members in (list(run) for _, run in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _in_order(capacity: Sequence[int], n: int) -> list[int]:
    """How many of n go to each of several places, the first ones filled first."""
    counts = []
    for room in capacity:
        counts.append(min(room, n))
        n -= counts[-1]
    return counts


def _shares(cores: Sequence[Core], n: int) -> list[Sequence[Core]]:
    """The cores in n runs of neighbours, as alike as can be."""
    return [cores[a:b] for a, b in pairwise(i * len(cores) // n for i in range(n + 1))] if n else []


def _bound(cores: Sequence[Core]) -> Bound:
    numbers = {core.numa_node for core in cores}
    cpus = tuple(sorted(cpu for core in cores for cpu in core.cpus))
    return cpus, numbers.pop() if len(numbers) == 1 else None
