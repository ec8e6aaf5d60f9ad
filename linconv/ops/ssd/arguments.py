"""Checks of the arguments of `ssd` and `bidirectional_ssd`, made before any kernel runs."""

import math
import types

import torch

from linconv.ops import checks

# Dimensions of each argument when both directions share it; a leading axis of 2 holds (forward, backward).
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
    """As `sizes_of`, with a check of the bounds of the sequences."""
    sizes = sizes_of(x, dt, A, B, C, D, dt_bias, dt_limit, directions)
    checks.sequence_bounds(seq_lens, cu_seqlens, sizes["batch"], sizes["L"], x.device)
    return sizes


@checks.remembered
def sizes_of(x, dt, A, B, C, D, dt_bias, dt_limit, directions):
    """The sizes by name; raises ValueError or TypeError with the argument, what was passed and what is wanted.

    directions: 2 if arguments may have a leading axis of 2, else 1.
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
        if abs(value) < math.inf:  # infinity is allowed: no bound
            checks.number("dt_limit", value)


def _wanted(dims, directions, known=()):
    """The wanted shape of an argument, with the known sizes."""
    wanted = f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"
    if directions == 2:
        wanted += f" or (2, {', '.join(dims)})"
    told = ", ".join(f"{dim} = {known[dim]}" for dim in known if dim in dims)
    return f"{wanted} with {told}" if told else wanted


def check_states(initial_states, sizes, cu_seqlens, x):
    """Check the states that a scan starts from."""
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
    """The dtype in which kernels compute and get per-head parameters: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def in_math_dtype(x, *tensors):
    """The per-head parameters and states in the dtype that compiled operators take."""
    return [None if tensor is None else tensor.to(math_dtype(x)) for tensor in tensors]


def of_heads(backend: str, x, A, D, dt_bias):
    """The per-head parameters as a backend's operators take them: Triton's kernels read D and dt_bias of any dtype."""
    return (*in_math_dtype(x, A), D, dt_bias) if backend == "triton" else in_math_dtype(x, A, D, dt_bias)


def new_gradients(*arguments):
    """An empty tensor of each argument's shape; (0,) for an absent one, in the first argument's math dtype."""
    first = arguments[0]
    absent = first.new_empty(0, dtype=math_dtype(first))
    return tuple(absent.clone() if t is None else t.new_empty(t.shape) for t in arguments)


def only_present(gradients, arguments):
    """Gradients as autograd expects them: None for an absent argument."""
    return [None if argument is None else gradient for gradient, argument in zip(gradients, arguments)]
