"""Numbers that kernels would otherwise take less exactly than they are."""

import struct

import triton
import triton.language as tl

__all__ = ["bits_of", "number_of", "to_operand"]


def bits_of(number: float) -> int:
    """The bits of a float64, for a launch takes floating-point numbers in float32 only."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


@triton.jit
def number_of(bits, MATH: tl.constexpr):
    """The number of :func:`bits_of`, rounded to MATH."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(MATH)


@triton.jit
def to_operand(values, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """values as products take them.

    TF32 ones are rounded to the nearest, ties away from zero: tensor cores cut off the bits that it has not. Those of
    fp16 have none.
    """
    if tl.float32 == OPERAND and PRECISION == "tf32" and values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return values.to(OPERAND)
