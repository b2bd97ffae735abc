"""Encoders of the types that are not quantized: F32, F16 and BF16. Layouts: `engine.quants.floats`.

A number becomes the nearest that the type has, ties to even; one beyond the largest half becomes infinite.
Both references agree. All encoders share one signature, described in `engine.quants.encoders`; the weights
count for nothing here.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel
from engine.kernels.simd import f32_to_bits, f32_to_half


@kernel
def encode_f32(values, weights, out):
    """Copies float32."""
    numbers, words = values.reshape(values.size), out.reshape(out.size).view(np.uint32)
    for i in range(numbers.size):
        words[np.uintp(i)] = f32_to_bits(numbers[np.uintp(i)])


@kernel
def encode_f16(values, weights, out):
    """float32 to IEEE half."""
    numbers, halves = values.reshape(values.size), out.reshape(out.size).view(np.uint16)
    for i in range(numbers.size):
        halves[np.uintp(i)] = f32_to_half(numbers[np.uintp(i)])


@kernel
def encode_bf16(values, weights, out):
    """float32 to bfloat16."""
    numbers, halves = values.reshape(values.size), out.reshape(out.size).view(np.uint16)
    for i in range(numbers.size):
        bits = f32_to_bits(numbers[np.uintp(i)])
        odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        halves[np.uintp(i)] = np.uint16(np.uint32(bits + np.uint32(odd + np.uint32(0x7FFF))) >> np.uint32(16))
