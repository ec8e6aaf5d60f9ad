"""The arithmetic of a chunk, which all Triton kernels of the scan share, for either direction of time.

A direction's own order of frames is their order in time, or the reverse of it. In that order v is the inclusive prefix
sum of A dt / ln 2 in the chunk, and u is v, or the exclusive sum where results are shifted by one step. Result i takes
2^{u_i - v_j} dt_j (C_i . B_j) x_j from frame j and 2^{u_i} C_i S from the state S that enters the chunk; the state that
leaves it takes 2^{total - v_j} dt_j x_j B_j^T. Shifted, C_i is that of the frame one step before. A power of two is one
instruction of a GPU, and one of e is six. Where products are taken of fewer digits than float32 has,
kernels have w = v - log2 dt in place of dt: 2^{u_i - w_j} is decay and step at once.

Frames are cut into chunks of Q from each sequence's own first frame on, in both directions, so what a sequence gives
does not depend on what it is batched with. A *slot* is where a chunk's intermediate results stand; the slots of packed
sequence s begin at cu_seqlens[s] // Q + s, which leaves room for every sequence's last, partial chunk.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def divides(block, size):
    return size % block == 0


@triton.jit
def frames_of(sequence, bounds, frames, KIND: tl.constexpr):
    """(row of the batch, first frame, frames) of a sequence, within the tensors whatever the bounds say."""
    if KIND == "cu_seqlens":
        begin = tl.minimum(tl.maximum(tl.load(bounds + sequence).to(tl.int64), 0), frames)
        end = tl.minimum(tl.load(bounds + sequence + 1).to(tl.int64), frames)
        return sequence * 0, begin, tl.maximum(end - begin, 0)
    elif KIND == "seq_lens":
        length = tl.minimum(tl.maximum(tl.load(bounds + sequence).to(tl.int64), 0), frames)
        return sequence, sequence * 0, length
    else:
        return sequence, sequence * 0, sequence * 0 + frames


@triton.jit
def first_slot(sequence, bounds, frames, Q: tl.constexpr, KIND: tl.constexpr):
    if KIND == "cu_seqlens":
        start = tl.minimum(tl.maximum(tl.load(bounds + sequence).to(tl.int64), 0), frames)
        return start // Q + sequence
    else:
        return sequence * ((frames + Q - 1) // Q)


@triton.jit
def sequence_of(slot, bounds, frames, sequences, Q: tl.constexpr, KIND: tl.constexpr):
    """The sequence that a slot is of: the last one whose slots begin at it or before."""
    if KIND == "cu_seqlens":
        low = slot * 0
        high = slot * 0 + sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            before = first_slot(middle, bounds, frames, Q, KIND) <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        return low
    else:
        return slot // ((frames + Q - 1) // Q)


@triton.jit
def is_reversed(direction, FLIP: tl.constexpr):
    if FLIP:
        return direction == 0
    else:
        return direction == 1


@triton.jit
def source_of(frame, valid, length, reverse, SHIFTED: tl.constexpr):
    """The frames whose C a chunk's results take, and which there are."""
    if SHIFTED:
        source = tl.where(reverse, frame + 1, frame - 1)
        return source, valid & (source >= 0) & (source < length)
    else:
        return frame, valid


@triton.jit
def in_sight(i, j, reverse, strict):
    """Whether result i takes from frame j, both spread over rows and columns. Frames that are not valid are no matter:
    their B, C, x and dy are zero. One comparison for either direction, since masks of both would hold registers."""
    sign = tl.where(reverse, -1, 1)
    return i * sign >= j * sign + strict


