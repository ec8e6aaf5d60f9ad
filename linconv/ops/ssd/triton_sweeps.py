"""Triton kernels of the two-sweep scan, forward: a program walks a sequence's chunks with their state in registers.

The arithmetic is that of triton_chunk.py. Decays come first, of all chunks at once, since whatever a sweep does for a
chunk every later chunk waits for. A sweep then gives a direction's results. Where both directions are summed, a second
sweep adds its results to those of the first: no state is ever in memory.
"""

import triton
import triton.language as tl

from linconv.ops.ssd.triton_chunk import (
    added_by,
    decays_of,
    first_slot,
    frames_of,
    is_reversed,
    is_strict,
    load_tile,
    scores_in_sight,
    sequence_of,
    source_of,
    weights_of,
)


@triton.jit
def chunk_decays(
    dt, A, dt_bias, v_of, step_of, total_of, bounds, frames, sequences, slots, heads,
    dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, Q: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """v and dt into v_of and step_of (directions, heads, slots, Q), the chunk's total into total_of (..., slots)."""
    slot = (tl.program_id(0) // DIRECTIONS).to(tl.int64)
    direction = (tl.program_id(0) % DIRECTIONS).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    if chunk * Q >= length:
        return
    position = tl.arange(0, Q)
    frame = chunk * Q + position
    _, step, v, total = decays_of(
        dt, dt_bias, A, direction, row, begin + frame, head, frame < length, is_reversed(direction, FLIP),
        dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, SOFTPLUS, LOW, HIGH, MATH,
    )  # fmt: skip
    at = (direction * heads + head) * slots + slot
    tl.store(v_of + at * Q + position, v)
    tl.store(step_of + at * Q + position, step)
    tl.store(total_of + at, total)


@triton.jit
def sweep(
    x, A, B, C, D, v_of, step_of, total_of, first, last, summand, out, bounds, frames, sequences, slots, heads,
    first_direction, x_d, x_b, x_t, x_h, x_p, A_d, A_h, B_d, B_b, B_t, B_g, B_n, C_d, C_b, C_t, C_g, C_n, D_d, D_h,
    first_s, first_h, first_p, first_n, out_d, out_b, out_t, out_h,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    FLIP: tl.constexpr, ONCE: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A direction's y: a program takes a sequence, a head, BLOCK_P columns of headdim and all of dstate, in BLOCK_N.

    first, last (sequences, heads, headdim, dstate): the states before the first and after the last step of the one
    direction. summand: what is added to y, at the strides of out. Each may be None: zero, or not wanted.
    """
    p_tiles = (headdim + BLOCK_P - 1) // BLOCK_P
    sequence = (tl.program_id(0) // p_tiles).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    direction = (first_direction + tl.program_id(1) // heads).to(tl.int64)
    group = head // group_heads
    reverse = is_reversed(direction, FLIP)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunks = ((length + Q - 1) // Q).to(tl.int32)
    slot = (direction * heads + head) * slots + first_slot(sequence, bounds, frames, Q, KIND)
    p = (tl.program_id(0) % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    rate = tl.load(A + direction * A_d + head * A_h).to(MATH)
    own = direction * out_d + row * out_b + head * out_h
    of_state = (p < headdim)[:, None] & (n < dstate)[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], MATH)
    if first is not None:
        pointer = first + sequence * first_s + head * first_h
        pointers = pointer + p.to(tl.int64)[:, None] * first_p + n.to(tl.int64)[None, :] * first_n
        state += tl.load(pointers, mask=of_state, other=0).to(MATH)
    # Invariants taken out of the loop would hold registers that there are not.
    for c in tl.range(0, chunks, num_stages=1, disable_licm=True):
        chunk = tl.where(reverse, chunks - 1 - c, c)
        i = chunk * Q + q
        valid = i < length
        source, there = source_of(i, valid, length, reverse, SHIFTED)
        at = slot + chunk
        v = tl.load(v_of + at * Q + q)
        step = tl.load(step_of + at * Q + q)
        total = tl.load(total_of + at)
        x_tile = load_tile(
            x, direction, row, begin + i, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, OPERAND, False
        )
        B_tile = load_tile(
            B, direction, row, begin + i, group, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False
        )
        C_tile = load_tile(
            C, direction, row, begin + source, group, n, there, dstate, C_d, C_b, C_t, C_g, C_n, OPERAND, False
        )
        scores = tl.dot(C_tile, tl.trans(B_tile), input_precision=PRECISION, out_dtype=MATH)
        scores = scores_in_sight(scores, q, q, reverse, is_strict(direction, ONCE, SHIFTED), False)
        weights, entered = weights_of(scores, v, step, v, step, total, rate, valid, SHIFTED, False)
        result = tl.dot(C_tile, tl.trans(state.to(OPERAND)), input_precision=PRECISION, out_dtype=MATH)
        result *= entered[:, None]
        result = tl.dot(weights.to(OPERAND), x_tile, result, input_precision=PRECISION, out_dtype=MATH)
        if D is not None:
            result += tl.load(D + direction * D_d + head * D_h).to(MATH) * x_tile.to(MATH)
        offset = own + (begin + i).to(tl.int64)[:, None] * out_t + p[None, :]
        stored = valid if KIND == "cu_seqlens" else i < frames
        kept = stored[:, None] & (p < headdim)[None, :]
        if summand is not None:
            result += tl.load(summand + offset, mask=kept, other=0).to(MATH)
        tl.store(out + offset, tl.where(valid[:, None], result, 0).to(out.dtype.element_ty), mask=kept)
        scale = tl.exp2(total - v) * step
        state = added_by(
            tl.trans(x_tile).to(MATH), B_tile, scale, state * tl.exp2(total), MATH, OPERAND, PRECISION
        )  # fmt: skip
    if KIND == "seq_lens":
        zeros = tl.zeros([Q, BLOCK_P], out.dtype.element_ty)
        for chunk in range(chunks, (frames + Q - 1) // Q):
            i = chunk * Q + q
            offset = own + (begin + i).to(tl.int64)[:, None] * out_t + p[None, :]
            tl.store(out + offset, zeros, mask=(i < frames)[:, None] & (p < headdim)[None, :])
    if last is not None:
        offset = (sequence * heads + head) * (headdim * dstate) + p[:, None] * dstate + n[None, :]
        tl.store(last + offset, state, mask=of_state)
