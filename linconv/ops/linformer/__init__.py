"""Linformer attention (Wang et al., arXiv 2006.04768): every frame attends to r projections of all frames.

It consists of two operators, each with its own gradients. ``linformer_project`` sums the frames into r of them;
``linformer_attend`` is attention of the frames to those r, which stay in cache. A third operator,
``linformer_self_attention``, computes all of self-attention in one call on CPU if no gradients are needed.
"""

import math

import torch

from linconv.ops import checks, dispatch
from linconv.ops.autograd import call, once_differentiable
from linconv.ops.linear import linear
from linconv.ops.linformer import reference
from linconv.ops.masks import frame_mask

__all__ = ["linformer_attention", "linformer_self_attention", "rewrite_pays"]

MAX_RANK, MAX_HEADDIM = 512, 256


def linformer_attention(
    q, k, v, proj_k, proj_v=None, *, seq_lens=None, scale=None, normalize=True, dropout_p=0.0, backend=None
):
    """``softmax(scale q K'^T) V'`` with ``K' = E^T (m k) / sqrt(len)`` and ``V' = F^T (m v) / sqrt(len)``.

    m masks the valid frames and len is their number. Arithmetic is in float32, or float64 for float64 input;
    factors of matrix products may be rounded to the dtype of q (docs/ops.md).

    Args:
        q, k, v: (batch, heads, L, headdim), headdim 1 to 256; float32, bfloat16, float16 or float64, any strides.
        proj_k: E, (Lmax, r) or one per head (heads, Lmax, r), L <= Lmax, r 1 to 512; its first L rows are used.
        proj_v: F, as proj_k and with the same r; None to use E (shared by keys and values).
        seq_lens: int32 or int64 (batch,), the number of valid frames of each row. Padding is not read; the result
            there and its gradients are zero. A row gives the same bits as it gives alone.
        scale: factor of the scores; None for 1 / sqrt(headdim).
        normalize: whether to divide K' and V' by the root of the number of valid frames, which makes their size
            independent of it.
        dropout_p: the share of attention weights to drop, 0 <= dropout_p < 1. The draw is a hash of a seed from
            torch's generator and the position of a weight: the same in backward and for any number of threads.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        Shape and dtype of q, laid out as (batch, L, heads, headdim): ``out.transpose(1, 2).flatten(-2)`` is a view.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value, such as L > Lmax.

    Source: arXiv 2006.04768, section 4, eq. 7.
    """
    _check(q, k, v, proj_k, proj_v)
    batch, _, length, headdim = q.shape
    proj_k, proj_v = _per_head(proj_k, proj_v)
    checks.sequence_bounds(seq_lens, None, batch, length, q.device)
    checks.flag("normalize", normalize)
    scale = _scale(scale, headdim)
    seed = _seed(dropout_p, q.device)
    projected = [_project(x, proj, normalize, seq_lens, backend) for x, proj in ((k, proj_k), (v, proj_v))]
    return _attend(q, *projected, scale, dropout_p, seed, seq_lens, backend)


