"""The selective scan on its Triton kernels, judged by the operator's own tests; run by test_triton.py."""

import dataclasses

import interpreter
import judge
import numpy as np
import pytest
import test_selective_scan as cases
import torch
from scan_cases import assert_close, to_double, with_gradients
from test_selective_scan import (  # noqa: F401
    arguments_of,
    oracle,
    scan,
    sequences_of,
    test_empty,
)

from linconv import ops
from linconv.ops.selective_scan import triton as module

SMALL = module.Tiles(
    chunk=8, steps=4, channels=8, warps=1, gradient_chunk=8, gradient_steps=4, gradient_channels=8, gradient_warps=1
)
LARGE = module.Tiles(
    chunk=64, steps=16, channels=128, warps=8, gradient_chunk=64, gradient_steps=16, gradient_channels=128,
    gradient_warps=8,
)  # fmt: skip


CHOOSE_TILES = module.choose_tiles  # as it is shipped


def by_slices(self, input, combined):
    """Triton's interpreter scans and reduces by functions it does not know one element at a time."""
    columns = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    dtypes = [t.dtype.scalar for t in input]
    found = []
    for now in zip(*columns):
        now = [self.to_tensor(np.ascontiguousarray(data), dtype) for data, dtype in zip(now, dtypes)]
        if found:
            now = self.combine_fn.fn(*found[-1], *now)
        found.append(now if isinstance(now, tuple | list) else (now,))
    return [self.to_tensor(combined([f[i].handle.data for f in found]), dtype) for i, dtype in enumerate(dtypes)]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """What the tests call the compiled backend is this one, and tensors are made where it wants them."""
    monkeypatch.setattr(judge, "_here", "triton")
    if interpreter.INTERPRETING:
        from triton.runtime.interpreter import ReduceOps, ScanOps

        def scanned(self, input):
            return by_slices(self, input, lambda found: np.stack(found, self.axis))

        def reduced(self, input):
            last = (lambda found: np.expand_dims(found[-1], self.axis)) if self.keep_dims else (lambda found: found[-1])
            return by_slices(self, input, last)

        monkeypatch.setattr(ScanOps, "generic_scan", scanned)
        monkeypatch.setattr(ReduceOps, "generic_reduce", reduced)
        use(monkeypatch, SMALL)
        monkeypatch.setattr(module, "PASSED", 2048)
        monkeypatch.setattr(module, "SUMMED", 2048)
    torch.set_default_device(interpreter.DEVICE)
    yield
    torch.set_default_device(None)


def use(monkeypatch, tiles):
    """In the interpreter, which is slow for each program; a GPU runs the tiles that are shipped."""
    if interpreter.INTERPRETING:
        monkeypatch.setattr(module, "choose_tiles", lambda *_: tiles)


NAMES = ("kind", "reverse", "length", "groups", "group_channels", "dstate", "strided", "started", "softplus", "absent")


@pytest.mark.parametrize(
    "case",
    [
        ("all", False, 21, 1, 5, 3, True, True, True, ()),
        ("seq_lens", True, 21, 2, 3, 4, True, True, True, ()),
        ("seq_lens", False, 13, 1, 9, 1, False, False, False, ("z", "dt_bias")),
        ("cu_seqlens", True, 21, 1, 3, 5, True, True, True, ("D",)),
        ("cu_seqlens", False, 17, 1, 2, 17, False, True, False, ("D", "z")),
        ("all", True, 8, 1, 2, 2, False, False, True, ("dt_bias",)),
        ("seq_lens", False, 1, 3, 1, 3, False, True, True, ()),
        ("cu_seqlens", True, 0, 1, 2, 3, False, True, True, ()),
        ("all", False, 0, 1, 2, 3, False, True, True, ()),
    ],
)
def test_matches_the_recurrence(case):
    """In float64, gradients too; chunks and blocks of channels are several."""
    cases.test_matches_the_recurrence.hypothesis.inner_test(function=scan(), **dict(zip(NAMES, case)))


@pytest.mark.parametrize("dstate", [64, 200])
def test_wide_states(monkeypatch, dstate):
    use(monkeypatch, LARGE)
    arguments = arguments_of(1, 5, 2, 1, dstate)
    (y, states), gradients = with_gradients(scan(), arguments)
    (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments)
    assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


@pytest.mark.parametrize(
    "dtype, kind, started",
    [(torch.float32, "all", True), (torch.bfloat16, "seq_lens", False), (torch.float16, "cu_seqlens", True)],
)
def test_lower_precision_matches_the_recurrence(dtype, kind, started):
    cases.test_lower_precision_matches_the_recurrence.hypothesis.inner_test(
        reverse=kind == "all", kind=kind, length=20, channels=7, dstate=5, strided=started, started=started, dtype=dtype
    )


