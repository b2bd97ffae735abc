"""What a host has: cores and NUMA nodes as /sys reports them, memory that is left, the model's files.

`look` runs on every node of a cluster (pipeline/survey.py) and tells of the host it runs on. Only CPUs count
that are online and that the process may use; a core is one however many hardware threads it has, for two
workers that multiply matrices on one core take turns. Where /sys is silent (a container that hides it, a
kernel without NUMA) every CPU is a core and all are of NUMA node 0.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.settings import is_url
from pipeline.token_copies import CacheFile, lacking

_SYS, _OWN_CGROUPS, _OWN_STAT = Path("/sys"), Path("/proc/self/cgroup"), Path("/proc/self/stat")
_CPU_OF_STAT = 36  # field 39, counted behind the command's closing parenthesis
_SIBLINGS = ("core_cpus_list", "thread_siblings_list")  # since Linux 5.3, and before
_FREED_FIRST = ("MemFree", "Inactive(file)", "Active(file)")  # what a NUMA node gives to new allocations


@dataclass(frozen=True)
class Core:
    """A physical core: those of its hardware threads that may be used, and the NUMA node that they are of."""

    cpus: tuple[int, ...]
    numa_node: int = 0


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node: its CPUs, those that may not be used as well, and bytes that new allocations can have.

    A node without CPUs is memory alone. `free_bytes` is None where the kernel does not say.
    """

    id: int
    cpus: tuple[int, ...]
    free_bytes: int | None = None


@dataclass(frozen=True)
class ModelFile:
    """A model on a host, all parts of a split one.

    `n_bytes` is None when it is not there: a URL has to be fetched, of a file `problem` tells why. `sha256`
    is None when no digest was kept; `cached_bytes` are those in the page cache.
    """

    path: str
    n_bytes: int | None = None
    cached_bytes: int = 0
    sha256: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class NodeInfo:
    """A host as one process on it sees it.

    Attributes:
        host: its name; Ray nodes of one name share the host.
        cores: in the order of their first CPUs.
        quota: CPUs that control groups grant, None for no limit. Then the cores are others' as well.
        left_bytes: of memory for new allocations, None where the kernel does not say.
        here: the NUMA node on which this was found out.
        models: and files that are read beside them.
        lacking: paths of files of the driver's cache that are not here, or not the same.
        node_id: Ray's, given by the driver.
        slots: CPUs that Ray hands out on the node, given by the driver; None for no limit.
    """

    host: str
    cores: tuple[Core, ...]
    numa_nodes: tuple[NumaNode, ...]
    quota: float | None = None
    left_bytes: int | None = None
    here: int = 0
    models: tuple[ModelFile, ...] = ()
    lacking: tuple[str, ...] = ()
    node_id: str = ""
    slots: int | None = None

    @property
    def n_cpus(self) -> int:
        """CPUs that may be used at once, hardware threads counted."""
        return self._within_quota(sum(len(core.cpus) for core in self.cores))

    @property
    def n_cores(self) -> int:
        """Cores that may be used at once."""
        return self._within_quota(len(self.cores))

    def _within_quota(self, n: int) -> int:
        return n if self.quota is None else max(1, min(n, int(self.quota)))


def look(
    models: Sequence[str] = (),
    cache: str | None = None,
    files: Sequence[str] = (),
    cached: Sequence[CacheFile] = (),
    *,
    sys_root: Path | None = None,
) -> NodeInfo:
    """This host, as this process may use it.

    Args:
        models: paths or URLs that a run opens here.
        cache: `paths.cache`, where digests are kept and what URLs name.
        files: paths of what a run reads beside models.
        cached: what the driver has in its cache for the run.
        sys_root: in place of /sys.
    """
    from pipeline.capacity import available_bytes

    root = _SYS if sys_root is None else sys_root
    numa_nodes = _numa_nodes(root)
    cores = _cores(root, os.sched_getaffinity(0), numa_nodes)
    return NodeInfo(
        host=socket.gethostname(),
        cores=cores,
        numa_nodes=numa_nodes or (NumaNode(0, tuple(cpu for core in cores for cpu in core.cpus)),),
        quota=cpu_quota(root / "fs/cgroup"),
        left_bytes=available_bytes(),
        here=_numa_of(_current_cpu(), numa_nodes),
        models=(*(_model(path, cache) for path in models), *(_file(path, cache) for path in files)),
        lacking=() if cache is None else lacking(cached, Path(cache)),
    )


def usable_cores() -> int:
    """Cores of this host that this process may use at once."""
    return look().n_cores


