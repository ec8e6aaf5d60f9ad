import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import DTYPES, alike_for_threads, device, gradients, here, no_worse_than_torch, on_instruction_set, same_bits  # noqa: F401

from linconv.ops import dispatch
from linconv.ops.gated_rms_norm import gated_rms_norm

pytestmark = pytest.mark.skipif(not dispatch.compiled("gated_rms_norm"), reason="the compiled library is not there")
BACKENDS = ("compiled", "reference")


def loop(x, z, weight, *, eps=1e-5, group_size=None, seq_lens=None):
    """The definition, one row after another; x and z of equal shapes, weight (d,)."""
    rows = []
    ends = None if seq_lens is None else [t < n for n in seq_lens.tolist() for t in range(x.shape[-2])]
    for i, (row, gate) in enumerate(zip(x.reshape(-1, x.shape[-1]), z.reshape(-1, x.shape[-1]))):
        groups = (row * gate / (1 + torch.exp(-gate))).split(group_size or x.shape[-1])
        out = torch.cat([g / torch.sqrt((g * g).sum() / len(g) + eps) for g in groups]) * weight
        rows.append(out if ends is None or ends[i] else out * 0)
    return torch.stack(rows).reshape(x.shape) if rows else x * z


def loop_both(x, z, weight, **options):
    dims = max(x.dim(), z.dim())
    x, z = (t if t.dim() == dims else (t, t) for t in (x, z))
    return torch.stack([loop(x[i], z[i], weight[i], **options) for i in (0, 1)])


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([1, 3, 8, 16, 21]),
    directions=st.sampled_from(["none", "both", "x", "z"]),
    lengths=st.none() | st.integers(0, 4),
    eps=st.sampled_from([1e-5, 0.1]),
    backend=st.sampled_from(BACKENDS),
)
def test_oracle(lead, groups, group_size, directions, lengths, eps, backend):
    agrees_with_the_definition(lead, groups, group_size, directions, lengths, eps, backend)


