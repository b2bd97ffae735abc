"""A comparison read back from its tables, and what notebooks ask of it beyond the figures that it stored.

    read                       rows of table=comparisons, and those of table=tokens behind them
    saved, will_do             bytes less than the base; the variants near enough to ship
    pairing                    errors of a difference with and without pairing its windows
    settling, windows_needed   what a number of windows can see
    drift                      whether divergence grows along a text

All errors are in ln perplexity (nats per target), so that those of a ratio and of its two sides can stand
beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline import store
from pipeline.compare import student
from pipeline.compare.ladder import smallest_difference
from pipeline.compare.report.binned import Targets
from pipeline.errors import StoreError
from pipeline.folders import folder_of, local_files
from pipeline.metrics import clustered_stderr
from pipeline.results import ResultsSettings, Selection, results
from pipeline.settings import PathsSettings
from pipeline.tables import TOKENS_SCHEMA

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Variant = Mapping[str, Any]

MOST_WINDOWS = 1_000_000
"""Nobody scores more; what needs more is out of reach."""
_SETTLING_POINTS = 60


@dataclass(frozen=True)
class Comparison:
    """A comparison that ended, as its tables have it.

    Attributes:
        folder: of the results that it was read from.
        variants: rows of `table=comparisons`, the largest first.
    """

    folder: Path
    run_key: str
    variants: list[dict[str, Any]]

    @property
    def base(self) -> dict[str, Any]:
        """What is known of the base: name, bytes, perplexity and its errors."""
        row = self.variants[0]
        errors = {f"ppl{error}": row[f"ppl_base{error}"] for error in ("", "_stderr", "_stderr_clustered")}
        return {"name": row["base_name"], "bytes": row["base_bytes"], **errors}

    def windows(self, variant: Variant) -> pa.Table:
        """Rows of `table=tokens` that the figures of a variant are of, in window order.

        Raises:
            StoreError: they are not there.
        """
        folder = store.tokens_folder(self.folder, variant["pair_key"])
        with local_files(sorted(folder.glob("shard-*.parquet"))) as shards:
            table = ds.dataset([str(path) for path in shards], TOKENS_SCHEMA).to_table() if shards else None
        if table is None or table.num_rows < variant["n_windows"]:
            raise StoreError(
                f"{folder}: has {0 if table is None else table.num_rows} windows of {variant['name']}, "
                f"expected {variant['n_windows']}",
                "run the comparison again; only what is missing is computed",
            )
        return table.sort_by("window").slice(0, variant["n_windows"])


def read(folder: str | Path, run_key: str | None = None, *, bases: Sequence[str] = ("*",)) -> Comparison:
    """A complete comparison of a results folder.

    Args:
        run_key: which one; None for the latest of a base whose name is like the first of `bases` that any is
            like.
        bases: names in which `*` stands for any characters.

    Raises:
        StoreError: there is none.
    """
    chosen = Selection(
        table="comparisons",
        filter={} if run_key is None else {"run_key": run_key},
        where="exit_code in (0, 1)",
        columns=["*"],
    )
    rows = results(ResultsSettings(PathsSettings(str(folder)), chosen)).rows
    wanted = ("*",) if run_key is not None else bases
    alike = next(
        (found for name in wanted if (found := [row for row in rows if fnmatchcase(row["base_name"], name)])),
        None,
    )
    if alike is None:
        which = f"comparison {run_key}" if run_key is not None else f"comparison of {' or '.join(bases)}"
        raise StoreError(
            f"{folder}: holds no complete {which}", "run `pagemill compare` with this folder as paths.results"
        )
    key = max(alike, key=lambda row: row["finished_at"])["run_key"]
    variants = [row for row in alike if row["run_key"] == key]
    variants = sorted(variants, key=lambda row: (-row["bytes"], row["pair_key"]))
    return Comparison(folder_of(str(folder)), key, variants)


def saved(variant: Variant) -> int:
    """Bytes by which a variant is smaller than its base."""
    return int(variant["base_bytes"]) - int(variant["bytes"])


def will_do(variants: Iterable[Variant], tolerance: float) -> list[Variant]:
    """The variants that lose less than `tolerance` nats per token for sure, the smallest first.

    For sure: the upper ends of the 95 % intervals of ln(PPL / base) and of the mean divergence are both below
    it. The two are one question on two texts: on text that the base itself would write, ln(PPL / base) is the
    divergence. A variant of one window has no interval, and does not pass.
    """
    near = [
        v
        for v in variants
        if all(v[end] is not None and v[end] < tolerance for end in ("ln_ratio_high", "kld_mean_high"))
    ]
    return sorted(near, key=lambda v: int(v["bytes"]))


class Pairing(NamedTuple):
    """Standard errors of ln(PPL / base): of two runs that have nothing in common, and of the same windows.

    Attributes:
        unpaired, paired: clustered by window.
        unpaired_naive, paired_naive: with targets taken as independent, as llama.cpp prints them.
    """

    unpaired: float
    paired: float
    unpaired_naive: float
    paired_naive: float

    @property
    def gain(self) -> float:
        """How many times smaller pairing makes the error; the square is how many times fewer windows do."""
        return self.unpaired / self.paired if self.paired else math.inf

    @property
    def gain_naive(self) -> float:
        """The same of the errors that take targets as independent."""
        return self.unpaired_naive / self.paired_naive if self.paired_naive else math.inf


def pairing(variant: Variant) -> Pairing:
    """What pairing is worth for a variant, from its figures; at least two windows."""

    def unpaired(error: str) -> float:
        return math.hypot(
            variant[f"ppl{error}"] / variant["ppl"], variant[f"ppl_base{error}"] / variant["ppl_base"]
        )

    return Pairing(
        unpaired("_stderr_clustered"),
        variant["ln_ratio_stderr_clustered"],
        unpaired("_stderr"),
        variant["ln_ratio_stderr"],
    )


class Settling(NamedTuple):
    """ln(PPL / base) of the first windows; all arrays are (m,).

    Attributes:
        n: windows, from two to all.
        mean, stderr: of those; clustered.
        smallest: the difference that so many see in four of five samples, two-sided at 5 %.
    """

    n: Integers
    mean: Floats
    stderr: Floats
    smallest: Floats


def differences(windows: pa.Table) -> tuple[Floats, Integers]:
    """(G,) sums of nll less the base's over each window, and its targets."""
    mine, base, counts = (windows[name].to_numpy() for name in ("nll_sum", "nll_base_sum", "n_scored"))
    return mine - base, counts


