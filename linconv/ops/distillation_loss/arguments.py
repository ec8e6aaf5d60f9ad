"""Checks of the arguments of the distillation losses."""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from linconv.ops import checks

__all__ = [
    "STATISTICS",
    "check_pair",
    "check_temperature",
    "checked_mask",
    "checked_states",
    "checked_weights",
    "valid_rows",
]

STATISTICS = 6  # numbers that kernels keep of each row of logits


def checked_states(name: str, states) -> list:
    """Hidden states as a list, one per layer; the elements are not checked."""
    if not isinstance(states, Iterable) or (isinstance(states, Tensor) and states.ndim == 0):
        raise TypeError(f"{name}: got {type(states).__name__}; want a sequence of tensors, one a layer")
    return list(states)


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for n, t in ((name, tensor), (other_name, other)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{n}: got {type(t).__name__}; want a tensor")
        if t.dtype not in checks.FLOATING:
            raise TypeError(f"{n}: got {t.dtype}; want one of {', '.join(map(str, checks.FLOATING))}")
        _check_layout(n, t)
        if t.ndim < 2 or t.shape[-1] == 0:
            raise ValueError(f"{n}: got shape {tuple(t.shape)}; want (..., width) with at least two axes and width > 0")
    if tensor.shape != other.shape:
        raise ValueError(f"{other_name}: got shape {tuple(other.shape)}; want {tuple(tensor.shape)}, that of {name}")
    if tensor.device != other.device:
        raise ValueError(f"{other_name}: got device {other.device}; want {tensor.device}, that of {name}")


def checked_mask(name: str, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The checked mask: bool, of the row shape of ``like``, or lengths (batch,)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}; want a bool or integer tensor")
    _check_layout(name, mask)
    rows = like.shape[:-1]
    if mask.device != like.device:
        raise ValueError(f"{name}: got device {mask.device}; want {like.device}")
    if mask.dtype == torch.bool:
        if mask.shape != rows:
            raise ValueError(f"{name}: got bool of shape {tuple(mask.shape)}; want {tuple(rows)}")
        return mask
    if mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {mask.dtype}; want bool (valid rows), or int32 or int64 (lengths)")
    if len(rows) != 2 or mask.shape != rows[:1]:
        want = f"lengths of shape ({rows[0]},) for inputs (batch, L, width)" if len(rows) == 2 else "a bool mask here"
        raise ValueError(f"{name}: got integers of shape {tuple(mask.shape)}; want {want}")
    if checks.readable(mask):
        wrong = [n for n in mask.tolist() if not 0 <= n <= rows[1]]
        if wrong:
            raise ValueError(f"{name}: got a length of {wrong[0]}; want 0 to L = {rows[1]}")
    return mask


def check_temperature(temperature: float) -> None:
    if not isinstance(temperature, int | float) or not 0 < temperature <= sys.float_info.max:
        raise ValueError(f"temperature: got {temperature!r}; want a finite number above 0")


def checked_weights(weights, student: list) -> Tensor | None:
    """Factors of the layers: (layers,), real numbers, on any device that holds data."""
    if weights is None:
        return None
    try:
        # A tensor stays on its device: as_tensor would move it to a default device.
        weights = weights if isinstance(weights, Tensor) else torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(weights).__name__
        raise TypeError(f"weights: got {got}, {error}; want a tensor or numbers, one for each layer") from error
    if weights.is_complex():
        raise TypeError(f"weights: got {weights.dtype}; want real numbers")
    _check_layout("weights", weights)
    if weights.shape != (len(student),):
        raise ValueError(f"weights: got shape {tuple(weights.shape)}; want {(len(student),)}, one for each layer")
    if weights.is_meta and not all(isinstance(x, Tensor) and x.is_meta for x in student):
        raise ValueError("weights: got device meta; want one that holds numbers, as the student's")
    return weights


def _check_layout(name: str, tensor: Tensor) -> None:
    if checks.layout(tensor) != torch.strided:
        raise ValueError(f"{name}: got layout {checks.layout(tensor)}; want {torch.strided}")


def valid_rows(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A checked mask as bool with the row shape of ``like``: lengths become a mask of frames."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return torch.arange(like.shape[1], device=like.device) < mask[:, None]
