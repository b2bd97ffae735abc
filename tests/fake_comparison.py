"""The fake engine of `fake_engine.py` for several models at once: a variant is a little off the base.

A model file is b"GGUF", four bytes, a level, and padding; the level says how far its scores are from level 0.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fake_engine import BOS, FakeCache, FakeFile, FakeTokenizer
from fake_engine import install as install_engine

from pipeline.compare.statistics import Targets
from pipeline.protocols.windows import Windows

BROKEN = 255
"""A level whose model gives no numbers from position 20 on."""


def write_model(path: Path, level: int, n_bytes: int) -> Path:
    path.write_bytes(b"GGUF" + bytes(4) + bytes([level]) + bytes(n_bytes - 9))
    return path


def draws(tokens: list[int], target: int) -> np.ndarray:
    """Four numbers in [0, 1) that depend on all that was read and on the target."""
    seen = np.array([*tokens, target], np.int32).tobytes()
    return np.array([zlib.crc32(bytes([i]) + seen) / 2**32 for i in range(4)])


def scored(draw: np.ndarray, level: int) -> tuple[float, float, int]:
    """nll, divergence from level 0, most likely token."""
    return (
        0.1 + 6 * draw[0] + level * 0.02 * (draw[1] - 0.2),
        level * 0.01 * draw[2],
        int(draw[3] < level * 0.02),
    )


def targets_of(level: int, text: str, n_windows: int) -> Targets:
    """Scored targets of a variant of that level against level 0, in windows of 32, from the definition."""
    tokens, found = FakeTokenizer(None).encode(text), []
    protocol = Windows(32, None, BOS)
    for index in range(n_windows):
        w = protocol.window(tokens, index)
        for at in np.flatnonzero(w.targets >= 0):
            draw = draws(w.tokens[: at + 1].tolist(), int(w.targets[at]))
            base, variant = scored(draw, 0), scored(draw, level)
            found.append((index, base[0], variant[0], np.float32(variant[1]), base[2] == variant[2]))
    window, nll_base, nll, kld, same = (np.array(column) for column in zip(*found, strict=True))
    return Targets(window, nll_base, nll, kld.astype(np.float64), same)


class FakeCaches:
    def __init__(self, caches):
        self.all = caches

    def clear(self):
        return all([cache.clear() for cache in self.all])

    def keep(self, slot):
        return all([cache.keep(slot) for cache in self.all])


class FakeComparison:
    """Like `engine.Comparison`; `tokens` counts those read by all models, `opened` the models of each one."""

    tokens = 0
    opened: list[list[str]] = []  # noqa: RUF012

    def __init__(self, base, variants, *, threads=1, batch_tokens=4096, activations="f32"):
        files = [base, *variants]
        self.levels = [Path(file.path).read_bytes()[8] for file in files]
        self.batch_tokens = batch_tokens
        self.models = [SimpleNamespace(batch_tokens=batch_tokens) for _ in files]
        self.layers_s = np.zeros(len(files))
        type(self).opened.append([Path(file.path).name for file in files])

    def new_cache(self, n_slots, capacity, kv="f32", *, fleeting=False):
        return FakeCaches([FakeCache(n_slots, capacity) for _ in self.levels])

    def compare(self, batch, cache):
        assert len(batch) <= self.batch_tokens
        columns = []
        for token, position, slot, target in zip(
            batch.tokens, batch.positions, batch.slots, batch.targets, strict=True
        ):
            for one in cache.all:
                seen = one.cells.setdefault(int(slot), [])
                assert len(seen) == position, "positions come in order and go on from what the cache holds"
                seen.append(int(token))
            if target >= 0:
                draw = draws(cache.all[0].cells[int(slot)], int(target))
                found = [scored(draw, level) for level in self.levels]
                if BROKEN in self.levels and position >= 20:
                    at = self.levels.index(BROKEN)
                    found[at] = (np.nan, *found[at][1:])
                nll, kld, top = zip(*found, strict=True)
                columns.append([*nll, *kld[1:], *top])
        if len(batch) > 1:  # else it is warming up
            type(self).tokens += len(batch) * len(self.levels)
        return np.array(columns, np.float64).reshape(-1, 3 * len(self.levels) - 1).T


def install(monkeypatch):
    """Replace the engine for one test; processes other than this one keep the real one."""
    import engine

    install_engine(monkeypatch)
    FakeComparison.tokens, FakeComparison.opened = 0, []
    monkeypatch.setattr(engine, "Comparison", FakeComparison, raising=False)
    monkeypatch.setattr(engine, "first_broken", lambda model, batch: "tensor 'w' holds nan at [1, 2]")
    monkeypatch.setattr(engine, "is_warm", lambda file: True, raising=False)
    assert FakeFile is engine.open
    return FakeComparison
