"""Guards against a kernel that has become slow: ratios to what the same process can do at the same time.

The limits are far below what is measured on a quiet machine (the README's "Speed"), and one good try out of
five is enough: other work on the machine disturbs a ratio in both directions, but rarely five times.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import engine
from engine.kernels.tile import LANES
from engine.machine import cpu_features
from jobs.bench_products import Product, Product8, limits, random_tensor, seconds

TRIES = 5

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        not {"avx2", "fma"} <= cpu_features(), reason="no AVX2 and FMA: kernels are correct, not quick"
    ),
]


def best_of_tries(measure: Callable[[], float], enough: float) -> float:
    """The largest of up to `TRIES` ratios, the first that is enough."""
    seen: list[float] = []
    while len(seen) < TRIES and max(seen, default=0.0) < enough:
        seen.append(measure())
    return max(seen)


def ceiling_around(call: Callable[[], float]) -> tuple[float, float]:
    """What `call` returns, and the mean of the ceilings before and after it."""
    before = engine.fma_gflops(1, seconds=0.005)
    value = call()
    return value, (before + engine.fma_gflops(1, seconds=0.005)) / 2


@pytest.mark.parametrize("type_name", ["Q4_1", "Q6_K"])
def test_gemm_with_decoding_reaches_its_ceiling(type_name: str) -> None:
    product = Product([random_tensor(type_name, 576, 1536)], 512, 1)

    def share() -> float:
        value, ceiling = ceiling_around(lambda: product.gflop / seconds(product, 5))
        return value / ceiling

    assert best_of_tries(share, 0.6) >= 0.6


def test_a_single_token_comes_near_one_of_both_limits() -> None:
    """Bytes from memory, or multiply-adds, whichever is nearer; 49 MB of weights, out of a core's caches."""
    product = Product([random_tensor("Q8_0", 30_000, 1536)], 1, 1)

    def share() -> float:
        bandwidth, ceiling = limits(1)
        spent = seconds(product, 5)
        return max(product.n_bytes / spent / 1e9 / bandwidth, product.gflop / spent / ceiling)

    assert best_of_tries(share, 0.3) >= 0.3


@pytest.mark.skipif(
    LANES < 16 or "avx512vnni" not in cpu_features(), reason="no VNNI: bytes are no faster than float32"
)
def test_bytes_multiply_faster_than_float32_could() -> None:
    product = Product8(random_tensor("Q8_0", 1536, 1536), 192)

    def ratio() -> float:
        value, ceiling = ceiling_around(lambda: product.gflop / seconds(product, 5))
        return value / ceiling

    assert best_of_tries(ratio, 1.2) >= 1.2
