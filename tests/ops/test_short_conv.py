import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DTYPES, device, gradients, here, no_worse_than_torch, on_instruction_set, same_bits  # noqa: F401

from linconv.ops import dispatch
from linconv.ops.short_conv import bidirectional_short_conv, short_conv

pytestmark = pytest.mark.skipif(not dispatch.compiled("short_conv"), reason="the compiled library is not there")
BACKENDS = ("compiled", "reference")


def loop(x, weight, bias=None, *, activation="silu", reverse=False, lookahead=0, seq_lens=None, cu_seqlens=None):
    """The definition, one frame and one tap after another."""
    batch, length, _ = x.shape
    width = weight.shape[1]
    if cu_seqlens is not None:
        spans = [(0, a, b) for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    else:
        ends = [length] * batch if seq_lens is None else seq_lens.tolist()
        spans = [(row, 0, end) for row, end in enumerate(ends)]
    y = x * 0  # part of the graph even where there is no frame
    for row, begin, end in spans:
        for t in range(begin, end):
            total = torch.zeros_like(x[row, t]) if bias is None else bias
            for k in range(width):
                ahead = k - (width - 1) + lookahead
                tap = t - ahead if reverse else t + ahead
                if begin <= tap < end:
                    total = total + weight[:, k] * x[row, tap]
            y[row, t] = F.silu(total) if activation == "silu" else total
    return y


def loop_both(x, weight, bias=None, **options):
    x = x if x.dim() == 4 else (x, x)
    return torch.stack(
        [loop(x[i], weight[i], None if bias is None else bias[i], reverse=i == 1, **options) for i in (0, 1)]
    )


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@st.composite
def problems(draw):
    batch, length = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 3, 8, 13, 41]))
    channels, width = draw(st.sampled_from([1, 3, 8, 16, 37])), draw(st.integers(2, 8))
    options = dict(activation=draw(st.sampled_from(["silu", None])))
    kind = draw(st.sampled_from(["whole", "seq_lens", "cu_seqlens"]))
    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    if kind == "seq_lens":
        lengths = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
        options["seq_lens"] = torch.tensor(lengths, dtype=integer)
    elif kind == "cu_seqlens":
        batch = 1
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=integer)
    return batch, length, channels, width, draw(st.booleans()), options


def agrees_with_the_definition(convolution, definition, inputs, upstream, options, backend):
    wanted, wanted_gradients = gradients(lambda *t: definition(*t, **options), inputs, upstream)
    got, got_gradients = gradients(lambda *t: convolution(*t, **options, backend=here(backend)), inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for g, w in zip(got_gradients, wanted_gradients):
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def one_direction_agrees(problem, reverse, lookahead, backend="compiled"):
    batch, length, channels, width, has_bias, options = problem
    options = options | dict(reverse=reverse, lookahead=min(lookahead, width - 1))
    inputs = [random(batch, length, channels), random(channels, width), random(channels) if has_bias else None]
    agrees_with_the_definition(short_conv, loop, inputs, random(batch, length, channels), options, backend)


def both_directions_agree(problem, shared, backend="compiled"):
    batch, length, channels, width, has_bias, options = problem
    x = random(batch, length, channels) if shared else random(2, batch, length, channels)
    inputs = [x, random(2, channels, width), random(2, channels) if has_bias else None]
    upstream = random(2, batch, length, channels)
    agrees_with_the_definition(bidirectional_short_conv, loop_both, inputs, upstream, options, backend)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.booleans(), st.integers(0, 7), st.sampled_from(BACKENDS))
def test_oracle_one_direction(problem, reverse, lookahead, backend):
    one_direction_agrees(problem, reverse, lookahead, backend)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), st.booleans(), st.sampled_from(BACKENDS))
def test_oracle_both_directions(problem, shared, backend):
    both_directions_agree(problem, shared, backend)


