"""What a comparison costs beside perplexities of the same models one by one.

    overhead = seconds of scoring here / sum over models of tokens / (tokens/s of a worker * workers)

The rates are those of earlier runs of `pagemill perplexity` on this host, of the same file, window, protocol
and threads, the median of the latest five. Unless all models have such runs the overhead is not known.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Mapping
from typing import Any

from pipeline import results
from pipeline.compare.settings import CompareSettings
from pipeline.folders import folder_of

_LATEST = 5
_ROWS = """
    select model_sha256, tok_per_s / n_workers as rate
    from runs
    where host = $host and threads = $threads and protocol = $protocol and protocol_window = $window
        and kv_type = $kv and activation_type = $activations and tok_per_s is not null and n_workers > 0
    order by finished_at desc
"""


def overhead(
    settings: CompareSettings, n_tokens: Mapping[str, int], scoring_s: float, n_workers: int
) -> float | None:
    """The ratio above, None where it is not known.

    Args:
        n_tokens: read by each model, by the SHA-256 of its file.
        scoring_s: from the first shard's beginning to the last one's end.
    """
    s = settings
    if not n_tokens or not scoring_s > 0 or not n_workers:
        return None
    asked: dict[str, Any] = {
        "host": socket.gethostname(),
        "threads": s.engine.threads,
        "protocol": s.protocol.name,
        "window": s.protocol.window,
        "kv": s.engine.kv,
        "activations": s.engine.activations,
    }
    rates: dict[str, list[float]] = {}
    for row in results.select(folder_of(s.paths.results), _ROWS, asked):
        rates.setdefault(row["model_sha256"], []).append(row["rate"])
    if not n_tokens.keys() <= rates.keys():
        return None
    separate_s = sum(
        n / (statistics.median(rates[sha256][:_LATEST]) * n_workers) for sha256, n in n_tokens.items()
    )
    return scoring_s / separate_s
