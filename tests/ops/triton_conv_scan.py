"""Convolution and scan as one operator on Triton kernels, judged by its own tests; run by test_triton.py."""

import interpreter
import judge
import pytest
import test_conv_scan as cases
import torch
from test_conv_scan import FORMS


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """What the tests call the compiled backend is this one, and tensors are made where it wants them."""
    monkeypatch.setattr(judge, "_here", "triton")
    torch.set_default_device(interpreter.DEVICE)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_definition(form, padded):
    sizes = dict(batch=2, length=11, heads=4, headdim=3, groups=2, dstate=4, width=4, bias=not padded)
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
