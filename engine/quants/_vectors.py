"""Whole vectors of weights written at once, for the formats whose fields Numba's loops cannot vectorize.

A grid look-up gives eight weights as the bytes of one 64-bit word, and Numba runs LLVM's loop vectorizer but
not the one for straight-line code: eight statements stay eight scalar conversions. So these intrinsics are
LLVM vector code of fixed length, which every CPU runs as its registers allow. A byte is converted exactly and
multiplied once: the bits are those of the scalar loop in each docstring.

Zen 4, one thread, 2026-11, ns a weight where a plain copy of the output takes 0.08: 0.08 to 0.16 by nibbles,
0.10 to 0.19 by grids. Grids of 1 to 16 KB stay in the first cache; instructions are what limits them, for
eight weights 5 or 6 of vectors (load and widen, convert, sign or shift, multiply, store) and 3 to 10 scalar
ones to find the row and its signs.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _address(context, builder, array_type, array, at):
    """Pointer to element `at` of a C-contiguous vector."""
    return builder.gep(make_array(array_type)(context, builder, array).data, [at])


def _splat(builder, value, lanes):
    """A vector of `lanes` times `value`."""
    undef = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    lane = builder.insert_element(undef, value, _I32(0))
    return builder.shuffle_vector(lane, undef, ir.Constant(ir.VectorType(_I32, lanes), None))


def _to_floats(builder, octets):
    """float32 of signed bytes."""
    lanes = octets.type.count
    wide = builder.sext(octets, ir.VectorType(_I32, lanes))
    return builder.sitofp(wide, ir.VectorType(_F32, lanes))


def _store(builder, values, address):
    builder.store(values, builder.bitcast(address, values.type.as_pointer())).align = 4


@intrinsic
def put_signed(typingctx, out, at, word, signs, scale):
    """for j in range(8): out[at + j] = (-scale if signs >> j & 1 else scale) * byte j of `word`, signed."""

    def codegen(context, builder, signature, args):
        values = _to_floats(builder, builder.bitcast(args[2], ir.VectorType(_I8, 8)))
        scales = _splat(builder, args[4], 8)
        negative = builder.bitcast(args[3], ir.VectorType(ir.IntType(1), 8))
        scales = builder.select(negative, builder.fneg(scales), scales)
        _store(builder, builder.fmul(scales, values), _address(context, builder, out, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(out, types.intp, types.uint64, types.uint8, types.float32), codegen


@intrinsic
def put_shifted(typingctx, out, at, word, shift, scale):
    """for j in range(8): out[at + j] = scale * (byte j of `word`, signed + shift)."""

    def codegen(context, builder, signature, args):
        values = _to_floats(builder, builder.bitcast(args[2], ir.VectorType(_I8, 8)))
        values = builder.fadd(values, _splat(builder, args[3], 8))
        values = builder.fmul(_splat(builder, args[4], 8), values)
        _store(builder, values, _address(context, builder, out, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(out, types.intp, types.uint64, types.float32, types.float32), codegen


def put_nibbles_of(table):
    """Two intrinsics that write 32 weights, `scale * table[nibble]`, for a table of 16 signed bytes.

    Both read data[start : start + 16]. By number of byte and nibble (L low, H high), the weights are
        put_16(out, at, data, start, scale):           L0 .. L15  H0 .. H15
        put_8(out, at, data, start, scale, scale_2):   L0 .. L7  H0 .. H7  L8 .. L15  H8 .. H15

    with scale_2 for the last 16 of put_8.
    """
    octets = ir.VectorType(_I8, 16)
    constant = ir.Constant(octets, [_I8(value & 255) for value in table])

    def looked_up(builder, codes):
        # LLVM makes one table shuffle of this where the CPU has it (x86: pshufb), if `codes` is no shuffle.
        values = ir.Constant(octets, ir.Undefined)
        for lane in range(16):
            code = builder.extract_element(codes, _I32(lane))
            values = builder.insert_element(values, builder.extract_element(constant, code), _I32(lane))
        return values

    def low_and_high(context, builder, data, array, start):
        address = builder.bitcast(_address(context, builder, data, array, start), octets.as_pointer())
        packed = builder.load(address)
        packed.align = 1
        low = builder.and_(packed, ir.Constant(octets, [_I8(15)] * 16))
        high = builder.lshr(packed, ir.Constant(octets, [_I8(4)] * 16))
        return _to_floats(builder, looked_up(builder, low)), _to_floats(builder, looked_up(builder, high))

    def put(builder, address, values, scale):
        _store(builder, builder.fmul(_splat(builder, scale, 16), values), address)

    @intrinsic
    def put_16(typingctx, out, at, data, start, scale):
        def codegen(context, builder, signature, args):
            address = _address(context, builder, out, *args[:2])
            for half, values in enumerate(low_and_high(context, builder, data, *args[2:4])):
                put(builder, builder.gep(address, [_I64(16 * half)]), values, args[4])
            return context.get_dummy_value()

        return types.void(out, types.intp, data, types.intp, types.float32), codegen

    @intrinsic
    def put_8(typingctx, out, at, data, start, scale, scale_2):
        def codegen(context, builder, signature, args):
            address = _address(context, builder, out, *args[:2])
            low, high = low_and_high(context, builder, data, *args[2:4])
            for half in range(2):
                lanes = [*range(8 * half, 8 * half + 8), *range(16 + 8 * half, 24 + 8 * half)]
                values = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 16), lanes))
                put(builder, builder.gep(address, [_I64(16 * half)]), values, args[4 + half])
            return context.get_dummy_value()

        return types.void(out, types.intp, data, types.intp, types.float32, types.float32), codegen

    return put_16, put_8
