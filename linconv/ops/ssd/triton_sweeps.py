"""Triton kernels of the two-sweep scan, forward: a program walks a sequence's chunks with their state in registers.

The arithmetic is that of triton_chunk.py. One sweep gives a direction's results. Where both directions are summed, a
sweep from the last chunk to the first leaves the backward direction's states in memory for the sweep that follows,
from the first chunk to the last, to take results of both from.
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
    load_state,
    load_tile,
    source_of,
    weights_of,
)


@triton.jit
def sweep_states(
    x, dt, A, dt_bias, B, states, bounds, frames, sequences, slots, heads,
    x_d, x_b, x_t, x_h, x_p, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, B_d, B_b, B_t, B_g, B_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states of the backward of two directions that enter each chunk, (heads, slots, headdim, dstate)."""
    p_tiles = (headdim + BLOCK_P - 1) // BLOCK_P
    n_tiles = (dstate + BLOCK_N - 1) // BLOCK_N
    sequence = (tl.program_id(0) // (p_tiles * n_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (p_tiles * n_tiles)
    head = tl.program_id(1).to(tl.int64)
    direction = tl.full([], 1, tl.int64)
    group = head // group_heads
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunks = ((length + Q - 1) // Q).to(tl.int32)
    slot = head * slots + first_slot(sequence, bounds, frames, Q, KIND)
    p = (tile // n_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    element = p[:, None] * dstate + n[None, :]
    kept = (p < headdim)[:, None] & (n < dstate)[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], MATH)
    for c in range(0, chunks):
        chunk = chunks - 1 - c
        tl.store(states + (slot + chunk) * (headdim * dstate) + element, state.to(OPERAND), mask=kept)
        i = chunk * Q + tl.arange(0, Q)
        valid = i < length
        _, step, v, total = decays_of(
            dt, dt_bias, A, direction, row, begin + i, head, valid, True, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d,
            bias_h, SOFTPLUS, LOW, HIGH, MATH,
        )  # fmt: skip
        x_tile = load_tile(x, direction, row, begin + i, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, MATH, True)
        B_tile = load_tile(
            B, direction, row, begin + i, group, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False
        )
        state = added_by(x_tile, B_tile, tl.exp(total - v) * step, state * tl.exp(total), MATH, OPERAND, PRECISION)


@triton.jit
def _direction_terms(
    dt, dt_bias, A, C, B_tile, state, direction, row, begin, length, head, group, i, valid, n, reverse,
    dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, C_d, C_b, C_t, C_g, C_n,
    dstate: tl.constexpr, ONCE: tl.constexpr, SHIFTED: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, Q: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One direction's weights (Q, Q) of a chunk, what its rows take from the state (dstate, headdim) that enters, and
    what frames and that state are multiplied by in the one that leaves."""
    rate, step, v, total = decays_of(
        dt, dt_bias, A, direction, row, begin + i, head, valid, reverse, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d,
        bias_h, SOFTPLUS, LOW, HIGH, MATH,
    )  # fmt: skip
    source, there = source_of(i, valid, length, reverse, SHIFTED)
    C_tile = load_tile(
        C, direction, row, begin + source, group, n, there, dstate, C_d, C_b, C_t, C_g, C_n, OPERAND, False
    )
    scores = tl.dot(C_tile, tl.trans(B_tile), input_precision=PRECISION, out_dtype=MATH)
    q = tl.arange(0, Q)
    weights, entered = weights_of(
        scores, v, step, v, step, total, rate, valid, q, q, reverse, is_strict(direction, ONCE, SHIFTED), SHIFTED, False
    )
    from_state = tl.dot(C_tile, state, input_precision=PRECISION, out_dtype=MATH) * entered[:, None]
    return weights, from_state, tl.exp(total - v) * step, tl.exp(total)


@triton.jit
def sweep_outputs(
    x, dt, A, dt_bias, B, C, D, states, first, last, out, bounds, frames, sequences, slots, heads,
    x_d, x_b, x_t, x_h, x_p, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, B_d, B_b, B_t, B_g, B_n,
    C_d, C_b, C_t, C_g, C_n, D_d, D_h, first_s, first_h, first_p, first_n, out_d, out_b, out_t, out_h,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    SUMMED: tl.constexpr, SUM_D: tl.constexpr, FLIP: tl.constexpr, ONCE: tl.constexpr, SHIFTED: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y: a program takes a sequence, a head, BLOCK_P columns of headdim and, unless SUMMED, a direction.

    first, last (sequences, heads, headdim, dstate): the states before the first and after the last step of the one
    direction; each may be None: zero, or not wanted. states: those of ``sweep_states`` if SUMMED, else None. BLOCK_N
    columns hold all of dstate.
    """
    p_tiles = (headdim + BLOCK_P - 1) // BLOCK_P
    sequence = (tl.program_id(0) // p_tiles).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    direction = (tl.program_id(1) // heads).to(tl.int64)
    group = head // group_heads
    reverse = is_reversed(direction, FLIP)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunks = ((length + Q - 1) // Q).to(tl.int32)
    slot = head * slots + first_slot(sequence, bounds, frames, Q, KIND)
    p = (tl.program_id(0) % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    of_state = (p < headdim)[:, None] & (n < dstate)[None, :]
    own = out + direction * out_d + row * out_b + head * out_h
    state = tl.zeros([BLOCK_P, BLOCK_N], MATH)
    if first is not None:
        pointer = first + sequence * first_s + head * first_h
        offset = p.to(tl.int64)[:, None] * first_p + n.to(tl.int64)[None, :] * first_n
        state += tl.load(pointer + offset, mask=of_state, other=0).to(MATH)
    for c in range(0, chunks):
        chunk = tl.where(reverse, chunks - 1 - c, c)
        i = chunk * Q + tl.arange(0, Q)
        valid = i < length
        x_tile = load_tile(x, direction, row, begin + i, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, MATH, True)
        B_tile = load_tile(
            B, direction, row, begin + i, group, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False
        )
        weights, result, scale, kept_of_state = _direction_terms(
            dt, dt_bias, A, C, B_tile, tl.trans(state.to(OPERAND)), direction, row, begin, length, head, group, i,
            valid, n, reverse, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, C_d, C_b, C_t, C_g, C_n, dstate,
            ONCE, SHIFTED, SOFTPLUS, LOW, HIGH, Q, MATH, OPERAND, PRECISION,
        )  # fmt: skip
        state = added_by(x_tile, B_tile, scale, state * kept_of_state, MATH, OPERAND, PRECISION)
        if SUMMED:
            B_tile = load_tile(
                B, direction + 1, row, begin + i, group, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False
            )
            other_state = load_state(states, slot + chunk, p, n, headdim, dstate, True)
            other_weights, other_result, _, _ = _direction_terms(
                dt, dt_bias, A, C, B_tile, other_state, direction + 1, row, begin, length, head, group, i, valid, n,
                True, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, C_d, C_b, C_t, C_g, C_n, dstate,
                ONCE, SHIFTED, SOFTPLUS, LOW, HIGH, Q, MATH, OPERAND, PRECISION,
            )  # fmt: skip
            weights += other_weights
            result += other_result
        x_tile = tl.trans(x_tile)
        result = tl.dot(weights.to(OPERAND), x_tile.to(OPERAND), result, input_precision=PRECISION, out_dtype=MATH)
        if D is not None:
            skip = tl.load(D + direction * D_d + head * D_h).to(MATH)
            if SUM_D:
                skip += tl.load(D + D_d + head * D_h).to(MATH)
            result += skip * x_tile
        offset = (begin + i).to(tl.int64)[:, None] * out_t + p[None, :]
        stored = valid if KIND == "cu_seqlens" else i < frames
        result = tl.where(valid[:, None], result, 0).to(out.dtype.element_ty)
        tl.store(own + offset, result, mask=stored[:, None] & (p < headdim)[None, :])
    if KIND == "seq_lens":
        zeros = tl.zeros([Q, BLOCK_P], out.dtype.element_ty)
        for chunk in range(chunks, (frames + Q - 1) // Q):
            i = chunk * Q + tl.arange(0, Q)
            offset = (begin + i).to(tl.int64)[:, None] * out_t + p[None, :]
            tl.store(own + offset, zeros, mask=(i < frames)[:, None] & (p < headdim)[None, :])
    if last is not None:
        offset = (sequence * heads + head) * (headdim * dstate) + p[:, None] * dstate + n[None, :]
        tl.store(last + offset, state, mask=of_state)
