"""Convolution and scan of a Mamba-2 layer as separate operators: the definition of `conv_scan`."""

from linconv.ops.bidirectional_ssd import bidirectional_ssd
from linconv.ops.short_conv import bidirectional_short_conv, short_conv
from linconv.ops.ssd import ssd


def conv_scan(
    layout, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, diagonal, lookahead, seq_lens, backend
):  # fmt: skip
    """The function of `linconv.ops.conv_scan` from the public operators and their gradients."""
    options = dict(seq_lens=seq_lens, backend=backend)
    if xBC.dim() == 4:
        convolved = bidirectional_short_conv(xBC, conv_weight, conv_bias, **options)
    else:
        convolved = short_conv(xBC, conv_weight, conv_bias, lookahead=lookahead, **options)[None]
    x, B, C = layout.operands(convolved)
    options |= dict(D=D, dt_bias=dt_bias, dt_softplus=True)
    if layout.directions == 1:
        return ssd(x, dt, A, B, C, **options)
    return bidirectional_ssd(x, dt, A, B, C, diagonal=diagonal, **options)
