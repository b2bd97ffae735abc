"""The searches of the K-quant encoders: scales, minimums and levels with the least weighted error.

Sixteen super-blocks go side by side, one a lane (`_lanes`), through the float32 operations of ggml's searches
in ggml's order; a branch of one of them is a `select` here, a loop that ends early goes on until it may end
in every lane. Their names in ggml:

    search_affine       make_qkx2_quants and make_qkx3_quants; search_affine_by_size with use_mad
    search_symmetric    make_qx_quants
    search_by_descent   make_q3_quants
    search_scales       make_qp_quants

Arrays are flat, row r of one is its elements 16 * r .. 16 * r + 15. Arguments in common:

    x        float32; rows first .. first + n - 1 are the n numbers of a sub-block of every lane
    weights  float32; rows 0 .. n - 1 say what the square of an error counts
    levels   float32 rows 0 .. n - 1, for the search's own use
    codes    int32; n // 4 rows from first // 4 on get the levels found, four a number, the first the low byte
"""

from __future__ import annotations

import numpy as np

from engine.kernels._jit import kernel, named_kernel
from engine.quants.encoders._lanes import (
    bits_of,
    bits_of_mask,
    load,
    magnitude,
    negative,
    select,
    splat,
    store,
    to_floats,
)

_ZERO, _ONE, _TENTH = np.float32(0.0), np.float32(1.0), np.float32(0.1)
_TINY = np.float32(1e-15)  # numbers below it are taken for zeros
_MAGIC = np.float32(
    12582912.0
)  # 1.5 * 2**23: a float32 added to it is rounded to an integer, in the last bits
_DESCENTS = 5


@kernel
def some(mask):
    """Whether the mask holds in any lane."""
    return bits_of_mask(mask) != np.uint16(0)


@kernel
def nearest(value):
    """Integers next to floats, ties to even, as ggml's nearest_int finds them.

    Right up to 4194303; beyond, and of NaN, the result has no meaning but is the reference's.
    """
    return (bits_of(value + splat(_MAGIC)) & splat(0x7FFFFF)) - splat(0x400000)


@kernel
def at_most(value, high):
    """The smaller of each integer and `high`."""
    bound = splat(high)
    return select(value < bound, value, bound)


@kernel
def clamped(value, low, high):
    """Integers cut to low .. high."""
    bound, capped = splat(low), at_most(value, high)
    return select(capped > bound, capped, bound)


@kernel
def low_byte(value):
    """What is left of integers in an unsigned byte."""
    return value & splat(255)


@kernel
def signed_byte(value):
    """What is left of integers in a signed byte."""
    return (value + splat(128) & splat(255)) - splat(128)


@kernel
def _square(value):
    return value * value


def _affine(x, weights, first, n, top, start, step, n_steps, levels, codes):
    """x = scale * level + lowest, with levels 0 .. top and lowest <= 0.

    The first scale spans the numbers; the others are least-squares fits to the levels that range / (top +
    start + k * step) gives, k = 0 .. n_steps, from the lowest found so far. Returns scale and -lowest.
    """
    zero, one = splat(_ZERO), splat(_ONE)
    v, w = load(x, 16 * first), load(weights, 0)
    low, high, sum_w, sum_x = v, v, w, w * v
    for i in range(1, n):
        v, w = load(x, 16 * (first + i)), load(weights, 16 * i)
        low, high = select(v < low, v, low), select(v > high, v, high)
        sum_w, sum_x = sum_w + w, sum_x + w * v
    low = select(low > zero, zero, low)
    varied = high > low

    inverse = splat(np.float32(top)) / (high - low)
    scale, error = one / inverse, zero
    for i in range(n):
        v = load(x, 16 * (first + i))
        level = to_floats(clamped(nearest(inverse * (v - low)), 0, top))
        error = error + load(weights, 16 * i) * _cost(scale * level + low - v)  # noqa: F821

    found_inverse, found_low = inverse, low
    for k in range(n_steps + 1):
        inverse = splat(start + step * np.float32(k) + np.float32(top)) / (high - low)
        sum_l, sum_ll, sum_xl = zero, zero, zero
        for i in range(n):
            v = load(x, 16 * (first + i))
            level = to_floats(clamped(nearest(inverse * (v - low)), 0, top))
            store(levels, 16 * i, level)
            weighted = load(weights, 16 * i) * level
            sum_l, sum_ll, sum_xl = sum_l + weighted, sum_ll + weighted * level, sum_xl + weighted * v
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = new_low > zero
        if some(above):
            new_scale, new_low = select(above, sum_xl / sum_ll, new_scale), select(above, zero, new_low)
        new_error = zero
        for i in range(n):
            residual = new_scale * load(levels, 16 * i) + new_low - load(x, 16 * (first + i))
            new_error = new_error + load(weights, 16 * i) * _cost(residual)  # noqa: F821
        better = (determinant > zero) & (new_error < error) & varied
        error, scale = select(better, new_error, error), select(better, new_scale, scale)
        found_inverse, found_low = select(better, inverse, found_inverse), select(better, low, found_low)
        low = select(better, new_low, low)

    found_inverse = select(varied, found_inverse, zero)
    for i in range(0, n, 4):
        four = splat(0)
        for j in range(4):
            v = load(x, 16 * (first + i + j))
            code = clamped(nearest(found_inverse * (v - found_low)), 0, top)
            four = four | code << splat(8 * j)
        store(codes, 4 * (first + i), four)
    return select(varied, scale, zero), negative(low)


