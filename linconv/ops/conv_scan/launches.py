"""The convolution and the scan of a call on Triton, as launches that are repeated together.

Apart they would each look their arguments up and make their memory, and the views of x, B and C be made in between: for
short sequences that takes longer than the kernels.
"""

from linconv.ops.bidirectional_ssd import triton as bidirectional_ssd
from linconv.ops.conv_scan.steps import Steps
from linconv.ops.short_conv import triton as short_conv
from linconv.ops.ssd import triton as ssd
from linconv.ops.ssd.triton import scan_settings
from linconv.ops.triton_replay import replayed

__all__ = ["conv_scan", "scan_gradients"]


class _Launches(Steps):
    """Steps that call the Triton functions directly: all their launches are recorded and repeated as one call."""

    def operators(self, suffix=""):
        modules = dict(short_conv=short_conv, ssd=ssd, bidirectional_ssd=bidirectional_ssd)
        return [getattr(modules[name], name + suffix).__wrapped__ for name in self.names]


@replayed(scan_settings)
def conv_scan(*arguments):
    """``linconv::conv_scan``, whose arguments these are but for the backends."""
    return _Launches(*arguments, "triton", "triton").run()


@replayed(scan_settings)
def scan_gradients(dy, *arguments):
    """`Steps.scan_gradients`."""
    return _Launches(*arguments, "triton", "triton").scan_gradients(dy)
