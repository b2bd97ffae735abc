"""States of sequences in a file: saved by one process, gone on with by another, to the same bits.

    8 bytes   b"PGMSTATE"
    4 + 4     version of this format, length of the header; little-endian, as all that follows
    8         length of the payload
    32        SHA-256 of header and payload
    header    JSON: model, numerics, cache (what `Cache.describe` says), whole (or one sequence), inventory
    payload   the arrays of `Cache.dump`, one after the other

Shapes are those of the model: neither the size of the cache nor the CPU's vector width matters.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import uuid
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine import NUMERICS
from engine.cache import chosen
from engine.errors import CapacityError, StateError

if TYPE_CHECKING:
    from engine.cache import Cache

VERSION = 1
_MAGIC = b"PGMSTATE"
_PREAMBLE = struct.Struct("<8sIIQ32s")


def save_state(
    path: str | os.PathLike[str], cache: Cache, model_sha256: str, *, slot: int | None = None
) -> None:
    """Writes a cache, or one sequence of it, to a file; at once, in place of one that is there.

    Args:
        model_sha256: says which model it is; `restore_state` asks for the same.
        slot: the one sequence; None for all of them, each with its slot.

    Raises:
        CapacityError: there is no such slot.
        ValueError: it is empty, or the cache is a fleeting one.
        OSError: the file cannot be written; nothing is left behind.
    """
    if slot is not None and cache.length(slot) == 0:
        raise ValueError(f"slot {slot} is empty; there is nothing to save")
    inventory, arrays = cache.dump(range(cache.n_slots) if slot is None else [slot])
    said = {"model": model_sha256, "numerics": NUMERICS, "cache": cache.describe(), "whole": slot is None}
    header = json.dumps(said | {"inventory": inventory}).encode()
    digest, n_bytes = hashlib.sha256(header), 0
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(bytes(_PREAMBLE.size) + header)
            for array in arrays:
                data = np.ascontiguousarray(array).data
                digest.update(data)
                file.write(data)
                n_bytes += data.nbytes
            file.seek(0)
            file.write(_PREAMBLE.pack(_MAGIC, VERSION, len(header), n_bytes, digest.digest()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def restore_state(
    path: str | os.PathLike[str], cache: Cache, model_sha256: str, *, slot: int | None = None
) -> None:
    """Puts a saved cache in place of all that `cache` holds, or a saved sequence in place of `slot`'s.

    Raises:
        StateError: the file is damaged, of another version, model or kind of cache, or holds a whole cache
            where one sequence is wanted, or the other way round.
        CapacityError: the cache has no such slot, or too few slots, positions or cells.
        ValueError: a fleeting cache.
        OSError: the file cannot be read.
        Nothing was changed then.
    """
    data, header_bytes = _checked(str(path))
    start = _PREAMBLE.size
    header = json.loads(data[start : start + header_bytes])
    own = {"model": model_sha256, "numerics": NUMERICS, "cache": cache.describe()}
    for key, expected in own.items():
        if header[key] != expected:
            raise StateError(f"{path}: saved with {key} {header[key]}, expected {expected}; evaluate again")
    if header["whole"] and slot is not None:
        raise StateError(f"{path}: holds a whole cache, expected one sequence; restore it without a slot")
    if not header["whole"] and slot is None:
        raise StateError(f"{path}: holds one sequence, expected a whole cache; say which slot it is for")
    inventory, at = header["inventory"], start + header_bytes
    n_held = 1 + max((i for i, held in enumerate(inventory) if held), default=-1)
    if slot is None and n_held > cache.n_slots:
        raise CapacityError(f"{path}: holds {n_held} slots, the cache has {cache.n_slots}")
    slots = range(cache.n_slots) if slot is None else chosen(slot, cache.n_slots)
    inventory = [*inventory[: len(slots)], *[None] * (len(slots) - len(inventory))]

    def read(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        nonlocal at
        array = np.frombuffer(data, dtype, prod(shape), at).reshape(shape)
        at += array.nbytes
        return array

    try:
        cache.load(slots, inventory, read)
    except CapacityError as error:
        raise CapacityError(f"{path}: {error}") from None


def _checked(path: str) -> tuple[mmap.mmap, int]:
    """The file's bytes, whole and undamaged, and the length of its header."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        preamble = file.read(_PREAMBLE.size)
        if preamble[: len(_MAGIC)] != _MAGIC[: len(preamble)] or not preamble:
            raise StateError(f"{path}: starts with {preamble[:8]!r}, expected {_MAGIC!r}: not a saved state")
        if len(preamble) < _PREAMBLE.size:
            raise StateError(f"{path}: ends at byte {size}, within the preamble; it was cut short")
        _, version, header_bytes, payload_bytes, digest = _PREAMBLE.unpack(preamble)
        if version != VERSION:
            raise StateError(f"{path}: version {version}, expected {VERSION}; evaluate again")
        expected = _PREAMBLE.size + header_bytes + payload_bytes
        if size != expected:
            raise StateError(
                f"{path}: has {size:,} bytes, expected {expected:,}; it was cut short or damaged"
            )
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hashlib.sha256(memoryview(data)[_PREAMBLE.size :]).digest() != digest:
        raise StateError(f"{path}: its SHA-256 is not the one it was saved with; the file is damaged")
    return data, header_bytes
