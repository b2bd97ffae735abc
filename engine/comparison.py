"""A base model and its variants on the same tokens, everything paired."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModel
from engine.kernels.divergence import Running, compare
from engine.kernels.logprob import HEAD_ROWS
from engine.kernels.product import Share
from engine.kernels.tile import NR
from engine.model import load_decoder
from engine.weights import Fields, aligned

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile


class Caches:
    """A cache for each model; whatever is done to it, is done to all."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self.all = list(caches)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(cache.nbytes for cache in self.all)

    def clear(self) -> bool:
        """See `engine.cache.Cache`."""
        return all([cache.clear() for cache in self.all])

    def keep(self, slot: int) -> bool:
        """See `engine.cache.Cache`."""
        return all([cache.keep(slot) for cache in self.all])


class Comparison:
    """Models mapped at once that take each batch one after the other; not for use by two threads at once.

    The models share activations and scratch. What a batch needs beside is the final norm of its scored tokens
    in every model, and one vocabulary block of the base's logits.

    Attributes:
        models: the base, then the variants.
        layers_s: (M,) float64, seconds that each has spent so far on its layers, the head left out.

    Raises (on construction):
        UnsupportedModel: a variant has another vocabulary size or width than the base; and as `load_model`.
    """

    def __init__(
        self,
        base: GGUFFile,
        variants: Sequence[GGUFFile],
        *,
        threads: int = 1,
        batch_tokens: int = 4096,
        activations: str = "f32",
    ) -> None:
        first = load_decoder(base, threads, batch_tokens, activations)
        others = [load_decoder(file, threads, batch_tokens, activations, first) for file in variants]
        for file, model in zip(variants, others, strict=True):
            if (model.n_vocab, model.width) != (first.n_vocab, first.width):
                raise UnsupportedModel(
                    f"{file.path}: {model.n_vocab} tokens and a width of {model.width}; "
                    f"the base {base.path} has {first.n_vocab} and {first.width}"
                )
        self.models = [first, *others]
        self.layers_s = np.zeros(len(self.models))
        self.n_vocab, self.batch_tokens = first.n_vocab, batch_tokens
        self._heads = np.stack([model.head.fields for model in self.models])
        n_panels, n_models = -(-batch_tokens // NR), len(self.models)
        self._hidden = aligned(n_models, n_panels, first.width, NR)
        each = (n_models, n_panels, NR)
        self._running = Running(
            np.zeros(each), np.zeros(each), np.zeros(each, np.float32), np.zeros(each, np.int32),
            np.zeros(each), np.zeros((n_panels, NR)), aligned(n_panels, HEAD_ROWS * NR),
            np.zeros((n_panels, HEAD_ROWS * NR)),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of activations and scratch of all models, without weights and caches; not all are touched."""
        scratches = {id(model.scratch): model.nbytes for model in self.models}
        return sum(scratches.values()) + self._hidden.nbytes + sum(a.nbytes for a in self._running)

    def new_cache(self, n_slots: int, capacity: int, kv: str = "f32", *, fleeting: bool = False) -> Caches:
        """A cache of every model; see `Model.new_cache`."""
        return Caches([model.new_cache(n_slots, capacity, kv, fleeting=fleeting) for model in self.models])

    def compare(self, batch: Batch, cache: Caches) -> NDArray[np.float64]:
        """Scores every token with a target by all M models, the base first.

        Returns:
            (3 M - 1, n_scored) float64, columns in the order `Batch.scored`: M rows of -ln p(target) in nats,
            the bits of `Model.nll`; M - 1 rows of KL(base || variant) in nats over the whole vocabulary; M
            rows of the most likely token's id, the first of equals.

        Raises:
            CapacityError, ValueError: as `Model.nll`.
        """
        n_models, models = len(self.models), self.models
        rows, targets = models[0].targets(batch)
        out = np.empty((3 * n_models - 1, rows.size), np.float64)
        for j, (model, own, hidden) in enumerate(zip(models, cache.all, self._hidden, strict=True)):
            began = time.perf_counter()
            model.forward(batch, own)
            model.gather(batch, rows, hidden)
            self.layers_s[j] += time.perf_counter() - began
        if rows.size:
            crew = models[0].scratch.crew

            def call(share: Share, work: Fields, gate: Fields) -> None:
                compare(self._heads, self._hidden, share, targets, work, self._running, out)

            crew.run(call, crew.shares(rows.size))
        return out


def comparison_bytes(width: int, n_variants: int, batch_tokens: int) -> int:
    """Bytes that a `Comparison` allocates beside scratch and caches."""
    n_panels, n_models = -(-batch_tokens // NR), 1 + n_variants
    return n_panels * NR * (4 * n_models * width + 32 * n_models + 8 + 12 * HEAD_ROWS)
