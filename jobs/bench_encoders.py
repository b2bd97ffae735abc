"""Times the encoders beside libgguf's and beside reading memory, one thread each, in turns in one process.

    python -m jobs.bench_encoders [TYPE ...]                       a minute on a quiet machine

Rows of 4,096 normal numbers, 64 MB of them (out of a core's caches) or, for the slower encoders, as many as
take a fifth of a second; types that search without and with importance weights. GB/s are the bytes read and
written, the ceiling that of reading alone (`engine.read_gb_per_s`). The best of five rounds, in each of which
everything has its turn: other work on the machine makes a round slower, never faster. Bytes are compared too.
Prints a table to standard error and one JSON object as the last line of standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["LIBGGUF_NUM_THREADS"] = "1"

import libgguf
import numpy as np

import engine
from engine.ggml_types import by_name
from engine.quants.encoders import encoder
from jobs.bench_kernels import show

COLUMNS, ROWS = 4096, 4096
FEW_ROWS, SHARE_S, ROUNDS = 32, 0.2, 5

TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
)
WEIGHTED = tuple(name for name in TYPES if name.startswith(("Q2", "Q3", "Q4", "Q5", "Q6", "IQ4")))


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(name: str, values: Any, weights: Any) -> dict[str, Any]:
    """One row of the table: an encoder, with weights or without."""
    kind, kernel = by_name(name), encoder(name)
    out = np.zeros((len(values), COLUMNS // kind.block_size * kind.block_bytes), np.uint8)
    their_out = np.zeros_like(out)
    none = np.empty(0, np.float32)
    none.flags.writeable = False
    type_id = int(libgguf.GGMLQuantizationType[name])

    def ours(n_rows: int) -> float:
        return seconds(lambda: kernel(values[:n_rows], none if weights is None else weights, out[:n_rows]))

    def theirs(n_rows: int) -> float:
        return seconds(
            lambda: libgguf.quantize_rows_into_raw(
                type_id, values[:n_rows], their_out[:n_rows], n_rows, COLUMNS, weights
            )
        )

    ours(FEW_ROWS)  # compiles
    counts = [min(len(values), max(1, int(FEW_ROWS * SHARE_S / run(FEW_ROWS)))) for run in (ours, theirs)]
    rounds = [(ours(counts[0]), theirs(counts[1]), engine.read_gb_per_s(1, 64 << 20)) for _ in range(ROUNDS)]
    n_same = min(counts)
    assert np.array_equal(out[:n_same], their_out[:n_same]), f"{name}: bytes differ from libgguf's"
    mine, other = (min(turn[i] for turn in rounds) / counts[i] for i in range(2))
    ceiling = max(turn[2] for turn in rounds)
    n_bytes = values.nbytes / len(values) + out.shape[1]
    return {
        "type": name, "weights": "" if weights is None else "yes",
        "ns_a_weight": 1e9 * mine / COLUMNS, "rows_per_s": 1 / mine, "gb_per_s": 1e-9 * n_bytes / mine,
        "ceiling": ceiling, "share": 1e-9 * n_bytes / mine / ceiling,
        "libgguf_gb_per_s": 1e-9 * n_bytes / other, "over_libgguf": other / mine,
    }  # fmt: skip


def table(types: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of all types."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((ROWS, COLUMNS), np.float32)
    weights = rng.random(COLUMNS, np.float32)
    for array in (values, weights):
        array.flags.writeable = False
    for name in types:
        yield measured(name, values, None)
        if name in WEIGHTED:
            yield measured(name, values, weights)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="tensor types; all without any")
    given = parser.parse_args()
    if unknown := set(given.types) - engine.ENCODABLE:
        parser.error(f"no encoder of {', '.join(sorted(unknown))}; choose from {', '.join(TYPES)}")
    rows = list(table(tuple(given.types) or TYPES))
    show(f"Encoders, rows of {COLUMNS}, one thread", rows)
    print(json.dumps({"job": "bench_encoders", "encoders": rows}))


if __name__ == "__main__":
    main()
