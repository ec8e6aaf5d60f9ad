"""Convolution and scan as one operator: against loops over time, and against calls of the two."""

import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DTYPES, device, gradients, here, same_bits  # noqa: F401

from linconv.ops import conv_scan, dispatch
from linconv.ops.conv_scan import reference
from linconv.ops.conv_scan.layout import Layout

pytestmark = pytest.mark.skipif(not dispatch.compiled("bidirectional_ssd"), reason="the compiled library is not there")
BACKENDS = ("compiled", "reference")
NAMES = ("xBC", "dt", "conv_weight", "conv_bias", "A", "D", "dt_bias")
# One direction, two of their own x, and two that share x.
FORMS = ("causal", "separate", "shared")
DIAGONALS = dict(causal="both", separate="both", shared="shifted")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def arguments(form, batch=2, length=9, heads=2, headdim=4, groups=1, dstate=3, width=4, bias=True, dtype=torch.float64):
    """Tensors of a call, in its order, and its options."""
    both = (2,) if form == "separate" else ()
    directions = () if form == "causal" else (2,)
    channels = heads * headdim + (4 if form == "shared" else 2) * groups * dstate
    of_heads = (2, heads) if form == "separate" else (heads,)
    math = torch.promote_types(dtype, torch.float32)
    tensors = [
        random(*both, batch, length, channels, dtype=dtype),
        random(*directions, batch, length, heads, dtype=dtype),
        random(*both, channels, width, dtype=dtype),
        random(*both, channels, dtype=dtype) if bias else None,
        -(random(*of_heads).abs() + 0.1).to(math),
        random(*of_heads).to(math),
        random(*of_heads).to(math),
    ]
    lookahead = 0 if form == "separate" else width // 2
    return tensors, dict(dstate=dstate, ngroups=groups, diagonal=DIAGONALS[form], lookahead=lookahead)


def result_like(tensors, options):
    xBC, dt = tensors[:2]
    layout = Layout.of(xBC, dt, options["ngroups"], options["dstate"])
    return random(*xBC.shape[:-1], layout.heads, layout.headdim, dtype=xBC.dtype)


# The definition, frame after frame.


def loop(xBC, dt, conv_weight, conv_bias, A, D, dt_bias, *, dstate, ngroups, diagonal, lookahead, lengths=None):
    batch, length = xBC.shape[-3:-1]
    rows = []
    for b in range(batch):
        n = length if lengths is None else lengths[b]
        sizes, weights = (dstate, ngroups), (conv_weight, conv_bias, A, D, dt_bias)
        if xBC.dim() == 4:
            ways = [[None if w is None else w[i] for w in weights] for i in (0, 1)]
            forward = layer(xBC[0, b, :n], dt[0, b, :n], *ways[0], *sizes, 0)
            backward = layer(xBC[1, b, :n].flip(0), dt[1, b, :n].flip(0), *ways[1], *sizes, 0).flip(0)
            y = torch.stack([forward, backward])
        elif dt.dim() == 3:
            y = layer(xBC[b, :n], dt[b, :n], *weights, *sizes, lookahead)
        else:
            assert diagonal == "shifted"
            y = hydra(xBC[b, :n], dt[:, b, :n], *weights, *sizes, lookahead)
        padding = y.new_zeros(*y.shape[:-3], length - n, *y.shape[-2:])
        rows.append(torch.cat([y, padding], dim=-3))
    return torch.stack(rows, dim=1 if xBC.dim() == 4 else 0)


def convolved(frames, weight, bias, lookahead):
    out = []
    for t in range(len(frames)):
        total = torch.zeros_like(frames[t]) if bias is None else bias
        for k in range(weight.shape[1]):
            at = t - (weight.shape[1] - 1) + k + lookahead
            if 0 <= at < len(frames):
                total = total + weight[:, k] * frames[at]
        out.append(total / (1 + torch.exp(-total)))
    return torch.stack(out) if out else frames