def parse_cpus(text: str) -> tuple[int, ...]:
    """The numbers of a list as the kernel writes it, "0-3,8,10-11"; () of an empty one.

    Raises:
        ValueError: it is no such list.
    """
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


def cpu_quota(root: Path) -> float | None:
    """CPUs that the control groups around this process grant, None for no limit.

    Args:
        root: where they are mounted; of versions 1 and 2.
    """
    grants = []
    for group in _own_groups(root):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            quota, period = (group / "cpu.max").read_text().split()
            grants.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            grants += [int(quota) / int(period)] if int(quota) > 0 else []
    return min(grants, default=None)


def _own_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's CPU control groups and all around them; a container sees its own as root."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    roots = {root: root}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            top = root / controllers
            roots[top / path.strip("/")] = top
    for folder, top in roots.items():
        for group in (folder, *folder.parents):
            yield group
            if group == top:
                break


def _cores(root: Path, allowed: Collection[int], numa_nodes: Sequence[NumaNode]) -> tuple[Core, ...]:
    """Cores with a CPU that is online and may be used."""
    folder = root / "devices/system/cpu"
    online = set(allowed)
    with suppress(OSError, ValueError):
        online &= set(parse_cpus((folder / "online").read_text()))
    cores, seen = [], set[int]()
    for cpu in sorted(online or allowed):
        if cpu not in seen:
            siblings = {cpu} | (set(_siblings(folder / f"cpu{cpu}/topology")) & online)
            seen |= siblings
            cores.append(Core(tuple(sorted(siblings)), _numa_of(cpu, numa_nodes)))
    return tuple(cores)


def _siblings(folder: Path) -> tuple[int, ...]:
    for name in _SIBLINGS:
        with suppress(OSError, ValueError):
            return parse_cpus((folder / name).read_text())
    return ()


def _numa_nodes(root: Path) -> tuple[NumaNode, ...]:
    """By number, which need not be without gaps; () where the kernel has none."""
    nodes = []
    for folder in (root / "devices/system/node").glob("node*"):
        number = re.fullmatch(r"node(\d+)", folder.name)
        if number is not None:
            with suppress(OSError, ValueError):
                cpus = parse_cpus((folder / "cpulist").read_text())
                nodes.append(NumaNode(int(number[1]), cpus, _free_bytes(folder / "meminfo")))
    return tuple(sorted(nodes, key=lambda node: node.id))


def _free_bytes(meminfo: Path) -> int | None:
    """What `MemAvailable` says of a whole machine, for a node: free pages, and files' pages to give back."""
    found: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():  # "Node 0 MemFree:   16077520 kB"
            name, value = line.split()[2:4]
            found[name.rstrip(":")] = int(value) * 1024
    return sum(found.get(name, 0) for name in _FREED_FIRST) if "MemFree" in found else None


def _numa_of(cpu: int, numa_nodes: Sequence[NumaNode]) -> int:
    return next((node.id for node in numa_nodes if cpu in node.cpus), 0)


def _current_cpu() -> int:
    """The CPU that this process ran on last."""
    try:
        return int(_OWN_STAT.read_text().rpartition(")")[2].split()[_CPU_OF_STAT])
    except (OSError, ValueError, IndexError):
        return 0


def _model(path: str, cache: str | None) -> ModelFile:
    """A model's files as they are here; their digest only if it was kept, for reading them takes time."""
    import engine
    from pipeline.node_cache import kept
    from pipeline.provenance import kept_sha256

    here = path
    if is_url(path):
        files = [] if cache is None else kept(path, Path(cache))
        if not files:
            return ModelFile(path)
        here = str(files[0])
    try:
        with engine.open(here) as file:
            sha256 = None if cache is None else kept_sha256([Path(part) for part in file.paths], Path(cache))
            return ModelFile(path, file.n_bytes, min(file.n_bytes, file.resident_bytes()), sha256)
    except OSError as error:
        return ModelFile(path, problem=f"{here}: {error.strerror or error}")
    except engine.EngineError as error:
        return ModelFile(path, problem=str(error))


def _file(path: str, cache: str | None) -> ModelFile:
    """A file that is no model, as `_model` tells of one; how much of it is in the page cache is not known."""
    from pipeline.provenance import kept_sha256

    try:
        n_bytes = Path(path).stat().st_size
        sha256 = None if cache is None else kept_sha256([Path(path)], Path(cache))
    except OSError as error:
        return ModelFile(path, problem=f"{path}: {error.strerror or error}")
    return ModelFile(path, n_bytes, sha256=sha256)
