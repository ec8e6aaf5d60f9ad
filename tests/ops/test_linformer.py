import importlib
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import (  # noqa: F401
    DTYPES,
    alike_for_threads,
    device,
    gradients,
    here,
    no_worse_than_torch,
    on_instruction_set,
    same_bits,
    threads,
)

from linconv.ops import dispatch, linformer_attention, linformer_self_attention
from linconv.ops.linformer import reference, rewrite_pays

OPERATORS = ("linformer_project", "linformer_attend")
pytestmark = pytest.mark.skipif(not all(map(dispatch.compiled, OPERATORS)), reason="the compiled library is not there")
BACKENDS = ("compiled", "reference")


def by_formula(q, k, v, proj_k, proj_v=None, *, seq_lens=None, scale=None, normalize=True):
    """The definition, a row, a head and a frame at a time (arXiv 2006.04768, eq. 7)."""
    batch, heads, length, headdim = q.shape
    proj_v = proj_k if proj_v is None else proj_v
    lengths = [length] * batch if seq_lens is None else seq_lens.tolist()
    scale = headdim**-0.5 if scale is None else scale
    rows = []
    for row, n in enumerate(lengths):
        for head in range(heads):
            E, G = (p[head] if p.dim() == 3 else p for p in (proj_k, proj_v))
            factor = 1 / math.sqrt(n) if normalize and n else 1
            keys = sum((factor * E[t, :, None] * k[row, head, t] for t in range(n)), q.new_zeros(E.shape[1], headdim))
            values = sum((factor * G[t, :, None] * v[row, head, t] for t in range(n)), q.new_zeros(E.shape[1], headdim))
            for t in range(length):
                weights = torch.exp(scale * keys @ q[row, head, t]) if t < n else None
                rows.append(q[row, head, t] * 0 if weights is None else weights @ values / weights.sum())
    return torch.stack(rows).reshape(q.shape) if rows else q * (k + v)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def tensors(batch, heads, length, headdim, rank, *, most=None, per_head=False, shared=False, dtype=torch.float64):
    """q, k, v, proj_k and proj_v, or None where keys and values share one."""
    lead = (heads,) if per_head else ()
    most = length + 2 if most is None else most
    proj = [random(*lead, most, rank, dtype=dtype) for _ in range(2)]
    return [
        *(random(batch, heads, length, headdim, dtype=dtype) for _ in range(3)),
        proj[0],
        None if shared else proj[1],
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    length=st.sampled_from([0, 1, 2, 7, 33]),
    headdim=st.sampled_from([1, 3, 8, 20]),
    rank=st.sampled_from([1, 5, 16, 37]),
    per_head=st.booleans(),
    shared=st.booleans(),
    lengths=st.none() | st.integers(0, 7),
    normalize=st.booleans(),
    scale=st.none() | st.just(0.3),
    backend=st.sampled_from(BACKENDS),
)
def test_oracle(batch, heads, length, headdim, rank, per_head, shared, lengths, normalize, scale, backend):
    inputs = tensors(batch, heads, length, headdim, rank, per_head=per_head, shared=shared)
    options = dict(normalize=normalize, scale=scale)
    if lengths is not None:
        options["seq_lens"] = torch.tensor([min(lengths + 5 * i, length) for i in range(batch)], dtype=torch.int64)
    upstream = random(batch, heads, length, headdim)
    wanted = gradients(lambda *t: by_formula(*t, **options), inputs, upstream)
    got = gradients(lambda *t: linformer_attention(*t, **options, backend=here(backend)), inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("headdim, rank", [(64, 256), (256, 512), (65, 300)])
def test_oracle_of_long_sequences(headdim, rank, backend):
    """Cut into parts, and frames that are not a whole number of any block."""
    inputs = tensors(2, 1, 1200, headdim, rank)
    lengths = torch.tensor([1200, 1091])
    upstream = random(2, 1, 1200, headdim)

    def in_torch(q, k, v, proj_k, proj_v):
        valid = (torch.arange(1200) < lengths[:, None])[:, None, :, None]
        k, v = (
            p[:1200].mT @ (valid * x) / lengths.double().sqrt()[:, None, None, None]
            for p, x in ((proj_k, k), (proj_v, v))
        )
        return valid * ((q @ k.mT / math.sqrt(headdim)).softmax(-1) @ v)

    wanted = gradients(in_torch, inputs, upstream)
    got = gradients(lambda *t: linformer_attention(*t, seq_lens=lengths, backend=here(backend)), inputs, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def in_torch(q, k, v, proj_k, proj_v):
    length = q.shape[2]
    k, v = (p[:length].mT @ x / math.sqrt(length) for p, x in ((proj_k, k), (proj_v, v)))
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, headdim, rank", [(300, 64, 128), (77, 33, 20), (76, 32, 21), (40, 130, 300)])
def test_oracle_low_precision(dtype, length, headdim, rank):
    """Errors are those of torch's own operators in the same precision, at most twice; three times for gradients."""
    inputs = tensors(2, 2, length, headdim, rank, dtype=dtype)
    upstream = random(2, 2, length, headdim, dtype=dtype)

    exact, exact_gradients = gradients(in_torch, [t.double() for t in inputs], upstream.double())
    theirs, their_gradients = gradients(in_torch, inputs, upstream)
    ours, our_gradients = gradients(lambda *t: linformer_attention(*t, backend=here()), inputs, upstream)
    no_worse_than_torch(ours, theirs, exact, 2, "y")
    for name, *parts in zip(["q", "k", "v", "proj_k", "proj_v"], our_gradients, their_gradients, exact_gradients):
        no_worse_than_torch(*parts, 3, f"gradient of {name}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has two instruction sets to choose from")
def test_other_instruction_set():
    on_instruction_set("v3", __file__, "oracle or alone or dropout")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared, per_head", [(True, False), (False, True), (False, False)])
def test_padded_is_alone(dtype, shared, per_head):
    """Bit for bit, whatever stands in the padding; results and gradients there are zeros."""
    lengths, length = [0, 1, 5, 611, 700], 700
    q, k, v, *proj = tensors(5, 2, length, 20, 12, dtype=dtype, shared=shared, per_head=per_head)
    upstream = random(5, 2, length, 20, dtype=dtype)
    padded = [t.clone() for t in (q, k, v, upstream)]
    for row, n in enumerate(lengths):
        for t in padded:
            t[row, :, n:] = torch.nan if row % 2 else torch.inf
    *padded, padded_upstream = padded
    y, grads = gradients(
        lambda *t: linformer_attention(*t, seq_lens=torch.tensor(lengths), backend=here()),
        [*padded, *proj],
        padded_upstream,
    )
    for row, n in enumerate(lengths):
        alone, alone_grads = gradients(
            lambda *t: linformer_attention(*t, backend=here()),
            [*(t[row : row + 1, :, :n] for t in (q, k, v)), *proj],
            upstream[row : row + 1, :, :n],
        )
        for got, wanted in zip((y, *grads[:3]), (alone, *alone_grads[:3])):
            same_bits(got[row : row + 1, :, :n], wanted)
            assert not got[row, :, n:].any()
    assert all(g is None or g.isfinite().all() for g in grads)


def test_batch_whose_longest_row_has_fewer_splits_than_a_shorter_one():
    """8,192 frames are 16 splits of 512; 8,193 are 15 of 576."""
    lengths, length = torch.tensor([8193, 8192, 513]), 8193
    inputs = [*(random(3, 2, length, 5, dtype=torch.float64) for _ in range(3))]
    inputs += [random(length, 7, dtype=torch.float64) for _ in range(2)]
    upstream = random(3, 2, length, 5, dtype=torch.float64)
    (y, grads), (wanted, wanted_grads) = (
        gradients(lambda *t, b=b: linformer_attention(*t, seq_lens=lengths, backend=b), inputs, upstream)
        for b in (here(), "reference")
    )
    for got, exact in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Slices, transposes and expansions give what contiguous copies give."""
    batch, heads, length, headdim, rank = 2, 3, 70, 20, 12
    fused = random(batch, length, 3 * heads * headdim + 5, dtype=dtype)
    q, k, v = (
        t.unflatten(-1, (heads, headdim)).transpose(1, 2) for t in fused[..., : 3 * heads * headdim].chunk(3, dim=-1)
    )
    proj = random(rank, length, dtype=dtype).mT
    for inputs in (
        (q, k, v, proj),
        (
            q[:, :1].expand(-1, heads, -1, -1),
            k.flip(3),
            v[..., :1].expand(-1, -1, -1, headdim),
            proj.expand(heads, -1, -1),
        ),
        (
            random(batch, heads, headdim, length, dtype=dtype).mT,
            k,
            v,
            random(2 * length, 2 * rank, dtype=dtype)[::2, ::2],
        ),
    ):
        upstream = random(1, 1, 1, headdim, dtype=dtype).expand(batch, heads, length, headdim)
        got = gradients(lambda *t: linformer_attention(*t, backend=here()), inputs, upstream)
        copies = [t.contiguous() for t in inputs]
        wanted = gradients(lambda *t: linformer_attention(*t, backend=here()), copies, upstream.contiguous())
        same_bits(linformer_attention(*inputs, backend=here()), wanted[0])
        for g, w in zip((got[0], *got[1]), (wanted[0], *wanted[1])):
            same_bits(g, w)


def test_frames_far_apart():
    """Offsets beyond 32 bits: frames 2^31 elements apart. Memory between them is never touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((1, 1, 2, 8), (0, 0, 2**31, 1))
    far.copy_(random(1, 1, 2, 8))
    proj, near = random(2, 3, dtype=torch.bfloat16), far.contiguous()
    same_bits(
        linformer_attention(far, far, far, proj, backend=here()),
        linformer_attention(near, near, near, proj, backend=here()),
    )


def test_layout_feeds_one_projection():
    out = linformer_attention(*tensors(2, 3, 7, 4, 5), backend=here())
    side_by_side = out.transpose(1, 2).flatten(-2)
    assert side_by_side.is_contiguous() and side_by_side.data_ptr() == out.data_ptr()


def test_extreme_scores():
    """Scores of a thousand neither overflow nor lose the largest."""
    q, k, v, proj, _ = (t if t is None else t.float() for t in tensors(1, 1, 40, 8, 6, shared=True))
    got = linformer_attention(1e3 * q, k, v, proj, backend=here())
    torch.testing.assert_close(got.double(), by_formula_softmax(1e3 * q, k, v, proj), rtol=1e-4, atol=1e-5)


def by_formula_softmax(q, k, v, proj):
    q, k, v, proj = (t.double() for t in (q, k, v, proj))
    k, v = (proj[: x.shape[2]].mT @ x / math.sqrt(x.shape[2]) for x in (k, v))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def test_parameters_in_another_precision():
    """fp32 projections on bf16 activations, as under autocast, are not rounded; gradients come in each one's dtype."""
    inputs = [t.bfloat16() if i < 3 else t.float() for i, t in enumerate(tensors(1, 2, 20, 16, 8))]
    with torch.autocast(here(), torch.bfloat16):
        y, grads = gradients(lambda *t: linformer_attention(*t, backend=here()), inputs, random(1, 2, 20, 16))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [torch.float32] * 2
    exact, theirs = in_torch(*(t.double() for t in inputs)), in_torch(*(t.bfloat16() for t in inputs))
    no_worse_than_torch(y, theirs, exact, 2, "y")
    x, proj = inputs[1], inputs[3][None]
    project = dispatch.operator("linformer_project", here())
    same_bits(project(x, proj, True, None), project(x.float(), proj, True, None))


# ---- Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_is_the_references(dtype):
    """Forward and gradients: the same weights are dropped, drawn from the generator's seed."""
    inputs, upstream = tensors(2, 3, 90, 12, 40, dtype=dtype), random(2, 3, 90, 12)
    found = []
    for backend in BACKENDS:
        torch.manual_seed(5)
        options = dict(dropout_p=0.3, seq_lens=torch.tensor([90, 41]), backend=here(backend))
        found.append(gradients(lambda *t, options=options: linformer_attention(*t, **options), inputs, upstream))
    loose = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*found, **loose)


def test_dropout_drops_that_share_and_keeps_the_mean():
    """Of 4 million draws, in rows, columns and pairs of neighbours; every seed draws its own."""
    seeds = torch.tensor([7, -(2**62) + 3])
    for p in (0.1, 0.5):
        first, second = (reference.kept(seed, 4, 4, 512, 512, p).double() for seed in seeds)
        deviation = math.sqrt(p * (1 - p))
        for one in (first, second):
            assert abs(one.mean() - (1 - p)) < 5 * deviation / math.sqrt(one.numel())
            for dim in (-1, -2):
                shares = one.mean(dim)
                assert abs(shares.std() / (deviation / math.sqrt(512)) - 1) < 0.05
                neighbours = ((one - 1 + p) * (one.roll(1, dim) - 1 + p)).mean() / deviation**2
                assert abs(neighbours) < 5 / math.sqrt(one.numel())
        assert abs(((first - 1 + p) * (second - 1 + p)).mean()) < 5 * deviation**2 / math.sqrt(first.numel())
    value = tensors(1, 1, 200, 4, 400, shared=True)
    value[2] = torch.ones_like(value[2])
    value[0], value[3] = torch.zeros_like(value[0]), value[3].abs()  # every key has the same weight
    outputs = torch.stack([linformer_attention(*value, dropout_p=0.5, backend=here()) for _ in range(60)])
    torch.testing.assert_close(outputs.mean(0), linformer_attention(*value), rtol=0.05, atol=0)


def test_dropout_repeats_with_the_seed_and_under_checkpointing():
    inputs, upstream = tensors(2, 2, 30, 8, 10), random(2, 2, 30, 8)

    def attention(*t):
        return linformer_attention(*t, dropout_p=0.4, backend=here())

    def checkpointed(*t):
        return torch.utils.checkpoint.checkpoint(attention, *t, use_reentrant=False)

    found = []
    for function in (attention, attention, checkpointed):
        torch.manual_seed(3)
        found.append(gradients(function, inputs, upstream))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)
    assert not torch.equal(attention(*inputs), attention(*inputs))