@triton.jit
def load_tile(
    pointer, direction, row, frame, head, column, valid, columns: tl.constexpr, s_d, s_b, s_t, s_h, s_c,
    OPERAND: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Frames of one head: (frames, columns), or (columns, frames) if BY_COLUMN; zero at frames that are not valid."""
    pointer += direction * s_d + row * s_b + head * s_h
    frame_offset = frame.to(tl.int64) * s_t
    column_offset = column.to(tl.int64) * s_c
    if BY_COLUMN:
        mask = valid[None, :]
        if not divides(column.shape[0], columns):
            mask &= (column < columns)[:, None]
        return tl.load(pointer + column_offset[:, None] + frame_offset[None, :], mask=mask, other=0).to(OPERAND)
    else:
        mask = valid[:, None]
        if not divides(column.shape[0], columns):
            mask &= (column < columns)[None, :]
        return tl.load(pointer + frame_offset[:, None] + column_offset[None, :], mask=mask, other=0).to(OPERAND)


@triton.jit
def states_of(
    direction, states, other_states, slots, heads, headdim: tl.constexpr, dstate: tl.constexpr
):  # fmt: skip
    """The pointer from which state (direction * heads + head) * slots + slot of a direction is counted.

    Each direction's states (heads, slots, headdim, dstate) may be a tensor of their own, since in the backward pass
    memory of a result serves for as many as fit.
    """
    size = tl.full([], headdim * dstate, tl.int64) * heads * slots
    return tl.where(direction == 0, states, other_states - size)


@triton.jit
def load_state(states, at, p, n, headdim: tl.constexpr, dstate: tl.constexpr, BY_COLUMN: tl.constexpr):
    """A tile of the state of one chunk of one head: (headdim, dstate), or (dstate, headdim) if BY_COLUMN."""
    states += at * (headdim * dstate)
    whole: tl.constexpr = divides(p.shape[0], headdim) and divides(n.shape[0], dstate)
    if BY_COLUMN:
        offset = p[None, :] * dstate + n[:, None]
        kept = (p < headdim)[None, :] & (n < dstate)[:, None]
    else:
        offset = p[:, None] * dstate + n[None, :]
        kept = (p < headdim)[:, None] & (n < dstate)[None, :]
    if whole:
        return tl.load(states + offset)
    else:
        return tl.load(states + offset, mask=kept, other=0)


@triton.jit
def softplus(x, MATH: tl.constexpr):
    """max(x, 0) + log(1 + e^-|x|), by log(1 + e) = 2 atanh(e / (2 + e)): tl.log is inexact near 1."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    square = s * s
    total = tl.zeros_like(s)
    TERMS: tl.constexpr = 18 if tl.float64 == MATH else 8
    for k in tl.static_range(TERMS):
        total = total * square + 1.0 / (2 * (TERMS - 1 - k) + 1)
    return tl.maximum(x, 0) + 2 * s * total


@triton.jit
def load_step(
    dt, dt_bias, direction, row, frame, head, valid, dt_d, dt_b, dt_t, dt_h, bias_d, bias_h,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """(dt + bias, softplus of it, clamped: the step) of one head."""
    offset = direction * dt_d + row * dt_b + head * dt_h + frame.to(tl.int64) * dt_t
    raw = tl.load(dt + offset, mask=valid, other=0).to(MATH)
    if dt_bias is not None:
        raw += tl.load(dt_bias + direction * bias_d + head * bias_h).to(MATH)
    free = raw
    if SOFTPLUS:
        free = softplus(raw, MATH)
    step = free
    if float("-inf") != LOW:
        step = tl.maximum(step, tl.full([], LOW, MATH))
    if float("inf") != HIGH:
        step = tl.minimum(step, tl.full([], HIGH, MATH))
    return raw, free, tl.where(valid, step, 0)


@triton.jit
def decays_of(
    dt, dt_bias, A, direction, row, frame, head, valid, reverse, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h,
    AXIS: tl.constexpr, SHIFTED: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """(dt, v, u, total) of a chunk of one head, or of several, frames along AXIS; total the sum of A dt / ln 2."""
    _, _, step = load_step(
        dt, dt_bias, direction, row, frame, head, valid, dt_d, dt_b, dt_t, dt_h, bias_d, bias_h, SOFTPLUS, LOW, HIGH,
        MATH,
    )  # fmt: skip
    rate = tl.load(A + direction * A_d + head * A_h)
    # In float64, and each direction in its own order: weights are powers of differences of these sums.
    log_decay = step.to(tl.float64) * rate.to(tl.float64) * LOG2E
    total = tl.sum(log_decay, AXIS).to(MATH)
    v = tl.where(reverse, tl.cumsum(log_decay, AXIS, reverse=True), tl.cumsum(log_decay, AXIS))
    u = v - log_decay if SHIFTED else v
    return step, v.to(MATH), u.to(MATH), total


@triton.jit
def store_decays(v_of, step_of, w_of, total_of, at, offset, v, step, total, kept, there):
    """Stores a chunk's v, dt and w = v - log2 dt at offset, its total at ``at``; step_of or w_of is None."""
    tl.store(v_of + offset, v, mask=kept)
    if step_of is not None:
        tl.store(step_of + offset, step, mask=kept)
    if w_of is not None:
        tl.store(w_of + offset, v - tl.log2(step), mask=kept)
    tl.store(total_of + at, total, mask=there)


@triton.jit
def decayed_step(until, v_of, step_of, w_of, offset):
    """2^{until - v} dt, from w where there is w_of, else from v and dt."""
    if w_of is not None:
        return tl.exp2(until - tl.load(w_of + offset))
    else:
        return tl.exp2(until - tl.load(v_of + offset)) * tl.load(step_of + offset)


@triton.jit
def load_u(v_of, position, reverse, Q: tl.constexpr, SHIFTED: tl.constexpr):
    """u at positions in a chunk, whose v begins at v_of."""
    if SHIFTED:
        before = tl.where(reverse, position + 1, position - 1)
        return tl.load(v_of + before, mask=(before >= 0) & (before < Q), other=0)
    else:
        return tl.load(v_of + position)


@triton.jit
def added_by(
    rows, factor, scale, state, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """state (headdim, dstate) + (scale * rows) factor, a product over frames: rows (headdim, frames), scale (frames,),
    factor (frames, dstate)."""
    scaled = (rows * scale[None, :]).to(OPERAND)
    return tl.dot(scaled, factor, state, input_precision=PRECISION, out_dtype=MATH)


@triton.jit
def is_strict(direction, ONCE: tl.constexpr, SHIFTED: tl.constexpr):
    """1 where a direction's results take nothing of their own frame, else 0."""
    return 1 if SHIFTED else ((direction == 1).to(tl.int32) if ONCE else 0)


@triton.jit
def finite_power(exponent):
    """2^exponent without overflow: of a pair that is out of sight the exponent may be anything, and its score, which
    this multiplies, is zero."""
    MOST: tl.constexpr = 1023.0 if exponent.dtype == tl.float64 else 127.0
    return tl.exp2(tl.minimum(exponent, MOST))


@triton.jit
def scores_in_sight(scores, i, j, reverse, strict, GRADIENT: tl.constexpr):
    """scores (i, j), those out of sight set to zero; i and j are positions in the chunk."""
    if GRADIENT:
        return tl.where(in_sight(j[None, :], i[:, None], reverse, strict), scores, 0)
    else:
        return tl.where(in_sight(i[:, None], j[None, :], reverse, strict), scores, 0)


@triton.jit
def widened(tile, round, MATH: tl.constexpr):
    """tile in MATH, made anew in each round of a loop, 0, 1, ...: kept from before the loop it would take twice the
    registers."""
    return tl.where(round >= 0, tile, 0).to(MATH)
