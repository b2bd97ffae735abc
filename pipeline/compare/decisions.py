"""When a comparison has seen enough: `stop=decided`.

Neighbours on the size ladder are told apart by a confidence sequence on their windows (sequence.py), a
single variant from its base. When all are, no more shards are handed out. Windows are taken in an order that
is drawn (`Planned.order`), for neighbours in a text are alike. What is decided is a function of the scores in
that order alone: the windows before the stopping point are used and no others, whatever else was computed, so
workers, shards and kills do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import store
from pipeline.compare.plan import Pair
from pipeline.compare.sequence import decided
from pipeline.shards import Shard
from pipeline.tables import TOKENS_SCHEMA

_COLUMNS = ("nll_base_sum", "nll_sum", "n_scored")
Columns = dict[str, npt.NDArray[Any]]


class Decisions:
    """What the finished shards decide.

    Args:
        pairs: the largest variant first.
        alpha: the probability that any decision is wrong; each has its share.
        order: (G,) int64, all windows in the order in which they are taken.

    Attributes:
        at: by key of the larger variant, or of the only one: windows that told it from its neighbour.
        stop: windows after which all are told apart, None while they are not.
    """

    def __init__(self, pairs: Sequence[Pair], alpha: float, order: npt.NDArray[np.int64]) -> None:
        self.at: dict[str, int] = {}
        self.stop: int | None = None
        self._pairs, self._order = list(pairs), order
        self._alpha = alpha / max(1, len(pairs) - 1)
        self._rows: dict[str, Columns] = {
            pair.key: {name: np.full(order.size, np.nan) for name in _COLUMNS} for pair in pairs
        }
        self._read: set[tuple[str, Shard]] = set()
        self._n = 0

    @property
    def counted(self) -> npt.NDArray[np.int64]:
        """(n,) windows that count, in the order in which they were taken."""
        return self._order[: self.stop]

    def update(self, finished: Mapping[str, Mapping[Shard, Path]]) -> bool:
        """Look at shards by key of their pair; True when no more are needed.

        Raises:
            StorageFailure: one cannot be read.
        """
        for pair in self._pairs:
            self._take(pair, finished[pair.key])
        rows = [{n: c[self._order] for n, c in self._rows[pair.key].items()} for pair in self._pairs]
        lacking = np.isnan([columns["nll_sum"] for columns in rows]).any(axis=0)
        n = int(lacking.argmax()) if lacking.any() else lacking.size
        if self.stop is not None or n <= self._n:
            return self.stop is not None
        self._n = n
        sides = [(pair.key, columns["nll_sum"]) for pair, columns in zip(self._pairs, rows, strict=True)]
        if len(sides) == 1:
            sides.append(("", rows[0]["nll_base_sum"]))
        counts = rows[0]["n_scored"][:n].astype(np.int64)
        for (key, mine), (_, other) in pairwise(sides):
            at = decided(mine[:n] - other[:n], counts, alpha=self._alpha)
            if at is not None:
                self.at[key] = at
        if len(self.at) == len(sides) - 1:
            self.stop = max(self.at.values())
        return self.stop is not None

    def _take(self, pair: Pair, paths: Mapping[Shard, Path]) -> None:
        for shard, path in paths.items():
            if (pair.key, shard) in self._read:
                continue
            table = store.read_windows({shard: path}, TOKENS_SCHEMA, _COLUMNS)
            for name, column in self._rows[pair.key].items():
                column[shard.first_window : shard.end] = table.column(name).to_numpy()
            self._read.add((pair.key, shard))
