"""Which tensors need bits, as people read it: a table and a few sentences, the same wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.compare.report.columns import (
    Column,
    first_known,
    number,
    probability,
    short_names,
    size,
    with_error,
)

TITLE = "Which tensors need bits"
LEVEL = 0.05
_ERRORS = ("kld_stderr_clustered",)


def _per_mb(entry: Mapping[str, Any]) -> str:
    value = number(entry, "kld_per_mb")
    return "-" if value is None else f"{value:.4g}"


def _saved(entry: Mapping[str, Any]) -> str:
    saved = number(entry, "bytes_saved") or 0.0
    return size(saved) if saved >= 0 else f"-{size(-saved)}"


def _drift(entry: Mapping[str, Any]) -> str:
    slope = entry.get("kld_by_position") or {}
    return with_error(number(slope, "nats_per_1000_tokens"), number(slope, "stderr"), "+")


COLUMNS = (
    Column("group", "swapped", lambda e: str(e["group"]), "the tensors that are the variant's", 0),
    Column("n_tensors", "tensors", lambda e: f"{e['n_tensors']:,}", "how many of them differ", 5),
    Column("bytes_saved", "saved", _saved, "bytes that these tensors are smaller in the variant", 3),
    Column(
        "kld_mean",
        "mean KLD",
        lambda e: with_error(number(e, "kld_mean"), first_known(e, *_ERRORS)),
        "mean divergence of the base with these tensors from the base, in nats, ± one standard error "
        "clustered by window",
        2,
    ),
    Column(
        "ln_ratio",
        "ln(PPL/base)",
        lambda e: with_error(number(e, "ln_ratio"), number(e, "ln_ratio_stderr_clustered"), "+"),
        "logarithm of its perplexity over the base's, ± one standard error, paired and clustered by window",
        4,
    ),
    Column("kld_per_mb", "KLD per MB", _per_mb, "mean divergence for each million bytes saved", 1),
    Column(
        "kld_by_position",
        "KLD per 1,000 tokens",
        _drift,
        "slope of the divergence along the window or the carried document, ± one standard error; a state "
        "that drifts has one above zero",
        6,
    ),
)


def entries(summary: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The groups, what needs its bits most first; none where they were not asked for."""
    return summary.get("sensitivity") or ()


def is_measured(summary: Mapping[str, Any]) -> bool:
    """Whether there are figures; a dry run has groups only."""
    found = entries(summary)
    return bool(found) and "kld_mean" in found[0]


def value(entry: Mapping[str, Any], key: str) -> float | None:
    """What a column sorts by."""
    slope = entry.get("kld_by_position") or {}
    return number(slope, "nats_per_1000_tokens") if key == "kld_by_position" else number(entry, key)


def telling(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that say something."""
    return [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]


def names(summary: Mapping[str, Any]) -> dict[str, str]:
    """A group's name -> one for where there is little room."""
    return short_names([str(entry["group"]) for entry in entries(summary)], longest=30)


def variant_of(summary: Mapping[str, Any]) -> str:
    """Name of the variant that the tensors are from."""
    return next((str(v["name"]) for v in summary["variants"]), "the variant")


def command(summary: Mapping[str, Any]) -> str | None:
    """What makes the mixture's file; None where there is none, or where it cannot be written."""
    mixture = summary.get("mixture")
    return mixture["command"] if mixture else None


def sentences(summary: Mapping[str, Any], base: str) -> list[str]:
    """What the swaps say; empty where they were not asked for."""
    if not is_measured(summary):
        return []
    return [
        said
        for said in (
            _extremes(summary),
            _additive(summary),
            _drifting(summary),
            _mixed(summary, base),
            _beside(summary),
        )
        if said
    ]


def _extremes(summary: Mapping[str, Any]) -> str:
    known = [e for e in entries(summary) if e["kld_per_mb"] is not None]
    if len(known) < 2:
        return ""
    most, least = known[0], known[-1]
    return (
        f"Of the tensors of {variant_of(summary)} put in the base's places, {most['group']} cost the most "
        f"divergence for each byte saved ({_per_mb(most)} nats/MB), {least['group']} the least "
        f"({_per_mb(least)})."
    )


def _additive(summary: Mapping[str, Any]) -> str:
    told = summary.get("additivity")
    if not told or told["ratio"] is None:
        return ""
    return (
        f"Divergences of the groups add up to {told['kld_sum']:.4g} nats, and all together give "
        f"{told['kld_together']:.4g}: the sum is {told['ratio']:.3g} times that."
    )


def _drifting(summary: Mapping[str, Any]) -> str:
    slope = summary.get("kld_by_position")
    if not slope:
        return ""
    p = slope["p"]
    verdict = "it drifts" if slope["nats_per_1000_tokens"] > 0 else "it falls"
    said = verdict if p < LEVEL else "no drift is seen"
    return (
        f"Divergence of {variant_of(summary)} changes by {_drift(summary)} nats per 1,000 tokens of position "
        f"(p = {probability(p)}): {said}."
    )


def _mixed(summary: Mapping[str, Any], base: str) -> str:
    mixture = summary.get("mixture")
    if not mixture:
        return ""
    kld = with_error(number(mixture, "kld_mean"), first_known(mixture, *_ERRORS))
    swapped = ", ".join(mixture["groups"][:12])
    more = f" and {len(mixture['groups']) - 12} more" if len(mixture["groups"]) > 12 else ""
    return (
        f"For {size(mixture['target_bytes'])}: {base} with {swapped}{more} of {variant_of(summary)} is "
        f"{size(mixture['bytes'])} ({mixture['bpw']:.2f} bpw), mean KLD {kld}, ln(PPL/base) "
        f"{with_error(mixture['ln_ratio'], mixture['ln_ratio_stderr_clustered'], '+')}; adding up the groups "
        f"promised {mixture['kld_expected']:.4g}."
    )


def _beside(summary: Mapping[str, Any]) -> str:
    mixture = summary.get("mixture")
    if not mixture:
        return ""
    plain = [
        f"{row['name']} {size(row['bytes'])}, mean KLD "
        f"{with_error(row['kld_mean'], row['kld_stderr_clustered'])}"
        for row in mixture["beside"]
    ]
    if not plain:
        return "No plain variant of that size was compared with this base on these windows yet."
    return f"Beside it, plain variants next to that size: {'; '.join(plain)}."