# ---- As an operator of torch


def test_deterministic_for_any_number_of_threads():
    inputs, upstream = [t.float() for t in tensors(2, 3, 1500, 16, 24)], random(2, 3, 1500, 16)

    def results():
        y, grads = gradients(lambda *t: linformer_attention(*t, backend=here()), inputs, upstream)
        return [y, *grads]

    alike_for_threads(results)


@pytest.mark.parametrize("per_head", [False, True])
def test_gradcheck(per_head):
    inputs = [t.requires_grad_() for t in tensors(2, 2, 5, 3, 4, per_head=per_head)]
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda *t: linformer_attention(*t, seq_lens=lengths, backend=here()), inputs)


def test_second_derivative_is_refused():
    q, *rest = tensors(1, 1, 4, 3, 2)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(linformer_attention(q, *rest, backend=here()).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("lengths", [None, [5, 4]])
def test_opcheck(lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    q, x, k, v = random(2, 3, 5, 6), random(2, 3, 5, 6), random(2, 3, 4, 6), random(2, 3, 4, 6)
    proj, seed = random(1, 7, 4), torch.tensor(3)
    ops = torch.ops.linconv

    def leaves(*t):
        return [x.clone().requires_grad_() for x in t]

    torch.library.opcheck(ops.linformer_project.default, (*leaves(x, proj), True, lengths))
    torch.library.opcheck(ops.linformer_attend.default, (*leaves(q, k, v), 0.5, 0.0, None, lengths))
    torch.library.opcheck(ops.linformer_attend.default, (*leaves(q, k, v), 0.5, 0.3, seed, lengths))
    torch.library.opcheck(ops.linformer_project_backward.default, (k, x, proj, True, lengths))
    torch.library.opcheck(ops.linformer_attend_backward.default, (x, q, k, v, 0.5, 0.3, seed, lengths))


def test_compile():
    inputs, upstream = [t.float() for t in tensors(2, 2, 20, 8, 6)], random(2, 2, 20, 8)
    # Made out here: compiled by torch 2.11, torch.tensor takes no notice of a default device.
    lengths = torch.tensor([20, 11])

    def attention(q, k, v, proj_k, proj_v):
        return linformer_attention(2 * q, k, v, proj_k, proj_v, seq_lens=lengths, backend=here())

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled, inputs, upstream), gradients(attention, inputs, upstream), rtol=0, atol=0
    )


