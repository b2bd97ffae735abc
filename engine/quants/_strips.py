"""Decoding straight into strips: sixteen rows of a weight side by side, as the register tiles read them.

Blocks of sixteen rows are loaded as they lie in the file, four bytes of each row become one vector of 32-bit
lanes (a transposition in registers), and every field is cut out of all sixteen rows at once, four weights of
a row at a time: a lane holds them as four bytes. Nothing is decoded row by row and turned afterwards.

What is written is up to the subclass: `FloatStrip` widens the bytes, one vector of float32 a column;
`engine.quants.strips8` keeps them. A type is described once, as a function of a `Strip` (`_strip_types`).

Written as LLVM vectors of sixteen lanes, which every CPU runs as its registers allow, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.tile import STRIP
from engine.machine import cpu_features

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(F32, STRIP), ir.VectorType(I32, STRIP)
SHORTS, BYTES = ir.VectorType(I16, STRIP), ir.VectorType(I8, 4 * STRIP)


def ints(value: int) -> ir.Constant:
    """STRIP times a 32-bit integer."""
    return ir.Constant(INTS, [I32(value)] * STRIP)


def numbers(value: float) -> ir.Constant:
    """STRIP times a float32."""
    return ir.Constant(FLOATS, [F32(value)] * STRIP)


def octets(values: Sequence[int]) -> ir.Constant:
    """Bytes, repeated to fill a vector."""
    return ir.Constant(BYTES, [I8(value & 255) for value in values] * (BYTES.count // len(values)))


def shuffled(builder, a, b, lanes):
    """The lanes of `a`, then those of `b`, by number."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)


