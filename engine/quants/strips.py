"""Kernels that decode a type straight into strips (engine.quants._strips), and the way to them by name.

Every one is `pack_TYPE(rows, stride, n_units, strip)`: the address of a block of the first of sixteen rows,
the bytes from one row to the next, the units to decode, and the address of the strip's first column. A strip
is (columns, STRIP) float32. The numbers are those of the decoders to the bit.

Zen 4, one thread, 2026-11, ns a weight: Q2_K, Q4_K, Q4_1 and BF16 0.05 to 0.06, Q4_0, Q5, Q8_0, Q3_K, Q6_K
and IQ4 0.06 to 0.07, F32 0.08, F16 0.086. Inner loops keep all vectors in registers.

A type without a kernel here is decoded row by row and then turned; same numbers, some 0.2 ns a weight slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from engine.kernels._jit import named_kernel
from engine.kernels.tile import STRIP
from engine.quants._strip_types import TYPES
from engine.quants._strips import FLOATS, FloatStrip, ints, strip_of


class Packer(NamedTuple):
    """A kernel and the weights of a row that one unit of it decodes."""

    kernel: Any
    unit: int


def _f32(s: FloatStrip) -> None:
    for i, words in enumerate(s.words(0)):
        s.put(i, s.builder.bitcast(words, FLOATS))


def _f16(s: FloatStrip) -> None:
    for i, words in enumerate(s.words(0)):
        for j, values in enumerate(s.halves(words)):
            s.put(2 * i + j, values)


def _bf16(s: FloatStrip) -> None:
    b = s.builder
    for i, words in enumerate(s.words(0)):
        s.put(2 * i, b.bitcast(b.shl(words, ints(16)), FLOATS))
        s.put(2 * i + 1, b.bitcast(b.and_(words, ints(0xFFFF0000)), FLOATS))


class FloatUnit(NamedTuple):
    """How `write` makes float32 of a unit: its bytes and weights, and what the type subtracts."""

    unit_bytes: int
    unit: int
    write: Callable[[FloatStrip], None]
    offset: int = 0


FLOAT_UNITS = {
    "F32": FloatUnit(16, 4, _f32),
    "F16": FloatUnit(16, 8, _f16),
    "BF16": FloatUnit(16, 8, _bf16),
    **{name: FloatUnit(kind.unit_bytes, kind.unit, kind.write, kind.offset) for name, kind in TYPES.items()},
}


def pack_template(rows, stride, n_units, strip):
    """Decodes STRIP rows into a strip."""
    emit(rows, stride, n_units, strip)  # noqa: F821 (each kernel's own)


@cache
def packer(type_name: str) -> Packer | None:
    """The kernel for a tensor type such as "Q4_1", compiled when called; None where there is none."""
    if type_name not in FLOAT_UNITS:
        return None
    unit_bytes, unit, write, offset = FLOAT_UNITS[type_name]
    emit = strip_of(FloatStrip, unit_bytes, STRIP * unit, write, offset)
    return Packer(named_kernel(pack_template, f"pack_{type_name.lower()}", emit=emit), unit)


pack_f32 = packer("F32").kernel
