"""Functions that several operators' Triton kernels take."""

import triton
import triton.language as tl

__all__ = ["exact_exp2", "pairwise_sum", "sigmoid", "sum_of_products"]


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def exact_exp2(x):
    """2^x in float32 within 1.5 units in the last place, errors of either sign alike; 0 below 2^-125.5.

    tl.exp2 is the GPU's approximation, whose errors have a mean: thousands of decays that multiply each other up show
    it. x = n + r with |r| <= 1/2; 2^r = 1 + r q(r), q the polynomial of csrc/common/vec.h, so that of a small x the
    difference to 1 is as exact as x. It is taken twice and 2^n by half, which has no power of its own for n = 128.
    """
    TO_INTEGER: tl.constexpr = 12582912.0  # 1.5 * 2^23: the sum has no bits behind the point
    x = tl.clamp(x, -126.0, 128.0, propagate_nan=tl.PropagateNan.ALL)  # where the result is 0 and infinity
    shifted = x + TO_INTEGER
    r = x - (shifted - TO_INTEGER)
    q = tl.fma(r, tl.full(x.shape, 2 * 0.0001545316295, tl.float32), 2 * 0.001339086336)
    q = tl.fma(q, r, 2 * 0.009618082557)
    q = tl.fma(q, r, 2 * 0.05550357114)
    q = tl.fma(q, r, 2 * 0.2402265076)
    q = tl.fma(q, r, 2 * 0.693147188)
    half = (shifted.to(tl.int32, bitcast=True) + 126) << 23  # of the sum's bits only n's are left
    return tl.fma(q, r, 2.0) * half.to(tl.float32, bitcast=True)


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
