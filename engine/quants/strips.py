"""Kernels that decode a type straight into strips (engine.quants._strips), and the way to them by name.

Every one is `pack_TYPE(rows, stride, n_units, strip)`: the address of a block of the first of sixteen rows,
the bytes from one row to the next, the units to decode, and the address of the strip's first column. A strip
is (columns, STRIP) float32. The numbers are those of the decoders to the bit.

Zen 4, one thread, 2026-11, ns a weight: Q2_K, Q4_K, Q4_1 and BF16 0.05 to 0.06, Q4_0, Q5, Q8_0, Q3_K, Q6_K
and IQ4 0.06 to 0.07, F32 0.08, F16 0.086. Inner loops keep all vectors in registers.

A type without a kernel here is decoded row by row and then turned; same numbers, some 0.2 ns a weight slower.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.kernels._jit import kernel
from engine.quants._strip_types import TYPES
from engine.quants._strips import FLOATS, FloatStrip, ints, strip_of


class Packer(NamedTuple):
    """A kernel and the weights of a row that one unit of it decodes."""

    kernel: Any
    unit: int


def packer(type_name: str) -> Packer | None:
    """The kernel for a tensor type such as "Q4_1"; None where there is none."""
    return _PACKERS.get(type_name)


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


def _of(name: str):
    kind = TYPES[name]
    return strip_of(FloatStrip, kind.unit_bytes, 16 * kind.unit, kind.write, kind.offset)


_strip_f32 = strip_of(FloatStrip, 16, 64, _f32)
_strip_f16 = strip_of(FloatStrip, 16, 128, _f16)
_strip_bf16 = strip_of(FloatStrip, 16, 128, _bf16)
_strip_q4_0 = _of("Q4_0")
_strip_q4_1 = _of("Q4_1")
_strip_q5_0 = _of("Q5_0")
_strip_q5_1 = _of("Q5_1")
_strip_q8_0 = _of("Q8_0")
_strip_iq4_nl = _of("IQ4_NL")
_strip_q2_k = _of("Q2_K")
_strip_q3_k = _of("Q3_K")
_strip_q4_k = _of("Q4_K")
_strip_q5_k = _of("Q5_K")
_strip_q6_k = _of("Q6_K")
_strip_iq4_xs = _of("IQ4_XS")


@kernel
def pack_f32(rows, stride, n_units, strip):
    """F32, four weights a unit."""
    _strip_f32(rows, stride, n_units, strip)


@kernel
def pack_f16(rows, stride, n_units, strip):
    """F16, eight weights a unit."""
    _strip_f16(rows, stride, n_units, strip)


@kernel
def pack_bf16(rows, stride, n_units, strip):
    """BF16, eight weights a unit."""
    _strip_bf16(rows, stride, n_units, strip)


@kernel
def pack_q4_0(rows, stride, n_units, strip):
    """Q4_0."""
    _strip_q4_0(rows, stride, n_units, strip)


@kernel
def pack_q4_1(rows, stride, n_units, strip):
    """Q4_1."""
    _strip_q4_1(rows, stride, n_units, strip)


@kernel
def pack_q5_0(rows, stride, n_units, strip):
    """Q5_0."""
    _strip_q5_0(rows, stride, n_units, strip)


@kernel
def pack_q5_1(rows, stride, n_units, strip):
    """Q5_1."""
    _strip_q5_1(rows, stride, n_units, strip)


@kernel
def pack_q8_0(rows, stride, n_units, strip):
    """Q8_0."""
    _strip_q8_0(rows, stride, n_units, strip)


@kernel
def pack_iq4_nl(rows, stride, n_units, strip):
    """IQ4_NL."""
    _strip_iq4_nl(rows, stride, n_units, strip)


@kernel
def pack_q2_k(rows, stride, n_units, strip):
    """Q2_K."""
    _strip_q2_k(rows, stride, n_units, strip)


@kernel
def pack_q3_k(rows, stride, n_units, strip):
    """Q3_K."""
    _strip_q3_k(rows, stride, n_units, strip)


@kernel
def pack_q4_k(rows, stride, n_units, strip):
    """Q4_K."""
    _strip_q4_k(rows, stride, n_units, strip)


@kernel
def pack_q5_k(rows, stride, n_units, strip):
    """Q5_K."""
    _strip_q5_k(rows, stride, n_units, strip)


@kernel
def pack_q6_k(rows, stride, n_units, strip):
    """Q6_K."""
    _strip_q6_k(rows, stride, n_units, strip)


@kernel
def pack_iq4_xs(rows, stride, n_units, strip):
    """IQ4_XS."""
    _strip_iq4_xs(rows, stride, n_units, strip)


_PACKERS = {
    "F32": Packer(pack_f32, 4),
    "F16": Packer(pack_f16, 8),
    "BF16": Packer(pack_bf16, 8),
    "Q4_0": Packer(pack_q4_0, TYPES["Q4_0"].unit),
    "Q4_1": Packer(pack_q4_1, TYPES["Q4_1"].unit),
    "Q5_0": Packer(pack_q5_0, TYPES["Q5_0"].unit),
    "Q5_1": Packer(pack_q5_1, TYPES["Q5_1"].unit),
    "Q8_0": Packer(pack_q8_0, TYPES["Q8_0"].unit),
    "IQ4_NL": Packer(pack_iq4_nl, TYPES["IQ4_NL"].unit),
    "Q2_K": Packer(pack_q2_k, TYPES["Q2_K"].unit),
    "Q3_K": Packer(pack_q3_k, TYPES["Q3_K"].unit),
    "Q4_K": Packer(pack_q4_k, TYPES["Q4_K"].unit),
    "Q5_K": Packer(pack_q5_k, TYPES["Q5_K"].unit),
    "Q6_K": Packer(pack_q6_k, TYPES["Q6_K"].unit),
    "IQ4_XS": Packer(pack_iq4_xs, TYPES["IQ4_XS"].unit),
}