def test_arguments_of_different_dtypes():
    arguments = arguments_of(2, 9, 4, 1, 3, dtype=torch.float32, states=2)
    arguments |= {n: arguments[n].to(t) for n, t in dict(x=torch.bfloat16, B=torch.float16, z=torch.float16).items()}
    exact, exact_gradients = with_gradients(oracle, to_double(arguments))
    (y, states), gradients = with_gradients(scan(), arguments)
    assert (y.dtype, states.dtype) == (torch.bfloat16, torch.float32)
    assert_close({"y": y.double(), "states": states.double()}, dict(zip(("y", "states"), exact)), 2**-8)
    for name, argument in arguments.items():
        assert gradients[name].dtype == argument.dtype
    assert_close({n: g.double() for n, g in gradients.items()}, exact_gradients, 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_torch(monkeypatch, dtype):
    if interpreter.INTERPRETING:  # less of it, where results are not rounded to less than they are computed in
        sizes = (120, 96) if dtype == torch.float32 else (70, 32)
        monkeypatch.setattr(
            cases, "arguments_of", lambda *_, dtype, states: arguments_of(1, *sizes, 1, 16, dtype=dtype, states=1)
        )
    use(monkeypatch, LARGE)
    cases.test_error_against_torch(dtype)


@pytest.mark.parametrize(
    "length, reverse, dtype", [(37, False, torch.float32), (37, True, torch.bfloat16), (90, False, torch.float32)]
)
def test_padded_is_alone(monkeypatch, length, reverse, dtype):
    use(monkeypatch, dataclasses.replace(LARGE, steps=64, channels=64, gradient_steps=64, gradient_channels=64))
    cases.test_padded_is_alone(length, reverse, dtype)


def test_packed_is_alone(monkeypatch):
    use(monkeypatch, LARGE)
    cases.test_packed_is_alone()


def test_rates_of_any_sign_and_size(monkeypatch):
    use(monkeypatch, dataclasses.replace(SMALL, channels=32))
    cases.test_rates_of_any_sign_and_size()


@interpreter.calls_are_repeated
def test_a_call_seen_before_takes_its_own_tensors():
    """Seen once, noted down, done again (triton_replay.py)."""
    for seed in range(interpreter.CALLS):
        torch.manual_seed(seed)
        arguments = arguments_of(1, 9, 2, 1, 3, states=1)
        (y, states), gradients = with_gradients(scan(), arguments)
        (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments)
        assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


def test_either_result_alone_gives_gradients():
    """What has no gradient from behind counts as zero."""
    arguments = arguments_of(1, 9, 2, 1, 3, states=1)
    for i in (0, 1):
        found = [with_gradients(lambda *a, f=f, i=i: f(*a)[i], arguments)[1] for f in (scan(), oracle)]
        assert_close(*found)


def test_operators_keep_their_contracts():
    tensors = [t.requires_grad_() for t in arguments_of(1, 3, 2, 1, 2).values()]
    states = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.linconv.selective_scan_triton.default,
        (*tensors, True, states, None, torch.tensor([0, 1, 3]), False),
        test_utils=checks,
    )


def test_second_derivative_is_refused():
    x, *rest = arguments_of(1, 3, 2, 1, 2).values()
    y = ops.selective_scan(x.requires_grad_(), *rest[:4], backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_tiles_of_every_size():
    """A chunk is whole tiles, all are powers of two, and the states that enter tiles have 64 registers of a thread."""
    for dtype, math in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for dstate in range(1, 257):
            t = CHOOSE_TILES(dstate, torch.empty(0, dtype=dtype))
            assert t.chunk % t.steps == 0 and t.gradient_chunk % t.gradient_steps == 0
            N = 1 << (dstate - 1).bit_length()
            for size in (*vars(t).values(), N):
                assert size & (size - 1) == 0
            states = t.gradient_chunk // t.gradient_steps * N * t.gradient_channels * math.itemsize // 4
            assert states <= 64 * 32 * t.gradient_warps


@pytest.mark.parametrize("length, launched", [(64, ["scan"]), (65, ["advance", "pass_states", "scan"])])
def test_launches(monkeypatch, length, launched):
    found = []
    monkeypatch.setattr(module, "choose_tiles", CHOOSE_TILES)
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **options: found.append(kernel.__name__))
    tensors = list(arguments_of(1, length, dtype=torch.float32).values())
    module.selective_scan(*tensors, True, None, None, None, False)
    assert found == launched
    found.clear()
    module.selective_scan_backward(tensors[0], None, *tensors, True, None, None, None, False)
    assert found == [*launched[:-1], "differentiate", "sum_parts"]
