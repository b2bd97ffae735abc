"""Models of every kind of Mamba, and what tests of them share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from golden import make_mamba

import engine
from tests.make_mamba_gguf import tiny_mamba, tiny_mamba2
from tests.reference.mamba import ReferenceMamba
from tests.reference.mamba2 import ReferenceMamba2

KINDS = {  # odd widths, several layers: more than one strip, none of them full at the end
    "mamba": (tiny_mamba, {"seed": 1, "width": 36, "n_layers": 3, "dt_rank": 7, "n_state": 5, "vocab": 301}),
    "falcon": (tiny_mamba, {"seed": 2, "falcon": True, "tied": False, "conv": 3, "vocab": 301, "padding": 5}),
    "mamba2": (
        tiny_mamba2,
        {"seed": 3, "width": 36, "n_heads": 6, "n_groups": 3, "n_state": 9, "tied": False},
    ),
}


def tokens_of(length, seed=0, vocab=301):
    return np.random.default_rng(seed).integers(0, vocab, length).astype(np.int32)


def reference(path):
    """The float64 twin of a file."""
    with engine.open(path) as file:
        is_second = file.metadata["general.architecture"] == "mamba2"
    return (ReferenceMamba2 if is_second else ReferenceMamba).open(path)


def opened(path, **settings):
    return engine.load_model(engine.open(path), **{"batch_tokens": 512} | settings)


def logits_of(model, tokens, cache=None, first=0, slot=0):
    """float32 (T, V) of one sequence from position `first` on."""
    cache = model.new_cache(slot + 1) if cache is None else cache
    positions, slots = np.arange(first, first + len(tokens)), np.full(len(tokens), slot)
    return model.logits(engine.Batch(tokens, positions, slots, outputs=np.ones(len(tokens), bool)), cache)


def states_of(model, cache, slot=0):
    """A sequence's state as `tests.reference.mamba.State` has it, heads flat: (L, W-1, E) and (L, E, N)."""
    p = model.params
    conv, ssm = (state[cache.cell(slot)] for state in cache.states)
    conv = conv.transpose(0, 2, 1, 3).reshape(p.n_layers, p.conv_width - 1, -1)
    ssm = ssm.transpose(0, 1, 3, 2).reshape(p.n_layers, p.n_groups, -1, p.n_states)
    inner = ssm[:, :, : p.inner // p.n_groups].reshape(p.n_layers, p.inner, p.n_states)
    return conv[:, :, : p.conv_channels], inner


def relative(got, want):
    """The largest difference over the largest magnitude."""
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def against_golden(name, folder):
    """Largest relative differences of logits and states from those that transformers gave in float64."""
    case = make_mamba.CASES[name]
    stored = np.load(Path(make_mamba.__file__).parent / f"{case.file}.npz")
    model = opened(case.build(folder / "m.gguf", **case.shape), threads=2)
    cache = model.new_cache(1)
    logits = logits_of(model, stored[f"{name}.tokens"], cache)
    conv, ssm = states_of(model, cache)
    want = stored[f"{name}.ssm"]
    return (
        relative(logits, stored[f"{name}.logits"]),
        relative(conv, stored[f"{name}.conv"]),
        relative(ssm, want.reshape(len(want), -1, want.shape[-1])),
    )
