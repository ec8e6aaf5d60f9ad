"""Root mean square norm after a SiLU gate."""

import math

from linconv.ops import checks, dispatch
from linconv.ops.autograd import once_differentiable
from linconv.ops.gated_rms_norm import reference

__all__ = ["gated_rms_norm"]


def gated_rms_norm(x, z, weight, *, eps=1e-5, group_size=None, seq_lens=None, backend=None):
    """``y * rsqrt(mean(y^2) + eps) * weight`` with ``y = x * silu(z)``; the mean is over groups of channels.

    Arithmetic is in float32, or float64 for float64 input.

    Args:
        x, z: both (..., d). With a weight per direction, at least one is (2, ..., d); the directions may share the
            other. float32, bfloat16, float16 or float64, any strides.
        weight: (d,), or (2, d) for one per direction.
        eps: added to the mean square.
        group_size: number of channels that share a mean, a divisor of d; None for all.
        seq_lens: int32 or int64 (batch,), for x and z of (batch, L, d) or (2, batch, L, d): the number of
            valid frames of each row. Padding is not read; the result there and its gradients are zero.
        backend: a name from :func:`linconv.ops.backends`, or None for the best available.

    Returns:
        (..., d) in x's dtype, or (2, ..., d) laid out so that ``out.movedim(0, -2).flatten(-2)`` is a view (..., 2 d):
        a projection of the concatenated directions reads it without a copy.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Source: Dao and Gu, arXiv 2405.21060 (the norm before the output projection; Zhang and Sennrich, arXiv 1910.07467).
    """
    lead, per_direction = _checked(x, z, weight, eps, group_size)
    d = weight.shape[-1]
    if seq_lens is not None:
        if len(lead) != 2:
            shape = "(2, batch, L, d)" if per_direction else "(batch, L, d)"
            raise ValueError(f"seq_lens is given with x of shape {tuple(x.shape)}, wanted {shape}")
        checks.sequence_bounds(seq_lens, None, lead[0], lead[1], x.device)
    backend = dispatch.pick("gated_rms_norm", x.device, backend)
    if backend == "reference":
        return reference.gated_rms_norm(x, z, weight, eps=eps, group_size=group_size, seq_lens=seq_lens)
    x, z, weight = reference.directions(x, z, weight)
    if len(lead) == 2:  # already as the operator wants them: views cost time, twice that with gradients
        out = dispatch.run("gated_rms_norm", backend, x, z, weight, eps, group_size or d, seq_lens)
        return out if per_direction else out[0]
    rows = (math.prod(lead[:-1]), lead[-1] if lead else 1)
    x, z = (t.reshape(t.shape[0], *rows, d) for t in (x, z))
    out = dispatch.run("gated_rms_norm", backend, x, z, weight, eps, group_size or d, seq_lens)
    if not per_direction:
        return out[0].reshape(*lead, d)
    return out.movedim(0, -2).reshape(*lead, 2, d).movedim(-2, 0)


@checks.remembered
def _checked(x, z, weight, eps, group_size):
    """Check all arguments; returns the sizes between directions and d, and whether there are directions."""
    for name, value in (("x", x), ("z", z), ("weight", weight)):
        checks.floating_tensor(name, value)
        checks.like(name, value, "x", x)
    lead, per_direction = _lead(x, z, weight)
    d = weight.shape[-1]
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1 or d % group_size):
        raise ValueError(f"group_size is {group_size!r}, wanted None or a divisor of d = {d}")
    checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps is {eps}, wanted a finite number from 0 up")
    return lead, per_direction


def _lead(x, z, weight):
    """Check shapes against each other; returns the sizes between directions and d, and whether there are directions."""
    if weight.dim() not in (1, 2) or (weight.dim() == 2 and weight.shape[0] != 2):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted (d,) or (2, d)")
    d = weight.shape[-1]
    if weight.dim() == 1:
        checks.shape("x", x, (*x.shape[:-1], d), "(..., d)")
        checks.shape("z", z, tuple(x.shape), "the shape of x")
        return tuple(x.shape[:-1]), False
    dims = max(x.dim(), z.dim())
    lead = tuple((x if x.dim() == dims else z).shape[1:-1])
    for name, value in (("x", x), ("z", z)):
        own = (2,) if value.dim() == dims else ()
        checks.shape(name, value, (*own, *lead, d), "(2, ..., d)" if own else "(..., d)")
    return lead, True


def _fake(x, z, weight, eps, group_size, seq_lens):
    _, batch, length, d = x.shape
    return x.new_empty(batch, length, weight.shape[0], d).permute(2, 0, 1, 3)


def _fake_backward(grad, x, z, weight, eps, group_size, seq_lens):
    return x.new_empty(x.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, z, weight, *ctx.options, seq_lens = inputs
    ctx.save_for_backward(x, z, weight, seq_lens)


def _backward(ctx, grad):
    return *_gradients(ctx, grad, *ctx.saved_tensors), None, None, None


@once_differentiable
def _gradients(ctx, grad, x, z, weight, seq_lens):
    return ctx.backward_operator(grad, x, z, weight, *ctx.options, seq_lens)


dispatch.register(
    "gated_rms_norm",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_save,
    backward=_backward,
    triton="linconv.ops.gated_rms_norm.triton",
    prefer=("triton", "cuda"),
)
