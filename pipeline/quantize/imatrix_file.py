"""Importance matrices as files: llama.cpp's GGUF format, written and read; the one before it, read only.

    general.type           "imatrix"
    imatrix.datasets       names of the texts
    imatrix.chunk_count    u32, windows of them that were read
    imatrix.chunk_size     u32, tokens of a window
    <tensor>.in_sum2       F32, (n_matrices, columns): squares of what the matrix's columns are multiplied
                           with, summed over tokens
    <tensor>.counts        F32, (n_matrices, 1): those tokens

`n_matrices` is 1, and then both are vectors, but for a stack of experts, each of which sees tokens of its
own. An encoder weighs the errors of a column by sum / count, in float32; where nothing was seen all columns
weigh 1. Other tensors that a file may hold (sums without squares) are passed over. The older format, `.dat`,
all numbers little-endian:

    | n_entries i32 | n_entries of: length i32, name | n_calls i32 | n_values i32 | f32 ... |
    | chunks i32 | length i32, name of the text |            the last line may be missing

holds sum / count already, times `n_calls`; the experts of a stack lie one behind the other.

Sources: llama.cpp b9190, tools/imatrix/imatrix.cpp (writer), tools/quantize/quantize.cpp and
src/llama-quant.cpp (reader; what it hands to an encoder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import engine
from pipeline import gguf_writer
from pipeline.errors import ModelError

Floats = NDArray[np.float32]

_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_LONGEST_NAME = 1024  # of a .dat: a number beyond it says that the file is something else
_WAY_ON = "give a file that `pagemill imatrix` or llama-imatrix made"


class Sums(NamedTuple):
    """Of one tensor: `sums` (n_matrices, columns) float32, `counts` (n_matrices,) float32."""

    sums: Floats
    counts: Floats


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix in memory, or on views of its file.

    Attributes:
        path: of its file, for messages.
        entries: by tensor name, as `blk.0.attn_q.weight`, in the file's order.
        datasets: names of the texts that it was made from.
        chunk_count, chunk_size: windows, and tokens of a window; 0 where the file does not say.
    """

    path: str
    entries: Mapping[str, Sums]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def weights(self, name: str, columns: int, *, matrix: int = 0, n_matrices: int = 1) -> Floats | None:
        """What llama-quantize hands to a tensor's encoder: float32 (columns,), None where nothing is known.

        Args:
            name: of the tensor.
            columns: of its rows.
            matrix, n_matrices: of a stack of experts, which one of how many.

        Raises:
            ModelError: the file knows the tensor with other columns: it is of another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.size != columns * n_matrices:
            if name == "token_embd.weight":  # llama-quantize goes without, there alone
                return None
            raise ModelError(
                f"{self.path}: {name} has {entry.sums.size:,} columns, expected {columns * n_matrices:,}: "
                "it was made for another model",
                "make one for this model by `pagemill imatrix`",
            )
        counts = entry.counts[:, None]
        seen = counts > 0
        means = np.where(seen, entry.sums / np.where(seen, counts, np.float32(1)), np.float32(1))
        # Flat first: a .dat has the matrices of a stack in one row.
        return np.ascontiguousarray(means.reshape(n_matrices, columns)[matrix], np.float32)


def read_imatrix(path: str | Path) -> Imatrix:
    """The importance matrix in a file of either format; sums of a GGUF file are views on its mapping.

    Raises:
        ModelError: there is no such file, or it is no sound importance matrix: cut short, sums without
            counts, sums that are negative or not finite.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _Binary(path).read()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}", _WAY_ON, kind=type(error).__name__) from error
    if not found.entries:
        raise _refused(path, "holds no sums", "llama-imatrix was given a text that is too short for it")
    for name, (sums, counts) in found.entries.items():
        if not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise _refused(path, f"{name}.counts: {counts.tolist()}, expected numbers of tokens")
        wrong = np.flatnonzero(~((sums >= 0) & (sums < np.inf)))
        if wrong.size:
            value = sums.reshape(-1)[wrong[0]]
            raise _refused(path, f"{name}: the sum at {wrong[0]} is {value}, expected a sum of squares")
    return found


def write_imatrix(
    path: str | Path,
    entries: Mapping[str, Sums],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> str:
    """Write a file in llama.cpp's GGUF format, over one that is there, whole or not at all.

    The bytes are a function of the arguments but `path`, and those that ggml writes for them: tensors in the
    order of their names.

    Returns:
        the SHA-256 of the file.

    Raises:
        StorageFailure: it cannot be written; nothing is left of it.
        ValueError: no entries, or shapes that are not those of `Sums`.
    """
    if not entries:
        raise ValueError("an importance matrix without entries")
    tensors: list[tuple[gguf_writer.Entry, Floats]] = []
    for name in sorted(entries):
        sums, counts = (np.ascontiguousarray(values, "<f4") for values in entries[name])
        if sums.ndim != 2 or counts.shape != sums.shape[:1] or not sums.size:
            raise ValueError(f"{name}: sums {sums.shape} and counts {counts.shape}")
        stacked = sums.shape[0] > 1
        for part, shape, values in (
            ("in_sum2", sums.shape if stacked else sums.shape[1:], sums),
            ("counts", (sums.shape[0], 1) if stacked else (1,), counts),
        ):
            tensors.append((gguf_writer.Entry(f"{name}.{part}", shape, gguf_writer.TYPES["F32"]), values))
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": list(datasets),
        "imatrix.chunk_count": chunk_count,
        "imatrix.chunk_size": chunk_size,
    }
    return gguf_writer.write(
        Path(path),
        [gguf_writer.field(key, value) for key, value in keys.items()],
        [entry for entry, _ in tensors],
        lambda rank: [tensors[rank][1]],
    ).sha256


