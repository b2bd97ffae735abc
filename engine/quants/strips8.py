"""Packing for `engine.activations=int8`: strips of sixteen rows that stay quantized, and the way to them.

A strip is a run of groups, one for each scale, in rising order of columns; a group of G columns (32, or 16
for Q2_K, Q3_K and Q6_K) holds vectors of sixteen lanes, one lane a row:

    G / 4 vectors of 32 bits      four weights of a row as unsigned bytes, low byte first: q
    1 vector of float32           scales
    1 vector of float32           minimums, for types that have them

A weight is scale * (q - offset), or scale * q + minimum for types of offset 0. The kernels are
`pack8_TYPE(rows, stride, n_units, strip)`, called like those of `engine.quants.strips`.

Zen 4, one thread, 2026-11, ns a weight: Q4_0 0.015, IQ4, Q8_0 and Q4_K 0.018 to 0.020, others to 0.028.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

from engine.kernels._jit import named_kernel
from engine.quants._strip_types import TYPES
from engine.quants._strips import FLOATS, I64, INTS, STRIP, Strip, strip_of
from engine.quants.strips import pack_template


class Packer8(NamedTuple):
    """A kernel and what its strips hold."""

    kernel: Any
    unit: int  # weights of a row that one unit decodes
    unit_bytes: int  # bytes of a strip that it writes
    group: int  # columns of a scale
    offset: int  # taken from every unsigned weight
    has_minimum: bool


class ByteStrip(Strip):
    """A strip of bytes with scales; `group` and `has_minimum` are set by the subclass of a type."""

    group: int
    has_minimum: bool

    def _floats_before(self, n_columns):
        b, width = self.builder, self._width() * STRIP
        if isinstance(n_columns, ir.Value):
            return b.mul(b.udiv(n_columns, I64(self.group)), I64(width))
        return I64(n_columns // self.group * width)

    @classmethod
    def _width(cls) -> int:
        """Vectors of a group."""
        return cls.group // 4 + 1 + cls.has_minimum

    def _store(self, vector: int, values, kind) -> None:
        pointer = self.builder.gep(self._out, [I64(vector * STRIP)])
        self.builder.store(values, self.builder.bitcast(pointer, kind.as_pointer())).align = 4

    def weights(self, column, words, scale, least=None) -> None:
        first = column // self.group * self._width()
        for i, four in enumerate(words):
            self._store(first + column % self.group // 4 + i, four, INTS)
        if column % self.group == 0:
            self._store(first + self.group // 4, scale, FLOATS)
            if least is not None:
                self._store(first + self.group // 4 + 1, least, FLOATS)


def _unit_bytes(name: str) -> int:
    kind = TYPES[name]
    return kind.unit // kind.group * (kind.group // 4 + 1 + kind.has_minimum) * 4 * STRIP


@cache
def packer8(type_name: str) -> Packer8 | None:
    """The kernel for a tensor type such as "Q4_1"; None where there is none, and weights become float32."""
    if type_name not in TYPES:
        return None
    kind = TYPES[type_name]
    shape = type("ByteStrip", (ByteStrip,), {"group": kind.group, "has_minimum": kind.has_minimum})
    emit = strip_of(shape, kind.unit_bytes, _unit_bytes(type_name) // 4, kind.write, kind.offset)
    kernel = named_kernel(pack_template, f"pack8_{type_name.lower()}", emit=emit)
    return Packer8(kernel, kind.unit, _unit_bytes(type_name), kind.group, kind.offset, kind.has_minimum)
