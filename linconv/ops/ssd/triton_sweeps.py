"""Triton kernels that sweep over a sequence's chunks with their state in registers: its only way to memory is out.

The arithmetic is that of triton_chunk.py. Decays come first, of all chunks at once, since whatever a sweep does for a
chunk every later chunk waits for.
"""

import triton
import triton.language as tl

from linconv.ops.ssd.triton_chunk import (
    added_by,
    decayed_step,
    decays_of,
    first_slot,
    frames_of,
    is_reversed,
    load_tile,
    load_u,
    sequence_of,
    source_of,
    states_of,
    store_decays,
)


@triton.jit
def chunk_decays(
    dt, A, dt_bias, v_of, step_of, w_of, total_of, bounds, frames, sequences, slots, heads,
    dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """v, dt and w into v_of, step_of and w_of (directions, heads, slots, Q), the chunk's total into total_of (...,
    slots), for HEADS heads of one direction of a chunk; step_of or w_of is None."""
    slot = (tl.program_id(0) // DIRECTIONS).to(tl.int64)
    direction = (tl.program_id(0) % DIRECTIONS).to(tl.int64)
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    if chunk * Q >= length:
        return
    q = tl.arange(0, Q)
    frame = chunk * Q + q
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = head < heads
    valid = (frame < length)[None, :] & there[:, None]
    at_most = tl.minimum(head, heads - 1)[:, None]
    step, v, _, total = decays_of(
        dt, dt_bias, A, direction, row, (begin + frame)[None, :], at_most, valid, is_reversed(direction, FLIP),
        dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, 1, False, SOFTPLUS, LOW, HIGH, MATH,
    )  # fmt: skip
    at = (direction * heads + head) * slots + slot
    of_chunk = at[:, None] * Q + q[None, :]
    store_decays(v_of, step_of, w_of, total_of, at, of_chunk, v, step, total, there[:, None], there)


@triton.jit
def _sweep(
    rows, columns, states, v_of, step_of, w_of, total_of, first, last, bounds, frames, slots, heads,
    r_d, r_b, r_t, r_h, r_p, c_d, c_b, c_t, c_g, c_n, first_s, first_h, first_p, first_n, direction, head,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    FLIP: tl.constexpr, SHIFTED: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, from rows = x and columns = B; with GRADIENT the gradient of the one that
    leaves it, from rows = dy and columns = C, against the direction's own order.

    first, last (sequences, heads, headdim, dstate): what the sweep begins with and what it leaves.
    """
    p_tiles: tl.constexpr = (headdim + BLOCK_P - 1) // BLOCK_P
    n_tiles: tl.constexpr = (dstate + BLOCK_N - 1) // BLOCK_N
    sequence = (tl.program_id(0) // (p_tiles * n_tiles)).to(tl.int64)
    group = head // group_heads
    reverse = is_reversed(direction, FLIP)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunks = ((length + Q - 1) // Q).to(tl.int32)
    slot = (direction * heads + head) * slots + first_slot(sequence, bounds, frames, Q, KIND)
    p = (tl.program_id(0) // n_tiles % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    kept = (p < headdim)[:, None] & (n < dstate)[None, :]
    offset = p[:, None] * dstate + n[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], MATH)
    if first is not None:
        pointer = first + sequence * first_s + head * first_h
        pointers = pointer + p.to(tl.int64)[:, None] * first_p + n.to(tl.int64)[None, :] * first_n
        state += tl.load(pointers, mask=kept, other=0).to(MATH)
    for c in tl.range(0, chunks, num_stages=STAGES):
        chunk = tl.where(reverse != GRADIENT, chunks - 1 - c, c)
        at = slot + chunk
        tl.store(states + at * (headdim * dstate) + offset, state.to(states.dtype.element_ty), mask=kept)
        i = chunk * Q + q
        valid = i < length
        total = tl.load(total_of + at)
        # Tile and scale in opposite orders: else Triton, 3.6 to 3.9, has shared memory of its own for either sweep.
        if GRADIENT:
            source, there = source_of(i, valid, length, reverse, SHIFTED)
            scale = tl.where(valid, tl.exp2(load_u(v_of + at * Q, q, reverse, Q, SHIFTED)), 0)
            tile = load_tile(
                rows, direction, row, begin + i, head, p, valid, headdim, r_d, r_b, r_t, r_h, r_p, MATH, True
            )
        else:
            source, there = i, valid
            tile = load_tile(
                rows, direction, row, begin + i, head, p, valid, headdim, r_d, r_b, r_t, r_h, r_p, MATH, True
            )
            scale = decayed_step(total, v_of, step_of, w_of, at * Q + q)
        factor = load_tile(
            columns, direction, row, begin + source, group, n, there, dstate, c_d, c_b, c_t, c_g, c_n, OPERAND, False
        )  # fmt: skip
        state = added_by(tile, factor, scale, state * tl.exp2(total), MATH, OPERAND, PRECISION)
    if last is not None:
        tl.store(last + (sequence * heads + head) * (headdim * dstate) + offset, state, mask=kept)


@triton.jit
def sweep_states(
    x, B, dy, C, states, other_states, leaving, v_of, step_of, w_of, total_of, first, last, dlast, dfirst, bounds,
    frames, slots, heads,
    x_d, x_b, x_t, x_h, x_p, B_d, B_b, B_t, B_g, B_n, dy_d, dy_b, dy_t, dy_h, dy_p, C_d, C_b, C_t, C_g, C_n,
    first_s, first_h, first_p, first_n, dlast_s, dlast_h, dlast_p, dlast_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The states that enter each chunk and, where there is a dy, in programs of their own the gradients of those that
    leave it.

    states and other_states (heads, slots, headdim, dstate): those of either direction; leaving (directions, ...):
    gradients of both. first, last (sequences, heads, headdim, dstate): the states before the first and after the last
    step; dlast, dfirst: their gradients. Each may be None: zero, or not wanted.
    """
    head = (tl.program_id(1) % heads).to(tl.int64)
    direction = (tl.program_id(1) // heads % DIRECTIONS).to(tl.int64)
    if tl.program_id(1) < heads * DIRECTIONS:
        own = states_of(direction, states, other_states, slots, heads, headdim, dstate)
        _sweep(
            x, B, own, v_of, step_of, w_of, total_of, first, last, bounds, frames, slots, heads,
            x_d, x_b, x_t, x_h, x_p, B_d, B_b, B_t, B_g, B_n, first_s, first_h, first_p, first_n, direction,
            head, group_heads, headdim, dstate, FLIP, SHIFTED, False, KIND, Q, BLOCK_P, BLOCK_N, MATH, OPERAND,
            PRECISION, STAGES,
        )  # fmt: skip
    elif dy is not None:
        _sweep(
            dy, C, leaving, v_of, step_of, w_of, total_of, dlast, dfirst, bounds, frames, slots, heads,
            dy_d, dy_b, dy_t, dy_h, dy_p, C_d, C_b, C_t, C_g, C_n, dlast_s, dlast_h, dlast_p, dlast_n,
            direction, head, group_heads, headdim, dstate, FLIP, SHIFTED, True, KIND, Q, BLOCK_P, BLOCK_N, MATH,
            OPERAND, PRECISION, STAGES,
        )  # fmt: skip