class Strip:
    """Writes LLVM code that turns one unit (a block of every row) into columns of a strip.

    `builder` is LLVM's, for what the methods do not offer. A vector has a lane for each of the rows; `words`
    are lanes of 32 bits that hold four bytes of a row, often four weights side by side. `offset` is what the
    type subtracts from its unsigned weights.
    """

    def __init__(self, builder, block, stride, out, offset: int) -> None:
        self.builder, self.offset = builder, offset
        self._block, self._stride, self._out = block, stride, out  # of row 0, bytes to the next row, target

    # ---- bytes of the rows

    def _load(self, row, offset, kind):
        # groups of four rows: the addresses of a unit need few registers this way
        b = self.builder
        group = b.gep(self._block, [b.mul(self._stride, I64(row // 4 * 4))])
        pointer = b.gep(b.gep(group, [b.mul(self._stride, I64(row % 4))]), [I64(offset)])
        value = b.load(b.bitcast(pointer, kind.as_pointer()))
        value.align = 1
        return value

    def _gather(self, offset, element):
        """A scalar of each row."""
        vector = ir.Constant(ir.VectorType(element, STRIP), ir.Undefined)
        for row in range(STRIP):
            vector = self.builder.insert_element(vector, self._load(row, offset, element), I32(row))
        return vector

    def word(self, offset: int):
        """The four bytes at `offset`."""
        return self._gather(offset, I32)

    def words(self, offset: int):
        """The sixteen bytes at `offset` as four vectors."""
        rows = [self._load(row, offset, ir.VectorType(I32, 4)) for row in range(STRIP)]
        b = self.builder
        quarters = []  # quarter i holds rows i, i + 4, i + 8, i + 12 in its four groups of four lanes
        for i in range(4):
            low, high = (shuffled(b, rows[i + j], rows[i + j + 4], range(8)) for j in (0, 8))
            quarters.append(shuffled(b, low, high, range(16)))

        def paired(a, c, pattern):
            return shuffled(
                b,
                a,
                c,
                [4 * g + lane if lane < 4 else 12 + 4 * g + lane for g in range(4) for lane in pattern],
            )

        first, second = quarters[:2], quarters[2:]
        halves = [
            (paired(*first, pattern), paired(*second, pattern)) for pattern in ((0, 4, 1, 5), (2, 6, 3, 7))
        ]
        return [paired(*pair, pattern) for pair in halves for pattern in ((0, 1, 4, 5), (2, 3, 6, 7))]

    def half(self, offset: int):
        """float32 of the IEEE half at `offset`."""
        return self.widened(self._gather(offset, I16))

    # ---- arithmetic

    def widened(self, halves):
        """float32 of sixteen IEEE halves given as 16-bit lanes; exact."""
        b = self.builder
        if "f16c" in cpu_features():
            return b.fpext(b.bitcast(halves, ir.VectorType(ir.HalfType(), STRIP)), FLOATS)
        bits = b.zext(halves, INTS)  # as engine.kernels.simd.half_to_f32
        magnitude = b.shl(b.and_(bits, ints(0x7FFF)), ints(13))
        finite = b.bitcast(b.fmul(b.bitcast(magnitude, FLOATS), numbers(2.0**112)), INTS)
        special = b.or_(magnitude, ints(0x7F800000))
        body = b.select(b.icmp_unsigned(">=", magnitude, ints(0x0F800000)), special, finite)
        return b.bitcast(b.or_(body, b.shl(b.and_(bits, ints(0x8000)), ints(16))), FLOATS)

    def halves(self, words):
        """float32 of the two halves in each lane."""
        return [self.widened(self.builder.trunc(self.field(words, at, 16), SHORTS)) for at in (0, 16)]

    def field(self, words, first: int, width: int):
        """Bits [first, first + width) of each lane, unsigned, as int32 lanes."""
        b = self.builder
        shifted = b.lshr(words, ints(first)) if first else words
        return b.and_(shifted, ints((1 << width) - 1)) if first + width < 32 else shifted

    def signed(self, words, first: int, width: int):
        """The same, sign-extended."""
        b = self.builder
        above = 32 - first - width
        return b.ashr(b.shl(words, ints(above)) if above else words, ints(32 - width))

    def floats(self, lanes):
        """float32 of int32 lanes."""
        return self.builder.sitofp(lanes, FLOATS)

    def fields(self, words, mask: int, shift: int = 0):
        """Every byte moved up by `shift` bits, or down for a negative one, then cut to the bits `mask`."""
        b = self.builder
        if shift:
            words = b.shl(words, ints(shift)) if shift > 0 else b.lshr(words, ints(-shift))
        return b.and_(words, ints(mask * 0x01010101))

    def right(self, words, bits):
        """Lanes moved down by a number that the code finds, 64 bits."""
        b, undef = self.builder, ir.Constant(INTS, ir.Undefined)
        lane = b.insert_element(undef, b.trunc(bits, I32), I32(0))
        return b.lshr(words, shuffled(b, lane, undef, [0] * STRIP))

    def subtracted(self, words, offset: int):
        """Every byte less `offset`, modulo 256."""
        b = self.builder
        return b.bitcast(b.sub(b.bitcast(words, BYTES), octets([offset])), INTS) if offset else words

    def bits_of(self, word, first: int, value: int):
        """Bits first .. first + 3 of each lane, one for each byte, which becomes `value` or 0.

        `first` is a multiple of four.
        """
        b = self.builder
        source = [4 * lane + first // 8 for lane in range(STRIP) for _ in range(4)]
        spread = shuffled(b, b.bitcast(word, BYTES), ir.Constant(BYTES, ir.Undefined), source)
        single = b.and_(spread, octets([1 << first % 8 + k for k in range(4)]))
        zero = octets([0])
        return b.bitcast(b.select(b.icmp_unsigned("!=", single, zero), octets([value]), zero), INTS)

    def looked_up(self, words, table: Sequence[int]):
        """The entry of a table of sixteen for every byte, which is 0..15."""
        b = self.builder
        return b.bitcast(_table_shuffle(b, b.bitcast(words, BYTES), table), INTS)

    # ---- code that is written once and runs for several parts of a unit

    @contextmanager
    def loop(self, count: int) -> Iterator[ir.Value]:
        """The code of the `with` block runs `count` times; gives the number of the turn, 64 bits."""
        b = self.builder
        before = b.block
        body, done = b.append_basic_block("part"), b.append_basic_block("parts")
        b.branch(body)
        b.position_at_end(body)
        turn = b.phi(I64)
        turn.add_incoming(I64(0), before)
        yield turn
        following = b.add(turn, I64(1))
        turn.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, I64(count)), body, done)
        b.position_at_end(done)

    def moved(self, n_bytes, n_columns=0) -> Strip:
        """The same unit, with offsets and columns counted from here; both may be values of the code."""
        b, part = self.builder, copy(self)
        part._block = b.gep(self._block, [n_bytes if isinstance(n_bytes, ir.Value) else I64(n_bytes)])
        part._out = b.gep(self._out, [self._floats_before(n_columns)])
        return part

    def keep(self, vectors: Sequence[ir.Value]):
        """Puts float vectors where a loop finds them by number: see `kept`."""
        place = cgutils.alloca_once(self.builder, FLOATS, size=len(vectors))
        for k, vector in enumerate(vectors):
            self.builder.store(vector, self.builder.gep(place, [I64(k)]))
        return place

    def kept(self, place, number):
        """A vector that was put there."""
        return self.builder.load(self.builder.gep(place, [number]))

    def number(self, value: int):
        """A 64-bit constant."""
        return I64(value)

    def times(self, turn, factor: int, more: int = 0):
        """turn * factor + more."""
        return self.builder.add(self.builder.mul(turn, I64(factor)), I64(more))

    # ---- what a subclass writes

    def _floats_before(self, n_columns):
        raise NotImplementedError

    def weights(self, column: int, words: Sequence[ir.Value], scale, least=None) -> None:
        """Four weights of each row a word, unsigned: scale * (weight - offset), or scale * weight + least."""
        raise NotImplementedError


class FloatStrip(Strip):
    """A strip of (columns, STRIP) float32.

    The numbers are those of the decoders to the bit: products of integers and a half are exact, so that one
    fused multiply-add rounds where the decoder's addition does.
    """

    def _floats_before(self, n_columns):
        return (
            self.builder.mul(n_columns, I64(STRIP))
            if isinstance(n_columns, ir.Value)
            else I64(n_columns * STRIP)
        )

    def put(self, column: int, values) -> None:
        """The float32 values of a column of the unit."""
        pointer = self.builder.gep(self._out, [I64(column * STRIP)])
        self.builder.store(values, self.builder.bitcast(pointer, FLOATS.as_pointer())).align = 4

    def weights(self, column: int, words: Sequence[ir.Value], scale, least=None) -> None:
        # A byte under the exponent of 2^23 is 2^23 + q, or 2^23 + 256 q one byte further up: cheaper than to
        # move it down, mask it and convert it. The difference, and the scale over 256, are exact.
        b = self.builder
        scales = scale, b.fmul(scale, numbers(1 / 256))
        offset = self.offset if least is None else 0
        for i, four in enumerate(words):
            for k, pair in enumerate((four, four, b.lshr(four, ints(16)), b.lshr(four, ints(16)))):
                up = k % 2
                bits = b.or_(b.and_(pair, ints(255 << 8 * up)), ints(0x4B000000))
                q = b.fsub(b.bitcast(bits, FLOATS), numbers(2.0**23 + offset * 256**up))
                value = b.fmul(q, scales[up]) if least is None else self._fma(scales[up], q, least)
                self.put(column + 4 * i + k, value)

    def _fma(self, a, b, c):
        """a * b + c, rounded once."""
        name = f"llvm.fma.v{STRIP}f32"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), name
        )
        return self.builder.call(function, [a, b, c])


def _table_shuffle(builder, codes, table):
    """table[code] of every byte: one instruction of x86 for a register, written out for other CPUs."""
    features = cpu_features()
    lanes = 64 if "avx512bw" in features else 32 if "avx2" in features else 0
    if not lanes:
        values, entries = ir.Constant(BYTES, ir.Undefined), octets(table)
        for lane in range(BYTES.count):
            entry = builder.extract_element(entries, builder.extract_element(codes, I32(lane)))
            values = builder.insert_element(values, entry, I32(lane))
        return values
    name = "llvm.x86.avx512.pshuf.b.512" if lanes == 64 else "llvm.x86.avx2.pshuf.b"
    kind = ir.VectorType(I8, lanes)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 2), name)
    entries = ir.Constant(kind, octets(table).constant[:lanes])
    parts = [shuffled(builder, codes, codes, range(at, at + lanes)) for at in range(0, BYTES.count, lanes)]
    found = [builder.call(function, [entries, part]) for part in parts]
    return found[0] if lanes == BYTES.count else shuffled(builder, *found, range(BYTES.count))