X, P = torch.zeros(2, 3, 5, 4), torch.zeros(6, 7)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X, None, X, P), {}, TypeError, "k is NoneType"),
        ((X, X.long(), X, P), {}, TypeError, "k has dtype torch.int64"),
        ((X, X, X[:, :2], P), {}, ValueError, r"v has shape \(2, 2, 5, 4\), wanted \(batch, heads, L, headdim\)"),
        ((X[0], X, X, P), {}, ValueError, r"q has shape \(3, 5, 4\)"),
        ((X, X.double(), X, P), {}, TypeError, "k is torch.float64 and q is torch.float32"),
        ((X, X, X, P[:4]), {}, ValueError, "proj_k has Lmax = 4 frames, wanted at least L = 5"),
        ((X, X, X, P, P[:4]), {}, ValueError, "proj_v has Lmax = 4 frames, wanted at least L = 5"),
        ((X, X, X, P.expand(2, 6, 7)), {}, ValueError, r"proj_k has shape \(2, 6, 7\), wanted \(heads, Lmax, r\)"),
        ((X, X, X, P, P[:, :3]), {}, ValueError, "proj_v has r = 3, wanted 7 as proj_k"),
        ((X, X, X, P[:, :0]), {}, ValueError, "proj_k has r = 0, wanted 1 to 512"),
        ((X, X, X, torch.zeros(6, 513)), {}, ValueError, "proj_k has r = 513, wanted 1 to 512"),
        ((X.expand(2, 3, 5, 4)[..., :0],) * 3 + (P,), {}, ValueError, "headdim is 0"),
        ((X, X, X, P), dict(seq_lens=torch.tensor([6, 1])), ValueError, "seq_lens holds 6"),
        ((X, X, X, P), dict(scale="big"), TypeError, "scale is str"),
        ((X, X, X, P), dict(normalize="x"), TypeError, "normalize is 'x', wanted a bool"),
        ((X, X, X, P), dict(dropout_p=1.0), ValueError, "dropout_p is 1.0, wanted 0 <= dropout_p < 1"),
        ((X, X, X, P), dict(dropout_p="0"), TypeError, "dropout_p is str"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linformer_attention(*arguments, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ops, x, p: ops.linformer_project(x, p, True, None), "proj has 2 dimensions"),
        (lambda ops, x, p: ops.linformer_project(x, p[None, :4], True, None), "x has 5 frames, wanted at most 4"),
        (lambda ops, x, p: ops.linformer_project(x, p.expand(2, 6, 7), True, None), "proj has 2 heads, wanted 1 or 3"),
        (lambda ops, x, p: ops.linformer_project(x, p[None, :, :0], True, None), "r is 0"),
        (
            lambda ops, x, p: ops.linformer_attend(x, x[:1], x, 1.0, 0.0, None, None),
            "k has size 1 in dimension 0, wanted 2",
        ),
        (lambda ops, x, p: ops.linformer_attend(x, x, x, 1.0, 0.5, None, None), "seed is absent"),
        (lambda ops, x, p: ops.linformer_attend(x, x, x, 1.0, 0.5, torch.tensor(1.0), None), "seed has another dtype"),
        (lambda ops, x, p: ops.linformer_attend(x, x, x.double(), 1.0, 0.0, None, None), "all or none in Double"),
    ],
)
def test_operator_checks_what_it_reads(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.linconv, *(t.to(here()) for t in (X, P)))


