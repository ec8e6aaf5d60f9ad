import functools
import os
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import device, here, on_instruction_set, same_bits  # noqa: F401
from scan_cases import assert_close, to_double, with_gradients

from linconv import ops
from linconv.ops import dispatch
from linconv.ops.selective_scan import reference

pytestmark = pytest.mark.skipif(not dispatch.compiled("selective_scan"), reason="the compiled library is not built")

FRAMES = ("x", "dt", "B", "C", "z")  # what has a frame axis


def arguments_of(batch, length, channels=6, groups=2, dstate=3, *, dtype=torch.float64, strided=False, states=None):
    """By name; strided: views whose elements are apart in every dimension; states: of how many sequences, or none."""
    math = torch.promote_types(dtype, torch.float32)

    def frames(*shape):
        shape = (batch, length, *shape)
        if strided:
            wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)[..., 1::2]
            return wide.transpose(-2, -1).clone(memory_format=torch.contiguous_format).transpose(-2, -1)
        return torch.randn(*shape, dtype=dtype)

    found = dict(
        x=frames(channels),
        dt=frames(channels),
        A=-torch.rand(channels, dstate, dtype=math) - 0.1,
        B=frames(groups, dstate),
        C=frames(groups, dstate),
        D=torch.randn(channels, dtype=math),
        z=frames(channels),
        dt_bias=torch.randn(channels, dtype=math),
    )
    if states is not None:
        found["initial_states"] = torch.randn(states, channels, dstate, dtype=math)
    return found


def scan(backend=None):
    def run(arguments, **options):
        arguments = dict(arguments)
        tensors = [arguments.pop(n) for n in ("x", "dt", "A", "B", "C")]
        backend_ = here() if backend is None else backend
        return ops.selective_scan(*tensors, **arguments, return_final_states=True, backend=backend_, **options)

    return run


def oracle(arguments, scan=reference.recurrence, **options):
    arguments = dict(arguments)
    tensors = [arguments.pop(n) for n in ("x", "dt", "A", "B", "C")]
    return reference.selective_scan(*tensors, **arguments, scan=scan, **options)


doubling = functools.partial(oracle, scan=reference.doubling)


