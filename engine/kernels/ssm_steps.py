"""Tokens of one sequence through STRIP channels of a convolution or scan, as LLVM vectors; see `ssm`.

A lane is a channel. What an intrinsic takes are addresses of float32 and numbers; a row is STRIP floats.
Exponentials are those of engine.kernels.maths, operation by operation.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels import maths
from engine.kernels.tile import NR, STRIP

_F32, _I32, _I64, _BYTES = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_FLOATS, _INTS = ir.VectorType(_F32, STRIP), ir.VectorType(_I32, STRIP)
_ROW = STRIP * 4  # bytes
_TOKEN = 4  # bytes from one token to the next in a panel's row
_FEATURE = NR * 4  # bytes from one feature to the next in a panel

# log(1 + u) = 2 s + 2 s^3 (1/3 + s^2/5 + s^4/7 ...), s = u / (2 + u) <= 1/3: the next term is below 2e-9
_ATANH = [1.0 / n for n in (15, 13, 11, 9, 7, 5, 3)]
_THRESHOLD = 20.0  # of softplus, as in PyTorch: beyond it x itself


def _number(value) -> ir.Constant:
    return ir.Constant(_FLOATS, [_F32(float(value))] * STRIP)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [_I32(value)] * STRIP)


def _load(builder, pointer):
    value = builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()))
    value.align = 4
    return value


def _store(builder, value, pointer) -> None:
    builder.store(value, builder.bitcast(pointer, _FLOATS.as_pointer())).align = 4


def _every_lane(builder, pointer):
    """The float at `pointer` in all lanes."""
    value = builder.load(builder.bitcast(pointer, _F32.as_pointer()))
    lane = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(lane, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_INTS, None))


def _fma(builder, a, b, c):
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{STRIP}f32")
    return builder.call(function, [a, b, c])


def _exp(builder, x, *, is_positive: bool):
    """`maths.exp32`; arguments above 0 need another clamp."""
    b, below = builder, builder.fcmp_ordered("<", x, _number(maths._LOWEST_32))
    clamped = b.select(below, _number(maths._LOWEST_32), x)
    if is_positive:
        highest = _number(maths._HIGHEST_32)
        clamped = b.select(b.fcmp_ordered(">", clamped, highest), highest, clamped)
    shifted = _fma(b, clamped, _number(maths._LOG2E_32), _number(maths._MAGIC_32))
    n = b.fsub(shifted, _number(maths._MAGIC_32))
    r = _fma(b, n, _number(-maths._LN2_HI_32), clamped)
    r = _fma(b, n, _number(-maths._LN2_LO_32), r)
    p = _number(maths._E5)
    for coefficient in (maths._E4, maths._E3, maths._E2, maths._E1, maths._E0):
        p = _fma(b, p, r, _number(coefficient))
    mantissa = b.fadd(_fma(b, p, b.fmul(r, r), r), _number(1.0))
    power = b.add(b.shl(b.bitcast(shifted, _INTS), _integer(23)), _integer(0x3F800000))
    return b.select(below, _number(0.0), b.fmul(mantissa, b.bitcast(power, _FLOATS)))


def _softplus(builder, x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), and x above the threshold."""
    b = builder
    minus_abs = b.bitcast(b.or_(b.bitcast(x, _INTS), _integer(0x80000000)), _FLOATS)
    u = _exp(b, minus_abs, is_positive=False)
    s = b.fdiv(u, b.fadd(u, _number(2.0)))
    square, p = b.fmul(s, s), _number(_ATANH[0])
    for coefficient in _ATANH[1:]:
        p = _fma(b, p, square, _number(coefficient))
    s = b.fadd(s, s)
    log = _fma(b, b.fmul(s, square), p, s)
    above = b.select(b.fcmp_ordered(">", x, _number(0.0)), x, _number(0.0))
    return b.select(b.fcmp_ordered(">", x, _number(_THRESHOLD)), x, b.fadd(above, log))


def _silu(builder, x):
    """x / (1 + exp(-x))."""
    b = builder
    return b.fdiv(x, b.fadd(_number(1.0), _exp(b, b.fneg(x), is_positive=True)))


