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

from engine.errors import UnsupportedModel
from engine.kernels.mamba_layers import Layers, Shape, Stream, run_mamba2_layers, run_mamba_layers
from engine.kernels.product import BIAS, Share
from engine.kernels.ssm import runs_of, scratch_floats, strips_of
from engine.kernels.tile import NR, STRIP
from engine.mamba_params import MambaParams, mamba_params
from engine.models.decoder import Decoder, LayerMatrices, Output, Sizes
from engine.recurrent import RecurrentCache
from engine.weights import Fields, matrix, table, vector

if TYPE_CHECKING:
    from engine.gguf import GGUFFile


def _layers(file: GGUFFile, p: MambaParams, matrices: LayerMatrices) -> Layers:
    """What the kernels read; owns private copies of what are no matrices: norms, convolution, A, D, biases.

    They are 4 (E (N + W + 3) + D) bytes a layer: for Mamba-2.8B 29 MB in all.
    """
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
    return Layers(
        matrices=matrices.fields(),
        norm=stacked("attn_norm.weight", p.width),
        conv_weight=strips(stacked("ssm_conv1d.weight", p.conv_channels, p.conv_width), p.conv_channels),
        conv_bias=strips(empty if no_bias else stacked(bias, p.conv_channels), p.conv_channels),
        a=strips(rates, p.inner, p.n_groups),
        dt_bias=strips(stacked("ssm_dt.bias", n_steps), p.inner, p.n_groups),
        d=strips(skips, p.inner, p.n_groups),
        inner_norm=norm,
        output_norm=vector(file, "output_norm.weight", p.width),
        embedding=matrix(file, "token_embd.weight", p.n_vocab, p.width).fields,
    )


class Mamba(Decoder):
    """A Mamba, FalconMamba or Mamba-2 model on a mapped file; see `engine.model.Model` for the interface."""

    INPUTS = (("ssm_in",), ("ssm_x",), ("ssm_dt",), ("ssm_out",))
    PER_LAYER = "norm"

    def __init__(
        self,
        file: GGUFFile,
        threads: int,
        batch_tokens: int,
        activations: str,
        beside: Decoder | None = None,
    ) -> None:
        self.params = p = mamba_params(file)
        shapes = {"ssm_in": (p.in_rows, p.width), "ssm_out": (p.width, p.inner)}
        if not p.is_second:
            shapes |= {"ssm_x": (p.dt_rank + 2 * p.n_states, p.inner), "ssm_dt": (p.inner, p.dt_rank)}
        matrices = LayerMatrices(file, p.n_layers, shapes, activations)
        for layer in matrices.by_layer:
            if "ssm_dt" in layer:
                layer["ssm_dt"].fields[BIAS] = 0  # the scan adds it
        layers = _layers(file, p, matrices)
        _refuse_strangers(file, p)

        self._shape = Shape(p.inner, p.n_states, p.dt_rank, p.n_groups, p.head_width, p.norm_eps)
        sizes = _sizes(p, threads, batch_tokens, activations)
        super().__init__(file, p.width, p.n_vocab, layers, matrices, sizes, beside)
        self.stream = Stream(*self.scratch.stream)
        self.normed, self.wide = self.stream.normed, self.stream.inner
        self.outputs = _outputs(p)

    def new_cache(
        self, n_slots: int, capacity: int = 1, kv: str = "f32", *, fleeting: bool = False
    ) -> RecurrentCache:
        """A cache of `n_slots` sequences of any length; the other arguments mean nothing to a state."""
        return RecurrentCache(n_slots, self.params.n_layers, _state_shapes(self.params))

    def _run_layers(
        self,
        tokens: NDArray[np.int32],
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        cells: NDArray[np.int32],
        cache: RecurrentCache,
    ) -> None:
        runs, run_kind = runs_of(cells), run_mamba2_layers if self.params.is_second else run_mamba_layers

        def kernel(first: int, last: int, share: Share, work: Fields, gate: Fields) -> None:
            run_kind(
                first, last, self.layers, self._shape, self.stream, tokens, runs, *cache.states,
                share, work, gate,
            )  # fmt: skip

        self._run(self.params.n_layers, self._crew.shares(tokens.size), kernel)


def footprint(
    p: MambaParams, threads: int, batch_tokens: int, n_slots: int, activations: str
) -> tuple[int, int]:
    """Bytes of a model and of a cache; see `engine.footprint`."""
    states = sum(4 * n_slots * p.n_layers * math.prod(shape) for shape in _state_shapes(p))
    return _sizes(p, threads, batch_tokens, activations).nbytes, states


def _sizes(p: MambaParams, threads: int, batch_tokens: int, activations: str) -> Sizes:
    """Of what it computes in; the stream in the order of `Stream`."""
    n_panels = -(-batch_tokens // NR)
    low, dt = (0, 0) if p.is_second else (p.dt_rank + 2 * p.n_states, p.inner)
    rows = [p.width, p.width, max(p.in_rows + STRIP, p.width), low, dt]
    panels = [(n_panels, -(-r // STRIP) * STRIP, NR) for r in rows]
    stream = (*panels, (threads, scratch_floats(p.conv_width)))
    return Sizes(threads, batch_tokens, activations, (p.width, p.inner, p.dt_rank), STRIP, stream)


def _outputs(p: MambaParams) -> tuple[Output, ...]:
    """What a layer leaves in the stream: the convolution and the scan overwrite part of what ssm_in gave."""
    out = Output("ssm_out", "normed", 0, p.width)
    if p.is_second:
        conv_end = p.inner + p.conv_channels
        return (
            Output("ssm_in", "inner", conv_end, p.in_rows),  # dt
            Output("ssm_conv1d", "inner", p.inner, conv_end),
            Output("ssm_norm", "inner", 0, p.inner),  # y, in place of z
            out,
        )
    return (
        Output("ssm_in", "inner", p.inner, p.in_rows),  # z
        Output("ssm_x", "low", 0, p.dt_rank + 2 * p.n_states),
        Output("ssm_dt", "dt", 0, p.inner),
        Output("ssm_scan", "inner", 0, p.inner),  # y, in place of x'
        out,
    )


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
