"""From the finished shards of all pairs to the figures that people decide by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import metrics, provenance, store
from pipeline.compare.plan import Pair, Planned
from pipeline.compare.settings import FIGURES
from pipeline.compare.sketch import Sketch, merged
from pipeline.compare.statistics import EXTREMES, SUMS, Rung, Targets, figures, figures_of_sums, neighbours
from pipeline.errors import IncompleteError
from pipeline.executor import ShardFailure, shards_missing
from pipeline.shards import Shard
from pipeline.tables import TOKENS_SCHEMA

Windows = npt.NDArray[np.int64]
Finished = Mapping[str, Mapping[Shard, Path]]


def blank(comparison: Planned) -> dict[str, Any]:
    """Every key of the contract's JSON, what is known at once filled in."""
    import engine

    asked, pairs = comparison.asked, comparison.pairs
    reused = sum(len(pair.finished.paths) for pair in pairs)
    return {
        "job": "compare",
        "ok": True,
        "exit_code": 0,
        "error": None,
        "run_key": comparison.run_key,
        "measure_key": provenance.key_of(comparison.measure),
        "table": str(comparison.folder),
        "mlflow_run_id": None,
        "wall_s": None,
        "compile_s": None,
        "load_s": None,
        "version": provenance.version(),
        "numerics": engine.NUMERICS,
        "warnings": comparison.warnings,
        "base": {**comparison.base.told(), "ppl": None, "ppl_stderr": None, "ppl_stderr_clustered": None,
                 "nll_sha256": None},
        "variants": [unknown(pair) for pair in pairs],
        "report": None,
        "overhead": None,
        "limits_broken": [],
        "logits": None,
        "n_windows": comparison.n_windows,
        "n_scored": None,
        "n_tokens": None,
        "n_tokens_text": int(asked.stream.tokens.size),
        "stopped": False,
        "tok_per_s": None,
        "n_workers": None,
        "shards_done": reused,
        "shards_reused": reused,
        "n_shards": sum(len(pair.shards) for pair in pairs),
        "data_sha256": comparison.measure["data_sha256"],
        "tokens_sha256": comparison.measure["tokens_sha256"],
        "keep_tokens": comparison.settings.keep_tokens,
        "model_resident_bytes": None,
        "model_pss_sum_bytes": None,
        "anonymous_bytes_max": None,
    }  # fmt: skip


def unknown(pair: Pair) -> dict[str, Any]:
    """A variant's entry before anything is known of its scores."""
    return {
        **pair.variant.told(),
        "pair_key": pair.key,
        "table": str(pair.folder),
        "n_windows": None,
        "n_scored": None,
        **dict.fromkeys(FIGURES),
        "p_vs_next": None,
        "stopped": False,
        "decided_at": None,
        "tok_per_s": None,
        "nll_sha256": None,
        "kld_sha256": None,
    }


def tables(comparison: Planned, finished: Finished, counted: Windows) -> dict[str, pa.Table]:
    """The windows that count of each pair, by its key, in the text's order.

    Raises:
        StorageFailure: a shard cannot be read back.
    """
    found = {}
    for pair in comparison.pairs:
        paths = {shard: path for shard, path in finished[pair.key].items() if _is_wanted(shard, counted)}
        rows = store.read_windows(paths, TOKENS_SCHEMA)
        found[pair.key] = rows.filter(pa.array(np.isin(rows.column("window").to_numpy(), counted)))
    return found


