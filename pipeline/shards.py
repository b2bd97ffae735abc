"""Windows -> shards: consecutive windows, as many in each, whatever the number of workers.

Windows that go on from each other (protocol `carry`) are cut by documents: short ones share a shard, and one
with more windows than a shard takes has shards of its own, which follow one another. The first leaves its
state for the second (pipeline/handover.py), and so on.

    windows of documents A, B, C    A0 A1 | B0 B1 B2 B3 B4 B5 | C0        four windows a shard
    shards                          A0 A1   B0 B1 B2 B3 -> B4 B5   C0
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.windows import Counts

_NAME = re.compile(r"shard-(\d{8})\.parquet")


@dataclass(frozen=True, order=True)
class Shard:
    """Windows [first_window, first_window + n_windows); a finished shard is its file.

    Attributes:
        resumes: its first window goes on from the state that the shard before it left.
        hands_on: the shard after it goes on from its state.
    """

    first_window: int
    n_windows: int
    resumes: bool = False
    hands_on: bool = False

    @property
    def id(self) -> int:
        """The shard's name in a run: its first window."""
        return self.first_window

    @property
    def end(self) -> int:
        """The first window that is not its own any more."""
        return self.first_window + self.n_windows

    @property
    def file_name(self) -> str:
        """`shard-<first window, 8 digits>.parquet`."""
        return f"shard-{self.first_window:08d}.parquet"


def plan(n_windows: int, windows_per_shard: int, begins: Counts | None = None) -> list[Shard]:
    """All shards of a run in window order; the last may be smaller.

    Args:
        begins: ranks of the windows that begin a document, where the others go on from the one before; the
            first of them is 0. Shards are then no larger, and cut by documents.

    Raises:
        ValueError: no windows, a shard of none, or more windows than a file name can number.
    """
    if not 0 < n_windows < 10**8 or windows_per_shard < 1:
        raise ValueError(f"cannot cut {n_windows} windows into shards of {windows_per_shard}")
    if begins is not None:
        return list(_by_documents([*begins.tolist(), n_windows], windows_per_shard))
    return [
        Shard(first, min(windows_per_shard, n_windows - first))
        for first in range(0, n_windows, windows_per_shard)
    ]


def n_abreast(shards: Sequence[Shard]) -> int:
    """Shards of the list that can be in work at once: those that follow no other one of it."""
    ends = {shard.end for shard in shards}
    return sum(not (shard.resumes and shard.first_window in ends) for shard in shards)


def _by_documents(borders: Sequence[int], per_shard: int) -> Iterator[Shard]:
    """Shards of documents whose windows are those between neighbours of `borders`."""
    first = 0  # of the shard that short documents are gathered in
    for begin, end in pairwise(borders):
        if end - first > per_shard and begin > first:
            yield Shard(first, begin - first)
            first = begin
        if end - begin > per_shard:
            for at in range(begin, end, per_shard):
                yield Shard(at, min(per_shard, end - at), at > begin, at + per_shard < end)
            first = end
    if first < borders[-1]:
        yield Shard(first, borders[-1] - first)


def first_window_of(file_name: str) -> int | None:
    """The first window that a shard's file name says, None when it is no shard's name."""
    match = _NAME.fullmatch(file_name)
    return int(match.group(1)) if match else None
