"""A plan and a vocabulary as a GGUF file, a block of rows at a time.

The bytes are a function of the checkpoint, the folder's name, and the settings: no dates, no paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import gguf_writer
from pipeline.convert.encode import KINDS, Kind, encode, kind_of
from pipeline.convert.plan import Plan, Target
from pipeline.convert.tensors import BLOCK_VALUES
from pipeline.errors import ModelError
from pipeline.gguf_writer import Entry, Written


def check_place(out: Path, plan: Plan, wanted: str, *, overwrite: bool) -> None:
    """Refuses a place where the file cannot go; StoreError."""
    needed = sum(_entry(target, wanted).n_bytes for target in plan.targets)
    gguf_writer.check_place("convert.out", out, needed, overwrite=overwrite)


def write(plan: Plan, vocabulary: Mapping[str, Any], name: str, wanted: str, out: Path) -> Written:
    """Writes the file and puts it in its place, over one that is there.

    Args:
        vocabulary: metadata of the tokenizer.
        name: general.name.
        wanted: a key of KINDS.

    Raises:
        ModelError: a weight is not finite, or too large for its type.
        StorageFailure: the file could not be written.
    """
    metadata = {
        "general.architecture": plan.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": KINDS[wanted].file_type,
        "general.quantization_version": 2,
        **plan.metadata,
        **vocabulary,
    }
    fields = [
        gguf_writer.field(key, value)
        for key, value in metadata.items()
        if not (isinstance(value, str) and not value)  # a text that is not there needs no key
    ]
    entries = [_entry(target, wanted) for target in plan.targets]
    return gguf_writer.write(out, fields, entries, lambda rank: _pieces(plan.targets[rank], wanted))


def _pieces(target: Target, wanted: str) -> Iterator[NDArray[Any]]:
    """The bytes of a target, some rows at a time."""
    kind = _kind(target, wanted)
    for values in _blocks(target, kind):
        yield encode(kind, values)
    if target.source is not None:
        target.source.release()


def _blocks(target: Target, kind: Kind) -> Iterator[NDArray[np.float32]]:
    """float32 rows of a target, those of its source first, then zeros.

    Raises:
        ModelError: a weight is not finite, or too large for its type.
    """
    if target.values is not None:
        yield target.values.reshape(target.n_rows, target.n_columns)
        return
    source = target.source
    assert source is not None, "a target has a source or values"
    for block in source.blocks():
        values = source.rows(block if target.order is None else target.order[block])
        _check(target, kind, values, block, source.name)
        if target.change is not None:
            values = target.change(values)
            _check(target, kind, values, block, f"{target.name}, which is made of {source.name}")
        yield values
    n_zeros = target.n_rows * target.n_columns // source.n_columns - source.n_rows
    step = max(1, BLOCK_VALUES // source.n_columns)
    for first in range(0, n_zeros, step):
        yield np.zeros((min(step, n_zeros - first), source.n_columns), np.float32)


def _check(target: Target, kind: Kind, values: NDArray[np.float32], block: slice, name: str) -> None:
    """Raises ModelError for the first weight that is not finite or too large, naming it."""
    magnitude = float(np.abs(values).max())  # NaN if any of them is
    if magnitude <= kind.limit:
        return
    row, column = (int(i[0]) for i in np.nonzero(~(np.abs(values) <= kind.limit)))
    value = float(values[row, column])
    assert target.source is not None
    row = block.start + row if target.order is None else int(target.order[block][row])
    at = f"[{row}, {column}]" if len(target.source.shape) > 1 else f"[{column}]"
    if np.isfinite(value):
        raise ModelError(
            f"{target.source.path}: {name}{at} is {value:g}, too large for {kind.name}",
            "choose another convert.type; f32 and bf16 hold it",
        )
    raise ModelError(
        f"{target.source.path}: {name}{at} is {value}; expected a number",
        "the weights are broken: fetch the file again, or ask who trained the model",
    )


def _kind(target: Target, wanted: str) -> Kind:
    return kind_of(wanted, is_matrix=target.is_matrix, n_columns=target.n_columns)


def _entry(target: Target, wanted: str) -> Entry:
    return Entry(target.name, target.shape, _kind(target, wanted).type)