# ---- With the projections of hidden states


def weights(d, width, *, bias=True, dtype=torch.float64):
    found = []
    for _ in range(3):
        found += [random(width, d, dtype=dtype), random(width, dtype=dtype) if bias else None]
    return found


def self_attention_by_formula(hidden, wq, bq, wk, bk, wv, bv, proj_k, proj_v, *, num_heads, **options):
    q, k, v = (
        F.linear(hidden, w, b).unflatten(-1, (num_heads, -1)).transpose(1, 2) for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    return by_formula(q, k, v, proj_k, proj_v, **options).transpose(1, 2).flatten(-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 6, 21]),
    heads=st.integers(1, 3),
    headdim=st.sampled_from([2, 5]),
    d=st.sampled_from([4, 9, 130]),
    bias=st.booleans(),
    shared=st.booleans(),
    lengths=st.none() | st.integers(0, 6),
    rewrite=st.sampled_from([True, False, None]),
    backend=st.sampled_from(BACKENDS),
)
def test_rewrite_is_exact(batch, length, heads, headdim, d, bias, shared, lengths, rewrite, backend):
    """Results and gradients of both orders are those of the formula, with biases and masks."""
    proj = [random(length + 3, 4), None if shared else random(length + 3, 4)]
    hidden = random(batch, length, d) / d**0.5  # small scores: the formula's exp overflows
    inputs = [hidden, *weights(d, heads * headdim, bias=bias), *proj]
    options = dict(num_heads=heads)
    if lengths is not None:
        options["seq_lens"] = torch.tensor([min(lengths + 5 * i, length) for i in range(batch)], dtype=torch.int64)
    upstream = random(batch, length, heads * headdim)

    def ours(*t):
        return linformer_self_attention(*t, **options, rewrite=rewrite, backend=here(backend))

    wanted = gradients(lambda *t: self_attention_by_formula(*t, **options), inputs, upstream)
    torch.testing.assert_close(gradients(ours, inputs, upstream), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_sums_rounded_for_tensor_cores(monkeypatch, shared):
    """As on a GPU in bfloat16, on this device: the error is that of plain torch in bfloat16."""
    module = importlib.import_module("linconv.ops.linformer")
    rounded = []
    monkeypatch.setattr(module, "_rounds_sums", lambda *_: rounded.append(True) or True)
    proj = [random(300, 32) / 300**0.5, None if shared else random(300, 32) / 300**0.5]
    exact = [random(2, 300, 128), *weights(128, 64), *proj]
    exact = [t if t is None or t.dim() != 2 or t.shape[0] != 64 else t / 128**0.5 for t in exact]
    upstream = random(2, 300, 64)
    low = [None if t is None else t.bfloat16() for t in exact]
    exact = [None if t is None else t.double() for t in low]
    options = dict(num_heads=2)
    y, wanted = gradients(lambda *t: self_attention_by_formula(*t, **options), exact, upstream)
    torchs, their = gradients(lambda *t: self_attention_by_formula(*t, **options), low, upstream)
    ours, found = gradients(
        lambda *t: linformer_self_attention(*t, **options, rewrite=True, backend=here()), low, upstream
    )
    assert len(rounded) == 2 and ours.dtype == torch.bfloat16
    no_worse_than_torch(ours, torchs, y, 2, "result")
    names = ("hidden", "wq", "bq", "wk", "bk", "wv", "bv", "proj_k", "proj_v")
    for name, got, torch_s, exactly in zip(names, found, their, wanted):
        if got is not None:
            no_worse_than_torch(got, torch_s, exactly, 3, name)


def test_what_stands_in_the_padding_of_hidden_states_reaches_nothing():
    hidden, parameters = random(2, 20, 12), [*weights(12, 12), random(20, 4), random(20, 4)]
    padded = hidden.clone()
    padded[1, 13:] = torch.nan
    upstream, lengths = random(2, 20, 12), torch.tensor([20, 13])
    for rewrite in (True, False):
        options = dict(num_heads=3, seq_lens=lengths, rewrite=rewrite, backend=here())
        found = [
            gradients(lambda *t, options=options: linformer_self_attention(*t, **options), [h, *parameters], upstream)
            for h in (hidden, padded)
        ]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        assert not found[0][0][1, 13:].any()


def test_the_cheaper_order_is_taken(monkeypatch):
    """By operations: see the docstring. The larger L is, the more the rewrite saves."""
    assert not rewrite_pays(16, 256, 768, 768, shared=False)
    assert rewrite_pays(1024, 256, 768, 768, shared=False) and rewrite_pays(4096, 512, 768, 768, shared=True)
    rows, operator = [], dispatch.operator

    def counted(name, backend):
        run = operator(name, backend)
        return (lambda x, *rest: rows.append(x.shape[1]) or run(x, *rest)) if name == "linformer_project" else run

    monkeypatch.setattr(dispatch, "operator", counted)
    for length, sums in ((4, [2, 2]), (400, [1, 1])):  # heads of keys and values; columns of hidden states, and ones
        rows.clear()
        inputs = [random(1, length, 24).requires_grad_(), *weights(24, 24), random(400, 8)]
        linformer_self_attention(*inputs, num_heads=2, backend=here())
        assert rows == sums, length


@pytest.mark.skipif(not dispatch.compiled("linear"), reason="torch's products are not bound to bits")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rewrite", [True, False])
def test_a_padded_row_of_self_attention_is_what_it_is_alone(dtype, rewrite):
    """Bit for bit, results and gradients of hidden states, whatever stands in the padding: on CPU, by our products."""
    if here() != "cpu":
        pytest.skip("products with weights are torch's own on other devices")
    lengths, length, d, r = [0, 1, 40, 131, 130], 131, 70, 24
    parameters = [*weights(d, 48, dtype=dtype), random(length, r, dtype=dtype), random(length, r, dtype=dtype)]
    hidden, upstream = random(len(lengths), length, d, dtype=dtype), random(len(lengths), length, 48, dtype=dtype)
    padded = hidden.clone()
    for row, n in enumerate(lengths):
        padded[row, n:] = torch.nan if row % 2 else torch.inf
    options = dict(num_heads=3, rewrite=rewrite, backend=here())

    def of(h, up, **more):
        with torch.no_grad():
            without = linformer_self_attention(h, *parameters, **options, **more)
        y, (grad, *_) = gradients(lambda *t: linformer_self_attention(*t, **options, **more), [h, *parameters], up)
        return without, y, grad

    together = of(padded, upstream, seq_lens=torch.tensor(lengths))
    for row, n in enumerate(lengths):
        alone = of(hidden[row : row + 1, :n], upstream[row : row + 1, :n])
        for got, wanted in zip(together, alone):
            same_bits(got[row : row + 1, :n], wanted)
            assert not got[row, n:].any()


# ---- At once: without gradients, on CPU


def at_once(*inputs, num_heads, normalize=True, seq_lens=None):
    *rest, proj_k, proj_v = inputs
    scale = (rest[1].shape[0] // num_heads) ** -0.5
    return torch.ops.linconv.linformer_self_attention(
        *rest, proj_k[None], None if proj_v is None else proj_v[None], num_heads, scale, normalize, seq_lens
    )


needs_at_once = pytest.mark.skipif(
    not dispatch.compiled("linformer_self_attention"), reason="the compiled library is not there"
)


@needs_at_once
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 6, 70]),
    heads=st.integers(1, 3),
    headdim=st.sampled_from([1, 5, 16]),
    d=st.sampled_from([1, 9, 130]),
    r=st.sampled_from([1, 4, 33]),
    bias=st.sampled_from([(), (1,), (1, 3, 5), (3,), (5,)]),
    shared=st.booleans(),
    normalize=st.booleans(),
    lengths=st.none() | st.integers(0, 6),
)
def test_at_once_oracle(batch, length, heads, headdim, d, r, bias, shared, normalize, lengths):
    if here() != "cpu":
        pytest.skip("an operator for CPU")
    inputs = [
        random(batch, length, d) / d**0.5,
        *weights(d, heads * headdim),
    ]  # small scores: the formula's exp overflows
    inputs = [None if i in (2, 4, 6) and i - 1 not in bias else t for i, t in enumerate(inputs)]
    inputs += [random(length + 3, r), None if shared else random(length + 3, r)]
    options = dict(num_heads=heads, normalize=normalize)
    if lengths is not None:
        options["seq_lens"] = torch.tensor([min(lengths + 30 * i, length) for i in range(batch)], dtype=torch.int64)
    wanted = self_attention_by_formula(*inputs, **options)
    torch.testing.assert_close(at_once(*inputs, **options), wanted, rtol=1e-9, atol=1e-9)


