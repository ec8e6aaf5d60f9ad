"""Operations of fast_interpreter.py give what Triton's interpreter gives without it; run by test_triton.py."""

import interpreter
import numpy as np
import pytest
import triton.language as tl

if not interpreter.INTERPRETING:
    pytest.skip("this is about Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import TensorHandle, interpreter_semantic

OPERATIONS = ["add", "radd", "sub", "mul", "rmul", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and"]
DTYPES = (tl.int1, tl.int32, tl.int64, tl.float32, tl.float64, tl.pointer_type(tl.float32), tl.pointer_type(tl.int1))
SHAPES = ((), (8,), (1, 8), (4, 1), (4, 8))
CONSTANTS = (0, 3, -2, 2**31 - 1, 2**31, -0.0, 0.1, float("inf"), float("nan"), True, tl.constexpr(5))


def tensor(dtype, shape, random):
    values = random.integers(-1000, 1000, shape or (1,))
    values[..., 0] = 0
    if dtype.is_ptr():
        data = values.astype(np.uint64)
    elif dtype.is_floating():
        data = (values / 7).astype({tl.float32: np.float32, tl.float64: np.float64}[dtype])
    else:
        data = values.astype({tl.int1: np.bool_, tl.int32: np.int32, tl.int64: np.int64}[dtype])
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def result(operation, *operands):
    """(value, its NumPy type, its type in the language) of what is found, or the kind of the error."""
    try:
        found = operation(*operands)
    except Exception as error:
        return type(error)
    if isinstance(found, tuple):
        return tuple(map(told, found))
    return told(found)


def told(found):
    return found.handle.data.tolist(), found.handle.data.dtype, str(found.type), str(found.dtype), str(found.shape)


def assert_same(fast, *operands):
    """Returns whether there was a result, and not an error."""
    wanted = result(fast.slow, *operands)
    np.testing.assert_equal(result(fast, *operands), wanted, str([getattr(value, "type", value) for value in operands]))
    return isinstance(wanted, tuple)


def every_tensor():
    random = np.random.default_rng(0)
    return [tensor(dtype, shape, random) for dtype in DTYPES for shape in SHAPES]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_as_the_language(name):
    fast = getattr(tl.tensor, f"__{name}__")
    others = [*every_tensor(), *CONSTANTS]
    assert sum(assert_same(fast, one, other) for one in every_tensor() for other in others) > 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("shape", ((), (4, 8)), ids=str)
def test_where_is_the_same(shape):
    condition = tensor(tl.int1, shape, np.random.default_rng(1))
    operands = [*every_tensor(), *CONSTANTS]
    assert sum(assert_same(tl.where, condition, one, other) for one in operands for other in operands) > 20


def test_indices_types_and_broadcasts_are_the_same():
    tensors, done = every_tensor(), [0, 0, 0]
    for one in tensors:
        for slices in ((slice(None), None), (None, slice(None)), (None,), None, (slice(0, 1), None), (0, None)):
            done[0] += assert_same(tl.tensor.__getitem__, one, slices)
        for dtype in (*DTYPES, tl.float16, tl.constexpr(tl.float32)):
            done[1] += assert_same(tl.tensor.to, one, dtype)
        for other in tensors:
            done[2] += assert_same(type(interpreter_semantic).broadcast_impl_value, interpreter_semantic, one, other)
    assert min(done) > 20


def test_bits_of_numbers_may_overflow():
    """They are no sizes: the sanitizer lets them."""
    number = tensor(tl.float32, (8,), np.random.default_rng(0))
    bits = number.to(tl.int32, bitcast=True)
    assert (bits + bits).handle.data.tolist() == (bits.handle.data + bits.handle.data).tolist()
