from linconv.ops.short_conv import reference


def short_conv(
    x, weight, bias=None, *, activation="silu", reverse=False, lookahead=0, seq_lens=None, cu_seqlens=None, backend=None
):  # fmt: skip
    return reference.short_conv(
        x, weight, bias, activation=activation, reverse=reverse, lookahead=lookahead, seq_lens=seq_lens,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def bidirectional_short_conv(
    x, weight, bias=None, *, activation="silu", seq_lens=None, cu_seqlens=None, backend=None
):  # fmt: skip
    return reference.bidirectional_short_conv(
        x, weight, bias, activation=activation, seq_lens=seq_lens, cu_seqlens=cu_seqlens
    )
