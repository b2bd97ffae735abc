"""What all architectures share: from a batch to scores, around the layers of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError
from engine.kernels.logprob import score, write_logits
from engine.kernels.panels import gather_columns
from engine.kernels.product import Share
from engine.kernels.tile import FEW, NR
from engine.weights import Crew, Fields, Octets, Work, aligned, matrix, octets_bytes, work_bytes

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile

Look = Callable[[str, NDArray[np.float32]], None]
_PANELS_OF_A_CALL = 8  # up to so many, all layers run in one call; between calls Python hears signals


class Sizes(NamedTuple):
    """What decides how much memory computing takes; models of equal sizes can take turns in it.

    Attributes:
        depths: columns that a weight may have.
        head_width: of attention's heads, STRIP where there is none.
        stream: shapes of a batch's activations, float32.
    """

    threads: int
    batch_tokens: int
    activations: str
    depths: tuple[int, ...]
    head_width: int
    stream: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a `Scratch` of these sizes."""
        n_panels = -(-self.batch_tokens // NR)
        octets = octets_bytes(n_panels, self.depths) if self.activations == "int8" else 0
        stream = sum(4 * math.prod(shape) for shape in self.stream)
        own = self.threads * work_bytes(self.depths, self.head_width)
        return stream + 2 * 8 * n_panels * NR + octets + own


class Scratch:
    """What a model computes in, allocated once: threads, each with its working memory, and activations."""

    def __init__(self, sizes: Sizes) -> None:
        n_panels = -(-sizes.batch_tokens // NR)
        octets = Octets(n_panels, sizes.depths) if sizes.activations == "int8" else None
        self.sizes = sizes
        self.crew = Crew(sizes.threads, lambda: Work(sizes.depths, sizes.head_width, octets))
        self.stream = [aligned(*shape) for shape in sizes.stream]
        self.top, self.total = (np.zeros((n_panels, NR), np.float64) for _ in range(2))


class Output(NamedTuple):
    """Rows that a layer leaves in panels of the stream.

    Attributes:
        name: of the matrix or the step that made them: it stands for all that was computed since the output
            before.
        panels: a field of the stream.
        first, last: rows first <= r < last.
    """

    name: str
    panels: str
    first: int
    last: int


class LayerMatrices:
    """The weights of L layers that are products.

    Args:
        shapes: rows and columns by name, the same in every layer.
    """

    def __init__(
        self, file: GGUFFile, n_layers: int, shapes: Mapping[str, tuple[int, int]], activations: str
    ) -> None:
        self.by_layer = [
            {
                name: matrix(file, f"blk.{i}.{name}.weight", *shape, activations)
                for name, shape in shapes.items()
            }
            for i in range(n_layers)
        ]

    def fields(self) -> Fields:
        """(L, matrices, FIELDS) int64."""
        return np.stack([[m.fields for m in layer.values()] for layer in self.by_layer])

    def add_dots(self) -> None:
        """See `Matrix.add_dots`."""
        for layer in self.by_layer:
            for each in layer.values():
                each.add_dots()


class Decoder:
    """A model that is loaded; an architecture adds `_run_layers` and what the `Model` protocol asks beside.

    Args:
        width: of the residual.
        layers: what the layers' kernel reads, a NamedTuple that has the fields of `matrices` in `matrices`.
        sizes: of what it computes in.
        beside: another model; if it has these sizes, the two compute in the same memory and take turns.

    Attributes:
        stream: activations of a batch, a NamedTuple of panels.
        outputs: what a layer leaves in the stream, in the order in which it is computed.
        normed: (P, >= D, NR) float32, of the stream, in which the layers leave the final norm.
        wide: panels of as many rows at least, free after the layers.
    """

    INPUTS: ClassVar[tuple[tuple[str, ...], ...]]
    """Matrices of a layer that multiply the same, by name."""
    PER_LAYER: ClassVar[str]
    """A field of `layers` by whose length the kernel knows the last one, to norm the residual after it."""
    params: Any
    stream: Any
    outputs: tuple[Output, ...]
    normed: NDArray[np.float32]
    wide: NDArray[np.float32]
    scratch: Scratch

    def __init__(
        self,
        file: GGUFFile,
        width: int,
        n_vocab: int,
        layers: Any,
        matrices: LayerMatrices,
        sizes: Sizes,
        beside: Decoder | None,
    ) -> None:
        self.file = file  # keeps the mapping open for as long as its views are used
        self.width, self.n_vocab, self.batch_tokens = width, n_vocab, sizes.batch_tokens
        self.layers, self.matrices = layers, matrices
        tied = "output.weight" not in file.tensors
        name = "token_embd.weight" if tied else "output.weight"
        self.head = matrix(file, name, n_vocab, width, sizes.activations)
        shared = beside is not None and beside.scratch.sizes == sizes
        self.scratch = beside.scratch if beside is not None and shared else Scratch(sizes)
        self._crew = self.scratch.crew
        self._has_dots = False  # compiled by the first batch of few tokens
        self._look: Look | None = None
        self.n_seen = 0  # tokens of all batches

    @property
    def nbytes(self) -> int:
        """Bytes of activations and scratch; the weights' pages belong to the mapping."""
        return self.scratch.sizes.nbytes

    def new_cache(self, n_slots: int, capacity: int, kv: str = "f32", *, fleeting: bool = False) -> Any:
        """See `engine.model.Model`."""
        raise NotImplementedError

    def _run_layers(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        cells: NDArray[np.int32],
        cache: Any,
    ) -> None:
        """Leaves the final norm of the tokens, in the order `Batch.order`, in the panels `normed`."""
        raise NotImplementedError

    def nll(self, batch: Batch, cache: Any) -> NDArray[np.float64]:
        """-ln p(target) in nats of every target, in the order `batch.scored`: float64 (n_scored,)."""
        self.targets(batch)
        self.forward(batch, cache)
        return self.head_nll(batch)

    def logits(self, batch: Batch, cache: Any) -> NDArray[np.float32]:
        """Logits of every token marked in `batch.outputs`, in batch order: float32 (n_outputs, V)."""
        self.forward(batch, cache)
        return self.head_logits(batch)

    def head_nll(self, batch: Batch) -> NDArray[np.float64]:
        """What `nll` returns, of the batch that `forward` had last."""
        rows, targets = self.targets(batch)
        out = np.empty(rows.size, np.float64)
        if rows.size:
            final, head, scratch = self._gathered(batch, rows), self.head.fields, self.scratch

            def call(share: Share, work: Fields, gate: Fields) -> None:
                score(head, final, share, targets, work, scratch.top, scratch.total, out)

            self._crew.run(call, self._crew.shares(rows.size))
        return out

    def head_logits(self, batch: Batch) -> NDArray[np.float32]:
        """What `logits` returns, of the batch that `forward` had last."""
        rows = np.flatnonzero(batch.outputs)
        out = np.empty((rows.size, self.n_vocab), np.float32)
        if rows.size:
            final, head = self._gathered(batch, rows), self.head.fields

            def call(share: Share, work: Fields, gate: Fields) -> None:
                write_logits(head, final, share, work, gate, out)

            self._crew.run(call, self._crew.shares(rows.size))
        return out

    def watch(self, batch: Batch, cache: Any, look: Look) -> None:
        """Decodes a batch as `nll` does, and shows what each layer computed.

        Args:
            look: is called with "token_embd", with "blk.3.ffn_down" and the like (see `outputs`) and at last
                with "output_norm", and float32 (tokens, rows) in the order `Batch.order`.
        """
        self._look = look
        try:
            self.forward(batch, cache)
        finally:
            self._look = None
        look("output_norm", self._of_tokens(self.normed, len(batch), 0, self.width))

    def clock(self) -> NDArray[np.int64]:
        """Ticks that threads have spent on each item, all together: (CLOCKS,), see engine.kernels.product."""
        return self._crew.clock()

    def targets(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """`Batch.scored` and `Batch.wanted`, checked as `nll` says."""
        rows, targets = batch.scored, batch.wanted
        if rows.size > self.batch_tokens:
            raise CapacityError(
                f"{rows.size} targets in a batch; the model was loaded for {self.batch_tokens}"
            )
        if rows.size and targets.max() >= self.n_vocab:
            raise ValueError(f"target {targets.max()} of a vocabulary of {self.n_vocab}")
        return rows, targets

    def forward(self, batch: Batch, cache: Any) -> None:
        """The layers: leaves the final norm for `gather`."""
        size = len(batch)
        if size > self.batch_tokens:
            raise CapacityError(f"a batch of {size} tokens; the model was loaded for {self.batch_tokens}")
        tokens = batch.tokens[batch.order]
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()}; expected 0 to {self.n_vocab - 1}"
            )
        if size <= FEW and not self._has_dots:
            self.matrices.add_dots()
            self.head.add_dots()
            self.refresh()
            self._has_dots = True
        slots, positions = batch.slots[batch.order], batch.positions[batch.order]
        cells = cache.claim(slots, positions)
        try:
            self._run_layers(tokens, slots, positions, cells, cache)
        except BaseException:
            cache.cancel()
            raise
        cache.release()
        self.n_seen += size

    def _run(self, n_layers: int, shares: list[Share], kernel: Callable[..., None]) -> None:
        """kernel(first layer, last layer, share, work, gate) for all layers, in one call or one by one."""

        def run(first: int, last: int) -> None:
            self._crew.run(lambda share, work, gate: kernel(first, last, share, work, gate), shares)

        if self._look is not None:
            self._run_watched(self._look, n_layers, shares[0].n_tokens, run)
            return
        step = n_layers if shares[0].n_panels <= _PANELS_OF_A_CALL else 1
        for first in range(0, n_layers, step):
            run(first, first + step)

    def _run_watched(self, look: Look, n_layers: int, n_tokens: int, run: Callable[[int, int], None]) -> None:
        """Runs embedding, layers and final norm one by one, and shows what each leaves.

        The kernel norms the residual after the last layer, in place of what that one computed: it is told of
        one layer more until all are seen.
        """
        whole, normed = self.layers, self.normed
        kept = getattr(whole, self.PER_LAYER)
        run(0, 0)
        look("token_embd", self._of_tokens(normed, n_tokens, 0, self.width))
        self.layers = whole._replace(**{self.PER_LAYER: np.concatenate([kept, kept[-1:]])})
        try:
            for layer in range(n_layers):
                run(layer, layer + 1)
                for name, panels, first, last in self.outputs:
                    values = self._of_tokens(getattr(self.stream, panels), n_tokens, first, last)
                    look(f"blk.{layer}.{name}", values)
        finally:
            self.layers = whole
        run(n_layers, n_layers)

    @staticmethod
    def _of_tokens(panels: NDArray[np.float32], n_tokens: int, first: int, last: int) -> NDArray[np.float32]:
        """Rows first <= r < last: (P, rows, NR) -> (tokens, last - first), a copy."""
        used = panels[: -(-n_tokens // NR), first:last]
        return used.transpose(0, 2, 1).reshape(-1, last - first)[:n_tokens]

    def _gathered(self, batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The final norm of the batch's tokens `rows`, side by side in the wide panels."""
        self.gather(batch, rows, self.wide)
        return self.wide

    def gather(self, batch: Batch, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """The final norm of tokens `rows` of the batch that `forward` had last, into panels (P, >= D, NR)."""
        place = np.empty(len(batch), np.int64)
        place[batch.order] = np.arange(len(batch))
        gather_columns(self.normed, place[rows], self.width, out)

    def refresh(self) -> None:
        """Has the layers' kernel read the fields of their matrices anew."""
        self.layers = self.layers._replace(matrices=self.matrices.fields())
