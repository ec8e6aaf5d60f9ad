"""Where tests of Triton kernels run: on a GPU, or in Triton's interpreter, which takes CPU tensors.

Tests of the Triton kernels of an operator stand in ``tests/ops/triton_<op>.py``, which begins with ``import
interpreter`` and makes its tensors on ``interpreter.DEVICE``. ``test_triton.py`` runs each such file in a process of
its own, since Triton reads TRITON_INTERPRET when it is imported: with the variable set, and where there is a GPU
without it too. In the interpreter sanitizer.py checks every launch. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/ops/triton_<op>.py``.
"""

import os
import types
from unittest import mock

import numpy as np
import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")

if not INTERPRETING and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """What the tests call the compiled backend is this one, and tensors are made where it wants them: in each test file
    that imports this."""
    monkeypatch.setattr("judge._here", "triton")
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def _mend_interpreter():
    """What Triton 3.6's interpreter cannot do itself."""
    from triton.runtime import interpreter

    tl, builder = interpreter.tl, interpreter.InterpreterBuilder
    patch_tensor, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        # NumPy 2.4 turns arrays of one element into integers no longer.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self, a, b, *rest):  # it would multiply the bits of bfloat16 as integers
        return dot(self, float_of_bfloat16(a), float_of_bfloat16(b), *rest)

    def float_of_bfloat16(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, source, dtype):  # it would cut bits off, where a GPU rounds to the nearest
        kinds = source.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return float_of_bfloat16(source)
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
            quiet_nan = (bits >> 16) | 0x40
            data = np.where(np.isnan(source.data), quiet_nan, rounded).astype(np.uint16)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast(self, source, dtype)

    interpreter._patch_lang_tensor = patch
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _patch_language_once():
    """The interpreter would replace what triton.language offers at every launch and every call of a helper anew, which
    takes as long as what the kernels compute. Nothing here needs it as it was before."""
    from triton.runtime import interpreter

    tl = interpreter.tl
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing_to_restore = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda kernel: nothing_to_restore


def _remember_dtypes():
    """The interpreter would make its table of them for each block that it makes."""
    from triton.runtime import interpreter

    look_up, found = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = np_dtype


def _remember_shapes():
    """The interpreter would make the same few shapes for every block anew, which is a third of all its time."""
    from triton.runtime import interpreter

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


def _match_operands_at_once():
    """The interpreter would look at the types and shapes of all operands in full, although nearly all are alike, or a
    tensor and a constant that was there before."""
    from triton.runtime import interpreter

    tl, semantic = interpreter.tl, interpreter.TritonSemantic
    match, constants = semantic.binary_op_type_checking_impl, {}
    plain = {dtype.name for dtype in (tl.int1, tl.int32, tl.int64, tl.float32, tl.float64)}

    def matched(self, lhs, rhs, *options):
        if type(lhs) is tl.tensor and lhs.dtype.name in plain:
            if type(rhs) is tl.tensor:
                if lhs.dtype.name == rhs.dtype.name and lhs.shape is rhs.shape:
                    return lhs, rhs
            elif type(rhs) is int or (type(rhs) is float and rhs):  # zero may be negative
                key = (lhs.dtype.name, id(lhs.shape), type(rhs), rhs, options)
                if key not in constants:
                    as_matched, constant = match(self, lhs, rhs, *options)
                    constants[key] = constant if as_matched is lhs else None
                if constants[key] is not None:
                    return lhs, constants[key]
        return match(self, lhs, rhs, *options)

    semantic.binary_op_type_checking_impl = matched


if INTERPRETING:
    import sanitizer
    from triton.runtime import interpreter as _interpreter

    np.seterr(divide="ignore")  # a GPU's log2 of 0 says nothing
    _mend_interpreter()
    _patch_language_once()
    _remember_dtypes()
    _remember_shapes()
    _match_operands_at_once()
    sanitizer.install(_interpreter)


def small_convolution_tile(monkeypatch):
    """In the interpreter, which is slow for each step, programs walk few steps of many slices."""
    if INTERPRETING:
        from linconv.ops.short_conv import triton as convolution

        monkeypatch.setattr(convolution, "choose_tile", lambda width, *_, **__: convolution.Tile(256, 64, width + 1, 2))


def small_scan_tiles(monkeypatch):
    """In the interpreter, which is slow, the scans have small chunks; a GPU runs the tiles that are shipped."""
    if INTERPRETING:
        from linconv.ops.ssd import triton as scan
        from linconv.ops.ssd.triton_tiles import Tiles

        tiles = Tiles(
            chunk=16, rows=8, heads=2, block_p=16, block_n=16, state_p=16, state_n=16, sweep_p=16, sweep_n=16,
            gradient_chunk=16, gradient_heads=2, gradient_p=16, gradient_n=16,
        )  # fmt: skip
        monkeypatch.setattr(scan, "choose_tiles", lambda *_: tiles)


SCAN_PLANS = ("chunks", "sweeps")
CALLS = 3  # of an operator with arguments alike, which a GPU repeats from the second on
calls_are_repeated = pytest.mark.skipif(INTERPRETING, reason="nothing is repeated in the interpreter")


def by_plan(plan):
    """A context in which the scans follow a plan."""
    return mock.patch.dict(os.environ, LINCONV_SCAN_PLAN=plan)
