"""Products with quantized weights and 8-bit activations (`engine.activations=int8`), and their definition.

An activation a of token t, in a block of 32 columns whose largest magnitude is amax, becomes an integer:

    s_a = amax / 127      q_a = a * (127 / amax), rounded half to even      -127 <= q_a <= 127

both divisions in float32; s_a = q_a = 0 where amax < 1e-30. A weight is s_w * (q_w - offset), or
s_w * q_w + m, with s_w and m for each row and group of 32 or 16 columns (engine.quants.strips8). An output
is ONE chain of float32 fused multiply-adds over the groups, in rising order of columns, from zero:

    c = fma(s_w * s_a, float32(sum over the group of (q_w - offset) * q_a), c)
    c = fma(m, s_a * float32(sum over the group of q_a), c)                     for types with minimums

Sums are integers below 2^24, so exact in whatever order and on any CPU: lanes run over weight rows, and no
number of tokens, width of registers or instruction changes a bit.

A panel of NR tokens is quantized into three arrays:

    quants  (depth / 4, NR, 4) int8      four columns of a token are 32 bits, which are broadcast
    scales  (depth / 32, NR) float32     s_a
    sums    (depth / 16, NR) int32       of q_a
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from engine.kernels._jit import kernel
from engine.kernels.int8_tiles import (
    BLOCK,
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    PARTS,
    all_lanes,
    group_bytes,
    load,
    loop,
    offset_taken,
    place,
    splat,
    tile_of,
)
from engine.kernels.tile import LANES, NR

# tiles: tokens by vectors of weight rows
_MANY, _FEW, _ONE = ((12, 1), (4, 1), (1, 4)) if LANES == 16 else ((6, 1), (4, 1), (1, 4))
_WIDE = 8 if LANES == 16 else 4  # more tokens than that take the first
_LEAST = float(np.float32(1e-30))  # blocks of smaller activations are zero
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 * 2^23: a sum with it is rounded, its low bits the integer


def _shares_of(group: int, offset: int):
    """An intrinsic that finds what activations add to an output by their sums, for LANES tokens.

    shares: (depth / group, NR) of 32 bits: s_a * float32(sum), which a minimum is multiplied with, or else
    -offset * sum as int32, where an accumulator begins, less what the tile takes of weights itself.
    """
    has_minimum, taken = offset == 0, offset_taken(offset)

    @intrinsic
    def find(typingctx, scales, sums, offset, n_blocks, shares):
        def codegen(context, builder, signature, args):
            bias = builder.sub(I64(taken), args[2])
            bias = splat(builder, builder.trunc(bias, I32))

            def block(turn, pointers, carried):
                s, h, to = pointers
                total = [load(builder, h, half * NR * 4, INTS) for half in range(2)]
                for part, value in enumerate([builder.add(*total)] if group == BLOCK else total):
                    if has_minimum:
                        value = builder.fmul(load(builder, s, 0, FLOATS), builder.sitofp(value, FLOATS))
                    else:
                        value = builder.mul(value, bias)
                    builder.store(value, place(builder, to, part * NR * 4, value.type)).align = 4
                return ()

            steps = (NR * 4, 2 * NR * 4, BLOCK // group * NR * 4)
            loop(builder, args[3], [args[0], args[1], args[4]], steps, block)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), codegen

    return find


@intrinsic
def _quantize_lanes(typingctx, x, n_blocks, quants, scales, sums):
    """Quantizes LANES tokens; addresses of the first token's x, quants, scales and sums."""

    def codegen(context, builder, signature, args):
        def number(value):
            return ir.Constant(FLOATS, [F32(value)] * LANES)

        def block(turn, pointers, carried):
            x, q, s, h = pointers
            largest = all_lanes(0)  # magnitudes compared as integers: the same order, and a NaN is above all
            for k in range(BLOCK):
                bits = builder.and_(load(builder, x, k * NR * 4, INTS), all_lanes(0x7FFFFFFF))
                largest = builder.select(builder.icmp_unsigned(">", bits, largest), bits, largest)
            amax = builder.bitcast(largest, FLOATS)
            is_zero, zero = builder.fcmp_ordered("<", amax, number(_LEAST)), number(0.0)
            scale = builder.select(is_zero, zero, builder.fdiv(amax, number(127.0)))
            inverse = builder.select(is_zero, zero, builder.fdiv(number(127.0), amax))
            builder.store(scale, place(builder, s, 0, FLOATS)).align = 4
            for half in range(2):
                total = all_lanes(-16 * _MAGIC_BITS & 0xFFFFFFFF)
                for word in range(half * 4, half * 4 + 4):
                    packed = all_lanes(0)
                    for k in range(4):
                        value = load(builder, x, (word * 4 + k) * NR * 4, FLOATS)
                        rounded = builder.fadd(builder.fmul(value, inverse), number(_MAGIC))
                        bits = builder.bitcast(rounded, INTS)
                        total = builder.add(total, bits)
                        octet = builder.shl(builder.and_(bits, all_lanes(255)), all_lanes(8 * k))
                        packed = builder.or_(packed, octet)
                    builder.store(packed, place(builder, q, word * NR * 4, INTS)).align = 4
                builder.store(total, place(builder, h, half * NR * 4, INTS)).align = 4
            return ()

        addresses = [args[i] for i in (0, 2, 3, 4)]
        loop(builder, args[1], addresses, (BLOCK * NR * 4, BLOCK * NR, NR * 4, 2 * NR * 4), block)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@kernel
