"""Triton kernels of the chunk-parallel scan, forward and backward: a program has one chunk, states stand in memory.

The arithmetic is that of triton_chunk.py.
"""

import triton
import triton.language as tl

from linconv.ops.ssd.triton_chunk import (
    added_by,
    decayed_step,
    decays_of,
    finite_power,
    first_slot,
    frames_of,
    in_sight,
    is_reversed,
    is_strict,
    load_state,
    load_step,
    load_tile,
    load_u,
    scores_in_sight,
    sequence_of,
    source_of,
    states_of,
    store_decays,
    widened,
)
from linconv.ops.triton_math import sigmoid


@triton.jit
def chunk_states(
    x, dt, A, dt_bias, B, dy, C, states, other_states, leaving, v_of, step_of, w_of, total_of, bounds,
    frames, sequences, slots, heads,
    x_d, x_b, x_t, x_h, x_p, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, B_d, B_b, B_t, B_g, B_n,
    dy_d, dy_b, dy_t, dy_h, dy_p, C_d, C_b, C_t, C_g, C_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, SHIFTED: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state that leaves it and, with GRADIENT, to the gradient of the state that enters it.

    states and other_states (heads, slots, headdim, dstate): those of either direction; leaving (directions, ...):
    gradients of both. v_of, step_of, w_of (directions, heads, slots, Q) and total_of (directions, heads, slots) keep v,
    dt, w and the chunk's total for the kernels that follow; step_of or w_of is None.
    """
    slot = (tl.program_id(0) // DIRECTIONS).to(tl.int64)
    direction = (tl.program_id(0) % DIRECTIONS).to(tl.int64)
    p_tiles = (headdim + BLOCK_P - 1) // BLOCK_P
    n_tiles = (dstate + BLOCK_N - 1) // BLOCK_N
    head = (tl.program_id(1) // (p_tiles * n_tiles)).to(tl.int64)
    tile = tl.program_id(1) % (p_tiles * n_tiles)
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    at = (direction * heads + head) * slots + slot
    p_tile = tile // n_tiles
    n_tile = tile % n_tiles
    if chunk * Q >= length:
        return
    reverse = is_reversed(direction, FLIP)
    position = tl.arange(0, Q)
    frame = chunk * Q + position
    valid = frame < length
    step, v, u, total = decays_of(
        dt, dt_bias, A, direction, row, begin + frame, head, valid, reverse, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d,
        bias_h, 0, SHIFTED, SOFTPLUS, LOW, HIGH, MATH,
    )  # fmt: skip
    if tile == 0:
        store_decays(v_of, step_of, w_of, total_of, at, at * Q + position, v, step, total, position >= 0, None)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = states_of(direction, states, other_states, slots, heads, headdim, dstate)
    offset = p[:, None] * dstate + n[None, :]
    kept = (p < headdim)[:, None] & (n < dstate)[None, :]

    nothing = tl.zeros([BLOCK_P, BLOCK_N], MATH)
    rows = load_tile(x, direction, row, begin + frame, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, MATH, True)
    factor = load_tile(
        B, direction, row, begin + frame, head // group_heads, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False
    )  # fmt: skip
    added = added_by(rows, factor, tl.exp2(total - v) * step, nothing, MATH, OPERAND, PRECISION)
    tl.store(out + at * (headdim * dstate) + offset, added.to(OPERAND), mask=kept)
    if GRADIENT:
        source, there = source_of(frame, valid, length, reverse, SHIFTED)
        dy_rows = load_tile(
            dy, direction, row, begin + frame, head, p, valid, headdim, dy_d, dy_b, dy_t, dy_h, dy_p, MATH, True
        )  # fmt: skip
        factor = load_tile(
            C, direction, row, begin + source, head // group_heads, n, there, dstate, C_d, C_b, C_t, C_g, C_n, OPERAND,
            False,
        )  # fmt: skip
        added = added_by(dy_rows, factor, tl.where(valid, tl.exp2(u), 0), nothing, MATH, OPERAND, PRECISION)
        tl.store(leaving + at * (headdim * dstate) + offset, added.to(OPERAND), mask=kept)


@triton.jit
def pass_states(
    states, other_states, leaving, total_of, first, last, dlast, dfirst, bounds, frames, slots, heads,
    first_s, first_h, first_p, first_n, dlast_s, dlast_h, dlast_p, dlast_n,
    headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    MATH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to the state that enters it, in place; gradients run against a direction's own order.

    states, other_states and leaving: see `chunk_states`.
    first, last (sequences, heads, headdim, dstate): the states before the first and after the last step; dlast, dfirst:
    their gradients. Each may be None: zero, or not wanted.
    """
    size = headdim * dstate
    tiles = (size + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    element = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    kept = element < size
    head = (tl.program_id(1) % heads).to(tl.int64)
    direction = (tl.program_id(1) // heads % DIRECTIONS).to(tl.int64)
    gradient = (tl.program_id(1) // heads // DIRECTIONS).to(tl.int64)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunks = ((length + Q - 1) // Q).to(tl.int32)
    slot = (direction * heads + head) * slots + first_slot(sequence, bounds, frames, Q, KIND)
    p = (element // dstate).to(tl.int64)
    n = (element % dstate).to(tl.int64)
    # By comparing elements: combined with a scalar's comparison, masks are integers in the interpreter of Triton 3.9.
    of_states = element < tl.where(gradient == 0, size, 0)
    of_gradients = element < tl.where(gradient == 0, 0, size)
    state = tl.zeros([BLOCK], MATH)
    if first is not None:
        pointer = first + sequence * first_s + head * first_h + p * first_p + n * first_n
        state += tl.load(pointer, mask=of_states, other=0).to(MATH)
    if dlast is not None:
        pointer = dlast + sequence * dlast_s + head * dlast_h + p * dlast_p + n * dlast_n
        state += tl.load(pointer, mask=of_gradients, other=0).to(MATH)
    against_time = is_reversed(direction, FLIP) != (gradient == 1)
    own = states_of(direction, states, other_states, slots, heads, headdim, dstate)
    if leaving is not None:
        own = tl.where(gradient == 0, own, leaving)
    own += slot * size + element
    for c in tl.range(0, chunks, num_stages=STAGES):
        chunk = tl.where(against_time, chunks - 1 - c, c).to(tl.int64)
        added = tl.load(own + chunk * size, mask=kept, other=0).to(MATH)
        decay = tl.exp2(tl.load(total_of + slot + chunk))
        tl.store(own + chunk * size, state.to(states.dtype.element_ty), mask=kept)
        state = state * decay + added
    result = (sequence * heads + head) * size + element
    if last is not None:
        tl.store(last + result, state, mask=of_states)
    if dfirst is not None:
        tl.store(dfirst + result, state, mask=of_gradients)


@triton.jit
def _scores(
    held, rows, columns, direction, row, begin, i, j, valid_i, valid_j, group,
    r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n,
    dstate: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows_i . columns_j over dstate, with the rows that are held, or read if that is None."""
    scores = tl.zeros([i.shape[0], j.shape[0]], MATH)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        left = held
        if held is None:
            left = load_tile(
                rows, direction, row, begin + i, group, n, valid_i, dstate, r_d, r_b, r_t, r_g, r_n, OPERAND, False
            )
        right = load_tile(
            columns, direction, row, begin + j, group, n, valid_j, dstate, c_d, c_b, c_t, c_g, c_n, OPERAND, True
        )
        scores = tl.dot(left, right, scores, input_precision=PRECISION, out_dtype=MATH)
    return scores


@triton.jit
def _decays_between(
    v_of, step_of, w_of, total_of, direction, head, slot, slots, heads, valid_i, q, reverse,
    SHIFTED: tl.constexpr, GRADIENT: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """(exponents of one direction's decays between the frames of a block, dt that broadcasts to them, the factors of
    what rows take from the state). Where there is w, dt is in the exponents.

    With GRADIENT, rows are frames and columns results: dx is the scan turned round, with B and C in each other's place.
    """
    at = (direction * heads + head) * slots + slot
    of_block = at * Q + q
    step = 1.0
    u = load_u(v_of + at * Q, q, reverse, Q, SHIFTED)
    w = tl.load(w_of + of_block) if w_of is not None else tl.load(v_of + of_block)
    if GRADIENT:
        exponents = u[None, :] - w[:, None]
        if w_of is None:
            step = tl.load(step_of + of_block)[:, None]
        return exponents, step, decayed_step(tl.load(total_of + at), v_of, step_of, w_of, of_block)
    else:
        exponents = u[:, None] - w[None, :]
        if w_of is None:
            step = tl.load(step_of + of_block)[None, :]
        return exponents, step, tl.where(valid_i, tl.exp2(u), 0)


@triton.jit
def _other_block(
    o, block, direction, reverse, BLOCKS: tl.constexpr, SUMMED: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """(number of the o-th other block of a chunk, whether it is later, the direction between it and ``block``, whether
    that is backward, whether there is one)."""
    other = (block + o) % BLOCKS
    later = other > block
    if SUMMED:
        backward = later != GRADIENT
        return other, later, direction + backward, backward, True
    else:
        return other, later, direction, reverse, later == (reverse != GRADIENT)


@triton.jit
def _from_block(
    result, scores, round, z, v_of, step_of, w_of, o, block, direction, head, slot, slots, heads, row, begin, chunk,
    length, q, p, reverse, z_d, z_b, z_t, z_h, z_p,
    headdim: tl.constexpr, SUMMED: tl.constexpr, SHIFTED: tl.constexpr, GRADIENT: tl.constexpr, Q: tl.constexpr,
    ROWS: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """result plus what rows take from the frames of the o-th other block of their chunk.

    All of these are on one side of the rows, and none of them is out of sight. So a decay is that from the frame to the
    edge of the frames' block, times that from there to the result: factors of columns and of rows, each at most 1.
    """
    other, later, between, backward, seen = _other_block(o, block, direction, reverse, Q // ROWS, SUMMED, GRADIENT)
    at = ((between * heads + head) * slots + slot) * Q
    last = tl.where(seen, length, 0)
    position = other * ROWS + tl.arange(0, ROWS)
    valid = (chunk * Q).to(tl.int32) + position < last
    values = load_tile(
        z, direction, row, begin + chunk * Q + position, head, p, valid, headdim, z_d, z_b, z_t, z_h, z_p, OPERAND,
        False,
    )  # fmt: skip
    if GRADIENT:
        edge = tl.load(v_of + at + block * ROWS + tl.where(later, ROWS - 1, 0))
        by_row = decayed_step(edge, v_of, step_of, w_of, at + q)
        by_column = tl.exp2(load_u(v_of + at, position, backward, Q, SHIFTED) - edge)
    else:
        edge = tl.load(v_of + at + other * ROWS + tl.where(later, 0, ROWS - 1))
        by_row = tl.exp2(load_u(v_of + at, q, backward, Q, SHIFTED) - edge)
        by_column = decayed_step(edge, v_of, step_of, w_of, at + position)
    by_row = tl.where((chunk * Q).to(tl.int32) + q < last, by_row, 0)
    by_column = tl.where(valid, by_column, 0)
    weights = widened(scores, round, MATH) * by_row[:, None] * by_column[None, :]
    return tl.dot(weights.to(OPERAND), values, result, input_precision=PRECISION, out_dtype=MATH)


@triton.jit
def _from_state(
    held, rows, states, entered, direction, head, slot, slots, heads, row, begin, length, i, group, p,
    r_d, r_b, r_t, r_g, r_n, headdim: tl.constexpr, dstate: tl.constexpr,
    FLIP: tl.constexpr, SHIFTED_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's rows, held or read, take from one direction's state (rows, headdim)."""
    at = (direction * heads + head) * slots + slot
    source, there = source_of(i, i < length, length, is_reversed(direction, FLIP), SHIFTED_ROWS)
    product = tl.zeros([i.shape[0], p.shape[0]], MATH)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        left = held
        if held is None:
            left = load_tile(
                rows, direction, row, begin + source, group, n, there, dstate, r_d, r_b, r_t, r_g, r_n, OPERAND, False
            )
        state = load_state(states, at, p, n, headdim, dstate, True)
        product = tl.dot(left, state, product, input_precision=PRECISION, out_dtype=MATH)
    return product * entered[:, None]


@triton.jit
def _add_own(
    result, values, x, D, v_of, step_of, w_of, skipped_of, own_score, direction, head, slot, slots, heads, row,
    frame, q, p, valid, x_d, x_b, x_t, x_h, x_p, D_d, D_h, headdim: tl.constexpr, SUM_D: tl.constexpr, Q: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """result plus the diagonal's part that is no product of tiles: values times D, and times the score and the step of
    the other direction at the frame itself. D and own_score may be None, as x and skipped_of: see `chunk_outputs`."""
    if D is not None or own_score is not None:
        skip = tl.zeros(q.shape, MATH)
        if D is not None:
            skip += tl.load(D + direction * D_d + head * D_h).to(MATH)
            if SUM_D:
                skip += tl.load(D + D_d + head * D_h).to(MATH)
        if own_score is not None:
            at = (((direction + 1) * heads + head) * slots + slot) * Q + q
            skip += own_score * decayed_step(tl.load(v_of + at), v_of, step_of, w_of, at)
        own = values.to(MATH)
        result += skip[:, None] * own
        if skipped_of is not None:
            own *= load_tile(x, direction, row, frame, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, MATH, False)
            tl.store(skipped_of + head * slots * Q + q, tl.sum(own, 1))
    return result


@triton.jit(do_not_specialize=["heads_at_once"])
def chunk_outputs(
    z, x, rows, columns, D, states, v_of, step_of, w_of, total_of, out, skipped_of, bounds,
    frames, sequences, slots, heads, heads_at_once,
    z_d, z_b, z_t, z_h, z_p, x_d, x_b, x_t, x_h, x_p, r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n,
    D_d, D_h, out_d, out_b, out_t, out_h,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, SUMMED: tl.constexpr, SUM_D: tl.constexpr, FLIP: tl.constexpr, ONCE: tl.constexpr,
    SHIFTED: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y from x, with rows = C and columns = B; with GRADIENT dx from dy, with rows = B and columns = C.

    SUMMED: both directions' weights are added up and multiply z as one product. A program takes a block of ROWS frames
    of a chunk, BLOCK_P columns of headdim and heads_at_once heads of a group, which share the products of rows and
    columns. How many heads that is changes no bit.

    skipped_of (tiles of headdim, directions or 1 if SUMMED, heads, slots, Q): parts of the sums over x . dy, for
    `step_gradients`; it and x may be None.
    """
    BLOCKS: tl.constexpr = Q // ROWS
    slot = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    p_tiles = (headdim + BLOCK_P - 1) // BLOCK_P
    head_blocks = heads // heads_at_once
    p_tile = tl.program_id(1) % p_tiles
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    first_head = (tl.program_id(1) // p_tiles % head_blocks).to(tl.int64) * heads_at_once
    # Where both are summed a constant, for which masks and sources of frames are simpler.
    direction = tl.full([], 0, tl.int64)
    if not SUMMED:
        direction += tl.program_id(1) // p_tiles // head_blocks
    group = first_head // group_heads
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    q = block * ROWS + tl.arange(0, ROWS)
    i = (chunk * Q).to(tl.int32) + q
    valid_i = i < length
    stored = valid_i if KIND == "cu_seqlens" else i < frames
    kept = stored[:, None] & (p < headdim)[None, :]
    # Results are our own memory, in which offsets in a chunk are small: 64 bits would take twice the registers.
    out += direction * out_d + row * out_b + (begin + chunk * Q) * out_t
    out_offset = q[:, None] * out_t + p[None, :]
    if skipped_of is not None:
        WAYS: tl.constexpr = 1 if SUMMED else DIRECTIONS
        skipped_of += ((p_tile * WAYS + direction) * heads * slots + slot) * Q
    if chunk * Q + block * ROWS >= length:
        for h in tl.range(0, heads_at_once, num_stages=STAGES, disable_licm=True):
            zeros = tl.zeros([ROWS, BLOCK_P], out.dtype.element_ty)
            tl.store(out + (first_head + h) * out_h + out_offset, zeros, mask=kept)
        return

    SHIFTED_ROWS: tl.constexpr = SHIFTED and not GRADIENT
    SHIFTED_COLUMNS: tl.constexpr = SHIFTED and GRADIENT
    HELD: tl.constexpr = dstate <= BLOCK_N  # one tile has all of dstate: rows are read once for all heads
    reverse = is_reversed(direction, FLIP)
    source_i, there_i = source_of(i, valid_i, length, reverse, SHIFTED_ROWS)
    source_j, there_j = source_of(i, valid_i, length, reverse, SHIFTED_COLUMNS)
    held, other_held = None, None
    if HELD:
        n = tl.arange(0, BLOCK_N)
        held = load_tile(
            rows, direction, row, begin + source_i, group, n, there_i, dstate, r_d, r_b, r_t, r_g, r_n, OPERAND, False
        )
    scores = _scores(
        held, rows, columns, direction, row, begin, source_i, source_j, there_i, there_j, group,
        r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n, dstate, BLOCK_N, MATH, OPERAND, PRECISION,
    )  # fmt: skip
    own_score = None
    scores = scores_in_sight(scores, q, q, reverse, is_strict(direction, ONCE, SHIFTED), GRADIENT)
    if SUMMED:
        source_i, there_i = source_of(i, valid_i, length, True, SHIFTED_ROWS)
        source_j, there_j = source_of(i, valid_i, length, True, SHIFTED_COLUMNS)
        if HELD:
            n = tl.arange(0, BLOCK_N)
            other_held = load_tile(
                rows, direction + 1, row, begin + source_i, group, n, there_i, dstate, r_d, r_b, r_t, r_g, r_n, OPERAND,
                False,
            )  # fmt: skip
        other_scores = _scores(
            other_held, rows, columns, direction + 1, row, begin, source_i, source_j, there_i, there_j, group,
            r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n, dstate, BLOCK_N, MATH, OPERAND, PRECISION,
        )  # fmt: skip
        # Off the diagonal one direction alone sees a pair of frames: one score and one power do for both. The backward
        # one's part of the diagonal stays apart.
        if not (ONCE or SHIFTED):
            own_score = tl.sum(tl.where(q[:, None] == q[None, :], other_scores, 0), 1)
        forward = q[None, :] >= q[:, None] if GRADIENT else q[:, None] >= q[None, :]
        scores = tl.where(forward, scores, other_scores)
    scores_of_blocks = ()
    for o in tl.static_range(1, BLOCKS):
        other, _, between, backward, seen = _other_block(o, block, direction, reverse, BLOCKS, SUMMED, GRADIENT)
        last = tl.where(seen, length, 0)
        j = (chunk * Q).to(tl.int32) + other * ROWS + tl.arange(0, ROWS)
        source_i, there_i = source_of(i, valid_i, length, backward, SHIFTED_ROWS)
        source_j, there_j = source_of(j, j < last, length, backward, SHIFTED_COLUMNS)
        between_blocks = _scores(
            None, rows, columns, between, row, begin, source_i, source_j, there_i, there_j, group,
            r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n, dstate, BLOCK_N, MATH, OPERAND, PRECISION,
        )  # fmt: skip
        # As they are multiplied: in full they would take twice the registers.
        scores_of_blocks = scores_of_blocks + (between_blocks.to(OPERAND),)
    for h in tl.range(0, heads_at_once, num_stages=STAGES, disable_licm=True):
        head = first_head + h
        values = load_tile(
            z, direction, row, begin + i, head, p, valid_i, headdim, z_d, z_b, z_t, z_h, z_p, OPERAND, False
        )
        # What is of the frame itself comes first, so that nothing of it is held until the last; but last of all without
        # tensor cores, where it would take registers from factors of products.
        result = tl.zeros([ROWS, BLOCK_P], MATH)
        if PRECISION != "ieee":
            result = _add_own(
                result, values, x, D, v_of, step_of, w_of, skipped_of, own_score, direction, head, slot, slots, heads,
                row, begin + i, q, p, valid_i, x_d, x_b, x_t, x_h, x_p, D_d, D_h, headdim, SUM_D, Q, MATH,
            )  # fmt: skip
        exponents, step, entered = _decays_between(
            v_of, step_of, w_of, total_of, direction, head, slot, slots, heads, valid_i, q, reverse, SHIFTED, GRADIENT,
            Q,
        )  # fmt: skip
        if SUMMED:
            other_exponents, other_step, other_entered = _decays_between(
                v_of, step_of, w_of, total_of, direction + 1, head, slot, slots, heads, valid_i, q, True, SHIFTED,
                GRADIENT, Q,
            )  # fmt: skip
            exponents = tl.where(forward, exponents, other_exponents)
            if w_of is None:
                step = tl.where(forward, step, other_step)
        weights = finite_power(exponents) * scores
        if w_of is None:
            weights *= step
        # Weights are done with before the states are looked at: both at once are more than there are registers.
        result = tl.dot(weights.to(OPERAND), values, result, input_precision=PRECISION, out_dtype=MATH)
        for o in tl.static_range(1, BLOCKS):
            result = _from_block(
                result, scores_of_blocks[o - 1], h, z, v_of, step_of, w_of, o, block, direction, head, slot, slots,
                heads, row, begin, chunk, length, q, p, reverse, z_d, z_b, z_t, z_h, z_p, headdim,
                SUMMED, SHIFTED, GRADIENT, Q, ROWS, MATH, OPERAND, PRECISION,
            )  # fmt: skip
        result += _from_state(
            held, rows, states, entered, direction, head, slot, slots, heads, row, begin, length, i, group, p,
            r_d, r_b, r_t, r_g, r_n, headdim, dstate, FLIP, SHIFTED_ROWS, BLOCK_N, MATH, OPERAND, PRECISION,
        )  # fmt: skip
        if SUMMED:
            result += _from_state(
                other_held, rows, states, other_entered, direction + 1, head, slot, slots, heads, row, begin, length, i,
                group, p, r_d, r_b, r_t, r_g, r_n, headdim, dstate, FLIP, SHIFTED_ROWS, BLOCK_N, MATH, OPERAND,
                PRECISION,
            )  # fmt: skip
        if PRECISION == "ieee":
            result = _add_own(
                result, values, x, D, v_of, step_of, w_of, skipped_of, own_score, direction, head, slot, slots, heads,
                row, begin + i, q, p, valid_i, x_d, x_b, x_t, x_h, x_p, D_d, D_h, headdim, SUM_D, Q, MATH,
            )  # fmt: skip
        result = tl.where(valid_i[:, None], result, 0)
        tl.store(out + head * out_h + out_offset, result.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _gradients_of(
    rows, others, columns, own, states, leaving, v_of, step_of, w_of, total_of, out, moved_of, given_of, carried_of,
    bounds, slot, direction, tile, group, head_block, part, frames, sequences, slots, heads,
    r_d, r_b, r_t, r_h, r_p, o_d, o_b, o_t, o_h, o_p, c_d, c_b, c_t, c_g, c_n,
    own_d, own_b, own_t, own_g, own_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr, OF_B: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, ONCE: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of own = C, from rows = dy, others = x and columns = B, or with OF_B that of own = B, from rows = x,
    others = dy and columns = C; and moved_of, given_of and carried_of, see `chunk_gradients`.

    The loop over heads sums over rows only, each of which is in one warp: warps wait for each other at products alone.
    """
    COLUMNS: tl.constexpr = Q // 2 if Q >= 32 else Q  # of the chunk's weights at once: they stand in registers
    WHOLE: tl.constexpr = headdim <= BLOCK_P  # one tile has all columns of headdim, and is read once
    groups = heads // group_heads
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    reverse = is_reversed(direction, FLIP)
    strict = is_strict(direction, ONCE, SHIFTED)
    q = tl.arange(0, Q)
    i = (chunk * Q).to(tl.int32) + q
    n = tile.to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < length
    if KIND == "cu_seqlens":
        batch = 1
        stored = valid
    else:
        batch = sequences
        stored = i < frames
    # Of a batch (batch, L, groups, dstate): contiguous. In our own memory offsets in a chunk are small: 64 bits would
    # take twice the registers.
    line = row * frames + begin
    out += ((head_block * DIRECTIONS + direction) * batch * frames + line) * groups * dstate + group * dstate
    line_size = groups * dstate
    offset = q[:, None] * line_size + n[None, :]
    of_chunk = out + chunk * Q * line_size
    columns_there = (n < dstate)[None, :]
    if chunk * Q >= length:
        zeros = tl.zeros([Q, BLOCK_N], out.dtype.element_ty)
        tl.store(of_chunk + offset, zeros, mask=stored[:, None] & columns_there)
        return

    # A result takes C of the frame source, see triton_chunk.py.
    source, there = source_of(i, valid, length, reverse, SHIFTED)
    own_frame, own_valid = (i, valid) if OF_B else (source, there)
    own_tile = load_tile(
        own, direction, row, begin + own_frame, group, n, own_valid, dstate, own_d, own_b, own_t, own_g, own_n, OPERAND,
        False,
    )  # fmt: skip
    column_tiles = ()
    for start_j in tl.static_range(0, Q, COLUMNS):
        j = (chunk * Q).to(tl.int32) + start_j + tl.arange(0, COLUMNS)
        column_frame, column_valid = source_of(j, j < length, length, reverse, SHIFTED and OF_B)
        column_tile = load_tile(
            columns, direction, row, begin + column_frame, group, n, column_valid, dstate, c_d, c_b, c_t, c_g, c_n,
            OPERAND, False,
        )  # fmt: skip
        column_tiles = column_tiles + (column_tile,)
    total_sum = tl.zeros([Q, BLOCK_N], MATH)
    for h in tl.range(0, HEADS, num_stages=STAGES, disable_licm=True):
        head = group * group_heads + head_block * HEADS + h
        at = (direction * heads + head) * slots + slot
        of_tile = at + tile * DIRECTIONS * heads * slots
        of_part = at + part * DIRECTIONS * heads * slots
        if OF_B:
            v = tl.load(v_of + at * Q + q)
            factor = tl.exp2(tl.load(total_of + at) - v)
        else:
            u = load_u(v_of + at * Q, q, reverse, Q, SHIFTED)
            factor = tl.where(valid, tl.exp2(u), 0)

        if WHOLE:
            p = tl.arange(0, BLOCK_P)
            whole_rows = load_tile(
                rows, direction, row, begin + i, head, p, valid, headdim, r_d, r_b, r_t, r_h, r_p, OPERAND, False
            )
        # 2^u is a factor of all that a result takes, 2^-v dt of all that a frame gives, so the gradients by u and by -v
        # are C . dC and B . dB. First what goes through the state.
        result = tl.zeros([Q, BLOCK_N], MATH)
        for start in range(0, headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            if WHOLE:
                row_tile = whole_rows
            else:
                row_tile = load_tile(
                    rows, direction, row, begin + i, head, p, valid, headdim, r_d, r_b, r_t, r_h, r_p, OPERAND, False
                )
            state = load_state(leaving if OF_B else states, at, p, n, headdim, dstate, False)
            result = tl.dot(row_tile, state, result, input_precision=PRECISION, out_dtype=MATH)
            if OF_B:
                before = load_state(states, at, p, n, headdim, dstate, False)
                carried = tl.sum(before.to(MATH) * state.to(MATH), 1)
                tl.store(carried_of + of_tile * headdim + p, carried, mask=p < headdim)
        result *= factor[:, None]
        moved = tl.sum(widened(own_tile, h, MATH) * result, 1)
        if OF_B:
            tl.store(given_of + of_tile * Q + q, moved)
        # Then what stays in the chunk. C . dC and B . dB are sums of one matrix over its rows and over its columns, so
        # that the two cancel exactly where they should.
        for start_j in tl.static_range(0, Q, COLUMNS):
            q_j = start_j + tl.arange(0, COLUMNS)
            j = (chunk * Q).to(tl.int32) + q_j
            valid_j = j < length
            weights = tl.zeros([Q, COLUMNS], MATH)
            for start in range(0, headdim, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                if WHOLE:
                    row_tile = whole_rows
                else:
                    row_tile = load_tile(
                        rows, direction, row, begin + i, head, p, valid, headdim, r_d, r_b, r_t, r_h, r_p, OPERAND,
                        False,
                    )  # fmt: skip
                other_tile = load_tile(
                    others, direction, row, begin + j, head, p, valid_j, headdim, o_d, o_b, o_t, o_h, o_p, OPERAND,
                    False,
                )  # fmt: skip
                weights = tl.dot(row_tile, tl.trans(other_tile), weights, input_precision=PRECISION, out_dtype=MATH)
            column_tile = column_tiles[start_j // COLUMNS]
            scores = tl.dot(own_tile, tl.trans(column_tile), input_precision=PRECISION, out_dtype=MATH)
            if OF_B:
                u_j = load_u(v_of + at * Q, q_j, reverse, Q, SHIFTED)
                seen = in_sight(q_j[None, :], q[:, None], reverse, strict)
                weights *= tl.exp2(tl.where(seen, u_j[None, :] - v[:, None], float("-inf")))
            else:
                seen = in_sight(q[:, None], q_j[None, :], reverse, strict)
                if w_of is not None:
                    w_j = tl.load(w_of + at * Q + q_j)
                    weights *= tl.exp2(tl.where(seen, u[:, None] - w_j[None, :], float("-inf")))
                else:
                    v_j = tl.load(v_of + at * Q + q_j)
                    step_j = tl.load(step_of + at * Q + q_j)
                    weights *= tl.exp2(tl.where(seen, u[:, None] - v_j[None, :], float("-inf"))) * step_j[None, :]
            moved += tl.sum(weights * scores, 1)
            result = tl.dot(weights.to(OPERAND), column_tile, result, input_precision=PRECISION, out_dtype=MATH)
        if OF_B:
            result *= decayed_step(v, v_of, step_of, w_of, at * Q + q)[:, None]
        total_sum += result
        tl.store(moved_of + of_part * Q + q, moved)

    if SHIFTED and not OF_B:
        # Row i is for the frame source, one step before. The first step's result has no C, and no result takes the C of
        # the last step.
        before = tl.where(reverse, line_size, -line_size)
        tl.store(of_chunk + before + offset, total_sum.to(out.dtype.element_ty), mask=there[:, None] & columns_there)
        zeros = tl.zeros([Q, BLOCK_N], out.dtype.element_ty)
        tl.store(of_chunk + offset, zeros, mask=(stored & (i >= length))[:, None] & columns_there)
        last_frame = tl.where(reverse, 0, length - 1)
        written = tl.where(chunk == tl.where(reverse, (length - 1) // Q, 0), dstate, 0)  # once, by the first step's
        tl.store(out + last_frame * line_size + n, tl.zeros([BLOCK_N], out.dtype.element_ty), mask=n < written)
    else:
        total_sum = tl.where(valid[:, None], total_sum, 0).to(out.dtype.element_ty)
        tl.store(of_chunk + offset, total_sum, mask=stored[:, None] & columns_there)


@triton.jit
def chunk_gradients(
    dy, x, B, C, states, other_states, leaving, v_of, step_of, w_of, total_of, dB, dC, moved_of, given_of, carried_of,
    bounds, frames, sequences, slots, heads,
    dy_d, dy_b, dy_t, dy_h, dy_p, x_d, x_b, x_t, x_h, x_p, B_d, B_b, B_t, B_g, B_n, C_d, C_b, C_t, C_g, C_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, ONCE: tl.constexpr, SHIFTED: tl.constexpr, KIND: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C, for one direction of a chunk, and the sums that `step_gradients` makes those of dt, A and
    dt_bias of.

    A program takes BLOCK_N columns of B or BLOCK_N columns of C, and HEADS heads of a group: the registers do not hold
    B's and C's at once. With T = dstate / BLOCK_N tiles of columns it writes

    - dB, dC (heads of a group / HEADS, directions, batch, L, groups, dstate): the gradients, or parts to be summed.
    - moved_of (2 T, directions, heads, slots, Q): for each frame, over the columns of a tile, B . dB without its factor
      dt from the programs of B, then C . dC from those of C.
    - given_of (T, directions, heads, slots, Q): of B . dB the part that comes through the state that leaves the chunk.
    - carried_of (T, directions, heads, slots, headdim): the sum over the columns of a tile of the state that enters the
      chunk times the gradient of the one that leaves it.
    """
    slot = (tl.program_id(0) // DIRECTIONS).to(tl.int64)
    direction = (tl.program_id(0) % DIRECTIONS).to(tl.int64)
    n_tiles: tl.constexpr = (dstate + BLOCK_N - 1) // BLOCK_N
    part = (tl.program_id(1) % (2 * n_tiles)).to(tl.int64)
    tile = part % n_tiles
    group = (tl.program_id(1) // (2 * n_tiles) % (heads // group_heads)).to(tl.int64)
    head_block = (tl.program_id(1) // (2 * n_tiles) // (heads // group_heads)).to(tl.int64)
    states = states_of(direction, states, other_states, slots, heads, headdim, dstate)
    if part < n_tiles:
        _gradients_of(
            x, dy, C, B, states, leaving, v_of, step_of, w_of, total_of, dB, moved_of, given_of, carried_of, bounds,
            slot, direction, tile, group, head_block, part, frames, sequences, slots, heads,
            x_d, x_b, x_t, x_h, x_p, dy_d, dy_b, dy_t, dy_h, dy_p, C_d, C_b, C_t, C_g, C_n,
            B_d, B_b, B_t, B_g, B_n, group_heads, headdim, dstate, True,
            DIRECTIONS, FLIP, ONCE, SHIFTED, KIND, Q, HEADS, BLOCK_P, BLOCK_N, STAGES, MATH, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        _gradients_of(
            dy, x, B, C, states, leaving, v_of, step_of, w_of, total_of, dC, moved_of, given_of, carried_of, bounds,
            slot, direction, tile, group, head_block, part, frames, sequences, slots, heads,
            dy_d, dy_b, dy_t, dy_h, dy_p, x_d, x_b, x_t, x_h, x_p, B_d, B_b, B_t, B_g, B_n,
            C_d, C_b, C_t, C_g, C_n, group_heads, headdim, dstate, False,
            DIRECTIONS, FLIP, ONCE, SHIFTED, KIND, Q, HEADS, BLOCK_P, BLOCK_N, STAGES, MATH, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def _sum_of_tiles(parts, TILES: tl.constexpr, offset, tile_size, kept):
    total = tl.zeros(offset.shape, tl.float64)
    for _ in range(TILES):
        total += tl.load(parts + offset, mask=kept, other=0).to(tl.float64)
        parts += tile_size
    return total


@triton.jit
def step_gradients(
    dt, A, dt_bias, total_of, moved_of, given_of, carried_of, skipped_of, ddt, per_head, bounds,
    frames, sequences, slots, heads, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h,
    headdim: tl.constexpr, TILES: tl.constexpr, P_TILES: tl.constexpr, WAYS: tl.constexpr, DIRECTIONS: tl.constexpr,
    FLIP: tl.constexpr, SHIFTED: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """The gradient of dt, and chunk by chunk those of A, dt_bias and D, for HEADS heads of one direction of a chunk.

    Of moved_of, given_of and carried_of, see `chunk_gradients`, there are 2 TILES, TILES and TILES parts; of
    skipped_of, for WAYS directions, P_TILES, see `chunk_outputs`. ddt (directions, batch, L, heads) may be a part of a
    sum, as per_head (3: A, dt_bias, D; directions, heads, slots) is.

    Sums are in float64: the order that they are taken in, which follows from how Triton lays blocks out over threads,
    is then no matter.
    """
    slot = (tl.program_id(0) // DIRECTIONS).to(tl.int64)
    direction = (tl.program_id(0) % DIRECTIONS).to(tl.int64)
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    reverse = is_reversed(direction, FLIP)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, Q)
    i = (chunk * Q).to(tl.int32) + q
    there = head < heads
    valid = (i < length)[None, :] & there[:, None]
    batch = 1 if KIND == "cu_seqlens" else sequences
    stored = valid if KIND == "cu_seqlens" else (i < frames)[None, :] & there[:, None]
    # Of a batch (batch, L, heads): contiguous.
    ddt += ((direction * batch + row) * frames + begin + chunk * Q) * heads
    ddt_offset = q[None, :] * heads + head[:, None]
    at = (direction * heads + head) * slots + slot
    tile_size = tl.full([], DIRECTIONS, tl.int64) * heads * slots
    if chunk * Q >= length:
        tl.store(ddt + ddt_offset, tl.zeros([HEADS, Q], ddt.dtype.element_ty), mask=stored)
        for _ in tl.static_range(3):
            tl.store(per_head + at, tl.zeros([HEADS], MATH), mask=there)
            per_head += tile_size
        return

    rate = tl.load(A + direction * A_d + head * A_h, mask=there, other=0).to(tl.float64)
    total = tl.load(total_of + at, mask=there, other=0)
    of_chunk = at[:, None] * Q + q[None, :]
    at_most = tl.minimum(head, heads - 1)[:, None]
    raw, free, step = load_step(
        dt, dt_bias, direction, row, begin + i[None, :], at_most, valid, dt_d, dt_b, dt_t, dt_h, bias_d, bias_h,
        SOFTPLUS, LOW, HIGH, MATH,
    )  # fmt: skip
    unclamped = free == step
    step = step.to(tl.float64)
    from_frames = _sum_of_tiles(moved_of, TILES, of_chunk, tile_size * Q, valid)
    into_results = _sum_of_tiles(moved_of + TILES * tile_size * Q, TILES, of_chunk, tile_size * Q, valid)
    given = _sum_of_tiles(given_of, TILES, of_chunk, tile_size * Q, valid)
    p = tl.arange(0, BLOCK_P)
    kept = (p < headdim)[None, :] & there[:, None]
    carried = _sum_of_tiles(carried_of, TILES, at[:, None] * headdim + p[None, :], tile_size * headdim, kept)

    # The log decay a_k = dt_k A is part of u and v of every later frame, and of the chunk's total, which is a factor of
    # the state that enters the chunk and of what each frame gives to the one that leaves it.
    total_gradient = tl.exp2(total) * tl.sum(carried, 1) + tl.sum(step * given, 1)
    change = into_results - step * from_frames
    prefix = tl.cumsum(change, 1)
    total_gradient += tl.where(reverse, 0, 1) * tl.sum(change, 1)
    log_decay = tl.where(reverse, prefix, change - prefix) + total_gradient[:, None]
    if SHIFTED:
        log_decay -= into_results
    gradient = rate[:, None] * log_decay + from_frames
    gradient = tl.where(unclamped, gradient, 0)
    if SOFTPLUS:
        gradient *= sigmoid(raw)
    gradient = tl.where(valid, gradient, 0)
    tl.store(ddt + ddt_offset, gradient.to(MATH).to(ddt.dtype.element_ty), mask=stored)
    tl.store(per_head + at, tl.sum(tl.where(valid, step * log_decay, 0), 1), mask=there)
    tl.store(per_head + tile_size + at, tl.sum(gradient, 1), mask=there)
    if skipped_of is not None:  # noqa: SIM102
        if direction < WAYS:
            way_size = tl.full([], WAYS, tl.int64) * heads * slots * Q
            skipped = _sum_of_tiles(skipped_of, P_TILES, of_chunk, way_size, valid)
            tl.store(per_head + 2 * tile_size + at, tl.sum(skipped, 1), mask=there)


@triton.jit
def _sum_terms(parts, out, terms, size, program, BLOCK: tl.constexpr):
    """out[i] = the sum of parts[term, i] over terms, in order."""
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = offset < size
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for _ in range(terms):
        total += tl.load(parts + offset, mask=kept, other=0)
        parts += size
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _sum_slots(parts, out, terms, size, slots, program, BLOCK: tl.constexpr):
    """out[program] = the sum of parts[term, program % size, slot] over terms and slots."""
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for term in range(terms):
        own = parts + (term * size + program % size).to(tl.int64) * slots
        for start in range(0, slots, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            total += tl.load(own + offset, mask=offset < slots, other=0)
    tl.store(out + program, tl.sum(total, 0).to(out.dtype.element_ty))


@triton.jit
def sum_parts(
    dB_parts, dC_parts, ddt_parts, per_head, dB, dC, ddt, dA, ddt_bias, dD,
    B_terms, B_size, C_terms, C_size, dt_terms, dt_size, A_terms, A_size, bias_terms, bias_size, D_terms, D_size,
    heads, slots, directions, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the parts of gradients over heads, directions, chunks and sequences, in a fixed order."""
    program = tl.program_id(0)
    B_programs = (B_size + BLOCK - 1) // BLOCK
    C_programs = (C_size + BLOCK - 1) // BLOCK
    dt_programs = (dt_size + BLOCK - 1) // BLOCK
    C_first = B_programs
    dt_first = C_first + C_programs
    A_first = dt_first + dt_programs
    bias_first = A_first + A_size
    D_first = bias_first + bias_size
    kind = tl.full([], 1, tl.int64) * directions * heads * slots
    if program < C_first:
        _sum_terms(dB_parts, dB, B_terms, B_size, program, BLOCK)
    elif program < dt_first:
        _sum_terms(dC_parts, dC, C_terms, C_size, program - C_first, BLOCK)
    elif program < A_first:
        _sum_terms(ddt_parts, ddt, dt_terms, dt_size, program - dt_first, BLOCK)
    elif program < bias_first:
        _sum_slots(per_head, dA, A_terms, A_size, slots, program - A_first, BLOCK)
    elif program < D_first:
        _sum_slots(per_head + kind, ddt_bias, bias_terms, bias_size, slots, program - bias_first, BLOCK)
    else:
        _sum_slots(per_head + 2 * kind, dD, D_terms, D_size, slots, program - D_first, BLOCK)
