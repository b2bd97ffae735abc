"""Exact sums as rows of a table, and shards merged: integers, so that no order of adding them matters.

The engine's sums come as limbs of 44 bits (`engine.InputSums`): l0 + l1 2^-44 + l2 2^-88, l1 and l2 below
2^44. A row is one input: the weight matrices that are multiplied with it, its columns, the tokens summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import engine
from pipeline.errors import ScoreError, StorageFailure
from pipeline.quantize.imatrix_file import Sums
from pipeline.shards import Shard
from pipeline.store import ShardTable, readable

Limbs = npt.NDArray[np.int64]

_BITS = 44
_READ = ("names", "columns", "n_tokens", "limbs")


class Total(NamedTuple):
    """Of one weight matrix: tokens, and limbs (columns, 3)."""

    n_tokens: int
    limbs: Limbs


def rows(
    sums: engine.InputSums, n_tokens: int, limbs: Sequence[Limbs], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each input, with the columns of `common` in all of them."""
    return [
        {**common, "names": list(names), "columns": columns, "n_tokens": n_tokens, "limbs": own.reshape(-1)}
        for names, columns, own in zip(sums.groups, sums.columns, limbs, strict=True)
    ]


def merged(paths: Iterable[Path]) -> dict[str, Total]:
    """The sums over shards, by weight matrix.

    Raises:
        StorageFailure: a file cannot be read back, or was written for other matrices.
        ScoreError: a sum is too large; names the matrix.
    """
    totals: dict[str, Total] = {}
    for n_before, path in enumerate(paths):
        found = _read(path)
        if n_before and found.keys() != totals.keys():
            raise StorageFailure(
                f"{path}: holds sums of other matrices than the shards before it",
                f"another version wrote it; move {path.parent} away and run again",
            )
        for name, (n_tokens, limbs) in found.items():
            n_so_far, so_far = totals.get(name, Total(0, np.zeros_like(limbs)))
            totals[name] = Total(n_so_far + n_tokens, _added(name, so_far, limbs))
    return totals


def matrices(totals: Mapping[str, Total]) -> dict[str, Sums]:
    """The entries of a file: limbs rounded to float64 and then to float32."""
    return {
        name: Sums(
            engine.exact_sum(total.limbs)[None].astype(np.float32), np.array([total.n_tokens], np.float32)
        )
        for name, total in totals.items()
    }


def _added(name: str, one: Limbs, other: Limbs) -> Limbs:
    """The sum with its limbs carried, so that any number of shards may follow."""
    total = one + other
    for low in (2, 1):
        total[:, low - 1] += total[:, low] >> _BITS
        total[:, low] &= (1 << _BITS) - 1
    if (total[:, 0] < 0).any():
        raise ScoreError(
            f"{name}: the squares of its inputs add up to 2^63 and more",
            "the model's weights overflow; check the file's SHA-256 and how it was made",
        )
    return total


def _read(path: Path) -> dict[str, Total]:
    try:
        table = pq.read_table(readable(path), partitioning=None, columns=list(_READ))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StorageFailure(
            f"a finished shard cannot be read back: {error}", "run the same command again"
        ) from error
    found: dict[str, Total] = {}
    for at in range(table.num_rows):
        names, columns, n_tokens, limbs = (table.column(name)[at] for name in _READ)
        values = limbs.values.to_numpy().reshape(columns.as_py(), 3)
        found |= dict.fromkeys(names.as_py(), Total(n_tokens.as_py(), values))
    return found


def _is_whole(table: pa.Table, shard: Shard) -> bool:
    """Whether every row has the limbs of its columns, over the same tokens: so many whole windows."""
    names, columns, n_tokens, limbs = (table.column(name) for name in _READ)
    tokens = set(n_tokens.to_pylist())
    return (
        len(names) > 0
        and len(tokens) == 1
        and tokens.pop() % shard.n_windows == 0
        and pc.list_value_length(limbs).to_pylist() == [3 * n for n in columns.to_pylist()]
    )


IMATRIX = ShardTable("imatrix", _is_whole)
"""`table=imatrix`: a row per input of a shard's windows."""
