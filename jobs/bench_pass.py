"""The whole forward pass, item by item, from the clocks that the engine's threads keep.

A clock counts the ticks between the beginning and the end of each item, on every thread; `other` is what is
left of wall time times threads: Python between kernels, threads that wait for the last one. Beside an item
stands what it did in its own unit, and the same in the unit's own ceiling, measured in this process: float32
multiply-adds, a copy of arrays as large as the activations, exponentials in a loop of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import engine
from engine.kernels import product
from engine.kernels._jit import kernel
from engine.kernels.maths import exp32, exp64
from engine.kernels.tile import NR
from jobs.bench_products import now, seconds

WINDOW, BATCH = 512, 4096  # tokens; the defaults of a perplexity

ITEMS = {
    product.MULTIPLY: "products",
    product.UNPACK: "decoding into strips",
    product.ATTEND: "attention",
    product.HEAD: "head: log-sum-exp",
    product.ACTIVATE: "silu(gate) * up",
    product.NORM: "norms, residual",
    product.ROTATE: "rotary",
    product.STORE: "keys, values stored",
    product.EMBED: "embedding",
    product.WAIT: "threads waiting",
}


@kernel
def exponentials(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """out = exp(x), float32."""
    for i in range(x.size):
        out[i] = exp32(x[i])


@kernel
def exponentials64(x: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """out = exp(x), float64."""
    for i in range(x.size):
        out[i] = exp64(x[i])


class Spent(NamedTuple):
    """Wall time of a batch, in seconds and in ticks, and the ticks of each item, all threads together."""

    seconds: float
    ticks: int
    items: NDArray[np.int64]


class Pass:
    """A model and batches of windows, as the evaluation of a perplexity makes them.

    Attributes:
        n_tokens: of a batch.
        n_scored: of them those whose likelihood is wanted.
        read_bytes: of the weights, once for all tokens.
    """

    def __init__(self, path: Path, threads: int, window: int, n_tokens: int) -> None:
        self.threads, self.window, self.n_tokens = threads, window, n_tokens // window * window
        self._file = engine.open(path)
        matrices = [tensor for tensor in self._file.tensors.values() if len(tensor.shape) == 2]
        self.read_bytes = sum(tensor.n_bytes for tensor in matrices)
        self.model: Any = engine.load_model(self._file, threads=threads, batch_tokens=self.n_tokens)
        n_windows = self.n_tokens // window
        tokens = np.random.default_rng(0).integers(0, self.model.n_vocab, (n_windows, window), np.int32)
        targets = np.full(tokens.shape, -1, np.int32)
        targets[:, window // 2 : -1] = tokens[:, window // 2 + 1 :]  # those that protocol `windows` scores
        slots, positions = np.indices(tokens.shape)
        arrays = (tokens, positions, slots, targets)
        flat, at, slot, wanted = (array.ravel() for array in arrays)
        self.n_scored = int((wanted >= 0).sum())
        self._batch = engine.Batch(flat, at, slot, targets=wanted)
        self._cache = self.model.new_cache(n_windows, window, fleeting=True)
        first = slice(min(window, 64))
        few = engine.Batch(flat[first], at[first], targets=np.roll(flat[first], -1))
        self.model.nll(few, self._cache)  # brings kernels and the weights' pages

    def __call__(self) -> Spent:
        """A batch."""
        self._cache.clear()
        before, start, began = self.model.clock(), time.perf_counter(), now()
        self.model.nll(self._batch, self._cache)
        return Spent(time.perf_counter() - start, now() - began, self.model.clock() - before)

    def close(self) -> None:
        """The mapping goes with the model."""
        del self.model, self._cache
        self._file.close()

    def amounts(self) -> dict[int, tuple[float, str]]:
        """What a batch does of each item, and its unit: GFLOP, GB moved, 1e9 weights or exponentials."""
        p, n = self.model.params, self.n_tokens
        q, kv = p.n_heads * p.head_width, p.n_kv_heads * p.head_width
        layer = p.width * (2 * q + 2 * kv + 3 * p.ff_width)
        head = p.width * p.n_vocab
        seen = self.window * (self.window + 1) / 2 * (n / self.window)
        decoded = p.n_layers * layer + head
        if n // NR >= 4 * self.threads:  # each thread decodes all weights for its own panels
            decoded *= self.threads
        return {
            product.MULTIPLY: (2e-9 * (p.n_layers * layer * n + head * self.n_scored), "GFLOP/s"),
            product.UNPACK: (1e-9 * decoded, "1e9 weights/s"),
            product.ATTEND: (4e-9 * p.n_layers * q * seen, "GFLOP/s"),
            product.HEAD: (1e-9 * self.n_scored * p.n_vocab, "1e9 exp/s"),
            product.ACTIVATE: (1e-9 * p.n_layers * n * p.ff_width, "1e9 exp/s"),
            product.NORM: (4e-9 * n * p.width * 5 * (2 * p.n_layers + 1), "GB/s"),
            product.ROTATE: (4e-9 * n * 2 * p.rope.width * (p.n_heads + p.n_kv_heads) * p.n_layers, "GB/s"),
            product.STORE: (4e-9 * n * 4 * kv * p.n_layers, "GB/s"),
            product.EMBED: (4e-9 * n * p.width, "GB/s"),
        }


def profile(path: Path, threads: int, window: int, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Shares of the pass, median by item; rates beside their ceilings.

    Returns:
        `tok_per_s`, `fma_gflops`, `fma_share` (operations of products and attention over the ceiling), and
        `items`: name, share of wall time times threads, value, ceiling, unit; the last is `other`.
    """
    run = Pass(path, threads, window, n_tokens)
    found, ceilings = [], [engine.fma_gflops(threads, seconds=0.02)]
    for _ in range(rounds):
        found.append(run())
        ceilings.append(engine.fma_gflops(threads, seconds=0.02))
    amounts, tops = run.amounts(), _ceilings(threads, run.n_tokens * run.model.params.width)
    tops["GFLOP/s"] = median(ceilings)
    items = []
    for item, name in ITEMS.items():
        row = _row(name, median(float(spent.items[item]) / spent.ticks / threads for spent in found))
        if item in amounts:
            amount, unit = amounts[item]
            busy = median(float(spent.items[item]) / threads * spent.seconds / spent.ticks for spent in found)
            ceiling = tops["head" if item == product.HEAD else unit]
            row |= {"value": amount / busy, "ceiling": ceiling, "unit": unit}
        items.append(row)
    items.append(_row("other", median(1 - float(s.items.sum()) / s.ticks / threads for s in found)))
    spent_s = median(spent.seconds for spent in found)
    gflop = amounts[product.MULTIPLY][0] + amounts[product.ATTEND][0]
    result = {
        "window": window, "n_tokens": run.n_tokens, "threads": threads, "tok_per_s": run.n_tokens / spent_s,
        "fma_gflops": tops["GFLOP/s"], "fma_share": gflop / spent_s / tops["GFLOP/s"],
        "flop_per_byte": 1e9 * gflop / run.read_bytes, "gflops": gflop / spent_s, "items": items,
    }  # fmt: skip
    run.close()
    return result


