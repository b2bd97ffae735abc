"""Encoder of MXFP4: 32 numbers of 4 bits under a power of two. Layout: `engine.quants.fp4`.

The scale's exponent is that of the largest |x|, less 2 for the largest code's. The reference takes it from a
float32 logarithm, which rounds: the farther from 1, the more numbers (up to 88) just below a power of two
count as that power. A code is the nearest value, of two the smaller; what is nearest to zero is +0. An
exponent that is too small for its field, of a largest |x| under 2^-125, wraps around: a scale so large that
every code is 0. Bytes are libgguf's, and `gguf`'s too.
"""

from __future__ import annotations

from math import log2

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import bits_to_f32, f32_to_bits
from engine.quants.encoders._blocks import lower, upper
from engine.quants.encoders._lanes import bits_of, largest_of, load, magnitude, select, splat, steps_of, store

# Halves of the middles between values. A number on one has the smaller code, so the next float32 is meant.
_HALVES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
_MIDDLES = np.nextafter(_HALVES, np.float32(9)).tolist()
_code_near = steps_of(_MIDDLES, list(range(8)))


@kernel
def _exponent(size):
    """Whole part of the float32 logarithm, base 2, of a positive float32."""
    bits = f32_to_bits(size)
    near_the_next = np.uint32(bits & np.uint32(0x007FFFFF)) >= np.uint32(0x007FFF00)
    if near_the_next or bits < np.uint32(0x00800000):
        return np.int32(np.floor(np.float32(log2(np.float64(size)))))
    return np.int32(bits >> np.uint32(23)) - np.int32(127)


@kernel
def _codes(x, factor, most):
    """Codes of 16 numbers times `factor`, which are half the values; sizes above code `most` get that."""
    zero = splat(np.int32(0))
    code = lower(_code_near(magnitude(x) * factor), most)
    sign = select(bits_of(x) < zero, splat(np.int32(8)), zero)
    return select(code > zero, code | sign, zero)


@kernel
def encode_mxfp4(values, weights, out):
    """MXFP4; the weights count for nothing."""
    x, to = values.reshape(values.size), out.reshape(out.size)
    for block in range(x.size // 32):
        low, high, at = load(x, 32 * block), load(x, 32 * block + 16), 17 * block
        size = largest_of(upper(magnitude(low), magnitude(high)))
        e = np.uint8(_exponent(size) + 125) if size > np.float32(0) else np.uint8(0)
        # 2^(127 - e), or 2^-126 where the exponent has wrapped around
        factor = splat(bits_to_f32(np.uint32(max(254 - np.int32(e), 1) << 23)))
        # Under the scale that the last 88 numbers of all get, the two largest values are infinite.
        most = splat(np.int32(5 if e == 253 else 7))
        to[np.uintp(at)] = e
        store(to, at + 1, _codes(low, factor, most) | _codes(high, factor, most) << splat(np.int32(4)))
