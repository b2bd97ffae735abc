"""The quantized types, each as the code that turns a block of sixteen rows into columns of a strip.

The layouts of the blocks stand in `legacy`, `k_quants` and `iq4`. Sixteen bytes of a row are four words, so
that one mask and one shift take a field out of four weights of sixteen rows. Weights are written unsigned: a
weight is scale * (q - offset), or scale * q + least for a type with minimums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engine.quants._strips import Strip, ints
from engine.quants.iq4 import _VALUES


class StripType(NamedTuple):
    """How a type is written, a unit of it in bytes and weights, and what the weights of a unit share."""

    write: Callable[[Strip], None]
    unit_bytes: int
    unit: int
    group: int  # weights that share a scale
    offset: int
    has_minimum: bool


def _nibbles(s: Strip, words, high: int):
    """The low or high nibble of every byte."""
    return [s.fields(four, 15, -4 * high) for four in words]


def _legacy(scale: int, minimum: int | None, quants: int, fifths: int | None):
    """Nibbles: weight i is low nibble i, weight 16 + i high nibble i; at `fifths` a word of fifth bits."""

    def write(s: Strip) -> None:
        d, least = (s.half(scale), None) if minimum is None else s.halves(s.word(scale))
        fifth = None if fifths is None else s.word(fifths)
        words = s.words(quants)
        for high in range(2):
            weights = _nibbles(s, words, high)
            if fifth is not None:
                bits = [s.bits_of(fifth, 16 * high + 4 * i, 16) for i in range(4)]
                weights = [s.builder.or_(*pair) for pair in zip(weights, bits, strict=True)]
            s.weights(16 * high, weights, d, least)

    return write


def _q8_0(s: Strip) -> None:
    d = s.half(0)
    for at in (0, 16):
        s.weights(at, [s.subtracted(four, 128) for four in s.words(2 + at)], d)


def _values(s: Strip, words, high: int):
    """What nibbles stand for in the IQ4 types, plus 128."""
    return [s.looked_up(four, [value + 128 for value in _VALUES]) for four in _nibbles(s, words, high)]


def _iq4_nl(s: Strip) -> None:
    d, words = s.half(0), s.words(2)
    for high in range(2):
        s.weights(16 * high, _values(s, words, high), d)


def _iq4_xs(s: Strip) -> None:
    b = s.builder
    first, low = s.word(0), s.word(4)  # d and scales_h; scales_l
    d = s.halves(first)[0]
    codes = [b.or_(s.field(low, 4 * k, 4), b.shl(s.field(first, 16 + 2 * k, 2), ints(4))) for k in range(8)]
    scales = s.keep([b.fmul(d, s.floats(b.sub(code, ints(32)))) for code in codes])
    with s.loop(8) as sub:
        part, scale = s.moved(s.times(sub, 16), s.times(sub, 32)), s.kept(scales, sub)
        words = part.words(8)
        for high in range(2):
            part.weights(16 * high, _values(s, words, high), scale)


def _scaled(s: Strip, d, words, signed: bool = False):
    """d times each of the small integers that words hold, four in each lane."""
    cut = s.signed if signed else s.field
    return [s.builder.fmul(d, s.floats(cut(four, 8 * k, 8))) for four in words for k in range(4)]


def _negative(s: Strip, vectors):
    return [s.builder.fneg(vector) for vector in vectors]


def _place(s: Strip, group):
    """Of 16 of the 64 bytes of bit pairs: half of the block, half of that half, first sub-block."""
    b = s.builder
    half, odd = b.lshr(group, s.number(1)), b.and_(group, s.number(1))
    return half, odd, b.add(s.times(half, 8), odd)


def _q2_k(s: Strip) -> None:
    d, dmin = s.halves(s.word(80))
    codes = s.words(0)
    scales = s.keep(_scaled(s, d, _nibbles(s, codes, 0)))
    least = s.keep(_negative(s, _scaled(s, dmin, _nibbles(s, codes, 1))))
    with s.loop(4) as group:
        _, _, sub = _place(s, group)
        part = s.moved(s.times(group, 16), s.times(sub, 16))
        words = part.words(16)
        for j in range(4):
            weights = [s.fields(four, 3, -2 * j) for four in words]
            at = s.times(sub, 1, 2 * j)
            part.weights(32 * j, weights, s.kept(scales, at), s.kept(least, at))


def _q3_k(s: Strip) -> None:
    b = s.builder
    d = s.half(108)
    low, high = (s.word(96), s.word(100)), s.word(104)
    nibbles = [s.fields(low[k % 2], 15, -(k // 2) * 4) for k in range(4)]
    codes = [b.or_(nibble, s.fields(high, 48, 4 - 2 * k)) for k, nibble in enumerate(nibbles)]
    scales = s.keep(_scaled(s, d, [s.subtracted(four, 32) for four in codes], signed=True))
    with s.loop(4) as group:
        half, odd, sub = _place(s, group)
        part = s.moved(s.times(group, 16), s.times(sub, 16))
        words = part.words(32)
        masks = [s.right(four, s.times(half, 4)) for four in s.moved(s.times(odd, 16)).words(0)]
        for j in range(4):
            pairs = zip(words, masks, strict=True)
            weights = [b.or_(s.fields(q, 3, -2 * j), s.fields(mask, 4, 2 - j)) for q, mask in pairs]
            part.weights(32 * j, weights, s.kept(scales, s.times(sub, 1, 2 * j)))


def _k4_scales(s: Strip):
    """Places of the scales and of the minimums of Q4_K and Q5_K, which begin alike."""
    b = s.builder
    d, dmin = s.halves(s.word(0))
    scales, least, last, _ = s.words(4)
    upper = [
        b.or_(s.fields(last, 15, -4 * k), s.fields(four, 48, -2)) for k, four in enumerate((scales, least))
    ]
    all_scales = _scaled(s, d, [s.fields(scales, 63), upper[0]])
    return s.keep(all_scales), s.keep(_negative(s, _scaled(s, dmin, [s.fields(least, 63), upper[1]])))


def _q4_k(s: Strip) -> None:
    scales, least = _k4_scales(s)
    with s.loop(4) as run:
        part = s.moved(s.times(run, 32), s.times(run, 64))
        for at in (0, 16):
            words = part.words(16 + at)
            for high in range(2):
                sub = s.times(run, 2, high)
                part.weights(
                    32 * high + at, _nibbles(s, words, high), s.kept(scales, sub), s.kept(least, sub)
                )


def _q5_k(s: Strip) -> None:
    scales, least = _k4_scales(s)
    with s.loop(4) as run:
        part = s.moved(s.times(run, 32), s.times(run, 64))
        for at in (0, 16):
            words = part.words(48 + at)
            fifths = [s.right(four, s.times(run, 2)) for four in s.words(16 + at)]
            for high in range(2):
                sub = s.times(run, 2, high)
                pairs = zip(_nibbles(s, words, high), fifths, strict=True)
                weights = [s.builder.or_(q, s.fields(fifth, 16, 4 - high)) for q, fifth in pairs]
                part.weights(32 * high + at, weights, s.kept(scales, sub), s.kept(least, sub))


def _q6_k(s: Strip) -> None:
    d = s.half(208)
    scales = s.keep(_scaled(s, d, s.words(192), signed=True))
    with s.loop(4) as group:
        half, odd, sub = _place(s, group)
        part = s.moved(s.builder.add(s.times(half, 64), s.times(odd, 16)), s.times(sub, 16))
        lows, highs = (part.words(0), part.words(32)), s.moved(s.times(group, 16)).words(128)
        for j in range(4):
            pairs = zip(_nibbles(s, lows[j % 2], j // 2), highs, strict=True)
            weights = [s.builder.or_(q, s.fields(high, 48, 4 - 2 * j)) for q, high in pairs]
            part.weights(32 * j, weights, s.kept(scales, s.times(sub, 1, 2 * j)))


TYPES = {
    "Q4_0": StripType(_legacy(0, None, 2, None), 18, 32, 32, 8, False),
    "Q4_1": StripType(_legacy(0, 2, 4, None), 20, 32, 32, 0, True),
    "Q5_0": StripType(_legacy(0, None, 6, 2), 22, 32, 32, 16, False),
    "Q5_1": StripType(_legacy(0, 2, 8, 4), 24, 32, 32, 0, True),
    "Q8_0": StripType(_q8_0, 34, 32, 32, 128, False),
    "IQ4_NL": StripType(_iq4_nl, 18, 32, 32, 128, False),
    "Q2_K": StripType(_q2_k, 84, 256, 16, 0, True),
    "Q3_K": StripType(_q3_k, 110, 256, 16, 4, False),
    "Q4_K": StripType(_q4_k, 144, 256, 32, 0, True),
    "Q5_K": StripType(_q5_k, 176, 256, 32, 0, True),
    "Q6_K": StripType(_q6_k, 210, 256, 16, 32, False),
    "IQ4_XS": StripType(_iq4_xs, 136, 256, 32, 128, False),
}
