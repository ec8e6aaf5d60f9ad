"""Where tests of Triton kernels run: on a GPU, or in Triton's interpreter, which takes CPU tensors.

Tests of the Triton kernels of an operator stand in ``tests/ops/triton_<op>.py``, which begins with ``import
interpreter`` and makes its tensors on ``interpreter.DEVICE``. ``test_triton.py`` runs these files in processes of
their own, since Triton reads TRITON_INTERPRET when it is imported: with the variable set, and where there is a GPU
without it too. In the interpreter, made faster by fast_interpreter.py, sanitizer.py checks every launch. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/ops/triton_<op>.py``.
"""

import os
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


if INTERPRETING:
    import fast_interpreter
    import sanitizer
    from triton.runtime import interpreter as _interpreter

    np.seterr(divide="ignore")  # a GPU's log2 of 0 says nothing
    _mend_interpreter()
    fast_interpreter.install(_interpreter)
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