@needs_at_once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_at_once_is_what_its_parts_give(dtype, number):
    """Bit for bit: with gradients wanted or not, and for any number of threads; of long sequences too."""
    if here() != "cpu":
        pytest.skip("an operator for CPU")
    inputs = [
        random(2, 1_100, 48, dtype=dtype),
        *weights(48, 64, dtype=dtype),
        *(random(1_100, 24, dtype=dtype) for _ in "kv"),
    ]
    options = dict(num_heads=4, seq_lens=torch.tensor([1_100, 600]), backend=here())
    with threads(number):
        whole = linformer_self_attention(*inputs, **options)
    parts = linformer_self_attention(inputs[0].requires_grad_(), *inputs[1:], **options)
    assert parts.requires_grad and not whole.requires_grad
    same_bits(whole, parts.detach())


@needs_at_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_once_low_precision(dtype):
    if here() != "cpu":
        pytest.skip("an operator for CPU")
    inputs = [
        random(1, 300, 64, dtype=dtype),
        *weights(64, 64, dtype=dtype),
        *(random(300, 32, dtype=dtype) for _ in "kv"),
    ]
    inputs[1:7:2] = [w / 8 for w in inputs[1:7:2]]
    plain = lambda *t: reference_self_attention(*t, num_heads=4)  # noqa: E731
    exact = plain(*(t.double() for t in inputs))
    no_worse_than_torch(at_once(*inputs, num_heads=4), plain(*inputs), exact, 2, "y")


