"""Encoders of Q2_K, Q3_K, Q4_K, Q5_K and Q6_K: super-blocks of 256. Layouts: `engine.quants.k_quants`.

Every type goes three steps: a search for each sub-block (`k_search`); whole numbers for the scales found,
which give new effective scales; the levels once more, each weight rounded by those. Where an effective scale
is 0, the levels of the search stay.

           search of a sub-block              scale per super-block      with weights, what differs
    Q2_K   affine, |error| counts |x|         largest / 15               squares; scales are searched
    Q3_K   descent                            largest in size / -32      symmetric; scales are searched
    Q4_K   affine, error^2 counts rms + |x|   largest / 63               scales are searched
    Q5_K   affine, error^2 counts rms + |x|   largest / 63               scales are searched
    Q6_K   symmetric, error^2 counts x^2      largest in size / -128     error^2 counts the weight

With weights an error's square counts weight * root(s + x^2) but in Q6_K, where s is the mean square of the
super-block in Q2_K and twice that in the others.

Sixteen super-blocks go side by side, in whatever rows they lie; the last ones are filled up with zeros. The
bytes are those of ggml's quantize_row_q?_K_ref and quantize_q?_K, as the `libgguf` package computes them.
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel, named_kernel
from engine.quants.encoders._lanes import (
    load,
    magnitude,
    select,
    splat,
    square_root,
    store,
    to_floats,
    transpose,
)
from engine.quants.encoders.k_parts import (
    as_half,
    four_bytes,
    gather,
    new_work,
    pack_nibbles,
    pack_pairs,
    round_affine,
    round_symmetric,
    span_scales,
    sum_of_squares,
    weigh,
)
from engine.quants.encoders.k_search import (
    at_most,
    clamped,
    farthest,
    low_byte,
    nearest,
    search_affine,
    search_affine_by_size,
    search_by_descent,
    search_scales,
    search_symmetric,
    signed_byte,
)

_F32 = np.float32
_ZERO, _ONE, _TWO = _F32(0.0), _F32(1.0), _F32(2.0)
_TINY = _F32(1e-15)  # a super-block of Q6_K whose scales all lie below is a block of zero bytes


# from work.x and work.importance to work.words, the blocks of sixteen lanes as 32-bit words


@kernel
def _q2_k(work, is_weighted):
    spread = splat(_ZERO)
    if is_weighted:
        spread = sum_of_squares(work.x, 0, 256) / splat(_F32(256))
    for sub in range(16):
        first = 16 * sub
        if is_weighted:
            weigh(work, sub, 16, spread)
            scale, low = search_affine(
                work.x, work.weights, first, 16, 3, _F32(-0.9), _F32(0.05), 36, work.levels, work.codes
            )
        else:
            for i in range(16):
                store(work.weights, 16 * i, magnitude(load(work.x, 16 * (first + i))))
            scale, low = search_affine_by_size(
                work.x, work.weights, first, 16, 3, _F32(-0.5), _F32(0.1), 15, work.levels, work.codes
            )
        store(work.scales, first, scale)
        store(work.mins, first, low)

    if is_weighted:
        d = search_scales(work.scales, work.sums, 16, 15, work.scale_codes)
        dmin = search_scales(work.mins, work.sums, 16, 15, work.min_codes)
    else:
        d = span_scales(work.scales, 16, 15, work.scale_codes)
        dmin = span_scales(work.mins, 16, 15, work.min_codes)
    for at in range(0, 256, 16):  # a byte of both; a scale that is no number of four bits spills over
        both = low_byte(load(work.scale_codes, at) | load(work.min_codes, at) << splat(4))
        store(work.scale_codes, at, both)
    for k in range(4):
        store(work.words, 16 * k, four_bytes(work.scale_codes, 4 * k))
    d_bits, d = as_half(d, work.scales, work.min_codes)
    dmin_bits, dmin = as_half(dmin, work.scales, work.min_codes)
    store(work.words, 16 * 20, d_bits | dmin_bits << splat(16))
    for sub in range(16):
        both = load(work.scale_codes, 16 * sub)
        scale, low = to_floats(both & splat(15)), to_floats(both >> splat(4))
        round_affine(work, sub, 16, d * scale, dmin * low, 3)
    pack_pairs(work.codes, work.words, 4)


@kernel
def _put_scales_q3_k(work):
    """Scales, 0 .. 63 in `scale_codes`, to words 24 .. 26."""
    for k in range(2):
        low = four_bytes(work.scale_codes, 4 * k) & splat(0x0F0F0F0F)
        high = four_bytes(work.scale_codes, 4 * k + 8) & splat(0x0F0F0F0F)
        store(work.words, 16 * (24 + k), low | high << splat(4))
    top = splat(0)
    for k in range(4):
        pairs = four_bytes(work.scale_codes, 4 * k) >> splat(4) & splat(0x03030303)
        top = top | pairs << splat(2 * k)
    store(work.words, 16 * 26, top)


@kernel
def _q3_k(work, is_weighted):
    zero = splat(_ZERO)
    if is_weighted:
        spread = splat(_TWO) * sum_of_squares(work.x, 0, 256) / splat(_F32(256))
        for sub in range(16):
            weigh(work, sub, 16, spread)
            scale = search_symmetric(work.x, work.weights, 16 * sub, 16, 4, work.codes)
            store(work.scales, 16 * sub, scale)
    else:
        for sub in range(0, 16, 2):
            scales = search_by_descent(work.x, 16 * sub, 16, 4, work.levels, work.codes)
            store(work.scales, 16 * sub, scales[0])
            store(work.scales, 16 * sub + 16, scales[1])

    if is_weighted:
        d = search_symmetric(work.scales, work.sums, 0, 16, 32, work.min_codes)
        for sub in range(16):
            code = load(work.min_codes, 16 * (sub >> 2)) >> splat(8 * (sub & 3)) & splat(63)
            store(work.scale_codes, 16 * sub, code)
    else:
        peak = farthest(work.scales, 0, 16)[0]
        inverse = splat(_F32(-32)) / peak
        blank = peak == zero
        d = select(blank, zero, splat(_ONE) / inverse)
        for sub in range(16):
            code = signed_byte(nearest(inverse * load(work.scales, 16 * sub)))
            code = clamped(code, -32, 31) + splat(32)
            store(work.scale_codes, 16 * sub, select(blank, splat(0), code))
    _put_scales_q3_k(work)
    bits, d = as_half(d, work.scales, work.min_codes)
    store(work.words, 16 * 27, bits)
    for sub in range(16):
        scale = to_floats(load(work.scale_codes, 16 * sub) - splat(32))
        round_symmetric(work, sub, d * scale, 4)
    for k in range(8):
        mask = splat(0)
        for bit in range(8):
            upper = load(work.codes, 16 * (8 * bit + k)) >> splat(2) & splat(0x01010101)
            mask = mask | upper << splat(bit)
        store(work.words, 16 * k, mask)
    pack_pairs(work.codes, work.words, 8)


@kernel
def _affine_of_32(work, is_weighted, top, start, n_steps):
    """The common part of Q4_K and Q5_K: levels 0 .. top in `codes`, words 0 .. 3 with d, dmin and scales."""
    spread, step = splat(_ZERO), _F32(0.1)
    if is_weighted:
        spread = splat(_TWO) * sum_of_squares(work.x, 0, 256) / splat(_F32(256))
        start, step, n_steps = _F32(-0.9), _F32(0.05), 36
    for sub in range(8):
        if is_weighted:
            weigh(work, sub, 32, spread)
        else:
            mean = square_root(sum_of_squares(work.x, 32 * sub, 32) / splat(_F32(32)))
            for i in range(32):
                store(work.weights, 16 * i, mean + magnitude(load(work.x, 16 * (32 * sub + i))))
        scale, low = search_affine(
            work.x, work.weights, 32 * sub, 32, top, start, step, n_steps, work.levels, work.codes
        )
        store(work.scales, 16 * sub, scale)
        store(work.mins, 16 * sub, low)

    if is_weighted:
        d = search_scales(work.scales, work.sums, 8, 63, work.scale_codes)
        dmin = search_scales(work.mins, work.sums, 8, 63, work.min_codes)
    else:
        d = span_scales(work.scales, 8, 63, work.scale_codes)
        dmin = span_scales(work.mins, 8, 63, work.min_codes)
    # A negative scale is a byte above 63: cut, but with weights in Q4_K its upper bits spill over.
    if top == 31 or not is_weighted:
        for at in range(0, 128, 16):
            store(work.scale_codes, at, at_most(low_byte(load(work.scale_codes, at)), 63))
            store(work.min_codes, at, at_most(low_byte(load(work.min_codes, at)), 63))

    mask, upper = splat(0x0F0F0F0F), splat(0x03030303)
    s0, s1 = four_bytes(work.scale_codes, 0), four_bytes(work.scale_codes, 4)
    m0, m1 = four_bytes(work.min_codes, 0), four_bytes(work.min_codes, 4)
    a, b = s0 | (s1 >> splat(4) & upper) << splat(6), m0 | (m1 >> splat(4) & upper) << splat(6)
    c = s1 & mask | (m1 & mask) << splat(4)
    store(work.words, 16, a)
    store(work.words, 32, b)
    store(work.words, 48, c)
    d_bits, d = as_half(d, work.scales, work.min_codes)
    dmin_bits, dmin = as_half(dmin, work.scales, work.min_codes)
    store(work.words, 0, d_bits | dmin_bits << splat(16))
    scales_0, mins_0 = a & splat(0x3F3F3F3F), b & splat(0x3F3F3F3F)
    scales_1 = c & mask | (a >> splat(6) & upper) << splat(4)
    mins_1 = c >> splat(4) & mask | (b >> splat(6) & upper) << splat(4)
    for sub in range(8):
        of_sub = splat(8 * (sub & 3))
        scale = low_byte((scales_0 if sub < 4 else scales_1) >> of_sub)
        low = low_byte((mins_0 if sub < 4 else mins_1) >> of_sub)
        round_affine(work, sub, 32, d * to_floats(scale), dmin * to_floats(low), top)


@kernel
def _q4_k(work, is_weighted):
    _affine_of_32(work, is_weighted, 15, _F32(-1.0), 20)
    pack_nibbles(work.codes, work.words, 4)


@kernel
def _q5_k(work, is_weighted):
    _affine_of_32(work, is_weighted, 31, _F32(-0.5), 15)
    for k in range(8):
        high = splat(0)
        for sub in range(8):
            bits = load(work.codes, 16 * (8 * sub + k)) >> splat(4) & splat(0x01010101)
            high = high | bits << splat(sub)
        store(work.words, 16 * (4 + k), high)
    pack_nibbles(work.codes, work.words, 12)


@kernel
def _q6_k(work, is_weighted):
    zero, none = splat(_ZERO), splat(0)
    for sub in range(16):
        for i in range(16):
            v = load(work.x, 16 * (16 * sub + i))
            w = load(work.importance, 16 * (16 * sub + i)) if is_weighted else v * v
            store(work.weights, 16 * i, w)
        store(work.scales, 16 * sub, search_symmetric(work.x, work.weights, 16 * sub, 16, 32, work.codes))

    peak, size = farthest(work.scales, 0, 16)
    blank = size < splat(_TINY)
    inverse = splat(_F32(-128)) / peak
    for sub in range(16):
        code = signed_byte(at_most(nearest(inverse * load(work.scales, 16 * sub)), 127))
        store(work.scale_codes, 16 * sub, select(blank, none, code))
    for k in range(4):
        store(work.words, 16 * (48 + k), four_bytes(work.scale_codes, 4 * k))
    bits, d = as_half(select(blank, zero, splat(_ONE) / inverse), work.scales, work.min_codes)
    store(work.words, 16 * 52, bits)
    for sub in range(16):
        round_symmetric(work, sub, d * to_floats(load(work.scale_codes, 16 * sub)), 32)

    mask, upper = select(blank, none, splat(0x0F0F0F0F)), select(blank, none, splat(0x03030303))
    for k in range(16):  # 16 words of a half: 8 for weights 0 .. 31 and 64 .. 95, 8 for the others
        at = 16 * (k + 24 * (k >> 3))
        c0, c1 = load(work.codes, at), load(work.codes, at + 128)
        c2, c3 = load(work.codes, at + 256), load(work.codes, at + 384)
        to = 16 * (k + 8 * (k >> 3))
        store(work.words, to, c0 & mask | (c2 & mask) << splat(4))
        store(work.words, to + 128, c1 & mask | (c3 & mask) << splat(4))
        low = c0 >> splat(4) & upper | (c1 >> splat(4) & upper) << splat(2)
        high = c2 >> splat(4) & upper | (c3 >> splat(4) & upper) << splat(2)
        store(work.words, 16 * (32 + k), low | high << splat(4))


def _encode(values, weights, out):
    """`engine.quants.encoders`' signature; _fill_words is the type's function above."""
    n_blocks, per_row, is_weighted = values.size // 256, values.shape[1] // 256, weights.size > 0
    x, to = values.reshape(values.size), out.reshape(out.size)
    size = out.size // n_blocks if n_blocks else 0
    work, starts = new_work(), np.empty(16, np.int64)
    part_words = np.empty(16 * 16, np.int32)
    part_bytes = part_words.view(np.uint8)
    for block in range(0, n_blocks, 16):
        count = min(16, n_blocks - block)
        for lane in range(16):
            starts[lane] = 256 * (block + lane)
        gather(work, x, starts, count, work.x)
        if is_weighted:
            for lane in range(16):
                starts[lane] = 256 * ((block + lane) % per_row)
            gather(work, weights, starts, count, work.importance)
        _fill_words(work, is_weighted)  # noqa: F821
        for part in range(0, size, 64):  # sixteen words of each lane
            transpose(work.words, 4 * part, 16, part_words, 0)
            for lane in range(count):
                at = (block + lane) * size + part
                for i in range(min(64, size - part)):
                    to[at + i] = part_bytes[64 * lane + i]


encode_q2_k = named_kernel(_encode, "encode_q2_k", _fill_words=_q2_k)
encode_q3_k = named_kernel(_encode, "encode_q3_k", _fill_words=_q3_k)
encode_q4_k = named_kernel(_encode, "encode_q4_k", _fill_words=_q4_k)
encode_q5_k = named_kernel(_encode, "encode_q5_k", _fill_words=_q5_k)
encode_q6_k = named_kernel(_encode, "encode_q6_k", _fill_words=_q6_k)
