"""Short depthwise convolution over time, causal, anti-causal or both in one pass, with an optional SiLU."""

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable
from linconv.ops.short_conv import reference

__all__ = ["bidirectional_short_conv", "short_conv"]

WIDTHS = range(2, 9)


def short_conv(
    x, weight, bias=None, *, activation="silu", reverse=False, lookahead=0, seq_lens=None, cu_seqlens=None, backend=None
):  # fmt: skip
    """Depthwise convolution over time: ``y_t = act(bias + sum_k weight[:, k] * x_{t - (width - 1) + k + lookahead})``.

    Frames outside the sequence are zeros. Arithmetic is in float32, or float64 for float64 input.

    Args:
        x: (batch, L, channels), float32, bfloat16, float16 or float64, any strides.
        weight: (channels, width), 2 <= width <= 8.
        bias: (channels,) or None.
        activation: "silu" or None.
        reverse: mirrored in time, so that frame t sees t and later ones (anti-causal, for lookahead=0).
        lookahead: frames ahead that the window reaches, 0 <= lookahead < width; (width - 1) / 2 centres it.
        seq_lens: int32 or int64 (batch,): the number of valid frames of each row. Padding is not read; the
            result there and its gradient are zero.
        cu_seqlens: int32 or int64 (sequences + 1,), the starts of the sequences packed into a batch of 1, then L.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        (batch, L, channels) in x's dtype.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Source: Gu and Dao, arXiv 2312.00752 (causal); Hwang et al., arXiv 2407.09941 (centred).
    """
    checks.floating_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (batch, L, channels)")
    channels = x.shape[2]
    checks.floating_tensor("weight", weight)
    checks.shape("weight", weight, (channels, None), "(channels, width)")
    if bias is not None:
        checks.floating_tensor("bias", bias)
        checks.shape("bias", bias, (channels,), "(channels,)")
    checks.flag("reverse", reverse)
    _check(x, weight, bias, activation, lookahead, seq_lens, cu_seqlens)
    backend = dispatch.pick("short_conv", x.device, backend)
    if backend == "reference":
        return reference.short_conv(
            x, weight, bias, activation=activation, reverse=reverse, lookahead=lookahead, seq_lens=seq_lens,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    bias = None if bias is None else bias[None]
    silu = activation == "silu"
    operands = x[None], weight[None], bias, silu, reverse, lookahead, seq_lens, cu_seqlens
    return dispatch.run("short_conv", backend, *operands)[0]


def bidirectional_short_conv(
    x, weight, bias=None, *, activation="silu", seq_lens=None, cu_seqlens=None, backend=None
):  # fmt: skip
    """A causal and an anti-causal :func:`short_conv` with separate weights, in one pass over x if they share it.

    Args:
        x: (batch, L, channels), shared by both directions, or (2, batch, L, channels), one per direction.
        weight: (2, channels, width), 2 <= width <= 8.
        bias: (2, channels) or None.
        activation, seq_lens, cu_seqlens, backend: as in :func:`short_conv`.

    Returns:
        (2, batch, L, channels) in x's dtype: the causal convolution, then the anti-causal one.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
    """
    checks.floating_tensor("x", x)
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[0] != 2):
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (batch, L, channels) or (2, batch, L, channels)")
    channels = x.shape[-1]
    checks.floating_tensor("weight", weight)
    checks.shape("weight", weight, (2, channels, None), "(2, channels, width)")
    if bias is not None:
        checks.floating_tensor("bias", bias)
        checks.shape("bias", bias, (2, channels), "(2, channels)")
    _check(x, weight, bias, activation, 0, seq_lens, cu_seqlens)
    backend = dispatch.pick("short_conv", x.device, backend)
    if backend == "reference":
        return reference.bidirectional_short_conv(
            x, weight, bias, activation=activation, seq_lens=seq_lens, cu_seqlens=cu_seqlens
        )
    x = x if x.dim() == 4 else x[None]
    return dispatch.run("short_conv", backend, x, weight, bias, activation == "silu", False, 0, seq_lens, cu_seqlens)


def _check(x, weight, bias, activation, lookahead, seq_lens, cu_seqlens):
    """Check what both functions require of their arguments besides shapes."""
    checks.like("weight", weight, "x", x)
    if bias is not None:
        checks.like("bias", bias, "x", x)
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}, wanted 'silu' or None")
    check_window("weight", weight.shape[-1], lookahead)
    checks.sequence_bounds(seq_lens, cu_seqlens, x.shape[-3], x.shape[-2], x.device)


def check_window(name, width, lookahead):
    """Raise ValueError or TypeError unless ``width``, that of the weight ``name``, and ``lookahead`` are possible."""
    if not WIDTHS.start <= width < WIDTHS.stop:  # not `in`: in a traced graph the width may be a symbol
        raise ValueError(f"{name} has width {width}, wanted {WIDTHS.start} to {WIDTHS.stop - 1}")
    if not isinstance(lookahead, int):
        raise TypeError(f"lookahead is {type(lookahead).__name__}, wanted an int")
    if not 0 <= lookahead < width:
        raise ValueError(f"lookahead is {lookahead}, wanted 0 to width - 1 = {width - 1}")


def _fake(x, weight, bias, silu, reverse, lookahead, seq_lens, cu_seqlens):
    return x.new_empty(weight.shape[0], *x.shape[1:])


def _fake_backward(grad, x, weight, bias, silu, reverse, lookahead, seq_lens, cu_seqlens):
    grad_bias = (weight if bias is None else bias).new_empty(weight.shape[:2])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias


def _save(ctx, inputs, output):
    x, weight, bias, *ctx.options, seq_lens, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, seq_lens, cu_seqlens)


def _backward(ctx, grad):
    grads = _gradients(ctx, grad, *ctx.saved_tensors)
    return *grads, None, None, None, None, None


@once_differentiable
def _gradients(ctx, grad, x, weight, bias, seq_lens, cu_seqlens):
    grad_x, grad_weight, grad_bias = ctx.backward_operator(grad, x, weight, bias, *ctx.options, seq_lens, cu_seqlens)
    return grad_x, grad_weight, None if bias is None else grad_bias


dispatch.register(
    "short_conv",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_save,
    backward=_backward,
    triton="linconv.ops.short_conv.triton",
    prefer=("triton", "cuda"),
)
