"""Makes Triton's interpreter faster, with the same results.

Nearly all of that time is the language's own Python: what an operation computes, NumPy does in a fraction of it.
"""

import types

import numpy as np
import sanitizer


def install(interpreter) -> None:
    """Changes Triton's interpreter, a module, for good: nothing here needs it as it was before."""
    _call_at_once(interpreter)
    _patch_language_once(interpreter)
    _remember_dtypes(interpreter)
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
    tensor, constant = tl.core.tensor, tl.constexpr
    integers, floats = {"int32": tl.int32, "int64": tl.int64}, {"fp32": tl.float32, "fp64": tl.float64}
    common = {(name, other): dtype for name, dtype in (integers | floats).items() for other in (name, int)}
    common |= {(name, float): dtype for name, dtype in floats.items()}
    common |= {("int32", "int64"): tl.int64, ("int64", "int32"): tl.int64}  # as NumPy casts them
    compared, masks = dict.fromkeys(common, tl.int1), {("int1", "int1"): tl.int1}
    block_types = {}

    def as_tensor(data, dtype, is_block):
        key = dtype.name, data.shape
        if is_block and key not in block_types:
            block_types[key] = tl.core.block_type(dtype, [*data.shape])
        return tensor(make_handle(data, dtype), block_types[key] if is_block else dtype)

    def at_once(operation, of_types, slow):
        def calculate(self, other):
            if type(other) is constant:
                other = other.value
            data, dtype, is_block = self.handle.data, self.dtype, self.type.is_block()
            if type(other) is tensor:
                by, kind = other.handle.data, other.dtype.name
                is_block |= other.type.is_block()
            else:
                by, kind = other, type(other)
                if kind is float and other == 0 or kind is int and not -(2**31) <= other < 2**31:
                    return slow(self, other)  # a zero of Triton 3.6 has no sign
            result = of_types.get((dtype.name, kind))
            if result is not None and not hasattr(self.handle, "wraps"):
                if result is tl.int32:
                    sanitizer.check_integers(operation, data, by)
                return as_tensor(operation(data, by), result, is_block)
            if operation is np.add and dtype.is_ptr() and kind in integers:
                itemsize = max(dtype.element_ty.primitive_bitwidth // 8, 1)
                return as_tensor(data + itemsize * by.astype(np.uint64), dtype, is_block)
            return slow(self, other)

        calculate.slow = slow
        return calculate

    calculations = dict(__add__=np.add, __radd__=np.add, __sub__=np.subtract, __mul__=np.multiply, __rmul__=np.multiply)
    comparisons = dict(__lt__=np.less, __le__=np.less_equal, __gt__=np.greater, __ge__=np.greater_equal)
    for operations, of_types in ((calculations, common), (comparisons, compared), ({"__and__": np.logical_and}, masks)):
        for name, operation in operations.items():
            setattr(tensor, name, at_once(operation, of_types, getattr(tensor, name)))
