"""Launches that are done again: the same kernels on the same grids, with addresses of the call at hand.

No kernel runs here: what would be launched is noted down. That results are right is for the tests of each operator's
kernels on a GPU, which call it again with other tensors.
"""

import functools
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction  # noqa: E402

from linconv.ops import triton_launch, triton_replay  # noqa: E402
from linconv.ops.bidirectional_ssd import triton as bidirectional_ssd  # noqa: E402
from linconv.ops.conv_scan import launches as conv_scan  # noqa: E402
from linconv.ops.conv_scan.layout import Layout  # noqa: E402
from linconv.ops.gated_rms_norm import triton as gated_rms_norm  # noqa: E402
from linconv.ops.linformer import triton as linformer  # noqa: E402
from linconv.ops.selective_scan import triton as selective_scan  # noqa: E402
from linconv.ops.short_conv import triton as short_conv  # noqa: E402
from linconv.ops.ssd import triton as ssd  # noqa: E402

INF = float("inf")


@dataclass
class Launch:
    kernel: object
    grid: tuple
    arguments: dict
    again: bool


@pytest.fixture
def launches(monkeypatch):
    """What is launched, in place of launching it, always by Triton: for programs see test_triton_program.py."""
    found = []
    monkeypatch.setattr(triton_replay.Program, "of", lambda launches: None)

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *a: found.append(Launch(self.kernel, grid, dict(zip(self.kernel.arg_names, a)), True))

    def run(kernel, *, grid, warmup, num_warps, num_stages, enable_fp_fusion, maxnreg=None, **arguments):
        assert not warmup
        found.append(Launch(kernel, (*grid, 1, 1)[:3], arguments, False))
        return Compiled(kernel)

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def calls_of(function, settings=tuple):
    """The function as on CUDA tensors."""
    calls = triton_replay.Calls(function.__wrapped__)
    return lambda *arguments: calls(settings(), arguments)


def scan_tensors(length=40, directions=2, groups=1, dtype=torch.float32, offset=0):
    def random(*shape):
        n = torch.Size(shape).numel()
        return torch.randn(n + offset, dtype=dtype)[offset:].reshape(shape)

    two = (2,) if directions == 2 else ()
    x, dt = random(2, length, 4, 16), random(*two, 2, length, 4)
    B, C = (random(*two, 2, length, groups, 8) for _ in range(2))
    return [x, dt, torch.randn(4), B, C, torch.randn(4), torch.randn(4)]


def both_directions(**kwargs):
    return [*scan_tensors(**kwargs), True, 0.0, INF, "shifted", None, None]


def one_direction(states=True, **kwargs):
    first = torch.randn(2, 4, 16, 8) if states else None
    return [*scan_tensors(directions=1, **kwargs), True, 0.0, INF, first, torch.tensor([40, 3]), None, False]


def channels_of_their_own():
    x, dt, z = torch.randn(3, 2, 100, 40)
    B, C = torch.randn(2, 2, 100, 1, 8)
    first, lengths = torch.randn(2, 40, 8), torch.tensor([100, 3])
    return [x, dt, -torch.rand(40, 8), B, C, torch.randn(40), z, torch.randn(40), True, first, lengths, None, False]


def convolution():
    return [
        torch.randn(1, 2, 40, 24)[..., 4:20],
        torch.randn(2, 16, 4),
        None,
        True,
        False,
        0,
        torch.tensor([40, 3]),
        None,
    ]


