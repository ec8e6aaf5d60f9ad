"""Convolution and scan as one operator on Triton kernels, judged by its own tests; run by test_triton.py."""

import interpreter
import pytest
import test_conv_scan as cases
import torch
from interpreter import triton  # noqa: F401
from test_conv_scan import FORMS


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


def test_calls_seen_before_take_their_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for _ in range(interpreter.CALLS):
        cases.has_the_bits_of_two_calls("shared", torch.bfloat16, False, 20)


@pytest.mark.skipif(interpreter.INTERPRETING, reason="nothing is repeated in the interpreter")
def test_launches_are_repeated_by_compiled_code():
    from linconv.ops.conv_scan import launches

    launches.conv_scan.calls.known.clear()
    test_calls_seen_before_take_their_own_tensors()
    repeated = [call for call in launches.conv_scan.calls.known.values() if call is not None]
    assert repeated and all(call.program is not None for call in repeated)
