"""What `ssd` and `bidirectional_ssd` ask of their arguments, checked before any kernel runs."""

import math
import types

import torch

from linconv.ops import checks

# What each argument's dimensions are when both directions share it; a leading axis of 2 holds (forward, backward).
DIMS = dict(
    x=("batch", "L", "heads", "headdim"),
    dt=("batch", "L", "heads"),
    A=("heads",),
    B=("batch", "L", "groups", "dstate"),
    C=("batch", "L", "groups", "dstate"),
    D=("heads",),
    dt_bias=("heads",),
)
MAX_SIZE = 256  # of headdim and of dstate


def check(x, dt, A, B, C, D, dt_bias, dt_limit, seq_lens, cu_seqlens, *, directions):
    """As `sizes_of`, and of where the sequences lie."""
    sizes = sizes_of(x, dt, A, B, C, D, dt_bias, dt_limit, directions)
    checks.sequence_bounds(seq_lens, cu_seqlens, sizes["batch"], sizes["L"], x.device)
    return sizes


@checks.remembered
def sizes_of(x, dt, A, B, C, D, dt_bias, dt_limit, directions):
    """Raises ValueError or TypeError naming the argument, what it got and what it wants.

    directions: 2 where arguments may carry a leading axis of 2, else 1. Returns the sizes by name.
    """
    sizes = {}
    for (name, dims), tensor in zip(DIMS.items(), (x, dt, A, B, C, D, dt_bias)):
        if tensor is None and name in ("D", "dt_bias"):
            continue
        checks.floating_tensor(name, tensor)
        shape = tensor.shape
        if directions == 2 and len(shape) == len(dims) + 1 and shape[0] == 2:
            shape = shape[1:]
        if len(shape) != len(dims):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {_wanted(dims, directions)}")
        known = dict(sizes)
        for dim, size in zip(dims, shape):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {_wanted(dims, directions, known)}")
        checks.like(name, tensor, "x", x)
    for dim in ("headdim", "dstate"):
        if not 1 <= sizes[dim] <= MAX_SIZE:
            raise ValueError(f"{dim} is {sizes[dim]} ({'x' if dim == 'headdim' else 'B'}), wanted 1 to {MAX_SIZE}")
    if sizes["groups"] < 1 or sizes["heads"] % sizes["groups"]:
        raise ValueError(f"B has {sizes['groups']} groups, wanted a divisor of the {sizes['heads']} heads of x")
    _check_limit(dt_limit)
    return types.MappingProxyType(sizes)


def _check_limit(dt_limit):
    pair = isinstance(dt_limit, tuple | list) and len(dt_limit) == 2
    if not pair or not all(isinstance(value, int | float) for value in dt_limit):
        raise TypeError(f"dt_limit is {dt_limit!r}, wanted (low, high), two numbers")
    low, high = dt_limit
    if not low <= high:
        raise ValueError(f"dt_limit is {tuple(dt_limit)}, wanted (low, high) with low <= high")
    for value in dt_limit:
        if abs(value) < math.inf:  # no bound is one too
            checks.number("dt_limit", value)


def _wanted(dims, directions, known=()):
    """The shape that an argument is wanted in, with the sizes that are known."""
    wanted = f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"
    if directions == 2:
        wanted += f" or (2, {', '.join(dims)})"
    told = ", ".join(f"{dim} = {known[dim]}" for dim in known if dim in dims)
    return f"{wanted} with {told}" if told else wanted


def check_states(initial_states, sizes, cu_seqlens, x):
    """The same for the states a scan starts from."""
    if initial_states is None:
        return
    checks.floating_tensor("initial_states", initial_states)
    sequences = sizes["batch"] if cu_seqlens is None else cu_seqlens.numel() - 1
    wanted = (sequences, sizes["heads"], sizes["headdim"], sizes["dstate"])
    if tuple(initial_states.shape) != wanted:
        raise ValueError(
            f"initial_states has shape {tuple(initial_states.shape)}, "
            f"wanted (sequences, heads, headdim, dstate) = {wanted}"
        )
    checks.like("initial_states", initial_states, "x", x)


def math_dtype(x):
    """What kernels compute in and per-head parameters are passed as: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def in_math_dtype(x, *tensors):
    """The per-head parameters and states as the compiled operators take them."""
    return [None if tensor is None else tensor.to(math_dtype(x)) for tensor in tensors]


def new_gradients(*arguments):
    """Empty tensors, one for each argument and shaped as it; (0,) for one that is absent, in the first one's dtype."""
    first = arguments[0]
    absent = first.new_empty(0, dtype=math_dtype(first))
    return tuple(absent.clone() if t is None else t.new_empty(t.shape) for t in arguments)


def only_present(gradients, arguments):
    """Gradients as autograd takes them: None for an absent argument."""
    return [None if argument is None else gradient for gradient, argument in zip(gradients, arguments)]