def agrees_with_the_definition(lead, groups, group_size, directions="none", lengths=None, eps=1e-5, backend="compiled"):
    d = groups * group_size
    options = dict(eps=eps, group_size=group_size if groups > 1 else None)
    if lengths is not None and len(lead) == 2:
        options["seq_lens"] = torch.tensor([min(lengths + i, lead[1]) for i in range(lead[0])], dtype=torch.int64)
    x = random(*([2] if directions in ("both", "x") else []), *lead, d)
    z = random(*([2] if directions in ("both", "z") else []), *lead, d)
    both = directions != "none"
    weight = random(2, d) if both else random(d)
    upstream = random(*([2] if both else []), *lead, d)
    wanted = gradients(lambda *t: (loop_both if both else loop)(*t, **options), [x, z, weight], upstream)
    got = gradients(lambda *t: gated_rms_norm(*t, **options, backend=here(backend)), [x, z, weight], upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d, group_size", [(768, None), (100, 25)])
def test_oracle_low_precision(dtype, d, group_size):
    """Errors are those of torch's own operators in the same precision, at most twice; three times for gradients."""
    x, z, weight = random(2, 50, d, dtype=dtype), random(2, 50, d, dtype=dtype), random(d, dtype=dtype)
    upstream = random(2, 50, d, dtype=dtype)
    size = group_size or d

    def in_torch(x, z, weight):
        y = (x * F.silu(z)).unflatten(-1, (-1, size))
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight

    exact, exact_gradients = gradients(in_torch, [t.double() for t in (x, z, weight)], upstream.double())
    theirs, their_gradients = gradients(in_torch, [x, z, weight], upstream)
    ours, our_gradients = gradients(
        lambda *t: gated_rms_norm(*t, group_size=group_size, backend=here()), [x, z, weight], upstream
    )
    no_worse_than_torch(ours, theirs, exact, 2, "y")
    for name, *parts in zip(["x", "z", "weight"], our_gradients, their_gradients, exact_gradients):
        no_worse_than_torch(*parts, 3, f"gradient of {name}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has two instruction sets to choose from")
def test_other_instruction_set():
    on_instruction_set("v3", __file__, "oracle or alone")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", ["x", "z", None])
def test_padded_is_alone(dtype, shared):
    padded_is_alone(dtype, shared, [0, 1, 5, 130, 131], 131)


def padded_is_alone(dtype, shared, lengths, length):
    """Bit for bit, whatever stands in the padding; results and gradients there are zeros."""
    d = 40
    x = random(*([] if shared == "x" else [2]), len(lengths), length, d, dtype=dtype)
    z = random(*([] if shared == "z" else [2]), len(lengths), length, d, dtype=dtype)
    weight, upstream = random(2, d, dtype=dtype), random(2, len(lengths), length, d, dtype=dtype)
    padded = [t.clone() for t in (x, z, upstream)]
    for row, n in enumerate(lengths):
        for t in padded:
            t[..., row, n:, :] = torch.nan if row % 2 else torch.inf
    *padded, padded_upstream = padded
    y, (grad_x, grad_z, grad_weight) = gradients(
        lambda *t: gated_rms_norm(*t, seq_lens=torch.tensor(lengths), backend=here()),
        [*padded, weight],
        padded_upstream,
    )
    for row, n in enumerate(lengths):
        alone, (alone_x, alone_z, _) = gradients(
            lambda *t: gated_rms_norm(*t, backend=here()),
            [x[..., row : row + 1, :n, :], z[..., row : row + 1, :n, :], weight],
            upstream[:, row : row + 1, :n],
        )
        for got, wanted in ((y, alone), (grad_x, alone_x), (grad_z, alone_z)):
            same_bits(got[..., row : row + 1, :n, :], wanted)
            assert not got[..., row, n:, :].any()
    assert grad_weight.isfinite().all()


def test_layout_feeds_one_projection():
    """Both directions of a frame lie side by side, whatever the number of dimensions."""
    for lead in ((3, 7), (7,), (2, 3, 7), (), (0, 4)):
        out = gated_rms_norm(random(*lead, 8), random(2, *lead, 8), random(2, 8), backend=here())
        beside = out.movedim(0, -2).flatten(-2)
        assert beside.shape == (*lead, 16) and beside.is_contiguous()
        assert beside.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    views_are_as_copies(dtype, 2, 70)


def views_are_as_copies(dtype, batch, length):
    """Slices, transposes and expansions give what contiguous copies give."""
    d = 40
    projection = random(batch, length, 3 * d + 5, dtype=dtype)
    weight = random(d, 2, dtype=dtype).mT
    z = projection[..., : 2 * d].unflatten(-1, (2, d)).movedim(2, 0)
    for x in (
        projection[..., 7 : 7 + d],
        projection[..., : 2 * d : 2],
        random(batch, d, length, dtype=dtype).mT,
        projection[:, :1, :d].expand(-1, length, -1),
        projection[..., :1].expand(-1, -1, d),
    ):
        upstream = random(2, 1, 1, d, dtype=dtype).expand(2, batch, length, d)
        same_bits(
            gated_rms_norm(x, z, weight, backend=here()),
            gated_rms_norm(x.contiguous(), z.contiguous(), weight.contiguous(), backend=here()),
        )
        op = dispatch.operator("gated_rms_norm_backward", here())
        contiguous = [t.contiguous() for t in (upstream, x[None], z, weight)]
        for g, w in zip(op(upstream, x[None], z, weight, 1e-5, d, None), op(*contiguous, 1e-5, d, None)):
            same_bits(g, w)


def test_frames_far_apart():
    """Offsets beyond 32 bits: frames 2^31 elements apart. Memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((1, 2, 8), (0, 2**31, 1))
    far.copy_(random(1, 2, 8))
    weight = random(8, dtype=torch.bfloat16)
    same_bits(
        gated_rms_norm(far, far, weight, backend=here()),
        gated_rms_norm(far.contiguous(), far.contiguous(), weight, backend=here()),
    )


def test_extreme_rows():
    """A row of zeros gives zeros; large gates neither overflow nor lose their sign."""
    x = torch.tensor([[0.0, 0, 0, 0], [1, -1, 2, -2], [3, 4, 0, 0]])
    z = torch.tensor([[1.0, 1, 1, 1], [200, 200, 200, 200], [-200, 90, -90, 1e4]])
    got = gated_rms_norm(x, z, torch.ones(4), backend=here())
    exact = loop(x.double(), z.double(), torch.ones(4).double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-30)


def test_parameters_in_another_precision():
    """fp32 weights on bf16 activations, as under autocast, are not rounded; gradients come in each one's dtype."""
    x, z, weight = random(1, 20, 16).bfloat16(), random(1, 20, 16).bfloat16(), random(16).float()
    with torch.autocast(x.device.type, torch.bfloat16):
        y, grads = gradients(lambda *t: gated_rms_norm(*t, backend=here()), [x, z, weight], random(1, 20, 16))
    same_bits(y, gated_rms_norm(x.float(), z.float(), weight, backend=here()).bfloat16())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_deterministic_for_any_number_of_threads():
    inputs = [random(3, 200, 300).float(), random(2, 3, 200, 300).float(), random(2, 300).float()]
    upstream = random(2, 3, 200, 300)

    def results():
        y, grads = gradients(lambda *t: gated_rms_norm(*t, backend=here()), inputs, upstream)
        return [y, *grads]

    alike_for_threads(results)


def test_gradcheck():
    x, z, weight = (t.requires_grad_() for t in (random(2, 4, 6), random(2, 2, 4, 6), random(2, 6)))
    lengths = torch.tensor([4, 2])
    assert torch.autograd.gradcheck(
        lambda *t: gated_rms_norm(*t, group_size=3, seq_lens=lengths, backend=here()), (x, z, weight)
    )


def test_second_derivative_is_refused():
    x, z, weight = random(4, 6).requires_grad_(), random(4, 6), random(6)
    (grad,) = torch.autograd.grad(gated_rms_norm(x, z, weight, backend=here()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shared, lengths", [(True, None), (False, torch.tensor([5, 4]))])
def test_opcheck(shared, lengths):
    x, z, weight = random(1 if shared else 2, 2, 5, 6), random(2, 2, 5, 6), random(2, 6)
    lengths = None if lengths is None else lengths.to(x.device)
    differentiable = [t.clone().requires_grad_() for t in (x, z, weight)]
    torch.library.opcheck(torch.ops.linconv.gated_rms_norm.default, (*differentiable, 1e-5, 3, lengths))
    torch.library.opcheck(
        torch.ops.linconv.gated_rms_norm_backward.default, (random(2, 2, 5, 6), x, z, weight, 1e-5, 3, lengths)
    )


def test_compile_and_checkpoint():
    inputs = [random(2, 20, 16).float(), random(2, 2, 20, 16).float(), random(2, 16).float()]
    upstream = random(2, 20, 32)
    # Made out here: compiled by torch 2.11, torch.tensor takes no notice of a default device.
    lengths = torch.tensor([20, 11])

    def norm(x, z, weight):
        out = gated_rms_norm(x * 2, z, weight, seq_lens=lengths, backend=here())
        return out.movedim(0, -2).flatten(-2)

    def checkpointed(*t):
        return torch.utils.checkpoint.checkpoint(norm, *t, use_reentrant=False)

    plain = gradients(norm, inputs, upstream)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for other in (gradients(compiled, inputs, upstream), gradients(checkpointed, inputs, upstream)):
        torch.testing.assert_close(other, plain, rtol=0, atol=0)


X, W = torch.zeros(2, 5, 6), torch.zeros(6)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X, None, W), {}, TypeError, "z is NoneType"),
        ((X.long(), X, W), {}, TypeError, "x has dtype torch.int64"),
        ((X, X, W[:4]), {}, ValueError, r"x has shape \(2, 5, 6\), wanted \(..., d\) = \(2, 5, 4\)"),
        ((X, X[:1], W), {}, ValueError, r"z has shape \(1, 5, 6\)"),
        ((X, X[0], W.expand(2, 6)), {}, None, None),
        ((X, X[0, 0], W.expand(2, 6)), {}, ValueError, r"z has shape \(6,\)"),
        ((X[:1], X[:1], W.expand(2, 6)), {}, ValueError, r"x has shape \(1, 5, 6\), wanted \(2, ..., d\)"),
        ((X, X, W.expand(3, 6)), {}, ValueError, r"weight has shape \(3, 6\), wanted \(d,\) or \(2, d\)"),
        ((X, X.double(), W), {}, TypeError, "z is torch.float64 and x is torch.float32"),
        ((X, X, W), dict(group_size=4), ValueError, "group_size is 4, wanted None or a divisor of d = 6"),
        ((X, X, W), dict(eps="small"), TypeError, "eps is str"),
        ((X, X, W), dict(eps=-1), ValueError, "eps is -1, wanted a finite number from 0 up"),
        ((X, X, W), dict(eps=float("nan")), ValueError, "eps is nan"),
        ((X, X, W), dict(seq_lens=torch.tensor([6, 1])), ValueError, "seq_lens holds 6"),
        ((X[0], X[0], W), dict(seq_lens=torch.tensor([1])), ValueError, r"wanted \(batch, L, d\)"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    if error is None:
        assert gated_rms_norm(*arguments, **options).shape == arguments[0].shape
        return
    with pytest.raises(error, match=message):
        gated_rms_norm(*arguments, **options)


@pytest.mark.parametrize(
    "x, z, weight, group_size, message",
    [
        (X, X, W[None], 6, "x has 3 dimensions"),
        (X[None], X[None], W[None, :4], 4, "x has size 6 in dimension 3, wanted 4"),
        (X[None], X[None, :, :3], W[None], 6, "z has size 3 in dimension 2"),
        (X[None], X[None], W[None], 0, "group_size is 0"),
        (X[None], X[None], W[None], 4, "group_size is 4"),
    ],
)
def test_operator_checks_what_it_reads(x, z, weight, group_size, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linconv.gated_rms_norm(x, z, weight, 1e-5, group_size, None)
