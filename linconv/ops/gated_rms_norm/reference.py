"""Gated root mean square norm in plain torch."""

import torch
import torch.nn.functional as F

from linconv.ops.masks import frame_mask


def directions(x, z, weight):
    """x and z with their leading axis of directions, (1 or 2, ..., d) each, and weight (1 or 2, d)."""
    if weight.dim() == 1:
        return x[None], z[None], weight[None]
    dims = max(x.dim(), z.dim())
    return *(t if t.dim() == dims else t[None] for t in (x, z)), weight


def gated_rms_norm(x, z, weight, *, eps=1e-5, group_size=None, seq_lens=None):
    """The function of `linconv.ops.gated_rms_norm`, differentiable by torch."""
    math = torch.promote_types(x.dtype, torch.float32)
    dtype, per_direction = x.dtype, weight.dim() == 2
    x, z, weight = directions(x, z, weight)
    if seq_lens is not None:  # before any product: 0 * NaN is NaN, in gradients too
        valid = frame_mask(seq_lens, x.shape[-2])[..., None]
        x, z = (t.masked_fill(~valid, 0) for t in (x, z))
    d = x.shape[-1]
    y = x.to(math) * F.silu(z.to(math))
    # Directions second to last: a row's two directions are adjacent in memory, for one projection of both.
    # unflatten as a function: before torch 2.15 the method does not compile under a default device.
    y = torch.unflatten(y.movedim(0, -2), -1, (-1, group_size or d))  # (..., directions, groups, group_size)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = (y.flatten(-2) * weight.to(math)).to(dtype)
    if seq_lens is not None:
        y = y.masked_fill(~valid[..., None, :], 0)
    y = y.movedim(-2, 0)
    return y if per_direction else y[0]
