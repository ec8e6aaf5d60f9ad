"""Functions that several operators' Triton kernels take."""

import triton
import triton.language as tl

__all__ = ["pairwise_sum", "sigmoid", "sum_of_products"]


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def pairwise_sum(x):
    """Sums over the columns of a block (rows, columns): of neighbours, then of these sums' neighbours, and so on.

    tl.sum adds in an order that follows from how the compiler lays a block out over threads, and that from strides and
    alignment of what is loaded: the same numbers elsewhere in memory could give other bits.
    """
    if x.shape[1] == 1:
        return tl.reshape(x, (x.shape[0],))
    else:
        return pairwise_sum(tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2))


@triton.jit
def sum_of_products(x, y):
    """:func:`pairwise_sum` of x y.

    Each product is rounded, by a multiply-add of its own: else the compiler would make one of a product and the sum
    that it is first added to, but only where it can, and of either of two.
    """
    return pairwise_sum(tl.fma(x, y, tl.zeros_like(x)))
