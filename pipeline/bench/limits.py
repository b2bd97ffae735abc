"""The limits of the machine that engines are held against, and the cores that all of them share."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_WIDER = {  # features by which bytes multiply faster than float32, and what a machine with one is called
    "amx-int8": "amx",
    "avx512vnni": "vnni",
    "avxvnni": "vnni",
}
_TOLD = ("avx", "fma", "f16c", "amx")


@dataclass
class Limits:
    """What the cores can do, measured again and again between the rounds: on a shared machine it moves.

    Attributes:
        gflops: float32 multiply-adds, GFLOP/s.
        gb_per_s: reading memory, GB/s.
    """

    threads: int
    cores: Sequence[int]
    gflops: list[float] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Measure both, a tenth of a second each."""
        import engine

        with pinned(self.cores):
            self.gflops.append(engine.fma_gflops(self.threads, seconds=0.02))
            self.gb_per_s.append(engine.read_gb_per_s(self.threads))

    def of_round(self) -> tuple[float, float]:
        """GFLOP/s and GB/s of the round between the last two measurements: their means."""
        return statistics.fmean(self.gflops[-2:]), statistics.fmean(self.gb_per_s[-2:])

    def since(self, n: int) -> tuple[float, float]:
        """Medians of GFLOP/s and GB/s, without the first `n` measurements."""
        return statistics.median(self.gflops[n:]), statistics.median(self.gb_per_s[n:])


def case_of(features: Sequence[str]) -> str:
    """`amx` or `vnni` where the CPU multiplies bytes faster than float32, `f32` where it does not."""
    found = {name for feature, name in _WIDER.items() if feature in features}
    return "amx" if "amx" in found else "vnni" if found else "f32"


def vector_features() -> list[str]:
    """The CPU's features that matter to arithmetic, as LLVM names them."""
    import engine

    return sorted(feature for feature in engine.cpu_features() if feature.startswith(_TOLD))


def pick_cores(n: int) -> list[int]:
    """`n` CPUs of this process's affinity; those that share no core with one already taken come first."""
    cpus = sorted(os.sched_getaffinity(0))
    rank = {cpu: _siblings(cpu).index(cpu) for cpu in cpus}
    return sorted(sorted(cpus, key=lambda cpu: (rank[cpu], cpu))[:n])


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """This thread, and those that it starts meanwhile, on these CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _siblings(cpu: int) -> list[int]:
    """CPUs of one core, in order; the CPU alone where the kernel does not say."""
    with suppress(OSError, ValueError):
        text = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
        ranges = [part.partition("-") for part in text.strip().split(",")]
        found = [i for first, _, last in ranges for i in range(int(first), int(last or first) + 1)]
        if cpu in found:
            return found
    return [cpu]
