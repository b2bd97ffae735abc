"""What this host can hold: cores for threads, memory for batches. Looked at before anything is allocated.

Of a cluster's other hosts nothing is known here: `cluster=ray` places workers where the CPUs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import SettingsError
from pipeline.runtime import available_cores

if TYPE_CHECKING:
    import engine
    from pipeline.settings import EngineSettings, PerplexitySettings
    from pipeline.windows import CacheShape

BASE_BYTES = 150_000_000
"""Of a worker beside its model and its cache: the interpreter and the libraries."""
RAY_BYTES = 420_000_000
"""Of a Ray of our own beside its workers: the PSS of its seven processes, 340 MB (Ray 2.60.0), and its object
store's 80 MiB. An existing cluster's is in use already when its nodes are looked at."""
GB = 1e9

_MEMINFO, _CGROUPS, _OWN_CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = (  # of version 2 and version 1: the limit, what is in use, what of that can be freed (memory.stat)
    ("memory.max", "memory.current", "file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def check_threads(threads: int, key: str = "engine.threads") -> None:
    """Refuse more threads than cores: they would take turns.

    Raises:
        SettingsError: naming what there is.
    """
    cores = available_cores()
    if threads > cores:
        raise SettingsError(
            f"{key}={threads} is more than the cores that this process may use, {cores}",
            f"give {key}={cores} or less; its affinity and the container's CPU quota count",
        )


def check_run(
    file: engine.GGUFFile,
    settings: PerplexitySettings,
    n_shards: int,
    shape: Callable[[int], CacheShape],
    n_variants: int = 0,
) -> None:
    """Refuse a run whose workers will not fit into this host's memory.

    Args:
        settings: resolved.
        n_shards: that can be in work at once.
        shape: of a worker's cache, for a number of batch tokens.
        n_variants: of the model that a worker has open at once, in a comparison.

    Raises:
        SettingsError: naming the largest `engine.batch_tokens` that fits.
    """
    s, window = settings, settings.protocol.window
    if s.cluster.kind == "ray" or not n_shards:
        return
    n_workers = 1 if s.cluster.kind == "inline" else s.cluster.workers or 0
    n_workers = n_workers or max(1, min(available_cores() // s.engine.threads, n_shards))

    def need(batch_tokens: int) -> int:
        own = worker_bytes(file, s.engine, batch_tokens, shape(batch_tokens), n_variants)
        beside = RAY_BYTES if s.cluster.kind == "local" else 0
        return beside + n_workers * own + loaded_bytes(file, s.engine.load, n_workers)

    workers = "1 worker wants" if n_workers == 1 else f"{n_workers} workers want"
    fewer = ", cluster.workers=1" if n_workers > 1 else ""
    check_batch(need, s.engine.batch_tokens, window, workers, f"{fewer} or engine.kv=f16")


def worker_bytes(
    file: engine.GGUFFile,
    settings: EngineSettings,
    batch_tokens: int,
    shape: CacheShape,
    n_variants: int = 0,
) -> int:
    """Anonymous bytes of a worker: its interpreter, the model's activations and scratch, and its cache."""
    import engine

    return BASE_BYTES + engine.footprint(
        file,
        threads=settings.threads,
        batch_tokens=batch_tokens,
        kv=settings.kv,
        activations=settings.activations,
        n_variants=n_variants,
        **shape._asdict(),
    )


def check_batch(
    need: Callable[[int], int], batch_tokens: int, window: int, subject: str, hint: str = ""
) -> None:
    """Refuse a batch that does not fit into the memory that is left.

    Args:
        need: bytes that a number of batch tokens takes; grows with it, but for a fall at `window`, from which
            on whole windows fit and a layer's keys give way to the next one's.
        subject: who wants them, for the message.
        hint: other ways on.

    Raises:
        SettingsError: naming the largest number that fits.
    """
    left = available_bytes()
    if left is None or need(batch_tokens) <= left:
        return
    largest = _largest(need, left, batch_tokens, window)
    told = (
        f"the largest that fits is engine.batch_tokens={largest}"
        if largest
        else f"not even engine.batch_tokens=1 fits, which takes {need(1) / GB:,.1f} GB"
    )
    raise SettingsError(
        f"engine.batch_tokens={batch_tokens}: {subject} {need(batch_tokens) / GB:,.1f} GB, and this machine "
        f"has {left / GB:,.1f} GB left; {told}",
        (f"engine.batch_tokens={largest}" if largest else "a smaller window") + hint,
    )


def loaded_bytes(file: engine.GGUFFile, load: str, n_workers: int) -> int:
    """Bytes that the weights themselves take from the memory left; pages that are only mapped give way."""
    if load == "copy":
        return n_workers * file.n_bytes
    return file.n_bytes if load == "mlock" else 0


def available_bytes() -> int | None:
    """Bytes that new allocations can have: the machine's, and what each control group around us leaves.

    None where the kernel does not say.
    """
    left = list(_cgroups_leave())
    with suppress(OSError, ValueError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    return min(left, default=None)


def _largest(need: Callable[[int], int], left: int, below: int, window: int) -> int:
    """The largest number of tokens below `below` that needs at most `left`; 0 when none does."""
    for low, high in ((window, below - 1), (1, min(window, below) - 1)):
        if low > high or need(low) > left:
            continue
        while low < high:  # need(low) fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if need(middle) <= left else (low, middle - 1)
        return low
    return 0


def _cgroups_leave() -> Iterator[int]:
    """What is left in each control group of this process that has a limit, the page cache given back."""
    with suppress(OSError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = _CGROUPS / controllers
            group = root / path.strip("/")
            for folder in (group, *group.parents):
                yield from _leaves(folder)
                if folder == root:
                    break


def _leaves(folder: Path) -> Iterator[int]:
    for limit, usage, cache in _LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most - used + int(fields.get(cache, 0))