def reference_self_attention(*inputs, **options):
    return linformer_self_attention(*inputs, **options, backend="reference")


@needs_at_once
def test_at_once_reads_any_strides():
    if here() != "cpu":
        pytest.skip("an operator for CPU")
    hidden, parameters = random(2, 90, 12), [*weights(12, 12), random(90, 8), random(90, 8)]
    wide = random(2, 180, 36)
    for view in (
        wide[:, ::2, 3:15],
        wide[:, 90:, ::3],
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        hidden[:1].expand(2, -1, -1),
    ):
        strided = [t if t.dim() == 1 else t.mT.contiguous().mT for t in parameters]
        same_bits(
            linformer_self_attention(view, *strided, num_heads=3, backend=here()),
            linformer_self_attention(view.contiguous(), *parameters, num_heads=3, backend=here()),
        )


@needs_at_once
def test_where_it_is_done_at_once():
    if here() != "cpu":
        pytest.skip("an operator for CPU")
    inputs = [random(1, 400, 24).float(), *weights(24, 24, dtype=torch.float32), random(400, 8).float()]

    def done(*, tensors=inputs, **options):
        with torch.profiler.profile() as profile:
            linformer_self_attention(*tensors, num_heads=2, **options)
        return "linconv::linformer_self_attention" in {e.key for e in profile.key_averages()}

    assert done() and done(backend="cpu") and done(rewrite=True)
    assert not done(backend="reference") and not done(dropout_p=0.1) and not done(rewrite=False)
    assert done(tensors=[t.bfloat16() for t in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        assert not done()
    for i in range(len(inputs)):
        tensors = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        assert not done(tensors=tensors)
        with torch.no_grad():
            assert done(tensors=tensors)


@needs_at_once
def test_at_once_as_an_operator():
    if here() != "cpu":
        pytest.skip("an operator for CPU")
    inputs = [random(2, 40, 16), *weights(16, 16), random(40, 4), random(40, 4)]
    arguments = [*inputs[:-2], inputs[-2][None], inputs[-1][None], 2, 0.3, True, torch.tensor([40, 9])]
    torch.library.opcheck(torch.ops.linconv.linformer_self_attention.default, arguments)
    plain = linformer_self_attention(*inputs, num_heads=2)
    compiled = torch.compile(lambda *t: linformer_self_attention(*t, num_heads=2), fullgraph=True, backend="aot_eager")
    same_bits(compiled(*inputs), plain)
    out = torch.ops.linconv.linformer_self_attention(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match="keeps nothing for gradients"):
        out.sum().backward()


@needs_at_once
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(20, 8)), "hidden has 2 dimensions"),
        (dict(hidden=torch.zeros(2, 20, 0)), "hidden has no columns"),
        (dict(heads=5), "num_heads is 5, wanted a divisor of 12"),
        (dict(wq=torch.zeros(12, 7)), "weight has size 7 in dimension 1, wanted 8"),
        (dict(wk=torch.zeros(24, 8), bk=None), "out has size 12 in dimension 1, wanted 24"),
        (dict(wv=torch.zeros(12, 8).double()), "x and weight: wanted both or none in Double"),
        (dict(bq=torch.zeros(11)), "bias has size 11"),
        (dict(bv=torch.zeros(11)), "bias has size 11"),
        (dict(proj_k=torch.zeros(3, 20, 4)), "proj has 3 heads"),
        (dict(proj_v=torch.zeros(1, 20, 5)), "proj_v has r = 5, wanted 4"),
        (dict(proj_v=torch.zeros(1, 19, 4)), "x has 20 frames, wanted at most 19"),
    ],
)
def test_at_once_checks_what_it_reads(change, message):
    good = dict(hidden=torch.zeros(2, 20, 8))
    good |= dict(zip(("wq", "bq", "wk", "bk", "wv", "bv"), weights(8, 12, dtype=torch.float32)))
    good |= dict(proj_k=torch.zeros(1, 20, 4), proj_v=torch.zeros(1, 20, 4), heads=3)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linconv.linformer_self_attention(
            *(t.cpu() if isinstance(t, torch.Tensor) else t for t in (good | change).values()), 0.5, True, None
        )


