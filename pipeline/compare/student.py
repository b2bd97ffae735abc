"""Student's t: its tail and its quantiles, without SciPy.

The two-sided tail is a regularized incomplete beta function,

    P(|T| >= t) = I_x(v / 2, 1 / 2),   x = v / (v + t^2)

which is summed by its continued fraction (DLMF 8.17.22, https://dlmf.nist.gov/8.17#v), evaluated from the
front by Lentz's method. It keeps its relative precision in the tail, so that a p of 1e-40 is one.
"""

from __future__ import annotations

import math

_TINY = 1e-300


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) for `df` > 0 degrees of freedom; 0 for an infinite t."""
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(df / 2, 0.5, df / (df + square), square / (df + square))


def quantile(probability: float, df: float) -> float:
    """The t with P(T <= t) = probability, 0.5 <= probability < 1, to the last bits."""
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > tail:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        low, high = (middle, high) if two_sided_p(middle, df) > tail else (low, middle)


def _incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b) where x + complement = 1, each given so that neither loses its bits to 1 - the other."""
    if x == 0 or complement == 0:
        return 0.0 if x == 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, complement, x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(complement) - log_beta) / a
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < 4e-16:
            break
    return front * fraction


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
