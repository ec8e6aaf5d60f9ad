"""The short convolution on its Triton kernels, judged by the operator's own tests; run by test_triton.py."""

import interpreter
import judge
import pytest
import test_short_conv as cases
import torch
from judge import gradients
from test_short_conv import (  # noqa: F401
    random,
    test_frames_far_apart,
    test_parameters_in_another_precision,
    test_second_derivative_is_refused,
)

from linconv.ops.short_conv import bidirectional_short_conv, short_conv
from linconv.ops.short_conv import triton as module


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """What the tests call the compiled backend is this one, and tensors are made where it wants them."""
    monkeypatch.setattr(judge, "_here", "triton")
    interpreter.small_convolution_tile(monkeypatch)
    torch.set_default_device(interpreter.DEVICE)
    yield
    torch.set_default_device(None)


def small_chunks(monkeypatch, channels=32):
    """Chunks of 16 frames backward."""
    monkeypatch.setattr(module, "choose_tile", lambda width, *_, **__: module.Tile(8, channels, width + 1, 2))


def bounds(kind, *values):
    return {kind: torch.tensor(values, device=interpreter.DEVICE)}


WHOLE, LINEAR = {"activation": "silu"}, {"activation": None}


@pytest.mark.parametrize(
    "problem, reverse, lookahead",
    [
        ((2, 13, 19, 2, True, WHOLE), False, 0),
        ((2, 13, 3, 3, False, LINEAR), True, 0),
        ((2, 13, 8, 4, True, LINEAR | bounds("seq_lens", 13, 2)), True, 1),
        ((1, 41, 1, 5, True, WHOLE | bounds("cu_seqlens", 0, 0, 30, 31, 41)), False, 2),
        ((1, 13, 8, 6, False, WHOLE | bounds("cu_seqlens", 0, 13)), True, 5),
        ((3, 8, 16, 7, True, WHOLE | bounds("seq_lens", 0, 8, 7)), False, 3),
        ((1, 1, 5, 8, True, WHOLE), False, 0),
        ((0, 5, 4, 4, True, WHOLE), False, 0),
        ((2, 0, 4, 4, True, WHOLE), False, 0),
        ((2, 5, 0, 4, True, WHOLE), False, 0),
        ((1, 0, 4, 4, True, WHOLE | bounds("cu_seqlens", 0)), False, 0),
    ],
)
def test_one_direction(problem, reverse, lookahead):
    cases.one_direction_agrees(problem, reverse, lookahead)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "problem",
    [
        (2, 9, 5, 4, True, WHOLE),
        (1, 13, 9, 3, False, LINEAR | bounds("cu_seqlens", 0, 5, 6, 13)),
        (0, 3, 3, 2, True, WHOLE),
    ],
)
def test_both_directions(problem, shared):
    cases.both_directions_agree(problem, shared)


def test_widest_filter_in_both_directions():
    cases.both_directions_agree((2, 11, 3, 8, True, WHOLE | bounds("seq_lens", 11, 3)), True)


def test_across_blocks(monkeypatch):
    """Chunks of frames and blocks of channels meet without a seam, those of packed sequences too."""
    small_chunks(monkeypatch, channels=16)
    cases.both_directions_agree((1, 36, 17, 4, True, WHOLE | bounds("cu_seqlens", 0, 16, 33, 36)), True)


def test_as_shipped(monkeypatch):
    """In the tiles of the committed table."""
    monkeypatch.undo()
    monkeypatch.setattr(judge, "_here", "triton")
    cases.one_direction_agrees((1, 35, 3, 4, True, WHOLE), False, 0)
    cases.both_directions_agree((1, 35, 3, 2, True, WHOLE), True)


@pytest.mark.parametrize(
    "dtype, width, channels", [(torch.float32, 4, 8), (torch.bfloat16, 3, 9), (torch.float16, 2, 9)]
)
def test_low_precision(dtype, width, channels):
    cases.test_oracle_low_precision(dtype, width, channels)


