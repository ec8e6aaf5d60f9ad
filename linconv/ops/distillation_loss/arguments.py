"""Checks of what the distillation losses are given."""

import torch
from torch import Tensor

from linconv.ops import checks

__all__ = ["check_pair", "checked_mask", "valid_rows"]


def check_pair(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    for n, t in ((name, tensor), (other_name, other)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{n}: got {type(t).__name__}; want a tensor")
        if not t.is_floating_point():
            raise TypeError(f"{n}: got {t.dtype}; want a floating-point dtype")
        if t.ndim < 2 or t.shape[-1] == 0:
            raise ValueError(f"{n}: got shape {tuple(t.shape)}; want (..., width) with at least two axes and width > 0")
    if tensor.shape != other.shape:
        raise ValueError(f"{other_name}: got shape {tuple(other.shape)}; want {tuple(tensor.shape)}, that of {name}")
    if tensor.device != other.device:
        raise ValueError(f"{other_name}: got device {other.device}; want {tensor.device}, that of {name}")


def checked_mask(name: str, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask, bool of the shape of the rows of ``like``, or lengths (batch,)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}; want a bool or integer tensor")
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


def valid_rows(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A checked mask as bool with the row shape of ``like``: lengths are spread over the frames."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return torch.arange(like.shape[1], device=like.device) < mask[:, None]