def conclusion(
    comparison: Planned, rows: Mapping[str, pa.Table], counted: Windows, decided_at: Mapping[str, int]
) -> dict[str, Any]:
    """Figures of the base and of every variant, as the summary has them.

    Args:
        rows: what `tables` says.
        counted: windows in the order in which they were taken.
        decided_at: by key of a pair, of `stop=decided`.
    """
    stopped = counted.size < comparison.n_windows
    taken = np.argsort(np.argsort(counted))  # of the rows, in the order in which windows were taken
    by_decision = comparison.settings.stop.name == "decided"
    sums = {key: {n: _column(table, n) for n in ("window", *SUMS, *EXTREMES)} for key, table in rows.items()}
    ladder = [
        Rung(pair.key, pair.variant.n_bytes, *(c[n][taken] for n in ("window", "nll_sum", "n_scored")))
        for pair in comparison.pairs
        for c in [sums[pair.key]]
    ]
    p_values = neighbours(ladder, anytime=by_decision)
    variants = []
    for pair, p in zip(comparison.pairs, p_values, strict=True):
        columns = sums[pair.key]
        variants.append(
            unknown(pair)
            | _figures(rows[pair.key], columns)
            | {
                "p_vs_next": p,
                "stopped": stopped,
                "decided_at": decided_at.get(pair.key),
                "tok_per_s": _speed(rows[pair.key]),
                "nll_sha256": metrics.nll_sha256(columns["nll_sum"]),
                "kld_sha256": metrics.nll_sha256(columns["kld_sum"]),
            }
        )
    first, table = variants[0], rows[comparison.pairs[0].key]
    base = {
        **comparison.base.told(),
        "ppl": first["ppl_base"],
        "ppl_stderr": first["ppl_base_stderr"],
        "ppl_stderr_clustered": first["ppl_base_stderr_clustered"],
        "nll_sha256": metrics.nll_sha256(sums[comparison.pairs[0].key]["nll_base_sum"]),
    }
    return {
        "base": base,
        "variants": variants,
        "n_windows": counted.size,
        "n_scored": first["n_scored"],
        "n_tokens": int(_column(table, "n_tokens").sum()),
        "stopped": stopped,
    }


def missing(comparison: Planned, finished: Finished, counted: Windows) -> list[tuple[Pair, Shard]]:
    """Shards that the windows which count need and that are not there."""
    return [
        (pair, shard)
        for pair in comparison.pairs
        for shard in pair.shards
        if _is_wanted(shard, counted) and shard not in finished[pair.key]
    ]


def of_the_finished(
    comparison: Planned, finished: Finished, lacking: Sequence[tuple[Pair, Shard]]
) -> dict[str, Any]:
    """The variants where some lack shards: figures of those that do not, without a place on a ladder."""
    short = {pair.key for pair, _ in lacking}
    whole = [pair for pair in comparison.pairs if pair.key not in short]
    if not whole:
        return {}
    some = replace(comparison, pairs=whole)
    rows = tables(some, finished, comparison.order)
    found = conclusion(some, rows, comparison.order, {})
    done = {v["pair_key"]: v | {"p_vs_next": None} for v in found["variants"]}
    variants = [done.get(pair.key, unknown(pair)) for pair in comparison.pairs]
    return {"base": found["base"], "variants": variants}


def incomplete(missing_of: Sequence[tuple[Pair, Shard]], failures: Sequence[ShardFailure]) -> IncompleteError:
    """Names what is missing, and why."""
    pairs: dict[Shard, list[str]] = {}
    for pair, shard in missing_of:
        pairs.setdefault(shard, []).append(pair.variant.name)
    names = {shard: f"{shard.file_name} of {', '.join(found)}" for shard, found in pairs.items()}
    return shards_missing(f"{len(pairs)} shards were set aside", names, failures)


def _figures(table: pa.Table, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """From the targets where all rows have them, else from sums and sketches."""
    if not table.column("nll").null_count:
        lists = {n: table.column(n).combine_chunks().flatten().to_numpy() for n in _LISTS}
        return figures(
            Targets(
                window=np.repeat(columns["window"], columns["n_scored"]),
                nll_base=lists["nll_base"],
                nll=lists["nll"],
                kld=lists["kld"].astype(np.float64),
                same_top=lists["top_base"] == lists["top"],
            )
        )
    return figures_of_sums(columns, {name: _sketch(table, name) for name in ("kld", "dp")})


def _speed(table: pa.Table) -> float | None:
    """Tokens that a worker takes through the variant's layers in a second, its head left out."""
    seconds = float(np.nansum(table.column("layers_s").to_numpy()))
    return int(_column(table, "n_tokens").sum()) / seconds if seconds > 0 else None


def _is_wanted(shard: Shard, counted: Windows) -> bool:
    return bool(((counted >= shard.first_window) & (counted < shard.end)).any())


_LISTS = ("nll_base", "nll", "kld", "top_base", "top")


def _sketch(table: pa.Table, name: str) -> Sketch:
    keys, counts = (table.column(f"{name}_{part}").to_pylist() for part in ("keys", "counts"))
    return merged(zip(keys, counts, strict=True))


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = table.column(name).to_numpy()
    return found