def quantize_panel(x, depth, n_tokens, quants, scales, sums):
    """Quantizes the tokens of a panel, to whole vectors of them; all arguments are addresses and numbers.

    x: (depth, NR) float32, depth a multiple of 32; the others as above.
    """
    for t in range(0, n_tokens, LANES):
        _quantize_lanes(x + t * 4, depth // BLOCK, quants + t * 4, scales + t * 4, sums + t * 4)


def _product_of(group: int, kind: int):
    """The body of a `multiply` kernel; `kind` is an offset of such types."""
    many, few, one = (tile_of(*shape, group, kind) for shape in (_MANY, _FEW, _ONE))
    find_shares, record = _shares_of(group, kind), group_bytes(group, kind)

    @register_jitable
    def product(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares):
        n_groups, n_vectors = depth // group, n_strips * PARTS
        strip_bytes = n_groups * record
        for t in range(0, n_tokens, LANES):
            find_shares(scales + t * 4, sums + t * 4, offset, depth // BLOCK, shares + t * 4)
        t = 0
        while t < n_tokens:
            left, at = n_tokens - t, t * 4
            tokens = _MANY[0] if left > _WIDE else (_FEW[0] if left > 1 else _ONE[0])
            v = 0
            while v < n_vectors:
                w = strips + v // PARTS * strip_bytes + v % PARTS * LANES * 4
                to = out + v * LANES * NR * 4 + at
                if tokens == _MANY[0]:
                    many(w, strip_bytes, quants + at, scales + at, shares + at, n_groups, to)
                    v += _MANY[1]
                elif tokens == _ONE[0] and n_vectors - v >= _ONE[1]:
                    one(w, strip_bytes, quants + at, scales + at, shares + at, n_groups, to)
                    v += _ONE[1]
                else:
                    few(w, strip_bytes, quants + at, scales + at, shares + at, n_groups, to)
                    v += _FEW[1]
            t += tokens

    return product


_product_32, _product_32_full, _product_32_min = _product_of(32, 8), _product_of(32, 128), _product_of(32, 0)
_product_16, _product_16_min = _product_of(16, 8), _product_of(16, 0)


@kernel
def multiply_32(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares):
    """out[row, t] for the rows of n_strips strips and the tokens of a panel; scales of 32 columns.

    All arguments are addresses and numbers. strips: as `engine.quants.strips8` writes them, of a type whose
    `offset` this is, 1 to 127; quants, scales, sums: a panel as above, depth a multiple of 32; out: (n_strips
    * STRIP, NR) float32, overwritten for whole tiles of tokens; shares: (depth / group, NR) of 32 bits,
    scratch.
    """
    _product_32(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares)


@kernel
def multiply_32_full(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares):
    """The same for types that use all of a byte, whose offset is 128."""
    _product_32_full(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares)


@kernel
def multiply_32_min(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares):
    """The same for types with minimums, whose offset is 0."""
    _product_32_min(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares)


@kernel
def multiply_16(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares):
    """`multiply_32` for types whose scales are of 16 columns."""
    _product_16(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares)


@kernel
def multiply_16_min(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares):
    """`multiply_32_min` for types whose scales are of 16 columns."""
    _product_16_min(strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares)


def multiplier(group: int, offset: int) -> Any:
    """The kernel for strips of a type with such groups and that offset."""
    if group == 16:
        return multiply_16 if offset else multiply_16_min
    return {0: multiply_32_min, 128: multiply_32_full}.get(offset, multiply_32)
