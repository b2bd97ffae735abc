"""Which neighbours on the size ladder differ: each tested against the next, corrected for their number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.compare import sequence, student
from pipeline.metrics import clustered_stderr

Floats = npt.NDArray[np.float64]


def smallest_difference(stderr: float, n_windows: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true mean that a two-sided t-test at `alpha` over `n_windows` >= 2 sees with chance `power`."""
    df = n_windows - 1
    return (student.quantile(1 - alpha / 2, df) + student.quantile(power, df)) * stderr


def paired_test(differences: Floats, counts: npt.NDArray[np.int64]) -> float | None:
    """Two-sided p that the mean difference per target is zero: a paired t-test over windows.

    The mean weighs windows by their counts and its error is the clustered one above, so with windows of one
    length it is the paired t-test of window means, and always the test that goes with the error in the
    table. It takes windows to be independent and their mean to be near normal, which some twenty windows of
    255 targets are; it asks neither for symmetric differences, as a sign-flip test does, nor for a seed. With
    windows of one length and normal means it is exact for any number of them.

    Args:
        differences: float64 (G,) sums over each window of one variant's nll less the other's.
        counts: (G,) targets of each window.

    Returns:
        None for fewer than two windows; 1 where no window differs.
    """
    if differences.size < 2:
        return None
    mean = math.fsum(differences.tolist()) / int(counts.sum())
    if mean == 0:
        return 1.0
    stderr = clustered_stderr(differences, counts)
    return student.two_sided_p(mean / stderr if stderr else math.inf, differences.size - 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (Holm 1979, Scand. J. Statist. 6, 65-70); None is no test, and stays."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class Rung:
    """A variant on the size ladder.

    Attributes:
        name: as in the report.
        bytes: size of the file.
        window: (G,) int64, distinct, in the order in which they were taken.
        nll_sum: (G,) float64 nats; n_scored: (G,) integers.
    """

    name: str
    bytes: int
    window: npt.NDArray[np.int64]
    nll_sum: Floats
    n_scored: npt.NDArray[np.int64]


def neighbours(ladder: Sequence[Rung], *, anytime: bool = False) -> list[float | None]:
    """`p_vs_next` of every rung, in the order given: against the next smaller file, Holm-corrected.

    Sizes fall along the ladder (the order given decides between equal ones). Each variant is tested against
    the next over the windows that both have, and the p values are adjusted together, so that the chance of
    any false difference on the whole ladder stays below the level that one reads them at. The smallest file
    has None.

    Args:
        anytime: the number of windows was decided by looking at the scores (`stop=decided`): the p is
            `sequence.anytime_p`, which stays true then, where that of `paired_test` is too small.
    """
    test = sequence.anytime_p if anytime else paired_test
    order = sorted(range(len(ladder)), key=lambda place: -ladder[place].bytes)
    p_values: list[float | None] = [None] * len(ladder)
    for place, following in itertools.pairwise(order):
        one, other = ladder[place], ladder[following]
        mine, by_window = np.isin(one.window, other.window), np.argsort(other.window)
        theirs = by_window[np.searchsorted(other.window[by_window], one.window[mine])]
        p_values[place] = test(
            one.nll_sum[mine] - other.nll_sum[theirs], np.asarray(one.n_scored, np.int64)[mine]
        )
    return holm(p_values)
