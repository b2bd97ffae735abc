"""Scalar intrinsics that LLVM's vectorizer understands, for use inside kernels.

Written with bit casts and explicit fused multiply-adds so that the result is the same on every CPU and at
every vector width; LLVM turns a loop of them into vector code.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from engine.kernels._jit import kernel


def _bitcast(source, target):
    llvm = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], llvm.get(target) or ir.IntType(target.bitwidth))

    return target(source), codegen


@intrinsic
def _bits_to_f32(typingctx, bits):
    return _bitcast(types.uint32, types.float32)


@intrinsic
def _f32_to_bits(typingctx, value):
    return _bitcast(types.float32, types.uint32)


@intrinsic
def _bits_to_f64(typingctx, bits):
    return _bitcast(types.uint64, types.float64)


@intrinsic
def _f64_to_bits(typingctx, value):
    return _bitcast(types.float64, types.uint64)


def _fma_of(number):
    llvm, suffix = (ir.FloatType(), "f32") if number == types.float32 else (ir.DoubleType(), "f64")

    def codegen(context, builder, signature, args):
        fn = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(llvm, [llvm] * 3), f"llvm.fma.{suffix}"
        )
        return builder.call(fn, args)

    return number(number, number, number), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """float32 a * b + c with one rounding."""
    return _fma_of(types.float32)


@intrinsic
def fma64(typingctx, a, b, c):
    """float64 a * b + c with one rounding."""
    return _fma_of(types.float64)


bits_to_f32, f32_to_bits = _bits_to_f32, _f32_to_bits  # uint32 <-> float32
bits_to_f64, f64_to_bits = _bits_to_f64, _f64_to_bits  # uint64 <-> float64


# In the two conversions Numba widens uint32 arithmetic to 64 bits unless each step is cast back: 2.7 times
# slower (Zen 4, 2026-11).


@kernel
def half_to_f32(half):
    """float32 of an IEEE half given as its uint16 bits; exact, subnormal numbers, infinities and NaN too."""
    bits = np.uint32(half)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    # the multiplication moves the exponent's bias from 15 to 127
    finite = f32_to_bits(bits_to_f32(magnitude) * np.float32(2.0**112))
    special = np.uint32(magnitude | np.uint32(0x7F800000))
    body = special if magnitude >= np.uint32(0x0F800000) else finite
    return bits_to_f32(np.uint32(body | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))))


@kernel
def f32_to_half(value):
    """uint16 bits of the IEEE half nearest to a float32, ties to even; NaN becomes 0x7E00 with its sign."""
    bits = f32_to_bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude - np.uint32(0x37FFF001) + odd) >> np.uint32(13))
    # adding 0.5 puts a number below 2^-14 into the last bits of the sum, rounded as a half is
    small = np.uint32(f32_to_bits(bits_to_f32(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
    body = small if magnitude < np.uint32(0x38800000) else normal
    body = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else body
    body = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else body
    return np.uint16(sign | body)


def rounded_for(array, value):
    """`value` as `array` stores it: float32, or the bits of a half in a uint16 array. For kernels only."""
    raise NotImplementedError


def float32_run(array, start, count, scratch):
    """Address of `count` floats at flat index `start` of `array`: its own, or `scratch` with halves widened.

    For kernels only; array is C-contiguous float32 or uint16, scratch float32 (>= count,).
    """
    raise NotImplementedError


@overload(rounded_for)
def _rounded_for(array, value):
    if array.dtype == types.uint16:
        return lambda array, value: f32_to_half(value)
    return lambda array, value: value


@overload(float32_run)
def _float32_run(array, start, count, scratch):
    if array.dtype == types.uint16:

        def widened(array, start, count, scratch):
            flat = array.reshape(array.size)
            for i in range(count):
                scratch[i] = half_to_f32(flat[start + i])
            return np.intp(scratch.ctypes.data)

        return widened
    return lambda array, start, count, scratch: np.intp(array.ctypes.data) + start * 4
