"""Mamba-2 in float64 NumPy, from the paper (arXiv:2405.21060, section 7), as its plain recurrence.

Axes as in `mamba.py`; besides, H heads of P features (E = H P) and G groups of heads that share B and C. A
layer is

    u = x / rms(x) * attn_norm                                                               (T, D)
    z, x'BC, dt = parts of  ssm_in u                      E, E + 2 G N and H wide, in this order
    x', B, C = parts of  silu(conv(x'BC) + conv_bias)     E, G N and G N wide, in this order
    dt = softplus(dt + dt_bias)                                                              (T, H)
    h = exp(dt A) h + dt x' B           y = h C + D x'    h (H, P, N); A and D a number a head
    y = y * silu(z), then each group of E / G features over its rms, times ssm_norm
    x = x + ssm_out y

Head h belongs to group h // (H / G). Where papers, transformers and libllama differ; sources: transformers
5.23.0, models/mamba2/modeling_mamba2.py; llama.cpp b9190, src/models/mamba-base.cpp, its converter.

- Gate and norm: the gate first, then the norm (`norm_before_gate=False` of the authors' code), in all three.
  Groups of the norm are those of B and C. Checkpoints hold its weight as (E,), files as (G, E / G).
- transformers and the authors scan by blocks (`chunk_size`), libllama by the recurrence; equal but for
  rounding.
- `time_step_limit`: transformers clamps dt to it after softplus in a scan of several tokens, not in a step of
  one; a file has no such key and libllama clamps nothing. The default (0, inf) clamps nothing either.
- dt has no projection of its own and no rank: `ssm.time_step_rank` of a file is H (a checkpoint's
  `time_step_rank` means nothing), and `dt_bias` is named `ssm_dt.bias`. A and D are (H, 1) in files.
- State: transformers (H, P, N) and W inputs of the convolution, libllama (H, P, N) and W - 1.
- `attention.head_count`: the converter writes 0; libllama b9190 takes it for H where it checks shapes and so
  refuses such a file, later versions take `ssm.time_step_rank`. A file with H in both loads in either.
- libllama b9190 ends the process (an assertion) where E is no multiple of N, or not 2 D.
- Epsilon, A's sign, convolution, residual: as in `mamba.py`. libllama has no FalconMamba norms here.
"""

from __future__ import annotations

import numpy as np

from tests.reference.mamba import Floats, ReferenceMamba, State, rms_norm, silu, softplus


def selective_scan(
    x: Floats, dt: Floats, a: Floats, b: Floats, c: Floats, d: Floats, state: Floats
) -> tuple[Floats, Floats]:
    """softplus, discretization, recurrence, output by C and the D skip of one sequence; no gate.

    Args:
        x: (T, H, P), after the convolution.
        dt: (T, H), with its bias, before softplus.
        a, d: (H,), a negative.
        b, c: (T, G, N), after the convolution.
        state: (H, P, N) before x.

    Returns:
        (T, H, P) and the state after x.
    """
    state, y, delta = state.copy(), np.empty_like(x), softplus(dt)
    share = x.shape[1] // b.shape[1]
    b, c = np.repeat(b, share, axis=1), np.repeat(c, share, axis=1)
    for t in range(len(x)):
        decay = np.exp(delta[t] * a)[:, None, None]
        state = decay * state + (delta[t][:, None] * x[t])[:, :, None] * b[t][:, None, :]
        y[t] = (state * c[t][:, None, :]).sum(axis=2) + d[:, None] * x[t]
    return y, state


def gated_norm(y: Floats, z: Floats, weight: Floats, eps: float) -> Floats:
    """y (T, E) times silu(z), each of G groups over its rms; weight (G, E / G)."""
    gated = (y * silu(z)).reshape(len(y), *weight.shape)
    return (rms_norm(gated, eps) * weight).reshape(len(y), weight.size)


class ReferenceMamba2(ReferenceMamba):
    """A whole model; see `ReferenceMamba`."""

    def start(self) -> State:
        """The state before a sequence's first token."""
        wide, n_heads = self.inner + 2 * self.n_groups * self.n_state, self.dt_rank
        return State(
            np.zeros((self.n_layers, self.conv_width - 1, wide)),
            np.zeros((self.n_layers, n_heads, self.inner // n_heads, self.n_state)),
        )

    def _mix(self, u: Floats, i: int, conv: Floats, ssm: Floats) -> tuple[Floats, Floats, Floats]:
        w = {key: self.w[f"blk.{i}.ssm_{key}"].ravel() for key in ("a", "d")}
        in_, norm, out_ = (self.w[f"blk.{i}.ssm_{key}.weight"] for key in ("in", "norm", "out"))
        length, n_heads, shared = len(u), self.dt_rank, self.n_groups * self.n_state
        z, xbc, dt = np.split(u @ in_.T, [self.inner, 2 * self.inner + 2 * shared], axis=1)
        xbc, conv = self._conv(xbc, i, conv)
        x, b, c = np.split(xbc, [self.inner, self.inner + shared], axis=1)
        y, ssm = selective_scan(
            x.reshape(length, n_heads, self.inner // n_heads),
            dt + self.w[f"blk.{i}.ssm_dt.bias"],
            w["a"],
            b.reshape(length, self.n_groups, self.n_state),
            c.reshape(length, self.n_groups, self.n_state),
            w["d"],
            ssm,
        )
        y = gated_norm(y.reshape(length, self.inner), z, norm.reshape(self.n_groups, -1), self.eps)
        return y @ out_.T, conv, ssm
