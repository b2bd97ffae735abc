"""Times a Mamba model against this machine's own limits, measured in the same process.

    python -m jobs.bench_mamba MODEL.gguf [THREADS]                       half a minute

Windows of 512 tokens whose second half is scored (as a perplexity), a prompt of 512 and tokens one by one,
beside the ceiling of float32 multiply-adds and of reading memory; the scan alone beside exponentials in a
loop of their own. Medians of five, of kernels the best of twenty; the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import engine
from engine.kernels._jit import kernel
from engine.kernels.maths import exp32
from engine.kernels.product import Share
from engine.kernels.ssm import ScanRows, runs_of, scratch_floats, ssm_conv, ssm_scan, strips_of
from engine.kernels.tile import NR, STRIP
from engine.mamba_params import MambaParams
from engine.models.mamba import Mamba
from engine.weights import aligned

WINDOW, N_WINDOWS, N_DECODED, ROUNDS = 512, 8, 32, 5


@kernel
def exponentials(x, out):  # type: ignore[no-untyped-def]
    """out = exp(x), float32."""
    for i in range(x.size):
        out[i] = exp32(x[i])


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_scan(p: MambaParams) -> dict[str, float]:
    """Convolution and scan of one layer and 528 tokens, one thread, beside exponentials of float32."""
    n_tokens, rng = 11 * 48, np.random.default_rng(0)
    n_panels, width = -(-n_tokens // NR), p.inner
    panels = aligned(n_panels, 3 * width + 2 * p.n_states + STRIP, NR)
    panels[:] = rng.standard_normal(panels.shape, np.float32) * np.float32(0.1)
    rates = -np.tile(np.arange(1, p.n_states + 1, dtype=np.float32), (width, 1))
    column = np.ones((width, 1), np.float32)
    taps = strips_of(rng.standard_normal((width, p.conv_width), np.float32))
    a, bias, d = strips_of(rates), strips_of(-4 * column), strips_of(column)
    shape = (1, 1, -(-width // STRIP))
    past = np.zeros((*shape, p.conv_width - 1, STRIP), np.float32)
    state = np.zeros((*shape, p.n_states, STRIP), np.float32)
    runs, share = runs_of(np.zeros(n_tokens, np.int32)), Share(0, 1, True, 0, n_panels, n_panels, n_tokens)
    rows = ScanRows(0, width, width, 2 * width, 3 * width, 3 * width + p.n_states, 1)
    scratch = aligned(scratch_floats(p.conv_width))
    to = scratch.ctypes.data
    conv = partial(ssm_conv, panels, 0, width, taps, d, runs, past, 0, share, to)
    scan = partial(
        ssm_scan, panels, panels, panels, rows, width, 1, a, bias, d, runs, state, 0, share, to
    )  # fmt: skip
    x, out = -rng.random(1 << 16, np.float32), np.empty(1 << 16, np.float32)
    exp = partial(exponentials, x, out)
    for call in (conv, scan, exp):
        call()
    n_exp = width * n_tokens * (p.n_states + 2)  # of decays, of softplus and of silu
    exp_s, scan_s, conv_s = (min(seconds(call) for _ in range(20)) for call in (exp, scan, conv))
    ceiling = x.size / exp_s
    per_token = 1e6 * p.n_layers / n_tokens
    return {
        "exp_g_per_s": ceiling / 1e9,
        "scan_share_of_exp": n_exp / scan_s / ceiling,
        "scan_us_per_token": scan_s * per_token,
        "conv_us_per_token": conv_s * per_token,
    }


def _is_matrix(name: str) -> bool:
    """Whether a tensor is a matrix of a layer."""
    return name.startswith("blk.") and name.endswith(
        ("ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
    )


def time_model(path: Path, threads: int) -> dict[str, Any]:
    """Tokens a second, and GFLOP/s of the products over the ceiling at that moment."""
    with engine.open(str(path)) as file:
        size = WINDOW * N_WINDOWS
        model = engine.load_model(file, threads=threads, batch_tokens=size)
        if not isinstance(model, Mamba):
            raise SystemExit(f"{path}: expected a Mamba model")
        shapes = [t.shape for name, t in file.tensors.items() if _is_matrix(name)]
        layers = 2.0 * sum(rows * columns for rows, columns in shapes)
        head = 2.0 * model.n_vocab * model.params.width
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, model.n_vocab, size).astype(np.int32)
        positions, slots = np.arange(size) % WINDOW, np.arange(size) // WINDOW
        is_scored = (positions >= WINDOW // 2) & (positions < WINDOW - 1)
        windows = engine.Batch(tokens, positions, slots, targets=np.where(is_scored, np.roll(tokens, -1), -1))
        prompt = engine.Batch(tokens[:WINDOW], positions[:WINDOW], outputs=positions[:WINDOW] == WINDOW - 1)

        def decode() -> None:
            cache = model.new_cache(1)
            for i in range(N_DECODED):
                model.logits(engine.Batch(tokens[i : i + 1], [i], outputs=[True]), cache)

        found: dict[str, Any] = {"threads": threads, "nbytes": model.nbytes}
        jobs: dict[str, tuple[Callable[[], object], int, float]] = {
            "perplexity": (
                lambda: model.nll(windows, model.new_cache(N_WINDOWS)),
                size,
                size * layers + np.count_nonzero(is_scored) * head,
            ),
            "prompt": (lambda: model.logits(prompt, model.new_cache(1)), WINDOW, WINDOW * layers + head),
        }
        for name, (call, n_tokens, flop) in jobs.items():
            call()
            rounds = []
            for _ in range(ROUNDS):
                ceiling = engine.fma_gflops(threads, seconds=0.02)
                took = seconds(call)
                rounds.append((flop / took / 1e9 / ceiling, n_tokens / took, ceiling))
            share, speed, ceiling = sorted(rounds)[ROUNDS // 2]
            found[name] = {"tok_per_s": speed, "share_of_fma": share, "fma_gflops": ceiling}
        decode()
        speed = N_DECODED / median(seconds(decode) for _ in range(ROUNDS))
        read = sum(t.data.size for t in file.tensors.values()) * speed / 1e9
        found["decode"] = {"tok_per_s": speed, "share_of_reading": read / engine.read_gb_per_s(threads)}
        return found | {"one thread": time_scan(model.params)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("threads", type=int, nargs="?", default=2)
    given = parser.parse_args()
    print(json.dumps(time_model(given.model, given.threads)))


if __name__ == "__main__":
    main()
