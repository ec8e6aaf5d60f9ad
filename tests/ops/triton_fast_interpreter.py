"""Operations of fast_interpreter.py give what Triton's interpreter gives without it; run by test_triton.py."""

import interpreter
import numpy as np
import pytest
import triton.language as tl

if not interpreter.INTERPRETING:
    pytest.skip("this is about Triton's interpreter", allow_module_level=True)

from triton.runtime.interpreter import TensorHandle

OPERATIONS = ("add", "radd", "sub", "mul", "rmul", "lt", "le", "gt", "ge", "and")
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


def result(operation, one, other):
    """(value, its NumPy type, its type in the language), or the kind of the error."""
    try:
        found = operation(one, other)
    except Exception as error:
        return type(error)
    return found.handle.data.tolist(), found.handle.data.dtype, str(found.type), str(found.dtype), str(found.shape)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_as_the_language(name):
    random, fast = np.random.default_rng(0), getattr(tl.tensor, f"__{name}__")
    both = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]
    pairs = [(tensor(*one, random), tensor(*other, random)) for one in both for other in both]
    pairs += [(tensor(*one, random), constant) for one in both for constant in CONSTANTS]
    compared = 0
    for one, other in pairs:
        wanted = result(fast.slow, one, other)
        np.testing.assert_equal(result(fast, one, other), wanted, f"{name} of {one.type} and {other}")
        compared += isinstance(wanted, tuple)
    assert compared > 20


def test_bits_of_numbers_may_overflow():
    """They are no sizes: the sanitizer lets them."""
    number = tensor(tl.float32, (8,), np.random.default_rng(0))
    bits = number.to(tl.int32, bitcast=True)
    assert (bits + bits).handle.data.tolist() == (bits.handle.data + bits.handle.data).tolist()
