"""The short convolution of a Mamba-2 layer and the scan of its result, as one operator.

Only the scan reads the convolution's result (x, B and C). It is not kept: the backward pass recomputes it.
"""

import functools

import torch

from linconv.ops import checks, dispatch
from linconv.ops.autograd import call, once_differentiable
from linconv.ops.bidirectional_ssd import pick as pick_bidirectional_ssd
from linconv.ops.conv_scan import reference
from linconv.ops.conv_scan.arguments import checked
from linconv.ops.conv_scan.layout import Layout
from linconv.ops.conv_scan.steps import Steps, StepsOnTriton
from linconv.ops.ssd import pick as pick_ssd
from linconv.ops.ssd.arguments import new_gradients, of_heads, only_present

__all__ = ["conv_scan"]


def conv_scan(
    xBC, dt, conv_weight, conv_bias, A, D=None, dt_bias=None, *, dstate, ngroups=1, diagonal="both", lookahead=0,
    seq_lens=None, backend=None,
):  # fmt: skip
    """The scan of a Mamba-2 layer (arXiv 2405.21060, figure 6) over the x, B and C from its short convolution.

    The result and gradients have the same bits as `short_conv` with SiLU followed by `ssd` or `bidirectional_ssd` with
    softplus of dt + dt_bias. Only the arguments are kept for the backward pass.

    Args:
        xBC: float32, bfloat16, float16 or float64, any strides. With n = ngroups * dstate, its layout is one of

            - (batch, L, heads * headdim + 2 n): x, B and C, dt (batch, L, heads): one direction, Mamba-2.
            - (batch, L, heads * headdim + 4 n): x shared by two directions, B and C of the forward one, B and C of the
              backward one, dt (2, batch, L, heads): Hydra, arXiv 2407.09941.
            - (2, batch, L, heads * headdim + 2 n): x, B and C of each direction; the backward one's convolution is
              anti-causal: two Mamba-2 layers, arXiv 2410.06846. dt (2, batch, L, heads) or (batch, L, heads).
        dt: shape as listed under xBC; before bias and softplus.
        conv_weight: (channels, width), 2 <= width <= 8; (2, channels, width) if xBC is per direction.
        conv_bias: (channels,) or (2, channels), or None.
        A, D, dt_bias: (heads,), or (2, heads) for two directions; D and dt_bias may be None.
        dstate: size of the state of each channel of x, 1 to 256.
        ngroups: groups of heads that share B and C.
        diagonal: for two directions, as in `bidirectional_ssd`.
        lookahead: frames ahead that the convolution's window reaches, 0 <= lookahead < width; must be 0 if xBC is
            per direction.
        seq_lens: int32 or int64 (batch,): the number of valid frames of each row. Padding is not read; the
            result there and its gradients are zero.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available for each step.

    Returns:
        (batch, L, heads, headdim), the sum of the directions, or (2, batch, L, heads, headdim) if xBC is per direction;
        in the dtype of xBC.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value; the message names it.
    """
    tensors = (xBC, dt, conv_weight, conv_bias, A, D, dt_bias)
    layout = checked(*tensors, dstate, ngroups, diagonal, lookahead)
    checks.sequence_bounds(seq_lens, None, *xBC.shape[-3:-1], xBC.device)
    kernels = _kernels(layout, xBC, backend)
    if not (_registered and _COMPILED.issuperset(kernels)):
        return reference.conv_scan(layout, *tensors, diagonal, lookahead, seq_lens, backend)
    A, D, dt_bias = of_heads(kernels[1], xBC, A, D, dt_bias)
    return call(
        torch.ops.linconv.conv_scan, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, dstate, ngroups, diagonal,
        lookahead, seq_lens, *kernels,
    )  # fmt: skip


_COMPILED = {"cpu", "cuda", "triton"}


def _kernels(layout, xBC, backend):
    """The backends that run the convolution and the scan."""
    if layout.directions == 1:
        scan = pick_ssd(xBC.device, xBC.shape[-2], backend)
    else:
        scan = pick_bidirectional_ssd(xBC.device, xBC.dtype, layout.headdim, layout.dstate, backend)
    return dispatch.pick("short_conv", xBC.device, backend), scan


def _run(*inputs):
    *arguments, conv, scan = inputs
    return _launched("conv_scan", *arguments) if conv == scan == "triton" else Steps(*inputs).run()


def _run_gradients(dy, *inputs):
    *arguments, conv, scan = inputs
    if conv == scan == "triton":
        return _launched("scan_gradients", dy, *arguments)
    return Steps(*inputs).scan_gradients(dy)


_launched = functools.partial(dispatch.run_triton, "linconv.ops.conv_scan.launches")


def _fake(xBC, dt, conv_weight, conv_bias, A, D, dt_bias, dstate, ngroups, *_):
    layout = Layout.of(xBC, dt, ngroups, dstate)
    return xBC.new_empty(*xBC.shape[:-1], layout.heads, layout.headdim)


def _fake_gradients(dy, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, dstate, ngroups, *_):
    layout = Layout.of(xBC, dt, ngroups, dstate)
    x, B, C = layout.operands(xBC if xBC.dim() == 4 else xBC[None])
    return new_gradients(x, dt, A, B, C, D, dt_bias)


def _save(ctx, inputs, output):
    *tensors, dstate, ngroups, diagonal, lookahead, seq_lens, conv, scan = inputs
    ctx.save_for_backward(*tensors, seq_lens)
    ctx.options = (dstate, ngroups, diagonal, lookahead), (conv, scan)


def _backward(ctx, dy):
    return *_gradients(ctx, dy, *ctx.saved_tensors), *[None] * 7


@once_differentiable
def _gradients(ctx, dy, *saved):
    *tensors, seq_lens = saved
    options, kernels = ctx.options
    arguments = *tensors, *options, seq_lens
    steps = StepsOnTriton(*arguments) if set(kernels) == {"triton"} else Steps(*arguments, *kernels)
    return tuple(only_present(steps.gradients(dy), tensors))


_registered = dispatch.register_composite(
    "conv_scan", _run, fake=_fake, setup_context=_save, backward=_backward
) and dispatch.register_composite("conv_scan_gradients", _run_gradients, fake=_fake_gradients)
