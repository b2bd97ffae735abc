"""Reading the fields of a quantized block, in the integer widths of the format.

Numba computes small integers in 64 bits and lets a negative index count from the end. Left alone, both fill
the decoders' inner loops with conversions and selects, at up to twice their cost; so indices are cast to
unsigned and bit fields are cut back to a byte before they become floats, which lets LLVM keep them in byte
lanes.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import half_to_f32


@kernel
def byte_at(data, at):
    """The byte at offset `at`, which is never negative."""
    return data[np.uintp(at)]


@kernel
def half_at(data, at):
    """float32 of the IEEE half whose two bytes, low one first, start at `at`."""
    return half_to_f32(short_at(data, at))


@kernel
def short_at(data, at):
    """The uint16 whose two bytes, low one first, start at `at`."""
    return np.uint16(np.uint16(byte_at(data, at)) | np.uint16(byte_at(data, at + 1)) << 8)


@kernel
def word_at(data, at):
    """The uint32 whose four bytes, low one first, start at `at`."""
    low = np.uint32(byte_at(data, at)) | np.uint32(byte_at(data, at + 1)) << 8
    return np.uint32(low | np.uint32(byte_at(data, at + 2)) << 16 | np.uint32(byte_at(data, at + 3)) << 24)


@kernel
def unsigned(field):
    """float32 of a field of 0..255."""
    return np.float32(np.int32(np.uint8(field)))


@kernel
def signed(field):
    """float32 of the low 8 bits of a field, taken as -128..127.

    For fields of up to 127 too: what is or-ed together stays in bytes, where `unsigned` leaves it in 64 bits.
    """
    return np.float32(np.int32(np.int8(field)))


@kernel
def field_if(bits, mask, value):
    """`value` where the byte `bits` has the bit of `mask`, else 0; a shift would leave byte lanes."""
    return np.uint8(value) if np.uint8(bits & mask) != np.uint8(0) else np.uint8(0)
