"""Selective scan of Mamba in one direction."""

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable
from linconv.ops.selective_scan import reference
from linconv.ops.ssd.arguments import MAX_SIZE, in_math_dtype, math_dtype, new_gradients, only_present

__all__ = ["selective_scan"]


def selective_scan(
    x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, initial_states=None, return_final_states=False,
    seq_lens=None, cu_seqlens=None, reverse=False, backend=None,
):  # fmt: skip
    """Selective scan (Mamba, Gu and Dao, arXiv 2312.00752, Algorithm 2), per channel c and entry n of its state:

        h_t[c, n] = exp(dt_t[c] A[c, n]) h_{t-1}[c, n] + dt_t[c] B_t[n] x_t[c],
        y_t[c] = (sum_n C_t[n] h_t[c, n] + D[c] x_t[c]) silu(z_t[c])

    with dt = softplus(dt + dt_bias). Arithmetic is in fp32 (fp64 for fp64 arguments), whatever the arguments' dtypes.
    Gradients flow to every floating-point argument. Unlike in `ssd`, each entry of a channel's state has its own rate.

    Args:
        x: (batch, L, channels); fp32, bf16, fp16 or fp64, any strides, any L.
        dt: (batch, L, channels), the step of each frame before bias and softplus.
        A: (channels, dstate), the rates of the states; must be negative for them to decay; dstate 1 to 256.
        B, C: (batch, L, groups, dstate); channels / groups adjacent channels share one group.
        D: (channels,), the weight of x_t in y_t.
        z: (batch, L, channels), the gate; none if None.
        dt_bias: (channels,), added to dt.
        dt_softplus: whether softplus is applied to dt + dt_bias.
        initial_states: (sequences, channels, dstate), the state before a sequence's first step; zero if None. With
            seq_lens or neither, a sequence is a row of the batch; with cu_seqlens, a packed part.
        return_final_states: whether the states after each sequence's last step are returned too.
        seq_lens: (batch,) integers, the number of valid frames of each row. Later frames are never read.
        cu_seqlens: (sequences + 1,) integers from 0 to L: bounds of the sequences packed into a batch of one.
        reverse: run from each sequence's last valid frame to its first.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        y (batch, L, channels) in x's dtype, exactly zero at padding; with return_final_states (y, states), states
        (sequences, channels, dstate) in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    checks.flag("dt_softplus", dt_softplus)
    checks.flag("return_final_states", return_final_states)
    checks.flag("reverse", reverse)
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_lens, cu_seqlens)
    backend = dispatch.pick("selective_scan", x.device, backend)
    if backend == "reference":
        y, states = reference.selective_scan(
            x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_states=initial_states,
            seq_lens=seq_lens, cu_seqlens=cu_seqlens, reverse=reverse,
        )  # fmt: skip
    else:
        A, D, dt_bias, initial_states = in_math_dtype(x, A, D, dt_bias, initial_states)
        y, states = dispatch.run(
            "selective_scan", backend, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, seq_lens, cu_seqlens,
            reverse,
        )  # fmt: skip
    return (y, states) if return_final_states else y


def _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_lens, cu_seqlens):
    given = dict(dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states)
    checks.floating_tensor("x", x)
    checks.shape("x", x, (None, None, None), "(batch, L, channels)")
    for name, value in given.items():
        if value is not None or name in ("dt", "A", "B", "C"):
            checks.floating_tensor(name, value)
            checks.like(name, value, "x", x)
    batch, length, channels = x.shape
    checks.shape("A", A, (channels, None), "(channels, dstate)")
    dstate = A.shape[1]
    if not 1 <= dstate <= MAX_SIZE:
        raise ValueError(f"dstate is {dstate} (A), wanted 1 to {MAX_SIZE}")
    for name in ("dt", "z"):
        if given[name] is not None:
            checks.shape(name, given[name], (batch, length, channels), "(batch, L, channels)")
    checks.shape("B", B, (batch, length, None, dstate), "(batch, L, groups, dstate)")
    groups = B.shape[2]
    checks.shape("C", C, (batch, length, groups, dstate), "(batch, L, groups, dstate)")
    if groups < 1 or channels % groups:
        raise ValueError(f"B has {groups} groups, wanted a divisor of the {channels} channels of x")
    for name in ("D", "dt_bias"):
        if given[name] is not None:
            checks.shape(name, given[name], (channels,), "(channels,)")
    checks.sequence_bounds(seq_lens, cu_seqlens, batch, length, x.device)
    if initial_states is not None:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        checks.shape("initial_states", initial_states, (sequences, channels, dstate), "(sequences, channels, dstate)")


def _fake(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, seq_lens, cu_seqlens, reverse):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, *A.shape, dtype=math_dtype(x))


def _fake_backward(dy, dfinal_states, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, *_):
    return new_gradients(x, dt, A, B, C, D, z, dt_bias, initial_states)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, initial_states, seq_lens, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, initial_states, seq_lens, cu_seqlens)


def _backward(ctx, dy, dfinal_states):
    *of_tensors, of_states = _gradients(ctx, dy, dfinal_states, *ctx.saved_tensors)
    return *of_tensors, None, of_states, None, None, None


@once_differentiable
def _gradients(ctx, dy, dfinal_states, *saved):
    *tensors, initial_states, seq_lens, cu_seqlens = saved
    gradients = ctx.backward_operator(
        dy, dfinal_states, *tensors, ctx.dt_softplus, initial_states, seq_lens, cu_seqlens, ctx.reverse
    )
    return tuple(only_present(gradients, (*tensors, initial_states)))


dispatch.register(
    "selective_scan", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward,
    triton="linconv.ops.selective_scan.triton",
)  # fmt: skip
