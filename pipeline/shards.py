"""Windows -> shards: a fixed number of consecutive windows each, whatever the number of workers."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"shard-(\d{8})\.parquet")


@dataclass(frozen=True, order=True)
class Shard:
    """Windows [first_window, first_window + n_windows); a finished shard is its file."""

    first_window: int
    n_windows: int

    @property
    def id(self) -> int:
        """The shard's name in a run: its first window."""
        return self.first_window

    @property
    def file_name(self) -> str:
        """`shard-<first window, 8 digits>.parquet`."""
        return f"shard-{self.first_window:08d}.parquet"


def plan(n_windows: int, windows_per_shard: int) -> list[Shard]:
    """All shards of a run in window order; the last may be smaller.

    Raises:
        ValueError: no windows, a shard of none, or more windows than a file name can number.
    """
    if not 0 < n_windows < 10**8 or windows_per_shard < 1:
        raise ValueError(f"cannot cut {n_windows} windows into shards of {windows_per_shard}")
    return [
        Shard(first, min(windows_per_shard, n_windows - first))
        for first in range(0, n_windows, windows_per_shard)
    ]


def first_window_of(file_name: str) -> int | None:
    """The first window that a shard's file name says, None when it is no shard's name."""
    match = _NAME.fullmatch(file_name)
    return int(match.group(1)) if match else None
