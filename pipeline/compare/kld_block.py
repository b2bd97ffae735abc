"""The block that `llama-perplexity --kl-divergence` ends with, printed from our figures.

Its words, order, widths and digits, so that what reads llama.cpp's output reads ours. Values are ours: of the
whole vocabulary in float64, without the 16-bit logits that llama.cpp compares with. It prints its block for a
hundred targets or more and 0 for an error that it has no targets for; here the block is always printed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NAMES = {
    "max": "Maximum",
    "p999": "99.9%  ",
    "p99": "99.0%  ",
    "p95": "95.0%  ",
    "p90": "90.0%  ",
    "p75": "75.0%  ",
    "p50": "Median ",
    "p25": "25.0%  ",
    "p10": "10.0%  ",
    "p05": " 5.0%  ",
    "p01": " 1.0%  ",
    "p001": " 0.1%  ",
    "min": "Minimum",
}
_WITH_ERRORS = (
    ("Mean PPL(Q)                   ", "ppl"),
    ("Mean PPL(base)                ", "ppl_base"),
    ("Mean ln(PPL(Q)/PPL(base))     ", "ln_ratio"),
    ("Mean PPL(Q)/PPL(base)         ", "ratio"),
    ("Mean PPL(Q)-PPL(base)         ", "ppl_diff"),
)


def kld_block(figures: Mapping[str, Any]) -> str:
    """The block, ending in an empty line as llama.cpp's does.

    Args:
        figures: as `statistics.figures` returns them. An error that is None is printed as 0, another figure
            as nan.
    """

    def value(name: str, scale: float = 1.0) -> float:
        found = figures[name]
        if found is None:
            return 0.0 if name.endswith("_stderr") else math.nan
        return scale * float(found)

    def percent(title: str, name: str, error: str) -> str:
        return f"{title}: {value(name, 100):6.3f} ± {value(error, 100):5.3f} %"

    heads = [
        f"{title}: {value(name):10.6f} ± {value(f'{name}_stderr'):10.6f}" for title, name in _WITH_ERRORS
    ]
    heads.insert(2, f"Cor(ln(PPL(Q)), ln(PPL(base))): {value('corr', 100):6.2f}%")
    kld = [
        f"{title} KLD: {value(f'kld_{name}'):10.6f}"
        for name, title in _NAMES.items()
        if name not in ("p75", "p25")
    ]
    dp = [f"{title} Δp: {value(f'dp_{name}', 100):6.3f}%" for name, title in _NAMES.items()]
    lines = [
        "====== Perplexity statistics ======",
        *heads,
        "",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {value('kld_mean'):10.6f} ± {value('kld_stderr'):10.6f}",
        *kld,
        "",
        "====== Token probability statistics ======",
        percent("Mean    Δp", "dp_mean", "dp_stderr"),
        *dp,
        percent("RMS Δp    ", "dp_rms", "dp_rms_stderr"),
        percent("Same top p", "same_top", "same_top_stderr"),
        "",
    ]
    return "\n".join(lines) + "\n"