def _loop(builder, count, pointers, steps, body, carried=()):
    """`body(pointers, carried)` for `count` turns, 1 or more; gives what is carried at last.

    The pointers move on by `steps` bytes; `body` gives the new values of what is carried.
    """
    before = builder.block
    loop, done = builder.append_basic_block("turn"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    phis = [builder.phi(value.type) for value in (count, *pointers, *carried)]
    n = len(pointers) + 1
    last = list(body(phis[1:n], phis[n:]))
    following = builder.add(phis[0], _I64(1))
    moved = [builder.gep(at, [_I64(step)]) for at, step in zip(phis[1:n], steps, strict=True)]
    for phi, first, new in zip(phis, [_I64(0), *pointers, *carried], [following, *moved, *last], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(new, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    return last


@intrinsic
def conv_steps(typingctx, x, n_tokens, weight, width, bias, out):
    """Row t of `out`: silu(bias + sum over w of row w of `weight` * row t + w of `x`), for n_tokens rows."""

    def codegen(context, builder, signature, args):
        rows, count, weights, taps, shift, to = args
        rows, weights, shift, to = (builder.inttoptr(a, _BYTES) for a in (rows, weights, shift, to))
        added = _load(builder, shift)

        def token(pointers, carried):
            row, out = pointers

            def tap(pointers, carried):
                weight, value = (_load(builder, pointer) for pointer in pointers)
                return [_fma(builder, weight, value, carried[0])]

            (total,) = _loop(builder, taps, [weights, row], [_ROW, _ROW], tap, [_number(0.0)])
            _store(builder, _silu(builder, builder.fadd(total, added)), out)
            return ()

        _loop(builder, count, [rows, to], [_ROW, _ROW], token)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


def _scan_of(is_shared: bool):
    """An intrinsic for a scan; `is_shared`: a channel has one row of A for all its states.

    softplus and the gate are loops of their own: within the recurrence every token would wait for them (an
    eighth more time in all, Zen 4, 2026-11). `dt` is overwritten.
    """

    @intrinsic
    def steps(typingctx, x, dt, z, n_tokens, b, c, a, n_states, bias, d, state, out):
        def codegen(context, builder, signature, args):
            count, n_states = args[3], args[7]
            x, dt, z, b, c, a, bias, d, state, out = (
                builder.inttoptr(args[i], _BYTES) for i in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11)
            )
            added, skip = _load(builder, bias), _load(builder, d)
            rate = _load(builder, a) if is_shared else None

            def before(pointers, carried):
                step = _softplus(builder, builder.fadd(_load(builder, pointers[0]), added))
                _store(builder, step, pointers[0])
                return ()

            def token(pointers, carried):
                value, step = (_load(builder, pointer) for pointer in pointers[:2])
                fed = builder.fmul(step, value)
                decay = _exp(builder, builder.fmul(step, rate), is_positive=False) if is_shared else None

                def one_state(pointers, carried):
                    kept = decay
                    if kept is None:
                        kept = builder.fmul(step, _load(builder, pointers[3]))
                        kept = _exp(builder, kept, is_positive=False)
                    of_b, of_c = (_every_lane(builder, pointer) for pointer in pointers[:2])
                    new = _fma(builder, kept, _load(builder, pointers[2]), builder.fmul(fed, of_b))
                    _store(builder, new, pointers[2])
                    return [_fma(builder, new, of_c, carried[0])]

                inner = [pointers[2], pointers[3], state] + ([] if is_shared else [a])
                strides = [_FEATURE, _FEATURE, _ROW, _ROW][: len(inner)]
                (y,) = _loop(builder, n_states, inner, strides, one_state, [_number(0.0)])
                _store(builder, _fma(builder, skip, value, y), pointers[4])
                return ()

            def after(pointers, carried):
                gate, y = (_load(builder, pointer) for pointer in pointers)
                _store(builder, builder.fmul(_silu(builder, gate), y), pointers[1])
                return ()

            _loop(builder, count, [dt], [_ROW], before)
            _loop(builder, count, [x, dt, b, c, out], [_ROW, _ROW, _TOKEN, _TOKEN, _ROW], token)
            _loop(builder, count, [z, out], [_ROW, _ROW], after)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 12), codegen

    return steps


scan_steps, scan_steps_shared = _scan_of(False), _scan_of(True)
