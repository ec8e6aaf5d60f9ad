"""Triton kernels of the chunk-parallel scan, forward and backward: a program has one chunk, states stand in memory.

The arithmetic is that of triton_chunk.py.
"""

import triton
import triton.language as tl

from linconv.ops.ssd.triton_chunk import (
    added_by,
    decays_of,
    exclusive_of,
    first_slot,
    frames_of,
    in_sight,
    is_reversed,
    is_strict,
    load_state,
    load_step,
    load_tile,
    scores_in_sight,
    sequence_of,
    source_of,
    weights_of,
    widened,
)

HEAD_STAGES = tl.constexpr(1)  # loads of the next head ahead of time would take registers that there are not


@triton.jit
def chunk_states(
    x, dt, A, dt_bias, B, dy, C, states, v_of, step_of, total_of, dD, bounds,
    frames, sequences, slots, heads,
    x_d, x_b, x_t, x_h, x_p, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h, B_d, B_b, B_t, B_g, B_n,
    dy_d, dy_b, dy_t, dy_h, dy_p, C_d, C_b, C_t, C_g, C_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, SHIFTED: tl.constexpr, SOFTPLUS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, D_DIRECTIONS: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state that leaves it and, with GRADIENT, to the gradient of the state that enters it.

    states (1 or 2 with GRADIENT, directions, heads, slots, headdim, dstate); v_of, step_of (directions, heads, slots,
    Q) and total_of (directions, heads, slots) keep v, dt and the chunk's total for the kernels that follow. dD, which
    may be None (tiles of headdim, D_DIRECTIONS, heads, slots): the gradient of D by chunk.
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
    if dD is not None:
        dD += ((p_tile * D_DIRECTIONS + direction) * heads + head) * slots + slot
        writes_dD = (n_tile == 0) & (direction < D_DIRECTIONS)
    if chunk * Q >= length:
        if dD is not None:
            tl.store(dD, tl.zeros([], MATH), mask=writes_dD)
        return
    reverse = is_reversed(direction, FLIP)
    position = tl.arange(0, Q)
    frame = chunk * Q + position
    valid = frame < length
    rate, step, v, total = decays_of(
        dt, dt_bias, A, direction, row, begin + frame, head, valid, reverse, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d,
        bias_h, SOFTPLUS, LOW, HIGH, MATH,
    )  # fmt: skip
    if tile == 0:
        tl.store(v_of + at * Q + position, v)
        tl.store(step_of + at * Q + position, step)
        tl.store(total_of + at, total)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = states + at * (headdim * dstate) + p[:, None] * dstate + n[None, :]
    kept = (p < headdim)[:, None] & (n < dstate)[None, :]

    nothing = tl.zeros([BLOCK_P, BLOCK_N], MATH)
    rows = load_tile(x, direction, row, begin + frame, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, MATH, True)
    factor = load_tile(
        B, direction, row, begin + frame, head // group_heads, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False
    )  # fmt: skip
    added = added_by(rows, factor, tl.exp2(total - v) * step, nothing, MATH, OPERAND, PRECISION)
    tl.store(out, added.to(OPERAND), mask=kept)
    if GRADIENT:
        source, there = source_of(frame, valid, length, reverse, SHIFTED)
        u = exclusive_of(v, step, rate) if SHIFTED else v
        dy_rows = load_tile(
            dy, direction, row, begin + frame, head, p, valid, headdim, dy_d, dy_b, dy_t, dy_h, dy_p, MATH, True
        )  # fmt: skip
        if dD is not None:
            tl.store(dD, tl.sum(tl.sum(dy_rows * rows, 0), 0), mask=writes_dD)
        factor = load_tile(
            C, direction, row, begin + source, head // group_heads, n, there, dstate, C_d, C_b, C_t, C_g, C_n, OPERAND,
            False,
        )  # fmt: skip
        added = added_by(dy_rows, factor, tl.where(valid, tl.exp2(u), 0), nothing, MATH, OPERAND, PRECISION)
        out += tl.full([], DIRECTIONS, tl.int64) * heads * slots * headdim * dstate
        tl.store(out, added.to(OPERAND), mask=kept)


@triton.jit
def pass_states(
    states, total_of, first, last, dlast, dfirst, bounds, frames, slots, heads,
    first_s, first_h, first_p, first_n, dlast_s, dlast_h, dlast_p, dlast_n,
    headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    MATH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to the state that enters it, in place; gradients run against a direction's own order.

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
    own = states + (gradient * DIRECTIONS * heads * slots + slot) * size + element
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
    rows, columns, direction, row, begin, i, j, valid_i, valid_j, group,
    r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n,
    dstate: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows_i . columns_j over dstate."""
    scores = tl.zeros([i.shape[0], j.shape[0]], MATH)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        left = load_tile(
            rows, direction, row, begin + i, group, n, valid_i, dstate, r_d, r_b, r_t, r_g, r_n, OPERAND, False
        )
        right = load_tile(
            columns, direction, row, begin + j, group, n, valid_j, dstate, c_d, c_b, c_t, c_g, c_n, OPERAND, True
        )
        scores = tl.dot(left, right, scores, input_precision=PRECISION, out_dtype=MATH)
    return scores


@triton.jit
def _direction_weights(
    scores, A, v_of, step_of, total_of, direction, head, slot, slots, heads, valid_i, q, A_d, A_h,
    SHIFTED: tl.constexpr, GRADIENT: tl.constexpr, Q: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """One direction's weights (rows, Q) of a chunk, and the factors of what its rows take from the state."""
    at = (direction * heads + head) * slots + slot
    v_i = tl.load(v_of + at * Q + q)
    step_i = tl.load(step_of + at * Q + q)
    j = tl.arange(0, Q)
    v_j = tl.load(v_of + at * Q + j)
    step_j = tl.load(step_of + at * Q + j)
    rate = tl.load(A + direction * A_d + head * A_h).to(MATH)
    total = tl.load(total_of + at)
    return weights_of(scores, v_i, step_i, v_j, step_j, total, rate, valid_i, SHIFTED, GRADIENT)


@triton.jit
def _from_state(
    rows, states, entered, direction, head, slot, slots, heads, row, begin, length, i, group, p,
    r_d, r_b, r_t, r_g, r_n, headdim: tl.constexpr, dstate: tl.constexpr,
    FLIP: tl.constexpr, SHIFTED_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's rows take from one direction's state (rows, headdim)."""
    at = (direction * heads + head) * slots + slot
    source, there = source_of(i, i < length, length, is_reversed(direction, FLIP), SHIFTED_ROWS)
    product = tl.zeros([i.shape[0], p.shape[0]], MATH)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        left = load_tile(
            rows, direction, row, begin + source, group, n, there, dstate, r_d, r_b, r_t, r_g, r_n, OPERAND, False
        )
        state = load_state(states, at, p, n, headdim, dstate, True)
        product = tl.dot(left, state, product, input_precision=PRECISION, out_dtype=MATH)
    return product * entered[:, None]


@triton.jit
def chunk_outputs(
    z, rows, columns, A, D, states, v_of, step_of, total_of, out, bounds,
    frames, sequences, slots, heads,
    z_d, z_b, z_t, z_h, z_p, r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n, A_d, A_h, D_d, D_h,
    out_d, out_b, out_t, out_h,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, SUMMED: tl.constexpr, SUM_D: tl.constexpr, FLIP: tl.constexpr, ONCE: tl.constexpr,
    SHIFTED: tl.constexpr, GRADIENT: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y from x, with rows = C and columns = B; with GRADIENT dx from dy, with rows = B and columns = C.

    SUMMED: both directions' weights are added up and multiply z as one product. A program takes ROWS frames of a chunk,
    BLOCK_P columns of headdim and HEADS heads of a group, which share the products of rows and columns.
    """
    BLOCKS: tl.constexpr = Q // ROWS
    slot = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    p_tiles = (headdim + BLOCK_P - 1) // BLOCK_P
    head_blocks = heads // HEADS
    p = (tl.program_id(1) % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    first_head = (tl.program_id(1) // p_tiles % head_blocks).to(tl.int64) * HEADS
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
    j = (chunk * Q).to(tl.int32) + tl.arange(0, Q)
    valid_i = i < length
    valid_j = j < length
    stored = valid_i if KIND == "cu_seqlens" else i < frames
    kept = stored[:, None] & (p < headdim)[None, :]
    out += direction * out_d + row * out_b
    out_offset = (begin + i).to(tl.int64)[:, None] * out_t + p[None, :]
    if chunk * Q + block * ROWS >= length:
        for h in tl.range(0, HEADS, num_stages=HEAD_STAGES, disable_licm=True):
            zeros = tl.zeros([ROWS, BLOCK_P], out.dtype.element_ty)
            tl.store(out + (first_head + h) * out_h + out_offset, zeros, mask=kept)
        return

    SHIFTED_ROWS: tl.constexpr = SHIFTED and not GRADIENT
    SHIFTED_COLUMNS: tl.constexpr = SHIFTED and GRADIENT
    reverse = is_reversed(direction, FLIP)
    source_i, there_i = source_of(i, valid_i, length, reverse, SHIFTED_ROWS)
    source_j, there_j = source_of(j, valid_j, length, reverse, SHIFTED_COLUMNS)
    scores = _scores(
        rows, columns, direction, row, begin, source_i, source_j, there_i, there_j, group,
        r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n, dstate, BLOCK_N, MATH, OPERAND, PRECISION,
    )  # fmt: skip
    scores = scores_in_sight(scores, q, tl.arange(0, Q), reverse, is_strict(direction, ONCE, SHIFTED), GRADIENT)
    if SUMMED:
        source_i, there_i = source_of(i, valid_i, length, True, SHIFTED_ROWS)
        source_j, there_j = source_of(j, valid_j, length, True, SHIFTED_COLUMNS)
        other_scores = _scores(
            rows, columns, direction + 1, row, begin, source_i, source_j, there_i, there_j, group,
            r_d, r_b, r_t, r_g, r_n, c_d, c_b, c_t, c_g, c_n, dstate, BLOCK_N, MATH, OPERAND, PRECISION,
        )  # fmt: skip
        strict = is_strict(direction + 1, ONCE, SHIFTED)
        other_scores = scores_in_sight(other_scores, q, tl.arange(0, Q), True, strict, GRADIENT)
    for h in tl.range(0, HEADS, num_stages=HEAD_STAGES, disable_licm=True):
        head = first_head + h
        weights, entered = _direction_weights(
            scores, A, v_of, step_of, total_of, direction, head, slot, slots, heads, valid_i, q, A_d, A_h,
            SHIFTED, GRADIENT, Q, MATH,
        )  # fmt: skip
        if SUMMED:
            other_weights, other_entered = _direction_weights(
                other_scores, A, v_of, step_of, total_of, direction + 1, head, slot, slots, heads, valid_i, q, A_d, A_h,
                SHIFTED, GRADIENT, Q, MATH,
            )  # fmt: skip
            weights += other_weights
        values = load_tile(
            z, direction, row, begin + j, head, p, valid_j, headdim, z_d, z_b, z_t, z_h, z_p, OPERAND, False
        )
        # Weights are done with before the states are looked at: both at once are more than there are registers.
        result = tl.dot(weights.to(OPERAND), values, input_precision=PRECISION, out_dtype=MATH)
        result += _from_state(
            rows, states, entered, direction, head, slot, slots, heads, row, begin, length, i, group, p,
            r_d, r_b, r_t, r_g, r_n, headdim, dstate, FLIP, SHIFTED_ROWS, BLOCK_N, MATH, OPERAND, PRECISION,
        )  # fmt: skip
        if SUMMED:
            result += _from_state(
                rows, states, other_entered, direction + 1, head, slot, slots, heads, row, begin, length, i, group, p,
                r_d, r_b, r_t, r_g, r_n, headdim, dstate, FLIP, SHIFTED_ROWS, BLOCK_N, MATH, OPERAND, PRECISION,
            )  # fmt: skip
        if D is not None:
            skip = tl.load(D + direction * D_d + head * D_h).to(MATH)
            if SUM_D:
                skip += tl.load(D + D_d + head * D_h).to(MATH)
            result += skip * load_tile(
                z, direction, row, begin + i, head, p, valid_i, headdim, z_d, z_b, z_t, z_h, z_p, MATH, False
            )
        result = tl.where(valid_i[:, None], result, 0)
        tl.store(out + head * out_h + out_offset, result.to(out.dtype.element_ty), mask=kept)


@triton.jit
def chunk_gradients(
    dy, x, dt, A, dt_bias, B, C, states, v_of, step_of, total_of, dB, dC, ddt, per_head, bounds,
    frames, sequences, slots, heads,
    dy_d, dy_b, dy_t, dy_h, dy_p, x_d, x_b, x_t, x_h, x_p, dt_d, dt_b, dt_t, dt_h, A_d, A_h, bias_d, bias_h,
    B_d, B_b, B_t, B_g, B_n, C_d, C_b, C_t, C_g, C_n,
    group_heads: tl.constexpr, headdim: tl.constexpr, dstate: tl.constexpr,
    DIRECTIONS: tl.constexpr, FLIP: tl.constexpr, ONCE: tl.constexpr, SHIFTED: tl.constexpr, SOFTPLUS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B, C, dt and, chunk by chunk, of what heads have one of, for one direction of a chunk.

    dB, dC (heads / HEADS of a group, directions, batch, L, groups, dstate) are parts of sums, as are ddt (dstate /
    BLOCK_N, directions, batch, L, heads) and per_head (2: A, dt_bias; dstate / BLOCK_N, directions, heads, slots).
    A program takes BLOCK_N columns of dstate and what these give through the states; what has no such columns counts in
    the first one.
    """
    slot = (tl.program_id(0) // DIRECTIONS).to(tl.int64)
    direction = (tl.program_id(0) % DIRECTIONS).to(tl.int64)
    groups = heads // group_heads
    n_tiles: tl.constexpr = (dstate + BLOCK_N - 1) // BLOCK_N
    tile = (tl.program_id(1) % n_tiles).to(tl.int64)
    group = (tl.program_id(1) // n_tiles % groups).to(tl.int64)
    head_block = (tl.program_id(1) // n_tiles // groups).to(tl.int64)
    sequence = sequence_of(slot, bounds, frames, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunk = slot - first_slot(sequence, bounds, frames, Q, KIND)
    reverse = is_reversed(direction, FLIP)
    strict = is_strict(direction, ONCE, SHIFTED)
    i = (chunk * Q).to(tl.int32) + tl.arange(0, Q)
    n = tile.to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < length
    if KIND == "cu_seqlens":
        batch = 1
        stored = valid
    else:
        batch = sequences
        stored = i < frames
    # The tensors of a batch, as (batch, L, heads or groups): contiguous.
    line = row * frames + begin
    dt_line = (tile * DIRECTIONS + direction) * batch * frames + line
    part_line = (head_block * DIRECTIONS + direction) * batch * frames + line
    ddt_offset = (dt_line + i) * heads
    sums = per_head + (tile * DIRECTIONS + direction) * heads * slots + slot
    sums_size = tl.full([], n_tiles * DIRECTIONS, tl.int64) * heads * slots
    first_head = group * group_heads + head_block * HEADS
    if chunk * Q >= length:
        dB_offset = ((part_line + i) * groups + group)[:, None] * dstate + n[None, :]
        kept = stored[:, None] & (n < dstate)[None, :]
        zeros = tl.zeros([Q, BLOCK_N], MATH)
        tl.store(dB + dB_offset, zeros, mask=kept)
        tl.store(dC + dB_offset, zeros, mask=kept)
        for h in tl.range(0, HEADS, num_stages=HEAD_STAGES, disable_licm=True):
            tl.store(ddt + ddt_offset + first_head + h, tl.zeros([Q], MATH), mask=stored)
            tl.store(sums + (first_head + h) * slots + tl.arange(0, 2) * sums_size, tl.zeros([2], MATH))
        return

    source, there = source_of(i, valid, length, reverse, SHIFTED)
    B_tile = load_tile(B, direction, row, begin + i, group, n, valid, dstate, B_d, B_b, B_t, B_g, B_n, OPERAND, False)
    C_tile = load_tile(
        C, direction, row, begin + source, group, n, there, dstate, C_d, C_b, C_t, C_g, C_n, OPERAND, False
    )
    FLAT: tl.constexpr = 1024 if tl.bfloat16 == OPERAND else 512
    scores = _scores(
        C, B, direction, row, begin, source, i, there, valid, group, C_d, C_b, C_t, C_g, C_n, B_d, B_b, B_t, B_g, B_n,
        dstate, BLOCK_N, MATH, OPERAND, PRECISION,
    ).to(OPERAND)  # fmt: skip
    first_tile = tile == 0
    dscores = tl.zeros([Q, Q], MATH)
    dB_sum = tl.zeros([Q, BLOCK_N], MATH)
    dC_sum = tl.zeros([Q, BLOCK_N], MATH)
    q = tl.arange(0, Q)
    for h in tl.range(0, HEADS, num_stages=HEAD_STAGES, disable_licm=True):
        head = first_head + h
        at = (direction * heads + head) * slots + slot
        v = tl.load(v_of + at * Q + tl.arange(0, Q))
        step = tl.load(step_of + at * Q + tl.arange(0, Q))
        total = tl.load(total_of + at)
        rate = tl.load(A + direction * A_d + head * A_h).to(MATH)
        u = exclusive_of(v, step, rate) if SHIFTED else v
        gradient_at = at + tl.full([], DIRECTIONS, tl.int64) * heads * slots

        # One product after the other, though dy and x are loaded twice: all at once are more than there are registers.
        # From the state that enters: dy . (C S) is C . (dy S), which C's gradient takes anyhow.
        dC_head = tl.zeros([Q, BLOCK_N], MATH)
        for start in range(0, headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            dy_tile = load_tile(
                dy, direction, row, begin + i, head, p, valid, headdim, dy_d, dy_b, dy_t, dy_h, dy_p, OPERAND, False
            )  # fmt: skip
            state = load_state(states, at, p, n, headdim, dstate, False)
            dC_head = tl.dot(dy_tile, state, dC_head, input_precision=PRECISION, out_dtype=MATH)
        dC_head *= tl.where(valid, tl.exp2(u), 0)[:, None]
        gained = tl.sum(widened(C_tile, h, MATH) * dC_head, 1)
        dC_sum += dC_head
        # To the state that leaves, likewise.
        dB_head = tl.zeros([Q, BLOCK_N], MATH)
        for start in range(0, headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            x_tile = load_tile(
                x, direction, row, begin + i, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, OPERAND, False
            )
            dstate_tile = load_state(states, gradient_at, p, n, headdim, dstate, False)
            dB_head = tl.dot(x_tile, dstate_tile, dB_head, input_precision=PRECISION, out_dtype=MATH)
        dB_head *= tl.exp2(total - v)[:, None]
        left = tl.sum(widened(B_tile, h, MATH) * dB_head, 1)
        dB_sum += dB_head * step[:, None]
        # Of the state before and the gradient of the one after, flat: they need not stand in registers as tiles.
        carried = tl.zeros([FLAT], MATH)
        for start in range(0, tl.where(first_tile, headdim * dstate, 0), FLAT):
            element = start + tl.arange(0, FLAT)
            kept = element < headdim * dstate
            state = tl.load(states + at * (headdim * dstate) + element, mask=kept, other=0)
            other = tl.load(states + gradient_at * (headdim * dstate) + element, mask=kept, other=0)
            carried += state.to(MATH) * other.to(MATH)
        through_state = tl.exp2(total) * tl.sum(carried, 0)
        # Through the chunk's weights.
        dweights = tl.zeros([Q, Q], MATH)
        for start in range(0, headdim, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            dy_tile = load_tile(
                dy, direction, row, begin + i, head, p, valid, headdim, dy_d, dy_b, dy_t, dy_h, dy_p, OPERAND, False
            )  # fmt: skip
            x_tile = load_tile(
                x, direction, row, begin + i, head, p, valid, headdim, x_d, x_b, x_t, x_h, x_p, OPERAND, False
            )
            dweights = tl.dot(dy_tile, tl.trans(x_tile), dweights, input_precision=PRECISION, out_dtype=MATH)
        seen = in_sight(q[:, None], q[None, :], reverse, strict)
        flow = tl.exp2(tl.where(seen, u[:, None] - v[None, :], float("-inf"))) * dweights
        dscores += flow * step[None, :]
        through = tl.where(first_tile, flow * widened(scores, h, MATH), 0)
        gained += tl.sum(through * step[None, :], 1)
        gave = left + tl.sum(through, 0)

        # The gradient of the log decay a_k = dt_k A is that of every u and v it is part of, and of the total.
        change = gained - step * gave
        prefix = tl.cumsum(change, 0)
        total_gradient = through_state + tl.sum(step * left + tl.where(reverse, 0, change), 0)
        log_decay = tl.where(reverse, prefix, change - prefix) + total_gradient
        if SHIFTED:
            log_decay -= gained
        step_gradient = gave + rate * log_decay
        raw, free, clamped = load_step(
            dt, dt_bias, direction, row, begin + i, head, valid, dt_d, dt_b, dt_t, dt_h, bias_d, bias_h, SOFTPLUS, LOW,
            HIGH, MATH,
        )  # fmt: skip
        step_gradient = tl.where(free == clamped, step_gradient, 0)
        if SOFTPLUS:
            step_gradient *= 1 / (1 + tl.exp(-raw))
        step_gradient = tl.where(valid, step_gradient, 0)
        tl.store(ddt + ddt_offset + head, step_gradient, mask=stored)
        own = sums + head * slots
        tl.store(own, tl.sum(tl.where(valid, step * log_decay, 0), 0))
        tl.store(own + sums_size, tl.sum(step_gradient, 0))

    dscores = dscores.to(OPERAND)
    dC_sum = tl.dot(dscores, B_tile, dC_sum, input_precision=PRECISION, out_dtype=MATH)
    dB_sum = tl.dot(tl.trans(dscores), C_tile, dB_sum, input_precision=PRECISION, out_dtype=MATH)
    dB_offset = ((part_line + i) * groups + group)[:, None] * dstate + n[None, :]
    kept = stored[:, None] & (n < dstate)[None, :]
    tl.store(dB + dB_offset, tl.where(valid[:, None], dB_sum, 0), mask=kept)
    if SHIFTED:
        # The first step's result has no C. Its row zeroes that of the last frame, which no result takes.
        frame = tl.where(valid & (there == 0), tl.where(reverse, 0, length - 1), source)
        frame = tl.where(valid, frame, i)
        dB_offset = ((part_line + frame) * groups + group)[:, None] * dstate + n[None, :]
    tl.store(dC + dB_offset, tl.where(there[:, None], dC_sum, 0), mask=kept)


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
    """out[program] = the sum of parts[term, program, slot] over terms and slots."""
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for term in range(terms):
        own = parts + (term * size + program).to(tl.int64) * slots
        for start in range(0, slots, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            total += tl.load(own + offset, mask=offset < slots, other=0)
    tl.store(out + program, tl.sum(total, 0).to(out.dtype.element_ty))


@triton.jit
def sum_parts(
    dB_parts, dC_parts, ddt_parts, per_head, dD_parts, dB, dC, ddt, dA, ddt_bias, dD,
    B_terms, B_size, C_terms, C_size, dt_terms, dt_size, A_terms, A_size, bias_terms, bias_size, D_terms, D_size,
    heads, slots, kinds, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of gradients that heads, directions, chunks or sequences share, in a fixed order."""
    program = tl.program_id(0)
    B_programs = (B_size + BLOCK - 1) // BLOCK
    C_programs = (C_size + BLOCK - 1) // BLOCK
    dt_programs = (dt_size + BLOCK - 1) // BLOCK
    C_first = B_programs
    dt_first = C_first + C_programs
    A_first = dt_first + dt_programs
    bias_first = A_first + A_size
    D_first = bias_first + bias_size
    kind = tl.full([], 1, tl.int64) * kinds * heads * slots
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
    elif dD_parts is not None:
        _sum_slots(dD_parts, dD, D_terms, D_size, slots, program - D_first, BLOCK)
