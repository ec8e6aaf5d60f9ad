"""The gated norm on its Triton kernels, judged by the operator's own tests; run by test_triton.py."""

import interpreter
import pytest
import test_gated_rms_norm as cases
import torch
from interpreter import triton  # noqa: F401
from judge import gradients
from test_gated_rms_norm import (  # noqa: F401
    random,
    test_extreme_rows,
    test_frames_far_apart,
    test_layout_feeds_one_projection,
    test_parameters_in_another_precision,
    test_second_derivative_is_refused,
)

from linconv.ops.gated_rms_norm import gated_rms_norm
from linconv.ops.gated_rms_norm import triton as module


def small_tiles(monkeypatch, rows, columns):
    monkeypatch.setattr(module, "FRAMES", 2 * rows)
    monkeypatch.setattr(module, "choose_tile", lambda *_, **__: module.Tile(rows, columns, 4))


@pytest.mark.parametrize(
    "lead, groups, group_size, directions, lengths, eps",
    [
        ((2, 5), 1, 21, "none", 3, 1e-5),
        ((3,), 3, 8, "both", None, 1e-5),
        ((2, 3), 2, 16, "x", 0, 0.1),
        ((1, 2, 2), 1, 3, "z", None, 1e-5),
        ((2, 1), 3, 1, "both", 1, 1e-5),
        ((), 1, 8, "none", None, 1e-5),
        ((0, 4), 1, 8, "both", None, 1e-5),
        ((2, 0), 1, 8, "x", 0, 1e-5),
    ],
)
def test_agrees_with_the_definition(lead, groups, group_size, directions, lengths, eps):
    cases.agrees_with_the_definition(lead, groups, group_size, directions, lengths, eps)


@pytest.mark.parametrize("directions", ["none", "z"])
def test_across_blocks(monkeypatch, directions):
    """Frames of several programs, and of several steps of one; groups read again in blocks."""
    small_tiles(monkeypatch, 2, 16)
    cases.agrees_with_the_definition((1, 7), 1 if directions == "z" else 2, 37, directions, 6)
    cases.agrees_with_the_definition((1, 7), 2, 16, directions, None)


def test_eps_in_float64():
    """As given, not rounded to what a launch passes."""
    x, z, weight = random(1, 4, 8) * 1e-4, random(1, 4, 8), random(8)
    got, wanted = (
        gradients(lambda *t, b=b: gated_rms_norm(*t, eps=0.1, backend=b), [x, z, weight], torch.ones(1, 4, 8))
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-16)


def test_no_eps():
    """Padding is zeros, where a mean of squares has no inverse root."""
    x, z, weight = random(1, 4, 8), random(1, 4, 8), random(8)
    lengths = torch.tensor([2])
    y, grads = gradients(
        lambda *t: gated_rms_norm(*t, eps=0.0, seq_lens=lengths, backend="triton"), [x, z, weight], random(1, 4, 8)
    )
    for t in (y, *grads[:2]):
        assert not t[:, 2:].any()
    assert grads[2].isfinite().all()


@pytest.mark.parametrize(
    "dtype, d, group_size", [(torch.float32, 96, None), (torch.bfloat16, 50, 25), (torch.float16, 96, None)]
)
def test_low_precision(dtype, d, group_size):
    cases.test_oracle_low_precision(dtype, d, group_size)


@pytest.mark.parametrize("dtype, shared", [(torch.bfloat16, "x"), (torch.float32, "z"), (torch.float16, None)])
def test_padded_is_alone(dtype, shared):
    cases.padded_is_alone(dtype, shared, [0, 3, 17], 18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_strides(dtype):
    cases.views_are_as_copies(dtype, 1, 6)


def test_lengths_outside_the_tensor():
    """The sanitizer, or a GPU's, sees that nothing outside is read or written."""
    x, weight, lengths = random(1, 2, 5, 3), random(1, 3), torch.tensor([9, -1])
    y = torch.ops.linconv.gated_rms_norm_triton(x, x, weight, 1e-5, 3, lengths)
    assert y[:, 0].all() and not y[:, 1].any()
    torch.ops.linconv.gated_rms_norm_backward_triton(y, x, x, weight, 1e-5, 3, lengths)


def test_lengths_of_any_stride():
    x, weight = random(3, 7, 4), random(4)
    lengths = torch.tensor([5, 0, 2, 0, 7, 0])[::2]
    got, wanted = (gated_rms_norm(x, x, weight, seq_lens=n, backend="triton") for n in (lengths, lengths.contiguous()))
    assert torch.equal(got, wanted)


@interpreter.calls_are_repeated
def test_a_call_seen_before_takes_its_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for seed in range(interpreter.CALLS):
        torch.manual_seed(seed)
        cases.agrees_with_the_definition((2, 5), 1, 9, "x", 2)


def test_launches(monkeypatch):
    """One forward and two backward, for both directions."""
    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    monkeypatch.setitem(
        module.sum_parts.__globals__, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__)
    )
    inputs = [random(2, 1, 40, 24), random(1, 40, 24), random(2, 24)]
    gradients(lambda *t: gated_rms_norm(*t, backend="triton"), inputs, random(2, 1, 40, 24))
    assert launched == ["normalize", "differentiate", "_sum_parts"]


def test_operators_keep_their_contracts():
    x, z, weight, rest = random(1, 1, 3, 4), random(2, 1, 3, 4), random(2, 4), (1e-5, 2, torch.tensor([2]))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    differentiable = [t.clone().requires_grad_() for t in (x, z, weight)]
    for op, arguments in (
        ("gated_rms_norm_triton", (*differentiable, *rest)),
        ("gated_rms_norm_backward_triton", (random(2, 1, 3, 4), x, z, weight, *rest)),
    ):
        torch.library.opcheck(getattr(torch.ops.linconv, op).default, arguments, test_utils=checks)


@pytest.mark.skipif(interpreter.INTERPRETING, reason="builds are of compiled kernels")
def test_every_shipped_build_is_listed():
    assert {build.name for build in module.shipped()} == {"normalize", "differentiate", "_sum_parts"}