def scanned(x, dt, A, B, C):
    """x (L, heads, headdim), dt (L, heads), B and C (L, heads, dstate)."""
    state, y = x.new_zeros(*x.shape[1:], B.shape[-1]), []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(), dt.unbind(), B.unbind(), C.unbind()):
        state = torch.exp(dt_t * A)[:, None, None] * state + dt_t[:, None, None] * x_t[..., None] * B_t[:, None]
        y.append((state * C_t[:, None]).sum(-1))
    return torch.stack(y) if y else x


def by_head(state, groups, heads):
    return state.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=1)


def layer(xBC, dt, conv_weight, conv_bias, A, D, dt_bias, dstate, groups, lookahead):
    heads, n = len(A), groups * dstate
    x, B, C = convolved(xBC, conv_weight, conv_bias, lookahead).split((xBC.shape[-1] - 2 * n, n, n), dim=-1)
    x = x.unflatten(-1, (heads, -1))
    y = scanned(x, torch.log1p(torch.exp(dt + dt_bias)), A, *(by_head(t, groups, heads) for t in (B, C)))
    return y + D[:, None] * x


def hydra(xBC, dt, conv_weight, conv_bias, A, D, dt_bias, dstate, groups, lookahead):
    heads, n = len(A), groups * dstate
    parts = convolved(xBC, conv_weight, conv_bias, lookahead).split((xBC.shape[-1] - 4 * n, n, n, n, n), dim=-1)
    x, B_f, C_f, B_b, C_b = parts
    x = x.unflatten(-1, (heads, -1))
    y = D[:, None] * x
    dt = torch.log1p(torch.exp(dt + dt_bias))
    for steps, B, C, turn in ((dt[0], B_f, C_f, lambda t: t), (dt[1], B_b, C_b, lambda t: t.flip(0))):
        B, C = (by_head(t, groups, heads) for t in (B, C))
        way = scanned(turn(x), turn(steps), A, turn(B), turn(C))
        y = y + turn(torch.cat([torch.zeros_like(way[:1]), way[:-1]]))
    return y


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(0, 3),
    length=st.integers(0, 12),
    groups=st.integers(1, 2),
    heads_of_a_group=st.integers(1, 3),
    headdim=st.sampled_from([1, 3, 8]),
    dstate=st.sampled_from([1, 4, 7]),
    width=st.integers(2, 5),
    bias=st.booleans(),
    padded=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_oracle(form, batch, length, groups, heads_of_a_group, headdim, dstate, width, bias, padded, backend):
    sizes = dict(batch=batch, length=length, heads=groups * heads_of_a_group, headdim=headdim, groups=groups)
    agrees_with_the_definition(form, sizes | dict(dstate=dstate, width=width, bias=bias), padded, backend)


