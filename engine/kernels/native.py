"""What kernels need beside arithmetic: calls by address, arrays at addresses, threads that meet, a clock.

A model's layers run in one call of one kernel a thread, so that decoding a token costs no Python between its
products; which decoder a weight needs is known only when the file is open, hence calls by address.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels._jit import kernel

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_FLOATS = types.Array(types.float32, 1, "C")
PACK_SIGNATURE = (types.intp,) * 4
DOT_SIGNATURE = (types.intp,) * 5
MULTIPLY8_SIGNATURE = (types.intp,) * 10
DECODE_SIGNATURE = (_BYTES, types.intp, types.intp, _FLOATS)

_PATIENCE = 4096  # looks at the gate before a waiting thread offers its core to others


@cache
def address_of(dispatcher, signature) -> int:
    """Address of a kernel's machine code for that signature, compiled or loaded from disk now.

    It stays valid while the process lives: Numba keeps the code of a module-level kernel.
    """
    dispatcher.compile(signature)
    result = dispatcher.overloads[signature]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))


def _call_by_address(argument_types):
    def codegen(context, builder, signature, args):
        function_type = context.call_conv.get_function_type(types.none, argument_types)
        function = builder.inttoptr(args[0], function_type.as_pointer())
        context.call_conv.call_function(builder, function, types.none, argument_types, args[1:])
        return context.get_dummy_value()

    return codegen


@intrinsic
def call_packer(typingctx, address, rows, stride, n_units, strip):
    """`engine.quants.strips` kernel at `address`."""
    return types.void(types.intp, *PACK_SIGNATURE), _call_by_address(PACK_SIGNATURE)


@intrinsic
def call_dot(typingctx, address, rows, stride, n_units, x, out):
    """`engine.quants.dots` kernel at `address`."""
    return types.void(types.intp, *DOT_SIGNATURE), _call_by_address(DOT_SIGNATURE)


@intrinsic
def call_multiply8(
    typingctx, address, strips, n_strips, quants, scales, sums, depth, offset, n_tokens, out, shares
):  # fmt: skip
    """`engine.kernels.int8` kernel at `address`."""
    return types.void(types.intp, *MULTIPLY8_SIGNATURE), _call_by_address(MULTIPLY8_SIGNATURE)


@intrinsic
def call_decoder(typingctx, address, data, first_block, n_blocks, out):
    """`engine.quants` decoder at `address`; `data` may be writable here, its layout is the same."""
    return types.void(types.intp, data, types.intp, types.intp, out), _call_by_address(DECODE_SIGNATURE)


def _pointer_to(element):
    @intrinsic
    def pointer(typingctx, address):
        target = types.CPointer(element)

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(target))

        return target(types.intp), codegen

    return pointer


_byte_pointer, _integer_pointer = _pointer_to(types.uint8), _pointer_to(types.int64)
_float_pointer, _double_pointer = _pointer_to(types.float32), _pointer_to(types.float64)


@kernel
def address(array):
    """Where a C-contiguous array begins, as intp: one integer type, so one compilation of what takes it."""
    return np.intp(array.ctypes.data)


@kernel
def bytes_at(address, count):
    """(count,) uint8 at an address."""
    return carray(_byte_pointer(address), (count,))


@kernel
def integers_at(address, count):
    """(count,) int64 at an address."""
    return carray(_integer_pointer(address), (count,))


@kernel
def floats_at(address, count):
    """(count,) float32 at an address."""
    return carray(_float_pointer(address), (count,))


@kernel
def doubles_at(address, count):
    """(count,) float64 at an address."""
    return carray(_double_pointer(address), (count,))


@intrinsic
def ticks(typingctx):
    """The CPU's time-stamp counter: int64, of one rate that is the same on all cores."""

    def codegen(context, builder, signature, args):
        counter = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(64), []), "llvm.readcyclecounter"
        )
        return builder.call(counter, [])

    return types.int64(), codegen


@intrinsic
def _add_one(typingctx, address):
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.intp), codegen


@intrinsic
def _read(typingctx, address):
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def _offer_core(typingctx):
    """sched_yield()."""

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"
        )
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@kernel
def meet(gate, threads):
    """Returns when all `threads` have called it as often as this one; what each wrote before is seen by all.

    gate: (2,) int64, zeros before the first meeting: arrivals, never reset, and whether one of the threads
        will not come any more, after which nobody waits and what they compute is worth nothing.
    """
    if threads == 1:
        return
    arrived = _add_one(address(gate))
    goal = (arrived // threads + 1) * threads
    looks = 0
    while _read(address(gate)) < goal and _read(address(gate) + 8) == 0:
        looks += 1
        if looks % _PATIENCE == 0:
            _offer_core()
