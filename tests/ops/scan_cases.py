"""Arguments for the scans, and what they are held against: the recurrence in float64, one time step after another."""

import torch

from linconv.ops.bidirectional_ssd import reference as bidirectional_reference
from linconv.ops.ssd import reference

# Which arguments are per direction.
REGIMES = {
    "separate": {"x", "dt", "A", "B", "C", "D", "dt_bias"},
    "hydra": {"dt", "A", "B", "C", "dt_bias"},
    "quasiseparable": {"dt", "A", "dt_bias"},
    "tied": set(),
}
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def scan_arguments(
    batch, length, heads=4, headdim=5, groups=2, dstate=3, *, per_direction=(), dtype=torch.float64, strided=False
):  # fmt: skip
    """x, dt, A, B, C, D, dt_bias by name; strided: views whose elements are apart in every dimension."""
    math = torch.promote_types(dtype, torch.float32)

    def tensor(name, *shape, dtype=dtype):
        shape = (2, *shape) if name in per_direction else shape
        if strided and len(shape) > 2:
            wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)[..., 1::2]
            return wide.transpose(-2, -1).clone(memory_format=torch.contiguous_format).transpose(-2, -1)
        return torch.randn(*shape, dtype=dtype)

    return {
        "x": tensor("x", batch, length, heads, headdim),
        "dt": tensor("dt", batch, length, heads),
        "A": -tensor("A", heads, dtype=math).abs() - 0.1,
        "B": tensor("B", batch, length, groups, dstate),
        "C": tensor("C", batch, length, groups, dstate),
        "D": tensor("D", heads, dtype=math),
        "dt_bias": tensor("dt_bias", heads, dtype=math),
    }


def split(arguments):
    """(x, dt, A, B, C), {D, dt_bias}: as the public functions take them."""
    return [arguments[n] for n in NAMES[:5]], {n: arguments[n] for n in NAMES[5:]}


def oracle(arguments, **options):
    """bidirectional_ssd by the recurrence."""
    (x, dt, A, B, C), rest = split(arguments)
    return bidirectional_reference.bidirectional_ssd(x, dt, A, B, C, **rest, scan=reference.recurrence, **options)


def oracle_one_direction(arguments, **options):
    """(y, states) of ssd by the recurrence."""
    (x, dt, A, B, C), rest = split(arguments)
    return reference.ssd(x, dt, A, B, C, **rest, scan=reference.recurrence, **options)


def with_gradients(function, arguments, **options):
    """The result of function(arguments, **options), and gradients by name for a fixed upstream gradient."""
    leaves = {n: t.detach().requires_grad_() for n, t in arguments.items()}
    out = function(leaves, **options)
    torch.manual_seed(1)
    results = out if isinstance(out, tuple) else (out,)
    # The same on any device.
    pairs = [(o, torch.randn(o.shape, dtype=torch.float64, device="cpu").to(o)) for o in results]
    outputs, upstream = zip(*[(o, u) for o, u in pairs if o.requires_grad])  # plain torch's states of no frames do not
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return out, dict(zip(leaves, gradients))


def assert_close(got, wanted, tolerance=1e-9):
    for name, value in wanted.items():
        scale = 1 + (value.abs().max() if value.numel() else 0)
        torch.testing.assert_close(
            got[name] / scale,
            value / scale,
            rtol=0,
            atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def to_double(arguments):
    return {n: t.double() for n, t in arguments.items()}