def norm():
    return [torch.randn(2, 2, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(2, 16), 1e-5, 8, torch.tensor([40, 3])]


def projection(length=600):
    return [torch.randn(2, length, 3, 16).transpose(1, 2), torch.randn(1, 700, 8), True, None]


def attention(length=600):
    return [torch.randn(2, length, 3, 16).transpose(1, 2), *torch.randn(2, 2, 3, 8, 16), 0.25, 0.0, None, None]


def layer(directions=2, shared=True, dstate=8, heads=4, headdim=16):
    channels = heads * headdim + Layout.BC_blocks(shared) * dstate
    per_direction = (2,) if directions == 2 and not shared else ()
    xBC = torch.randn(*per_direction, 2, 40, channels + 8)[..., :channels]
    two = (2,) if directions == 2 else ()
    filters = torch.randn(*per_direction, channels, 4), torch.randn(*per_direction, channels)
    of_heads = [torch.randn(*two, heads) for _ in range(3)]
    return [xBC, torch.randn(*two, 2, 40, heads), *filters, *of_heads, dstate, 1, "both", 0, torch.tensor([40, 3])]


def with_gradient(arguments, *gradients):
    return lambda: [*map(torch.randn, gradients), *arguments()]


CASES = {
    "bidirectional_ssd": (bidirectional_ssd.bidirectional_ssd, both_directions),
    "bidirectional_ssd_backward": (
        bidirectional_ssd.bidirectional_ssd_backward,
        with_gradient(both_directions, (2, 40, 4, 16)),
    ),
    "ssd": (ssd.ssd, one_direction),
    "ssd_backward": (ssd.ssd_backward, with_gradient(one_direction, (2, 40, 4, 16), (2, 4, 16, 8))),
    "linformer_project": (linformer.linformer_project, projection),
    "linformer_project_backward": (
        linformer.linformer_project_backward,
        with_gradient(projection, (2, 3, 8, 16)),
    ),
    "selective_scan": (selective_scan.selective_scan, channels_of_their_own),
    "selective_scan_backward": (
        selective_scan.selective_scan_backward,
        with_gradient(channels_of_their_own, (2, 100, 40), (2, 40, 8)),
    ),
    "short_conv": (short_conv.short_conv, convolution),
    "short_conv_backward": (short_conv.short_conv_backward, with_gradient(convolution, (2, 2, 40, 16))),
    "gated_rms_norm": (gated_rms_norm.gated_rms_norm, norm),
    "gated_rms_norm_backward": (gated_rms_norm.gated_rms_norm_backward, with_gradient(norm, (2, 2, 40, 16))),
    "conv_scan": (conv_scan.conv_scan, layer),
    "conv_scan of two convolutions": (conv_scan.conv_scan, functools.partial(layer, shared=False)),
    "conv_scan of one direction": (conv_scan.conv_scan, functools.partial(layer, directions=1, shared=False)),
    "conv_scan's scan_gradients": (conv_scan.scan_gradients, with_gradient(layer, (2, 40, 4, 16))),
    "conv_scan's scan_gradients of one direction": (
        conv_scan.scan_gradients,
        with_gradient(functools.partial(layer, directions=1, shared=False), (2, 40, 4, 16)),
    ),
    "linformer_attend": (linformer.linformer_attend, attention),
    "linformer_attend_backward": (linformer.linformer_attend_backward, with_gradient(attention, (2, 3, 600, 16))),
}


def tensors_of(results):
    return [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]


def check_addresses(first, again, arguments, results, own):
    """Each address is where the tensor of the first call stands in this call's memory, and no two memories overlap."""
    known = {a.data_ptr(): a for a in arguments if isinstance(a, torch.Tensor) and a.numel()}
    owned = {tensor.untyped_storage().data_ptr() for tensor in own if tensor.numel()}
    start, size = {}, {}
    for one, two in zip(first, again, strict=True):
        assert two.again and not one.again
        assert (one.kernel, one.grid) == (two.kernel, two.grid)
        assert one.arguments.keys() <= set(one.kernel.arg_names)
        for name, value in one.arguments.items():
            address = two.arguments[name]
            if not isinstance(value, torch.Tensor):
                assert address is value or address == value, name
                continue
            assert isinstance(address, int), name
            if value.numel() == 0:
                continue
            storage = value.untyped_storage()
            base = address - (value.data_ptr() - storage.data_ptr())
            assert start.setdefault(storage.data_ptr(), base) == base, name
            size[storage.data_ptr()] = storage.nbytes()
    made = [(start[s], size[s]) for s in start if start[s] not in known]
    inputs = [base for base in start.values() if base in known]
    assert len(inputs) + len(made) == len(start) and inputs
    ends = sorted(made)
    assert all(begin + length <= after for (begin, length), (after, _) in zip(ends, ends[1:]))
    assert all(begin % 16 == 0 for begin, _ in made)
    returned = {r.untyped_storage().data_ptr() for r in results if r.numel()}
    assert {start[s] for s in owned if s in start} <= returned


@pytest.mark.parametrize("case", CASES)
def test_the_second_call_launches_what_the_first_did(case, launches):
    function, make = CASES[case]
    run = calls_of(function)
    kept = make()
    own = tensors_of(run(*kept))
    first = launches.copy()
    assert first and not any(launch.again for launch in first)
    del launches[:]
    arguments = make()
    results = tensors_of(run(*arguments))
    assert len(launches) == len(first)
    check_addresses(first, launches, arguments, results, own)
    for one, two in zip(own, results, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


@pytest.mark.parametrize(
    "other",
    [
        both_directions(length=41),
        both_directions(dtype=torch.bfloat16),
        both_directions(offset=1),  # addresses that are no multiples of 16 bytes
        [*both_directions()[:5], None, *both_directions()[6:]],
        [*both_directions()[:8], 0.1, *both_directions()[9:]],
        [*both_directions()[:-2], torch.tensor([40, 0]), None],
    ],
    ids=["length", "dtype", "alignment", "no D", "dt_min", "lengths"],
)
def test_other_arguments_are_worked_out_anew(other, launches):
    run = calls_of(bidirectional_ssd.bidirectional_ssd)
    for _ in range(3):
        run(*both_directions())
    assert launches[-1].again
    del launches[:]
    run(*other)
    assert launches and not any(launch.again for launch in launches)
    run(*both_directions())
    assert launches[-1].again


def test_other_settings_are_worked_out_anew(launches, monkeypatch):
    run = calls_of(bidirectional_ssd.bidirectional_ssd, bidirectional_ssd.scan_settings)
    for _ in range(3):
        run(*both_directions())
    assert launches[-1].again
    monkeypatch.setenv("LINCONV_SCAN_PLAN", "sweeps")
    run(*both_directions())
    assert not launches[-1].again
    for _ in range(2):
        run(*both_directions())
    assert launches[-1].again


def test_a_tensor_passed_twice_may_be_two_tensors_next_time(launches):
    run = calls_of(bidirectional_ssd.bidirectional_ssd)
    x, dt, A, B, *rest = both_directions()
    for _ in range(2):
        run(x, dt, A, B, B, *rest[1:])
    x, dt, A, B, C, *rest = both_directions()
    run(x, dt, A, B, C, *rest)
    assert launches[-1].again
    assert B.data_ptr() != C.data_ptr()
    passed = [launch.arguments[name] for launch in launches[-3:] for name in ("C", "rows") if name in launch.arguments]
    assert C.data_ptr() in passed


def test_a_view_of_one_of_two_arguments_alike_is_not_repeated(launches):
    """Nothing says of which, and next time they may be apart."""

    def function(x, y):
        view = x[None]
        names = dict.fromkeys(ssd.kernels.pass_states.arg_names, view)
        triton_launch.launch(ssd.kernels.pass_states, (1,), {**names, "last": y}, 4)

    calls = triton_replay.Calls(function)
    x, y = torch.randn(2, 3)
    for _ in range(3):
        calls((), (x, x))
    assert not any(launch.again for launch in launches)
    calls.known.clear()
    for _ in range(3):
        calls((), (x, y))
    assert launches[-1].again
    assert launches[-1].arguments["states"] == x.data_ptr() and launches[-1].arguments["last"] == y.data_ptr()


def test_results_are_memory_of_their_own(launches):
    run = calls_of(ssd.ssd_backward)
    make = CASES["ssd_backward"][1]
    for _ in range(3):
        results = tensors_of(run(*make()))
    assert launches[-1].again
    assert all(torch.isnan(r).all() for r in results)  # poisoned, and nothing has run
    storages = [r.untyped_storage().data_ptr() for r in results if r.numel()]
    assert len(set(storages)) == len(storages)
    assert all(r.untyped_storage().nbytes() == r.numel() * r.element_size() for r in results)


def test_results_without_elements(launches):
    """Views of memory that has no address."""
    for function, arguments in (
        (linformer.linformer_attend, lambda: attention(0)),
        (linformer.linformer_project_backward, with_gradient(lambda: projection(0), (2, 3, 8, 16))),
    ):
        run = calls_of(function)
        first, *_, third = (tensors_of(run(*arguments())) for _ in range(3))
        for one, other in zip(first, third, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_no_tensor_is_kept(launches):
    run = calls_of(bidirectional_ssd.bidirectional_ssd)
    for _ in range(3):
        arguments = both_directions()
        kept = [weakref.ref(t) for t in (*arguments, run(*arguments)) if isinstance(t, torch.Tensor)]
        del launches[:], arguments
        gc.collect()
        assert not any(tensor() is not None for tensor in kept)


def test_no_more_calls_are_remembered_than_there_is_room_for(launches, monkeypatch):
    monkeypatch.setattr(triton_replay, "MOST_CALLS", 2)
    calls = triton_replay.Calls(bidirectional_ssd.bidirectional_ssd.__wrapped__)
    for length in (5, 6, 7, 8):
        for _ in range(3):
            calls((), tuple(both_directions(length=length)))
    assert len(calls.known) == 2
    calls((), tuple(both_directions(length=8)))
    assert launches[-1].again


def test_a_tensor_of_unknown_origin_is_an_error(launches):
    def function(x):
        ssd.launch(ssd.kernels.pass_states, (1,), dict.fromkeys(ssd.kernels.pass_states.arg_names, x + 1), 4)

    calls = triton_replay.Calls(function)
    with pytest.raises(RuntimeError, match="neither an argument nor made by empty"):
        calls((), (torch.ones(3),))