def sequences_of(kind, length):
    """The batch, how many sequences are in it, and the option that says where."""
    if kind == "seq_lens":
        return 2, 2, {"seq_lens": torch.tensor([length, length // 3])}
    if kind == "cu_seqlens":
        return 1, 3, {"cu_seqlens": torch.tensor([0, 0, length // 3, length])}
    return 2, 2, {}


@settings(deadline=None, max_examples=60)
@given(
    function=st.sampled_from([scan(), scan(), doubling]),
    reverse=st.booleans(),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.integers(0, 140),
    groups=st.integers(1, 3),
    group_channels=st.sampled_from([1, 5, 16, 37, 70, 130]),
    dstate=st.sampled_from([1, 2, 5, 16, 33]),
    strided=st.booleans(),
    started=st.booleans(),
    softplus=st.booleans(),
    absent=st.sets(st.sampled_from(["D", "z", "dt_bias"])),
)
def test_matches_the_recurrence(
    function, reverse, kind, length, groups, group_channels, dstate, strided, started, softplus, absent
):  # fmt: skip
    batch, sequences, options = sequences_of(kind, length)
    arguments = arguments_of(
        batch, length, groups * group_channels, groups, dstate, strided=strided, states=sequences if started else None
    )
    if not softplus:  # as a step is: above zero
        arguments["dt"] = arguments["dt"].abs()
        arguments["dt_bias"] = arguments["dt_bias"].abs()
    for name in absent:
        del arguments[name]
    options.update(dt_softplus=softplus, reverse=reverse)
    (y, states), gradients = with_gradients(function, arguments, **options)
    (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments, **options)
    assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


@settings(deadline=None, max_examples=25)
@given(
    reverse=st.booleans(),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.sampled_from([0, 1, 1, 2, 37, 90]),
    channels=st.sampled_from([1, 7, 64, 80]),
    dstate=st.sampled_from([1, 5, 16, 33, 200]),
    strided=st.booleans(),
    started=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_lower_precision_matches_the_recurrence(reverse, kind, length, channels, dstate, strided, started, dtype):
    """Results are rounded once: y to its dtype, the math is float32's."""
    batch, sequences, options = sequences_of(kind, length)
    arguments = arguments_of(
        batch, length, channels, 1, dstate, dtype=dtype, strided=strided, states=sequences if started else None
    )
    options.update(dt_softplus=True, reverse=reverse)
    y, states = scan()(arguments, **options)
    wanted_y, wanted_states = oracle(to_double(arguments), **options)
    assert y.dtype == dtype and states.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert_close({"y": y.double()}, {"y": wanted_y}, tolerance)
    assert_close({"states": states.double()}, {"states": wanted_states}, 1e-5)


def test_gradcheck():
    arguments = arguments_of(1, 5, 2, 1, 2, states=1)
    leaves = [t.requires_grad_() for t in arguments.values()]

    def function(options, *tensors):
        return scan()(dict(zip(arguments, tensors)), dt_softplus=True, **options)

    for options in ({"reverse": True}, {"seq_lens": torch.tensor([4])}):
        assert torch.autograd.gradcheck(functools.partial(function, options), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_torch(dtype):
    """At most twice the error of plain torch at the same precision, thrice in gradients.

    Of several draws the worst, on a GPU, where plain torch is fast: the largest error of a draw is that of the one or
    two largest elements of thousands, and so of a dozen roundings.
    """

    def results(function, arguments):
        (y, states), gradients = with_gradients(function, arguments, dt_softplus=True)
        return {"y": y, "states": states, **{f"gradient of {name}": g for name, g in gradients.items()}}

    ours, torchs = defaultdict(float), defaultdict(float)
    for seed in range(8 if torch.get_default_device().type == "cuda" else 1):
        torch.manual_seed(seed)
        arguments = arguments_of(2, 300, 96, 1, 16, dtype=dtype, states=2)
        exact = results(oracle, to_double(arguments))
        for worst, backend in ((ours, scan()), (torchs, scan("reference"))):
            found = results(backend, arguments)
            assert found["y"].dtype == dtype and found["states"].dtype == torch.float32
            for name, argument in arguments.items():
                assert found[f"gradient of {name}"].dtype == argument.dtype
            for name, wanted in exact.items():
                error = (found[name].double() - wanted).abs().max() / wanted.abs().max()
                worst[name] = max(worst[name], error.item())
    for name in ours:
        assert ours[name] <= (3 if "gradient" in name else 2) * torchs[name], name


def test_rates_of_any_sign_and_size():
    """Steps after which nothing is left, of no time, and states that grow: as the formula says, no NaN."""
    arguments = arguments_of(1, 40, 32, 1, 4, dtype=torch.float32)
    arguments["A"] = torch.tensor([-1e6, 0.0, 0.5, -1e-6]).expand(32, 4).clone()
    arguments["dt"][:, 10:20] = -1e4  # softplus of it is zero
    arguments["dt"][:, 30] = 50
    y, states = scan()(arguments, dt_softplus=True)
    wanted_y, wanted_states = oracle(to_double(arguments), dt_softplus=True)
    assert_close({"y": y.double(), "states": states.double()}, {"y": wanted_y, "states": wanted_states}, 1e-5)


def test_one_scan_is_two_with_the_state_handed_over():
    arguments = arguments_of(2, 150)
    y, states = scan()(arguments)
    first, second = (
        {n: t[:, part] if n in FRAMES else t for n, t in arguments.items()} for part in (slice(70), slice(70, None))
    )
    y_first, handed = scan()(first)
    y_second, last = scan()({**second, "initial_states": handed})
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y)
    torch.testing.assert_close(last, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [37, 90])
def test_padded_is_alone(length, reverse, dtype):
    """Bit for bit, gradients too; what stands in the padding is never read, and leaves it as zero.

    Rows of one chunk and of several, which begin where no multiple of 16 bytes is.
    """
    arguments = arguments_of(2, 99, 78, 2, 16, dtype=dtype, states=2)
    for name in FRAMES:
        arguments[name][1, length:] = float("nan")

    def run(arguments, upstream, **options):
        leaves = {n: t.detach().requires_grad_() for n, t in arguments.items()}
        y, states = scan()(leaves, dt_softplus=True, reverse=reverse, **options)
        return y, states, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream)))

    upstream = torch.randn(2, 99, 78).to(dtype)
    upstream[1, length:] = float("nan")
    y, states, gradients = run(arguments, upstream, seq_lens=torch.tensor([99, length]))
    own = {n: t[1:, :length] if n in FRAMES else t for n, t in arguments.items()}
    own["initial_states"] = arguments["initial_states"][1:]
    alone, alone_states, alone_gradients = run(own, upstream[1:, :length])
    same_bits(y[1:, :length], alone)
    same_bits(states[1:], alone_states)
    assert not y[1, length:].any()
    for name in FRAMES:
        same_bits(gradients[name][1:, :length], alone_gradients[name])
        assert not gradients[name][1, length:].any()
    same_bits(gradients["initial_states"][1:], alone_gradients["initial_states"])
    assert all(g.isfinite().all() for g in gradients.values())


def test_packed_is_alone():
    arguments = arguments_of(1, 90, 80, 2, 16, dtype=torch.float32)
    y, states = scan()(arguments, dt_softplus=True, cu_seqlens=torch.tensor([0, 41, 90], dtype=torch.int32))
    alone = [
        scan()({n: t[:, part] if n in FRAMES else t for n, t in arguments.items()}, dt_softplus=True)
        for part in (slice(41), slice(41, None))
    ]
    same_bits(y, torch.cat([a for a, _ in alone], dim=1))
    same_bits(states, torch.cat([h for _, h in alone]))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_no_packed_sequence_at_all(backend):
    arguments = {n: t.bfloat16().requires_grad_() for n, t in arguments_of(1, 0).items()}
    y, states = scan(here(backend))(arguments, cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 6) and states.shape == (0, 6, 3)
    assert y.dtype == torch.bfloat16 and states.dtype == torch.float32
    y.sum().backward()
    assert arguments["x"].grad.shape == (1, 0, 6)


@pytest.mark.parametrize("batch, channels", [(0, 4), (2, 0), (1, 5)])
def test_empty(batch, channels):
    arguments = arguments_of(batch, 3, channels, 1, 4, states=batch)
    (y, states), gradients = with_gradients(scan(), arguments)
    (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments)
    assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


def test_the_number_of_threads_does_not_show():
    """Nor how channels are cut for them."""
    arguments = arguments_of(1, 70, 150, 1, 16, dtype=torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            (y, states), gradients = with_gradients(scan(), arguments, dt_softplus=True)
            found.append([y, states, *gradients.values()])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for one, other in zip(found[0], others):
            same_bits(one, other)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has two instruction sets to choose from")
def test_other_instruction_set():
    on_instruction_set("v3", __file__, "test_matches_the_recurrence or test_error_against_torch")


def test_compiles_whole():
    arguments = arguments_of(2, 20, 6, 2, 3, dtype=torch.float32)
    leaves = {n: t.requires_grad_() for n, t in arguments.items()}

    def run(x, dt, A, B, C, rest, lengths):
        return ops.selective_scan(x, dt, A, B, C, **rest, dt_softplus=True, seq_lens=lengths)

    rest = {n: leaves[n] for n in ("D", "z", "dt_bias")}
    inputs = (*(leaves[n] for n in ("x", "dt", "A", "B", "C")), rest, torch.tensor([20, 7]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(compiled, run(*inputs))
    gradients = [torch.autograd.grad(y.sum(), list(leaves.values())) for y in (compiled, run(*inputs))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_opcheck():
    tensors = [t.requires_grad_() for t in arguments_of(1, 9).values()]
    states = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    for rest in ((None, torch.tensor([5]), None, True), (states, None, torch.tensor([0, 4, 9]), False)):
        torch.library.opcheck(torch.ops.linconv.selective_scan.default, (*tensors, True, *rest))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 9)), ValueError, r"x has shape .*, wanted \(batch, L, channels\)"),
        (dict(x=3), TypeError, "x is int, wanted a torch.Tensor"),
        (dict(dt=torch.zeros(2, 9, 1).double()), ValueError, r"dt has shape .*, wanted \(batch, L, channels\)"),
        (dict(A=torch.zeros(6).double()), ValueError, r"A has shape \(6,\), wanted \(channels, dstate\)"),
        (dict(A=torch.zeros(6, 0).double()), ValueError, r"dstate is 0 \(A\), wanted 1 to 256"),
        (dict(B=torch.zeros(2, 9, 2, 4).double()), ValueError, r"B has shape .*, wanted \(batch, L, groups, dstate\)"),
        (
            dict(B=torch.zeros(2, 9, 4, 3).double(), C=torch.zeros(2, 9, 4, 3).double()),
            ValueError,
            "B has 4 groups, wanted a divisor of the 6 channels",
        ),
        (dict(z=torch.zeros(1).double()), ValueError, "z has shape"),
        (dict(D=torch.zeros(6)), TypeError, "D is torch.float32"),
        (dict(initial_states=torch.zeros(2, 3, 6).double()), ValueError, "initial_states has shape"),
        (dict(seq_lens=torch.tensor([9, 10])), ValueError, "seq_lens holds 10, wanted 0 to L = 9"),
        (dict(cu_seqlens=torch.tensor([0, 9])), ValueError, "batch of 1"),
        (dict(backend="mamba_ssm"), ValueError, "backend='mamba_ssm' cannot run selective_scan"),
    ],
)
def test_bad_arguments(change, error, message):
    if "holds" in message and here() != "cpu":
        pytest.skip("only a host reads lengths before it runs")
    change = {n: t.to(torch.get_default_device()) if isinstance(t, torch.Tensor) else t for n, t in change.items()}
    arguments = {**arguments_of(2, 9), **change}
    tensors = [arguments.pop(n) for n in ("x", "dt", "A", "B", "C")]
    with pytest.raises(error, match=message):
        ops.selective_scan(*tensors, **arguments)


def test_the_kernel_checks_what_it_reads():
    tensors = list(arguments_of(2, 9).values())
    for i, (wrong, message) in enumerate(
        [
            (torch.zeros(2, 9, 6, 1), "x has 4 dimensions"),
            (torch.zeros(2, 9, 5), "dt has size 5 in dimension 3, wanted 6"),
            (torch.zeros(6, 4), "A has size 4 in dimension 1, wanted 3"),
            (torch.zeros(2, 9, 4, 3), "B has 4 groups, wanted a divisor"),
            (torch.zeros(2, 8, 2, 3), "C has size 8 in dimension 1, wanted 9"),
            (torch.zeros(5), "D has size 5"),
            (torch.zeros(2, 9, 5), "z has size 5"),
            (torch.zeros(5), "dt_bias has size 5"),
        ]
    ):
        changed = [*tensors[:i], wrong.double(), *tensors[i + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.linconv.selective_scan(*changed, True, None, None, None, False)
    for i, name in ((2, "A"), (5, "D"), (7, "dt_bias")):
        changed = [*tensors[:i], tensors[i].float(), *tensors[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"{name} is not of the math dtype"):
            torch.ops.linconv.selective_scan(*changed, True, None, None, None, False)
    with pytest.raises(RuntimeError, match="initial_states is not of the math dtype"):
        torch.ops.linconv.selective_scan(*tensors, True, torch.zeros(2, 6, 3), None, None, False)
    with pytest.raises(RuntimeError, match="initial_states has size 3"):
        torch.ops.linconv.selective_scan(*tensors, True, torch.zeros(3, 6, 3).double(), None, None, False)


def test_the_cpu_kernel_refuses_float64_among_others():
    tensors = [tensor.cpu() for tensor in arguments_of(2, 9).values()]
    for i, name in ((1, "dt"), (3, "B"), (4, "C"), (6, "z")):
        changed = [*tensors[:i], tensors[i].float(), *tensors[i + 1 :]]
        with pytest.raises(RuntimeError, match=f"of {name} and x one is float64, wanted both or neither"):
            torch.ops.linconv.selective_scan(*changed, True, None, None, None, False)