@pytest.mark.parametrize("length, channels", [(255, 256), (257, 300), (600, 513)])
def test_oracle_across_blocks(length, channels):
    """Blocks of frames and of channels meet without a seam."""
    inputs = [random(1, length, channels), random(2, channels, 4), random(2, channels)]
    upstream = random(2, 1, length, channels)
    wanted, got = (
        gradients(lambda *t, b=backend: bidirectional_short_conv(*t, backend=b), inputs, upstream)
        for backend in ("reference", here())
    )
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width, channels", [(4, 64), (7, 40), (2, 19)])
def test_oracle_low_precision(dtype, width, channels):
    """Errors are those of torch's own operators in the same precision, at most twice; three times for gradients."""
    length = 300
    x, weight, bias = (random(*shape, dtype=dtype) for shape in ((2, length, channels), (channels, width), (channels,)))
    upstream = random(2, length, channels, dtype=dtype)

    def in_torch(x, weight, bias):
        return F.silu(F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], bias, groups=channels)).mT

    exact, exact_gradients = gradients(in_torch, [t.double() for t in (x, weight, bias)], upstream.double())
    theirs, their_gradients = gradients(in_torch, [x, weight, bias], upstream)
    ours, our_gradients = gradients(lambda *t: short_conv(*t, backend=here()), [x, weight, bias], upstream)
    no_worse_than_torch(ours, theirs, exact, 2, "y")
    for name, *parts in zip(("x", "weight", "bias"), our_gradients, their_gradients, exact_gradients):
        no_worse_than_torch(*parts, 3, f"gradient of {name}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has two instruction sets to choose from")
def test_other_instruction_set():
    on_instruction_set("v3", __file__, "oracle or alone")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
def test_padded_is_alone(dtype, shared):
    padded_is_alone(dtype, shared, [0, 1, 5, 290, 300], 300)


def padded_is_alone(dtype, shared, lengths, length):
    """Bit for bit, whatever stands in the padding; results and gradients there are zeros."""
    channels = 24
    x = random(1 if shared else 2, len(lengths), length, channels, dtype=dtype)
    weight, bias = random(2, channels, 4, dtype=dtype), random(2, channels, dtype=dtype)
    upstream = random(2, len(lengths), length, channels, dtype=dtype)
    padded, padded_upstream = x.clone(), upstream.clone()
    for row, n in enumerate(lengths):
        padded[:, row, n:] = torch.nan if row % 2 else torch.inf
        padded_upstream[:, row, n:] = torch.nan
    alone = [
        gradients(
            lambda *t: bidirectional_short_conv(*t, backend=here()),
            [(x[0] if shared else x)[..., row : row + 1, :n, :], weight, bias],
            upstream[:, row : row + 1, :n],
        )
        for row, n in enumerate(lengths)
    ]
    y, (grad_x, grad_weight, grad_bias) = gradients(
        lambda *t: bidirectional_short_conv(*t, seq_lens=torch.tensor(lengths), backend=here()),
        [padded[0] if shared else padded, weight, bias],
        padded_upstream,
    )
    for row, n in enumerate(lengths):
        same_bits(y[:, row : row + 1, :n], alone[row][0])
        same_bits(grad_x[..., row : row + 1, :n, :], alone[row][1][0])
        assert not y[:, row, n:].any() and not grad_x[..., row, n:, :].any()
    assert grad_weight.isfinite().all() and grad_bias.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse, lookahead", [(False, 0), (True, 0), (False, 3)])
def test_packed_is_alone(dtype, reverse, lookahead):
    packed_is_alone(dtype, reverse, lookahead, [3, 0, 1, 300, 7])


