"""Triton kernels of the short convolution.

A sequence is cut into chunks, counted from its own first frame: what it gives does not depend on what it is batched or
packed with. A program takes one chunk at a block of channels. Its tiles are (slices, channels): each of the chunk's
slices walks over OWN frames of its own, one a step, with the last rows of x in registers. Frames are counted from the
chunk's first, so that they are small numbers; offsets are 64-bit.

At the step of frame t a direction's new result is that of frame u = t - low, whose taps are the frames t, t + 1, ...
whatever the direction, so that one window of x serves both. Steps come in groups: the rows that a group adds are all
asked for before the first of them is used.

No product is fused with a sum but by tl.fma. Left to a compiler, which ones are depends on how blocks are laid out over
threads, and that on strides: it fuses none whose product is made in one layout and added in another.
"""

import triton
import triton.language as tl

from linconv.ops.triton_frames import frame_of, length_of, load_frames, store_frames
from linconv.ops.triton_math import pairwise_sum, sigmoid

# ---- Frames


@triton.jit
def _bound(i, bounds, stride, frames):
    return tl.minimum(tl.maximum(tl.load(bounds + i * stride).to(tl.int64), 0), frames)


@triton.jit
def _first_slot(sequence, bounds, stride, frames, CHUNK: tl.constexpr):
    """The slot of a packed sequence's first chunk: there is room for the last, partial one of each before it."""
    return _bound(sequence, bounds, stride, frames) // CHUNK + sequence


