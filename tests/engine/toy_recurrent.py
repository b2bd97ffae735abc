"""A recurrent model of a few lines in NumPy, on the real cache: what an architecture does with `claim`."""

from __future__ import annotations

import numpy as np

import engine


class Toy:
    """Two layers of a window over the last three inputs and a decaying sum; one token after the other."""

    n_vocab, n_layers, window, inner = 11, 2, 3, 5

    def __init__(self, batch_tokens=64):
        self.batch_tokens, self.n_computed = batch_tokens, 0
        rng = np.random.default_rng(0)
        self.embedding = rng.standard_normal((self.n_vocab, self.inner)).astype(np.float32)
        self.weights = rng.standard_normal((self.n_layers, self.window, self.inner)).astype(np.float32)

    def new_cache(self, n_slots, n_cells=None):
        shapes = [(self.window, self.inner), (self.inner,)]
        return engine.RecurrentCache(n_slots, self.n_layers, shapes, n_cells)

    def run(self, batch, cache):
        """float32 (T, V) logits in batch order."""
        assert len(batch) <= self.batch_tokens
        slots, positions = batch.slots[batch.order], batch.positions[batch.order]
        cells = cache.claim(slots, positions)
        assert cells.dtype == np.int32
        windows, sums = cache.states
        logits = np.empty((len(batch), self.n_vocab), np.float32)
        for token, cell in zip(batch.order, cells, strict=True):
            x = self.embedding[batch.tokens[token]]
            for layer in range(self.n_layers):
                windows[cell, layer, :-1] = windows[cell, layer, 1:]
                windows[cell, layer, -1] = x
                sums[cell, layer] *= np.float32(0.9)
                sums[cell, layer] += np.tanh((windows[cell, layer] * self.weights[layer]).sum(axis=0))
                x = sums[cell, layer].copy()
            logits[token] = self.embedding @ x
        cache.release()
        self.n_computed += len(batch)
        return logits

    def logits(self, batch, cache):
        return self.run(batch, cache)[batch.outputs]

    def nll(self, batch, cache):
        logits = self.run(batch, cache)[batch.scored].astype(np.float64)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return log_sum - logits[np.arange(len(logits)), batch.wanted]

    def score(self, tokens):
        """float64 (T - 1,): NLL of each token after the first, from an empty cache, in one batch."""
        toy = Toy(len(tokens))
        batch = engine.Batch(tokens, np.arange(len(tokens)), targets=[*tokens[1:], -1])
        return toy.nll(batch, toy.new_cache(1))


def tokens_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, Toy.n_vocab, length).astype(np.int32)