search_affine = named_kernel(_affine, "search_affine", _cost=_square)
search_affine_by_size = named_kernel(_affine, "search_affine_by_size", _cost=magnitude)


@kernel
def _fitted(x, weights, first, n, top, inverse):
    """Sums of weight * x * level and weight * level^2 for x * inverse rounded to levels -top .. top - 1."""
    sum_xl, sum_ll = splat(_ZERO), splat(_ZERO)
    for i in range(n):
        v, w = load(x, 16 * (first + i)), load(weights, 16 * i)
        level = to_floats(clamped(nearest(inverse * v), -top, top - 1))
        sum_xl, sum_ll = sum_xl + w * v * level, sum_ll + w * level * level
    return sum_xl, sum_ll


@kernel
def farthest(x, first, n):
    """The number of the largest magnitude, the first of equals, and that magnitude."""
    peak, size = splat(_ZERO), splat(_ZERO)
    for i in range(n):
        v = load(x, 16 * (first + i))
        larger = magnitude(v) > size
        peak, size = select(larger, v, peak), select(larger, magnitude(v), size)
    return peak, size


@kernel
def search_symmetric(x, weights, first, n, top, codes):
    """x = scale * (level - top), with levels 0 .. 2 * top - 1: the best of 19 fits around the span.

    Returns scale. Where all numbers are below 1e-15, scale and levels are 0.
    """
    zero = splat(_ZERO)
    peak, size = farthest(x, first, n)
    blank = size < splat(_TINY)
    found = splat(-np.float32(top)) / peak
    sum_xl, sum_ll = _fitted(x, weights, first, n, top, found)
    scale = select(sum_ll == zero, zero, sum_xl / sum_ll)
    best = scale * sum_xl
    for k in range(-9, 10):
        if k == 0:
            continue
        inverse = splat(-(np.float32(top) + _TENTH * np.float32(k))) / peak
        sum_xl, sum_ll = _fitted(x, weights, first, n, top, inverse)
        better = (sum_ll > zero) & (sum_xl * sum_xl > best * sum_ll)
        scale = select(better, sum_xl / sum_ll, scale)
        best = select(better, scale * sum_xl, best)
        found = select(better, inverse, found)
    for i in range(0, n, 4):
        four = splat(0)
        for j in range(4):
            code = clamped(nearest(found * load(x, 16 * (first + i + j))), -top, top - 1) + splat(top)
            four = four | code << splat(8 * j)
        store(codes, 4 * (first + i), select(blank, splat(0), four))
    return select(blank, zero, scale)


@kernel
def _spanned(x, first, n, top, levels):
    """Levels of a sub-block for the scale that spans it, to rows first .. of `levels`, and their sums."""
    sum_xl, sum_ll = splat(_ZERO), splat(_ZERO)
    inverse = splat(-np.float32(top)) / farthest(x, first, n)[0]
    for at in range(16 * first, 16 * (first + n), 16):
        v = load(x, at)
        level = to_floats(clamped(nearest(inverse * v), -top, top - 1))
        store(levels, at, level)
        w = v * v
        sum_xl, sum_ll = sum_xl + w * v * level, sum_ll + w * level * level
    return sum_xl, sum_ll


@kernel
def _moved(x, row, top, levels, sum_xl, sum_ll):
    """Moves one level to where the others make it best. Returns the sums, and where it moved."""
    zero, v, level = splat(_ZERO), load(x, 16 * row), load(levels, 16 * row)
    w = v * v
    rest_xl, rest_ll = sum_xl - w * v * level, sum_ll - w * level * level
    new = to_floats(clamped(nearest(v * rest_ll / rest_xl), -top, top - 1))
    new_xl, new_ll = rest_xl + w * v * new, rest_ll + w * new * new
    better = (rest_xl > zero) & (new_ll > zero) & ((new < level) | (new > level))
    better = better & (new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll)
    store(levels, 16 * row, select(better, new, level))
    return select(better, new_xl, sum_xl), select(better, new_ll, sum_ll), better


