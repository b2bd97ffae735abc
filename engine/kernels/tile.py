"""The one micro-kernel: a register tile of C += A B, written as LLVM vector code.

The order of operations, on which every bit of every score rests (all kernels follow it):

    an output is ONE chain of float32 fused multiply-adds over the depth k, in rising order, from zero:
        c = fma(a[k], b[k], c)        for k = 0, 1, ... depth - 1

A depth-blocked product carries the chain on by loading C into the accumulators (`resume`). The vector lanes
run over tokens (columns of B and C), never over k, so neither the width of the registers, nor the shape of
the tile, nor the number of tokens in the batch can change a bit. `llvm.fma` rounds once everywhere, in
hardware or in software.

    A: depth x MR   weights (or keys, values), row k at a + k * lda: MR scalars that are broadcast
    B: depth x n    activations, row k at b + k * ldb: NV vectors of LANES tokens
    C: MR x n       row r at c + r * ldc

Shapes: with AVX-512 8 x (3 x 16) uses 24 accumulators of 32 registers; AVX2 has 16 registers of 8 lanes,
hence 4 x (3 x 8). A CPU without either runs the AVX2 shape as LLVM splits it: slow, same bits.

A few tokens leave those lanes empty. `few_tile` is the same product with the sides changed: up to FEW rows of
A are tokens (or query heads), and the lanes run over STRIP weight rows (or keys, or features of values).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels._jit import kernel
from engine.machine import cpu_features

LANES = 16 if "avx512f" in cpu_features() else 8
MR = LANES // 2
NV = 3
NR = NV * LANES  # tokens of a panel
STRIP = 16  # weight rows, or keys, that lie side by side: lanes of `few_tile`; a multiple of MR
FEW = 8  # most rows of `few_tile`


def _tile_of(n_rows: int, n_vectors: int, lanes: int):
    """An intrinsic for a tile of `n_rows` by `n_vectors` vectors of `lanes`; the vectors of B lie `apart`."""

    @intrinsic
    def tile(typingctx, a, lda, b, ldb, apart, c, ldc, depth, resume):
        signature = types.void(*[types.intp] * 9)

        def codegen(context, builder, sig, args):
            a_addr, a_stride, b_addr, b_stride, step, c_addr, c_stride, n, keep = args
            f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
            vec = ir.VectorType(f32, lanes)
            zero, undef = ir.Constant(vec, None), ir.Constant(vec, ir.Undefined)
            splat = ir.Constant(ir.VectorType(i32, lanes), None)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vec, [vec] * 3), f"llvm.fma.v{lanes}f32"
            )
            pa, pb, pc = (builder.inttoptr(x, f32.as_pointer()) for x in (a_addr, b_addr, c_addr))

            def at(base, offset):
                return builder.gep(base, [offset if isinstance(offset, ir.Value) else i64(offset)])

            def vector_at(pointer):
                return builder.bitcast(pointer, vec.as_pointer())

            def load(pointer):
                value = builder.load(pointer)
                value.align = 4  # mapped and packed floats need not lie on vector borders
                return value

            rows = [at(pc, builder.mul(c_stride, i64(r))) for r in range(n_rows)]
            shifts = [builder.mul(step, i64(v)) for v in range(n_vectors)]
            outs = [vector_at(at(row, v * lanes)) for row in rows for v in range(n_vectors)]

            before = builder.block
            resumed = builder.append_basic_block("resumed")
            loop = builder.append_basic_block("depth")
            done = builder.append_basic_block("done")
            builder.cbranch(builder.icmp_signed("!=", keep, i64(0)), resumed, loop)
            builder.position_at_end(resumed)
            carried = [load(p) for p in outs]
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(i64)
            ak, bk = builder.phi(pa.type), builder.phi(pb.type)
            acc = [builder.phi(vec) for _ in outs]
            for phi, start in [(k, i64(0)), (ak, pa), (bk, pb)]:
                phi.add_incoming(start, before)
                phi.add_incoming(start, resumed)
            for phi, start in zip(acc, carried, strict=True):
                phi.add_incoming(zero, before)
                phi.add_incoming(start, resumed)
            columns = [load(vector_at(at(bk, shift))) for shift in shifts]
            new = []
            for r in range(n_rows):
                lane = builder.insert_element(undef, load(at(ak, r)), i32(0))
                row = builder.shuffle_vector(lane, undef, splat)
                new += [
                    builder.call(fma, [row, columns[v], acc[r * n_vectors + v]]) for v in range(n_vectors)
                ]
            following = [builder.add(k, i64(1)), at(ak, a_stride), at(bk, b_stride), *new]
            for phi, value in zip([k, ak, bk, *acc], following, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following[0], n), loop, done)

            builder.position_at_end(done)
            for pointer, value in zip(outs, new, strict=True):
                builder.store(value, pointer).align = 4
            return context.get_dummy_value()

        return signature, codegen

    return tile


_tile1, _tile2, _tile3 = (_tile_of(MR, n, LANES) for n in (1, 2, 3))


@kernel
def tile(a, lda, b, ldb, c, ldc, depth, resume, n_vectors):
    """C[MR, n_vectors * LANES] = (resume ? C : 0) + A B; addresses intp, strides in floats, depth >= 1."""
    if n_vectors == 3:
        _tile3(a, lda, b, ldb, LANES, c, ldc, depth, resume)
    elif n_vectors == 2:
        _tile2(a, lda, b, ldb, LANES, c, ldc, depth, resume)
    else:
        _tile1(a, lda, b, ldb, LANES, c, ldc, depth, resume)


_few1, _few2, _few4, _few8 = (_tile_of(n, 1, STRIP) for n in (1, 2, 4, 8))
_few1x4, _few2x4, _few4x2, _few8x2 = (_tile_of(n, v, STRIP) for n, v in ((1, 4), (2, 4), (4, 2), (8, 2)))
_IS_WIDE = LANES == STRIP


@kernel
def few_rows(n):
    """Rows of A and C that `few_tile` reads and writes for n tokens: 1, 2, 4 or 8."""
    return n if n <= 2 else (4 if n <= 4 else FEW)


@kernel
def few_tile(n_rows, a, lda, b, ldb, apart, c, ldc, depth, resume, n_strips):
    """C[n_rows, n_strips * STRIP] = (resume ? C : 0) + A B for n_rows of 1, 2, 4 or 8.

    A: (depth, n_rows) scalars; B: row k of strip s at b + s * apart + k * ldb; strides in floats. A chain of
    fused multiply-adds waits four cycles for each step, so that several strips go together; AVX2 has too few
    registers for two of them with eight rows.
    """
    s = 0
    while s < n_strips:
        at, to, left = b + s * apart * 4, c + s * STRIP * 4, n_strips - s
        if left >= 4 and n_rows <= 2:
            if n_rows == 1:
                _few1x4(a, lda, at, ldb, apart, to, ldc, depth, resume)
            else:
                _few2x4(a, lda, at, ldb, apart, to, ldc, depth, resume)
            s += 4
        elif left >= 2 and n_rows >= 4 and _IS_WIDE:
            if n_rows == 4:
                _few4x2(a, lda, at, ldb, apart, to, ldc, depth, resume)
            else:
                _few8x2(a, lda, at, ldb, apart, to, ldc, depth, resume)
            s += 2
        else:
            if n_rows == 1:
                _few1(a, lda, at, ldb, apart, to, ldc, depth, resume)
            elif n_rows == 2:
                _few2(a, lda, at, ldb, apart, to, ldc, depth, resume)
            elif n_rows == 4:
                _few4(a, lda, at, ldb, apart, to, ldc, depth, resume)
            else:
                _few8(a, lda, at, ldb, apart, to, ldc, depth, resume)
            s += 1


@kernel
def spin(a, b, c, repeats):
    """Runs the tile `repeats` times on data that never leaves L1: the FMA ceiling of this core, now.

    a: (depth, MR), b: (depth, NR), c: (MR, NR) float32.
    """
    for _ in range(repeats):
        tile(a.ctypes.data, MR, b.ctypes.data, NR, c.ctypes.data, NR, a.shape[0], 0, NV)
