"""Kernels that multiply strips with a few tokens while they are decoded: nothing is stored between.

`dot(rows, stride, n_units, x, out)`: rows, stride and n_units as of `engine.quants.strips`; x: address of
(columns, n) float32, out: address of (n, STRIP) float32, overwritten. The same chains as the register tile's:
one fused multiply-add a column, in rising order. Only types whose columns come so.

A chain waits four cycles for each step, which is what decoding a column takes: one token costs as much as two
(Zen 4, 2026-11, 0.073 ns a weight). Two strips at a time: 0.067 for Q4_1, but 0.105 for Q8_0 out of memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels._jit import named_kernel
from engine.kernels.tile import LANES, STRIP
from engine.quants._strips import F32, FLOATS, I8, I32, I64, FloatStrip, prefetch, shuffled
from engine.quants.strips import FLOAT_UNITS

TOKENS = (1, 2, 4, 8)
_IN_ORDER = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")


class Dots(NamedTuple):
    """Kernels for TOKENS, None where one is not worth its registers, and the weights of a row in a unit."""

    kernels: tuple[Any, ...]
    unit: int


class _DotStrip(FloatStrip):
    """Multiplies a column by its row of x instead of storing it."""

    x: Any
    sums: list[Any]

    def put(self, column: int, values) -> None:
        b, n, undef = self.builder, len(self.sums), ir.Constant(FLOATS, ir.Undefined)
        for token in range(n):
            number = b.load(b.gep(self.x, [I64(column * n + token)]))
            splat = shuffled(b, b.insert_element(undef, number, I32(0)), undef, [0] * STRIP)
            self.sums[token] = self._fma(values, splat, self.sums[token])


def _dot_of(unit_bytes, unit, write, offset, n_tokens):
    @intrinsic
    def dot(typingctx, rows, stride, n_units, x, out):
        def codegen(context, builder, signature, args):
            first, row_bytes, count, factors, target = args
            block, row_of_x = (
                builder.inttoptr(first, I8.as_pointer()),
                builder.inttoptr(factors, F32.as_pointer()),
            )
            strip_bytes = builder.mul(row_bytes, I64(STRIP))
            before = builder.block
            loop, done = builder.append_basic_block("units"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            turn, by = builder.phi(I64), builder.phi(F32.as_pointer())
            sums = [builder.phi(FLOATS) for _ in range(n_tokens)]
            prefetch(builder, block, strip_bytes, turn, unit_bytes)
            at = builder.gep(block, [builder.mul(turn, I64(unit_bytes))])
            strip = _DotStrip(builder, at, row_bytes, None, offset)
            strip.x, strip.sums = by, list(sums)
            write(strip)
            following, zero = builder.add(turn, I64(1)), ir.Constant(FLOATS, None)
            steps = [
                (turn, I64(0), following),
                (by, row_of_x, builder.gep(by, [I64(unit * n_tokens)])),
                *((phi, zero, value) for phi, value in zip(sums, strip.sums, strict=True)),
            ]
            for phi, start, value in steps:
                phi.add_incoming(start, before)
                phi.add_incoming(value, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
            builder.position_at_end(done)
            results = builder.inttoptr(target, F32.as_pointer())
            for token, value in enumerate(strip.sums):
                place = builder.gep(results, [I64(token * STRIP)])
                builder.store(value, builder.bitcast(place, FLOATS.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), codegen

    return dot


def _dot(rows, stride, n_units, x, out):
    """STRIP rows of a weight times a few tokens."""
    emit(rows, stride, n_units, x, out)  # noqa: F821 (each kernel's own)


@cache
def dots(type_name: str) -> Dots | None:
    """The kernels for a tensor type such as "Q4_1", compiled when called; None where there are none."""
    if type_name not in _IN_ORDER:
        return None
    unit_bytes, unit, write, offset = FLOAT_UNITS[type_name]
    kernels = []
    for n_tokens in TOKENS:
        if n_tokens * STRIP > 8 * LANES:  # more sums than the registers of AVX2 hold
            kernels.append(None)
            continue
        emit = _dot_of(unit_bytes, unit, write, offset, n_tokens)
        kernels.append(named_kernel(_dot, f"dot_{type_name.lower()}_{n_tokens}", emit=emit))
    return Dots(tuple(kernels), unit)