@kernel
def _descended(x, first, n, top, levels, codes, sum_xl, sum_ll):
    """Writes the codes of a sub-block whose levels and sums are found. Returns scale."""
    blank = farthest(x, first, n)[1] < splat(_TINY)
    for row in range(first, first + n, 4):
        four = splat(0)
        for j in range(4):
            code = nearest(load(levels, 16 * (row + j))) + splat(top)
            four = four | code << splat(8 * j)
        store(codes, 4 * row, select(blank, splat(0), four))
    zero = splat(_ZERO)
    return select(blank | (sum_ll == zero), zero, sum_xl / sum_ll)


@kernel
def search_by_descent(x, first, n, top, levels, codes):
    """The same for the weights x^2, from the span on, one level after the other moved to where it is best.

    Five rounds at most. Takes two sub-blocks, the second from row first + n on: each move waits for the one
    before. `levels` has as many rows as x. Returns the two scales.
    """
    second = first + n
    xl_0, ll_0 = _spanned(x, first, n, top, levels)
    xl_1, ll_1 = _spanned(x, second, n, top, levels)
    for _ in range(_DESCENTS):
        moved = False
        for i in range(n):
            xl_0, ll_0, moved_0 = _moved(x, first + i, top, levels, xl_0, ll_0)
            xl_1, ll_1, moved_1 = _moved(x, second + i, top, levels, xl_1, ll_1)
            moved = moved or some(moved_0 | moved_1)
        if not moved:
            break
    scale = _descended(x, first, n, top, levels, codes, xl_0, ll_0)
    return scale, _descended(x, second, n, top, levels, codes, xl_1, ll_1)


@kernel
def search_scales(x, weights, n, top, codes):
    """x = scale * level, with levels 0 .. top, for x >= 0: the best of 9 spans, then descent. Returns scale.

    codes: int32; rows 0 .. n - 1 get a level each, as an unsigned byte holds it: a negative x, which the
    reference does not expect, may wrap around. Where no number reaches 1e-15, scale and levels are 0.
    """
    zero, one, full = splat(_ZERO), splat(_ONE), splat(np.float32(top))
    high = zero
    for i in range(n):
        v = load(x, 16 * i)
        high = select(high > v, high, v)
    blank = high < splat(_TINY)
    found = full / high
    scale, error = one / found, zero
    for i in range(n):
        v = load(x, 16 * i)
        residual = v - scale * to_floats(low_byte(nearest(found * v)))
        error = error + load(weights, 16 * i) * residual * residual
    for k in range(-4, 5):
        if k == 0:
            continue
        inverse = splat(_TENTH * np.float32(k) + np.float32(top)) / high
        scale, new_error = one / inverse, zero
        for i in range(n):
            v = load(x, 16 * i)
            residual = v - scale * to_floats(at_most(nearest(inverse * v), top))
            new_error = new_error + load(weights, 16 * i) * residual * residual
        better = new_error < error
        error, found = select(better, new_error, error), select(better, inverse, found)

    sum_xl, sum_ll = zero, zero
    for i in range(n):
        v, w = load(x, 16 * i), load(weights, 16 * i)
        code = at_most(nearest(found * v), top)
        store(codes, 16 * i, low_byte(code))
        level = to_floats(code)
        sum_xl, sum_ll = sum_xl + w * v * level, sum_ll + w * level * level
    for _ in range(_DESCENTS):
        moved = False
        for i in range(n):
            v, w, code = load(x, 16 * i), load(weights, 16 * i), load(codes, 16 * i)
            level = to_floats(code)
            rest_xl, rest_ll = sum_xl - w * v * level, sum_ll - w * level * level
            new_code = at_most(nearest(v * rest_ll / rest_xl), top)
            new = to_floats(new_code)
            new_xl, new_ll = rest_xl + w * v * new, rest_ll + w * new * new
            better = (rest_xl > zero) & (rest_ll > zero) & ((new < level) | (new > level))
            better = better & (new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll)
            store(codes, 16 * i, select(better, low_byte(new_code), code))
            sum_xl, sum_ll = select(better, new_xl, sum_xl), select(better, new_ll, sum_ll)
            moved = moved or some(better)
        if not moved:
            break
    for i in range(n):
        store(codes, 16 * i, select(blank, splat(0), load(codes, 16 * i)))
    return select(blank, zero, select(sum_ll > zero, sum_xl / sum_ll, zero))