@pytest.mark.parametrize("dtype, shared", [(torch.bfloat16, True), (torch.float32, False), (torch.float16, True)])
def test_padded_is_alone(monkeypatch, dtype, shared):
    small_chunks(monkeypatch)
    cases.padded_is_alone(dtype, shared, [3, 17] if shared else [0, 17], 18)


def test_packed_is_alone(monkeypatch):
    small_chunks(monkeypatch)
    cases.packed_is_alone(torch.float16, False, 3, [3, 0, 17])


@pytest.mark.parametrize(
    "dtype, name",
    [
        (torch.bfloat16, "slice"),
        (torch.float32, "channels first"),
        (torch.float16, "one frame for all"),
        (torch.float64, "per direction"),
    ],
)
def test_strides(dtype, name):
    cases.views_are_as_copies(dtype, 1, 9, [name])


@pytest.mark.parametrize("kind, values", [("seq_lens", (9, -1)), ("cu_seqlens", (-2, 3, 99))])
def test_bounds_outside_the_tensor(kind, values):
    """The sanitizer, or a GPU's, sees that nothing outside is read or written."""
    x, weight = random(1, 2 if kind == "seq_lens" else 1, 5, 3), random(1, 3, 4)
    given = bounds(kind, *values)
    options = (True, False, 0, given.get("seq_lens"), given.get("cu_seqlens"))
    y = torch.ops.linconv.short_conv_triton(x, weight, None, *options)
    torch.ops.linconv.short_conv_backward_triton(y, x, weight, None, *options)
    assert y.isfinite().all()


def test_bounds_of_any_stride():
    x, weight = random(3, 7, 4), random(4, 3)
    lengths = torch.tensor([5, 0, 2, 0, 7, 0], device=interpreter.DEVICE)[::2]
    got, wanted = (short_conv(x, weight, seq_lens=n, backend="triton") for n in (lengths, lengths.contiguous()))
    assert torch.equal(got, wanted)


@interpreter.calls_are_repeated
def test_a_call_seen_before_takes_its_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for seed in range(interpreter.CALLS):
        torch.manual_seed(seed)
        cases.one_direction_agrees((2, 7, 5, 3, True, WHOLE | bounds("seq_lens", 7, 4)), False, 1)


@pytest.mark.parametrize("together, launches", [(True, 1), (False, 2)])
def test_launches(monkeypatch, together, launches):
    """One forward and two backward; directions that share x are one program's."""
    launched = []
    for place in (module, module.sum_parts.__globals__):
        set_in = monkeypatch.setattr if place is module else monkeypatch.setitem
        set_in(place, "launch", lambda kernel, grid, *_, **__: launched.append((kernel.__name__, *grid[1:])))
    inputs = [random(*([] if together else [2]), 1, 40, 24), random(2, 24, 4), random(2, 24)]
    gradients(lambda *t: bidirectional_short_conv(*t, backend="triton"), inputs, random(2, 1, 40, 24))
    assert launched == [("convolve", launches), ("differentiate", launches), ("_sum_parts",)]


def test_operators_keep_their_contracts():
    x, weight, bias = random(1, 1, 4, 3), random(1, 3, 2), random(1, 3)
    rest = (True, False, 0, torch.tensor([3]), None)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    differentiable = [t.clone().requires_grad_() for t in (x, weight, bias)]
    for op, arguments in (
        ("short_conv_triton", (*differentiable, *rest)),
        ("short_conv_backward_triton", (random(1, 1, 4, 3), x, weight, bias, *rest)),
    ):
        torch.library.opcheck(getattr(torch.ops.linconv, op).default, arguments, test_utils=checks)


@pytest.mark.skipif(interpreter.INTERPRETING, reason="builds are of compiled kernels")
def test_every_shipped_build_is_listed():
    assert {build.name for build in module.shipped()} == {"convolve", "differentiate", "_sum_parts"}
