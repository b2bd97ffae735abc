"""Perplexity and its errors in float64 NumPy, from token-level values and the papers' matrix formulas.

The clustered error is that of a least-squares regression of the tokens' negative log-likelihoods y (n,) on X
(n, k), with clusters c (the windows):

    V = (X'X)^-1 [ sum_c X_c' u_c u_c' X_c ] (X'X)^-1 * G/(G-1) * (n-1)/(n-k)            u = y - X beta

Source: Liang & Zeger 1986; the finite-sample factor is CR1 as in Cameron & Miller 2015,
https://doi.org/10.3368/jhr.50.2.317, equation 12. For X = 1 the coefficient is the mean.
"""

from __future__ import annotations

import re

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


def weighted(nll: Floats, windows: npt.NDArray[np.int64], weights: Floats) -> tuple[float, float, float]:
    """(perplexity, error with tokens independent, clustered error); a weight for each token.

    Weighted least squares on a constant: beta = (X'WX)^-1 X'Wy, and the sandwich with scores X'Wu. With
    every token a cluster the factor is n/(n-1), which is the first error.
    """
    x = np.sqrt(weights)[:, None]
    y = np.sqrt(weights) * nll
    beta, clustered = cluster_robust(y, x, windows)
    _, alone = cluster_robust(y, x, np.arange(nll.size))
    value = float(np.exp(beta[0]))
    return value, value * float(alone[0, 0]) ** 0.5, value * float(clustered[0, 0]) ** 0.5


def rolling_windows(tokens: list[int], prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """(input, tokens to predict) of each window of a document, the last of the input's logits predict them.

    As EleutherAI/lm-evaluation-harness describes `loglikelihood_rolling`: each token is predicted exactly
    once; the first window is the prefix and the document's first `longest - 1` tokens; each further window
    predicts the next `longest` tokens or what is left, and its input are the `longest` tokens that end before
    its last target, of which at least one is context.
    """
    padded = [prefix, *tokens]
    found = []
    for first in range(0, len(tokens), longest):
        last = min(first + longest, len(tokens))
        found.append((padded[max(0, last - longest) : last], tokens[first:last]))
    return found


def harness(scores: list[Floats], texts: list[str]) -> dict[str, float]:
    """Word and byte perplexity and bits per byte of documents, by the harness's definitions.

    Args:
        scores: of each document, the negative log-likelihoods of its tokens in nats.
        texts: the documents.
    """
    nll = sum(float(np.sum(score)) for score in scores)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return {
        "word_ppl": float(np.exp(nll / words)),
        "byte_ppl": float(np.exp(nll / n_bytes)),
        "bits_per_byte": nll / n_bytes / float(np.log(2)),
    }
