"""Scalar intrinsics that LLVM's vectorizer understands, for use inside kernels.

Written with bit casts and explicit fused multiply-adds so that the result is the same on every CPU and at
every vector width; LLVM turns a loop of them into vector code.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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


@kernel
def half_to_f32(half):
    """float32 of an IEEE half given as its uint16 bits; exact, subnormal numbers, infinities and NaN too."""
    # Numba widens uint32 arithmetic to 64 bits unless each step is cast back: 2.7 times slower (Zen 4,
    # 2026-11)
    bits = np.uint32(half)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    finite = f32_to_bits(
        bits_to_f32(magnitude) * np.float32(2.0**112)
    )  # moves the exponent's bias from 15 to 127
    special = np.uint32(magnitude | np.uint32(0x7F800000))
    body = special if magnitude >= np.uint32(0x0F800000) else finite
    return bits_to_f32(np.uint32(body | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))))
