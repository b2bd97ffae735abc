"""Quantile sketches that add up exactly: counts of values that share the first 16 bits of their float32.

A bin is named by those bits (sign, exponent and seven bits of the mantissa), so it is a fixed interval of
relative width 2^-7 or less, the same for every table, host and data. A sketch is the counts of the bins
that hold something. Merging adds counts, which are integers: order and shards do not matter to a bit, unlike
in sketches that choose their bins from the data (t-digest, KLL).

A quantile is exact but for the place of a value within its bin, where the bin's values are taken to be spread
evenly: each order statistic is off by less than one bin, 2^-7 of its size, and by far less where bins are
full. What is below 2^-133 in size counts as 0 exactly. Divergences of any number of tokens fill some hundreds
to two thousand bins of 8 bytes, where the values themselves take 4 for each token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RELATIVE_WIDTH = 2.0**-7
"""Of a bin: its width over its smallest size."""

_SIGN = 0x8000
_INFINITE = 0x7F80
"""The key of infinity; NaN and infinity are the keys from here up, in size."""


@dataclass(frozen=True)
class Sketch:
    """Counts of bins.

    Attributes:
        keys: (k,) int32, float32 bits >> 16, distinct and rising as numbers (not as the values they name).
        counts: (k,) int64, at least 1.
    """

    keys: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    @property
    def n(self) -> int:
        """How many values are in it."""
        return int(self.counts.sum())


def sketch(values: npt.ArrayLike) -> Sketch:
    """The sketch of finite values, of any shape; they are rounded to float32 first.

    Raises:
        ValueError: a value is not finite, or is beyond float32.
    """
    with np.errstate(over="ignore"):
        rounded = np.asarray(values, np.float64).astype(np.float32).ravel()
    keys = (rounded.view(np.uint32) >> 16).astype(np.int32)
    if np.any(keys & 0x7FFF >= _INFINITE):
        raise ValueError("a sketch holds finite values within float32 only")
    return _counted(np.where(keys == _SIGN, 0, keys), np.ones(keys.size, np.int64))


def merged(sketches: Iterable[tuple[npt.ArrayLike, npt.ArrayLike]]) -> Sketch:
    """The sketch of all values together.

    Args:
        sketches: (keys, counts) of each, as the list columns of a table hold them; `Sketch` itself unpacked
            is `(s.keys, s.counts)`.
    """
    pairs = [(np.asarray(keys, np.int32), np.asarray(counts, np.int64)) for keys, counts in sketches]
    if not pairs:
        return Sketch(np.empty(0, np.int32), np.empty(0, np.int64))
    return _counted(np.concatenate([keys for keys, _ in pairs]), np.concatenate([n for _, n in pairs]))


def quantiles(found: Sketch, fractions: Iterable[float]) -> list[float]:
    """Quantiles by linear interpolation between order statistics, as `statistics.percentile` defines them.

    Raises:
        ValueError: the sketch is empty.
    """
    if not found.n:
        raise ValueError("an empty sketch has no quantiles")
    low, high = _edges(found.keys)
    order = np.argsort(low, kind="stable")
    low, high, counts = low[order], high[order], found.counts[order]
    ends = np.cumsum(counts)

    def at(rank: int) -> float:
        """The value of a rank from 0: in the middle of its share of the bin."""
        bin_ = int(np.searchsorted(ends, rank, side="right"))
        place = (rank - (ends[bin_] - counts[bin_]) + 0.5) / counts[bin_]
        return float(low[bin_] + place * (high[bin_] - low[bin_]))

    values = []
    for fraction in fractions:
        position = fraction * (found.n - 1)
        below = min(int(position), found.n - 1)
        share = position - below
        values.append((1 - share) * at(below) + (share * at(below + 1) if share else 0.0))
    return values


def _counted(keys: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> Sketch:
    """Equal keys added up."""
    names, place = np.unique(keys, return_inverse=True)
    totals = np.zeros(names.size, np.int64)
    np.add.at(totals, place, counts)
    return Sketch(names.astype(np.int32), totals)


def _edges(keys: npt.NDArray[np.int32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(k,) float64 lower and upper ends of bins, as numbers; the bin of zero is the point 0."""
    size = keys.astype(np.uint32) & 0x7FFF
    near = (size << 16).view(np.float32).astype(np.float64)
    # The size above the largest finite one would be infinity's; its bin ends at 2^128 all the same.
    after = np.where(size + 1 < _INFINITE, size + 1, 0)
    far = np.where(after == 0, 2.0**128, (after << 16).astype(np.uint32).view(np.float32).astype(np.float64))
    far = np.where(size == 0, 0.0, far)
    negative = keys & _SIGN != 0
    return np.where(negative, -far, near), np.where(negative, -near, far)
