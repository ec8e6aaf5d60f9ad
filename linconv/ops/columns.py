"""Columns of rows: split into views, joined by one copy."""

from collections.abc import Sequence

import torch

__all__ = ["joined", "split"]

WORD = torch.int64


def joined(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.cat`` along the last axis.

    On a GPU torch copies rows that are not contiguous element by element. Viewed as words of 8 bytes, 16-bit rows have
    a quarter as many.
    """
    if columns[0].is_cuda and not torch.compiler.is_compiling():
        return _joined_as_words(columns)
    return torch.cat(columns, dim=-1)


def split(rows: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """``rows.split(sizes, dim=-1)``, whose gradients are put together by :func:`joined`."""
    if rows.is_cuda and rows.requires_grad and not torch.compiler.is_compiling():
        return _Split.apply(rows, tuple(sizes))
    return torch.split_with_sizes(rows, tuple(sizes), dim=-1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(rows, sizes):
        return rows.split(sizes, dim=-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        return joined(gradients), None


def _joined_as_words(columns):
    if all(_is_words(c) and c.dtype == columns[0].dtype for c in columns):
        return torch.cat([c.view(WORD) for c in columns], dim=-1).view(columns[0].dtype)
    return torch.cat(columns, dim=-1)


def _is_words(column: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(column) or functorch.is_legacy_batchedtensor(column):
        return False  # torch has no rule for the view of batched gradients
    *strides, together = column.stride()
    places = (column.shape[-1], column.storage_offset(), *strides)
    return together == 1 and not any(place % (WORD.itemsize // column.element_size()) for place in places)
