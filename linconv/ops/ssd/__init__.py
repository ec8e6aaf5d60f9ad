"""State space dual scan of Mamba-2 in one direction."""

import torch

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable
from linconv.ops.masks import frame_mask
from linconv.ops.ssd import arguments, reference

INF = float("inf")


def ssd(
    x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF), initial_states=None,
    return_final_states=False, seq_lens=None, cu_seqlens=None, reverse=False, backend=None,
):  # fmt: skip
    """State space dual scan (Mamba-2, Dao and Gu, arXiv 2405.21060, eq. 1-2 and section 6), per head:

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,    y_t = C_t h_t + D x_t

    with dt = clamp(softplus(dt + dt_bias), dt_limit). Arithmetic is in fp32 (fp64 for fp64 arguments), whatever the
    arguments' dtypes, but for factors of matrix products on GPUs (docs/ops.md). Gradients flow to every floating-point
    argument.

    Args:
        x: (batch, L, heads, headdim), headdim 1 to 256; fp32, bf16, fp16 or fp64, any strides, any L.
        dt: (batch, L, heads), the step of each frame before bias and softplus.
        A: (heads,), the rate of the state; must be negative for it to decay.
        B, C: (batch, L, groups, dstate), dstate 1 to 256; heads / groups heads share one group.
        D: (heads,), the weight of x_t in y_t.
        z: as x, the gate: the result is multiplied by silu(z). Kernels also round it to x's dtype before that.
        dt_bias: (heads,), added to dt.
        dt_softplus: whether softplus is applied to dt + dt_bias.
        dt_limit: (low, high); dt is clamped to it after that.
        initial_states: (sequences, heads, headdim, dstate), the state before a sequence's first step; zero if None.
            With seq_lens or neither, a sequence is a row of the batch; with cu_seqlens, a packed part.
        return_final_states: whether the states after each sequence's last step are returned too.
        seq_lens: (batch,) integers, the number of valid frames of each row. Later frames are never read.
        cu_seqlens: (sequences + 1,) integers from 0 to L: bounds of the sequences packed into a batch of one.
        reverse: run from each sequence's last valid frame to its first.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        y (batch, L, heads, headdim) in x's dtype, exactly zero at padding; with return_final_states
        (y, states), states (sequences, heads, headdim, dstate) in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    checks.flag("dt_softplus", dt_softplus)
    checks.flag("return_final_states", return_final_states)
    checks.flag("reverse", reverse)
    sizes = arguments.check(x, dt, A, B, C, D, dt_bias, dt_limit, seq_lens, cu_seqlens, directions=1)
    arguments.check_states(initial_states, sizes, cu_seqlens, x)
    if z is not None:
        checks.floating_tensor("z", z)
        checks.shape("z", z, tuple(x.shape), "the shape of x")
        checks.like("z", z, "x", x)
    backend = pick(x.device, sizes["L"], backend)
    if backend in reference.SCANS:
        # With a gate, y stays in the math dtype before it, to be rounded once.
        y, states = reference.ssd(
            x if z is None else x.to(arguments.math_dtype(x)), dt, A, B, C, D, dt_bias=dt_bias,
            dt_softplus=dt_softplus, dt_limit=dt_limit, initial_states=initial_states, seq_lens=seq_lens,
            cu_seqlens=cu_seqlens, reverse=reverse, scan=reference.SCANS[backend],
        )  # fmt: skip
    else:
        (initial_states,) = arguments.in_math_dtype(x, initial_states)
        A, D, dt_bias = arguments.of_heads(backend, x, A, D, dt_bias)
        y, states = dispatch.run(
            "ssd", backend, x, dt, A, B, C, D, dt_bias, dt_softplus, *map(float, dt_limit), initial_states, seq_lens,
            cu_seqlens, reverse,
        )  # fmt: skip
    if z is not None:
        y = _gated(y, z, seq_lens, x.dtype, reference.gate if backend in reference.SCANS else _Gate.apply)
    return (y, states) if return_final_states else y


def pick(device, length, backend=None):
    """The backend for this number of frames."""
    # The CUDA kernel processes one frame after another with the state in registers: best only for a decoding step.
    return dispatch.pick("ssd", device, backend, prefer=("cuda", "triton") if length == 1 else None)


def _gated(y, z, seq_lens, dtype, gate):
    """y silu(z), rounded to dtype."""
    if seq_lens is not None:  # before the product: 0 * NaN is NaN, in gradients too
        z = z.masked_fill(~frame_mask(seq_lens, z.shape[1])[..., None, None], 0)
    return gate(y, z).to(dtype)


class _Gate(torch.autograd.Function):
    """y silu(z) in the math dtype. An element's bits depend on that element alone. In torch's silu on CPU they also
    depend on its position: elements that fill a vector register are computed differently from the rest."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, z):
        z = _math(z)
        return _math(y) * z.div(torch.exp(-z).add_(1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _gate_gradients(ctx, grad, *ctx.saved_tensors)


@once_differentiable
def _gate_gradients(ctx, grad, y, z):
    of_z = _math(z)
    sigmoid = torch.exp(-of_z).add_(1).reciprocal_()
    slope = (1 - sigmoid).mul_(of_z).add_(1)  # silu'(z) / sigmoid(z)
    of_both = sigmoid * grad
    del sigmoid
    grad_y = (of_both * of_z).to(y.dtype)
    del of_z
    return grad_y, of_both.mul_(slope).mul_(y).to(z.dtype)  # batched if any operand is: in place works under vmap


def _math(x):
    """x in the math dtype."""
    return x.to(arguments.math_dtype(x))


def _fake(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, seq_lens, cu_seqlens, reverse):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = x.new_empty(sequences, *x.shape[2:], B.shape[3], dtype=arguments.math_dtype(x))
    return x.new_empty(x.shape), states


def _fake_backward(dy, dfinal_states, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max, initial_states, *_):
    return arguments.new_gradients(x, dt, A, B, C, D, dt_bias, initial_states)


def _setup_context(ctx, inputs, output):
    tensors, (softplus, low, high), rest = inputs[:7], inputs[7:10], inputs[10:]
    ctx.save_for_backward(*tensors, *rest[:3])
    ctx.options = (softplus, low, high, rest[3])


def _backward(ctx, dy, dfinal_states):
    *of_tensors, of_states = _gradients(ctx, dy, dfinal_states, *ctx.saved_tensors)
    return *of_tensors, None, None, None, of_states, None, None, None


@once_differentiable
def _gradients(ctx, dy, dfinal_states, *saved):
    *tensors, initial_states, seq_lens, cu_seqlens = saved
    softplus, low, high, reverse = ctx.options
    gradients = ctx.backward_operator(
        dy, dfinal_states, *tensors, softplus, low, high, initial_states, seq_lens, cu_seqlens, reverse
    )
    return tuple(arguments.only_present(gradients, (*tensors, initial_states)))


dispatch.register(
    "ssd", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward,
    triton="linconv.ops.ssd.triton", prefer=("triton", "cuda"),
)  # fmt: skip
