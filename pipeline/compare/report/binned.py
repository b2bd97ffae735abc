"""Tables of `table=tokens` -> the few numbers that a picture shows: histograms, means by place."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

LISTS = ("nll_base", "nll", "kld", "top_base", "top")

N_POSITIONS = 16
N_GROUPS = 40


class Targets(NamedTuple):
    """The scored targets of a pair, one after the other; all arrays are (n,).

    Attributes:
        row: which of the table's rows a target is in.
        place: where it is in the token stream.
        position: tokens before it: of its window, or of its document where windows carry on (`is_carried`),
            a BOS counted.
        nll_base, nll, kld: nats.
        top_base, top: ids of the most likely tokens.
    """

    row: Integers
    place: Integers
    position: Integers
    nll_base: Reals
    nll: Reals
    kld: Reals
    top_base: Integers
    top: Integers
    is_carried: bool

    @property
    def dp(self) -> Reals:
        """(n,) change of the target's probability, a fraction."""
        return np.asarray(np.exp(-self.nll) - np.exp(-self.nll_base))


def targets(windows: pa.Table) -> Targets | None:
    """The targets of those windows whose tokens were kept; None where none were."""
    if not set(LISTS) <= set(windows.column_names):
        return None
    has_lists = pc.is_valid(windows["kld"])
    rows = np.flatnonzero(has_lists.to_numpy(zero_copy_only=False))
    kept = windows.filter(has_lists)
    counts = _column(kept, "n_scored", np.int64)
    if not counts.sum():
        return None
    rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.repeat(_column(kept, "first_scored", np.int64), counts) + rank
    kinds: dict[str, Any] = {"top_base": np.int64, "top": np.int64}
    lists = {
        name: pc.list_flatten(kept[name]).to_numpy().astype(kinds.get(name, np.float64)) for name in LISTS
    }
    is_carried = "distance" in kept.column_names and kept["distance"].null_count == 0
    if is_carried:  # a document's first token, or its BOS, is not scored (protocols/carry.py)
        position = np.repeat(np.maximum(_column(kept, "distance", np.int64), 1), counts) + rank
    else:
        position = place - np.repeat(_column(kept, "first_token", np.int64), counts)
    return Targets(np.repeat(rows, counts), place, position, **lists, is_carried=is_carried)


def _column(windows: pa.Table, name: str, kind: Any) -> NDArray[Any]:
    return np.asarray(windows[name].to_numpy(), kind).copy()


SMALLEST = 1e-4
"""Δp is drawn on an axis that is linear below this and logarithmic above, on either side of zero."""


def probability_bins() -> Reals:
    """(62,) borders of Δp, of equal width on that axis, from -100 % to 100 %; zero is in a bin's middle."""
    end = np.log1p(1 / SMALLEST)
    along = np.linspace(-end, end, 62)
    borders = np.sign(along) * SMALLEST * np.expm1(np.abs(along))
    borders[0], borders[-1] = -1.0, 1.0  # which is what they are but for rounding
    return np.asarray(borders)


def histogram(dp: Reals, counts: Integers | None = None) -> Reals:
    """(61,) share of the targets in each of the bins; `counts` are how many each value stands for."""
    found, _ = np.histogram(np.clip(dp, -1.0, 1.0), probability_bins(), weights=counts)
    return np.asarray(found / found.sum())


def changes_of_sketches(windows: pa.Table) -> tuple[Reals, Integers] | None:
    """Δp of windows whose targets were not kept: the middles of the sketch's bins, and their counts.

    Bins are of relative width 2^-7 (pipeline/compare/sketch.py), far below what a picture shows.
    """
    if not {"dp_keys", "dp_counts"} <= set(windows.column_names):
        return None
    keys = pc.list_flatten(windows["dp_keys"]).to_numpy().astype(np.uint32)
    counts = pc.list_flatten(windows["dp_counts"]).to_numpy().astype(np.int64)
    if not keys.size:
        return None
    return (keys << 16 | 0x8000).view(np.float32).astype(np.float64), counts


class Means(NamedTuple):
    """Mean divergence of groups of targets: `x` and `to` are what the first and last of a group lie at."""

    x: Reals
    to: Reals
    kld: Reals


def by_position(found: Targets) -> Means:
    """Mean divergence in up to `N_POSITIONS` equal stretches of the window."""
    low, high = int(found.position.min()), int(found.position.max()) + 1
    borders = np.unique(np.linspace(low, high, min(N_POSITIONS, high - low) + 1).round()).astype(np.int64)
    group = np.searchsorted(borders, found.position, side="right") - 1
    kld = _means(found.kld, np.ones(found.kld.size), group, borders.size - 1)
    return Means(borders[:-1].astype(float), (borders[1:] - 1).astype(float), kld)


def by_document(windows: pa.Table) -> tuple[Means, bool]:
    """Mean divergence of each document, by its rank; of each window where all are of one document.

    More than `N_GROUPS` are put together, neighbours with neighbours.

    Returns:
        The means, and whether they are of documents.
    """
    document = _column(windows, "document", np.int64)
    is_apart = np.unique(document).size > 1
    keys, rank = np.unique(
        document if is_apart else _column(windows, "window", np.int64), return_inverse=True
    )
    n_groups = min(keys.size, N_GROUPS)
    group = rank * n_groups // keys.size
    kld = _means(_column(windows, "kld_sum", float), _column(windows, "n_scored", float), group, n_groups)
    first = np.searchsorted(np.arange(keys.size) * n_groups // keys.size, np.arange(n_groups + 1))
    return Means(keys[first[:-1]].astype(float), keys[first[1:] - 1].astype(float), kld), is_apart


def _means(sums: Reals, counts: Reals, group: Integers, n_groups: int) -> Reals:
    """(g,) NaN where a group is empty."""
    n = np.bincount(group, counts, n_groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.bincount(group, sums, n_groups) / n)
