"""bidirectional_ssd on its Triton kernels; run by test_triton.py."""

import dataclasses
import itertools

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import NAMES, REGIMES, assert_close, oracle, scan_arguments, split, to_double, with_gradients

from linconv import ops

DIAGONALS = ("both", "once", "shifted")
LONGEST = 20 if interpreter.INTERPRETING else 300
by_each_plan = pytest.mark.parametrize("plan", interpreter.SCAN_PLANS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    interpreter.small_scan_tiles(monkeypatch)


def on_device(arguments):
    return {n: t.to(interpreter.DEVICE) for n, t in arguments.items()}


def kernels(arguments, plan="chunks", **options):
    tensors, rest = split(arguments)
    with interpreter.by_plan(plan):
        return ops.bidirectional_ssd(*tensors, **rest, backend="triton", **options)


def assert_matches_the_recurrence(arguments, plan, **options):
    wanted, wanted_gradients = with_gradients(oracle, arguments, **options)
    with interpreter.by_plan(plan):  # backward too
        got, gradients = with_gradients(kernels, arguments, plan=plan, **options)
    assert_close({"y": got, **gradients}, {"y": wanted, **wanted_gradients})


def sequences(kind, batch, length):
    """Keyword arguments that say which frames are valid."""
    if kind == "seq_lens":
        return {"seq_lens": torch.tensor([length, length // 3, 0][:batch], device=interpreter.DEVICE)}
    if kind == "cu_seqlens":
        return {"cu_seqlens": torch.tensor([0, 0, length // 3, length], device=interpreter.DEVICE)}
    return {}


def frames_of(arguments):
    """The arguments that have frames, and whether each is per direction."""
    return {n: arguments[n].dim() > d for n, d in dict(x=4, dt=3, B=4, C=4).items()}


# Every regime, diagonal and kind of batch, but not all with all: the interpreter is slow.
CASES = [
    ("separate", "shifted", "seq_lens"),
    ("hydra", "once", "cu_seqlens"),
    ("hydra", "both", "seq_lens"),
    ("quasiseparable", "shifted", "all"),
    ("tied", "both", "cu_seqlens"),
]
if not interpreter.INTERPRETING:
    CASES = list(itertools.product(REGIMES, DIAGONALS, ["all", "seq_lens", "cu_seqlens"]))


@pytest.mark.parametrize("regime, diagonal, kind", CASES)
@by_each_plan
def test_matches_the_recurrence(plan, regime, diagonal, kind):
    batch = {"all": 1, "seq_lens": 3, "cu_seqlens": 1}[kind]
    arguments = on_device(scan_arguments(batch, LONGEST, 2, 5, 1, 3, per_direction=REGIMES[regime]))
    options = dict(dt_softplus=True, dt_limit=(0.2, 1.5), diagonal=diagonal, **sequences(kind, batch, LONGEST))
    assert_matches_the_recurrence(arguments, plan, **options)


@by_each_plan
def test_parameters_of_heads_of_any_dtype(plan):
    """Results are those of a cast before; gradients are rounded once, as those of a cast."""
    arguments = on_device(scan_arguments(1, LONGEST, 2, 5, 1, 3, per_direction=REGIMES["hydra"], dtype=torch.bfloat16))
    arguments = {n: t.bfloat16() if n in ("A", "D", "dt_bias") else t for n, t in arguments.items()}
    cast = {n: t.float() if n in ("A", "D", "dt_bias") else t for n, t in arguments.items()}
    got, gradients = with_gradients(kernels, arguments, plan=plan, dt_softplus=True)
    wanted, wanted_gradients = with_gradients(kernels, cast, plan=plan, dt_softplus=True)
    assert torch.equal(got, wanted)
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype and torch.equal(gradient, wanted_gradients[name].to(gradient))


@pytest.mark.parametrize("regime", ["hydra", "separate"])
def test_heads_of_a_program_change_no_bit(monkeypatch, regime):
    """They are chosen by length: a sequence alone may have other ones than in a batch."""
    from linconv.ops.bidirectional_ssd.triton import _both_directions
    from linconv.ops.ssd import triton as scan

    arguments = on_device(scan_arguments(1, 20, 4, 5, 1, 3, dtype=torch.bfloat16, per_direction=REGIMES[regime]))
    dy = torch.randn_like(arguments["x"])
    found = []
    for heads in (1, 2, 4):
        monkeypatch.setattr(scan.Scan, "heads_of_outputs", lambda *_, heads=heads: heads)
        one = _both_directions(*[arguments[n] for n in NAMES], True, 0.0, float("inf"), "both", None, None)
        found.append([scan.scan_forward(one)[0], *scan.scan_backward(one, dy)])
    for results in zip(*found):
        assert not results[0].isnan().any() and all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize(
    "regime, diagonal, kind",
    [("separate", "shifted", "seq_lens"), ("hydra", "once", "cu_seqlens"), ("hydra", "both", "seq_lens")],
)
def test_any_number_of_blocks_in_a_chunk(monkeypatch, rows, regime, diagonal, kind):
    """Four, or one, where tests have two otherwise, and a GPU one."""
    from linconv.ops.ssd import triton as scan

    shipped = scan.choose_tiles
    changes = dict(chunk=16, gradient_chunk=16, rows=rows) if interpreter.INTERPRETING else dict(rows=16)
    monkeypatch.setattr(scan, "choose_tiles", lambda *sizes: dataclasses.replace(shipped(*sizes), **changes))
    batch = {"seq_lens": 3, "cu_seqlens": 1}[kind]
    arguments = on_device(scan_arguments(batch, 40, 2, 5, 1, 3, per_direction=REGIMES[regime]))
    options = dict(dt_softplus=True, diagonal=diagonal, **sequences(kind, batch, 40))
    assert_matches_the_recurrence(arguments, "chunks", **options)


@pytest.mark.parametrize("dstate, inside", [(3, 2), (9, 1), (20, 0)])
@by_each_plan
def test_dx_is_written_where_states_stood(plan, dstate, inside):
    """Those of as many directions as fit there."""
    from linconv.ops.ssd import triton as scan

    arguments = on_device(scan_arguments(1, 48, 2, 5, 1, dstate, per_direction=REGIMES["hydra"]))
    assert_matches_the_recurrence(arguments, plan, diagonal="shifted")
    tensors = [arguments[n].to("meta") for n in NAMES]
    dx, states = scan._dx_and_states(scan.Scan(*tensors, False, 0.0, 1.0, None, None, None, directions=2), 16)
    shared = [s.untyped_storage()._cdata == dx.untyped_storage()._cdata for s in states]
    assert shared == [True] * inside + [False] * (2 - inside)
    assert dx.untyped_storage().nbytes() <= (1 + scan.SPARE_MEMORY) * dx.nbytes


@pytest.mark.parametrize("low", [0.0, -0.5])
@pytest.mark.parametrize("regime, diagonal, kind", CASES)
def test_steps_in_exponents(monkeypatch, regime, diagonal, kind, low):
    """As where products are rounded, but in float64, which tells whether it is the same. Steps of zero have a logarithm
    that is no number, and those below have none."""
    from linconv.ops.ssd import triton as scan

    monkeypatch.setattr(scan, "rounds_products", lambda *_: True)
    batch = {"all": 1, "seq_lens": 3, "cu_seqlens": 1}[kind]
    arguments = on_device(scan_arguments(batch, LONGEST, 2, 5, 1, 3, per_direction=REGIMES[regime]))
    options = dict(dt_limit=(low, 1.5), diagonal=diagonal, **sequences(kind, batch, LONGEST))
    for plan in interpreter.SCAN_PLANS if low == 0 else ["sweeps"]:
        assert_matches_the_recurrence(arguments, plan, **options)


@settings(deadline=None, max_examples=3 if interpreter.INTERPRETING else 10, derandomize=interpreter.INTERPRETING)
@given(
    regime=st.sets(st.sampled_from(NAMES)),
    diagonal=st.sampled_from(DIAGONALS),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.integers(0, LONGEST),
    groups=st.integers(1, 2),
    heads_per_group=st.sampled_from([1] if interpreter.INTERPRETING else [1, 2, 3]),
    headdim=st.sampled_from([1, 7, 16, 20]),
    dstate=st.sampled_from([1, 5, 16, 18]),
    softplus=st.booleans(),
    strided=st.booleans(),
)
def test_any_shape_and_stride(
    regime, diagonal, kind, length, groups, heads_per_group, headdim, dstate, softplus, strided
):  # fmt: skip
    batch = 1 if kind == "cu_seqlens" else 2
    arguments = on_device(
        scan_arguments(
            batch, length, groups * heads_per_group, headdim, groups, dstate, per_direction=regime, strided=strided
        )
    )
    options = dict(dt_softplus=softplus, diagonal=diagonal, **sequences(kind, batch, length))
    for plan in interpreter.SCAN_PLANS:
        assert_matches_the_recurrence(arguments, plan, **options)


@pytest.mark.parametrize(
    "plan, regime, groups", [("chunks", "separate", 1), ("sweeps", "hydra", 1), ("sweeps", "tied", 2)]
)
def test_more_heads_than_a_program_takes(plan, regime, groups):
    """Heads that share B and C are in several programs, whose gradients are added up; and steps of the last of them are
    of few heads. Also where a group's heads are in one program, and directions share B and C."""
    arguments = on_device(scan_arguments(2, 5, 18, 2, groups, 3, per_direction=REGIMES[regime]))
    options = dict(dt_softplus=True, diagonal="shifted", seq_lens=torch.tensor([5, 3], device=interpreter.DEVICE))
    assert_matches_the_recurrence(arguments, plan, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_each_plan
def test_error_against_torch(plan, dtype):
    """At most twice the error of the same chunked products in plain torch at that precision, thrice in gradients.

    Of several draws the worst: A, D and dt_bias have so few elements that one draw would compare luck, and so would
    errors relative to gradients that happen to cancel out.
    """
    size = (1, 30, 2, 16, 1, 16) if interpreter.INTERPRETING else (2, 500, 4, 64, 1, 128)

    # Half precision as tensor cores take it: products of rounded operands, summed in float32.
    def plain(arguments, **options):
        tensors, rest = split(arguments)
        with torch.autocast(interpreter.DEVICE.type, dtype, enabled=dtype != torch.float32):
            return ops.bidirectional_ssd(*tensors, **rest, backend="reference", **options)

    def results(function, arguments, upstream, **options):
        leaves = {n: t.detach().requires_grad_() for n, t in arguments.items()}
        with interpreter.by_plan(plan):
            y = function(leaves, dt_softplus=True, **options)
            return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream.to(y))))}

    ours, torchs = (dict.fromkeys(("y", *NAMES), 0.0) for _ in range(2))
    for _ in range(3):
        arguments = on_device(scan_arguments(*size, per_direction=REGIMES["hydra"], dtype=dtype))
        upstream = torch.randn_like(arguments["x"])
        exact = results(oracle, to_double(arguments), upstream)
        mine, theirs = results(kernels, arguments, upstream, plan=plan), results(plain, arguments, upstream)
        for worst, found in ((ours, mine), (torchs, theirs)):
            for name, value in found.items():
                assert value.dtype == arguments.get(name, upstream).dtype
                worst[name] = max(worst[name], (value.double() - exact[name]).abs().max().item())
    for name in ours:
        assert ours[name] <= (3 if name in NAMES else 2) * torchs[name], name


@pytest.mark.parametrize("regime, diagonal", [("separate", "shifted"), ("hydra", "both"), ("tied", "once")])
@by_each_plan
def test_padded_equals_alone(plan, regime, diagonal):
    """Bit for bit, with NaN and Inf in the padding; padded outputs and gradients are zero."""
    lengths = [LONGEST, LONGEST * 4 // 5, 0]
    arguments = on_device(scan_arguments(3, LONGEST, 1, 12, 1, 9, per_direction=REGIMES[regime], dtype=torch.bfloat16))
    frames = frames_of(arguments)
    upstream = torch.randn_like(arguments["x"])
    for name, leading in frames.items():
        for row, length in enumerate(lengths):
            padding = arguments[name][:, row, length:] if leading else arguments[name][row, length:]
            padding[..., ::2], padding[..., 1::2] = float("nan"), float("inf")
    for row, length in enumerate(lengths):
        (upstream[:, row, length:] if frames["x"] else upstream[row, length:]).fill_(float("nan"))

    leaves = {n: t.requires_grad_() for n, t in arguments.items()}
    options = dict(dt_softplus=True, diagonal=diagonal, plan=plan)
    batch = kernels(leaves, **options, seq_lens=torch.tensor(lengths, device=interpreter.DEVICE))
    with interpreter.by_plan(plan):
        gradients = dict(zip(leaves, torch.autograd.grad(batch, list(leaves.values()), upstream)))
    for row, length in enumerate(lengths):

        def part(tensor, leading, frames=slice(None, length), row=row):
            return tensor[:, row : row + 1, frames] if leading else tensor[row : row + 1, frames]

        own = {n: part(t, frames[n]) if n in frames else t for n, t in arguments.items()}
        own = {n: t.detach().requires_grad_() for n, t in own.items()}
        alone = kernels(own, **options)
        assert torch.equal(part(batch, frames["x"]), alone)
        assert not part(batch, frames["x"], slice(length, None)).any()
        with interpreter.by_plan(plan):
            own_gradients = torch.autograd.grad(alone, [own[n] for n in frames], part(upstream, frames["x"]))
        for name, gradient in zip(frames, own_gradients):
            assert torch.equal(part(gradients[name], frames[name]), gradient), name
            assert not part(gradients[name], frames[name], slice(length, None)).any(), name
    assert all(gradients[name].isfinite().all() for name in ("A", "D", "dt_bias") if name in gradients)


@by_each_plan
def test_packed_equals_alone(plan):
    arguments = on_device(scan_arguments(1, 40, 1, 5, 1, 3, per_direction=REGIMES["hydra"], dtype=torch.float32))
    bounds = [0, 3, 3, 20, 40]
    packed = kernels(arguments, plan, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=interpreter.DEVICE))
    for start, end in zip(bounds, bounds[1:]):
        own = dict(arguments, x=arguments["x"][:, start:end])
        own.update({n: arguments[n][:, :, start:end] for n in ("dt", "B", "C")})
        assert torch.equal(packed[:, start:end], kernels(own, plan))


def test_offsets_past_32_bits():
    """Rows 2^30 elements apart; under the interpreter only the touched pages are ever backed by memory."""
    step = 2**30
    storage = torch.empty(3 * step, dtype=torch.bfloat16, device=interpreter.DEVICE)
    arguments = on_device(scan_arguments(1, 4, 1, 3, 1, 2, per_direction=REGIMES["hydra"], dtype=torch.bfloat16))
    far = storage.as_strided((1, 3, 1, 3), (1, step, 3, 1), storage_offset=step - 3)
    arguments = {n: t[:, :, 1:] if n in ("dt", "B", "C") else t for n, t in arguments.items()}
    far.copy_(arguments["x"][:, 1:])
    near = dict(arguments, x=far.clone())
    for plan in interpreter.SCAN_PLANS:
        with interpreter.by_plan(plan):
            got, gradients = with_gradients(kernels, dict(arguments, x=far), plan=plan)
            wanted, wanted_gradients = with_gradients(kernels, near, plan=plan)
        assert torch.equal(got, wanted)
        assert all(torch.equal(gradients[n], wanted_gradients[n]) for n in NAMES)


@pytest.mark.parametrize("regime, diagonal", [("separate", "shifted"), ("hydra", "both"), ("tied", "once")])
@by_each_plan
def test_steep_decays(plan, regime, diagonal):
    """Out of sight, the power of a difference is beyond float32. Headdim is more than one tile."""
    arguments = on_device(scan_arguments(1, 20, 1, 20, 1, 3, per_direction=REGIMES[regime]))
    arguments["A"] = arguments["A"] - 200
    assert_matches_the_recurrence(arguments, plan, dt_softplus=True, dt_limit=(0.2, 1.5), diagonal=diagonal)


def test_no_frames_and_no_rows():
    for (batch, length), plan in itertools.product(((0, 5), (2, 0)), interpreter.SCAN_PLANS):
        arguments = on_device(scan_arguments(batch, length))
        with interpreter.by_plan(plan):
            y, gradients = with_gradients(kernels, arguments, plan=plan)
        assert y.shape == arguments["x"].shape
        assert not any(g.any() for g in gradients.values())


@by_each_plan
def test_repeats_bit_for_bit(plan):
    arguments = on_device(scan_arguments(1, LONGEST, 1, 5, 1, 3, per_direction=REGIMES["hydra"], dtype=torch.bfloat16))
    with interpreter.by_plan(plan):
        first, gradients = with_gradients(kernels, arguments, plan=plan, dt_softplus=True)
        for _ in range(1 if interpreter.INTERPRETING else 20):
            again, other = with_gradients(kernels, arguments, plan=plan, dt_softplus=True)
            assert torch.equal(first, again)
            assert all(torch.equal(gradients[n], other[n]) for n in NAMES)


@interpreter.calls_are_repeated
@by_each_plan
def test_a_call_seen_before_takes_its_own_tensors(plan):
    """Seen once, noted down, done again (triton_replay.py)."""
    for seed in range(interpreter.CALLS):
        torch.manual_seed(seed)
        arguments = on_device(scan_arguments(2, 9, 2, 5, 1, 3, per_direction=REGIMES["hydra"]))
        assert_matches_the_recurrence(arguments, plan, diagonal="shifted", **sequences("seq_lens", 2, 9))


def test_opcheck():
    arguments = [t.requires_grad_() for t in on_device(scan_arguments(2, 9, 2, 3, 1, 2)).values()]
    lengths = torch.tensor([9, 4], device=interpreter.DEVICE)
    inputs = (*arguments, True, 0.0, float("inf"), "both", lengths, None)
    torch.library.opcheck(
        torch.ops.linconv.bidirectional_ssd_triton.default,
        inputs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.skipif(interpreter.INTERPRETING, reason="needs a GPU")
@pytest.mark.parametrize("calls", [1, 2])  # before: launches are captured as they are noted down, and done again
@by_each_plan
def test_cuda_graph(plan, calls):
    arguments = on_device(scan_arguments(2, 300, 4, 64, 1, 64, per_direction=REGIMES["hydra"], dtype=torch.bfloat16))
    lengths = torch.tensor([300, 100], device="cuda")
    leaves = {n: t.detach().requires_grad_() for n, t in arguments.items()}
    graph = torch.cuda.CUDAGraph()
    with interpreter.by_plan(plan):
        for _ in range(calls):  # compiles
            wanted, wanted_gradients = with_gradients(kernels, arguments, plan=plan, seq_lens=lengths)
        torch.manual_seed(1)
        upstream = torch.randn(wanted.shape, dtype=torch.float64).to(wanted)
        with torch.cuda.graph(graph):
            y = kernels(leaves, plan, seq_lens=lengths)
            gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)
    for name, gradient in zip(leaves, gradients):
        assert torch.equal(gradient, wanted_gradients[name]), name
