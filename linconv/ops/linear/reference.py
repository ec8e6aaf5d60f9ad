"""The product with a weight in plain torch."""

import functools

import torch
import torch.nn.functional as F


def linear(x, weight, bias=None, *, factor=None):
    """The function of `linconv.ops.linear.linear`, differentiable by torch."""
    dtypes = [t.dtype for t in (x, weight, bias) if t is not None]
    if dtypes.count(x.dtype) == len(dtypes) and (bias is None or factor is None):
        return F.linear(x, weight, bias)
    # torch multiplies only equal dtypes: others are promoted to a common one.
    common = functools.reduce(torch.promote_types, dtypes)
    given, (weight, bias) = x.to(common), (None if t is None else t.to(common) for t in (weight, bias))
    if bias is None or factor is None:
        out = F.linear(given, weight, bias)
    else:
        out = F.linear(given, weight)
        out = torch.addcmul(out, factor[..., None].to(out.dtype), bias.to(out.dtype))
    return out.to(x.dtype) if out.dtype == common else out  # autocast causes any other dtype