@triton.jit
def _place(slot, bounds, stride, sequences, frames, PACKED: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Where a chunk is: (row of the batch, its first frame in it), and, counted from that frame, where the sequence
    begins, where it ends, and where the frames end that the chunk is to write. None is further away than matters."""
    if PACKED:
        sequence = slot * 0
        last = slot * 0 + sequences - 1
        while sequence < last:  # the last one whose slots begin at this one or before
            middle = (sequence + last + 1) // 2
            before = _first_slot(middle, bounds, stride, frames, CHUNK) <= slot
            sequence = tl.where(before, middle, sequence)
            last = tl.where(before, last, middle - 1)
        row = slot * 0
        start = _bound(sequence, bounds, stride, frames)
        length = tl.maximum(_bound(sequence + 1, bounds, stride, frames) - start, 0)
        begin = (slot - _first_slot(sequence, bounds, stride, frames, CHUNK)) * CHUNK
        written = length
    else:
        chunks = (frames + CHUNK - 1) // CHUNK
        row = slot // chunks
        start = row * 0
        length = length_of(row, bounds, stride, frames)
        begin = slot % chunks * CHUNK
        written = row * 0 + frames
    FAR: tl.constexpr = CHUNK + 2 * WIDTH  # than which no window reaches further
    first = tl.maximum(-begin, -FAR).to(tl.int32)
    end = tl.minimum(tl.maximum(length - begin, -FAR), FAR).to(tl.int32)
    written = tl.minimum(tl.maximum(written - begin, 0), CHUNK).to(tl.int32)
    return row, start + begin, first, end, written


# ---- Filters


@triton.jit
def _filter(
    weight, w_strides, bias, b_strides, direction, mirrored, channel, there, WIDTH: tl.constexpr, MATH: tl.constexpr
):
    """A direction's weights (channels,) from the first tap on, and behind them its bias."""
    found = ()
    for tap in tl.static_range(WIDTH):
        at = weight + direction * w_strides[0] + channel * w_strides[1]
        at += tl.where(mirrored, WIDTH - 1 - tap, tap) * w_strides[2]
        found += (tl.load(at, mask=there, other=0).to(MATH),)
    if bias is None:
        return found + (tl.zeros_like(found[0]),)
    else:
        at = bias + direction * b_strides[0] + channel * b_strides[1]
        return found + (tl.load(at, mask=there, other=0).to(MATH),)


@triton.jit
def _apply(filter, window, first: tl.constexpr, WIDTH: tl.constexpr):
    """The result before its activation; taps are the window's rows from `first` on."""
    total = tl.fma(filter[0][None, :], window[first], filter[WIDTH][None, :])
    for tap in tl.static_range(1, WIDTH):
        total = tl.fma(filter[tap][None, :], window[first + tap], total)
    return total


@triton.jit
def _counted(sums, d, window, first: tl.constexpr, WIDTH: tl.constexpr):
    """Sums for the gradients of a filter with those of one more frame, whose taps are as in :func:`_apply`."""
    found = ()
    for tap in tl.static_range(WIDTH):
        found += (tl.fma(d, window[first + tap], sums[tap]),)
    return found + (sums[WIDTH] + d,)


# ---- Kernels


@triton.jit
def convolve(
    x, weight, bias, y, bounds, bounds_stride, sequences, frames, channels, blocks, x_strides, w_strides, b_strides,
    y_strides, TOGETHER: tl.constexpr, WIDTH: tl.constexpr, LOOKAHEAD: tl.constexpr, REVERSE: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
    GROUP: tl.constexpr, MATH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """TOGETHER directions share x. One alone has a result at each step; two miss WIDTH - 1 of them, at either end."""
    OWN: tl.constexpr = STEPS if TOGETHER == 1 else STEPS - (WIDTH - 1)
    slot = tl.program_id(0).to(tl.int64) // blocks
    channel = tl.program_id(0).to(tl.int64) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    direction = tl.program_id(1).to(tl.int64)
    row, start, sequence_begin, sequence_end, written = _place(
        slot, bounds, bounds_stride, sequences, frames, PACKED, SLICES * OWN, WIDTH
    )
    begin = tl.arange(0, SLICES) * OWN
    end = tl.minimum(begin + OWN, written)
    filters = ()
    lows = ()
    results = ()
    for i in tl.static_range(TOGETHER):
        mirrored = (direction + i == 1) != REVERSE
        filters += (
            _filter(weight, w_strides, bias, b_strides, direction + i, mirrored, channel, there, WIDTH, MATH),
        )  # fmt: skip
        lows += (tl.where(mirrored, -LOOKAHEAD, LOOKAHEAD - (WIDTH - 1)),)
        results += (frame_of(y, y_strides, direction + i, row, start, channel, VECTOR),)
    x = frame_of(x, x_strides, direction, row, start, channel, VECTOR)
    first = begin + lows[0] if TOGETHER == 1 else begin - (WIDTH - 1)
    window = ()
    for k in tl.static_range(WIDTH - 1):
        valid = (first + k >= sequence_begin) & (first + k < sequence_end)
        window += (load_frames(x, x_strides[2], first + k, valid, there, MATH, VECTOR),)
    for step in range(0, STEPS, GROUP):
        for k in tl.static_range(GROUP):
            t = first + step + k + (WIDTH - 1)
            valid = (t >= sequence_begin) & (t < sequence_end)
            window += (load_frames(x, x_strides[2], t, valid, there, MATH, VECTOR),)
        for k in tl.static_range(GROUP):
            for i in tl.static_range(TOGETHER):
                u = first + step + k - lows[i]
                result = _apply(filters[i], window, k, WIDTH)
                if SILU:
                    result *= sigmoid(result)
                result = tl.where((u < sequence_end)[:, None], result, 0)
                store_frames(results[i], y_strides[2], u, (u >= begin) & (u < end), there, result, VECTOR)
        window = window[GROUP:]


@triton.jit
def differentiate(
    grad, x, weight, bias, dx, parts, bounds, bounds_stride, sequences, frames, channels, blocks, g_strides, x_strides,
    w_strides, b_strides, dx_strides, TOGETHER: tl.constexpr, WIDTH: tl.constexpr, LOOKAHEAD: tl.constexpr,
    REVERSE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, SLICES: tl.constexpr, CHANNELS: tl.constexpr,
    STEPS: tl.constexpr, GROUP: tl.constexpr, MATH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dx, and each chunk's sums for the gradients of weight and bias.

    With dpre[j] the gradient before the activation of frame u - j: dx[t] = sum_j w[j] dpre[j], and dw[j] takes
    dpre[0] x[t + j]. A slice's first WIDTH - 1 steps only fill dpre; each u is counted by the slice that has it.
    """
    OWN: tl.constexpr = STEPS - (WIDTH - 1)
    slot = tl.program_id(0).to(tl.int64) // blocks
    channel = tl.program_id(0).to(tl.int64) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    direction = tl.program_id(1).to(tl.int64)
    row, start, sequence_begin, sequence_end, written = _place(
        slot, bounds, bounds_stride, sequences, frames, PACKED, SLICES * OWN, WIDTH
    )
    begin = tl.arange(0, SLICES) * OWN
    end = tl.minimum(begin + OWN, written)
    zeros = tl.zeros((SLICES, CHANNELS), MATH)
    filters = ()
    lows = ()
    upstreams = ()
    dpre = ()  # of each direction, the oldest first
    sums = ()
    for i in tl.static_range(TOGETHER):
        mirrored = (direction + i == 1) != REVERSE
        filters += (
            _filter(weight, w_strides, bias, b_strides, direction + i, mirrored, channel, there, WIDTH, MATH),
        )  # fmt: skip
        lows += (tl.where(mirrored, -LOOKAHEAD, LOOKAHEAD - (WIDTH - 1)),)
        upstreams += (frame_of(grad, g_strides, direction + i, row, start, channel, VECTOR),)
        dpre += ((zeros,) * (WIDTH - 1),)
        sums += ((zeros,) * (WIDTH + 1),)
    x = frame_of(x, x_strides, direction, row, start, channel, VECTOR)
    dx = frame_of(dx, dx_strides, direction, row, start, channel, VECTOR)
    first = begin - (WIDTH - 1)
    window = ()
    for k in tl.static_range(WIDTH - 1):
        valid = (first + k >= sequence_begin) & (first + k < sequence_end)
        window += (load_frames(x, x_strides[2], first + k, valid, there, MATH, VECTOR),)
    for step in range(0, STEPS, GROUP):
        dy = ()
        for k in tl.static_range(GROUP):
            t = first + step + k
            newest = t + (WIDTH - 1)
            valid = (newest >= sequence_begin) & (newest < sequence_end)
            window += (load_frames(x, x_strides[2], newest, valid, there, MATH, VECTOR),)
            for i in tl.static_range(TOGETHER):
                u = t - lows[i]
                valid = (u >= sequence_begin) & (u < sequence_end)
                dy += (load_frames(upstreams[i], g_strides[2], u, valid, there, MATH, VECTOR),)
        for k in tl.static_range(GROUP):
            t = first + step + k
            result = zeros
            next_dpre = ()
            next_sums = ()
            for i in tl.static_range(TOGETHER):
                u = t - lows[i]
                d = dy[k * TOGETHER + i]
                if SILU:
                    pre = _apply(filters[i], window, k, WIDTH)
                    s = sigmoid(pre)
                    # Outside of the sequence there is no result, whatever its taps are.
                    inside = (u >= sequence_begin) & (u < sequence_end)
                    d = tl.where(inside[:, None], d * tl.fma(pre, tl.fma(-s, s, s), s), 0)
                recent = dpre[i] + (d,)
                for j in tl.static_range(WIDTH):
                    result = tl.fma(filters[i][j][None, :], recent[WIDTH - 1 - j], result)
                own = ((u >= begin) & (u < end))[:, None]
                next_dpre += (recent[1:],)
                next_sums += (_counted(sums[i], tl.where(own, d, 0), window, k, WIDTH),)
            dpre = next_dpre
            sums = next_sums
            result = tl.where((t < sequence_end)[:, None], result, 0)
            store_frames(dx, dx_strides[2], t, (t >= begin) & (t < end), there, result, VECTOR)
        window = window[GROUP:]
    of_bias = (direction * 0 + channels) * tl.num_programs(1) * TOGETHER  # elements, behind those of weight
    parts += slot * of_bias * (WIDTH + 1)
    for i in tl.static_range(TOGETHER):
        mirrored = (direction + i == 1) != REVERSE
        at = (direction + i) * channels + channel
        for j in tl.static_range(WIDTH):
            tap = tl.where(mirrored, WIDTH - 1 - j, j)
            tl.store(parts + at * WIDTH + tap, pairwise_sum(tl.trans(sums[i][j])), mask=there)
        tl.store(parts + of_bias * WIDTH + at, pairwise_sum(tl.trans(sums[i][WIDTH])), mask=there)
