"""The two operators that `conv_scan` consists of, with their arguments."""

import torch

from linconv.ops import dispatch
from linconv.ops.conv_scan.arguments import checked

INF = float("inf")


class Steps:
    """A valid call: runs one operator after the other, and their gradients.

    Args: those of ``linconv::conv_scan``; the last two are the backends of the convolution and of the scan.

    Raises:
        TypeError, ValueError: as for `conv_scan`. Sizes are used here before a kernel checks them.
    """

    def __init__(self, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, *options):
        dstate, ngroups, diagonal, lookahead, seq_lens, *self.kernels = options
        tensors = (xBC, dt, conv_weight, conv_bias, A, D, dt_bias)
        self.layout, self.per_direction = checked(*tensors, dstate, ngroups, diagonal, lookahead), xBC.dim() == 4
        if not self.per_direction:  # the convolution's kernels have an axis of directions
            xBC, conv_weight = xBC[None], conv_weight[None]
            conv_bias = None if conv_bias is None else conv_bias[None]
        self.conv_arguments = (xBC, conv_weight, conv_bias, True, False, lookahead, seq_lens, None)
        self.names = "short_conv", "ssd" if self.layout.directions == 1 else "bidirectional_ssd"
        self.dt, self.A, self.scan_arguments = dt, A, (D, dt_bias, True, 0.0, INF)
        if self.layout.directions == 1:
            self.scan_arguments += (None, seq_lens, None, False)
        else:
            self.scan_arguments += (diagonal, seq_lens, None)

    def operators(self, suffix=""):
        """Convolution and scan."""
        return [dispatch.operator(name + suffix, kernel) for name, kernel in zip(self.names, self.kernels)]

    def scanned(self, convolved):
        """The arguments of the scan."""
        x, B, C = self.layout.operands(convolved)
        return x, self.dt, self.A, B, C, *self.scan_arguments

    def run(self):
        convolve, scan = self.operators()
        y = scan(*self.scanned(convolve(*self.conv_arguments)))
        return y[0] if self.layout.directions == 1 else y

    def scan_gradients(self, dy):
        """Gradients of x, dt, A, B, C, D and dt_bias, in this order; x, B and C are computed again."""
        convolve, _ = self.operators()
        _, scan_backward = self.operators("_backward")
        upstream = (dy, None) if self.layout.directions == 1 else (dy,)
        return scan_backward(*upstream, *self.scanned(convolve(*self.conv_arguments)))[:7]

    def gradients(self, dy):
        """Gradients of the tensor arguments, in order."""
        convolve_backward, _ = self.operators("_backward")
        dx, ddt, dA, dB, dC, dD, ddt_bias = self.scan_gradients(dy)
        dconvolved = self.layout.joined(dx, dB, dC)
        del dx, dB, dC
        gradients = convolve_backward(dconvolved, *self.conv_arguments)
        if not self.per_direction:
            gradients = [gradient[0] for gradient in gradients]
        dxBC, dconv_weight, dconv_bias = gradients
        return dxBC, ddt, dconv_weight, dconv_bias, dA, dD, ddt_bias


class StepsOnTriton(Steps):
    """Steps on Triton alone: the convolution that is computed again and the scan's gradients are repeated as one call.

    Args: those of ``linconv::conv_scan``, but for the backends.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments, "triton", "triton")
        self.arguments = arguments

    def scan_gradients(self, dy):
        return torch.ops.linconv.conv_scan_gradients(dy, *self.arguments, *self.kernels)
