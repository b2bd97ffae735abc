"""The figures of a variant as people read them: one list of columns for terminal, markdown and page.

A share or a probability is a fraction in the summary and per cent here. What is null, missing or not finite
is a dash.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Variant = Mapping[str, Any]

DASH = "-"


def number(variant: Variant, key: str) -> float | None:
    """A figure, None where it is unknown or not finite."""
    value = variant.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def first_known(variant: Variant, *keys: str) -> float | None:
    """The first of these figures that is known."""
    return next((value for key in keys if (value := number(variant, key)) is not None), None)


def with_error(value: float | None, error: float | None, sign: str = "") -> str:
    """`0.0412 ±0.0090`: one or two digits of the error, and the value to the same place.

    Two where the error begins with 10 to 35, else one, as the Particle Data Group rounds. Six digits of the
    value where there is no error.
    """
    if value is None:
        return DASH
    if error is None or not error > 0:
        return f"{value:{sign}.6g}"
    exponent = math.floor(math.log10(error))
    lead = error / 10.0**exponent
    digits = 2 if lead < 3.55 else 1  # 0.095 and up is 0.10: two digits again, at the same place
    places = min(max(digits - 1 - exponent, 0), 12)
    return f"{value:{sign},.{places}f} ±{error:,.{places}f}"


def size(n_bytes: float | None) -> str:
    """`144.8 MB`, `7.16 GB`: four digits, decimal units."""
    if n_bytes is None:
        return DASH
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            value = n_bytes / scale
            return f"{value:.{3 - len(str(int(value))) if value < 1000 else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


def probability(p: float | None) -> str:
    """`0.012`, and `<1e-4` below."""
    if p is None:
        return DASH
    return "<1e-4" if p < 1e-4 else f"{p:.2g}" if p < 0.995 else "1"


def _plain(key: str, form: str, scale: float = 1.0) -> Callable[[Variant], str]:
    def cell(variant: Variant) -> str:
        value = number(variant, key)
        return DASH if value is None else format(value * scale, form)

    return cell


def _pair(key: str, errors: Sequence[str], sign: str = "") -> Callable[[Variant], str]:
    return lambda variant: with_error(number(variant, key), first_known(variant, *errors), sign)


def _text(key: str) -> Callable[[Variant], str]:
    return lambda variant: str(variant.get(key) or DASH)


@dataclass(frozen=True)
class Column:
    """One column of the table that everybody sees.

    Attributes:
        key: of the figure that it sorts by.
        heading: short, with the unit.
        cell: variant -> what stands in its row.
        meaning: a sentence for those who have not seen the figure before.
        rank: what a narrow table leaves out last is 0.
    """

    key: str
    heading: str
    cell: Callable[[Variant], str]
    meaning: str
    rank: int

    @property
    def is_text(self) -> bool:
        """Words, which stand at the left; figures stand at the right."""
        return self.key in ("name", "type")


COLUMNS = (
    Column("name", "variant", _text("name"), "the file, or the type that it was quantized to", 0),
    Column("type", "type", _text("type"), "what most of its weights are stored as", 10),
    Column("bpw", "bpw", _plain("bpw", ".2f"), "bits per weight", 4),
    Column("bytes", "size", lambda v: size(number(v, "bytes")), "of the file", 6),
    Column("ppl", "PPL", _plain("ppl", ",.4f"), "perplexity of the variant", 3),
    Column(
        "ln_ratio",
        "ln(PPL/base)",
        _pair("ln_ratio", ("ln_ratio_stderr_clustered", "ln_ratio_stderr"), "+"),
        "logarithm of its perplexity over the base's, ± one standard error, paired and clustered by window; "
        "0.01 is one per cent",
        2,
    ),
    Column(
        "kld_mean",
        "mean KLD",
        _pair("kld_mean", ("kld_stderr_clustered", "kld_stderr")),
        "mean Kullback-Leibler divergence from base to variant over the whole vocabulary, in nats, ± one "
        "standard error clustered by window",
        1,
    ),
    Column("kld_p99", "KLD p99", _plain("kld_p99", ".4g"), "the divergence that one token in 100 exceeds", 8),
    Column(
        "dp_rms",
        "RMS Δp %",
        _plain("dp_rms", ".3f", 100.0),
        "root mean square of how far the probability of the token that follows moved, in percentage points",
        9,
    ),
    Column(
        "same_top",
        "same top %",
        _plain("same_top", ".2f", 100.0),
        "tokens where base and variant find the same one most likely",
        7,
    ),
    Column(
        "p_vs_next",
        "p vs next",
        lambda v: probability(number(v, "p_vs_next")),
        "probability of such a difference in perplexity to the next smaller variant if there were none, "
        "paired by window, corrected for the number of variants (Holm)",
        5,
    ),
)


def telling(rows: Sequence[Variant]) -> list[Column]:
    """The columns that say something; a type that stands in every variant's name is no news.

    Args:
        rows: the base and its variants.
    """

    def tells(column: Column) -> bool:
        if column.key == "type":
            return any(row.get("type") and str(row["type"]) not in str(row["name"]) for row in rows[1:])
        return any(row.get(column.key) is not None for row in rows)

    return [column for column in COLUMNS if tells(column)]


FIRST = (  # in this order; what else a variant has comes after, in its own order
    "name type bytes bpw n_windows n_scored stopped decided_at ppl ppl_stderr ppl_stderr_clustered ppl_base "
    "ppl_base_stderr ppl_base_stderr_clustered corr ln_ratio ln_ratio_stderr ln_ratio_stderr_clustered "
    "ln_ratio_low ln_ratio_high smallest_ln_ratio p_vs_next ratio ratio_stderr ppl_diff ppl_diff_stderr "
    "kld_mean kld_stderr kld_stderr_clustered kld_mean_low kld_mean_high kld_max kld_p999 kld_p99 kld_p95 "
    "kld_p90 kld_p50 kld_p10 kld_p05 kld_p01 kld_p001 kld_min dp_mean dp_stderr dp_stderr_clustered dp_rms "
    "dp_rms_stderr dp_max dp_p999 dp_p99 dp_p95 dp_p90 dp_p75 dp_p50 dp_p25 dp_p10 dp_p05 dp_p01 dp_p001 "
    "dp_min same_top same_top_stderr same_top_stderr_clustered tok_per_s"
).split()

_LABELS = {
    "bpw": "bits per weight",
    "bytes": "bytes",
    "decided_at": "windows until told from the next",
    "corr": "correlation of log-likelihoods",
    "kld_mean": "mean KLD",
    "ln_ratio": "ln(PPL / base)",
    "n_scored": "tokens scored",
    "n_windows": "windows",
    "p_vs_next": "p against the next smaller",
    "ppl": "PPL",
    "ppl_base": "PPL of the base",
    "ppl_diff": "PPL less the base's",
    "ratio": "PPL / base",
    "same_top": "same top %",
    "dp_mean": "mean Δp %",
    "dp_rms": "RMS Δp %",
    "dp": "mean Δp %",
    "kld": "mean KLD",
    "smallest_ln_ratio": "smallest visible ln(PPL / base)",
    "stopped": "stopped before all windows",
    "tok_per_s": "tokens/s",
}
_SUFFIXES = (
    ("_stderr_clustered", " ± clustered"),
    ("_stderr", " ±"),
    ("_low", ", 95 % from"),
    ("_high", ", 95 % to"),
)
_QUANTITIES = {"kld": "KLD", "dp": "Δp %"}


def label(key: str) -> str:
    """A figure's key in words: `kld_p999` -> `KLD p99.9`, `dp_rms_stderr` -> `RMS Δp % ±`."""
    if key in _LABELS:
        return _LABELS[key]
    for suffix, said in _SUFFIXES:
        if key.endswith(suffix):
            return label(key.removesuffix(suffix)) + said
    if found := re.fullmatch(r"(kld|dp)_(?:p(\d+)|(max|min))", key):
        quantity, digits, end = found.groups()
        if end:
            return f"{_QUANTITIES[quantity]} {'largest' if end == 'max' else 'smallest'}"
        share = f"{digits[:2]}.{digits[2:]}".rstrip(".")
        of_all = "median" if digits == "50" else f"p{float(share):g}"
        return f"{_QUANTITIES[quantity]} {of_all}"
    return key.replace("_", " ")