def agrees_with_the_definition(form, sizes, padded, backend="compiled"):
    torch.manual_seed(0)
    tensors, options = arguments(form, **sizes)
    lengths = [(5 * i + 2) % (sizes["length"] + 1) for i in range(sizes["batch"])] if padded else None
    seq_lens = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
    upstream = result_like(tensors, options)
    got = gradients(lambda *t: conv_scan(*t, **options, seq_lens=seq_lens, backend=here(backend)), tensors, upstream)
    if not sizes["batch"]:
        assert got[0].shape == upstream.shape and not any(g.any() for g in got[1] if g is not None)
        return
    wanted = gradients(lambda *t: loop(*t, **options, lengths=lengths), tensors, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_two_calls(form, dtype, padded):
    has_the_bits_of_two_calls(form, dtype, padded, 150)


def has_the_bits_of_two_calls(form, dtype, padded, length):
    tensors, options = arguments(form, length=length, headdim=8, groups=2, dstate=8, dtype=dtype)
    seq_lens = torch.tensor([length, length // 3]) if padded else None
    layout, upstream = Layout.of(*tensors[:2], 2, 8), result_like(tensors, options)
    rest = (options["diagonal"], options["lookahead"], seq_lens, here())
    one = gradients(lambda *t: conv_scan(*t, **options, seq_lens=seq_lens, backend=here()), tensors, upstream)
    two = gradients(lambda *t: reference.conv_scan(layout, *t, *rest), tensors, upstream)
    for got, wanted in zip((one[0], *one[1]), (two[0], *two[1])):
        same_bits(got, wanted)


@pytest.mark.parametrize("diagonal", ["both", "once", "shifted"])
@pytest.mark.parametrize("form", ["separate", "shared"])
def test_diagonals_and_shared_parameters(form, diagonal):
    tensors, options = arguments(form)
    options |= dict(diagonal=diagonal, backend=here())
    xBC, dt, conv_weight, conv_bias, *of_heads = tensors
    shared = [t if t.dim() == 1 else t[0] for t in of_heads]
    apart = [t.expand(2, -1).contiguous() for t in shared]
    got = conv_scan(xBC, dt, conv_weight, conv_bias, shared[0], None, shared[2], **options)
    wanted = conv_scan(xBC, dt, conv_weight, conv_bias, apart[0], None, apart[2], **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    rest = (diagonal, options["lookahead"], None, here())
    layout = Layout.of(xBC, dt, options["ngroups"], options["dstate"])
    two = reference.conv_scan(layout, xBC, dt, conv_weight, conv_bias, shared[0], None, shared[2], *rest)
    same_bits(got, two)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_torch(form, dtype):
    """At most twice that of the same operators in plain torch in the same precision; three times for gradients.

    By root mean square over eight draws: the gradients of four heads' parameters are four sums, whose single errors are
    a matter of luck.
    """
    squares = 0
    for seed in range(8):
        torch.manual_seed(seed)
        tensors, options = arguments(form, length=70, heads=4, headdim=16, dstate=16, dtype=dtype)
        upstream = result_like(tensors, options)
        found = []
        for inputs, backend in (
            ([t.double() for t in tensors], "reference"),
            (tensors, "reference"),
            (tensors, here()),
        ):
            y, grads = gradients(functools.partial(conv_scan, **options, backend=backend), inputs, upstream)
            found.append([y, *grads])
        exact, *others = found
        squares += torch.tensor([[(t.double() - e).square().sum() for t, e in zip(way, exact)] for way in others])
    theirs, ours = squares.sqrt().tolist()
    for name, our, their in zip(("result", *NAMES), ours, theirs):
        assert our <= (2 if name == "result" else 3) * their, f"{name}: error {our:.3g}, torch's own {their:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_padded_is_alone(form, dtype):
    padded_is_alone(form, dtype, [0, 1, 70, 131], 131)


def padded_is_alone(form, dtype, lengths, length):
    """Bit for bit, whatever stands in the padding; results and gradients there are zeros."""
    tensors, options = arguments(form, batch=len(lengths), length=length, dtype=dtype)
    upstream = result_like(tensors, options)
    (xBC, dt), weights = tensors[:2], tensors[2:]
    dims = [(t, t.dim() - 3) for t in (xBC, dt)]  # where the batch is
    dims.append((upstream, upstream.dim() - 4))
    padded = []
    for t, batch in dims:
        t = t.clone().movedim(batch, 0)
        for row, n in enumerate(lengths):
            t[row].movedim(batch, 0)[n:] = torch.nan if row % 2 else torch.inf
        padded.append(t.movedim(0, batch))
    *padded, padded_upstream = padded

    def part(t, batch, row, n):
        return t.narrow(batch, row, 1).narrow(batch + 1, 0, n)

    y, (*of_frames, _, _, _, _, _) = found = gradients(
        lambda *t: conv_scan(*t, **options, seq_lens=torch.tensor(lengths), backend=here()), [*padded, *weights],
        padded_upstream,
    )  # fmt: skip
    for row, n in enumerate(lengths):
        alone, (*alone_of_frames, _, _, _, _, _) = gradients(
            lambda *t: conv_scan(*t, **options, backend=here()),
            [*(part(t, batch, row, n) for t, batch in dims[:2]), *weights], part(*dims[2], row, n),
        )  # fmt: skip
        results = [(y, alone, dims[2][1]), *zip(of_frames, alone_of_frames, (dims[0][1], dims[1][1]))]
        for got, wanted, batch in results:
            same_bits(part(got, batch, row, n), wanted)
            assert not got.narrow(batch, row, 1).narrow(batch + 1, n, length - n).any()
    assert all(g.isfinite().all() for g in found[1])


@pytest.mark.parametrize("form", FORMS)
def test_strides(form):
    """Parts of a larger tensor, column by column, and one row for all."""
    tensors, options = arguments(form, batch=3, length=20, dtype=torch.float32)
    xBC, *rest = tensors
    upstream, channels = result_like(tensors, options), xBC.shape[-1]
    wide = torch.randn(*xBC.shape[:-1], 2 * channels + 3)
    one = xBC.narrow(-3, 0, 1).expand_as(xBC)
    for view in (wide[..., 2 : 2 + channels], wide[..., : 2 * channels : 2], xBC.mT.contiguous().mT, one):
        found = []
        for t in (view, view.contiguous()):
            t = t.detach().requires_grad_()
            y = conv_scan(t, *rest, **options, backend=here())
            found.append((y, torch.autograd.grad(y, t, upstream)[0]))
        for got, wanted in zip(*found):
            same_bits(got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    tensors, options = arguments(form, batch=1, length=5, headdim=2, dstate=2)
    tensors = [t.requires_grad_() for t in tensors]
    seq_lens = torch.tensor([4])
    torch.autograd.gradcheck(lambda *t: conv_scan(*t, **options, seq_lens=seq_lens, backend=here()), tensors)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    whole = form != "causal"  # with every argument there is, or with none that may be left out
    tensors, options = arguments(form, batch=1, length=5, headdim=2, dstate=2)
    upstream, seq_lens = result_like(tensors, options), torch.tensor([4]) if whole else None
    tensors = [t.requires_grad_() if whole or i in (0, 1, 2, 4) else None for i, t in enumerate(tensors)]
    rest = (2, 1, options["diagonal"], options["lookahead"], seq_lens, here(), here())
    torch.library.opcheck(torch.ops.linconv.conv_scan.default, (*tensors, *rest))
    tensors = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(torch.ops.linconv.conv_scan_gradients.default, (upstream, *tensors, *rest))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(xBC=torch.zeros(())), r"xBC has shape \(\), wanted \(batch, L, channels\)"),
        (dict(dt=torch.zeros(())), r"dt has shape \(\), wanted \(batch, L, heads\)"),
        (dict(dt=torch.zeros(2, 7, 0), A=torch.zeros(0)), "ngroups is 1, wanted a divisor of the 0 heads of dt"),
        (dict(dstate=-1), "dstate is -1, wanted 1 to 256"),
        (dict(ngroups=0), "ngroups is 0, wanted a divisor of the 2 heads of dt"),
        (dict(diagonal="none"), "diagonal is 'none'"),
    ],
)
def test_operator_checks_what_it_computes_with(change, message):
    arguments = dict(
        xBC=torch.zeros(2, 7, 14), dt=torch.zeros(2, 7, 2), conv_weight=torch.zeros(14, 4), conv_bias=None,
        A=torch.zeros(2), D=None, dt_bias=None, dstate=3, ngroups=1, diagonal="both", lookahead=0, seq_lens=None,
        conv=here(), scan=here(),
    )  # fmt: skip
    torch.ops.linconv.conv_scan(**arguments)
    change = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(torch.get_default_device()), change)
    with pytest.raises(ValueError, match=message):
        torch.ops.linconv.conv_scan(**{**arguments, **change})


@pytest.mark.parametrize("form", FORMS)
def test_compile_and_checkpoint(form):
    tensors, options = arguments(form, dtype=torch.float32)
    upstream = result_like(tensors, options)

    def call(*t):
        return conv_scan(*t, **options, seq_lens=torch.tensor([9, 4]), backend=here())

    def checkpointed(*t):
        return torch.utils.checkpoint.checkpoint(call, *t, use_reentrant=False)

    wanted = gradients(call, tensors, upstream)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for other in (gradients(compiled, tensors, upstream), gradients(checkpointed, tensors, upstream)):
        for got, one in zip((other[0], *other[1]), (wanted[0], *wanted[1])):
            same_bits(got, one)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_for_backward(form):
    """Arguments: neither the convolution's result nor a copy of a part of it."""
    tensors, options = arguments(form, length=200, dtype=torch.float32)
    tensors = [t.requires_grad_() for t in tensors]
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        conv_scan(*tensors, **options, backend=here())
    assert kept == {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_parameters_in_another_precision():
    """Weights in bfloat16, as of a model in bfloat16, beside float32; gradients are the weights'."""
    (xBC, dt, *weights), options = arguments("separate", dtype=torch.float32)
    low = [w.to(torch.bfloat16) for w in weights]
    upstream = result_like([xBC, dt], options)
    call = functools.partial(conv_scan, **options, backend=here())
    got, grads = gradients(call, [xBC, dt, *low], upstream)
    wanted, wanted_grads = gradients(call, [xBC, dt, *(w.float() for w in low)], upstream)
    torch.testing.assert_close(got, wanted)
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, *[torch.bfloat16] * 5]
    torch.testing.assert_close([g.float() for g in grads], wanted_grads, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_batched_gradients(form):
    """Nothing is written in place: torch has no rule for a batched value in the memory of one that is not."""
    tensors, options = arguments(form)
    tensors = [t.requires_grad_() for t in tensors]
    y = conv_scan(*tensors, **options, backend=here())
    upstream = random(3, *y.shape)
    together = torch.autograd.grad(y, tensors, upstream, is_grads_batched=True, retain_graph=True)
    for at, one in enumerate(upstream):
        alone = torch.autograd.grad(y, tensors, one, retain_graph=True)
        torch.testing.assert_close([t[at] for t in together], list(alone))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_only_say_that_they_are_negative(form):
    """As torch's views of conjugated complex numbers do; a kernel has to get the values themselves."""
    tensors, options = arguments(form)
    tensors = [t.requires_grad_() for t in tensors]
    y = conv_scan(*tensors, **options, backend=here())
    upstream = torch.randn(y.shape, dtype=torch.complex128)
    given = []
    y.register_hook(lambda gradient: given.append(gradient.is_neg()))
    values = torch.complex(torch.ones_like(y), y).conj()
    found = torch.autograd.grad((values * upstream).imag.sum(), tensors, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(y, tensors, -upstream.real))
    assert given == [True, False]


@pytest.mark.parametrize("form", FORMS)
def test_the_result_may_be_changed_in_place(form):
    tensors, options = arguments(form)
    tensors = [t.requires_grad_() for t in tensors]
    y = conv_scan(*tensors, **options, backend=here())
    wanted = torch.autograd.grad(2 * y.sum(), tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.mul_(2).sum(), tensors), wanted)


def test_a_library_without_the_operator_is_no_error(monkeypatch):
    """One that was built before: there is nothing to register, and the two operators are called."""
    assert not dispatch.register_composite("of_a_later_version", None, fake=None, setup_context=None, backward=None)
    tensors, options = arguments("shared")
    wanted = conv_scan(*tensors, **options, backend=here())
    monkeypatch.setattr(sys.modules[conv_scan.__module__], "_registered", False)
    monkeypatch.setattr(torch.ops.linconv, "conv_scan", None)
    same_bits(conv_scan(*tensors, **options, backend=here()), wanted)


def test_second_derivative_is_refused():
    tensors, options = arguments("shared")
    tensors = [t.requires_grad_() for t in tensors]
    y = conv_scan(*tensors, **options, backend=here())
    grad = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad.sum(), tensors[0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(xBC=None), TypeError, "xBC is NoneType, wanted a torch.Tensor"),
        (dict(xBC=torch.ones(9, 14)), ValueError, "xBC has shape (9, 14), wanted (batch, L, channels) or (2, "),
        (dict(xBC=torch.ones(3, 2, 9, 14)), ValueError, "xBC has shape (3, 2, 9, 14), wanted (batch, L, channels) or"),
        (dict(xBC=torch.ones(2, 9, 14).long()), TypeError, "xBC has dtype torch.int64"),
        (dict(xBC=torch.ones(2, 9, 13), conv_weight=torch.ones(13, 4), conv_bias=None), ValueError,
         "xBC has 13 channels, wanted heads * headdim = 2 * headdim, headdim 1 to 256, and 6 for B and C"),
        (dict(dt=torch.ones(2, 8, 2)), ValueError, "dt has shape (2, 8, 2), wanted (batch, L, heads) or"),
        (dict(dt=torch.ones(3, 2, 9, 2)), ValueError, "dt has shape (3, 2, 9, 2), wanted"),
        (dict(dt=None), TypeError, "dt is NoneType"),
        (dict(A=torch.ones(2, 2)), ValueError, "A has shape (2, 2), wanted (heads,) = (2)"),
        (dict(D=torch.ones(3)), ValueError, "D has shape (3,), wanted (heads,) = (2)"),
        (dict(dt_bias=torch.ones(2, device="meta")), ValueError, "dt_bias is on meta, wanted cpu as xBC"),
        (dict(conv_bias=torch.ones(13)), ValueError, "conv_bias has shape (13,), wanted (channels,) = (14)"),
        (dict(conv_weight=torch.ones(2, 14, 4)), ValueError, "conv_weight has shape (2, 14, 4), wanted (channels,"),
        (dict(conv_weight=torch.ones(14, 9)), ValueError, "conv_weight has width 9, wanted 2 to 8"),
        (dict(conv_weight=torch.ones(14, 4).double()), TypeError, "conv_weight is torch.float64 and xBC is"),
        (dict(dstate=0), ValueError, "dstate is 0, wanted 1 to 256"),
        (dict(dstate=3.0), TypeError, "dstate is float, wanted an int"),
        (dict(ngroups=3), ValueError, "ngroups is 3, wanted a divisor of the 2 heads of dt"),
        (dict(ngroups="1"), TypeError, "ngroups is str, wanted an int"),
        (dict(diagonal="twice"), ValueError, "diagonal is 'twice', wanted one of 'both', 'once', 'shifted'"),
        (dict(lookahead=4), ValueError, "lookahead is 4, wanted 0 to width - 1 = 3"),
        (dict(lookahead=1.0), TypeError, "lookahead is float, wanted an int"),
        (dict(seq_lens=torch.tensor([9, 10])), ValueError, "seq_lens holds 10, wanted 0 to L = 9"),
        (dict(backend="gpu"), ValueError, "backend='gpu': wants one of"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    tensors, options = arguments("causal", dtype=torch.float32)
    arguments_by_name = dict(zip(NAMES, (t.cpu() for t in tensors)), **options)
    for _ in range(2):  # a check that failed is not remembered
        with pytest.raises(error) as raised:
            conv_scan(**arguments_by_name | change)
        assert message in str(raised.value)


def test_lookahead_of_separate_directions_is_refused():
    tensors, options = arguments("separate")
    with pytest.raises(ValueError, match="lookahead is 1, wanted 0 where xBC is per direction"):
        conv_scan(*tensors, **options | dict(lookahead=1))
