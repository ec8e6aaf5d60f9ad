import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import alike_for_threads, device, here, same_bits, threads  # noqa: F401
from scan_cases import NAMES, assert_close, oracle_one_direction, scan_arguments, split, to_double, with_gradients

from linconv import ops
from linconv.ops import dispatch

pytestmark = pytest.mark.skipif(not dispatch.compiled("ssd"), reason="the compiled library is not built")


def ssd(backend):
    def run(arguments, **options):
        arguments = dict(arguments)
        states = {"initial_states": arguments.pop("initial_states", None)}
        tensors, rest = split(arguments)
        return ops.ssd(*tensors, **rest, **states, return_final_states=True, backend=backend, **options)

    return run


def oracle(arguments, **options):
    arguments = dict(arguments)
    states = arguments.pop("initial_states", None)
    return oracle_one_direction(arguments, initial_states=states, **options)


@settings(deadline=None, max_examples=25)
@given(
    backend=st.sampled_from(["compiled", "reference"]),
    reverse=st.booleans(),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.integers(0, 140),
    groups=st.integers(1, 3),
    headdim=st.sampled_from([1, 7, 64, 80]),
    dstate=st.sampled_from([1, 5, 33, 128]),
    strided=st.booleans(),
    started=st.booleans(),
    number=st.sampled_from([1, 16]),
)
def test_matches_the_recurrence(backend, reverse, kind, length, groups, headdim, dstate, strided, started, number):
    batch = 1 if kind == "cu_seqlens" else 2
    arguments = scan_arguments(batch, length, 2 * groups, headdim, groups, dstate, strided=strided)
    options = dict(dt_softplus=True, reverse=reverse)
    if kind == "seq_lens":
        options["seq_lens"] = torch.tensor([length, length // 3])
    if kind == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 0, length // 3, length])
    if started:
        arguments["initial_states"] = torch.randn(
            3 if kind == "cu_seqlens" else batch, 2 * groups, headdim, dstate
        ).double()
    with threads(number):
        (y, states), gradients = with_gradients(ssd(here(backend)), arguments, **options)
    (wanted_y, wanted_states), wanted = with_gradients(oracle, arguments, **options)
    assert_close({"y": y, "states": states, **gradients}, {"y": wanted_y, "states": wanted_states, **wanted})


@settings(deadline=None, max_examples=25)
@given(
    reverse=st.booleans(),
    kind=st.sampled_from(["all", "seq_lens", "cu_seqlens"]),
    length=st.sampled_from([0, 1, 1, 2, 37]),
    groups=st.integers(1, 3),
    headdim=st.sampled_from([1, 7, 64, 80]),
    dstate=st.sampled_from([1, 5, 33, 128, 200]),
    strided=st.booleans(),
    started=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_forward_matches_the_recurrence(
    reverse, kind, length, groups, headdim, dstate, strided, started, dtype
):  # fmt: skip
    """Results alone: a decode step's kernel has no gradient of its own."""
    batch, sequences = (1, 3) if kind == "cu_seqlens" else (2, 2)
    arguments = scan_arguments(batch, length, 2 * groups, headdim, groups, dstate, strided=strided, dtype=dtype)
    options = dict(dt_softplus=True, dt_limit=(0.1, 1.5), reverse=reverse)
    if kind == "seq_lens":
        options["seq_lens"] = torch.tensor([length, length // 3])
    if kind == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor([0, 0, length // 3, length])
    if started:
        arguments["initial_states"] = torch.randn(sequences, 2 * groups, headdim, dstate).to(arguments["A"].dtype)
    y, states = ssd(here())(arguments, **options)
    wanted_y, wanted_states = oracle(to_double(arguments), **options)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]  # y is rounded once
    assert_close({"y": y.double()}, {"y": wanted_y}, tolerance)
    assert_close({"states": states.double()}, {"states": wanted_states}, min(tolerance, 1e-5))


def test_gradcheck():
    arguments = scan_arguments(1, 5, 2, 2, 1, 2)
    arguments["initial_states"] = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in arguments.values()]

    def function(options, *tensors):
        return ssd(here())(dict(zip(arguments, tensors)), dt_softplus=True, **options)

    for options in ({"reverse": True}, {"seq_lens": torch.tensor([4])}):
        assert torch.autograd.gradcheck(functools.partial(function, options), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_torch(dtype):
    """At most twice the error of plain torch at the same precision, thrice in gradients."""
    arguments = scan_arguments(2, 300, 4, 64, 1, 32, dtype=dtype)

    def plain(arguments, **options):
        # On a GPU gradients are Triton's, whose products take half precision as tensor cores do.
        with torch.autocast("cuda", dtype, enabled=here() == "cuda" and dtype != torch.float32):
            return ssd("reference")(arguments, **options)

    exact, exact_gradients = with_gradients(oracle, to_double(arguments), dt_softplus=True)
    ours, our_gradients = with_gradients(ssd(here()), arguments, dt_softplus=True)
    torchs, _ = with_gradients(ssd("reference"), arguments, dt_softplus=True)
    _, torch_gradients = with_gradients(plain, arguments, dt_softplus=True)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32

    def error(got, wanted):
        return (got.double() - wanted).abs().max() / wanted.abs().max()

    for i in range(2):
        assert error(ours[i], exact[i]) <= 2 * error(torchs[i], exact[i])
    for name in NAMES:
        bound = 3 * error(torch_gradients[name], exact_gradients[name])
        assert error(our_gradients[name], exact_gradients[name]) <= bound, name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype, reverse):
    """Nor those of the states, nor their gradients, with tasks of one chunk, which there are where threads are many."""
    arguments = scan_arguments(3, 300, 6, 20, 2, 9, dtype=dtype)
    arguments["initial_states"] = torch.randn(3, 6, 20, 9)
    options = dict(dt_softplus=True, reverse=reverse, seq_lens=torch.tensor([300, 64, 0]))

    def results():
        (y, states), gradients = with_gradients(ssd(here()), arguments, **options)
        return [y, states, *gradients.values()]

    alike_for_threads(results, (1, 2, 7, 40))


@pytest.mark.parametrize("lengths", [(1_300,), (500, 0, 140, 659, 1), (0, 64, 900, 64, 64, 64, 64, 80)])
@pytest.mark.parametrize("reverse", [False, True])
def test_threads_do_not_change_a_bit_of_many_chunks(reverse, lengths):
    """They are computed some at a time, so that states are carried from one lot to the next, within any sequence."""
    arguments = scan_arguments(1, 1_300, 1, 16, 1, 8, dtype=torch.float32)
    arguments["initial_states"] = torch.randn(len(lengths), 1, 16, 8)
    options = dict(dt_softplus=True, reverse=reverse, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))

    def results():
        (y, states), gradients = with_gradients(ssd(here()), arguments, **options)
        return [y, states, *gradients.values()]

    alike_for_threads(results, (1, 2, 3))


def test_one_scan_is_two_with_the_state_handed_over():
    arguments = scan_arguments(2, 150)
    y, states = ssd(here())(arguments)
    cut = {n: arguments[n] for n in ("A", "D", "dt_bias")}
    first = {**cut, **{n: arguments[n][:, :70] for n in ("x", "dt", "B", "C")}}
    second = {**cut, **{n: arguments[n][:, 70:] for n in ("x", "dt", "B", "C")}}
    y_first, handed = ssd(here())(first)
    y_second, last = ssd(here())({**second, "initial_states": handed})
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y)
    torch.testing.assert_close(last, states)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gate(dtype, backend):
    """Rounded once in plain torch, and behind a kernel, which rounds before the gate, twice."""
    arguments = scan_arguments(2, 20, dtype=dtype)
    z = torch.randn(2, 20, 4, 5).to(dtype if dtype == torch.float64 else torch.float32)
    y, _ = ssd(here(backend))(arguments, z=z)
    assert y.dtype == dtype
    exact = oracle(to_double(arguments))[0] * F.silu(z.double())
    roundings = torch.finfo(dtype).eps / 2 * (1 if backend == "reference" else 2)
    bound = roundings * exact.abs() + 1e-5 if dtype.itemsize == 2 else 16 * torch.finfo(dtype).eps * exact.abs().max()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gate_is_not_read_in_the_padding(reverse, backend):
    arguments = scan_arguments(2, 30, dtype=torch.float32)
    leaves = {**arguments, "z": torch.randn(2, 30, 4, 5)}
    incoming = torch.randn(2, 30, 4, 5)

    def results(padding):
        for name in ("x", "dt", "B", "C", "z"):
            leaves[name][1, 17:] = padding
        incoming[1, 17:] = padding
        fresh = {n: t.clone().requires_grad_() for n, t in leaves.items()}
        own = {n: t for n, t in fresh.items() if n != "z"}
        y, _ = ssd(here(backend))(own, z=fresh["z"], seq_lens=torch.tensor([30, 17]), reverse=reverse)
        return y.detach(), *torch.autograd.grad(y, list(fresh.values()), incoming)

    for got, wanted in zip(results(float("nan")), results(0.0)):
        assert torch.equal(got, wanted)
    y, *_, of_z = results(float("nan"))
    assert not y[1, 17:].any() and not of_z[1, 17:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gated_sequence_is_what_it_is_alone(dtype):
    """Bit for bit, wherever a frame stands in memory: sizes that fill no vector of a CPU's."""
    arguments = scan_arguments(2, 21, heads=3, groups=1, headdim=1, dtype=dtype)
    arguments["z"] = 3 * torch.randn_like(arguments["x"])
    lengths = torch.tensor([21, 13])
    upstream = torch.randn_like(arguments["x"])
    frames = ("x", "dt", "B", "C", "z")
    found = []
    for row in (None, 0, 1):
        of_row = slice(None) if row is None else (slice(row, row + 1), slice(lengths[row]))
        own = {n: (t[of_row] if n in frames else t).clone().requires_grad_() for n, t in arguments.items()}
        gate = own.pop("z")
        y, _ = ssd(here())(own, z=gate, seq_lens=lengths if row is None else None)
        y.backward(upstream[of_row])
        found.append((y, *(own[n].grad for n in frames[:-1]), gate.grad))
    for row, length in enumerate(lengths):
        for padded, alone in zip(found[0], found[1 + row]):
            same_bits(padded[row, :length], alone[0])


def test_the_gate_is_differentiable_twice_by_the_reference():
    arguments = scan_arguments(1, 3, heads=2, groups=1, headdim=2)
    z = torch.tensor([0.0, -0.0, 900.0, -900.0, *range(-4, 4)], dtype=torch.float64).view(1, 3, 2, 2).requires_grad_()

    def gated(z):
        return ssd("reference")(arguments, z=z)[0]

    def product(z):
        return ssd("reference")(arguments)[0] * F.silu(z)

    found = []
    for function in (gated, product):
        (first,) = torch.autograd.grad(function(z).square().sum(), z, create_graph=True)
        found.append((function(z), first, *torch.autograd.grad(first.sum(), z)))
    torch.testing.assert_close(*found)


def test_gate_of_packed_sequences():
    arguments, bounds = scan_arguments(1, 20), torch.tensor([0, 8, 8, 20])
    z = torch.randn(1, 20, 4, 5, dtype=torch.float64)
    gated, _ = ssd(here())(arguments, z=z, cu_seqlens=bounds)
    torch.testing.assert_close(gated, ssd(here())(arguments, cu_seqlens=bounds)[0] * F.silu(z))
    torch.testing.assert_close(gated, ssd("reference")(arguments, z=z, cu_seqlens=bounds)[0])


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_no_packed_sequence_at_all(backend):
    arguments = {n: t.requires_grad_() for n, t in scan_arguments(1, 0, dtype=torch.bfloat16).items()}
    y, states = ssd(here(backend))(arguments, cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 4, 5) and states.shape == (0, 4, 5, 3)
    assert y.dtype == torch.bfloat16 and states.dtype == torch.float32
    y.sum().backward()
    assert arguments["x"].grad.shape == (1, 0, 4, 5)


def test_padding_is_never_read():
    arguments = scan_arguments(2, 100, dtype=torch.float32)
    lengths = torch.tensor([100, 37])
    arguments["initial_states"] = torch.randn(2, 4, 5, 3)
    for name in ("x", "dt", "B", "C"):
        arguments[name][1, 37:] = float("nan")
    for reverse in (False, True):
        y, states = ssd(here())(arguments, seq_lens=lengths, reverse=reverse)
        own = {n: t[1:, :37] if n in ("x", "dt", "B", "C") else t for n, t in arguments.items()}
        own["initial_states"] = arguments["initial_states"][1:]
        alone, alone_states = ssd(here())(own, reverse=reverse)
        assert torch.equal(y[1:, :37], alone) and torch.equal(states[1:], alone_states)
        assert not y[1, 37:].any()


def test_opcheck():
    arguments = [t.requires_grad_() for t in scan_arguments(1, 9).values()]
    states = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    for rest in ((None, torch.tensor([5]), None, True), (states, None, torch.tensor([0, 4, 9]), False)):
        torch.library.opcheck(torch.ops.linconv.ssd.default, (*arguments, True, 0.0, float("inf"), *rest))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 2, 9, 4, 5)), ValueError, r"x has shape .*, wanted \(batch, L, heads, headdim\)"),
        (dict(z=torch.zeros(1)), ValueError, "z has shape"),
        (dict(z=torch.zeros(2, 9, 4, 5)), TypeError, "z is torch.float32 and x is torch.float64"),
        (dict(z=torch.zeros(2, 9, 4, 5, dtype=torch.complex128)), TypeError, "z has dtype torch.complex128"),
        (dict(z=torch.zeros(2, 9, 4, 5, dtype=torch.int64)), TypeError, "z has dtype torch.int64"),
        (dict(z=[1.0]), TypeError, "z is list"),
        (dict(dt_limit=None), TypeError, r"dt_limit is None, wanted \(low, high\)"),
        (dict(dt_limit=0.1), TypeError, "dt_limit is 0.1"),
        (dict(dt_limit=(0, 1, 2)), TypeError, r"dt_limit is \(0, 1, 2\)"),
        (dict(dt_limit=(0, "1")), TypeError, r"dt_limit is \(0, '1'\)"),
        (dict(initial_states=torch.zeros(2, 4, 3, 5).double()), ValueError, "initial_states has shape"),
        (dict(initial_states=torch.zeros(2, 4, 5, 3)), TypeError, "initial_states is torch.float32"),
        (dict(cu_seqlens=torch.tensor([0, 9])), ValueError, "batch of 1"),
    ],
)
def test_bad_arguments(change, error, message):
    where = torch.get_default_device()
    change = {n: t.to(where) if isinstance(t, torch.Tensor) else t for n, t in change.items()}
    arguments = {**scan_arguments(2, 9), **change}
    tensors = [arguments.pop(n) for n in NAMES[:5]]
    with pytest.raises(error, match=message):
        ops.ssd(*tensors, **arguments)


def test_a_gate_elsewhere_is_an_error():
    tensors, rest = split(scan_arguments(2, 9))
    with pytest.raises(ValueError, match="z is on meta, wanted .* as x"):
        ops.ssd(*tensors, **rest, z=tensors[0].to("meta"))
