"""Triton kernels of the gated norm.

A program takes frames of one sequence at one group of channels, with all their directions: an x or z that these share
is read from memory once. A group that fits is held in registers between the sum of its squares and what is made of it;
a larger one is read again, in blocks of COLUMNS. What a frame gives depends on no other, offsets are 64-bit.
"""

import triton
import triton.language as tl

from linconv.ops.triton_frames import frame_of, length_of, load_frames, store_frames
from linconv.ops.triton_math import pairwise_sum, sigmoid, sum_of_products
from linconv.ops.triton_numbers import number_of


@triton.jit
def _place(block, seq_lens, stride, frames, FRAMES: tl.constexpr):
    """(row of the batch, first frame of a block of frames, how many of it on are not padding, how many are there)."""
    blocks = (frames + FRAMES - 1) // FRAMES
    row = block // blocks
    start = block % blocks * FRAMES
    return row, start, length_of(row, seq_lens, stride, frames) - start, row * 0 + frames - start


@triton.jit
def _inverse_root(squares, size, eps, MATH: tl.constexpr):
    """Of the mean square; eps in float64 is given by its bits."""
    mean = squares / tl.full([], size, MATH)
    if tl.float64 == MATH:
        return 1 / tl.sqrt(mean + number_of(eps, MATH))
    else:
        return 1 / tl.sqrt(mean + eps)