def _row(name: str, share: float) -> dict[str, Any]:
    return {"item": name, "share": share, "value": None, "ceiling": None, "unit": ""}


def growth(path: Path, threads: int, n_batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Cost of a token in longer and longer corpora: its time, and operations at the ceiling beside it."""
    run = Pass(path, threads, WINDOW // 4, WINDOW)
    for count in n_batches:
        before = engine.fma_gflops(threads, seconds=0.02)
        spent = sum(run().seconds for _ in range(count))
        ceiling = (before + engine.fma_gflops(threads, seconds=0.02)) / 2
        tokens = count * run.n_tokens
        yield {
            "corpus_tokens": tokens, "us_a_token": spent / tokens * 1e6, "fma_gflops": ceiling,
            "kflop_a_token_at_ceiling": spent / tokens * ceiling * 1e6,
        }  # fmt: skip
    run.close()


def _ceilings(threads: int, size: int) -> dict[str, float]:
    """Best that one loop does of each unit, times the threads; `size`: floats of the activations."""
    x = np.linspace(-20, 0, 4096, dtype=np.float32)
    out, x64 = np.empty_like(x), x.astype(np.float64)
    out64 = np.empty_like(x64)
    source, target = np.ones(size, np.float32), np.empty(size, np.float32)
    calls = {
        "1e9 exp/s": (partial(exponentials, x, out), 1e-9 * x.size),
        "head": (partial(exponentials64, x64, out64), 1e-9 * x.size),
        "GB/s": (partial(np.copyto, target, source), 8e-9 * size),
        "1e9 weights/s": (partial(np.copyto, target[:100_000], source[:100_000]), 1e-9 * 100_000),
    }
    rates = {}
    for unit, (call, amount) in calls.items():
        call()
        rates[unit] = threads * amount / min(seconds(call, 1) for _ in range(21))
    return rates
