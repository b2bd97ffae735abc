"""Where a model goes wrong: the first tensor or layer behind scores that are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.quants import decoder as decoder_of

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile, Tensor
    from engine.models.decoder import Decoder

_BLOCK_WEIGHTS = 1 << 20


def first_broken(model: Any, batch: Batch) -> str | None:
    """Decodes a batch from an empty cache layer by layer; says what is the first that is not finite.

    Args:
        model: as `load_model` returned it.

    Returns:
        A sentence that names a tensor, and the weight if one is the cause; None where all is finite.
    """
    decoder: Decoder = model
    seen: list[str] = []

    def look(name: str, values: NDArray[np.float32]) -> None:
        if not seen and not np.isfinite(values).all():
            wrong = np.argwhere(~np.isfinite(values))[0]
            token = int(batch.order[wrong[0]])
            seen.append(name)
            seen.append(
                f"of what {name} computes, or what is made of it, value {int(wrong[1])} of token {token} is "
                f"{values[tuple(wrong)]}"
            )

    slots, capacity = int(batch.slots.max()) + 1, int(batch.positions.max()) + 1
    decoder.watch(batch, decoder.new_cache(slots, capacity), look)
    if not seen:
        return None
    layer = ".".join(seen[0].split(".")[:2]) + "."
    if seen[0] == "output_norm":
        layer = "output"
    weight = _broken_weight(decoder.file, ("token_embd.", layer) if layer == "blk.0." else (layer,))
    return weight or f"{seen[1]}; the weights of its layer are finite, so it overflows"


def _broken_weight(file: GGUFFile, prefixes: tuple[str, ...]) -> str | None:
    """The first weight of tensors whose names begin so that is not finite."""
    for prefix in prefixes:
        for tensor in file.tensors.values():
            if tensor.name.startswith(prefix):
                found = _first_not_finite(tensor)
                if found is not None:
                    place, value = found
                    return f"tensor {tensor.name!r} holds {value} at {list(place)}"
    return None


def _first_not_finite(tensor: Tensor) -> tuple[tuple[int, ...], float] | None:
    """Place and value of a tensor's first weight that is not finite."""
    block, n = tensor.type.block_size, int(np.prod(tensor.shape))
    step = _BLOCK_WEIGHTS // block * block
    for first in range(0, n, step):
        count = min(step, n - first)
        out = np.empty(count, np.float32)
        decoder_of(tensor.type.name)(tensor.data, first // block, count // block, out)
        wrong = np.flatnonzero(~np.isfinite(out))
        if wrong.size:
            at = first + int(wrong[0])
            return tuple(int(i) for i in np.unravel_index(at, tensor.shape)), float(out[wrong[0]])
    return None
