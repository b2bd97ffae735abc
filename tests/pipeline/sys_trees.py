"""Folders in place of /sys: machines that the tests do not run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.topology import Core, NodeInfo, NumaNode

GB = 10**9


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def machine(
    root: Path,
    nodes: Mapping[int, str],
    siblings: Sequence[str],
    *,
    online: str | None = None,
    free_kb: int | None = 1_000_000,
    name: str = "core_cpus_list",
) -> Path:
    """A machine of NUMA nodes (number -> its CPUs) and cores (the list of each one's hardware threads)."""
    files: dict[str, str] = {} if online is None else {"devices/system/cpu/online": online}
    for node, cpus in nodes.items():
        files[f"devices/system/node/node{node}/cpulist"] = cpus
        if free_kb is not None:
            files[f"devices/system/node/node{node}/meminfo"] = (
                f"Node {node} MemTotal:       {9 * free_kb} kB\nNode {node} MemFree:        {free_kb} kB\n"
                f"Node {node} Active(file):   20 kB\nNode {node} Inactive(file): 4 kB\n"
                f"Node {node} HugePages_Total:     0"
            )
    for core in siblings:
        for cpu in core.replace("-", ",").split(","):
            files[f"devices/system/cpu/cpu{cpu}/topology/{name}"] = core
    return write(root, files)


def host(
    n_nodes: int = 1,
    cores: int = 4,
    *,
    smt: int = 1,
    name: str = "a",
    left: int | None = 100 * GB,
    free: int | None = 50 * GB,
    **rest: object,
) -> NodeInfo:
    """A host of NUMA nodes with so many cores each; hardware threads are numbered as on a PC."""
    n = n_nodes * cores
    return NodeInfo(
        host=name,
        cores=tuple(Core(tuple(range(i, n * smt, n)), i // cores) for i in range(n)),
        numa_nodes=tuple(
            NumaNode(k, tuple(c + t * n for t in range(smt) for c in range(k * cores, (k + 1) * cores)), free)
            for k in range(n_nodes)
        ),
        left_bytes=left,
        **{"node_id": name * 8, **rest},  # type: ignore[arg-type]
    )
