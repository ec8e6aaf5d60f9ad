"""State space dual scan of Mamba-2 in one direction."""

import torch
import torch.nn.functional as F

from linconv.ops import dispatch
from linconv.ops.ssd import arguments, reference

INF = float("inf")


def ssd(
    x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF), initial_states=None,
    return_final_states=False, seq_lens=None, cu_seqlens=None, reverse=False, backend=None,
):  # fmt: skip
    """State space dual scan (Mamba-2, Dao and Gu, arXiv 2405.21060, eq. 1-2 and section 6), per head:

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,    y_t = C_t h_t + D x_t

    with dt = clamp(softplus(dt + dt_bias), dt_limit). The math is in fp32 (fp64 for fp64 arguments), whatever the
    arguments' dtypes, and gradients flow to every floating argument.

    Args:
        x: (batch, L, heads, headdim), headdim 1 to 256; fp32, bf16, fp16 or fp64, any strides, any L.
        dt: (batch, L, heads), the step of each frame before bias and softplus.
        A: (heads,), the rate of the state, negative where it decays.
        B, C: (batch, L, groups, dstate), dstate 1 to 256; heads / groups heads share one group.
        D: (heads,), the weight of x_t in y_t.
        z: as x; the result is multiplied by silu(z).
        dt_bias: (heads,), added to dt.
        dt_softplus: whether softplus is applied to dt + dt_bias.
        dt_limit: (low, high), what dt is clamped to after that.
        initial_states: (sequences, heads, headdim, dstate), the state before a sequence's first step; zero if None.
            With seq_lens or neither, a sequence is a row of the batch; with cu_seqlens, a packed part.
        return_final_states: whether the states after each sequence's last step are returned too.
        seq_lens: (batch,) integers, the valid frames of each row. What stands behind them is never read.
        cu_seqlens: (sequences + 1,) integers 0 … L: sequences packed into a batch of one.
        reverse: time runs from each sequence's last valid frame to its first.
        backend: "cpu", "reference" or None for the best there is.

    Returns:
        y (batch, L, heads, headdim) in x's dtype, exactly zero at padded frames; with return_final_states
        (y, states), states (sequences, heads, headdim, dstate) in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument whose shape, dtype, device or value does not fit; the message names it.
    """
    sizes = arguments.check(x, dt, A, B, C, D, dt_bias, dt_limit, seq_lens, cu_seqlens, directions=1)
    arguments.check_states(initial_states, sizes, cu_seqlens, x)
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}, wanted that of x, {tuple(x.shape)}")
    if dispatch.pick("ssd", x.device, backend) == "reference":
        y, states = reference.ssd(
            x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
            initial_states=initial_states, seq_lens=seq_lens, cu_seqlens=cu_seqlens, reverse=reverse,
        )  # fmt: skip
    else:
        y, states = torch.ops.linconv.ssd(
            x, dt, A, B, C, D, dt_bias, dt_softplus, *map(float, dt_limit), initial_states, seq_lens, cu_seqlens, reverse
        )
    if z is not None:
        y = y * F.silu(z)
    return (y, states) if return_final_states else y
