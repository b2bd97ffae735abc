"""When a difference is decided: a confidence sequence on window means, for `stop=decided`.

An interval for a number of windows fixed beforehand is wrong far more often than 5 % for one who looks after
each window and stops when it leaves out zero. A confidence sequence holds at all numbers of windows at once.
After n windows with mean m and clustered error s of the difference (nats per target; statistics.py), so that
t = m / s, the evidence against a mean of zero is

    e = (1 + n c^2)^(-1/2) ((1 + t^2 / v) / (1 + t^2 / (v (1 + n c^2))))^(n / 2)        v = n - 1

a Bayes factor of the t-test: the right Haar prior on a window's standard deviation, a normal one of variance
c^2 on mean / deviation. For independent normal windows of any variance it is a martingale that starts at 1,
so it ever reaches 1 / alpha with probability at most alpha (Ville), at any n and with no variance plugged in.
The interval is of the means that are not refused so. Source: Wang & Ramdas 2023,
https://arxiv.org/abs/2310.03722 (Lai's sequential t-test with a Gaussian mixture). For other windows it holds
as n grows, like the asymptotic sequences of Waudby-Smith et al. 2024, https://arxiv.org/abs/2103.06476, which
it approaches; those take the variance as known and so stop wrongly in 7 % of null runs of normal windows from
8 windows on, this in 3 %.

Order matters. Windows that follow each other in a text are alike: of Q8_0 less its base (SmolLM2 on
wiki.test.raw) the mean of 8 neighbours varies 1.6 times as much as that of any 8, though hardly more of
Q4_K_M. In the order of the text a sequence, and a fixed number of windows too, speaks about the articles at
its beginning. `visiting_order` draws windows, or shards of a few, without replacement; then what is decided
is what all of the text would say.

Measured at alpha 0.05 on 240 real windows (tests/golden/window_nll.npz), 2,000 runs of up to 592 windows:

    wrong stops of null runs            Q8_0     Q4_K_M
    centred windows drawn at random     3.0 %    3.3 %
    windows with random signs           3.5 %    4.3 %
    shards of 4 in visiting order       3.1 %    2.1 %     (centred, all 240 once)
    16 neighbours at a time             14 %     5.4 %     (centred; in the order of the text)

    mean / deviation of a window        0.2      0.3      0.5      1.0      Q8_0 0.52    Q4_K_M 1.94
    decided by 40 windows               7 %      16 %     58 %     100 %    63 %         100 %
    windows until decided, mean         223      105      41       18       39           16
    t-test on 40 windows, for 5 %       24 %     45 %     88 %     100 %    90 %         100 %

So of what a test on a fixed 40 windows sees, the sequence sees two thirds by then, but it may go on until it
sees the rest, and stops at 16 where the answer is plain.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEAST_WINDOWS = 16
"""Nothing is decided on fewer: a mean of less is not near enough to normal."""
EFFECT_VARIANCE = 0.2
"""c^2 above: variance of the prior of mean / deviation of a window; narrowest at some 40 windows."""


def visiting_order(n: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """(n,) a permutation of range(n) to take windows, or shards of them, in; the same for every NumPy."""
    order = np.arange(n, dtype=np.int64)
    raw = np.random.PCG64(seed).random_raw(n)
    for last in range(n - 1, 0, -1):
        chosen = (int(raw[last]) * (last + 1)) >> 64
        order[[last, chosen]] = order[[chosen, last]]
    return order


def confidence_sequence(
    differences: Floats, counts: npt.NDArray[np.int64], *, alpha: float = 0.05
) -> tuple[Floats, Floats]:
    """Lower and upper ends after each window; the mean is between all of them with probability 1 - alpha.

    Args:
        differences: float64 (..., G) sums over each window of one variant's nll less the other's, in window
            order; leading axes are runs of their own.
        counts: (G,) targets of each window.
        alpha: error of the whole sequence; to decide m pairs together, hand in alpha / m.

    Returns:
        float64 (..., G) each, nats per target; infinite where windows are too few to bound anything.
    """
    n, mean, spread = _running(differences, counts)
    inflation = 1 + n * EFFECT_VARIANCE
    needed = np.exp(2 / n * (0.5 * np.log(inflation) - math.log(alpha)))
    bounded = (n >= LEAST_WINDOWS) & (needed < inflation)
    reach = np.full(mean.shape, np.inf)
    squared = (needed[bounded] - 1) / (1 - needed[bounded] / inflation[bounded])
    reach[..., bounded] = np.sqrt(spread[..., bounded] * squared)
    return mean - reach, mean + reach


def decided(
    differences: Floats,
    counts: npt.NDArray[np.int64],
    *,
    alpha: float = 0.05,
    effect: float | None = None,
) -> int | None:
    """After how many windows, from the first, the difference is decided; None while it is not.

    It is where the confidence sequence leaves out zero, or is narrower than `effect`, the smallest
    difference of interest in nats per target: then it is known to better than that, and if zero is still
    inside, it is smaller than that.

    Args:
        differences, counts, alpha: as for `confidence_sequence`; more windows never change an answer.
    """
    low, high = confidence_sequence(differences, counts, alpha=alpha)
    settled = (low > 0) | (high < 0)
    if effect is not None:
        settled |= high - low < effect
    return int(np.argmax(settled)) + 1 if settled.any() else None


def anytime_p(differences: Floats, counts: npt.NDArray[np.int64]) -> float | None:
    """p that the mean is zero, true whenever one chose to stop: at most alpha where `decided` left out zero.

    It is the inverse of the largest e so far, from `LEAST_WINDOWS` on; None for fewer windows.
    """
    if differences.size < LEAST_WINDOWS:
        return None
    n, mean, spread = _running(differences, counts)
    inflation = 1 + n * EFFECT_VARIANCE
    square = mean * mean
    size = spread + square
    # All windows alike in mean and error zero: no evidence, a ratio of 1.
    ratio = np.divide(size, spread + square / inflation, out=np.ones(n.size), where=size > 0)
    log_e = n / 2 * np.log(ratio) - 0.5 * np.log(inflation)
    return math.exp(min(0.0, -float(log_e[LEAST_WINDOWS - 1 :].max())))


def _running(differences: Floats, counts: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """After each window: their number, the mean per target, and (n - 1) times its squared clustered error."""
    c = counts.astype(np.float64)
    n, total = np.arange(1.0, c.size + 1), np.cumsum(c)
    mean = np.cumsum(differences, axis=-1) / total
    squares = np.cumsum(differences**2, axis=-1)
    squares += mean**2 * np.cumsum(c * c) - 2 * mean * np.cumsum(differences * c, axis=-1)
    return n, mean, np.maximum(squares, 0.0) * n / total**2