def _read_gguf(path: Path) -> Imatrix:
    try:
        with engine.open(path) as file:
            kind = file.metadata.get("general.type", "imatrix")
            if kind != "imatrix":
                raise _refused(path, f"general.type is {kind!r}, expected 'imatrix'")
            for key in _KEYS:
                if key not in file.metadata:
                    raise _refused(path, f"has no key {key}")
            datasets, count, size = (file.metadata[key] for key in _KEYS)
            names = tuple(datasets) if isinstance(datasets, Sequence) else (None,)
            named = all(isinstance(name, str) for name in names)
            if not (named and isinstance(count, int) and isinstance(size, int)):
                raise _refused(path, f"{', '.join(_KEYS)}: expected texts and two numbers")
            entries = _paired(path, file.tensors)
            return Imatrix(str(path), entries, tuple(map(str, names)), int(count), int(size))
    except engine.EngineError as error:
        raise ModelError(str(error), _WAY_ON, kind=type(error).__name__) from error


def _paired(path: Path, tensors: Mapping[str, Any]) -> dict[str, Sums]:
    """Sums with their counts; tensors that are neither are left out."""
    entries = {}
    for name in tensors:
        base, _, kind = name.rpartition(".")
        if kind == "counts" and f"{base}.in_sum2" not in tensors:
            raise _refused(path, f"{name} has no sums beside it")
        if kind != "in_sum2":
            continue
        if f"{base}.counts" not in tensors:
            raise _refused(path, f"{name} has no counts beside it")
        sums, counts = tensors[name], tensors[f"{base}.counts"]
        for tensor in (sums, counts):
            if tensor.type.name != "F32":
                raise _refused(path, f"{tensor.name} is {tensor.type.name}, expected F32")
        columns = sums.shape[-1]
        by_matrix = sums.data.view("<f4").reshape(-1, columns)
        numbers = counts.data.view("<f4")
        if numbers.size != by_matrix.shape[0]:
            raise _refused(path, f"{counts.name} has {numbers.size} numbers, expected {by_matrix.shape[0]}")
        entries[base] = Sums(by_matrix, numbers)
    return entries


class _Binary:
    """Reads a .dat, whose lengths are not believed."""

    def __init__(self, path: Path) -> None:
        self._path, self._raw, self._at = path, path.read_bytes(), 0

    def read(self) -> Imatrix:
        """See `read_imatrix`; sums are `sum / count * n_calls`, counts are `n_calls`."""
        n_entries = self._number("the number of entries", 1, len(self._raw))
        entries: dict[str, Sums] = {}
        for _ in range(n_entries):
            name = self._name()
            n_calls = self._number(f"the calls of {name}", -(1 << 31), (1 << 31) - 1)
            n_values = self._number(f"the columns of {name}", 1, len(self._raw))
            values = np.frombuffer(self._take(4 * n_values, name), "<f4").astype(np.float32)
            # Without calls llama-quantize takes the values as they are.
            entries[name] = Sums(values[None], np.array([max(n_calls, 1)], np.float32))
        chunks = 0
        datasets: tuple[str, ...] = ()
        if self._at < len(self._raw):
            chunks = self._number("the number of windows", 0, (1 << 31) - 1)
            datasets = (self._name(),)
        return Imatrix(str(self._path), entries, datasets, chunks, 0)

    def _take(self, n_bytes: int, what: str) -> bytes:
        taken = self._raw[self._at : self._at + n_bytes]
        if len(taken) < n_bytes:
            raise _refused(
                self._path, f"ends at byte {len(self._raw):,} inside {what}: cut short, or no imatrix"
            )
        self._at += n_bytes
        return taken

    def _number(self, what: str, least: int, most: int) -> int:
        number = int.from_bytes(self._take(4, what), "little", signed=True)
        if not least <= number <= most:
            raise _refused(self._path, f"{what} is {number}: not an importance matrix")
        return number

    def _name(self) -> str:
        raw = self._take(self._number("the length of a name", 0, _LONGEST_NAME), "a name")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _refused(self._path, "a name is not UTF-8: not an importance matrix") from error


def _refused(path: Path, what: str, way_on: str = _WAY_ON) -> ModelError:
    return ModelError(f"{path}: {what}", way_on)
