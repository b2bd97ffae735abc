"""The convolution and the scan alone: their float64 twins, exact exponentials, and laws to the bit."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from engine.kernels.maths import exp32
from engine.kernels.product import Share
from engine.kernels.ssm import ScanRows, runs_of, scratch_floats, ssm_conv, ssm_scan, strips_of
from engine.kernels.tile import NR, STRIP
from engine.weights import aligned
from tests.reference import mamba, mamba2

WIDTH = 4


class Model(NamedTuple):
    """Random weights of a mixer; one head a channel and one row of A a state: Mamba."""

    inner: int
    n_states: int
    n_groups: int
    head_width: int
    weight: np.ndarray  # (E, W)
    bias: np.ndarray
    a: np.ndarray  # (heads, N or 1)
    dt_bias: np.ndarray  # (heads,)
    d: np.ndarray

    @property
    def n_heads(self):
        return self.inner // self.head_width


def model_of(inner=40, n_states=5, n_groups=1, head_width=1, seed=0):
    rng = np.random.default_rng(seed)
    heads = inner // head_width
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    a = -np.abs(draw(heads, n_states if head_width == 1 else 1)) - np.float32(0.1)
    dt_bias = draw(heads) - np.float32(3.0)
    dt_bias[-2:] = 20.0, 90.0
    return Model(
        inner, n_states, n_groups, head_width, draw(inner, WIDTH), draw(inner), a, dt_bias, draw(heads)
    )


class Inputs(NamedTuple):
    """(T, rows) float32 of a batch: x and z of E channels, dt of the heads, B and C of (G, N)."""

    x: np.ndarray
    z: np.ndarray
    dt: np.ndarray
    b: np.ndarray
    c: np.ndarray


def inputs_of(m, n_tokens, seed=0):
    rng = np.random.default_rng(seed)
    widths = (m.inner, m.inner, m.n_heads, m.n_groups * m.n_states, m.n_groups * m.n_states)
    return Inputs(*(rng.standard_normal((n_tokens, w)).astype(np.float32) for w in widths))


def states_of(m, n_cells):
    """Zero states of two layers: of the convolution and of the scan."""
    n_strips = m.n_groups * -(-m.inner // m.n_groups // STRIP)
    return (
        np.zeros((n_cells, 2, -(-m.inner // STRIP), WIDTH - 1, STRIP), np.float32),
        np.zeros((n_cells, 2, n_strips, m.n_states, STRIP), np.float32),
    )


def run(m, inputs, cells, states, threads=1):
    """Convolution and scan of layer 1, thread after thread; float32 (T, E) and the convolution's (T, E)."""
    n_tokens = len(inputs.x)
    n_panels = -(-n_tokens // NR)
    borders = np.cumsum([0, *(a.shape[1] for a in inputs)])
    panels = np.full((n_panels, borders[-1] + STRIP, NR), np.nan, np.float32)  # what is not set is not used
    for values, row in zip(inputs, borders, strict=False):
        for t in range(n_tokens):
            panels[t // NR, row : row + values.shape[1], t % NR] = values[t]
    x, z, dt, b, c = borders[:5].tolist()
    rows = ScanRows(x, z, x, dt, b, c, m.head_width)
    runs, scratch = runs_of(np.array(cells, np.int32)), aligned(scratch_floats(WIDTH))
    shares = [Share(i, threads, True, 0, n_panels, n_panels, n_tokens) for i in range(threads)]
    weight, bias = strips_of(m.weight), strips_of(m.bias[:, None])

    def of_channels(values):
        return strips_of(values.reshape(m.n_heads, -1).repeat(m.head_width, 0), m.n_groups)

    def taken(row):
        return np.stack([panels[t // NR, row : row + m.inner, t % NR] for t in range(n_tokens)])

    for share in shares:
        ssm_conv(panels, x, m.inner, weight, bias, runs, states[0], 1, share, scratch.ctypes.data)
    convolved = taken(x)
    for share in shares:
        ssm_scan(
            panels, panels, panels, rows, m.inner, m.n_groups, of_channels(m.a), of_channels(m.dt_bias),
            of_channels(m.d), runs, states[1], 1, share, scratch.ctypes.data,
        )  # fmt: skip
    return taken(x), convolved


def expected(m, inputs):
    """The same of one sequence in float64, and the state as the scan's reference has it."""
    i = Inputs(*(values.astype(np.float64) for values in inputs))
    x, past = mamba.causal_conv(i.x, m.weight.astype(float), m.bias.astype(float), np.zeros((3, m.inner)))
    a, d = m.a.astype(float), m.d.astype(float)
    dt = i.dt + m.dt_bias
    if m.head_width == 1:
        state = np.zeros((m.inner, m.n_states))
        y, state = mamba.selective_scan(x, dt, a, i.b, i.c, d, i.z, state)
        return y, x, past, state
    heads, groups = (len(x), m.n_heads, m.head_width), (len(x), m.n_groups, m.n_states)
    state = np.zeros((*heads[1:], m.n_states))
    y, state = mamba2.selective_scan(
        x.reshape(heads), dt, a[:, 0], i.b.reshape(groups), i.c.reshape(groups), d, state
    )
    return y.reshape(x.shape) * mamba.silu(i.z), x, past, state.reshape(m.inner, -1)


SHAPES = {
    "mamba": {},
    "one channel, one state": {"inner": 2, "n_states": 1},
    "wide": {"inner": 96, "n_states": 16},
    "mamba2, groups of half strips": {"inner": 72, "n_groups": 3, "head_width": 12},
    "mamba2, wide": {"inner": 64, "n_states": 40, "n_groups": 2, "head_width": 16},
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_states_equal_float64(name):
    m = model_of(**SHAPES[name])
    inputs, states = inputs_of(m, 2 * NR + 5), states_of(m, 1)
    got, convolved = run(m, inputs, [0] * len(inputs.x), states)
    want, x, past, state = expected(m, inputs)
    np.testing.assert_allclose(convolved, x, atol=2e-6 * np.abs(x).max(), rtol=0)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0)
    assert not states[0][:, 0].any()
    assert not states[1][:, 0].any()
    kept = states[0][0, 1].transpose(1, 0, 2).reshape(WIDTH - 1, -1)
    np.testing.assert_array_equal(kept[:, : m.inner], past.astype(np.float32))
    assert not kept[:, m.inner :].any()
    h = states[1][0, 1].transpose(0, 2, 1).reshape(m.n_groups, -1, m.n_states)
    held = m.inner // m.n_groups
    np.testing.assert_allclose(
        h[:, :held].reshape(m.inner, -1), state, atol=2e-6 * np.abs(state).max(), rtol=0
    )
    assert not h[:, held:].any()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cuts", [[1], [2, 3, 4], [NR - 1], [NR, NR + 1], [7, 50]])
def test_split_anywhere_equals_whole_to_the_bit(name, cuts):
    m = model_of(**SHAPES[name])
    inputs = inputs_of(m, NR + 11)
    whole, parts = states_of(m, 1), states_of(m, 1)
    y, _ = run(m, inputs, [0] * len(inputs.x), whole)
    borders = [0, *cuts, NR + 11]
    pieces = [
        run(m, Inputs(*(v[a:b] for v in inputs)), [0] * (b - a), parts)[0] for a, b in pairwise(borders)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), y)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batch_equals_single_to_the_bit(name, threads):
    """Sequences of unlike lengths, from one token to more than a panel, by any number of threads."""
    m = model_of(**SHAPES[name])
    lengths, cells = [3, 1, 2 * NR + 1, 1, 1, 17], [4, 0, 2, 6, 1, 3]
    apart = [inputs_of(m, n, seed=i) for i, n in enumerate(lengths)]
    together = states_of(m, 7)
    y, _ = run(
        m,
        Inputs(*(np.concatenate(values) for values in zip(*apart, strict=True))),
        np.repeat(cells, lengths),
        together,
        threads,
    )
    ends = np.cumsum(lengths)
    for inputs, cell, end in zip(apart, cells, ends.tolist(), strict=True):
        alone = states_of(m, 1)
        mine, _ = run(m, inputs, [0] * len(inputs.x), alone)
        np.testing.assert_array_equal(y[end - len(inputs.x) : end], mine)
        for states, state in zip(together, alone, strict=True):
            np.testing.assert_array_equal(states[cell], state[0])
    assert not together[1][5].any()


def decays(x):
    """exp(x) of many negative numbers by the scan's own code: a state of one that decays once, read by C."""
    n = len(x)
    m = Model(
        n, 1, 1, 1, np.zeros((n, WIDTH), np.float32), np.zeros(n, np.float32), x[:, None],
        np.full(n, 25.0, np.float32), np.zeros(n, np.float32),
    )  # fmt: skip
    states = states_of(m, 1)
    states[1][:] = 1.0
    zero, one = np.zeros((1, n), np.float32), np.ones((1, 1), np.float32)
    run(m, Inputs(zero, zero, zero, one, one), [0], states)
    return states[1][0, 1].ravel()[:n]


def test_exponentials_are_those_of_maths_to_the_bit():
    """The step is 25, beyond the threshold and so exactly what softplus was given."""
    x = -np.random.default_rng(0).exponential(1.0, 4000).astype(np.float32)
    x[:6] = 0.0, -1e-30, -3.4, -3.49, -3.48, -30.0
    want = np.array([exp32(value * np.float32(25.0)) for value in x])
    np.testing.assert_array_equal(decays(x), want)
    assert want.min() == 0.0


def test_softplus_is_exact_to_a_float_everywhere():
    """delta * B * x is the new state of an empty one: softplus itself where B and x are 1."""
    v = np.concatenate([np.linspace(-80, 80, 5000), [19.999998, 20.0, 20.000002]]).astype(np.float32)
    n = len(v)
    m = Model(
        n, 1, 1, 1, np.zeros((n, WIDTH), np.float32), np.full(n, 30.0, np.float32),
        np.full((n, 1), -1.0, np.float32), v, np.zeros(n, np.float32),
    )  # fmt: skip
    states = states_of(m, 1)
    zero, one = np.zeros((1, n), np.float32), np.ones((1, 1), np.float32)
    _, x = run(m, Inputs(zero, zero, zero, one, one), [0], states)
    assert (x == 30.0).all()
    got = states[1][0, 1].ravel()[:n]
    want = mamba.softplus(v.astype(np.float64)) * 30.0
    assert np.abs(got / want - 1).max() < 4e-7
    np.testing.assert_array_equal(got[v > 20], v[v > 20] * np.float32(30.0))


@pytest.mark.parametrize("where", Inputs._fields)
def test_nan_stays_in_its_sequence(where):
    m = model_of()
    clean, states = inputs_of(m, 6), states_of(m, 2)
    broken = clean._replace(**{where: getattr(clean, where).copy()})
    getattr(broken, where)[1] = np.nan
    y, _ = run(m, broken, [1, 1, 1, 0, 0, 0], states)
    alone, _ = run(m, Inputs(*(v[3:] for v in clean)), [0] * 3, states_of(m, 1))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[3:], alone)
