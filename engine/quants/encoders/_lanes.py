"""Sixteen numbers side by side as one value inside kernels: what encoders compute with.

Numba knows no vectors, and its loops over a short axis keep their sums in memory. Here `load` gives a value
of type Lanes (16 float32, 16 int32 or 16 truths) that +, -, *, /, comparisons and the functions below work on
lane by lane, each operation rounded on its own as the scalar one is: LLVM vector code of fixed length, which
every CPU runs as its registers allow. Both operands of an operator are Lanes of one kind: numbers are spread
by `splat`.

Encoders use it in two ways. Those that only round lay a block's weights across the lanes. Those that search
lay 16 blocks across the lanes (`transpose`): every block then adds up its own numbers in its own order, so
its bits are those of a scalar loop over it.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model
from numba.np.arrayobj import make_array

WIDTH = 16

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_ELEMENTS = {"float32": _F32, "int32": _I32, "bool": _I1}
_VECTORS = {name: ir.VectorType(element, WIDTH) for name, element in _ELEMENTS.items()}


class Lanes(types.Type):
    """Numba's type of 16 lanes of "float32", "int32" or "bool"."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element})")


FLOATS, INTS, MASK = Lanes("float32"), Lanes("int32"), Lanes("bool")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VECTORS[kind.element])


def _constant(kind, value):
    vector = _VECTORS[kind.element]
    return ir.Constant(vector, [vector.element(value)] * WIDTH)


def _call(builder, name, result, *args):
    """Calls an LLVM intrinsic, by its full name."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    module = builder.module
    known = module.globals.get(name) or ir.Function(module, function, name)
    return builder.call(known, args)


def _address(context, builder, array_type, array, at):
    """Pointer to element `at` of a C-contiguous array."""
    data = make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(data, _item(array_type).as_pointer()), [at])


def _item(array_type):
    return _F32 if array_type.dtype == types.float32 else ir.IntType(array_type.dtype.bitwidth)


@intrinsic
def splat(typingctx, value):
    """Lanes that all hold a number: float32 of a float32, int32 of any integer."""
    kind = FLOATS if value == types.float32 else INTS

    def codegen(context, builder, signature, args):
        number = args[0]
        if kind == INTS:
            number = context.cast(builder, number, signature.args[0], types.int32)
        undef = ir.Constant(_VECTORS[kind.element], ir.Undefined)
        lane = builder.insert_element(undef, number, _I32(0))
        return builder.shuffle_vector(lane, undef, ir.Constant(ir.VectorType(_I32, WIDTH), None))

    return kind(value), codegen


@intrinsic
def load(typingctx, array, at):
    """Elements at .. at + 15 of a float32 or int32 vector."""
    kind = FLOATS if array.dtype == types.float32 else INTS

    def codegen(context, builder, signature, args):
        address = _address(context, builder, array, args[0], args[1])
        lanes = builder.load(builder.bitcast(address, _VECTORS[kind.element].as_pointer()))
        lanes.align = 4
        return lanes

    return kind(array, types.intp), codegen


@intrinsic
def store(typingctx, array, at, lanes):
    """Writes 16 elements: float32, int32, or the low bytes of int32 into a uint8 vector."""
    item = ir.VectorType(_item(array), WIDTH)

    def codegen(context, builder, signature, args):
        value = args[2]
        if value.type != item:
            value = builder.trunc(value, item)
        address = _address(context, builder, array, args[0], args[1])
        builder.store(value, builder.bitcast(address, item.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), codegen


@intrinsic
def select(typingctx, mask, chosen, other):
    """`chosen` where the mask holds, else `other`."""

    def codegen(context, builder, signature, args):
        return builder.select(*args)

    return chosen(MASK, chosen, chosen), codegen


def _operator_of(python, floats, ints, result=None):
    """Defines an operator by the names of llvmlite's builder methods for floats and for ints (and truths)."""

    @intrinsic
    def apply(typingctx, a, b):
        name = floats if a == FLOATS else ints

        def codegen(context, builder, signature, args):
            if result is None:
                return getattr(builder, name)(*args)
            compare = builder.fcmp_ordered if a == FLOATS else builder.icmp_signed
            return compare(name, *args)

        return (result or a)(a, a), codegen

    @overload(python)
    def operate(a, b):
        if isinstance(a, Lanes) and a == b:
            return lambda a, b: apply(a, b)
        return None


