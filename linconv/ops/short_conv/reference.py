"""Short depthwise convolution over time in plain torch."""

import torch
import torch.nn.functional as F


def tap_offsets(width, lookahead, reverse):
    """The frame that each tap reads, relative to the output frame: oldest first if causal, latest first if mirrored."""
    offsets = [k - (width - 1) + lookahead for k in range(width)]
    return [-offset for offset in offsets] if reverse else offsets


def sequence_bounds(length, seq_lens, cu_seqlens, device):
    """Start and end of each frame's sequence, (1 or batch, L) each; end <= frame marks padding."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
        own = torch.bucketize(torch.arange(length, device=device), cu_seqlens, right=True) - 1
        return cu_seqlens[own][None], cu_seqlens[own + 1][None]
    end = torch.full((1,), length, device=device) if seq_lens is None else seq_lens.to(torch.int64)
    return torch.zeros(1, length, dtype=torch.int64, device=device), end[:, None].expand(-1, length)


def convolve(x, weight, bias, *, activation, reverse, lookahead, bounds):
    """One direction of a convolution: x (batch, L, channels), weight (channels, width), bounds of `sequence_bounds`."""
    length, width = x.shape[-2], weight.shape[-1]
    start, end = bounds
    time = torch.arange(length, device=x.device)
    math = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x, (0, 0, width - 1, width - 1))
    y = torch.zeros_like(x, dtype=math)
    for k, offset in enumerate(tap_offsets(width, lookahead, reverse)):
        tap = padded[:, width - 1 + offset : width - 1 + offset + length]
        own = (time + offset >= start) & (time + offset < end)
        # Masked before the product: 0 * NaN is NaN, in gradients too.
        y = y + weight[:, k].to(math) * tap.masked_fill(~own[..., None], 0).to(math)
    if bias is not None:
        y = y + bias.to(math)
    if activation == "silu":
        y = F.silu(y)
    return y.masked_fill(~(time < end)[..., None], 0).to(x.dtype)


def short_conv(
    x, weight, bias=None, *, activation="silu", reverse=False, lookahead=0, seq_lens=None, cu_seqlens=None
):  # fmt: skip
    """The function of `linconv.ops.short_conv`, differentiable by torch."""
    bounds = sequence_bounds(x.shape[1], seq_lens, cu_seqlens, x.device)
    return convolve(x, weight, bias, activation=activation, reverse=reverse, lookahead=lookahead, bounds=bounds)


def bidirectional_short_conv(x, weight, bias=None, *, activation="silu", seq_lens=None, cu_seqlens=None):
    """The function of `linconv.ops.bidirectional_short_conv`, differentiable by torch."""
    x = x if x.dim() == 4 else x.expand(2, *x.shape)
    bounds = sequence_bounds(x.shape[2], seq_lens, cu_seqlens, x.device)
    return torch.stack(
        [
            convolve(
                x[i], weight[i], None if bias is None else bias[i],
                activation=activation, reverse=i == 1, lookahead=0, bounds=bounds,
            )
            for i in (0, 1)
        ]
    )  # fmt: skip
