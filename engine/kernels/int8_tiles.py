"""Register tiles of products with 8-bit activations, as LLVM vector code; the definition stands in `int8`.

A tile is tokens by vectors of LANES weight rows over the whole depth: as many accumulators of integers, which
begin anew with each group of columns, as of floats, and nothing is stored between. Bytes are multiplied by
the best instruction of the CPU, `INSTRUCTION`:

    vpdpbusd     AVX-512 VNNI or AVX-VNNI: unsigned by signed bytes, four products added to a lane
    pmaddubsw    AVX-512BW or AVX2: two products in 16 bits, then pmaddwd
    ""           whatever LLVM makes of 32-bit products

Zen 4, 2026-11: 6 tokens by 2 strips instead of 12 by 1 is 7 % slower, although it reads fewer activations;
two groups in a turn keep the scales of all tokens in registers, and spill.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.tile import LANES, NR, STRIP
from engine.machine import cpu_features

BLOCK = 32  # columns that share a scale of activations
PARTS = STRIP // LANES  # vectors of a strip
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def _instruction() -> str:
    features = cpu_features()
    if ("avx512vnni" if LANES == 16 else "avxvnni") in features:
        return "vpdpbusd"
    return "pmaddubsw" if ("avx512bw" if LANES == 16 else "avx2") in features else ""


INSTRUCTION = _instruction()
_PAIRS = {
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
}


def offset_taken(offset: int) -> int:
    """What `_dot` has already taken of each weight of a type with that offset."""
    return 128 if INSTRUCTION == "pmaddubsw" and offset == 128 else 0


def group_bytes(group: int, offset: int) -> int:
    """Bytes of a group in a strip: weights, scales, and minimums where the offset is 0."""
    return (group // 4 + 1 + (offset == 0)) * STRIP * 4


def call(builder, name, result, *arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def splat(builder, value):
    undef = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    lane = builder.insert_element(undef, value, I32(0))
    return builder.shuffle_vector(lane, undef, ir.Constant(INTS, None))


def all_lanes(value) -> ir.Constant:
    """LANES times a 32-bit integer."""
    return ir.Constant(INTS, [I32(value)] * LANES)


def place(builder, base, offset, kind):
    """The vector or number of `kind` at `base`, a pointer to bytes, plus `offset` bytes."""
    offset = I64(offset) if isinstance(offset, int) else offset
    return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())


def load(builder, base, offset, kind):
    value = builder.load(place(builder, base, offset, kind))
    value.align = 4
    return value


def fma(builder, a, b, c):
    return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, a, b, c)


def _dot(builder, total, weights, activations, taken: int):
    """total + the sum of four products in each lane: bytes of `weights` less `taken` by signed ones; exact.

    `taken` is that of `offset_taken`.
    """
    octets, pairs = ir.VectorType(I8, 4 * LANES), ir.VectorType(I16, 2 * LANES)
    if INSTRUCTION == "vpdpbusd":
        operands = [builder.bitcast(x, octets) for x in (weights, activations)]
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", INTS, total, *operands)
    if INSTRUCTION == "pmaddubsw":
        # a sum of two products has 16 bits, enough for 2 * 128 * 127: larger weights, less 128, go in by
        # their magnitude, with their sign moved to the activations
        w, a = builder.bitcast(weights, octets), builder.bitcast(activations, octets)
        zero = ir.Constant(octets, None)
        if taken:
            w = builder.xor(w, ir.Constant(octets, [I8(128)] * octets.count))
            if LANES == 16:
                a = builder.select(builder.icmp_signed("<", w, zero), builder.sub(zero, a), a)
            else:
                a = call(builder, "llvm.x86.avx2.psign.b", octets, a, w)
            w = builder.select(builder.icmp_signed("<", w, zero), builder.sub(zero, w), w)
        multiply, add = _PAIRS[LANES]
        ones = ir.Constant(pairs, [I16(1)] * pairs.count)
        return builder.add(total, call(builder, add, INTS, call(builder, multiply, pairs, w, a), ones))
    for shift in (24, 16, 8, 0):
        w = builder.and_(builder.lshr(weights, all_lanes(24 - shift)), all_lanes(255))
        a = builder.ashr(builder.shl(activations, all_lanes(shift)), all_lanes(24))
        total = builder.add(total, builder.mul(w, a))
    return total


def _store_turned(builder, out, columns):
    """out[row, t] = columns[t][row], rows NR floats apart; four tokens at a time where there are four."""
    undef = ir.Constant(FLOATS, ir.Undefined)
    four = ir.VectorType(F32, 4)

    def shuffled(a, b, pattern):
        lanes = [4 * g + k + (LANES - 4 if k > 3 else 0) for g in range(LANES // 4) for k in pattern]
        return builder.shuffle_vector(a, b, ir.Constant(INTS, [I32(lane) for lane in lanes]))

    whole = len(columns) // 4 * 4
    for t in range(0, whole, 4):
        a, b, c, d = columns[t : t + 4]
        low = [shuffled(x, y, (0, 4, 1, 5)) for x, y in ((a, b), (c, d))]
        high = [shuffled(x, y, (2, 6, 3, 7)) for x, y in ((a, b), (c, d))]
        rows = [shuffled(*pair, lanes) for pair in (low, high) for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))]
        for row in range(LANES):
            group = ir.Constant(ir.VectorType(I32, 4), [I32(row // 4 * 4 + k) for k in range(4)])
            values = builder.shuffle_vector(rows[row % 4], undef, group)
            builder.store(values, place(builder, out, (row * NR + t) * 4, four)).align = 4
    for t in range(whole, len(columns)):
        for row in range(LANES):
            value = builder.extract_element(columns[t], I32(row))
            builder.store(value, place(builder, out, (row * NR + t) * 4, F32)).align = 4


def loop(builder, count, addresses, steps, body, carried=()):
    """`body(turn, pointers, carried)` for `count` turns, 1 or more; gives what is carried at last.

    The pointers move on by `steps` bytes; `body` gives the new values of what is carried.
    """
    before = builder.block
    loop, done = builder.append_basic_block("blocks"), builder.append_basic_block("done")
    start = [builder.inttoptr(address, I8.as_pointer()) for address in addresses]
    builder.branch(loop)
    builder.position_at_end(loop)
    phis = [builder.phi(value.type) for value in (count, *start, *carried)]
    pointers = phis[1 : 1 + len(start)]
    last = list(body(phis[0], pointers, phis[1 + len(start) :]))
    following = builder.add(phis[0], I64(1))
    moved = [builder.gep(at, [I64(step)]) for at, step in zip(pointers, steps, strict=True)]
    for phi, first, new in zip(phis, [I64(0), *start, *carried], [following, *moved, *last], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    return last


def tile_of(n_tokens: int, n_vectors: int, group: int, offset: int):
    """An intrinsic for a tile of tokens by vectors of weight rows, over the whole depth.

    Its arguments are addresses and numbers: of the first vector in the strips, the bytes of a strip, of the
    first token's quants, scales and shares, groups of the depth, and of the output. `offset` is the type's,
    or any other from 1 to 127 for one of those; 0 means a type with minimums.
    """
    has_minimum, taken = offset == 0, offset_taken(offset)
    record = group_bytes(group, offset)

    @intrinsic
    def tile(typingctx, strips, strip_bytes, quants, scales, shares, n_groups, out):
        def codegen(context, builder, signature, args):
            apart = [  # bytes from the first vector to each
                builder.add(builder.mul(args[1], I64(v // PARTS)), I64(v % PARTS * LANES * 4))
                for v in range(n_vectors)
            ]
            pairs = [(t, v) for t in range(n_tokens) for v in range(n_vectors)]

            def vector(base, v, offset, kind):
                return load(builder, base, builder.add(apart[v], I64(offset)), kind)

            def of_token(base, offset, kind):
                return splat(builder, load(builder, base, offset, kind))

            def groups(turn, pointers, chain):
                w, q, h = pointers
                # a turn is one group: with two of them the scales of all tokens would stay in registers
                s = builder.gep(
                    all_scales, [builder.mul(builder.udiv(turn, I64(BLOCK // group)), I64(NR * 4))]
                )
                chain = dict(zip(pairs, chain, strict=True))
                total = {(t, v): all_lanes(0) if has_minimum else of_token(h, t * 4, I32) for t, v in pairs}
                for k in range(group // 4):
                    rows = [vector(w, v, k * STRIP * 4, INTS) for v in range(n_vectors)]
                    for t in range(n_tokens):
                        four = of_token(q, (k * NR + t) * 4, I32)
                        for v in range(n_vectors):
                            total[t, v] = _dot(builder, total[t, v], rows[v], four, taken)
                for v in range(n_vectors):
                    scale = vector(w, v, group * STRIP, FLOATS)
                    for t in range(n_tokens):
                        both = builder.fmul(scale, of_token(s, t * 4, F32))
                        chain[t, v] = fma(builder, both, builder.sitofp(total[t, v], FLOATS), chain[t, v])
                    if has_minimum:
                        least = vector(w, v, (group + 4) * STRIP, FLOATS)
                        for t in range(n_tokens):
                            chain[t, v] = fma(builder, least, of_token(h, t * 4, F32), chain[t, v])
                return [chain[pair] for pair in pairs]

            all_scales = builder.inttoptr(args[3], I8.as_pointer())
            zeros = [ir.Constant(FLOATS, None)] * len(pairs)
            addresses = [args[i] for i in (0, 2, 4)]
            last = loop(builder, args[5], addresses, (record, group * NR, NR * 4), groups, zeros)
            target = builder.inttoptr(args[6], I8.as_pointer())
            for v in range(n_vectors):
                to = builder.gep(target, [I64(v * LANES * NR * 4)])
                _store_turned(builder, to, last[v::n_vectors])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), codegen

    return tile
