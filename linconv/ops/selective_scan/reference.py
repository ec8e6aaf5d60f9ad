"""Selective scan in plain torch: the recurrence, step by step in time, and the same by doubling.

Mamba (Gu and Dao, arXiv 2312.00752), Algorithm 2. `recurrence` is the definition that kernels are tested against;
`doubling` is the same function in fewer operators, and serves as the backend where there is no kernel.
"""

import torch
import torch.nn.functional as F

from linconv.ops.masks import frame_mask


def recurrence(decay, added, C, state):
    """h_t = decay_t h_{t-1} + added_t, y_t = C_t h_t, in a loop over time.

    decay, added and C (batch, L, channels, dstate), state (batch, channels, dstate). Returns y (batch, L, channels) and
    the last state.
    """
    y = []
    # Not by index: the gradient of one step of a tensor is as large as the tensor, and there are L of them.
    for decay_t, added_t, C_t in zip(decay.unbind(1), added.unbind(1), C.unbind(1)):
        state = decay_t * state + added_t
        y.append((C_t * state).sum(-1))
    return torch.stack(y, dim=1) if y else decay.sum(-1), state


def doubling(decay, added, C, state, chunk_size=64):
    """`recurrence` for all steps of a chunk at once: each combines 1, 2, 4, ... earlier steps (Hillis and Steele)."""
    y = []
    for start in range(0, decay.shape[1], chunk_size):
        kept, gained = (t[:, start : start + chunk_size] for t in (decay, added))
        reach = 1
        while reach < kept.shape[1]:
            before = (0, 0, 0, 0, reach, 0)  # the first steps have none before them and stay unchanged
            gained = gained + kept * F.pad(gained[:, :-reach], before)
            kept = kept * F.pad(kept[:, :-reach], before, value=1.0)
            reach *= 2
        states = kept * state[:, None] + gained  # (b, chunk, channels, dstate)
        y.append((C[:, start : start + chunk_size] * states).sum(-1))
        state = states[:, -1]
    return torch.cat(y, dim=1) if y else decay.sum(-1), state


def selective_scan(
    x, dt, A, B, C, D=None, z=None, *, dt_bias=None, dt_softplus=False, initial_states=None, seq_lens=None,
    cu_seqlens=None, reverse=False, scan=None,
):  # fmt: skip
    """The scan with the arguments of `linconv.ops.selective_scan`, differentiable by torch.

    scan: None for the faster one. Doubling needs more operations in fewer calls, which is faster on a GPU only.
    Returns y in x's dtype and the last states (sequences, channels, dstate) in the math dtype.
    """
    scan = scan or (recurrence if x.device.type == "cpu" else doubling)
    options = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, reverse=reverse, scan=scan)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            selective_scan(
                *(t[:, lo:hi] for t in (x, dt)), A, *(t[:, lo:hi] for t in (B, C)), D,
                None if z is None else z[:, lo:hi],
                initial_states=None if initial_states is None else initial_states[i : i + 1], **options,
            )
            for i, (lo, hi) in enumerate(zip(bounds, bounds[1:]))
        ]  # fmt: skip
        if not parts:  # no sequences: the empty row's result, without its state
            y, h = selective_scan(x, dt, A, B, C, D, z, **options)
            return y, h[:0]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])

    dtype, batch, groups = x.dtype, x.shape[0], B.shape[2]
    math = torch.promote_types(dtype, torch.float32)
    valid = None
    if seq_lens is not None:  # before any product: 0 * NaN is NaN, in gradients too
        valid = frame_mask(seq_lens, x.shape[1])
        x, dt, z = (None if t is None else t.masked_fill(~valid[..., None], 0) for t in (x, dt, z))
        B, C = (t.masked_fill(~valid[..., None, None], 0) for t in (B, C))
    x, dt, A, B, C = (t.to(math) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(math)
    if dt_softplus:
        dt = F.softplus(dt)
    if valid is not None:  # a step of dt = 0 leaves the state as it is
        dt = dt.masked_fill(~valid[..., None], 0)
    B, C = (t.repeat_interleave(x.shape[2] // groups, dim=2) for t in (B, C))  # (b, L, channels, dstate)
    decay = torch.exp(dt[..., None] * A)
    added = (dt * x)[..., None] * B
    state = x.new_zeros(batch, *A.shape) if initial_states is None else initial_states.to(math)
    turn = (lambda t: t.flip(1)) if reverse else (lambda t: t)
    y, state = scan(turn(decay), turn(added), turn(C), state)
    y = turn(y)
    if D is not None:
        y = y + D.to(math) * x
    if z is not None:
        y = y * F.silu(z.to(math))
    if valid is not None:
        y = y.masked_fill(~valid[..., None], 0)
    return y.to(dtype), state
