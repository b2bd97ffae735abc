"""Figures of one variant against its base: llama.cpp's, in float64, and errors that hold for text.

A scored target i of N has the negative log-likelihoods (nats) q_i under the variant and b_i under the base,
the divergence k_i = KL(base || variant) over the whole vocabulary, and d_i = exp(-q_i) - exp(-b_i), by which
the token that came became more probable. Targets stand in G windows. A figure is as
`llama-perplexity --kl-divergence` defines it (examples/perplexity, build 11434); err is one standard error:

    err(x)            sqrt((mean(x^2) - mean(x)^2) / (N - 1))        targets as if independent
    cov               (mean(q b) - mean(q) mean(b)) / (N - 1)
    ppl, ppl_base     exp(mean(q)), exp(mean(b))      +- u = ppl * err(q), v = ppl_base * err(b)
    corr              cov / (err(q) err(b))
    ln_ratio          mean(q) - mean(b)               +- sqrt(err(q)^2 + err(b)^2 - 2 cov)
    ratio             exp(ln_ratio)                   +- ratio * ln_ratio_stderr
    ppl_diff          ppl - ppl_base                  +- sqrt(u^2 + v^2 - 2 ppl ppl_base cov)
    kld_*             of k: mean +- err(k), largest, percentiles, smallest
    dp_*              of d: the same; dp_rms sqrt(mean(d^2)) +- err(d^2) / (2 dp_rms)
    same_top          share p of targets whose most likely token is the same +- sqrt(p (1 - p) / (N - 1))
    percentile f      linear between the sorted values around place f (N - 1), from 0

Where llama.cpp differs: q, b, k and d are float32 there, and the squares of q and d float32 products; a
percentile's place is a float32, for 150,000 targets off by up to a hundredth of a place; an error is 0 for
ten targets or fewer, here None for one. `corr`, `dp_*` and `same_top` are fractions here and percent there
(and in kld_block.py).

Targets of one window share their context, so they vary together and N overstates what is known. So there are
beside llama.cpp's errors, clusters = windows:

    *_stderr_clustered       sqrt(G / (G - 1) sum_g (S_g - m n_g)^2) / N    S_g, n_g: a window's sum, count
    ln_ratio_low, ..._high   95 % block bootstrap over windows (bootstrap.py); kld_mean_low, ..._high
    smallest_ln_ratio        (t_0.975 + t_0.8) ln_ratio_stderr_clustered, t with G - 1 degrees of freedom

The first is CR1 around the mean m, as metrics.py has it (Liang & Zeger 1986). The last is the smallest true
difference that so many windows see in 80 % of samples with a two-sided test at 5 % (Bloom 1995,
https://doi.org/10.1177/0193841X9501900504). They take windows as independent, which those of one article are
not quite: for other articles they are still too small, up to a quarter on wiki.test.raw (sequence.py).

Everything starts from sums over each window, `math.fsum`s, which are correctly rounded, and adds those up the
same way: no order, shard or worker changes a bit. The exp of d is libm's, target by target, as NumPy's
differs between vector widths. Percentiles come from the targets themselves or from sketches (sketch.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.compare import bootstrap
from pipeline.compare.bootstrap import percentile
from pipeline.compare.ladder import Rung, neighbours, paired_test, smallest_difference
from pipeline.compare.sketch import Sketch, quantiles
from pipeline.metrics import clustered_stderr

__all__ = [
    "Rung",
    "Targets",
    "figures",
    "figures_of_sums",
    "neighbours",
    "paired_test",
    "percentile",
    "probability_change",
    "window_sums",
]

Floats = npt.NDArray[np.float64]

KLD_PERCENTILES = {
    "p999": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.9,
    "p50": 0.5,
    "p10": 0.1,
    "p05": 0.05,
    "p01": 0.01,
    "p001": 0.001,
}
DP_PERCENTILES = {**KLD_PERCENTILES, "p75": 0.75, "p25": 0.25}

SUMS = (
    "nll_base_sum",
    "nll_sum",
    "nll_base_sq_sum",
    "nll_sq_sum",
    "nll_cross_sum",
    "kld_sum",
    "kld_sq_sum",
    "dp_sum",
    "dp_sq_sum",
    "dp_quad_sum",
    "n_same_top",
    "n_scored",
)
EXTREMES = ("kld_max", "kld_min", "dp_max", "dp_min")


@dataclass(frozen=True)
class Targets:
    """All scored targets of a base and a variant, in window order.

    Attributes:
        window: (n,) int64, never falling.
        nll_base, nll, kld: (n,) float64, nats.
        same_top: (n,) bool.

    Raises:
        ValueError: no targets, lengths that differ, windows out of order, a value that is not finite.
    """

    window: npt.NDArray[np.int64]
    nll_base: Floats
    nll: Floats
    kld: Floats
    same_top: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        n = self.window.size
        columns = {name: getattr(self, name) for name in ("nll_base", "nll", "kld", "same_top")}
        if not n or any(column.shape != (n,) for column in columns.values()):
            sizes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
            raise ValueError(f"targets: window ({n},), {sizes}; expected one length, at least 1")
        if np.any(np.diff(self.window) < 0):
            raise ValueError("targets are not in window order")
        for name in ("nll_base", "nll", "kld"):
            if not np.isfinite(columns[name]).all():
                raise ValueError(f"targets: {name} holds values that are not finite")

    @property
    def dp(self) -> Floats:
        """(n,) float64, the variant's probability of the token that came less the base's."""
        return probability_change(self.nll_base, self.nll)


def probability_change(nll_base: Floats, nll: Floats) -> Floats:
    """float64 exp(-nll) - exp(-nll_base), the same bits for every vector width."""
    pairs = zip(nll.tolist(), nll_base.tolist(), strict=True)
    return np.array([math.exp(-q) - math.exp(-b) for q, b in pairs], np.float64)


def window_sums(
    nll_base: Floats, nll: Floats, kld: Floats, same_top: npt.NDArray[np.bool_]
) -> dict[str, float | int]:
    """The columns `SUMS` and `EXTREMES` of one window's (n,) targets, n at least 1."""
    dp = probability_change(nll_base, nll)
    squared = dp * dp
    return {
        "nll_base_sum": _sum(nll_base),
        "nll_sum": _sum(nll),
        "nll_base_sq_sum": _sum(nll_base * nll_base),
        "nll_sq_sum": _sum(nll * nll),
        "nll_cross_sum": _sum(nll * nll_base),
        "kld_sum": _sum(kld),
        "kld_sq_sum": _sum(kld * kld),
        "dp_sum": _sum(dp),
        "dp_sq_sum": _sum(squared),
        "dp_quad_sum": _sum(squared * squared),
        "n_same_top": int(np.count_nonzero(same_top)),
        "n_scored": nll.size,
        "kld_max": float(kld.max()),
        "kld_min": float(kld.min()),
        "dp_max": float(dp.max()),
        "dp_min": float(dp.min()),
    }


