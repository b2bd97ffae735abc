"""A tiny model, and the plain way to score sequences with it."""

from __future__ import annotations

import numpy as np
import pytest

import engine
from tests.make_gguf import tiny_llama


class Scorer:
    """An opened model that scores whole sequences, each alone, from an empty cache."""

    def __init__(self, path, *, threads=1, batch_tokens=512, activations="f32") -> None:
        self.path = path
        self.file = engine.open(path)
        self.model = engine.load_model(
            self.file, threads=threads, batch_tokens=batch_tokens, activations=activations
        )

    def score(self, tokens) -> np.ndarray:
        """float64 (T - 1,): NLL of each token after the first."""
        return self.score_all([tokens])[0]

    def score_all(self, sequences, order=None) -> list[np.ndarray]:
        """The same of several sequences in one batch, its tokens in the given order."""
        tokens = np.concatenate(sequences).astype(np.int32)
        positions = np.concatenate([np.arange(len(s)) for s in sequences])
        slots = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
        targets = np.concatenate([[*s[1:], -1] for s in sequences])
        order = np.arange(tokens.size) if order is None else order
        cache = self.model.new_cache(len(sequences), max(len(s) for s in sequences))
        batch = engine.Batch(tokens[order], positions[order], slots[order], targets=targets[order])
        flat = np.full(tokens.size, np.nan)
        flat[order[batch.targets >= 0]] = self.model.nll(batch, cache)
        ends = np.cumsum([len(s) for s in sequences])
        return [flat[end - len(s) : end - 1] for s, end in zip(sequences, ends, strict=True)]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Odd widths, grouped queries, untied: a file of 2 layers."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return tiny_llama(
        path,
        seed=1,
        width=72,
        n_heads=6,
        n_kv_heads=2,
        ff=100,
        vocab=333,
        tied=False,
        context=1024,
        head_width=12,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_path):
    return Scorer(tiny_path)
