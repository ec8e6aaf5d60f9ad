"""Makes Triton's interpreter faster, with the same results.

Nearly all of that time is the language's own Python: what an operation computes, NumPy does in a fraction of it.
"""

import types

import numpy as np
import sanitizer

TO_A_COLUMN_OR_ROW = ((slice(None), None), (None, slice(None)))


def install(interpreter) -> None:
    """Changes Triton's interpreter, a module, for good: nothing here needs it as it was before."""
    _call_at_once(interpreter)
    _patch_language_once(interpreter)
    _remember_dtypes(interpreter)
    _trust_sizes(interpreter)
    _remember_shapes(interpreter)
    _compare_types_at_once(interpreter)
    _calculate_at_once(interpreter)


def _call_at_once(interpreter):
    """The interpreter would make the keyword arguments of every call of the language anew, and ask twice whether the
    language is among them."""

    def patch(obj, name, member, builder, scope):
        function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


def _patch_language_once(interpreter):
    """The interpreter would replace what triton.language offers at every launch and every call of a helper anew, which
    takes as long as what the kernels compute."""
    tl = interpreter.tl
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing_to_restore = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda kernel: nothing_to_restore


def _remember_dtypes(interpreter):
    """The interpreter would make its table of them for each block that it makes."""
    look_up, found = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = np_dtype


def _trust_sizes(interpreter):
    """The interpreter would compare NumPy's size of an element with the language's for every block that it makes."""
    interpreter.TensorHandle.__post_init__ = lambda self: None


def _remember_shapes(interpreter):
    """The interpreter would make the same few shapes for every block anew, which is a third of all its time."""
    core = interpreter.tl.core
    make_tensor, make_type = core.tensor.__init__, core.block_type.__init__
    of_tensors, of_types = {}, {}

    def tensor(self, handle, type):
        shape = (*type.shape.values,) if type.is_block() else ()
        if shape not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[shape] = {name: vars(self)[name] for name in ("shape", "numel")}
        vars(self).update(of_tensors[shape], handle=handle, type=type, dtype=type.scalar)

    def block_type(self, element_ty, shape):
        key = (element_ty.name, *[size if type(size) is int else size.value for size in shape])
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = vars(self).copy()
        vars(self).update(of_types[key])

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type


def _compare_types_at_once(interpreter):
    """The interpreter would compare names of a type with itself."""
    dtype = interpreter.tl.core.dtype
    equal = dtype.__eq__
    dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _calculate_at_once(interpreter):
    """The interpreter would take thirty calls to look at operands, cast them and spread them over a block, for each of
    the operations that are most of what kernels are made of. Both ways give the same: triton_fast_interpreter.py."""
    tl, make_handle = interpreter.tl, interpreter.TensorHandle
    tensor, constant, semantic = tl.core.tensor, tl.constexpr, interpreter.TritonSemantic
    integers, floats = {"int32": tl.int32, "int64": tl.int64}, {"fp32": tl.float32, "fp64": tl.float64}
    common_integers = {(name, other): dtype for name, dtype in integers.items() for other in (name, int)}
    common_integers |= {("int32", "int64"): tl.int64, ("int64", "int32"): tl.int64}  # as NumPy casts them
    common = {(name, other): dtype for name, dtype in floats.items() for other in (name, int, float)} | common_integers
    compared, masks = dict.fromkeys(common, tl.int1), {("int1", "int1"): tl.int1}
    may_overflow = (np.add, np.subtract, np.multiply)
    block_types = {}

    def as_tensor(data, dtype, is_block):
        key = dtype.name, data.shape
        if is_block and key not in block_types:
            block_types[key] = tl.core.block_type(dtype, [*data.shape])
        return tensor(make_handle(data, dtype), block_types[key] if is_block else dtype)

    def operand(value):
        """(its numbers, name of its type or the type of a constant, whether it is a block)"""
        if type(value) is constant:
            value = value.value
        if type(value) is tensor:
            return value.handle.data, value.dtype.name, value.type.is_block()
        kind = type(value)
        if kind is float and value == 0 or kind is int and not -(2**31) <= value < 2**31:
            kind = None  # not at once: a zero of Triton 3.6 has no sign
        return value, kind, False

    def at_once(operation, of_types, slow):
        def calculate(self, other):
            data, dtype = self.handle.data, self.dtype
            by, kind, is_block = operand(other)
            is_block |= self.type.is_block()
            result = of_types.get((dtype.name, kind))
            if result is not None and not hasattr(self.handle, "wraps"):
                if result is tl.int32 and operation in may_overflow:
                    sanitizer.check_integers(operation, data, by)
                return as_tensor(operation(data, by), result, is_block)
            if operation is np.add and dtype.is_ptr() and kind in integers:
                itemsize = max(dtype.element_ty.primitive_bitwidth // 8, 1)
                return as_tensor(data + itemsize * by.astype(np.uint64), dtype, is_block)
            return slow(self, other)

        return replaced(slow, calculate)

    def quotient(data, by):
        return (data - np.fmod(data, by)) // by  # towards zero

    def index(self, slices):
        data = self.handle.data
        if type(slices) is tuple and slices in TO_A_COLUMN_OR_ROW and self.type.is_block() and data.ndim == 1:
            return as_tensor(data[slices], self.dtype, True)
        return index.slow(self, slices)

    def to(self, dtype, *how, **named):
        wanted = dtype.value if type(dtype) is constant else dtype
        if not how and not named and wanted.name == self.dtype.name:
            return self
        return to.slow(self, dtype, *how, **named)

    def where(condition, x, y):
        if type(condition) is tensor and condition.dtype.name == "int1":
            (x_data, x_kind, x_is_block), (y_data, y_kind, y_is_block) = operand(x), operand(y)
            result = common.get((x_kind, y_kind)) or common.get((y_kind, x_kind))
            if result is not None:
                is_block = condition.type.is_block() or x_is_block or y_is_block
                return as_tensor(np.where(condition.handle.data, x_data, y_data), result, is_block)
        return where.slow(condition, x, y)

    def broadcast(self, one, other):
        is_block, other_is_block = one.type.is_block(), other.type.is_block()
        shape, other_shape = one.handle.data.shape, other.handle.data.shape
        if is_block and other_is_block and shape == other_shape:
            return one, other
        if is_block and not other_is_block:
            return one, as_tensor(np.full(shape, other.handle.data), other.dtype, True)
        return broadcast.slow(self, one, other)

    def replaced(slow, fast):
        fast.slow = slow
        return fast

    calculations = dict(__add__=np.add, __radd__=np.add, __sub__=np.subtract, __mul__=np.multiply, __rmul__=np.multiply)
    comparisons = dict(__lt__=np.less, __le__=np.less_equal, __gt__=np.greater, __ge__=np.greater_equal)
    comparisons |= dict(__eq__=np.equal, __ne__=np.not_equal)
    for operations, of_types in (
        (calculations, common),
        (dict(__floordiv__=quotient, __mod__=np.fmod), common_integers),
        (comparisons, compared),
        ({"__and__": np.logical_and}, masks),
    ):
        for name, operation in operations.items():
            setattr(tensor, name, at_once(operation, of_types, getattr(tensor, name)))
    tensor.__getitem__ = replaced(tensor.__getitem__, index)
    tensor.to = replaced(tensor.to, to)
    tl.where = tl.core.where = replaced(tl.where, where)
    semantic.broadcast_impl_value = replaced(semantic.broadcast_impl_value, broadcast)
