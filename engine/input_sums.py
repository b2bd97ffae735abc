"""What weight matrices are multiplied with, summed up: the raw material of importance matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.kernels.product import SQUARES, SQUARES_BYTES, SUMMED
from engine.kernels.squares import LARGEST, LIMB_BITS, LIMBS

if TYPE_CHECKING:
    from engine.model import Model

_MASK = np.int64(2**LIMB_BITS - 1)


class InputSums:
    """Sums, over all tokens of all batches from now on, of the squares of what each matrix multiplies.

    They are exact integers (engine.kernels.squares): the same for any batches, threads or order. The output
    matrix is not among them. Tokens that are computed once for several sequences count once.

    Attributes:
        groups: names of the matrices that multiply the same input, as the file has them.
        columns: of each group's input.
    """

    def __init__(self, model: Any) -> None:
        layers = [
            [[layer[name] for name in names if name in layer] for names in model.INPUTS]
            for layer in model.matrices.by_layer
        ]
        inputs = [
            ([f"blk.{i}.{name}.weight" for name in names if name in layer], matrices)
            for i, (layer, groups) in enumerate(zip(model.matrices.by_layer, layers, strict=True))
            for names, matrices in zip(model.INPUTS, groups, strict=True)
            if matrices
        ]
        self.groups = tuple(tuple(names) for names, _ in inputs)
        self.columns = tuple(matrices[0].columns for _, matrices in inputs)
        self._model, self._n_seen = model, model.n_seen
        self._sums: list[NDArray[np.int64]] = []
        width = max(self.columns) + 1
        for rank, (_, matrices) in enumerate(inputs, 1):
            matrices[0].fields[SUMMED] = rank  # the first one is at hand when its input is
        model.refresh()
        for work in model.scratch.crew.works:
            sums = np.zeros((len(inputs), width, LIMBS), np.int64)
            self._sums.append(sums)
            work.fields[SQUARES], work.fields[SQUARES_BYTES] = sums.ctypes.data, sums[0].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(sums.nbytes for sums in self._sums)

    def drain(self) -> tuple[int, list[NDArray[np.int64]]]:
        """Tokens since the last call, and the sums of each group: (columns, 3) int64; begins anew.

        The sum of a column is l0 + l1 2^-44 + l2 2^-88, 0 <= l1, l2 < 2^44. Add what several calls gave as
        integers, up to 2^18 of them, and let `exact_sum` carry.

        Raises:
            EngineError: an input was too large (2^22), infinite or not a number; names the first group.
        """
        total = np.sum(self._sums, axis=0)
        n_tokens, self._n_seen = self._model.n_seen - self._n_seen, self._model.n_seen
        for sums in self._sums:
            sums[:] = 0
        found = []
        for names, columns, sums in zip(self.groups, self.columns, total, strict=True):
            if sums[columns, 0]:
                raise EngineError(
                    f"{sums[columns, 0]} values that {names[0]!r} multiplies are not finite, or not below "
                    f"{LARGEST:,.0f}: the model overflows on this text"
                )
            found.append(carried(sums[:columns]))
        return n_tokens, found


def sum_inputs(model: Model) -> InputSums:
    """Has a loaded model sum up what its matrices multiply; see `InputSums`. Once a model."""
    return InputSums(model)


def carried(limbs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same numbers with limbs 1 and 2 below 2^44: (..., 3) int64."""
    l1 = limbs[..., 1] + (limbs[..., 2] >> LIMB_BITS)
    return np.stack([limbs[..., 0] + (l1 >> LIMB_BITS), l1 & _MASK, limbs[..., 2] & _MASK], axis=-1)


def exact_sum(limbs: NDArray[np.int64]) -> NDArray[np.float64]:
    """The numbers that limbs (..., 3) stand for, as float64, rounded the same way for equal numbers."""
    l0, l1, l2 = (part.astype(np.float64) for part in np.moveaxis(carried(limbs), -1, 0))
    value: NDArray[np.float64] = l0 + (l1 + l2 * 2.0**-LIMB_BITS) * 2.0**-LIMB_BITS
    return value
