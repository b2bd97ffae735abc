"""Perplexity and its errors in float64 NumPy, from token-level values and the papers' matrix formulas.

The clustered error is that of a least-squares regression of the tokens' negative log-likelihoods y (n,) on X
(n, k), with clusters c (the windows):

    V = (X'X)^-1 [ sum_c X_c' u_c u_c' X_c ] (X'X)^-1 * G/(G-1) * (n-1)/(n-k)            u = y - X beta

Source: Liang & Zeger 1986; the finite-sample factor is CR1 as in Cameron & Miller 2015,
https://doi.org/10.3368/jhr.50.2.317, equation 12. For X = 1 the coefficient is the mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def cluster_robust(y: Floats, x: Floats, clusters: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Coefficients (k,) and their covariance (k, k)."""
    n, k = x.shape
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ y
    residuals = y - x @ beta
    meat = np.zeros((k, k))
    names = np.unique(clusters)
    for name in names:
        score = x[clusters == name].T @ residuals[clusters == name]
        meat += np.outer(score, score)
    factor = names.size / (names.size - 1) * (n - 1) / (n - k)
    return beta, bread @ meat @ bread * factor


def perplexity(nll: Floats, windows: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """(perplexity, llama.cpp's error, clustered error) of token-level values in nats."""
    beta, covariance = cluster_robust(nll, np.ones((nll.size, 1)), windows)
    value = float(np.exp(beta[0]))
    spread = float(np.mean(nll * nll) - np.mean(nll) ** 2)
    return value, value * (spread / (nll.size - 1)) ** 0.5, value * float(covariance[0, 0]) ** 0.5
