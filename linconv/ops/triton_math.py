"""Functions that several operators' Triton kernels take."""

import triton
import triton.language as tl

__all__ = ["sigmoid"]


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))
