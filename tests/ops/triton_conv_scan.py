"""Convolution and scan as one operator on Triton kernels, judged by its own tests; run by test_triton.py."""

import interpreter
import pytest
import test_conv_scan as cases
import torch
from interpreter import triton  # noqa: F401
from test_conv_scan import FORMS

from linconv import ops
from linconv.ops import dispatch


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    interpreter.small_convolution_tile(monkeypatch)
    interpreter.small_scan_tiles(monkeypatch)


@pytest.mark.parametrize("length, padded", [(11, False), (11, True), (1, False), (0, True)])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_definition(form, length, padded):
    sizes = dict(batch=2, length=length, heads=4, headdim=3, groups=2, dstate=4, width=4, bias=not padded)
    cases.agrees_with_the_definition(form, sizes, padded)


@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_two_calls(form):
    cases.has_the_bits_of_two_calls(form, torch.bfloat16, True, 20)


@pytest.mark.parametrize("form", FORMS)
def test_padded_is_alone(form):
    cases.padded_is_alone(form, torch.bfloat16, [0, 3, 17], 18)


@pytest.mark.parametrize(
    "test",
    [
        cases.test_opcheck,
        cases.test_compile_and_checkpoint,
        cases.test_batched_gradients,
        cases.test_gradients_that_only_say_that_they_are_negative,
    ],
)
def test_what_torch_asks_of_an_operator(test):
    test("shared")


@interpreter.calls_are_repeated
def test_calls_seen_before_take_their_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for _ in range(interpreter.CALLS):
        cases.has_the_bits_of_two_calls("shared", torch.bfloat16, False, 20)


@interpreter.calls_are_repeated
def test_launches_are_repeated_by_compiled_code():
    from linconv.ops.conv_scan import launches

    launches.conv_scan.calls.known.clear()
    test_calls_seen_before_take_their_own_tensors()
    repeated = [call for call in launches.conv_scan.calls.known.values() if call is not None]
    assert repeated and all(call.program is not None for call in repeated)


def test_a_first_call_is_compiled_once(monkeypatch):
    """Although it is the first to ask whether Triton can run."""
    tensors, options = cases.arguments("shared", dtype=torch.float32)
    monkeypatch.setattr(dispatch, "_triton_problems", {})
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    compiled = torch.compile(lambda *t: ops.conv_scan(*t, **options, backend="triton"), backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(*tensors)