def linformer_self_attention(
    hidden, wq, bq, wk, bk, wv, bv, proj_k, proj_v=None, *, num_heads, seq_lens=None, scale=None, normalize=True,
    dropout_p=0.0, rewrite=None, backend=None,
):  # fmt: skip
    """`linformer_attention` of the projections of hidden states, ``q = hidden wq^T + bq`` and so on.

    Only sums of keys and values over frames are needed, and ``E^T (X W + 1 b^T) = (E^T X) W + (E^T 1) b^T`` exactly:
    their projections then cost r instead of L rows each. The order with fewer operations is used, see `rewrite_pays`.

    Args:
        hidden: (batch, L, d), float32, bfloat16, float16 or float64.
        wq, wk, wv: (num_heads * headdim, d), as the weight of torch.nn.Linear.
        bq, bk, bv: (num_heads * headdim,) or None.
        proj_k, proj_v, seq_lens, scale, normalize, dropout_p, backend: as for `linformer_attention`.
        num_heads: number of heads.
        rewrite: whether to sum before projecting; None for the cheaper order. Not possible with projections per head.

    Returns:
        (batch, L, num_heads * headdim) in hidden's dtype (autocast's if it is on), zero in the padding.

    Raises:
        TypeError, ValueError: as `linformer_attention`.

    On CPU, a padded row gives the same bits as it gives alone in the same order of operations. Elsewhere torch
    computes the products with weights, whose last bits depend on the number of rows.
    """
    _check_self(hidden, wq, bq, wk, bk, wv, bv, proj_k, proj_v, num_heads)
    (batch, length, d), width = hidden.shape, wq.shape[0]
    headdim = width // num_heads
    shared = proj_v is None
    proj_k, proj_v = _per_head(proj_k, proj_v)
    checks.sequence_bounds(seq_lens, None, batch, length, hidden.device)
    per_head = proj_k.shape[0] > 1 or proj_v.shape[0] > 1
    if rewrite is not None:
        checks.flag("rewrite", rewrite)
    if rewrite and per_head:
        raise ValueError("rewrite is True with projections per head, wanted ones that all heads share")
    if rewrite is None:
        # An exported program serves all lengths: use the order that suits the longest one.
        decisive = proj_k.shape[1] if torch.compiler.is_exporting() and not _is_static(length) else length
        rewrite = not per_head and rewrite_pays(decisive, proj_k.shape[2], d, width, shared=shared)
    checks.flag("normalize", normalize)
    scale = _scale(scale, headdim)
    seed = _seed(dropout_p, hidden.device)
    if rewrite and seed is None and _at_once(hidden, (wq, bq, wk, bk, wv, bv, proj_k, proj_v), backend):
        hidden = hidden.contiguous()
        proj_v = None if shared else proj_v
        return call(
            torch.ops.linconv.linformer_self_attention, hidden, wq, bq, wk, bk, wv, bv, proj_k, proj_v, num_heads,
            scale, normalize, seq_lens,
        )  # fmt: skip
    if seq_lens is not None:  # the padding must not affect the gradients of weights
        hidden = hidden.masked_fill(~frame_mask(seq_lens, length)[..., None], 0)

    def heads(x):
        # The function: before torch 2.15 the method does not compile under a default device.
        return torch.unflatten(x, -1, (num_heads, headdim)).transpose(1, 2)  # (batch, heads, frames, headdim)

    def summed(x, proj):
        return _project(x, proj, normalize, seq_lens, backend)

    def projected(x, weight, bias, factor=None):
        return linear(x, weight, bias, factor=factor, backend=backend)

    q = heads(projected(hidden, wq, bq))
    if rewrite:
        sums = _sum_then_project(hidden, wk, bk, wv, bv, proj_k, None if shared else proj_v, summed, projected)
        k, v = map(heads, sums)
    else:
        k, v = (summed(heads(projected(hidden, w, b)), e) for w, b, e in ((wk, bk, proj_k), (wv, bv, proj_v)))
    return _attend(q, k, v, scale, dropout_p, seed, seq_lens, backend).transpose(1, 2).flatten(-2)


