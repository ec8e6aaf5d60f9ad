"""Linformer attention in plain torch."""

import math

import torch

from linconv.ops.masks import frame_mask

MASK, STEP = 0xFFFFFFFF, 0x9E3779B9


def project(x, proj, *, normalize=True, seq_lens=None):
    """proj^T x over the valid frames, divided by the root of their number: (batch, heads, r, headdim), math dtype.

    x (batch, heads, L, headdim), proj (1 or heads, Lmax, r).
    """
    dtype, length = torch.promote_types(x.dtype, torch.float32), x.shape[2]
    x, proj = x.to(dtype), proj[:, :length].to(dtype)
    lengths = length if seq_lens is None else seq_lens
    if seq_lens is not None:  # before the product: 0 * NaN is NaN, in gradients too
        x = x.masked_fill(~frame_mask(seq_lens, length)[:, None, :, None], 0)
    out = proj.mT @ x
    if normalize:
        lengths = torch.as_tensor(lengths, device=x.device).clamp(min=1).to(dtype)
        out = out / lengths.sqrt().reshape(-1, 1, 1, 1)
    return out


def attend(q, k, v, *, scale, dropout_p=0.0, seed=None, seq_lens=None):
    """softmax(scale q k^T) v with dropout of the weights, zero in the padding: shape and dtype of q."""
    dtype, length = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    padding = None if seq_lens is None else ~frame_mask(seq_lens, length)[:, None, :, None]
    math_q = q.to(dtype) if padding is None else q.to(dtype).masked_fill(padding, 0)
    weights = (scale * math_q @ k.to(dtype).mT).softmax(-1)
    if dropout_p > 0:
        weights = weights * kept(seed, *weights.shape, dropout_p) / (1 - dropout_p)
    out = (weights @ v.to(dtype)).to(q.dtype)
    return out if padding is None else out.masked_fill(padding, 0)


def kept(seed, batch, heads, length, rank, dropout_p):
    """Which attention weights dropout keeps: bool (batch, heads, L, r), as csrc/linformer/dropout.h draws.

    seed: int64 scalar tensor.
    """

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
        x = (x ^ (x >> 15)) * 0x846CA68B & MASK
        return x ^ (x >> 16)

    device = seed.device
    row_and_head = torch.arange(batch * heads, device=device).reshape(batch, heads, 1)
    first = mix(mix((row_and_head ^ seed) & MASK) ^ torch.arange(length, device=device))
    second = mix((mix(first ^ ((seed >> 32) & MASK)) + STEP) & MASK)
    counter = torch.arange(rank, device=device) * STEP & MASK
    drawn = mix(mix((counter + first[..., None]) & MASK) ^ second[..., None])
    return drawn >= min(round(dropout_p * 2**32), MASK)


def linformer_attention(
    q, k, v, proj_k, proj_v=None, *, seq_lens=None, scale=None, normalize=True, dropout_p=0.0, seed=None
):
    """The function of `linconv.ops.linformer_attention`, differentiable by torch."""
    proj_k = proj_k if proj_k.dim() == 3 else proj_k[None]
    proj_v = proj_k if proj_v is None else proj_v if proj_v.dim() == 3 else proj_v[None]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = project(k, proj_k, normalize=normalize, seq_lens=seq_lens)
    v = project(v, proj_v, normalize=normalize, seq_lens=seq_lens)
    return attend(q, k, v, scale=scale, dropout_p=dropout_p, seed=seed, seq_lens=seq_lens)