def figures(targets: Targets) -> dict[str, Any]:
    """Every figure above; None where one is not defined, as the error of one target or one window."""
    starts = np.flatnonzero(np.diff(targets.window, prepend=targets.window[0] - 1))
    parts = [
        window_sums(*columns)
        for columns in zip(
            *(
                np.split(np.asarray(column), starts[1:])
                for column in (targets.nll_base, targets.nll, targets.kld, targets.same_top)
            ),
            strict=True,
        )
    ]
    windows = {name: np.array([part[name] for part in parts]) for name in (*SUMS, *EXTREMES)}
    kld, dp = np.sort(targets.kld), np.sort(targets.dp)
    return _figures(
        windows,
        {name: percentile(kld, fraction) for name, fraction in KLD_PERCENTILES.items()},
        {name: percentile(dp, fraction) for name, fraction in DP_PERCENTILES.items()},
    )


def figures_of_sums(
    windows: Mapping[str, npt.NDArray[Any]], sketches: Mapping[str, Sketch]
) -> dict[str, Any]:
    """The same figures where targets were not kept: to the bit, but for percentiles, which are within 2^-7.

    Args:
        windows: columns of the pairs' table, (G,) each: `window`, `SUMS`, `EXTREMES`; rows in any order.
        sketches: `kld` and `dp` of all windows together.

    Raises:
        ValueError: no windows, or a sum that is not finite.
    """
    order = np.argsort(windows["window"], kind="stable")
    columns = {name: np.asarray(windows[name])[order] for name in (*SUMS, *EXTREMES)}
    if not order.size:
        raise ValueError("no windows to make figures of")
    for name, column in columns.items():
        if not np.isfinite(column).all():
            raise ValueError(f"windows: {name} holds values that are not finite")

    def of(name: str, fractions: Mapping[str, float]) -> dict[str, float]:
        low, high = float(columns[f"{name}_min"].min()), float(columns[f"{name}_max"].max())
        found = quantiles(sketches[name], fractions.values())
        return {key: min(max(value, low), high) for key, value in zip(fractions, found, strict=True)}

    return _figures(columns, of("kld", KLD_PERCENTILES), of("dp", DP_PERCENTILES))


