"""The convolution and the scan of a call on Triton, as launches that are repeated together.

Apart they would each look their arguments up and make their memory, and the views of x, B and C be made in between: for
short sequences that takes longer than the kernels.
"""

from linconv.ops.bidirectional_ssd.triton import bidirectional_ssd
from linconv.ops.short_conv.triton import short_conv
from linconv.ops.ssd.triton import scan_settings, ssd
from linconv.ops.triton_replay import replayed

__all__ = ["conv_scan"]


@replayed(scan_settings)
def conv_scan(xBC, weight, bias, lookahead, seq_lens, layout, dt, A, *of_scan):
    """The result of the scan whose arguments besides x, dt, A, B and C are of_scan; the others are those of
    ``linconv::short_conv``."""
    convolved = short_conv.__wrapped__(xBC, weight, bias, True, False, lookahead, seq_lens, None)
    x, B, C = layout.operands(convolved)
    if layout.directions == 1:
        return ssd.__wrapped__(x, dt, A, B, C, *of_scan)[0]
    return bidirectional_ssd.__wrapped__(x, dt, A, B, C, *of_scan)
