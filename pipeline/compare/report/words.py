"""What a comparison says, in sentences: the Pareto front, who differs from the base, what is visible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.compare.report.columns import (
    Variant,
    base_row,
    by_size,
    first_known,
    number,
    probability,
    short_names,
    with_error,
)

LEVEL = 0.05
"""Two-sided; what is called beyond noise is so at this level."""

_MANY = 6


def dominated(variants: Sequence[Variant], figure: str = "kld_mean") -> dict[str, str]:
    """Those not on the Pareto front -> the nearest to the base of those that beat them.

    One is beaten by another that is no larger and no farther from the base, and better in one of the two.
    Variants whose size or figure is unknown neither beat nor are beaten.
    """
    # Bytes and bits per weight are not mixed: whichever all have.
    unit = "bytes" if all(number(v, "bytes") is not None for v in variants) else "bpw"
    known = [
        (s, f, str(v["name"]))
        for v in variants
        if (s := number(v, unit)) is not None and (f := number(v, figure)) is not None
    ]
    beaten = {}
    for s, f, name in known:
        better = [(f2, s2, name2) for s2, f2, name2 in known if s2 <= s and f2 <= f and (s2 < s or f2 < f)]
        if better:
            beaten[name] = min(better)[2]
    return beaten


def is_beyond_noise(variant: Variant) -> bool | None:
    """Whether its perplexity differs from the base's at `LEVEL`; None where that is unknown.

    By the bootstrap interval where there is one, else by 1.96 clustered standard errors.
    """
    low, high = number(variant, "ln_ratio_low"), number(variant, "ln_ratio_high")
    if low is not None and high is not None:
        return low > 0 or high < 0
    ratio = number(variant, "ln_ratio")
    error = first_known(variant, "ln_ratio_stderr_clustered", "ln_ratio_stderr")
    if ratio is None or error is None:
        return None
    return abs(ratio) > 1.96 * error


def sentences(summary: Mapping[str, Any], base: str) -> list[str]:
    """The comparison in a handful of sentences, the most important first; names are the short ones."""
    short = short_names([str(v["name"]) for v in summary["variants"]], longest=40)
    variants = [{**v, "name": short[str(v["name"])]} for v in by_size(summary["variants"])]
    told = [
        _front(variants),
        _larger(variants, base_row(summary, base)),
        _noise(variants),
        _neighbours(variants),
        _visible(variants),
        _stopped(variants),
    ]
    return [sentence for sentence in told if sentence]


def _front(variants: Sequence[Variant]) -> str:
    placed = [v for v in variants if number(v, "kld_mean") is not None and first_known(v, "bytes", "bpw")]
    if len(placed) < 2:
        return ""
    beaten = dominated(placed)
    front = [str(v["name"]) for v in placed if v["name"] not in beaten]
    if not beaten:
        all_ = "Both" if len(placed) == 2 else f"All {len(placed)}"
        return f"{all_} variants are on the Pareto front: each step down in size costs divergence."
    off = [f"{name} ({better} is no larger and nearer to the base)" for name, better in beaten.items()]
    return f"On the Pareto front of size and divergence: {_listed(front)}. Not on it: {_listed(off)}."


def _larger(variants: Sequence[Variant], base: Variant) -> str:
    limit = number(base, "bytes")
    larger = [str(v["name"]) for v in variants if limit and (number(v, "bytes") or 0) >= limit]
    if not larger:
        return ""
    are = "is" if len(larger) == 1 else "are"
    return f"{_listed(larger)} {are} no smaller than the base itself: nothing is saved."


def _noise(variants: Sequence[Variant]) -> str:
    verdicts = {str(v["name"]): is_beyond_noise(v) for v in variants}
    within = [
        f"{v['name']} (ln ratio {_told_ratio(v)})" for v in variants if verdicts[str(v["name"])] is False
    ]
    differing = [v for v in variants if verdicts[str(v["name"])]]
    worse = [str(v["name"]) for v in differing if (number(v, "ln_ratio") or 0) > 0]
    better = [str(v["name"]) for v in differing if (number(v, "ln_ratio") or 0) <= 0]
    parts = []
    if worse:
        subject = "every variant" if len(worse) == len(variants) > 1 else _listed(worse)
        parts.append(f"Perplexity is higher than the base's beyond noise for {subject}.")
    if better:
        parts.append(f"It is lower than the base's beyond noise for {_listed(better)}.")
    if within:
        parts.append(f"Not told apart from the base by perplexity: {_listed(within)}.")
    return " ".join(parts)


def _told_ratio(variant: Variant) -> str:
    error = first_known(variant, "ln_ratio_stderr_clustered", "ln_ratio_stderr")
    return with_error(number(variant, "ln_ratio"), error, "+")


def _neighbours(variants: Sequence[Variant]) -> str:
    tested = [
        (f"{v['name']} from {smaller['name']}", p)
        for v, smaller in itertools.pairwise(variants)
        if (p := number(v, "p_vs_next")) is not None
    ]
    alike = [f"{who} (p = {probability(p)})" for who, p in tested if p >= LEVEL]
    if not tested:
        return ""
    if not alike:
        return (
            "On the size ladder each differs in perplexity from the next smaller (Holm-corrected p < 0.05)."
        )
    return f"On the size ladder not told apart by perplexity after Holm's correction: {_listed(alike)}."


def _visible(variants: Sequence[Variant]) -> str:
    seen = {str(v["name"]): s for v in variants if (s := number(v, "smallest_ln_ratio"))}
    if not seen:
        return ""
    n = max(int(number(v, "n_windows") or 0) for v in variants)
    windows = f"{n:,} window{'' if n == 1 else 's'}" if n else "so many windows"
    least, most = min(seen, key=seen.__getitem__), max(seen, key=seen.__getitem__)
    said = f"{_per_cent(seen[least])} for {least}"
    if len(seen) > 1:
        said += f" and {_per_cent(seen[most])} for {most}"
    return f"The smallest difference in perplexity that {windows} show in four of five such runs is {said}."


def _per_cent(ln_ratio: float) -> str:
    return f"{100 * math.expm1(ln_ratio):.2g} %"


def _stopped(variants: Sequence[Variant]) -> str:
    if not any(v.get("stopped") for v in variants):
        return ""
    n = max(int(number(v, "n_windows") or 0) for v in variants)
    return f"All neighbours on the size ladder were told apart after {n:,} windows; scoring stopped there."


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`; of many the first few and how many more."""
    if len(names) > _MANY + 1:
        return f"{', '.join(names[:_MANY])} and {len(names) - _MANY} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
