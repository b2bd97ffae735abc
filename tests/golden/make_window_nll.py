"""Makes tests/golden/window_nll.npz: sums of nll over windows of a model and of two variants of it.

    pagemill perplexity model.path=MODEL data.path=wiki.test.raw protocol.limit=240     (for each model)
    python tests/golden/make_window_nll.py base=TABLE Q8_0=TABLE Q4_K_M=TABLE           (`table` of its JSON)

Made with SmolLM2-135M-Instruct Q4_1 and, from it by `llama-quantize --allow-requantize`, Q8_0 and Q4_K_M:
windows 0 to 239 of wiki.test.raw, 255 scored tokens each, engine.NUMERICS 1. float64 (240,) each, nats. They
are windows with the spread, the tails and the drift of real text, for tests of statistics; the engine has
nothing to reproduce here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

TARGET = Path(__file__).parent / "window_nll.npz"
N_WINDOWS = 240


def main() -> None:
    """Writes the file."""
    sums = {}
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        parts = [pq.read_table(file) for file in sorted(Path(folder).glob("shard-*.parquet"))]
        windows = np.concatenate([part["window"].to_numpy() for part in parts])
        counts = np.concatenate([part["n_scored"].to_numpy() for part in parts])[:N_WINDOWS]
        assert windows[:N_WINDOWS].tolist() == list(range(N_WINDOWS))
        assert set(counts.tolist()) == {255}
        sums[name] = np.concatenate([part["nll_sum_nats"].to_numpy() for part in parts])[:N_WINDOWS]
    np.savez_compressed(TARGET, **sums)


if __name__ == "__main__":
    main()
