"""The bytes of planned tensors, made by several threads, some rows at a time and in order.

A piece is read from the mapping, decoded, checked and encoded by one thread while others do those behind it
and the caller writes those before it. So a thread's encoder runs on what its own core just decoded, memory is
a few pieces, and the bytes do not depend on threads: each row is encoded by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import engine
from pipeline.errors import ModelError
from pipeline.quantize.imatrix_file import Imatrix
from pipeline.quantize.plan import Planned, is_decodable

PIECE_VALUES = 1 << 19
"""Weights of a piece, 2 MiB as float32, or one row; whole rows of one matrix."""

AHEAD = 2
"""Pieces in memory besides one a thread: one is written while another waits."""

_LARGE = 65504.0  # beyond it float16, and a scale that is one, may become infinite


class Piece(NamedTuple):
    """Some rows of a tensor, counted over all its matrices.

    Attributes:
        weights: what the encoder is told of the columns, (n_columns,); None for nothing.
    """

    first_row: int
    n_rows: int
    weights: NDArray[np.float32] | None


class Encoder:
    """Turns planned tensors into bytes; a context manager, which ends its threads."""

    def __init__(self, file: engine.GGUFFile, imatrix: Imatrix | None, threads: int) -> None:
        self._file, self._imatrix, self._threads = file, imatrix, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, tensor: Planned) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes in the output, in order.

        Raises:
            ModelError: a weight is not finite, or too large for its type; named with its place.
        """
        source = tensor.source
        row_bytes = source.n_bytes // (tensor.n_matrices * tensor.n_rows)
        is_readable = is_decodable(source.type.name)

        def make(piece: Piece) -> NDArray[np.uint8]:
            begin = piece.first_row * row_bytes
            raw = source.data[begin : begin + piece.n_rows * row_bytes]
            return self._encoded(tensor, piece, raw) if is_readable else raw

        pieces = list(self._cut(tensor))
        for piece, made in zip(pieces, self._in_order(make, pieces), strict=True):
            yield made
            self._file.release(source, piece.first_row * row_bytes, piece.n_rows * row_bytes)

    def _in_order(
        self, make: Callable[[Piece], NDArray[np.uint8]], pieces: Iterable[Piece]
    ) -> Iterator[NDArray[np.uint8]]:
        """What `make` gives for each piece; so many are begun ahead of the one that is asked for."""
        begun: deque[Future[NDArray[np.uint8]]] = deque()
        try:
            for piece in pieces:
                begun.append(self._pool.submit(make, piece))
                if len(begun) == self._threads + AHEAD:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def _cut(self, tensor: Planned) -> Iterator[Piece]:
        """The pieces of a tensor, in order; of one matrix each where matrices have weights of their own."""
        name, columns, n_matrices = tensor.entry.name, tensor.n_columns, tensor.n_matrices
        step, n_rows = max(1, PIECE_VALUES // columns), tensor.n_rows
        imatrix = None if tensor.is_copied else self._imatrix
        if imatrix is None or name not in imatrix.entries:
            n_rows, n_matrices = n_rows * n_matrices, 1
        for matrix in range(n_matrices):
            weights = (
                None
                if imatrix is None
                else imatrix.weights(name, columns, matrix=matrix, n_matrices=n_matrices)
            )
            for row in range(0, n_rows, step):
                yield Piece(matrix * n_rows + row, min(step, n_rows - row), weights)

    def _encoded(self, tensor: Planned, piece: Piece, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        values = decoded(raw, tensor.source.type).reshape(piece.n_rows, tensor.n_columns)
        low, high = float(values.min()), float(values.max())  # NaN if any of them is
        if not (np.isfinite(low) and np.isfinite(high)):
            raise self._broken(tensor, piece, values)
        if tensor.is_copied:
            return raw
        made = engine.quantize(values, tensor.entry.type.name, piece.weights)
        if max(-low, high) > _LARGE:
            back = engine.dequantize(made.reshape(-1), tensor.entry.type.name, values.size)
            if not np.isfinite(back).all():
                raise self._too_large(tensor, piece, values, back.reshape(values.shape))
        return made

    def _broken(self, tensor: Planned, piece: Piece, values: NDArray[np.float32]) -> ModelError:
        row, column = (int(i[0]) for i in np.nonzero(~np.isfinite(values)))
        return ModelError(
            f"{self._place(tensor, piece, row, column)} is {values[row, column]}; expected a number",
            "the weights are broken: fetch the file again, or ask who made it",
        )

    def _too_large(
        self, tensor: Planned, piece: Piece, values: NDArray[np.float32], back: NDArray[np.float32]
    ) -> ModelError:
        block = tensor.entry.type.block_size
        row, column = (int(i[0]) for i in np.nonzero(~np.isfinite(back)))
        column = column // block * block
        column += int(np.abs(values[row, column : column + block]).argmax())
        name = tensor.entry.type.name
        return ModelError(
            f"{self._place(tensor, piece, row, column)} is {values[row, column]:g}, too large for {name}",
            "keep the tensor in a type that holds it by "
            f"quantize.tensor_types=['^{tensor.entry.name}$=BF16'], or F32",
        )

    def _place(self, tensor: Planned, piece: Piece, row: int, column: int) -> str:
        """File, tensor and position of a weight."""
        flat = (piece.first_row + row) * tensor.n_columns + column
        at = ", ".join(str(int(i)) for i in np.unravel_index(flat, tensor.entry.shape))
        return f"{self._file.paths[tensor.source.part]}: {tensor.entry.name}[{at}]"


def decoded(raw: NDArray[np.uint8], type_: engine.GGMLType) -> NDArray[np.float32]:
    """float32 weights of some blocks; a view of those that are float32 already and lie on their alignment."""
    if type_.name == "F32":
        values: NDArray[Any] = raw.view("<f4")
        if values.flags.aligned:
            return values
    return engine.dequantize(raw, type_.name, raw.size // type_.block_bytes * type_.block_size)