_operator_of(operator.add, "fadd", "add")
_operator_of(operator.sub, "fsub", "sub")
_operator_of(operator.mul, "fmul", "mul")
_operator_of(operator.truediv, "fdiv", None)
_operator_of(operator.and_, None, "and_")
_operator_of(operator.or_, None, "or_")
_operator_of(operator.lshift, None, "shl")
_operator_of(operator.rshift, None, "lshr")
_operator_of(operator.lt, "<", "<", MASK)
_operator_of(operator.gt, ">", ">", MASK)
_operator_of(operator.ge, ">=", ">=", MASK)
_operator_of(operator.eq, "==", "==", MASK)


def _unary(given, result, build):
    """An intrinsic from Lanes to Lanes, or to a number."""

    def typed(typingctx, lanes):
        def codegen(context, builder, signature, args):
            return build(builder, args[0])

        return result(given), codegen

    return intrinsic(typed)


def _reduced(comparison):
    """Builds one of 16 floats by halving: of each pair the one that compares so, else the second."""

    def build(builder, lanes):
        for half in (8, 4, 2, 1):
            first, second = (
                builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(_I32, half), [*part]))
                for part in (range(half), range(half, 2 * half))
            )
            lanes = builder.select(builder.fcmp_ordered(comparison, first, second), first, second)
        return builder.extract_element(lanes, _I32(0))

    return build


magnitude = _unary(FLOATS, FLOATS, lambda b, v: _call(b, "llvm.fabs.v16f32", v.type, v))
"""Absolute values."""
negative = _unary(FLOATS, FLOATS, lambda b, v: b.fneg(v))
square_root = _unary(FLOATS, FLOATS, lambda b, v: _call(b, "llvm.sqrt.v16f32", v.type, v))
to_floats = _unary(INTS, FLOATS, lambda b, v: b.sitofp(v, _VECTORS["float32"]))
cut = _unary(FLOATS, INTS, lambda b, v: b.fptosi(v, _VECTORS["int32"]))
"""Floats cut to whole numbers; anything for what int32 cannot hold."""
bits_of = _unary(FLOATS, INTS, lambda b, v: b.bitcast(v, _VECTORS["int32"]))
from_bits = _unary(INTS, FLOATS, lambda b, v: b.bitcast(v, _VECTORS["float32"]))
bits_of_mask = _unary(MASK, types.uint16, lambda b, v: b.bitcast(v, _I16))
"""Lane k as bit k."""
largest_of = _unary(FLOATS, types.float32, _reduced(">"))


def steps_of(thresholds, levels):
    """An intrinsic from floats to the level that each lies on: `levels[k]`, k the thresholds at or below it.

    NaN lies on the last. Levels are float32 or int32 as Python's numbers are; one more than thresholds.
    """
    kind = FLOATS if isinstance(levels[0], float) else INTS

    def build(builder, lanes):
        # Differences are added where a threshold is passed: one compare and one masked addition each.
        level = _constant(kind, levels[0])
        add = builder.fadd if kind == FLOATS else builder.add
        for k, threshold in enumerate(thresholds):
            reached = builder.fcmp_unordered(">=", lanes, _constant(FLOATS, threshold))
            raised = add(level, _constant(kind, levels[k + 1] - levels[k]))
            level = builder.select(reached, raised, level)
        return level

    return _unary(FLOATS, kind, build)


@intrinsic
def transpose(typingctx, source, start, stride, target, to):
    """target[to + 16 j + i] = source[start + stride i + j] for i, j in 0..15; both of one type.

    Four rounds of interleaving vectors.
    """
    row = ir.VectorType(_item(source), WIDTH)

    def codegen(context, builder, signature, args):
        def at(array_type, array, index):
            return builder.bitcast(_address(context, builder, array_type, array, index), row.as_pointer())

        rows = []
        for i in range(WIDTH):
            index = builder.add(args[1], builder.mul(args[2], _I64(i)))
            rows.append(builder.load(at(source, args[0], index)))
            rows[-1].align = 1
        halves = [
            ir.Constant(ir.VectorType(_I32, WIDTH), [lane for k in part for lane in (k, k + WIDTH)])
            for part in (range(8), range(8, 16))
        ]
        for _ in range(4):  # a perfect shuffle of 256 numbers, four times
            rows = [builder.shuffle_vector(rows[i], rows[i + 8], half) for i in range(8) for half in halves]
        for j, lanes in enumerate(rows):
            index = builder.add(args[4], _I64(WIDTH * j))
            builder.store(lanes, at(target, args[3], index)).align = 1
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), codegen