def _figures(
    windows: Mapping[str, npt.NDArray[Any]], kld: Mapping[str, float], dp: Mapping[str, float]
) -> dict[str, Any]:
    """The figures from sums over windows, in window order, and percentiles."""
    counts = np.asarray(windows["n_scored"], np.int64)
    n, n_windows = int(counts.sum()), counts.size
    mean = {name: _sum(windows[name]) / n for name in SUMS}
    q, b = mean["nll_sum"], mean["nll_base_sum"]

    def error(average: float, average_of_squares: float) -> float | None:
        return math.sqrt(max(average_of_squares - average * average, 0.0) / (n - 1)) if n > 1 else None

    def clustered(sums: npt.NDArray[Any]) -> float | None:
        return clustered_stderr(np.asarray(sums, np.float64), counts) if n_windows > 1 else None

    q_error, b_error = error(q, mean["nll_sq_sum"]), error(b, mean["nll_base_sq_sum"])
    covariance = (mean["nll_cross_sum"] - q * b) / (n - 1) if n > 1 else 0.0
    corr = ratio_error = diff_error = None
    ppl, ppl_base, ratio = _exp(q), _exp(b), _exp(q - b)
    if q_error is not None and b_error is not None:
        if q_error > 0 and b_error > 0:
            corr = min(max(covariance / (q_error * b_error), -1.0), 1.0)
        ratio_error = math.sqrt(max(q_error**2 + b_error**2 - 2 * covariance, 0.0))
        if ppl is not None and ppl_base is not None:
            spread = (ppl * q_error) ** 2 + (ppl_base * b_error) ** 2 - 2 * ppl * ppl_base * covariance
            diff_error = math.sqrt(max(spread, 0.0))

    differences = np.asarray(windows["nll_sum"]) - np.asarray(windows["nll_base_sum"])
    differences_error = clustered(differences)
    limits: dict[str, tuple[float | None, float | None]] = {"nll": (None, None), "kld": (None, None)}
    smallest = None
    if differences_error is not None:
        limits |= bootstrap.intervals({"nll": differences, "kld": np.asarray(windows["kld_sum"])}, counts)
        smallest = smallest_difference(differences_error, n_windows)

    rms, same = math.sqrt(mean["dp_sq_sum"]), mean["n_same_top"]
    quad_error = error(mean["dp_sq_sum"], mean["dp_quad_sum"])
    return {
        "n_scored": n,
        "n_windows": n_windows,
        "ppl": ppl,
        "ppl_stderr": _product(ppl, q_error),
        "ppl_stderr_clustered": _product(ppl, clustered(windows["nll_sum"])),
        "ppl_base": ppl_base,
        "ppl_base_stderr": _product(ppl_base, b_error),
        "ppl_base_stderr_clustered": _product(ppl_base, clustered(windows["nll_base_sum"])),
        "corr": corr,
        "ln_ratio": q - b,
        "ln_ratio_stderr": ratio_error,
        "ln_ratio_stderr_clustered": differences_error,
        "ln_ratio_low": limits["nll"][0],
        "ln_ratio_high": limits["nll"][1],
        "smallest_ln_ratio": smallest,
        "ratio": ratio,
        "ratio_stderr": _product(ratio, ratio_error),
        "ppl_diff": None if ppl is None or ppl_base is None else ppl - ppl_base,
        "ppl_diff_stderr": diff_error,
        "kld_mean": mean["kld_sum"],
        "kld_stderr": error(mean["kld_sum"], mean["kld_sq_sum"]),
        "kld_stderr_clustered": clustered(windows["kld_sum"]),
        "kld_mean_low": limits["kld"][0],
        "kld_mean_high": limits["kld"][1],
        "kld_max": float(np.max(windows["kld_max"])),
        **{f"kld_{name}": value for name, value in kld.items()},
        "kld_min": float(np.min(windows["kld_min"])),
        "dp_mean": mean["dp_sum"],
        "dp_stderr": error(mean["dp_sum"], mean["dp_sq_sum"]),
        "dp_stderr_clustered": clustered(windows["dp_sum"]),
        "dp_max": float(np.max(windows["dp_max"])),
        **{f"dp_{name}": value for name, value in dp.items()},
        "dp_min": float(np.min(windows["dp_min"])),
        "dp_rms": rms,
        "dp_rms_stderr": None if quad_error is None else (quad_error / (2 * rms) if rms else 0.0),
        "same_top": same,
        "same_top_stderr": math.sqrt(same * (1 - same) / (n - 1)) if n > 1 else None,
        "same_top_stderr_clustered": clustered(windows["n_same_top"]),
    }


def _sum(values: npt.NDArray[Any]) -> float:
    return math.fsum(values.tolist())


def _exp(value: float) -> float | None:
    """exp; None where a double ends."""
    return math.exp(value) if value < 709.0 else None


def _product(value: float | None, relative: float | None) -> float | None:
    return None if value is None or relative is None else value * relative
