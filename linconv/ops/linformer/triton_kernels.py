"""Triton kernels of Linformer attention.

Frames are counted from each sequence's own first, and cut into splits by its own length alone, so what a sequence gives
does not depend on what it is batched with. Offsets are 64-bit; sums are fp32 (fp64 for fp64) and have a fixed order.
Rows and heads are on the first axis of a grid, and tiles of frames with them, for the others end at 65,535.
"""

import triton
import triton.language as tl

from linconv.ops.triton_numbers import number_of, to_operand


@triton.jit
def _length(row, bounds, frames):
    if bounds is None:
        return row * 0 + frames
    else:
        return tl.minimum(tl.maximum(tl.load(bounds + row).to(tl.int64), 0), frames)


@triton.jit
def _split_frames(length, SPLIT: tl.constexpr, MOST: tl.constexpr, MULTIPLE: tl.constexpr):
    """How many frames a split has of a sequence of `length`, as in csrc/linformer/kernel.h."""
    # The one division by what is no constant is of 32-bit numbers: of 64-bit ones it takes registers that spill.
    short = tl.minimum(length, MOST * SPLIT).to(tl.int32)
    splits = tl.maximum((short + SPLIT - 1) // SPLIT, 1)
    even = tl.where(length > MOST * SPLIT, (length + MOST - 1) // MOST, (short + splits - 1) // splits)
    return tl.maximum((even + MULTIPLE - 1) // MULTIPLE, 1) * MULTIPLE


@triton.jit
def _factor(length, NORMALIZE: tl.constexpr, MATH: tl.constexpr):
    if NORMALIZE:
        return 1 / tl.sqrt(tl.maximum(length, 1).to(MATH))
    else:
        return (length * 0 + 1).to(MATH)


@triton.jit
def _number(given, MATH: tl.constexpr):
    """A number of a launch, which in float64 is given by its bits; else it need not stand in a register."""
    if tl.float64 == MATH:
        return number_of(given, MATH)
    else:
        return given


@triton.jit
def _tile_of(tiles):
    """(tile, row and head) of a program, where each row and head has so many tiles."""
    return tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)


@triton.jit
def _rows(
    pointer, row, column, valid, columns, s_row, s_column, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(rows, columns) of a matrix; zero at rows that are not valid and behind the last column."""
    offsets = row.to(tl.int64)[:, None] * s_row + column.to(tl.int64)[None, :] * s_column
    values = tl.load(pointer + offsets, mask=valid[:, None] & (column < columns)[None, :], other=0)
    return to_operand(values, OPERAND, PRECISION)


@triton.jit
def _store_rows(pointer, row, column, wanted, columns, s_row, s_column, values):
    offsets = row.to(tl.int64)[:, None] * s_row + column.to(tl.int64)[None, :] * s_column
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=wanted[:, None] & (column < columns)[None, :])


# ---- Dropout: the hash of csrc/linformer/dropout.h


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, row_and_head, frame, key, threshold, keep_scale, MATH: tl.constexpr):
    """What dropout multiplies weights with, (frames, keys): 0 or keep_scale."""
    drawn = tl.load(seed)
    low = (drawn & 0xFFFFFFFF).to(tl.uint32)
    high = ((drawn >> 32) & 0xFFFFFFFF).to(tl.uint32)
    step = tl.full([], 0x9E3779B9, tl.uint32)
    place = _mix((row_and_head & 0xFFFFFFFF).to(tl.uint32) ^ low)
    first = _mix(place ^ frame.to(tl.uint32))
    second = _mix(_mix(first ^ high) + step)
    counter = key.to(tl.uint32) * step
    hashed = _mix(_mix(counter[None, :] + first[:, None]) ^ second[:, None])
    return tl.where(hashed.to(tl.int64) < threshold, 0.0, keep_scale).to(MATH)


# ---- Projection


@triton.jit
def project(
    x, proj, parts, bounds, frames, heads, rank, headdim, splits, column_blocks, x_b, x_h, x_t, x_c, p_h, p_t, p_r,
    BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """proj^T x over one split: a tile of ranks and columns."""
    row_and_head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    row, head = row_and_head // heads, row_and_head % heads
    length = _length(row, bounds, frames)
    size = _split_frames(length, SPLIT, MOST, MULTIPLE)
    begin = (split * size).to(tl.int32)
    end = tl.minimum(length, split * size + size).to(tl.int32)
    if begin < end or split == 0:
        ranks = tile // column_blocks * BR + tl.arange(0, BR)
        columns = tile % column_blocks * BC + tl.arange(0, BC)
        x += row * x_b + head * x_h
        proj += head * p_h
        total = tl.zeros((BR, BC), MATH)
        for t in range(begin, end, BT):
            frame = t + tl.arange(0, BT)
            valid = frame < end
            by_frame = _rows(proj, frame, ranks, valid, rank, p_t, p_r, OPERAND, PRECISION)
            values = _rows(x, frame, columns, valid, headdim, x_t, x_c, OPERAND, PRECISION)
            total = tl.dot(tl.trans(by_frame), values, total, input_precision=PRECISION, out_dtype=MATH)
        to = parts + (row_and_head * splits + split) * rank * headdim
        _store_rows(to, ranks, columns, ranks < rank, headdim, headdim, 1, total)


@triton.jit
def sum_parts(
    parts, out, bounds, frames, heads, splits, size, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, MATH: tl.constexpr,
    SPLIT: tl.constexpr, MOST: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    row_and_head = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = _length(row_and_head // heads, bounds, frames)
    split_frames = _split_frames(length, SPLIT, MOST, MULTIPLE)
    own = tl.maximum((length + split_frames - 1) // split_frames, 1)
    inside = element < size
    parts += row_and_head * splits * size
    total = tl.load(parts + element, mask=inside, other=0)
    for split in range(1, own):
        total += tl.load(parts + split * size + element, mask=inside, other=0)
    total *= _factor(length, NORMALIZE, MATH)
    tl.store(out + row_and_head * size + element, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unproject(
    grad, proj, dx, bounds, frames, heads, rank, headdim, g_b, g_h, g_r, g_c, p_h, p_t, p_r, d_b, d_h, d_t, d_c,
    NORMALIZE: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, MATH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = proj grad: a tile of frames and columns."""
    tile, row_and_head = _tile_of((frames + BT - 1) // BT)
    frame = tile * BT + tl.arange(0, BT)
    columns = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    row, head = row_and_head // heads, row_and_head % heads
    length = _length(row, bounds, frames)
    grad += row * g_b + head * g_h
    proj += head * p_h
    total = tl.zeros((BT, BC), MATH)
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        by_frame = _rows(proj, frame, ranks, frame < length, rank, p_t, p_r, OPERAND, PRECISION)
        values = _rows(grad, ranks, columns, ranks < rank, headdim, g_r, g_c, OPERAND, PRECISION)
        total = tl.dot(by_frame, values, total, input_precision=PRECISION, out_dtype=MATH)
    total = tl.where((frame < length)[:, None], total * _factor(length, NORMALIZE, MATH), 0)
    _store_rows(dx + row * d_b + head * d_h, frame, columns, frame < frames, headdim, d_t, d_c, total)


@triton.jit
def project_weights(
    grad, x, dproj, bounds, batch, most, shared_heads, frames, heads, rank, headdim, g_b, g_h, g_r, g_c, x_b, x_h, x_t,
    x_c, d_h, d_t, d_r, NORMALIZE: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dproj = the sum over rows, and heads that share it, of x grad^T: a tile of frames and ranks."""
    frame = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ranks = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    own = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BT, BR), MATH)
    for index in range(0, batch * shared_heads):
        row = (index // shared_heads).to(tl.int64)
        head = own + index % shared_heads
        length = _length(row, bounds, frames)
        part = tl.zeros((BT, BR), MATH)
        for c in range(0, headdim, BC):
            columns = c + tl.arange(0, BC)
            from_x = x + row * x_b + head * x_h
            values = _rows(from_x, frame, columns, frame < length, headdim, x_t, x_c, OPERAND, PRECISION)
            other = _rows(
                grad + row * g_b + head * g_h, ranks, columns, ranks < rank, headdim, g_r, g_c, OPERAND, PRECISION
            )
            part = tl.dot(values, tl.trans(other), part, input_precision=PRECISION, out_dtype=MATH)
        total += part * _factor(length, NORMALIZE, MATH)
    _store_rows(dproj + own * d_h, frame, ranks, frame < most, rank, d_t, d_r, total)


# ---- Attention


@triton.jit
def _scores(queries, keys, ranks, rank, scale, MATH: tl.constexpr, PRECISION: tl.constexpr):
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=MATH) * scale
    return tl.where((ranks < rank)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=["scale", "keep_scale"])
def attend(
    q, k, v, out, bounds, seed, frames, heads, rank, headdim, scale, threshold, keep_scale,
    q_b, q_h, q_t, q_c, k_b, k_h, k_r, k_c, v_b, v_h, v_r, v_c, o_b, o_h, o_t, o_c,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, row_and_head = _tile_of((frames + BT - 1) // BT)
    frame = tile * BT + tl.arange(0, BT)
    row, head = row_and_head // heads, row_and_head % heads
    valid = frame < _length(row, bounds, frames)
    columns = tl.arange(0, BD)
    scale = _number(scale, MATH)
    keep_scale = _number(keep_scale, MATH)
    queries = _rows(q + row * q_b + head * q_h, frame, columns, valid, headdim, q_t, q_c, OPERAND, PRECISION)
    most = tl.full((BT,), float("-inf"), MATH)
    normaliser = tl.zeros((BT,), MATH)
    total = tl.zeros((BT, BD), MATH)
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        keys = _rows(k + row * k_b + head * k_h, ranks, columns, ranks < rank, headdim, k_r, k_c, OPERAND, PRECISION)
        values = _rows(v + row * v_b + head * v_h, ranks, columns, ranks < rank, headdim, v_r, v_c, OPERAND, PRECISION)
        scores = _scores(queries, keys, ranks, rank, scale, MATH, PRECISION)
        now = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp(most - now)
        weights = tl.exp(scores - now[:, None])
        normaliser = normaliser * decay + tl.sum(weights, 1)
        if seed is not None:
            weights *= _kept(seed, row_and_head, frame, ranks, threshold, keep_scale, MATH)
        weights = to_operand(weights, OPERAND, PRECISION)
        total = tl.dot(weights, values, total * decay[:, None], input_precision=PRECISION, out_dtype=MATH)
        most = now
    total = tl.where(valid[:, None], total / normaliser[:, None], 0)
    _store_rows(out + row * o_b + head * o_h, frame, columns, frame < frames, headdim, o_t, o_c, total)


@triton.jit(do_not_specialize=["scale", "keep_scale"])
def attend_queries(
    grad, q, k, v, dq, normalisers, means, bounds, seed, frames, heads, rank, headdim, scale, threshold,
    keep_scale,
    g_b, g_h, g_t, g_c, q_b, q_h, q_t, q_c, k_b, k_h, k_r, k_c, v_b, v_h, v_r, v_c, o_b, o_h, o_t, o_c,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries; their normalisers and the means of their scores' gradients, for attend_keys."""
    tile, row_and_head = _tile_of((frames + BT - 1) // BT)
    frame = tile * BT + tl.arange(0, BT)
    row, head = row_and_head // heads, row_and_head % heads
    valid = frame < _length(row, bounds, frames)
    columns = tl.arange(0, BD)
    scale = _number(scale, MATH)
    keep_scale = _number(keep_scale, MATH)
    queries = _rows(q + row * q_b + head * q_h, frame, columns, valid, headdim, q_t, q_c, OPERAND, PRECISION)
    upstream = _rows(grad + row * g_b + head * g_h, frame, columns, valid, headdim, g_t, g_c, OPERAND, PRECISION)
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    most = tl.full((BT,), float("-inf"), MATH)
    normaliser = tl.zeros((BT,), MATH)
    mean = tl.zeros((BT,), MATH)
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        keys = _rows(k, ranks, columns, ranks < rank, headdim, k_r, k_c, OPERAND, PRECISION)
        values = _rows(v, ranks, columns, ranks < rank, headdim, v_r, v_c, OPERAND, PRECISION)
        scores = _scores(queries, keys, ranks, rank, scale, MATH, PRECISION)
        dweights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION, out_dtype=MATH)
        if seed is not None:
            dweights *= _kept(seed, row_and_head, frame, ranks, threshold, keep_scale, MATH)
        now = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp(most - now)
        weights = tl.exp(scores - now[:, None])
        normaliser = normaliser * decay + tl.sum(weights, 1)
        mean = mean * decay + tl.sum(weights * dweights, 1)
        most = now
    mean = mean / normaliser
    total = most + tl.log(normaliser)
    dqueries = tl.zeros((BT, BD), MATH)
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        keys = _rows(k, ranks, columns, ranks < rank, headdim, k_r, k_c, OPERAND, PRECISION)
        values = _rows(v, ranks, columns, ranks < rank, headdim, v_r, v_c, OPERAND, PRECISION)
        scores = _scores(queries, keys, ranks, rank, scale, MATH, PRECISION)
        dweights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION, out_dtype=MATH)
        if seed is not None:
            dweights *= _kept(seed, row_and_head, frame, ranks, threshold, keep_scale, MATH)
        dscores = to_operand(tl.exp(scores - total[:, None]) * (dweights - mean[:, None]), OPERAND, PRECISION)
        dqueries = tl.dot(dscores, keys, dqueries, input_precision=PRECISION, out_dtype=MATH)
    dqueries = tl.where(valid[:, None], dqueries * scale, 0)
    _store_rows(dq + row * o_b + head * o_h, frame, columns, frame < frames, headdim, o_t, o_c, dqueries)
    at = row_and_head * frames + frame
    tl.store(normalisers + at, total, mask=valid)
    tl.store(means + at, mean, mask=valid)


@triton.jit(do_not_specialize=["scale", "keep_scale"])
def attend_keys(
    grad, q, k, v, dk_parts, dv_parts, normalisers, means, bounds, seed, frames, heads, rank, headdim, splits,
    scale, threshold, keep_scale,
    g_b, g_h, g_t, g_c, q_b, q_h, q_t, q_c, k_b, k_h, k_r, k_c, v_b, v_h, v_r, v_c,
    BT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """What the queries of one split add to the gradients of a tile of projected keys and values."""
    row_and_head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    row, head = row_and_head // heads, row_and_head % heads
    length = _length(row, bounds, frames)
    size = _split_frames(length, SPLIT, MOST, MULTIPLE)
    begin = (split * size).to(tl.int32)
    end = tl.minimum(length, split * size + size).to(tl.int32)
    # Not within the branch, which may not give a name a value of another type.
    scale = _number(scale, MATH)
    keep_scale = _number(keep_scale, MATH)
    if begin < end or split == 0:
        ranks = tile * BR + tl.arange(0, BR)
        columns = tl.arange(0, BD)
        keys = _rows(k + row * k_b + head * k_h, ranks, columns, ranks < rank, headdim, k_r, k_c, OPERAND, PRECISION)
        values = _rows(v + row * v_b + head * v_h, ranks, columns, ranks < rank, headdim, v_r, v_c, OPERAND, PRECISION)
        dkeys = tl.zeros((BR, BD), MATH)
        dvalues = tl.zeros((BR, BD), MATH)
        for t in range(begin, end, BT):
            frame = t + tl.arange(0, BT)
            valid = frame < end
            queries = _rows(q + row * q_b + head * q_h, frame, columns, valid, headdim, q_t, q_c, OPERAND, PRECISION)
            upstream = _rows(
                grad + row * g_b + head * g_h, frame, columns, valid, headdim, g_t, g_c, OPERAND, PRECISION
            )
            at = row_and_head * frames + frame
            total = tl.load(normalisers + at, mask=valid, other=0)
            mean = tl.load(means + at, mask=valid, other=0)
            scores = _scores(queries, keys, ranks, rank, scale, MATH, PRECISION)
            weights = tl.where(valid[:, None], tl.exp(scores - total[:, None]), 0)
            dweights = tl.dot(upstream, tl.trans(values), input_precision=PRECISION, out_dtype=MATH)
            used = weights
            if seed is not None:
                kept = _kept(seed, row_and_head, frame, ranks, threshold, keep_scale, MATH)
                dweights *= kept
                used = weights * kept
            dscores = to_operand(weights * (dweights - mean[:, None]), OPERAND, PRECISION)
            used = to_operand(used, OPERAND, PRECISION)
            dkeys = tl.dot(tl.trans(dscores), queries, dkeys, input_precision=PRECISION, out_dtype=MATH)
            dvalues = tl.dot(tl.trans(used), upstream, dvalues, input_precision=PRECISION, out_dtype=MATH)
        to = (row_and_head * splits + split) * rank * headdim
        _store_rows(dk_parts + to, ranks, columns, ranks < rank, headdim, headdim, 1, dkeys * scale)
        _store_rows(dv_parts + to, ranks, columns, ranks < rank, headdim, headdim, 1, dvalues)
