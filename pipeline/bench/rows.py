"""What was timed as rows: speeds with their spread, beside the machine's limits, and ours over each peer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline import provenance
from pipeline.bench.preflight import OURS, Entrant
from pipeline.bench.rounds import Timed
from pipeline.bench.settings import ThroughputSettings


def row(model: Entrant, timed: Timed, s: ThroughputSettings) -> dict[str, Any]:
    """What is told of an engine in a test; `tok_per_s` is the median of the rounds."""
    case, info, known = timed.case, timed.info, spread(timed.speeds)
    flop = model.work.flop(case) / case.n_tokens
    gflops, gb_per_s = zip(*timed.limits, strict=True)
    batch_tokens = int(info.get("ubatch") or info.get("batch") or s.engine.batch_tokens)
    read = model.work.read_bytes(case, batch_tokens) / case.n_tokens
    return {
        "engine": timed.engine,
        "engine_version": info.get("version"),
        "kind": case.kind,
        "test": case.name,
        "type": model.work.type,
        "n_prompt": case.n_prompt,
        "n_generate": case.n_generate,
        "n_seqs": case.n_seqs,
        "threads": s.engine.threads,
        "tok_per_s": known["median"],
        "p10": known["p10"],
        "p90": known["p90"],
        "n": len(timed.speeds),
        "tok_per_s_mean": known["mean"],
        "tok_per_s_stdev": known["stdev"],
        "samples": list(timed.speeds),
        "flop_per_token": flop,
        "fma_gflops": timed.gflops,
        "fma_gflops_samples": list(gflops),
        "fma_share": known["median"] * flop / (timed.gflops * 1e9),
        "read_bytes_per_token": read,
        "read_gb_per_s": timed.gb_per_s,
        "read_gb_per_s_samples": list(gb_per_s),
        "read_share": known["median"] * read / (timed.gb_per_s * 1e9),
        "kv_type": info.get("kv"),
        "activation_type": info.get("activations"),
        "options": provenance.canonical_json(dict(timed.options)),
        "tried": provenance.canonical_json(timed.tried),
        "engine_features": info.get("features"),
        "load_s": info.get("load_s"),
        "ready_s": info.get("ready_s"),
        "model_pss_bytes": timed.memory.get("pss_bytes"),
        "anonymous_bytes": timed.memory.get("anonymous_bytes"),
        "model": model.work.name,
        "model_path": model.path,
        "model_sha256": model.sha256,
        "model_bytes": model.work.n_bytes,
    }


def ratios(model: Entrant, done: Sequence[Timed]) -> list[dict[str, Any]]:
    """Ours over each peer: of the medians, and over the rounds one by one."""
    ours = next((timed for timed in done if timed.engine == OURS), None)
    found = []
    for peer in done:
        if ours is None or peer is ours:
            continue
        case = peer.case
        rounds = spread([a / b for a, b in zip(ours.speeds, peer.speeds, strict=True)])
        found.append(
            {
                "peer": peer.engine,
                "kind": case.kind,
                "test": case.name,
                "n_prompt": case.n_prompt,
                "n_generate": case.n_generate,
                "n_seqs": case.n_seqs,
                "model": model.work.name,
                "model_sha256": model.sha256,
                "type": model.work.type,
                "ratio": statistics.median(ours.speeds) / statistics.median(peer.speeds),
                "ratio_of_rounds": rounds["median"],
                "p10": rounds["p10"],
                "p90": rounds["p90"],
            }
        )
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile (linear between values), mean and standard deviation."""
    import numpy as np

    p10, median, p90 = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"median": median, "p10": p10, "p90": p90, "mean": float(np.mean(values)), "stdev": deviation}
