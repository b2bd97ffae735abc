"""Mamba, FalconMamba and Mamba-2: layers of one mixer each, a selective state space behind a convolution.

    x = embed(tokens)
    for each layer:  x = x + ssm_out mixer(rms_norm(x) * attn_norm)
    logits = output (rms_norm(x) * output_norm)                          output = token_embd when tied

    mixer of Mamba:    x', z = ssm_in u;  x' = silu(conv(x') + bias);  dt, B, C = ssm_x x'
                       scan(x', dt = ssm_dt dt, B, C) gated by z         FalconMamba: dt, B, C normed before
    mixer of Mamba-2:  z, x', B, C, dt = ssm_in u;  x', B, C = silu(conv(x', B, C) + bias)
                       rms_norm of each group of (scan(x', dt, B, C) gated by z) * ssm_norm

The convolution and the scan are defined in engine.kernels.ssm, the layers in engine.kernels.mamba_layers. A
sequence leaves behind a state of one size, engine.recurrent.RecurrentCache.

Sources: Gu and Dao 2023, arXiv:2312.00752; Zuo et al. 2024, arXiv:2410.05355 (FalconMamba); Dao and Gu 2024,
arXiv:2405.21060 (Mamba-2); GGUF's tensor names. Activations are panels (engine.kernels.product).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError, UnsupportedModel
from engine.kernels.logprob import score, write_logits
from engine.kernels.mamba_layers import Layers, Shape, Stream, run_mamba2_layers, run_mamba_layers
from engine.kernels.panels import gather_columns
from engine.kernels.product import BIAS, Share
from engine.kernels.ssm import runs_of, scratch_floats, strips_of
from engine.kernels.tile import FEW, NR, STRIP
from engine.mamba_params import MambaParams, mamba_params
from engine.recurrent import RecurrentCache
from engine.weights import (
    Crew,
    Fields,
    Matrix,
    Octets,
    Work,
    aligned,
    matrix,
    octets_bytes,
    table,
    vector,
    work_bytes,
)

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.gguf import GGUFFile


class _Weights:
    """Weights of all layers; owns private copies of what are no matrices: norms, convolution, A, D, biases.

    They are 4 (E (N + W + 3) + D) bytes a layer: for Mamba-2.8B 29 MB in all.
    """

    def __init__(self, file: GGUFFile, p: MambaParams, embedding: Matrix, activations: str) -> None:
        shapes = {"ssm_in": (p.in_rows, p.width), "ssm_out": (p.width, p.inner)}
        if not p.is_second:
            shapes |= {"ssm_x": (p.dt_rank + 2 * p.n_states, p.inner), "ssm_dt": (p.inner, p.dt_rank)}
        self._matrices = [
            {
                name: matrix(file, f"blk.{i}.{name}.weight", *shape, activations)
                for name, shape in shapes.items()
            }
            for i in range(p.n_layers)
        ]
        for row in self._matrices:
            if "ssm_dt" in row:
                row["ssm_dt"].fields[BIAS] = 0  # the scan adds it
        n_steps, n_rates = (p.dt_rank, 1) if p.is_second else (p.inner, p.n_states)

        def stacked(name: str, *shape: int) -> NDArray[np.float32]:
            return np.stack([table(file, f"blk.{i}.{name}", *shape) for i in range(p.n_layers)])

        def strips(values: NDArray[np.float32], n_channels: int, n_groups: int = 1) -> NDArray[np.float32]:
            """Of (L, channels or heads, ...)."""
            columns = values.reshape(p.n_layers, values.shape[1], -1).repeat(n_channels // values.shape[1], 1)
            return np.stack([strips_of(layer, n_groups) for layer in columns])

        rates = stacked("ssm_a", n_steps, n_rates)
        if (rates > 0).any():
            layer = int(np.argwhere(rates > 0)[0, 0])
            raise UnsupportedModel(
                f"{file.path}: tensor 'blk.{layer}.ssm_a' has values above 0; expected A = -exp(A_log)"
            )
        skips = stacked("ssm_d", *((n_steps, 1) if p.is_second else (n_steps,)))
        bias = "ssm_conv1d.bias"
        no_bias = f"blk.0.{bias}" not in file.tensors
        empty = np.zeros((p.n_layers, p.conv_channels), np.float32)
        norm = np.ones((p.n_layers, p.dt_rank + p.n_states if p.is_normed else 0), np.float32)
        if p.is_second:
            norm = stacked("ssm_norm.weight", p.n_groups, p.inner // p.n_groups).reshape(p.n_layers, p.inner)
        self.layers = Layers(
            matrices=self._fields(),
            norm=stacked("attn_norm.weight", p.width),
            conv_weight=strips(stacked("ssm_conv1d.weight", p.conv_channels, p.conv_width), p.conv_channels),
            conv_bias=strips(empty if no_bias else stacked(bias, p.conv_channels), p.conv_channels),
            a=strips(rates, p.inner, p.n_groups),
            dt_bias=strips(stacked("ssm_dt.bias", n_steps), p.inner, p.n_groups),
            d=strips(skips, p.inner, p.n_groups),
            inner_norm=norm,
            output_norm=vector(file, "output_norm.weight", p.width),
            embedding=embedding.fields,
        )

    def _fields(self) -> Fields:
        return np.stack([[m.fields for m in row.values()] for row in self._matrices])

    def add_dots(self) -> None:
        """See `Matrix.add_dots`."""
        for row in self._matrices:
            for each in row.values():
                each.add_dots()
        self.layers = self.layers._replace(matrices=self._fields())


class Mamba:
    """A Mamba, FalconMamba or Mamba-2 model on a mapped file; see `engine.model.Model` for the interface."""

    def __init__(
        self, file: GGUFFile, *, threads: int = 1, batch_tokens: int = 4096, activations: str = "f32"
    ) -> None:
        self.params = p = mamba_params(file)
        self._activations = activations
        self.n_vocab, self.batch_tokens = p.n_vocab, batch_tokens
        self._file = file  # keeps the mapping open for as long as its views are used
        self._embedding = matrix(file, "token_embd.weight", p.n_vocab, p.width)
        tied = "output.weight" not in file.tensors
        head = "token_embd.weight" if tied else "output.weight"
        self._head = matrix(file, head, p.n_vocab, p.width, activations)
        self._weights = _Weights(file, p, self._embedding, activations)
        self._has_dots = False  # needed, and compiled, by the first batch of few tokens
        _refuse_strangers(file, p)

        self._shape = Shape(p.inner, p.n_states, p.dt_rank, p.n_groups, p.head_width, p.norm_eps)
        self._run = run_mamba2_layers if p.is_second else run_mamba_layers
        octets = Octets(-(-batch_tokens // NR), _depths(p)) if activations == "int8" else None
        self._crew = Crew(threads, lambda: Work(_depths(p), STRIP, octets))
        self._stream = Stream(*(aligned(*shape) for shape in _stream_shapes(p, threads, batch_tokens)))
        self._top, self._total = (np.zeros((len(self._stream.x), NR), np.float64) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Bytes of activations and scratch; the weights' pages belong to the mapping."""
        return _own_bytes(self.params, len(self._crew.works), self.batch_tokens, self._activations)

    def new_cache(
        self, n_slots: int, capacity: int = 1, kv: str = "f32", *, fleeting: bool = False
    ) -> RecurrentCache:
        """A cache of `n_slots` sequences of any length; the other arguments mean nothing to a state."""
        return RecurrentCache(n_slots, self.params.n_layers, _state_shapes(self.params))

    def nll(self, batch: Batch, cache: RecurrentCache) -> NDArray[np.float64]:
        """-ln p(target) in nats of every token with a target, in batch order: float64 (n_scored,)."""
        rows, targets = batch.scored, batch.wanted
        if rows.size > self.batch_tokens:
            raise CapacityError(
                f"{rows.size} targets in a batch; the model was loaded for {self.batch_tokens}"
            )
        if rows.size and targets.max() >= self.n_vocab:
            raise ValueError(f"target {targets.max()} of a vocabulary of {self.n_vocab}")
        self._forward(batch, cache)
        out = np.empty(rows.size, np.float64)
        if rows.size:
            final, head = self._gathered(batch, rows), self._head.fields

            def call(share: Share, work: Fields) -> None:
                score(head, final, share, targets, work, self._top, self._total, out)

            self._crew.run(call, self._crew.shares(rows.size))
        return out

    def logits(self, batch: Batch, cache: RecurrentCache) -> NDArray[np.float32]:
        """Logits of every token marked in `batch.outputs`, in batch order: float32 (n_outputs, V)."""
        rows = np.flatnonzero(batch.outputs)
        self._forward(batch, cache)
        out = np.empty((rows.size, self.n_vocab), np.float32)
        if rows.size:
            final, head = self._gathered(batch, rows), self._head.fields
            gate = np.zeros(1, np.int64)

            def call(share: Share, work: Fields) -> None:
                write_logits(head, final, share, work, gate, out)

            self._crew.run(call, self._crew.shares(rows.size))
        return out

    def clock(self) -> NDArray[np.int64]:
        """Ticks that threads have spent, all together: (CLOCKS,), see engine.kernels.mamba_layers."""
        total: NDArray[np.int64] = np.sum([work.clock for work in self._crew.works], axis=0, dtype=np.int64)
        return total

    def _forward(self, batch: Batch, cache: RecurrentCache) -> None:
        """Runs the layers; then `normed` holds the final norm of the tokens in the order `batch.order`."""
        size = len(batch)
        if size > self.batch_tokens:
            raise CapacityError(f"a batch of {size} tokens; the model was loaded for {self.batch_tokens}")
        tokens = batch.tokens[batch.order]
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()}; expected 0 to {self.n_vocab - 1}"
            )
        cells = cache.claim(batch.slots[batch.order], batch.positions[batch.order])
        try:
            self._run_layers(tokens, cells, cache)
        except BaseException:
            cache.cancel()
            raise
        cache.release()

    def _run_layers(self, tokens: NDArray[np.int32], cells: NDArray[np.int32], cache: RecurrentCache) -> None:
        if tokens.size <= FEW and not self._has_dots:
            self._weights.add_dots()
            self._head.add_dots()
            self._has_dots = True
        shares, runs = self._crew.shares(tokens.size), runs_of(cells)
        step = self.params.n_layers if shares[0].n_panels <= 8 else 1  # between calls Python hears signals
        for first in range(0, self.params.n_layers, step):
            gate = np.zeros(1, np.int64)

            def call(share: Share, work: Fields, first: int = first, gate: Fields = gate) -> None:
                self._run(
                    first, first + step, self._weights.layers, self._shape, self._stream, tokens, runs,
                    *cache.states, share, work, gate,
                )  # fmt: skip

            self._crew.run(call, shares)

    def _gathered(self, batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The final norm of the batch's tokens `rows`, side by side in the widest panels."""
        place = np.empty(len(batch), np.int64)
        place[batch.order] = np.arange(len(batch))
        gather_columns(self._stream.normed, place[rows], self.params.width, self._stream.inner)
        return self._stream.inner


def footprint(p: MambaParams, threads: int, batch_tokens: int, n_slots: int, activations: str) -> int:
    """See `engine.footprint`."""
    states = sum(4 * n_slots * p.n_layers * math.prod(shape) for shape in _state_shapes(p))
    return _own_bytes(p, threads, batch_tokens, activations) + states


def _own_bytes(p: MambaParams, threads: int, batch_tokens: int, activations: str) -> int:
    """Bytes of activations and scratch."""
    stream = sum(4 * math.prod(shape) for shape in _stream_shapes(p, threads, batch_tokens))
    state = 2 * 8 * -(-batch_tokens // NR) * NR
    octets = octets_bytes(-(-batch_tokens // NR), _depths(p)) if activations == "int8" else 0
    return stream + state + octets + threads * work_bytes(_depths(p), STRIP)


def _depths(p: MambaParams) -> tuple[int, ...]:
    """Columns that a weight may have."""
    return p.width, p.inner, p.dt_rank


def _stream_shapes(p: MambaParams, threads: int, batch_tokens: int) -> list[tuple[int, ...]]:
    """Shapes of the arrays of `Stream`, in its order."""
    n_panels = -(-batch_tokens // NR)
    low, dt = (0, 0) if p.is_second else (p.dt_rank + 2 * p.n_states, p.inner)
    rows = [p.width, p.width, max(p.in_rows + STRIP, p.width), low, dt]
    panels: list[tuple[int, ...]] = [(n_panels, -(-r // STRIP) * STRIP, NR) for r in rows]
    return [*panels, (threads, scratch_floats(p.conv_width))]


def _state_shapes(p: MambaParams) -> list[tuple[int, ...]]:
    """What a layer keeps of a sequence; see engine.kernels.ssm."""
    of_group = p.inner // p.n_groups
    n_strips = p.n_groups * -(-of_group // STRIP)
    return [(-(-p.conv_channels // STRIP), p.conv_width - 1, STRIP), (n_strips, p.n_states, STRIP)]


def _refuse_strangers(file: GGUFFile, p: MambaParams) -> None:
    """Raises UnsupportedModel for tensors that the forward pass would silently ignore."""
    names = "attn_norm.weight ssm_in.weight ssm_conv1d.weight ssm_conv1d.bias ssm_dt.bias ssm_a ssm_d".split()
    names += ["ssm_out.weight"]
    names += ["ssm_norm.weight"] if p.is_second else ["ssm_x.weight", "ssm_dt.weight"]
    known = {f"blk.{i}.{name}" for i in range(p.n_layers) for name in names}
    known |= {"token_embd.weight", "output.weight", "output_norm.weight"}
    strangers = sorted(file.tensors.keys() - known)
    if strangers:
        raise UnsupportedModel(
            f"{file.path}: tensor {strangers[0]!r} ({len(strangers)} such) has no place in the "
            f"{p.architecture} architecture as computed here (no biases of projections, no other layers)"
        )
