"""Products with a weight in which a row's bits do not depend on the number of rows, as padded = alone requires."""

import math

import torch

from linconv.ops import checks, dispatch
from linconv.ops.autograd import call
from linconv.ops.linear import reference

__all__ = ["linear"]


def linear(x, weight, bias=None, *, factor=None, backend=None):
    """``x weight^T + factor bias^T``; on CPU a row's bits depend only on that row and the parameters.

    A library chooses the blocks of a product, and so the order of a row's sums, by the number of rows. This one always
    uses the same order. Other devices use torch's product. Arithmetic is in float32, or float64 for float64 input.

    Args:
        x: (..., d); float32, bfloat16, float16 or float64, any strides.
        weight: (columns, d), any strides.
        bias: (columns,) or None.
        factor: (...,), multiplies the bias in each row; None for 1.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available; only "cpu" is not torch's.

    Returns:
        (..., columns) in x's dtype (autocast's if it is on).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype or shape.
    """
    _check(x, weight, bias, factor)
    ours = x.device.type == "cpu" and backend in (None, "cpu") and dispatch.compiled("linear")
    if not ours or dispatch.pick("linear", x.device) == "reference":
        return reference.linear(x, weight, bias, factor=factor)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        low = torch.get_autocast_dtype("cpu")
        x, weight = x.to(low), weight.to(low)
    factor = None if factor is None or bias is None else factor.reshape(-1)
    *lead, d = x.shape
    return _linear(x.reshape(math.prod(lead), d), weight, bias, factor).reshape(*lead, weight.shape[0])


@checks.remembered
def _check(x, weight, bias, factor):
    for name, value in (("x", x), ("weight", weight), ("bias", bias), ("factor", factor)):
        if value is not None or name in ("x", "weight"):
            checks.floating_tensor(name, value)
            checks.like(name, value, "x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (), wanted (..., d)")
    *lead, d = x.shape
    checks.shape("weight", weight, (None, d), "(columns, d)")
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],), "(columns,)")
    if factor is not None:
        checks.shape("factor", factor, tuple(lead), "(...,)")


def _linear(x, weight, bias=None, factor=None):
    return call(torch.ops.linconv.linear, x, weight, bias, factor)


def _fake(x, weight, bias, factor):
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    """Can be differentiated again."""
    x, weight, bias, factor = ctx.saved_tensors
    of_x, of_weight, of_bias, of_factor = ctx.needs_input_grad
    most = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    of_rows = grad.to(most) if factor is None else factor.to(most)[:, None] * grad
    # If all dtypes agree, the product is rounded once to that; else only to the weight's, with no rounding before.
    common = weight.dtype if grad.dtype == x.dtype == weight.dtype else most

    return (
        _linear(grad, weight.mT) if of_x else None,
        _linear(grad.to(common).mT, x.to(common).mT).to(weight.dtype) if of_weight else None,
        of_rows.sum(0).to(bias.dtype) if of_bias else None,
        (grad.to(most) @ bias.to(most)).to(factor.dtype) if of_factor else None,
    )


dispatch.register("linear", fake=_fake, setup_context=_save, backward=_backward)
