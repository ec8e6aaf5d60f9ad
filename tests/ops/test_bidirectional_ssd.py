import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import alike_for_threads, devices, no_worse_than_torch, same_bits, threads
from scan_cases import NAMES, REGIMES, assert_close, oracle, scan_arguments, split, to_double, with_gradients

from linconv import ops
from linconv.ops import dispatch

pytestmark = pytest.mark.skipif(not dispatch.compiled("bidirectional_ssd"), reason="the compiled library is not built")

DIAGONALS = ("both", "once", "shifted")


def compiled(arguments, **options):
    tensors, rest = split(arguments)
    return ops.bidirectional_ssd(*tensors, **rest, backend="cpu", **options)


def fallback(arguments, **options):
    tensors, rest = split(arguments)
    return ops.bidirectional_ssd(*tensors, **rest, backend="reference", **options)


def sequences(kind, batch, length):
    """Keyword arguments that say which frames are valid."""
    if kind == "seq_lens":
        return {"seq_lens": torch.tensor([length, length // 3, 0][:batch])}
    if kind == "cu_seqlens":
        return {"cu_seqlens": torch.tensor([0, 0, length // 3, length])}
    return {}


@pytest.mark.parametrize("backend", [compiled, fallback])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", ["all", "seq_lens", "cu_seqlens"])
def test_matches_the_recurrence(backend, regime, diagonal, kind):
    for length in (0, 1, 129):
        arguments = scan_arguments(1 if kind == "cu_seqlens" else 3, length, per_direction=REGIMES[regime])
        options = dict(dt_softplus=True, dt_limit=(0.2, 1.5), diagonal=diagonal, **sequences(kind, 3, length))
        wanted, wanted_gradients = with_gradients(oracle, arguments, **options)
        for number in (1, 16) if backend is compiled else (1,):
            with threads(number):
                got, gradients = with_gradients(backend, arguments, **options)
            assert_close({"y": got, **gradients}, {"y": wanted, **wanted_gradients})


@settings(deadline=None, max_examples=25)
@given(
    regime=st.sets(st.sampled_from(NAMES)),
    diagonal=st.sampled_from(DIAGONALS),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.integers(0, 140),
    groups=st.integers(1, 3),
    heads_per_group=st.sampled_from([1, 2, 5]),
    headdim=st.sampled_from([1, 7, 16, 64, 80, 256]),
    dstate=st.sampled_from([1, 5, 16, 33, 128]),
    softplus=st.booleans(),
    strided=st.booleans(),
    number=st.sampled_from([1, 16]),
)
def test_any_shape_and_stride(
    regime, diagonal, kind, length, groups, heads_per_group, headdim, dstate, softplus, strided, number
):  # fmt: skip
    batch = 1 if kind == "cu_seqlens" else 2
    arguments = scan_arguments(
        batch, length, groups * heads_per_group, headdim, groups, dstate, per_direction=regime, strided=strided
    )
    options = dict(dt_softplus=softplus, diagonal=diagonal, **sequences(kind, batch, length))
    wanted, wanted_gradients = with_gradients(oracle, arguments, **options)
    with threads(number):
        got, gradients = with_gradients(compiled, arguments, **options)
    assert_close({"y": got, **gradients}, {"y": wanted, **wanted_gradients})


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_gradcheck(regime, diagonal):
    arguments = scan_arguments(1, 5, 2, 2, 1, 2, per_direction=REGIMES[regime])
    leaves = [t.requires_grad_() for t in arguments.values()]
    options = dict(dt_softplus=True, diagonal=diagonal, seq_lens=torch.tensor([4]))
    assert torch.autograd.gradcheck(lambda *ts: compiled(dict(zip(NAMES, ts)), **options), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", REGIMES)
def test_error_against_torch(regime, dtype):
    """At most twice the error of plain torch at the same precision, thrice in gradients."""
    arguments = scan_arguments(2, 300, 4, 64, 1, 32, per_direction=REGIMES[regime], dtype=dtype)
    options = dict(dt_softplus=True)
    exact, exact_gradients = with_gradients(oracle, to_double(arguments), **options)
    ours, our_gradients = with_gradients(compiled, arguments, **options)
    torchs, torch_gradients = with_gradients(fallback, arguments, **options)
    assert ours.dtype == dtype

    def error(got, wanted):
        return (got.double() - wanted).abs().max() / wanted.abs().max()

    assert error(ours, exact) <= 2 * error(torchs, exact)
    for name in NAMES:
        assert our_gradients[name].dtype == arguments[name].dtype
        bound = 3 * error(torch_gradients[name], exact_gradients[name])
        assert error(our_gradients[name], exact_gradients[name]) <= bound, name


@pytest.mark.parametrize("name", ["A", "dt_bias"])
def test_gradients_summed_over_time_are_more_exact_than_torchs(name):
    """What is rounded off at one step is not missing from those of all steps before it."""
    arguments = scan_arguments(2, 300, 32, 16, 1, 16, per_direction=REGIMES["separate"], dtype=torch.float32)
    _, exact = with_gradients(oracle, to_double(arguments), dt_softplus=True)
    ours, torchs = (with_gradients(f, arguments, dt_softplus=True)[1][name] for f in (compiled, fallback))

    def error(got):
        return (got - exact[name]).pow(2).mean()

    assert error(ours) <= error(torchs) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("regime", REGIMES)
def test_padded_equals_alone(regime, diagonal, dtype):
    """Bit for bit, with NaN and Inf in the padding; padded outputs and gradients are zero."""
    lengths = torch.tensor([130, 1, 0, 64])
    arguments = scan_arguments(4, 130, 6, 20, 2, 9, per_direction=REGIMES[regime], dtype=dtype)
    frames = {n: (arguments[n].dim() > d) for n, d in dict(x=4, dt=3, B=4, C=4).items()}  # name: per direction
    upstream = torch.randn(4, 130, 6, 20).to(dtype).expand(*[2] * frames["x"], 4, 130, 6, 20).clone()
    for name, leading in frames.items():
        for row, length in enumerate(lengths):
            padding = arguments[name][:, row, length:] if leading else arguments[name][row, length:]
            padding[..., ::2], padding[..., 1::2] = float("nan"), float("inf")
    for row, length in enumerate(lengths):
        (upstream[:, row, length:] if frames["x"] else upstream[row, length:]).fill_(float("nan"))

    leaves = {n: t.requires_grad_() for n, t in arguments.items()}
    batch = compiled(leaves, dt_softplus=True, diagonal=diagonal, seq_lens=lengths)
    gradients = dict(zip(leaves, torch.autograd.grad(batch, list(leaves.values()), upstream)))
    for row, length in enumerate(lengths):

        def part(tensor, leading, frames=slice(None, length), row=row):
            return tensor[:, row : row + 1, frames] if leading else tensor[row : row + 1, frames]

        own = {n: part(t, frames[n]) if n in frames else t for n, t in arguments.items()}
        own = {n: t.detach().requires_grad_() for n, t in own.items()}
        alone = compiled(own, dt_softplus=True, diagonal=diagonal)
        assert torch.equal(part(batch, frames["x"]), alone)
        assert not part(batch, frames["x"], slice(length, None)).any()
        own_gradients = torch.autograd.grad(alone, [own[n] for n in frames], part(upstream, frames["x"]))
        for name, gradient in zip(frames, own_gradients):
            assert torch.equal(part(gradients[name], frames[name]), gradient), name
            assert not part(gradients[name], frames[name], slice(length, None)).any(), name
    for name in ("A", "D", "dt_bias"):
        assert gradients[name].isfinite().all(), name


def test_packed_equals_alone():
    arguments = scan_arguments(1, 200, per_direction=REGIMES["hydra"], dtype=torch.float32)
    bounds = [0, 70, 70, 71, 200]
    packed = compiled(arguments, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in zip(bounds, bounds[1:]):
        own = dict(arguments, x=arguments["x"][:, start:end])
        own.update({n: arguments[n][:, :, start:end] for n in ("dt", "B", "C")})
        assert torch.equal(packed[:, start:end], compiled(own))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("regime", REGIMES)
def test_threads_do_not_change_a_bit(regime, diagonal, dtype):
    """Nor do tasks of unlike lengths, which a thread that is done takes from others, nor those of one chunk, which
    there are where threads are many."""
    for kind, batch, length in (("seq_lens", 3, 200), ("cu_seqlens", 1, 300), ("all", 1, 500)):
        arguments = scan_arguments(batch, length, 6, 20, 1, 9, per_direction=REGIMES[regime], dtype=dtype)
        options = dict(dt_softplus=True, diagonal=diagonal, **sequences(kind, batch, length))

        def results(arguments=arguments, options=options):
            y, gradients = with_gradients(compiled, arguments, **options)
            return [y, *gradients.values()]

        alike_for_threads(results, (1, 2, 7, 40))


def test_no_heads():
    """By the operators themselves, since the public functions leave nothing to them."""
    arguments = [torch.randn(*shape) for shape in ((1, 100, 0, 8), (1, 100, 0), (0,), (1, 100, 1, 8), (1, 100, 1, 8))]
    options = (None, None, False, 0.0, math.inf, "both", None, None)
    for number in (1, 16):
        with threads(number):
            assert torch.ops.linconv.bidirectional_ssd(*arguments, *options).shape == (1, 100, 0, 8)
            gradients = torch.ops.linconv.bidirectional_ssd_backward(arguments[0], *arguments, *options)
        assert [g.shape for g in gradients[:5]] == [t.shape for t in arguments]
        assert not gradients[3].any() and not gradients[4].any()


LITTLE_MEMORY = """
import resource, sys, torch
from linconv import ops
torch.set_num_threads(int(sys.argv[1]))
sizes = (1, 65_536, 8, 64), (2, 1, 65_536, 8), (2, 1, 65_536, 1, 64), (2, 1, 65_536, 1, 64)  # 64 MiB of results
x, dt, B, C = [torch.zeros((), dtype=torch.bfloat16).expand(size) for size in sizes]
A = torch.zeros(2, 8)
ops.bidirectional_ssd(x[:, :128], dt[:, :, :128], A, B[:, :, :128], C[:, :, :128])  # whose threads take memory too
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
ops.bidirectional_ssd(x, dt, A, B, C)
"""


@pytest.mark.skipif(sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""), reason="has no such limit")
@pytest.mark.parametrize("number", [1, 2])
def test_too_little_memory_for_scratch_is_an_error(number):
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, str(number)], capture_output=True, text=True)
    assert "RuntimeError: a task wanted" in done.stderr and "which there is no memory for" in done.stderr, done.stderr


@pytest.mark.parametrize("name", NAMES[:5])
def test_the_operators_themselves_refuse_float64_among_float32(name):
    arguments = {n: t.detach() for n, t in scan_arguments(1, 100, dtype=torch.float32).items()}
    x = arguments["x"]
    arguments[name] = arguments[name].double()
    (*tensors,), rest = split(arguments)
    options = (*rest.values(), False, 0.0, math.inf, "both", None, None)
    for run in (
        lambda: torch.ops.linconv.bidirectional_ssd(*tensors, *options),
        lambda: torch.ops.linconv.bidirectional_ssd_backward(x, *tensors, *options),
    ):
        with pytest.raises(RuntimeError, match="float64, wanted both or neither|is not of the math dtype"):
            run()


def test_more_heads_or_groups_than_can_be_counted():
    x, dt, A, B = (torch.empty(shape) for shape in ((1, 0, 0, 4), (1, 0, 0), (0,), (1, 0, 2**32, 4)))
    with pytest.raises(RuntimeError, match="4294967296 groups, wanted at most"):
        torch.ops.linconv.bidirectional_ssd(x, dt, A, B, B, None, None, False, 0.0, math.inf, "both", None, None)


def test_expanded_arguments_and_upstream():
    """Strides of 0, in the arguments and in the gradient that sum() sends back."""
    arguments = scan_arguments(2, 70)
    arguments["B"] = arguments["B"][:1, :1].expand(2, 70, -1, -1)
    arguments["x"] = arguments["x"][..., :1].expand(-1, -1, -1, 5)
    sums = [with_gradients(lambda a, f=f: f(a).sum(), arguments) for f in (compiled, oracle)]
    assert_close({"y": sums[0][0], **sums[0][1]}, {"y": sums[1][0], **sums[1][1]})


def test_offsets_past_32_bits():
    """Rows 2^30 elements apart; only the touched pages of the storage are ever backed by memory."""
    step = 2**30
    storage = torch.empty(3 * step, dtype=torch.bfloat16)
    arguments = scan_arguments(1, 4, 1, 3, 1, 2, per_direction=REGIMES["hydra"], dtype=torch.bfloat16)
    far = storage.as_strided((1, 3, 1, 3), (1, step, 3, 1), storage_offset=step - 3)
    arguments = {n: t[:, :, 1:] if n in ("dt", "B", "C") else t for n, t in arguments.items()}
    far.copy_(arguments["x"][:, 1:])
    near = dict(arguments, x=far.clone())
    assert torch.equal(compiled(dict(arguments, x=far)), compiled(near))


def test_empty_batch():
    arguments = scan_arguments(0, 5)
    y, gradients = with_gradients(compiled, arguments)
    assert y.shape == (0, 5, 4, 5)
    assert not any(gradients[n].any() for n in ("A", "D", "dt_bias"))


def test_a_second_derivative_is_an_error():
    leaves = {n: t.requires_grad_() for n, t in scan_arguments(1, 5).items()}
    gradients = torch.autograd.grad(compiled(leaves).sum(), list(leaves.values()), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward(retain_graph=True)


def test_opcheck():
    for regime, options in (("separate", {}), ("tied", {"seq_lens": torch.tensor([9, 4])})):
        arguments = [t.requires_grad_() for t in scan_arguments(2, 9, per_direction=REGIMES[regime]).values()]
        inputs = (*arguments, True, 0.0, float("inf"), "both", options.get("seq_lens"), None)
        torch.library.opcheck(torch.ops.linconv.bidirectional_ssd.default, inputs)


def test_compile_checkpoint_autocast():
    arguments = scan_arguments(2, 70, per_direction=REGIMES["hydra"], dtype=torch.float32)

    def f(a):
        return compiled(a, dt_softplus=True, seq_lens=torch.tensor([70, 20]))

    y, gradients = with_gradients(f, arguments)
    again = torch.compile(f, fullgraph=True, backend="aot_eager")
    y_compiled, gradients_compiled = with_gradients(again, arguments)
    y_checkpoint, gradients_checkpoint = with_gradients(
        lambda a: torch.utils.checkpoint.checkpoint(f, a, use_reentrant=False), arguments
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, _ = with_gradients(f, arguments)
    assert torch.equal(y, y_compiled) and torch.equal(y, y_checkpoint) and torch.equal(y, y_autocast)
    for name in NAMES:
        assert torch.equal(gradients[name], gradients_compiled[name]), name
        assert torch.equal(gradients[name], gradients_checkpoint[name]), name


# What csrc/bidirectional_ssd/cuda.cu takes: headdim 64, dstate 64 or 128, bfloat16 or float16; without gradients. On
# CPU tensors these are tests of the CPU kernel, or of cuda.cu compiled for the host (tests/csrc/test_cuda_on_host.py).


def fused(arguments, device, **options):
    tensors, rest = split({n: t.to(device) for n, t in arguments.items()})
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    return ops.bidirectional_ssd(*tensors, **rest, backend=device, **options).cpu()


def rounded(arguments, dtype, **options):
    """Plain torch as tensor cores would have it: products of rounded factors."""
    with torch.autocast("cpu", dtype):
        return fallback(arguments, **options)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    "regime, diagonal, kind, dstate, dtype",
    [
        ("separate", "both", "cu_seqlens", 128, torch.bfloat16),
        ("separate", "shifted", "seq_lens", 64, torch.float16),
        ("separate", "once", "all", 64, torch.bfloat16),
        ("hydra", "both", "all", 64, torch.float16),
        ("hydra", "shifted", "seq_lens", 128, torch.bfloat16),
        ("hydra", "once", "cu_seqlens", 64, torch.bfloat16),
        ("quasiseparable", "both", "seq_lens", 64, torch.bfloat16),
        ("tied", "shifted", "cu_seqlens", 64, torch.float16),
        ("tied", "once", "all", 128, torch.float16),
    ],
)
def test_fused_matches_the_recurrence(regime, diagonal, kind, dstate, dtype, device):
    """At most twice the error of plain torch with products in that precision."""
    batch, length = {"all": (1, 64), "seq_lens": (3, 130), "cu_seqlens": (1, 150)}[kind]
    skips = {"D"} if regime == "tied" else set()  # whose sum an x that is shared takes
    arguments = scan_arguments(batch, length, 2, 64, 2, dstate, per_direction=REGIMES[regime] | skips, dtype=dtype)
    arguments["dt"] = arguments["dt"] - 2  # states that outlive a chunk
    options = dict(dt_softplus=True, dt_limit=(0.02, 1.5), diagonal=diagonal, **sequences(kind, batch, length))
    exact = oracle(to_double(arguments), **options)
    got = fused(arguments, device, **options)
    assert got.dtype == dtype
    no_worse_than_torch(got, rounded(arguments, dtype, **options), exact, 2)


@settings(deadline=None, max_examples=5)
@given(
    regime=st.sets(st.sampled_from(NAMES)),
    diagonal=st.sampled_from(DIAGONALS),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.integers(0, 140),
    groups=st.integers(1, 2),
    heads_per_group=st.integers(1, 2),
    dstate=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    softplus=st.booleans(),
    strided=st.booleans(),
)
def test_fused_any_regime_and_stride(
    regime, diagonal, kind, length, groups, heads_per_group, dstate, dtype, softplus, strided
):  # fmt: skip
    batch = 1 if kind == "cu_seqlens" else 2
    arguments = scan_arguments(
        batch, length, groups * heads_per_group, 64, groups, dstate, per_direction=regime, dtype=dtype, strided=strided
    )
    options = dict(dt_softplus=softplus, dt_limit=(0.0, 2.0), diagonal=diagonal, **sequences(kind, batch, length))
    exact, torchs = oracle(to_double(arguments), **options), rounded(arguments, dtype, **options)
    for device in devices():
        got = fused(arguments, device, **options)
        no_worse_than_torch(got, torchs, exact, 2)
        if strided:  # read value by value, not in pieces
            same_bits(got, fused({n: t.contiguous() for n, t in arguments.items()}, device, **options))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    "regime, diagonal, dtype",
    [
        ("separate", "shifted", torch.bfloat16),
        ("separate", "both", torch.float16),
        ("hydra", "shifted", torch.float16),
        ("tied", "once", torch.bfloat16),
    ],
)
def test_fused_padded_equals_alone(regime, diagonal, dtype, device):
    """Bit for bit, with NaN and Inf in the padding; padded outputs are zero. Packed, too."""
    lengths, longest = [70, 1, 0, 64], 75
    arguments = scan_arguments(4, longest, 1, 64, 1, 64, per_direction=REGIMES[regime], dtype=dtype)
    frames = {n: (arguments[n].dim() > d) for n, d in dict(x=4, dt=3, B=4, C=4).items()}  # name: per direction

    def part(tensor, leading, row, frames):
        return tensor[:, row : row + 1, frames] if leading else tensor[row : row + 1, frames]

    for name, leading in frames.items():
        for row, length in enumerate(lengths):
            padding = part(arguments[name], leading, row, slice(length, None))
            padding[..., ::2], padding[..., 1::2] = float("nan"), float("inf")
    options = dict(dt_softplus=True, diagonal=diagonal)
    y = fused(arguments, device, **options, seq_lens=torch.tensor(lengths))
    rows, together = [], []
    for row, length in enumerate(lengths):
        rows.append({n: part(arguments[n], leading, row, slice(length)) for n, leading in frames.items()})
        alone = fused({**arguments, **rows[row]}, device, **options)
        same_bits(part(y, frames["x"], row, slice(length)), alone)
        assert not part(y, frames["x"], row, slice(length, None)).any()
        together.append(alone)
    packed = {n: torch.cat([row[n] for row in rows], dim=-2 if n == "dt" else -3) for n in frames}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    same_bits(fused({**arguments, **packed}, device, **options, cu_seqlens=bounds), torch.cat(together, dim=-3))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("big", ["weights", "states"])
@pytest.mark.parametrize("regime", ["separate", "hydra"])
def test_fused_float16_beyond_its_range(regime, big, device):
    """Weights and states of float16 arguments are sums beyond float16's largest value."""
    arguments = scan_arguments(1, 140, 1, 64, 1, 64, per_direction=REGIMES[regime], dtype=torch.float16)
    sizes = dict(weights=dict(x=0.001, B=300, C=300), states=dict(x=300, B=1500, C=0.0002))[big]
    arguments.update({n: arguments[n] * size for n, size in sizes.items()})
    exact = oracle(to_double(arguments), dt_softplus=True)
    assert exact.abs().max() < torch.finfo(torch.float16).max
    got = fused(arguments, device, dt_softplus=True).double()
    assert (got - exact).abs().max() <= 2**-9 * exact.abs().max()


def test_what_the_fused_kernel_does_not_take_is_tritons(monkeypatch):
    """As does every gradient, which it has none of its own for."""
    monkeypatch.setattr(dispatch, "_cuda_kernels", {"bidirectional_ssd"})
    monkeypatch.setattr(dispatch, "_cuda_problem", None)
    monkeypatch.setattr(dispatch, "_triton_problem", lambda: None)
    monkeypatch.setattr(dispatch, "_problem_of", lambda device, architectures: None)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    ran = []
    monkeypatch.setattr(dispatch, "operator", lambda op, backend: ran.append(backend) or (lambda x, *_: x))

    def picked(backend, **change):
        size = {"headdim": 64, "dstate": 128, "dtype": torch.bfloat16, **change}
        B_dtype = size.pop("B_dtype", size["dtype"])
        arguments = scan_arguments(1, 3, 2, size["headdim"], 1, size["dstate"], dtype=size["dtype"])
        arguments["B"] = arguments["B"].to(B_dtype)
        tensors, rest = split({n: t.to("meta") for n, t in arguments.items()})
        ops.bidirectional_ssd(*tensors, **rest, backend=backend)
        return ran[-1]

    assert picked("cuda") == picked("cuda", dstate=64) == picked("cuda", dtype=torch.float16) == "cuda"
    for change in (dict(headdim=32), dict(dstate=96), dict(dtype=torch.float32), dict(B_dtype=torch.float16)):
        assert picked("cuda", **change) == "triton"
    cuda = torch.device("cuda")
    assert dispatch.pick("bidirectional_ssd", cuda) == "triton"
    assert dispatch.pick("ssd", cuda, prefer=("cuda", "triton"), cuda_takes=False) == "triton"
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "_cuda_kernels", {"bidirectional_ssd"})
    ours = torch.ops.linconv
    assert dispatch.operator("bidirectional_ssd", "cuda") == ours.bidirectional_ssd
    assert dispatch.operator("bidirectional_ssd_backward", "cuda") == ours.bidirectional_ssd_backward_triton
    monkeypatch.setattr(dispatch, "_triton_problem", lambda: "it is not here")
    with pytest.raises(ValueError, match="backend='cuda' cannot run bidirectional_ssd: "):
        picked("cuda", headdim=32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 9, 4)), ValueError, r"x has shape \(2, 9, 4\), wanted \(batch, L, heads, headdim\)"),
        (dict(x=torch.zeros(2, 9, 4, 300, dtype=torch.float64)), ValueError, "headdim is 300"),
        (dict(dt=torch.zeros(2, 8, 4).double()), ValueError, "dt has shape .* with batch = 2, L = 9, heads = 4"),
        (dict(dt=torch.zeros(2, 9, 4, dtype=torch.int64)), TypeError, "dt has dtype torch.int64"),
        (dict(A=torch.zeros(4, dtype=torch.float32)), TypeError, "A is torch.float32 and x is torch.float64"),
        (dict(A=torch.zeros(3, 4).double()), ValueError, r"A has shape \(3, 4\), wanted \(heads,\) or \(2, heads\)"),
        (dict(B=torch.zeros(2, 9, 3, 3, dtype=torch.float64)), ValueError, "B has 3 groups|C has shape"),
        (dict(C=torch.zeros(2, 9, 2, 4, dtype=torch.float64)), ValueError, "C has shape .* dstate = 3"),
        (dict(D="no"), TypeError, "D is str"),
        (dict(dt_limit=(2.0, 1.0)), ValueError, "dt_limit is"),
        (dict(dt_limit=(1.0,)), TypeError, r"dt_limit is \(1.0,\), wanted \(low, high\), two numbers"),
        (dict(diagonal="twice"), ValueError, "diagonal is 'twice', wanted one of 'both', 'once', 'shifted'"),
        (dict(seq_lens=torch.tensor([10, 1])), ValueError, "seq_lens holds 10"),
        (dict(seq_lens=torch.tensor([1, 1]), cu_seqlens=torch.tensor([0, 9])), ValueError, "at most one"),
        (dict(backend="gpu"), ValueError, "backend='gpu'"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = {**scan_arguments(2, 9), **change}
    tensors = [arguments.pop(n) for n in NAMES[:5]]
    with pytest.raises(error, match=message):
        ops.bidirectional_ssd(*tensors, **arguments)


def test_the_kernel_checks_what_it_reads():
    x, dt, A, B, C, D, dt_bias = scan_arguments(2, 9).values()
    call = torch.ops.linconv.bidirectional_ssd
    rest = (D, dt_bias, True, 0.0, 1.0, "both", None, None)
    with pytest.raises(RuntimeError, match="dt has size 8"):
        call(x, dt[:, :8], A, B, C, *rest)
    with pytest.raises(RuntimeError, match="A is not of the math dtype"):
        call(x, dt, A.float(), B, C, *rest)
    with pytest.raises(RuntimeError, match="diagonal"):
        call(x, dt, A, B, C, *rest[:5], "none", None, None)