def settling(windows: pa.Table) -> Settling:
    """How a difference and its error settle as windows come in; at most some 60 points."""
    sums, counts = differences(windows)
    n = np.unique(np.geomspace(2, sums.size, _SETTLING_POINTS).round()).astype(np.int64)
    stderr = [clustered_stderr(sums[:k], counts[:k]) for k in n]
    return Settling(
        n,
        np.array([sums[:k].sum() / counts[:k].sum() for k in n]),
        np.array(stderr),
        np.array([smallest_difference(s, int(k)) for s, k in zip(stderr, n, strict=True)]),
    )


def windows_needed(variant: Variant, effect: float) -> int | None:
    """Windows that would see a difference of `effect` nats in four of five samples; None if over a million.

    They are taken to vary as those that there are.
    """
    per_window = variant["ln_ratio_stderr_clustered"] * math.sqrt(variant["n_windows"])

    def sees(n: int) -> bool:
        return smallest_difference(per_window / math.sqrt(n), n) <= abs(effect)

    if not sees(MOST_WINDOWS):
        return None
    low, high = 1, 2
    while not sees(high):
        low, high = high, min(2 * high, MOST_WINDOWS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(middle) else (middle, high)
    return high


class Drift(NamedTuple):
    """Least-squares slope of divergence along position, its error clustered by window, p that it is zero."""

    nats_per_1000_tokens: float
    stderr: float
    p: float


def drift(found: Targets) -> Drift | None:
    """Whether the divergence grows with position; None for one window or one position.

    A line says nothing of the shape, but a state that drifts away from the base's has one that rises. The
    error is CR1 (Liang & Zeger 1986) as everywhere, the test Student's with windows less one degrees.
    """
    n_windows = np.unique(found.row).size
    x = found.position - found.position.mean()
    squares = float((x * x).sum())
    if n_windows < 2 or not squares:
        return None
    slope = float((x * found.kld).sum()) / squares
    residuals = found.kld - found.kld.mean() - slope * x
    sums = np.bincount(found.row, x * residuals)
    stderr = math.sqrt(n_windows / (n_windows - 1) * float((sums * sums).sum())) / squares
    t = slope / stderr if stderr else math.copysign(math.inf, slope) if slope else 0.0
    return Drift(1000 * slope, 1000 * stderr, student.two_sided_p(t, n_windows - 1))