def _is_static(size):
    """Whether a size in a traced graph is a fixed number; in a strict export its type does not tell."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, but loaded in any export

    return has_static_value(size)


def _at_once(hidden, parameters, backend):
    """Whether the operator that keeps nothing for gradients can run the whole call."""
    if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, *parameters)):
        return False
    op = "linformer_self_attention"
    return backend in (None, "cpu") and dispatch.compiled(op) and dispatch.pick(op, hidden.device, backend) == "cpu"


def rewrite_pays(length, rank, d, width, *, shared):
    """Whether summing hidden states over frames before the projections of keys and values takes fewer operations.

    Args:
        length, rank, d, width: L, r, the widths of hidden states and of keys.
        shared: whether keys and values share one projection, so that one sum serves both.
    """
    sums = 1 if shared else 2
    before = 2 * length * d * width + 2 * length * rank * width
    after = sums * length * rank * (d + 1) + 2 * rank * d * width
    return after < before


def _sum_then_project(hidden, wk, bk, wv, bv, proj_k, proj_v, summed, projected):
    """Projected keys and values, (batch, r, width) each, from sums of hidden states; proj_v is None if shared."""
    d = hidden.shape[-1]
    # The kernels take heads, of a limited width: columns are passed as if they were some.
    blocks = next(n for n in range(1, d + 1) if d % n == 0 and d // n <= 64)
    columns = torch.unflatten(hidden, -1, (blocks, d // blocks)).transpose(1, 2)  # (batch, blocks, L, d / blocks)
    ones = hidden.new_ones(()).expand(hidden.shape[0], 1, hidden.shape[1], 1)
    biased = bk is not None or bv is not None

    def sums(proj):  # of the frames (batch, r, d), and of a one per frame (batch, r)
        return summed(columns, proj).transpose(1, 2).flatten(-2), summed(ones, proj)[:, 0, :, 0] if biased else None

    def product(frames, factor, weight, bias):
        bias = None if bias is None else bias.to(frames.dtype)
        if not _rounds_sums(hidden, weight):
            return projected(frames, weight.to(frames.dtype), bias, factor)
        out = projected(frames.to(weight.dtype), weight, None).to(frames.dtype)
        return out if bias is None else torch.addcmul(out, factor[..., None], bias)

    of_keys = sums(proj_k)
    of_values = of_keys if proj_v is None else sums(proj_v)
    return (product(*of_frames, w, b) for of_frames, w, b in ((of_keys, wk, bk), (of_values, wv, bv)))


def _rounds_sums(hidden, weight):
    """Whether the sums of hidden states over frames are rounded to bfloat16 for the product with a weight.

    A GPU multiplies float32 without its tensor cores. The other order of the products rounds too: every frame's keys.
    """
    return hidden.device.type == "cuda" and hidden.dtype == weight.dtype == torch.bfloat16


# ---- Checks


@checks.remembered
def _check(q, k, v, proj_k, proj_v):
    for name, value in (("q", q), ("k", k), ("v", v)):
        checks.floating_tensor(name, value)
        checks.like(name, value, "q", q)
        checks.shape(name, value, tuple(q.shape) if q.dim() == 4 else (None,) * 4, "(batch, heads, L, headdim)")
    _, heads, length, headdim = q.shape
    _check_projections(proj_k, proj_v, heads, length, q)
    _check_headdim(headdim)


@checks.remembered
def _check_self(hidden, wq, bq, wk, bk, wv, bv, proj_k, proj_v, num_heads):
    checks.floating_tensor("hidden", hidden)
    checks.shape("hidden", hidden, (None, None, None), "(batch, L, d)")
    _, length, d = hidden.shape
    if d < 1:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, wanted (batch, L, d) with d from 1 up")
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads is {num_heads!r}, wanted an integer from 1 up")
    for name, weight, bias in (("q", wq, bq), ("k", wk, bk), ("v", wv, bv)):
        checks.floating_tensor(f"w{name}", weight)
        checks.like(f"w{name}", weight, "hidden", hidden)
        width = wq.shape[0] if wq.dim() == 2 else None
        checks.shape(f"w{name}", weight, (width, d), "(num_heads * headdim, d)")
        if bias is not None:
            checks.floating_tensor(f"b{name}", bias)
            checks.like(f"b{name}", bias, "hidden", hidden)
            checks.shape(f"b{name}", bias, (width,), "(num_heads * headdim,)")
    if width % num_heads:
        raise ValueError(f"num_heads is {num_heads}, wanted a divisor of the {width} rows of wq")
    _check_projections(proj_k, proj_v, num_heads, length, hidden)
    _check_headdim(width // num_heads)


def _check_projections(proj_k, proj_v, heads, length, like):
    ranks = []
    for name, proj in (("proj_k", proj_k), ("proj_v", proj_k if proj_v is None else proj_v)):
        checks.floating_tensor(name, proj)
        checks.like(name, proj, "q", like)
        wanted = (heads, None, None) if proj.dim() == 3 else (None, None)
        checks.shape(name, proj, wanted, "(heads, Lmax, r)" if proj.dim() == 3 else "(Lmax, r)")
        if length > proj.shape[-2]:
            raise ValueError(f"{name} has Lmax = {proj.shape[-2]} frames, wanted at least L = {length}")
        if not 1 <= proj.shape[-1] <= MAX_RANK:
            raise ValueError(f"{name} has r = {proj.shape[-1]}, wanted 1 to {MAX_RANK}")
        ranks.append(proj.shape[-1])
    if ranks[0] != ranks[1]:
        raise ValueError(f"proj_v has r = {ranks[1]}, wanted {ranks[0]} as proj_k")


def _per_head(proj_k, proj_v):
    """Both as (1 or heads, Lmax, r)."""
    proj_k = proj_k if proj_k.dim() == 3 else proj_k[None]
    if proj_v is None:
        return proj_k, proj_k
    return proj_k, proj_v if proj_v.dim() == 3 else proj_v[None]


def _check_headdim(headdim):
    if not 1 <= headdim <= MAX_HEADDIM:
        raise ValueError(f"headdim is {headdim}, wanted 1 to {MAX_HEADDIM}")


def _scale(scale, headdim):
    if scale is None:
        return 1 / math.sqrt(headdim)
    checks.number("scale", scale)
    return float(scale)


def _seed(dropout_p, device):
    """A seed from torch's generator, int64 (); None without dropout."""
    if not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p is {type(dropout_p).__name__}, wanted a float")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, wanted 0 <= dropout_p < 1")
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) if dropout_p > 0 else None


