"""Sums of the parts that a kernel's programs leave of a gradient, in a fixed order: no result depends on chance."""

import torch
import triton
import triton.language as tl

from linconv.ops.triton_launch import launch
from linconv.ops.triton_math import pairwise_sum

__all__ = ["column_sums", "sum_parts"]

PARTS, COLUMNS = 64, 32  # of a step of a program


@triton.jit
def column_sums(parts, count, size, block, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """(columns, sums over parts (count, size) of them) of a block of COLUMNS; those behind the last are zero.

    In an order that is written here: parts of what is padded and of the same alone, whose sizes differ, sum up alike.
    """
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), parts.dtype.element_ty)
    for part in range(0, count, PARTS):
        row = part + tl.arange(0, PARTS).to(tl.int64)
        there = (row < count)[:, None] & (column < size)[None, :]
        total += tl.load(parts + row[:, None] * size + column[None, :], mask=there, other=0)
    return column, pairwise_sum(tl.trans(total))


@triton.jit
def _sum_parts(parts, first, second, count, first_size, size, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column, sums = column_sums(parts, count, size, tl.program_id(0), PARTS, COLUMNS)
    tl.store(first + column, sums.to(first.dtype.element_ty), mask=column < first_size)
    if second is not None:
        column -= first_size
        tl.store(second + column, sums.to(second.dtype.element_ty), mask=(column >= 0) & (column < size - first_size))


def sum_parts(parts: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
    """Writes the sums over parts (count, elements): of the first elements to ``first``, of the others to ``second``.

    Results are contiguous, of any dtype; parts are in the one that is to be summed in.
    """
    count, size = parts.shape
    launch(
        _sum_parts,
        (triton.cdiv(size, COLUMNS),),
        dict(
            parts=parts, first=first, second=second, count=count, first_size=first.numel(), size=size, PARTS=PARTS,
            COLUMNS=COLUMNS,
        ),
        4,
    )  # fmt: skip
