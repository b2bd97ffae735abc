"""Residual addition and RMSNorm over token panels, and over the heads of a projection."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels._jit import kernel
from engine.kernels.native import address, doubles_at
from engine.kernels.product import SUMS, lanes_used
from engine.kernels.tile import LANES, NR


@intrinsic
def _add_and_square(typingctx, x, delta, width, sums):
    """x += delta and sums = chain of squares for LANES tokens and `width` rows NR apart; all addresses.

    By hand, because the compiler keeps the sums in memory where arrays might overlap: five times slower.
    """

    def codegen(context, builder, signature, args):
        f32, f64, i64 = ir.FloatType(), ir.DoubleType(), ir.IntType(64)
        floats, doubles = ir.VectorType(f32, LANES), ir.VectorType(f64, LANES)
        into, more = (builder.inttoptr(args[i], f32.as_pointer()) for i in (0, 1))
        before = builder.block
        loop, done = builder.append_basic_block("rows"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        row, total = builder.phi(i64), builder.phi(doubles)
        at = builder.mul(row, i64(NR))
        places = [builder.bitcast(builder.gep(p, [at]), floats.as_pointer()) for p in (into, more)]
        values = [builder.load(place) for place in places]
        for value in values:
            value.align = 4
        new = builder.fadd(*values)
        builder.store(new, places[0]).align = 4
        wide = builder.fpext(new, doubles)
        square = builder.fadd(total, builder.fmul(wide, wide))
        following = builder.add(row, i64(1))
        for phi, start, value in ((row, i64(0), following), (total, ir.Constant(doubles, None), square)):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[2]), loop, done)
        builder.position_at_end(done)
        builder.store(square, builder.inttoptr(args[3], doubles.as_pointer())).align = 8
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@kernel
def add_rms_norm(x, delta, weight, eps, first, last, n_tokens, work, out):
    """x += delta; out = x / sqrt(mean over D of x^2 + eps) * weight, for panels first <= p < last.

    x, delta, out: (P, >= D, NR) float32, `out` may be `delta`; weight: (D,) float32. The sum of squares is
    one float64 chain over D in rising order. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    width, sums = weight.size, doubles_at(work[SUMS], NR)
    for p in range(first, last):
        lanes = lanes_used(n_tokens, p)
        for v in range(0, lanes, LANES):
            a, b = (p * x.shape[1] * NR + v) * 4, (p * delta.shape[1] * NR + v) * 4
            _add_and_square(address(x) + a, address(delta) + b, width, work[SUMS] + v * 8)
        for t in range(lanes):
            sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
        for d in range(width):
            for t in range(lanes):
                out[p, d, t] = x[p, d, t] * np.float32(sums[t]) * weight[d]


@kernel
def norm_heads(x, head0, head1, weight, eps, first, last, n_tokens, work):
    """RMSNorm over each head's features, in place, for heads head0 <= h < head1 of panels first <= p < last.

    x: (P, H * K, NR) float32; weight: (K,) float32, or empty where nothing is normed. The sum of squares is
    one float64 chain over K in rising order. Source: Dehghani et al. 2023, arXiv:2302.05442,
    section 2 (norms of queries and keys).
    """
    width = weight.size
    if width == 0:
        return
    sums = doubles_at(work[SUMS], NR)
    for p in range(first, last):
        lanes = lanes_used(n_tokens, p)
        for h in range(head0, head1):
            for t in range(lanes):
                sums[t] = 0.0
            for d in range(h * width, (h + 1) * width):
                for t in range(lanes):
                    sums[t] += np.float64(x[p, d, t]) * np.float64(x[p, d, t])
            for t in range(lanes):
                sums[t] = 1.0 / np.sqrt(sums[t] / width + eps)
            for d in range(width):
                for t in range(lanes):
                    x[p, h * width + d, t] = x[p, h * width + d, t] * np.float32(sums[t]) * weight[d]