# ---- The two operators


def _project(x, proj, normalize, seq_lens, backend):
    backend = dispatch.pick("linformer_project", x.device, backend)
    if backend == "reference":
        return reference.project(x, proj, normalize=normalize, seq_lens=seq_lens)
    return dispatch.run("linformer_project", backend, x, proj, normalize, seq_lens)


def _attend(q, k, v, scale, dropout_p, seed, seq_lens, backend):
    backend = dispatch.pick("linformer_attend", q.device, backend)
    if backend == "reference":
        return reference.attend(q, k, v, scale=scale, dropout_p=dropout_p, seed=seed, seq_lens=seq_lens)
    return dispatch.run("linformer_attend", backend, q, k, v, scale, dropout_p, seed, seq_lens)


def _empty_frames(x):
    batch, heads, length, headdim = x.shape
    return x.new_empty(batch, length, heads, headdim).transpose(1, 2)


def _fake_project(x, proj, normalize, seq_lens):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], x.shape[1], proj.shape[2], x.shape[3], dtype=dtype)


def _fake_project_backward(grad, x, proj, normalize, seq_lens):
    return _empty_frames(x), proj.new_empty(proj.shape)


def _save_project(ctx, inputs, output):
    x, proj, ctx.normalize, seq_lens = inputs
    ctx.save_for_backward(x, proj, seq_lens)


def _project_backward(ctx, grad):
    return *_project_gradients(ctx, grad, *ctx.saved_tensors), None, None


@once_differentiable
def _project_gradients(ctx, grad, x, proj, seq_lens):
    return ctx.backward_operator(grad, x, proj, ctx.normalize, seq_lens)


def _fake_attend(q, k, v, scale, dropout_p, seed, seq_lens):
    return _empty_frames(q)


def _fake_attend_backward(grad, q, k, v, scale, dropout_p, seed, seq_lens):
    return _empty_frames(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attend(ctx, inputs, output):
    q, k, v, *ctx.options, seed, seq_lens = inputs
    ctx.save_for_backward(q, k, v, seed, seq_lens)


def _attend_backward(ctx, grad):
    return *_attend_gradients(ctx, grad, *ctx.saved_tensors), None, None, None, None


@once_differentiable
def _attend_gradients(ctx, grad, q, k, v, seed, seq_lens):
    return ctx.backward_operator(grad, q, k, v, *ctx.options, seed, seq_lens)


# Triton comes first on CUDA tensors: nearly all work is matrix products, which its kernels run on tensor cores;
# those of csrc/linformer/cuda.cu use CUDA cores: on an H200 they take 3 times as long at 65,536 frames.
PREFER = ("triton", "cuda")
dispatch.register(
    "linformer_project",
    fake=_fake_project,
    fake_backward=_fake_project_backward,
    setup_context=_save_project,
    backward=_project_backward,
    triton="linconv.ops.linformer.triton",
    prefer=PREFER,
)
dispatch.register(
    "linformer_attend",
    fake=_fake_attend,
    fake_backward=_fake_attend_backward,
    setup_context=_save_attend,
    backward=_attend_backward,
    triton="linconv.ops.linformer.triton",
    prefer=PREFER,
)


def _fake_self_attention(hidden, wq, *rest):
    return hidden.new_empty(*hidden.shape[:2], wq.shape[0])


def _no_gradients(ctx, grad):
    raise RuntimeError(
        "linconv::linformer_self_attention keeps nothing for gradients: call linconv.ops.linformer_self_attention, "
        "which takes other operators where they are wanted"
    )


dispatch.register(
    "linformer_self_attention",
    fake=_fake_self_attention,
    setup_context=lambda ctx, inputs, output: None,
    backward=_no_gradients,
)
