"""An engine of a few lines for the pipeline's tests: bytes are tokens, a score depends on all before it.

`install` puts it in place of the real functions; files begin with b"GGUF" or are refused as the real reader
would.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

import numpy as np

BOS = 256


class FakeFile:
    """Maps the file, so that memory can be measured, and knows one metadata key of a model."""

    def __init__(self, path, *, load="mmap"):
        import engine

        self.path, self.paths, self.load = str(path), (str(path),), load
        self.tensors = {}
        raw = Path(path).read_bytes()
        self.n_bytes = len(raw)
        if raw[:4] != b"GGUF":
            raise engine.GGUFFormatError(f"{path}: begins with {raw[:4]!r}, expected b'GGUF'")
        if len(raw) < 8:
            raise engine.GGUFFormatError(f"{path}: ends at byte {len(raw)}, expected more")
        if raw[4:8] == b"what":
            self.metadata = {"general.architecture": "what"}
        elif raw[4:8] == b"mamb":
            self.metadata = {"general.architecture": "mamba"}
        else:
            self.metadata = {"general.architecture": "llama", "llama.context_length": 64}
        with Path(path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def resident_bytes(self):
        return mmap.PAGESIZE

    def close(self):
        self._map.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class FakeTokenizer:
    """UTF-8 bytes are ids; 256 is BOS."""

    add_bos, add_eos, bos_id, eos_id = True, False, BOS, None
    byte_lengths = np.array([1] * 256 + [0], np.int32)
    sha256 = "f" * 64

    def __init__(self, file):
        self.file = file

    def encode(self, text, *, add_special=True, parse_special=False):
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.concatenate([[BOS], ids]).astype(np.int32) if add_special and self.add_bos else ids

    def decode(self, ids):
        return bytes(int(i) for i in ids if i < 256)


class FakeCache:
    def __init__(self, n_slots, capacity):
        self.n_slots, self.capacity, self.cells = n_slots, capacity, {}

    def clear(self):
        self.cells.clear()
        return True

    def keep(self, slot):
        self.cells = {slot: self.cells[slot]}
        return True

    def length(self, slot):
        return len(self.cells.get(slot, []))

    def describe(self):
        return {"kind": "fake"}

    def dump(self, slots):
        held = [np.array(self.cells[slot], np.int32) for slot in slots]
        return [array.size for array in held], iter(held)

    def load(self, slots, inventory, read):
        for slot, size in zip(slots, inventory, strict=True):
            self.cells[slot] = read((size,), np.int32).tolist()


class FakeModel:
    """-ln p of a target is a checksum of every token that its slot has seen up to that position."""

    calls = tokens = 0

    def __init__(self, batch_tokens):
        self.batch_tokens = batch_tokens

    def new_cache(self, n_slots, capacity, kv="f32", *, fleeting=False):
        return FakeCache(n_slots, capacity)

    def nll(self, batch, cache):
        assert len(batch) <= self.batch_tokens
        assert batch.slots.max() < cache.n_slots
        assert batch.positions.max() < cache.capacity
        type(self).calls += 1
        type(self).tokens += len(batch)
        out = []
        for token, position, slot, target in zip(
            batch.tokens, batch.positions, batch.slots, batch.targets, strict=True
        ):
            seen = cache.cells.setdefault(int(slot), [])
            assert len(seen) == position, "positions come in order and go on from what the cache holds"
            seen.append(int(token))
            if target >= 0:
                out.append(zlib.crc32(np.array([*seen, target], np.int32).tobytes()) / 2**32 * 9)
        return np.array(out, np.float64)


def _check_supported(file):
    import engine

    if file.metadata["general.architecture"] not in ("llama", "mamba"):
        raise engine.UnsupportedModel(f"{file.path}: architecture 'what', expected llama")


def install(monkeypatch):
    """Replace the engine for one test; processes other than this one keep the real one."""
    import engine

    FakeModel.calls = FakeModel.tokens = 0
    fakes = {
        "open": FakeFile,
        "Tokenizer": FakeTokenizer,
        "check_supported": _check_supported,
        "first_broken": lambda model, batch: "tensor 'w' holds nan at [1, 2]",
        "footprint": lambda file, *, batch_tokens, n_slots, **_: 1000 * batch_tokens + n_slots,
        "warm_up": lambda file, activations="f32": 0.0,
        "fma_gflops": lambda threads=1, seconds=0.1: 100.0,  # measuring takes half a second of a dry run
        "load_model": lambda file, *, batch_tokens=4096, **_: FakeModel(batch_tokens),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(engine, name, fake, raising=False)
    return FakeModel
