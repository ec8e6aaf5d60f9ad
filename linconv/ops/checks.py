"""Argument checks shared by the operators: each error names the argument, what was passed and what is wanted."""

import functools
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


MOST_REMEMBERED = 1024  # results kept per check


def remembered(check):
    """Cache the result of a passed check for all arguments of the same kind.

    A check of many arguments takes longer than a launch, and a model makes few kinds of calls. ``check`` must depend
    only on its tensors' shapes, dtypes, devices and layouts, and on the type and value of other arguments.
    Its result is returned again, so it must be immutable.
    """
    passed, missing = {}, object()

    @functools.wraps(check)
    def run(*arguments):
        if torch.compiler.is_compiling():  # sizes may be symbols
            return check(*arguments)
        try:
            kind = tuple(map(_kind, arguments))
            found = passed.get(kind, missing)
        except (TypeError, RuntimeError):  # an unhashable argument, or a nested tensor, which has no shape
            return check(*arguments)
        if found is not missing:
            return found
        result = check(*arguments)
        if len(passed) >= MOST_REMEMBERED:
            passed.clear()
        passed[kind] = result
        return result

    return run


def _kind(argument):
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype, argument.device, argument.layout
    if isinstance(argument, tuple | list):  # these may be equal although their elements differ in type
        return type(argument), *map(_kind, argument)
    return type(argument), argument


def tensor(name: str, value) -> None:
    """Check that ``value`` is a strided tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, wanted a torch.Tensor")
    if layout(value) != torch.strided:
        raise ValueError(f"{name} has layout {layout(value)}, wanted {torch.strided}")


def layout(value: torch.Tensor):
    """The layout of ``value``, "nested" for a nested tensor: it may report strided, but has no shape."""
    return "nested" if value.is_nested else value.layout


def floating_tensor(name: str, value) -> None:
    """Check that ``value`` is a strided tensor of float32, bfloat16, float16 or float64."""
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}, wanted one of {', '.join(map(str, FLOATING))}")


def shape(name: str, value: torch.Tensor, wanted: tuple, meaning: str) -> None:
    """Check that ``value`` has the sizes ``wanted`` (None: any); errors call them ``meaning``, as "(batch, L, d)"."""
    got = tuple(value.shape)
    if len(got) != len(wanted) or any(w is not None and g != w for g, w in zip(got, wanted)):
        sizes = ", ".join("any" if w is None else str(w) for w in wanted)
        raise ValueError(f"{name} has shape {got}, wanted {meaning} = ({sizes})")


def flag(name: str, value) -> None:
    """Check that ``value`` is a bool: the truth of other values may not be what is meant, as with the text "False"."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, wanted a bool")


def number(name: str, value) -> None:
    """Check that ``value`` is an int or float that is finite as a float."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {type(value).__name__}, wanted a float")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} is {value}, wanted a finite number")


def like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that ``value`` is on ``other``'s device, and float64 just if ``other`` is, which decides the math dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, wanted {other.device} as {other_name}")
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} is {value.dtype} and {other_name} is {other.dtype}, wanted torch.float64 for all or for none"
        )


def readable(value: torch.Tensor) -> bool:
    """Whether reading elements costs nothing: not on another device, and not while a graph is being traced."""
    return not torch.compiler.is_compiling() and value.device.type == "cpu" and not isinstance(value, FakeTensor)


def _integer_vector(name: str, value, device: torch.device) -> None:
    tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {value.dtype}, wanted torch.int32 or torch.int64")
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, wanted one dimension")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, wanted {device} as the other tensors")


def sequence_bounds(seq_lens, cu_seqlens, batch: int, length: int, device: torch.device) -> None:
    """Check where the sequences of a batch lie.

    Args:
        seq_lens: None, or int32/int64 (batch,), 0 <= seq_lens <= length: row i holds frames 0 to seq_lens[i] - 1.
        cu_seqlens: None, or int32/int64 (sequences + 1,), not decreasing, from 0 to ``length``: sequence i holds frames
            cu_seqlens[i] to cu_seqlens[i + 1] - 1 of the only row. At most one of the two is given.
        batch: number of rows.
        length: frames in a row.
        device: where both must be. Values are read on the CPU only: elsewhere reading them would stall the device.
    """
    if seq_lens is not None and cu_seqlens is not None:
        raise ValueError("seq_lens and cu_seqlens are both given, wanted at most one of them")
    if seq_lens is not None:
        _integer_vector("seq_lens", seq_lens, device)
        if seq_lens.shape[0] != batch:
            raise ValueError(f"seq_lens has shape {tuple(seq_lens.shape)}, wanted (batch,) = ({batch},)")
        if readable(seq_lens):
            wrong = [n for n in seq_lens.tolist() if not 0 <= n <= length]
            if wrong:
                raise ValueError(f"seq_lens holds {wrong[0]}, wanted 0 to L = {length}")
    if cu_seqlens is not None:
        _integer_vector("cu_seqlens", cu_seqlens, device)
        if batch != 1:
            raise ValueError(f"cu_seqlens is given with a batch of {batch}, wanted a batch of 1")
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens is empty, wanted (sequences + 1,) elements")
        if readable(cu_seqlens):
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != length:
                raise ValueError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}, wanted 0 to L = {length}")
            if any(b < a for a, b in zip(bounds, bounds[1:])):
                raise ValueError(f"cu_seqlens is {bounds}, wanted values that do not decrease")