def packed_is_alone(dtype, reverse, lookahead, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, weight = random(1, sum(lengths), 24, dtype=dtype), random(24, 7, dtype=dtype)
    upstream = random(1, sum(lengths), 24, dtype=dtype)

    def conv(x, weight, **options):
        return short_conv(x, weight, reverse=reverse, lookahead=lookahead, backend=here(), **options)

    y, (grad_x, _) = gradients(lambda *t: conv(*t, cu_seqlens=bounds), [x, weight], upstream)
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:]):
        alone, (alone_grad, _) = gradients(conv, [x[:, a:b], weight], upstream[:, a:b])
        same_bits(y[:, a:b], alone)
        same_bits(grad_x[:, a:b], alone_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    views_are_as_copies(dtype, 2, 70)


def views_are_as_copies(dtype, batch, length, names=()):
    """Slices, transposes and expansions give what contiguous copies give; all of them, or those of these names."""
    channels = 40
    weight, bias = random(2, channels, 4, dtype=dtype), random(2, channels, dtype=dtype)
    projection = random(batch, length, 3 * channels + 5, dtype=dtype)
    views = {
        "slice": projection[..., 7 : 7 + channels],
        "every other channel": projection[..., : 2 * channels : 2],
        "channels first": random(batch, channels, length, dtype=dtype).mT,
        "one frame for all": projection[:, :1, :channels].expand(-1, length, -1),
        "one channel for all": projection[..., :1].expand(-1, -1, channels),
        "per direction": projection[..., : 2 * channels].unflatten(-1, (2, channels)).movedim(2, 0),
    }
    for name in names or views:
        view = views[name]
        inputs = (view, weight.mT.contiguous().mT, bias.mT.contiguous().mT)
        upstream = random(2, 1, 1, channels, dtype=dtype).expand(2, batch, length, channels)
        assert not view.is_contiguous(), name
        got = bidirectional_short_conv(*inputs, backend=here())
        same_bits(got, bidirectional_short_conv(view.contiguous(), weight, bias, backend=here()))
        op = dispatch.operator("short_conv_backward", here())
        four = view if view.dim() == 4 else view[None]
        for g, w in zip(
            op(upstream, four, *inputs[1:], True, False, 0, None, None),
            op(upstream.contiguous(), four.contiguous(), weight, bias, True, False, 0, None, None),
        ):
            same_bits(g, w)


def test_frames_far_apart():
    """Offsets beyond 32 bits: frames 2^31 elements apart. Memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((1, 2, 8), (0, 2**31, 1))
    far.copy_(random(1, 2, 8))
    weight = random(8, 3, dtype=torch.bfloat16)
    same_bits(short_conv(far, weight, backend=here()), short_conv(far.contiguous(), weight, backend=here()))


def test_parameters_in_another_precision():
    """fp32 parameters on bf16 activations, as under autocast, are not rounded; gradients come in each one's dtype."""
    x, weight, bias = random(1, 20, 16, dtype=torch.bfloat16), random(16, 4).float(), random(16).float()
    upstream = random(1, 20, 16)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, grads = gradients(lambda *t: short_conv(*t, backend=here()), [x, weight, bias], upstream)
    exact = short_conv(x.float(), weight, bias, backend=here())
    same_bits(y, exact.bfloat16())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_deterministic_for_any_number_of_threads():
    inputs = [random(3, 700, 300).float(), random(2, 300, 4).float(), random(2, 300).float()]
    upstream = random(2, 3, 700, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            y, grads = gradients(lambda *t: bidirectional_short_conv(*t, backend=here()), inputs, upstream)
            results.append([y, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            same_bits(a, b)


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck(activation):
    x, weight, bias = (t.requires_grad_() for t in (random(2, 5, 3), random(2, 3, 4), random(2, 3)))
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(
        lambda *t: bidirectional_short_conv(*t, activation=activation, seq_lens=lengths, backend=here()),
        (x, weight, bias),
    )


def test_second_derivative_is_refused():
    x, weight = random(1, 5, 3).requires_grad_(), random(3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(short_conv(x, weight, backend=here()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shared, lengths", [(True, None), (False, torch.tensor([9, 4]))])
def test_opcheck(shared, lengths):
    x, weight, bias = random(1 if shared else 2, 2, 9, 6), random(2, 6, 4), random(2, 6)
    rest = (True, False, 0, None if lengths is None else lengths.to(x.device), None)
    differentiable = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.linconv.short_conv.default, (*differentiable, *rest))
    torch.library.opcheck(torch.ops.linconv.short_conv_backward.default, (random(2, 2, 9, 6), x, weight, bias, *rest))


def test_compile_and_checkpoint():
    inputs = [random(2, 20, 16).float(), random(2, 16, 4).float(), random(2, 16).float()]
    upstream = random(2, 2, 20, 16)
    # Made out here: compiled by torch 2.11, torch.tensor takes no notice of a default device.
    lengths = torch.tensor([20, 11])

    def conv(x, weight, bias):
        return bidirectional_short_conv(x * 2, weight, bias, seq_lens=lengths, backend=here())

    def checkpointed(*t):
        return torch.utils.checkpoint.checkpoint(conv, *t, use_reentrant=False)

    plain = gradients(conv, inputs, upstream)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for other in (gradients(compiled, inputs, upstream), gradients(checkpointed, inputs, upstream)):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)


X, W = torch.zeros(2, 5, 3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((None, W), {}, TypeError, "x is NoneType"),
        ((X[0], W), {}, ValueError, r"x has shape \(5, 3\)"),
        ((X.int(), W), {}, TypeError, "x has dtype torch.int32"),
        ((X, W[:2]), {}, ValueError, r"weight has shape \(2, 4\), wanted \(channels, width\) = \(3, any\)"),
        ((X, W.double()), {}, TypeError, "weight is torch.float64 and x is torch.float32"),
        ((X, torch.zeros(3, 9)), {}, ValueError, "weight has width 9, wanted 2 to 8"),
        ((X, W, torch.zeros(4)), {}, ValueError, r"bias has shape \(4,\)"),
        ((X, W), dict(activation="relu"), ValueError, "activation is 'relu'"),
        ((X, W), dict(lookahead=4), ValueError, "lookahead is 4, wanted 0 to width - 1 = 3"),
        ((X, W), dict(lookahead=0.5), TypeError, "lookahead is float"),
        ((X, W), dict(seq_lens=torch.tensor([6, 1])), ValueError, "seq_lens holds 6"),
        ((X, W), dict(seq_lens=torch.tensor([1.0, 1])), TypeError, "seq_lens has dtype"),
        ((X, W), dict(cu_seqlens=torch.tensor([0, 5])), ValueError, "cu_seqlens is given with a batch of 2"),
        ((X[:1], W), dict(cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens runs from 0 to 4"),
        ((X, W), dict(backend="gpu"), ValueError, "backend='gpu'"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        short_conv(*arguments, **options)


def test_bad_arguments_of_both_directions():
    with pytest.raises(ValueError, match=r"x has shape \(3, 2, 5, 3\)"):
        bidirectional_short_conv(torch.zeros(3, 2, 5, 3), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="weight has shape"):
        bidirectional_short_conv(X, W)


@pytest.mark.parametrize(
    "x, weight, bias, lookahead, lengths, message",
    [
        (X, W[None], None, 0, None, "x has 3 dimensions"),
        (X[None], torch.zeros(1, 4, 4), None, 0, None, "x has size 3 in dimension 3, wanted 4"),
        (X[None], W[None], torch.zeros(1, 2), 0, None, "bias has size 2"),
        (X[None], torch.zeros(1, 3, 12), None, 0, None, "weight has width 12"),
        (X[None], W[None], None, 9, None, "lookahead is 9"),
        (X[None], W[None], None, 0, torch.zeros(3, dtype=torch.int64), "seq_lens has 3 elements"),
        (X[None].int(), W[None], None, 0, None, "x has dtype Int"),
    ],
)
def test_operator_checks_what_it_reads(x, weight, bias, lookahead, lengths, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linconv.short_conv(x, weight, bias, True, False, lookahead, lengths, None)


@pytest.mark.parametrize("lengths", [[9, 9], [-1, 0]])
def test_lengths_outside_the_tensor(lengths):
    """The CPU operator refuses them; a GPU's, which must not wait for the values, reads and writes nothing outside."""
    arguments = X.new_ones(1, 2, 5, 3), W[None], None, True, False, 0, torch.tensor(lengths, device="cpu"), None
    with pytest.raises(RuntimeError, match=r"seq_lens\[0\] is -?\d, wanted 0 to 5"):
        torch.ops.linconv.short_conv(*arguments)