@triton.jit
def _gated(
    x, x_strides, z, z_strides, direction, row, start, t, valid, channel, there, MATH: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    x = frame_of(x, x_strides, direction, row, start, channel, VECTOR)
    z = frame_of(z, z_strides, direction, row, start, channel, VECTOR)
    gate = load_frames(z, z_strides[2], t, valid, there, MATH, VECTOR)
    return load_frames(x, x_strides[2], t, valid, there, MATH, VECTOR) * (gate * sigmoid(gate))


@triton.jit(do_not_specialize=["eps"])
def normalize(
    x, z, weight, y, seq_lens, lengths_stride, frames, groups, group_size, eps, x_strides, z_strides, w_strides,
    y_strides, DIRECTIONS: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MATH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, start, length, written = _place(
        tl.program_id(0).to(tl.int64) // groups, seq_lens, lengths_stride, frames, ROWS
    )
    origin = tl.program_id(0).to(tl.int64) % groups * group_size
    t = tl.arange(0, ROWS)
    valid = t < length
    for direction in tl.static_range(DIRECTIONS):
        squares = tl.zeros((ROWS,), MATH)
        gated = tl.zeros((ROWS, COLUMNS), MATH)
        for first in range(0, group_size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            gated = _gated(
                x, x_strides, z, z_strides, direction, row, start, t, valid, origin + column, column < group_size, MATH,
                VECTOR,
            )  # fmt: skip
            squares += sum_of_products(gated, gated)
        r = _inverse_root(squares, group_size, eps, MATH)
        for first in range(0, group_size, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            there = column < group_size
            if not HELD:
                gated = _gated(
                    x, x_strides, z, z_strides, direction, row, start, t, valid, origin + column, there, MATH, VECTOR
                )  # fmt: skip
            w = tl.load(weight + direction * w_strides[0] + (origin + column) * w_strides[1], mask=there, other=0)
            result = tl.where(valid[:, None], gated * r[:, None] * w.to(MATH)[None, :], 0)
            to = frame_of(y, y_strides, direction, row, start, origin + column, VECTOR)
            store_frames(to, y_strides[2], t, t < written, there, result, VECTOR)


@triton.jit
def _sums(
    grad, g_strides, x, x_strides, z, z_strides, weight, w_strides, direction, row, start, t, valid, origin, group_size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MATH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums over a group, read in blocks: of gated^2 and of dy weight gated."""
    squares = tl.zeros((ROWS,), MATH)
    products = tl.zeros((ROWS,), MATH)
    for first in range(0, group_size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = column < group_size
        channel = origin + column
        gated = _gated(x, x_strides, z, z_strides, direction, row, start, t, valid, channel, there, MATH, VECTOR)
        upstream = frame_of(grad, g_strides, direction, row, start, channel, VECTOR)
        dy = load_frames(upstream, g_strides[2], t, valid, there, MATH, VECTOR)
        w = tl.load(weight + direction * w_strides[0] + channel * w_strides[1], mask=there, other=0).to(MATH)
        squares += sum_of_products(gated, gated)
        products += sum_of_products(dy * w[None, :], gated)
    return squares, products


@triton.jit(do_not_specialize=["eps"])
def differentiate(
    grad, x, z, weight, dx, dz, parts, seq_lens, lengths_stride, frames, groups, blocks, group_size, eps, g_strides,
    x_strides, z_strides, w_strides, dx_strides, dz_strides, DIRECTIONS: tl.constexpr, SHARED_X: tl.constexpr,
    SHARED_Z: tl.constexpr, HELD: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MATH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dx and dz of FRAMES frames at COLUMNS channels of a group, and their sums for the gradient of weight.

    With u = dy weight: d gated = r u - r^3 mean(u gated) gated, and from there through the gate.
    """
    part = tl.program_id(0).to(tl.int64) // (groups * blocks)
    of_group = tl.program_id(0).to(tl.int64) % (groups * blocks)
    row, start, length, written = _place(part, seq_lens, lengths_stride, frames, FRAMES)
    origin = of_group // blocks * group_size
    column = of_group % blocks * COLUMNS + tl.arange(0, COLUMNS)
    there = column < group_size
    channel = origin + column
    weights = ()
    dweight = ()
    for i in tl.static_range(DIRECTIONS):
        at = weight + i * w_strides[0] + channel * w_strides[1]
        weights += (tl.load(at, mask=there, other=0).to(MATH)[None, :],)
        dweight += (tl.zeros((ROWS, COLUMNS), MATH),)
    for step in range(0, FRAMES, ROWS):
        t = step + tl.arange(0, ROWS)
        valid = t < length
        x_total = tl.zeros((ROWS, COLUMNS), MATH)
        z_total = tl.zeros((ROWS, COLUMNS), MATH)
        next_dweight = ()
        for i in tl.static_range(DIRECTIONS):
            input = frame_of(x, x_strides, i, row, start, channel, VECTOR)
            gate = frame_of(z, z_strides, i, row, start, channel, VECTOR)
            upstream = frame_of(grad, g_strides, i, row, start, channel, VECTOR)
            a = load_frames(input, x_strides[2], t, valid, there, MATH, VECTOR)
            b = load_frames(gate, z_strides[2], t, valid, there, MATH, VECTOR)
            dy = load_frames(upstream, g_strides[2], t, valid, there, MATH, VECTOR)
            s = sigmoid(b)
            silu = b * s
            gated = a * silu
            u = dy * weights[i]
            if HELD:
                squares = sum_of_products(gated, gated)
                products = sum_of_products(u, gated)
            else:
                squares, products = _sums(
                    grad, g_strides, x, x_strides, z, z_strides, weight, w_strides, i, row, start, t, valid, origin,
                    group_size, ROWS, COLUMNS, MATH, VECTOR,
                )  # fmt: skip
            # Of padding it would be infinite where eps is 0.
            r = tl.where(valid, _inverse_root(squares, group_size, eps, MATH), 0)
            k = r * r * r * (products / tl.full([], group_size, MATH))
            # Written out: of two products the compiler could fuse either with the sum.
            d = tl.where(valid[:, None], tl.fma(r[:, None], u, -k[:, None] * gated), 0)
            next_dweight += (dweight[i] + dy * gated * r[:, None],)
            # What directions share is complete, and rounded, after the last one.
            x_total = x_total + d * silu if SHARED_X else d * silu
            z_total = z_total + d * a * (s + silu * (1 - s)) if SHARED_Z else d * a * (s + silu * (1 - s))
            if not SHARED_X or i == DIRECTIONS - 1:
                to = frame_of(dx, dx_strides, i, row, start, channel, VECTOR)
                store_frames(to, dx_strides[2], t, t < written, there, x_total, VECTOR)
            if not SHARED_Z or i == DIRECTIONS - 1:
                to = frame_of(dz, dz_strides, i, row, start, channel, VECTOR)
                store_frames(to, dz_strides[2], t, t < written, there, z_total, VECTOR)
        dweight = next_dweight
    channels = groups * group_size
    for i in tl.static_range(DIRECTIONS):
        tl.store(parts + (part * DIRECTIONS + i) * channels + channel, pairwise_sum(tl.trans(dweight[i])), mask=there)