def test_self_attention_under_autocast_and_compiled():
    inputs = [random(2, 40, 16).float(), *weights(16, 16, dtype=torch.float32), random(40, 4).float()]
    options = dict(num_heads=2, seq_lens=torch.tensor([40, 9]), rewrite=True, backend=here())
    plain = linformer_self_attention(*inputs, **options)
    with torch.autocast(here(), torch.bfloat16):
        mixed = linformer_self_attention(*inputs, **options)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - plain).norm() < 0.02 * plain.norm()
    compiled = torch.compile(lambda *t: linformer_self_attention(*t, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), plain)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(num_heads=5), ValueError, "num_heads is 5, wanted a divisor of the 12 rows of wq"),
        (dict(num_heads=0), ValueError, "num_heads is 0"),
        (dict(wk=torch.zeros(12, 7)), ValueError, r"wk has shape \(12, 7\)"),
        (dict(bv=torch.zeros(11)), ValueError, r"bv has shape \(11,\)"),
        (
            dict(hidden=torch.zeros(2, 20, 0)),
            ValueError,
            r"hidden has shape \(2, 20, 0\), wanted \(batch, L, d\) with d",
        ),
        (dict(hidden=torch.zeros(20, 8)), ValueError, r"hidden has shape \(20, 8\), wanted \(batch, L, d\)"),
        (dict(proj_k=torch.zeros(3, 20, 4), rewrite=True), ValueError, "rewrite is True with projections per head"),
        (dict(proj_k=torch.zeros(19, 4)), ValueError, "proj_k has Lmax = 19 frames, wanted at least L = 20"),
    ],
)
def test_bad_arguments_of_self_attention(change, error, message):
    names = ("wq", "bq", "wk", "bk", "wv", "bv")
    good = dict(zip(names, weights(8, 12, dtype=torch.float32)))
    good |= dict(hidden=torch.zeros(2, 20, 8), proj_k=torch.zeros(20, 4), num_heads=3)
    change = {n: t.to(torch.get_default_device()) if isinstance(t, torch.Tensor) else t for n, t in change.items()}
    with pytest.raises(error, match=message):
        linformer_self_attention(**(good | change))
