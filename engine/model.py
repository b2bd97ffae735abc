"""What every architecture offers, and the way from a file to it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from engine.hparams import MAMBA_ARCHITECTURES, LlamaParams, architecture, llama_params
from engine.kernel_cache import mark_warm
from engine.mamba_params import MambaParams, mamba_params
from engine.quants import SUPPORTED, decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.batch import Batch
    from engine.cache import Cache
    from engine.gguf import GGUFFile
    from engine.models.decoder import Decoder

ACTIVATIONS = ("f32", "int8")

log = logging.getLogger(__name__)


class Model(Protocol):
    """A model on a mapped file. Not for use by two threads at once: it owns one set of activations."""

    params: Any
    n_vocab: int
    batch_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of activations and scratch, without weights and caches."""

    def new_cache(self, n_slots: int, capacity: int, kv: str = "f32", *, fleeting: bool = False) -> Cache:
        """A cache of `n_slots` sequences of up to `capacity` positions; a recurrent one takes any number.

        Args:
            kv: `f32`, or `f16` for halves; a recurrent state is float32 always.
            fleeting: for sequences that are whole in one batch: the memory of one layer serves all.
        """

    def nll(self, batch: Batch, cache: Any) -> NDArray[np.float64]:
        """-ln p(target) in nats of every token with a target, in batch order: float64 (n_scored,).

        The batch's keys and values, or the states of its sequences, stay in `cache`, which this model made.
        Log-sum-exp runs in float64 over the whole vocabulary, block by block; no row of logits is kept.

        Raises:
            CapacityError: more tokens than `batch_tokens`, or slots or positions outside the cache.
            ValueError: token ids or targets outside the vocabulary, or a position that is held already; of a
                recurrent model, one that does not follow.
        """

    def logits(self, batch: Batch, cache: Any) -> NDArray[np.float32]:
        """Logits of every token marked in `batch.outputs`: float32 (n_outputs, V); raises as `nll`."""


def check_supported(file: GGUFFile) -> None:
    """Checks architecture, metadata and every tensor's type without touching a weight.

    Raises:
        UnsupportedModel, UnsupportedQuant: naming the key or tensor and what is supported.
    """
    _params(file)
    for tensor in file.tensors.values():
        if tensor.type.name not in SUPPORTED:
            decoder(tensor.type.name)  # raises, with the list of supported types


def max_positions(file: GGUFFile) -> int | None:
    """Positions that sequences had in training; None for a recurrent model, which takes any number."""
    name = file.metadata.get("general.architecture")
    trained = None if name in MAMBA_ARCHITECTURES else file.metadata.get(f"{name}.context_length")
    return trained if isinstance(trained, int) else None


def _params(file: GGUFFile) -> LlamaParams | MambaParams:
    """The hyperparameters, of whatever architecture."""
    return mamba_params(file) if architecture(file) in MAMBA_ARCHITECTURES else llama_params(file)


def load_model(
    file: GGUFFile, *, threads: int = 1, batch_tokens: int = 4096, activations: str = "f32"
) -> Model:
    """The model in a mapped file, ready to decode batches of up to `batch_tokens` tokens.

    Weights stay quantized in the mapping; what is allocated is `nbytes`. Compiled kernels come from the disk
    cache where they are there.

    Args:
        activations: `f32`, or `int8`: what weights multiply is rounded to 8 bits a block of 32
            (engine.kernels.int8); another subject with other scores.

    Raises:
        UnsupportedModel, UnsupportedQuant: as `check_supported`, and for tensors missing or misshapen.
        ValueError: threads or batch_tokens below one, unknown activations.
    """
    return load_decoder(file, threads, batch_tokens, activations)


def load_decoder(
    file: GGUFFile, threads: int, batch_tokens: int, activations: str, beside: Decoder | None = None
) -> Decoder:
    """`load_model`; computes in the memory of the model `beside` if it takes as much: the two take turns."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r}; expected one of {', '.join(ACTIVATIONS)}")
    if threads < 1 or batch_tokens < 1:
        raise ValueError(f"threads={threads}, batch_tokens={batch_tokens}; expected at least 1")
    check_supported(file)
    if architecture(file) in MAMBA_ARCHITECTURES:
        from engine.models.mamba import Mamba

        return Mamba(file, threads, batch_tokens, activations, beside)
    from engine.models.llama import Llama

    return Llama(file, threads, batch_tokens, activations, beside)


def footprint(
    file: GGUFFile,
    *,
    threads: int = 1,
    batch_tokens: int = 4096,
    n_slots: int = 1,
    capacity: int = 1,
    kv: str = "f32",
    fleeting: bool = False,
    activations: str = "f32",
    n_variants: int = 0,
) -> int:
    """Bytes that `load_model` and `new_cache` with these arguments will allocate; allocates nothing.

    With `n_variants`, those of a `Comparison` of this base and so many variants, and of its cache.

    Raises:
        UnsupportedModel: as `check_supported`.
    """
    p = _params(file)
    if isinstance(p, MambaParams):
        from engine.models import mamba

        own, cache = mamba.footprint(p, threads, batch_tokens, n_slots, activations)
    else:
        from engine.models import llama

        own, cache = llama.footprint(p, threads, batch_tokens, n_slots, capacity, kv, fleeting, activations)
    if not n_variants:
        return own + cache
    from engine.comparison import comparison_bytes

    return own + (1 + n_variants) * cache + comparison_bytes(p.width, n_variants, batch_tokens)


def warm_up(file: GGUFFile, activations: str = "f32") -> float:
    """Compiles, or loads from disk, every kernel that scoring this file needs; seconds spent compiling.

    On a machine with several workers one of them calls this before the others start.
    """
    from engine.batch import Batch
    from engine.kernels._jit import CompileTimer

    with CompileTimer() as timer:
        size = 16  # more than a few tokens, which other kernels multiply
        model = load_model(file, batch_tokens=size, activations=activations)
        targets = [0] + [-1] * (size - 1)
        model.nll(Batch([0] * size, range(size), targets=targets), model.new_cache(1, size))
    mark_warm(file)
    return timer.seconds
