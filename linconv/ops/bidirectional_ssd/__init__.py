"""State space dual scan of Mamba-2 in both directions of time, in one call."""

import torch

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable
from linconv.ops.bidirectional_ssd import reference
from linconv.ops.ssd import arguments
from linconv.ops.ssd.reference import SCANS

INF = float("inf")
DIAGONALS = ("both", "once", "shifted")


def bidirectional_ssd(
    x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF), diagonal="both", seq_lens=None,
    cu_seqlens=None, backend=None,
):  # fmt: skip
    """`linconv.ops.ssd` forward and backward in time over the same frames.

    Any of x, dt, A, B, C, D, dt_bias may have a leading axis of 2 (forward, backward); without it, the directions share
    the argument. The usual regimes are *separate* (all per direction: the BiMamba2 of CALD, arXiv 2410.06846), *hydra*
    (x shared; dt, B, C per direction: Hydra, arXiv 2407.09941), *quasiseparable* (only dt and A per direction) and
    *tied* (all shared). With p the inclusive prefix sum of A dt^f over time and q the inclusive suffix sum of A dt^b:

        y_i = sum_{j<=i} e^{p_i - p_j} dt^f_j (C^f_i . B^f_j) x_j
            + sum_{j>=i} e^{q_i - q_j} dt^b_j (C^b_i . B^b_j) x_j + D x_i

    Args:
        x: (batch, L, heads, headdim) or (2, batch, L, heads, headdim), headdim 1 to 256, any strides, any L.
        dt: (batch, L, heads) or (2, batch, L, heads).
        A, D, dt_bias: (heads,) or (2, heads). With x shared, a shared D counts once and a per-direction D is summed.
        B, C: (batch, L, groups, dstate) or (2, batch, L, groups, dstate), dstate 1 to 256.
        dt_softplus, dt_limit, seq_lens, cu_seqlens, backend: as for `linconv.ops.ssd`. The backward direction starts
            at each sequence's own last frame.
        diagonal: which direction includes the frame itself, j = i. "both": both; "once": only the forward one;
            "shifted": neither. Each direction's result then moves one frame later in its own order, as in Hydra; D does
            not move and is the whole diagonal.

    Returns:
        If x is shared, the sum of the directions, (batch, L, heads, headdim); if it is per direction,
        (2, batch, L, heads, headdim). In x's dtype, exactly zero at padding.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    checks.flag("dt_softplus", dt_softplus)
    arguments.check(x, dt, A, B, C, D, dt_bias, dt_limit, seq_lens, cu_seqlens, directions=2)
    check_diagonal(diagonal)
    dtype = x.dtype if x.dtype == B.dtype == C.dtype else None
    backend = pick(x.device, dtype, x.shape[-1], B.shape[-1], backend)
    if backend in SCANS:
        return reference.bidirectional_ssd(
            x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, diagonal=diagonal,
            seq_lens=seq_lens, cu_seqlens=cu_seqlens, scan=SCANS[backend],
        )  # fmt: skip
    A, D, dt_bias = arguments.of_heads(backend, x, A, D, dt_bias)
    return dispatch.run(
        "bidirectional_ssd", backend, x, dt, A, B, C, D, dt_bias, dt_softplus, *map(float, dt_limit), diagonal,
        seq_lens, cu_seqlens,
    )  # fmt: skip


def check_diagonal(diagonal):
    """Raise ValueError if there is no such diagonal."""
    if diagonal not in DIAGONALS:
        raise ValueError(f"diagonal is {diagonal!r}, wanted one of {', '.join(map(repr, DIAGONALS))}")


def pick(device, dtype, headdim, dstate, backend=None):
    """The backend for these sizes and this common dtype of x, B and C (None if their dtypes differ)."""
    # What csrc/bidirectional_ssd/cuda.cu supports.
    fused = dtype in (torch.bfloat16, torch.float16) and headdim == 64 and dstate in (64, 128)
    return dispatch.pick("bidirectional_ssd", device, backend, cuda_takes=fused)


def _fake(x, *_):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, dt, A, B, C, D, dt_bias, *_):
    return arguments.new_gradients(x, dt, A, B, C, D, dt_bias)


def _setup_context(ctx, inputs, output):
    *tensors, softplus, low, high, diagonal, seq_lens, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, seq_lens, cu_seqlens)
    ctx.options = (softplus, low, high, diagonal)


def _backward(ctx, dy):
    return *_gradients(ctx, dy, *ctx.saved_tensors), *[None] * 6


@once_differentiable
def _gradients(ctx, dy, *saved):
    *tensors, seq_lens, cu_seqlens = saved
    gradients = ctx.backward_operator(dy, *tensors, *ctx.options, seq_lens, cu_seqlens)
    return tuple(arguments.only_present(gradients, tensors))


# The fused CUDA kernel is slower than Triton's, so it runs only if backend="cuda" is given. Triton computes gradients.
dispatch.register(
    "bidirectional_ssd", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward,
    triton="linconv.ops.bidirectional_ssd.triton", prefer=("triton",),
)  # fmt: skip