def prefetch(builder, block, ahead, unit, unit_bytes):
    """Asks for as much of the memory `ahead` bytes on as a unit takes; past the file's end it is harmless.

    Sixteen interleaved rows are too many streams for the hardware: Q4_1 out of memory took 0.16 ns a weight
    without, 0.09 with; two or four strips ahead, or into the second-level cache only: no better.
    """
    signature = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    start = builder.add(ahead, builder.mul(unit, I64(STRIP * unit_bytes)))
    for line in range(0, STRIP * unit_bytes, 64):
        at = builder.gep(block, [builder.add(start, I64(line))])
        builder.call(function, [at, I32(0), I32(3), I32(1)])  # to read, into all levels, as data


def strip_of(
    kind: type[Strip], unit_bytes: int, unit_floats: int, write: Callable[[Strip], None], offset: int = 0
):
    """An intrinsic (rows, stride, n_units, strip): addresses of row 0 and of the strip, bytes between rows.

    `write` emits the code of one unit: `unit_bytes` of each row become `unit_floats` times four bytes of the
    strip.
    """

    @intrinsic
    def strip(typingctx, rows, stride, n_units, out):
        def codegen(context, builder, signature, args):
            first, row_bytes, count, target = args
            block = builder.inttoptr(first, I8.as_pointer())
            columns = builder.inttoptr(target, F32.as_pointer())
            before = builder.block
            loop, done = builder.append_basic_block("units"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            unit, at, to = builder.phi(I64), builder.phi(block.type), builder.phi(columns.type)
            prefetch(builder, block, builder.mul(row_bytes, I64(STRIP)), unit, unit_bytes)
            write(kind(builder, at, row_bytes, to, offset))
            following = builder.add(unit, I64(1))
            steps = [
                (unit, I64(0), following),
                (at, block, builder.gep(at, [I64(unit_bytes)])),
                (to, columns, builder.gep(to, [I64(unit_floats)])),
            ]
            for phi, start, value in steps:
                phi.add_incoming(start, before)
                phi.add_incoming(value, builder.block)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), codegen

    return strip
