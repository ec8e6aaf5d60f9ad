"""State space dual scan in plain torch: the recurrence, step by step in time, and its chunked form.

Mamba-2 (Dao and Gu, arXiv 2405.21060), section 6 for the chunked form. `recurrence` is the definition that kernels are
tested against; `chunked` is the same function as dense products, and serves as the backend where there is no kernel.
"""

import torch
import torch.nn.functional as F

from linconv.ops.masks import frame_mask
from linconv.ops.ssd import mamba_ssm


def discretize(dt, dt_bias, dt_softplus, dt_limit):
    """clamp(softplus(dt + dt_bias), dt_limit) in fp32, or fp64 for fp64 input."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    low, high = dt_limit
    return dt.clamp(low, high) if (low, high) != (0.0, float("inf")) or not dt_softplus else dt


def recurrence(x, dt, A, B, C, *, strict=False, initial_states=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t h_t, in a loop over time.

    x (batch, L, heads, headdim), dt (batch, L, heads) discretized, A (heads,), B and C (batch, L, groups, dstate).
    strict leaves the term j = t out of y_t. Returns y, shaped as x, and the last state (batch, heads, headdim, dstate).
    """
    batch, _, heads, headdim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(batch, heads, headdim, B.shape[-1]) if initial_states is None else initial_states
    y = []
    # Not by index: the gradient of one step of a tensor is as large as the tensor, and there are L of them.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        kept = torch.exp(dt_t * A)[..., None, None] * h
        h = kept + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
        y.append(torch.einsum("bhn,bhpn->bhp", C_t, kept if strict else h))
    return torch.stack(y, dim=1) if y else torch.zeros_like(x), h


def chunked(x, dt, A, B, C, *, strict=False, initial_states=None, chunk_size=64):
    """`recurrence` as dense products over chunks of frames; same arguments and results."""
    batch, length, heads, headdim = x.shape
    groups, dstate = B.shape[2:]
    pad = -length % chunk_size
    x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk_size)) for t in (x, B, C))
    dt = F.pad(dt, (0, 0, 0, pad)).unflatten(1, (-1, chunk_size))  # (b, c, q, h)
    decay = torch.cumsum(dt * A, dim=2).transpose(2, 3)  # (b, c, h, q); padded frames have dt = 0 and keep the state
    visible = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril(-1 if strict else 0)
    # Masked before exp: above the diagonal the difference is positive and may overflow, and inf * 0 is NaN.
    weights = (decay[..., :, None] - decay[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B).repeat_interleave(heads // groups, dim=2)
    weights = scores * weights * dt.transpose(2, 3)[..., None, :]
    y = torch.einsum("bchij,bcjhp->bcihp", weights, x)

    B, C = (t.repeat_interleave(heads // groups, dim=3) for t in (B, C))
    to_end = (decay[..., -1:] - decay).exp() * dt.transpose(2, 3)
    added = torch.einsum("bcqhn,bchq,bcqhp->bchpn", B, to_end, x)
    h = x.new_zeros(batch, heads, headdim, dstate) if initial_states is None else initial_states
    entering = []
    for kept_c, added_c in zip(decay[..., -1].exp().unbind(1), added.unbind(1)):  # as in `recurrence`
        entering.append(h)
        h = kept_c[..., None, None] * h + added_c
    if entering:
        y = y + torch.einsum("bcqhn,bchpn,bchq->bcqhp", C, torch.stack(entering, dim=1), decay.exp())
    return y.flatten(1, 2)[:, :length], h


# The causal scan inside this module's plain torch code, by backend.
SCANS = {"reference": chunked, "mamba_ssm": mamba_ssm.scan}


def gate(y, z):
    """y silu(z) in fp32, or fp64 for fp64 input."""
    math = torch.promote_types(y.dtype, torch.float32)
    return y.to(math) * F.silu(z.to(math))


def ssd(
    x, dt, A, B, C, D=None, *, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")), initial_states=None,
    seq_lens=None, cu_seqlens=None, reverse=False, strict=False, scan=chunked,
):  # fmt: skip
    """One direction of the scan with the arguments of `linconv.ops.ssd`, differentiable by torch.

    Returns y in x's dtype and the last states (sequences, heads, headdim, dstate) in the math dtype.
    """
    options = dict(
        dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, reverse=reverse, strict=strict, scan=scan
    )
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            ssd(
                *(t[:, lo:hi] for t in (x, dt)), A, *(t[:, lo:hi] for t in (B, C)), D,
                initial_states=None if initial_states is None else initial_states[i : i + 1], **options,
            )
            for i, (lo, hi) in enumerate(zip(bounds, bounds[1:]))
        ]  # fmt: skip
        if not parts:  # no sequences: the empty row's result, without its state
            y, h = ssd(x, dt, A, B, C, D, **options)
            return y, h[:0]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])

    dtype = x.dtype
    math = torch.promote_types(dtype, torch.float32)
    valid = None if seq_lens is None else frame_mask(seq_lens, x.shape[1])
    if valid is not None:  # before any product: 0 * NaN is NaN, in gradients too
        x, B, C = (t.masked_fill(~valid[..., None, None], 0) for t in (x, B, C))
        dt = dt.masked_fill(~valid[..., None], 0)
    x, A, B, C = (t.to(math) for t in (x, A, B, C))
    dt = discretize(dt, dt_bias, dt_softplus, dt_limit).to(math)
    if valid is not None:  # a step of dt = 0 leaves the state as it is
        dt = dt.masked_fill(~valid[..., None], 0)
    initial_states = None if initial_states is None else initial_states.to(math)
    turn = (lambda t: t.flip(1)) if reverse else (lambda t: t)
    y, h = scan(turn(x), turn(dt), A, turn(B), turn(C), strict=strict, initial_states=initial_states)
    y = turn(y)
    if D is not None:
        y = y + D.to(math)[:, None] * x
    if valid is not None:
        y = y.masked_fill(~valid[..., None, None], 0)
    return y.to(dtype), h