def shown(key: str, value: Any) -> str:
    """A figure of the long table: six digits, fractions in per cent, counts whole."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key.startswith(("dp_", "same_top")):
        return f"{100 * value:.6g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def keys(variants: Iterable[Variant]) -> list[str]:
    """Every key with a plain value that a variant has, the known ones first."""
    found = dict.fromkeys(
        key for variant in variants for key, value in variant.items() if not isinstance(value, (list, dict))
    )
    return [key for key in FIRST if key in found] + [key for key in found if key not in FIRST]


def base_row(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The base as a row of the table: what is known of it, and no difference to itself."""
    told = summary.get("base")
    row = dict(told) if isinstance(told, Mapping) else {}
    if "ppl" not in row:
        row["ppl"] = next((v["ppl_base"] for v in summary["variants"] if v.get("ppl_base") is not None), None)
    return row | {"name": name}


def by_size(variants: Iterable[Variant]) -> list[Variant]:
    """The largest first: the order of every list; those of unknown size last, as they come."""
    return sorted(variants, key=lambda v: -(first_known(v, "bytes", "bpw") or 0.0))


def short_names(names: Sequence[str], longest: int = 24) -> dict[str, str]:
    """Names for where there is little room: without what they all begin with, cut in the middle.

    Two that would become one keep their whole name.
    """
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    begin = [letters[0] for letters in alike] if len(names) > 1 else []
    cut = max((at + 1 for at, c in enumerate(begin) if c in "-._/ "), default=0)
    told = {}
    for name in names:
        rest = name[cut:] or name
        head = (longest - 1) // 2
        told[name] = rest if len(rest) <= longest else f"{rest[:head]}…{rest[head + 1 - longest :]}"
    return {name: short if list(told.values()).count(short) == 1 else name for name, short in told.items()}
