"""Weight matrices that stay quantized in the mapping, and products with them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModel
from engine.kernels.attention import BLOCK
from engine.kernels.heads import add_bias
from engine.kernels.logprob import HEAD_ROWS
from engine.kernels.matmul import group_rows, multiply, multiply_swiglu, pack
from engine.kernels.tile import MR, NR
from engine.quants import decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine.gguf import GGUFFile, Tensor


_NONE = np.empty(0, np.int64)


class Matrix:
    """A (rows, columns) weight: a view on the mapped file and the decoder of its type; owns only its bias.

    `bias` is (rows,) float32, or empty where the file has none.
    """

    def __init__(self, tensor: Tensor, bias: NDArray[np.float32] | None = None) -> None:
        self.bias = np.empty(0, np.float32) if bias is None else bias
        self.rows, self.columns = tensor.shape
        self._data = tensor.data
        self._decode = decoder(tensor.type.name)
        self._blocks = self.columns // tensor.type.block_size  # of a row

    def decode(self, first: int, count: int, out: NDArray[np.float32]) -> None:
        """Rows [first, first + count) as float32 into the flat `out`."""
        self._decode(self._data, first * self._blocks, count * self._blocks, out)

    def packed(self, first: int, count: int, scratch: Scratch, which: int = 0) -> NDArray[np.float32]:
        """Rows [first, first + count) decoded and packed for the tile, in `scratch` until its next use."""
        self.decode(first, count, scratch.rows)
        panels = -(-count // MR)
        packed = scratch.packs[which][: panels * MR * self.columns].reshape(panels, self.columns, MR)
        pack(scratch.rows[: panels * MR * self.columns].reshape(-1, self.columns), count, packed)
        return packed


def matrix(file: GGUFFile, name: str, rows: int, columns: int) -> Matrix:
    """The named weight and the bias beside it, their shapes checked."""
    bias = optional_vector(file, f"{name.removesuffix('.weight')}.bias", rows)
    return Matrix(_tensor(file, name, (rows, columns)), bias)


def vector(file: GGUFFile, name: str, size: int) -> NDArray[np.float32]:
    """A private float32 copy of a one-dimensional weight (4 * size bytes; norms and biases)."""
    tensor = _tensor(file, name, (size,))
    out = np.empty(size, np.float32)
    decoder(tensor.type.name)(tensor.data, 0, size // tensor.type.block_size, out)
    return out


def optional_vector(file: GGUFFile, name: str, size: int) -> NDArray[np.float32]:
    """The same, empty where the file has no such weight."""
    return vector(file, name, size) if name in file.tensors else np.empty(0, np.float32)


def _tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise UnsupportedModel(f"{file.path}: tensor {name!r} is missing; is the file complete?")
    if tensor.shape != shape:
        raise UnsupportedModel(
            f"{file.path}: tensor {name!r} has shape {tensor.shape}; its metadata asks for {shape}"
        )
    return tensor


class Scratch:
    """Working memory of one thread, allocated once. No size in it depends on the vocabulary."""

    def __init__(self, depths: Sequence[int], head_width: int) -> None:
        floats = max(max(group_rows(d), HEAD_ROWS) * d for d in depths)
        self.rows = np.zeros(floats, np.float32)
        self.packs = (np.zeros(floats, np.float32), np.zeros(floats, np.float32))
        self.product = np.zeros((512, NR), np.float32)
        self.sums = np.zeros(NR, np.float64)
        padded = -(-head_width // MR) * MR
        self.query = np.zeros((head_width, NR), np.float32)
        self.block_keys = np.zeros(BLOCK * head_width, np.float32)
        self.block_values = np.zeros(BLOCK * padded, np.float32)
        self.scores = np.zeros((BLOCK, NR), np.float32)
        self.acc = np.zeros((padded, NR), np.float32)
        self.lanes = np.zeros((4, NR), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        arrays = (
            self.rows,
            *self.packs,
            self.product,
            self.sums,
            self.query,
            self.block_keys,
            self.block_values,
            self.scores,
            self.acc,
            self.lanes,
        )
        return sum(a.nbytes for a in arrays)


@dataclass(frozen=True)
class Part:
    """The panels [first, last) of a batch that one thread takes through a stage, with its own scratch.

    `tasks`: starts and counts, int64, of the runs of tokens that attend together (engine.kernels.attention).
    """

    first: int
    last: int
    n_tokens: int  # of the whole batch
    scratch: Scratch
    tasks: tuple[NDArray[np.int64], NDArray[np.int64]] = (_NONE, _NONE)


def project(weight: Matrix, x: NDArray[np.float32], out: NDArray[np.float32], part: Part) -> None:
    """out = weight x + bias for the panels of `part`: decoded and packed a group of rows at a time."""
    step = group_rows(weight.columns)
    for row in range(0, weight.rows, step):
        count = min(step, weight.rows - row)
        packed = weight.packed(row, count, part.scratch)
        multiply(packed, count, x, row, part.first, part.last, part.n_tokens, out)
    add_bias(out, weight.bias, part.first, part.last)


def project_swiglu(
    gate: Matrix, up: Matrix, x: NDArray[np.float32], out: NDArray[np.float32], part: Part
) -> None:
    """out = silu(gate x) * (up x) for the panels of `part`."""
    step = group_rows(gate.columns)
    for row in range(0, gate.rows, step):
        count = min(step, gate.rows - row)
        gates, ups = gate.packed(row, count, part.scratch, 0), up.packed(row, count, part.scratch, 1)
        scratch = part.scratch.product
        multiply_swiglu(gates, ups, count, x, row, part.first, part.last, part.n_tokens, scratch, out)


class Crew:
    """The threads of one model: each takes its share of a batch's panels through a stage; all meet at its
    end.

    Kernels release the GIL, so plain threads run at once; a stage is a whole half layer, so the meeting is
    cheap.
    """

    def __init__(self, threads: int, make_scratch: Callable[[], Scratch]) -> None:
        self.scratches = [make_scratch() for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engine") if threads > 1 else None

    def parts(self, n_tokens: int) -> list[Part]:
        """Shares of ceil(n_tokens / NR) panels, as even as whole panels allow."""
        n_panels = -(-n_tokens // NR)
        count = min(len(self.scratches), n_panels)
        borders = [n_panels * i // count for i in range(count + 1)]
        return [Part(borders[i], borders[i + 1], n_tokens, self.scratches[i]) for i in range(count)]

    def run(self, stage: Callable[..., None], parts: Sequence[Part], *arguments: Any) -> None:
        """stage(part, *arguments) for every part; returns when all are done, raises what one raised."""
        if self._pool is None or len(parts) == 1:
            for part in parts:
                stage(part, *arguments)
        else:
            for future in [self._pool.submit(stage, part, *arguments) for part in parts]:
                future.result()
