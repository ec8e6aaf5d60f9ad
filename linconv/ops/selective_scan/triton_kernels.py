"""Triton kernels of the selective scan: a program has one chunk of a sequence and a block of a group's channels.

A chunk goes by in tiles of its steps. What a tile's steps keep of the state and what they add to it are blocks (steps,
dstate, channels), and an associative scan over the steps gives every state at once. Triton lays such a block out with
neighbouring threads at neighbouring channels and all steps of an entry in one thread, so the scan is as many
multiply-adds as the recurrence has, in registers, and what goes through memory is what enters a chunk.

Steps are counted in a direction's own order, from each sequence's own first on, so what a sequence gives depends on
nothing it is batched with. A slot is where a chunk's intermediate results stand, as in ssd/triton_chunk.py. Steps that
a tile does not have are of no time and add nothing. Decays are powers of two, of rates times log2(e).

No product is fused with a sum but by tl.fma. Left to a compiler, which ones are may change with what else there is in a
build, such as lengths or states that enter, and with it the last bits of what a sequence gives.
"""

import triton
import triton.language as tl

from linconv.ops.ssd.triton_chunk import divides, first_slot, frames_of, sequence_of, softplus
from linconv.ops.triton_math import exact_exp2, pairwise_sum, sigmoid
from linconv.ops.triton_sums import column_sums

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634074), tl.constexpr(0.69314718055994530942)


# ---- Where a program is


@triton.jit
def _chunk_of(slot, bounds, frames, sequences, Q: tl.constexpr, KIND: tl.constexpr):
    """(sequence, its row, first frame and length, the chunk of it): each sequence has one chunk at least."""
    most = tl.maximum(frames, 1)
    sequence = sequence_of(slot, bounds, most, sequences, Q, KIND)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    return sequence, row, begin, length, slot - first_slot(sequence, bounds, most, Q, KIND)


@triton.jit
def _steps_of(chunk, length, Q: tl.constexpr):
    """How many of its Q steps a chunk has."""
    return tl.minimum(tl.maximum(length - chunk * Q, 0), Q).to(tl.int32)


@triton.jit
def _channels_of(group_channels: tl.constexpr, BC: tl.constexpr):
    """(group, block within it, first channel, channels counted from there) of a program."""
    blocks: tl.constexpr = (group_channels + BC - 1) // BC
    group = (tl.program_id(1) // blocks).to(tl.int64)
    block = (tl.program_id(1) % blocks).to(tl.int64)
    return group, block, group * group_channels + block * BC, tl.arange(0, BC)


@triton.jit
def _frame_of(step, begin, length, REVERSE: tl.constexpr):
    """Where a step stands in the tensors. Behind a sequence's last step is its padding, in either direction."""
    if REVERSE:
        return begin + tl.where(step < length, length - 1 - step, step)
    else:
        return begin + step


@triton.jit
def _within(column, there, columns, whole: tl.constexpr):
    """Which elements of (rows, columns) there are, `there` of the rows."""
    if whole:
        return there[:, None]
    else:
        return there[:, None] & (column < columns)[None, :]


# ---- Memory


@triton.jit
def _load_rows(pointer, frame, column, there, columns, whole: tl.constexpr, s_t, s_c, MATH: tl.constexpr):
    """(frames, columns) in MATH, zero where there are none."""
    offset = frame.to(tl.int64)[:, None] * s_t + column.to(tl.int64)[None, :] * s_c
    return tl.load(pointer + offset, mask=_within(column, there, columns, whole), other=0).to(MATH)


@triton.jit
def _store_rows(pointer, frame, column, there, columns, whole: tl.constexpr, s_t, values):
    offset = frame.to(tl.int64)[:, None] * s_t + column[None, :]
    tl.store(pointer + offset, values.to(pointer.dtype.element_ty), mask=_within(column, there, columns, whole))


@triton.jit
def _load_channels(pointer, c, channels, stride, MATH: tl.constexpr):
    return tl.load(pointer + c.to(tl.int64) * stride, mask=c < channels, other=0).to(MATH)


@triton.jit
def _state_offset(n, c, left, dstate: tl.constexpr, s_n, s_c):
    """(where the elements of a state (dstate, channels) stand, which of them there are)."""
    offset = n.to(tl.int64)[:, None] * s_n + c.to(tl.int64)[None, :] * s_c
    return offset, (n < dstate)[:, None] & (c < left)[None, :]


@triton.jit
def _load_state(pointer, n, c, left, dstate: tl.constexpr, s_n, s_c, MATH: tl.constexpr):
    """(1, dstate, channels), as all states are: so Triton lays them out as the tiles that they meet."""
    offset, there = _state_offset(n, c, left, dstate, s_n, s_c)
    return tl.load(pointer + offset, mask=there, other=0).to(MATH)[None, :, :]


@triton.jit
def _store_state(pointer, n, c, left, dstate: tl.constexpr, s_n, s_c, state):
    offset, there = _state_offset(n, c, left, dstate, s_n, s_c)
    tl.store(pointer + offset, tl.reshape(state, offset.shape), mask=there)


# ---- Steps


@triton.jit
def _then(kept, added, kept_next, added_next):
    """Steps that make kept h + added of a state h, and those that follow them, as one."""
    return kept * kept_next, tl.fma(kept_next, added, added_next)


@triton.jit
def _then_showing(kept, added, factor, term, kept_next, added_next, factor_next, term_next):
    """The same, of steps of which the last one shows factor h + term of the state before it."""
    return (
        kept * kept_next,
        tl.fma(kept_next, added, added_next),
        kept * factor_next,
        tl.fma(factor_next, added, term_next),
    )


@triton.jit
def _at(states, index, which):
    """The one of the states (index, dstate, channels) whose index is `which`, as (1, dstate, channels).

    By their bits: a sum of which with zeros costs nothing where the compiler knows the index.
    """
    BITS: tl.constexpr = tl.int64 if states.dtype == tl.float64 else tl.int32
    bits = tl.where((index == which)[:, None, None], states.to(BITS, bitcast=True), 0)
    return tl.sum(bits, 0, keep_dims=True).to(states.dtype, bitcast=True)


@triton.jit
def _decays(exponents, EXACT: tl.constexpr):
    """As exact as torch's where inputs are float32; those of 16 bits have larger errors than the GPU's own powers."""
    if EXACT:
        return exact_exp2(exponents)
    else:
        return tl.exp2(exponents)


@triton.jit
def _inputs(
    x, dt, bias, rate, frame, valid, c, left, WHOLE: tl.constexpr, x_t, x_c, dt_t, dt_c, SOFTPLUS: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """(x, dt + bias, dt (steps, channels), the decays (steps, dstate, channels))."""
    values = _load_rows(x, frame, c, valid, left, WHOLE, x_t, x_c, MATH)
    raw = _load_rows(dt, frame, c, valid, left, WHOLE, dt_t, dt_c, MATH) + bias[None, :]
    time = softplus(raw, MATH) if SOFTPLUS else raw
    time = tl.where(valid[:, None], time, 0)
    return values, raw, time, _decays(time[:, None, :] * rate, x.dtype.element_ty == tl.float32)


@triton.jit
def _states(decay, added, position, state, passed=1):
    """(what is left of `passed`, and the states) after each of a tile's steps."""
    first = (position == 0)[:, None, None]
    added = tl.where(first, tl.fma(decay, state, added), added)
    return tl.associative_scan((tl.where(first, decay * passed, decay), added), 0, _then)


@triton.jit
def _gradient_of_gate(
    dy, z, frame, valid, c, left, WHOLE: tl.constexpr, dy_t, dy_c, z_t, z_c, MATH: tl.constexpr
):  # fmt: skip
    """(gradient of y before the gate, what that of z is over y before the gate)."""
    upstream = _load_rows(dy, frame, c, valid, left, WHOLE, dy_t, dy_c, MATH)
    if z is None:
        return upstream, upstream
    else:
        gate = _load_rows(z, frame, c, valid, left, WHOLE, z_t, z_c, MATH)
        opened = sigmoid(gate)
        return upstream * gate * opened, upstream * tl.fma(gate * opened, 1 - opened, opened)


# ---- Chunk to chunk


@triton.jit
def advance(
    x, dt, A, B, dt_bias, dy, z, C, states, time_of, bounds, frames, sequences, slots,
    x_b, x_t, x_c, dt_b, dt_t, dt_c, A_c, A_n, B_b, B_t, B_g, B_n, bias_c, dy_b, dy_t, dy_c, z_b, z_t, z_c,
    C_b, C_t, C_g, C_n,
    channels: tl.constexpr, group_channels: tl.constexpr, dstate: tl.constexpr, GRADIENT: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, BC: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """What each chunk makes of a state of zero, and with GRADIENT of a gradient of zero behind it.

    states (1 or 2 with GRADIENT, slots, dstate, channels); time_of (slots, channels): how long the chunk takes.
    """
    WHOLE: tl.constexpr = divides(BC, group_channels)
    slot = tl.program_id(0).to(tl.int64)
    sequence, row, begin, length, chunk = _chunk_of(slot, bounds, frames, sequences, Q, KIND)
    count = _steps_of(chunk, length, Q)
    if count == 0:
        return
    group, block, first, c = _channels_of(group_channels, BC)
    left = group_channels - block * BC
    n = tl.arange(0, N)
    position = tl.arange(0, T)
    x += row * x_b + first * x_c
    dt += row * dt_b + first * dt_c
    B += row * B_b + group * B_g
    rate = _load_state(A + first * A_c, n, c, left, dstate, A_n, A_c, MATH) * LOG2_E
    bias = tl.zeros([BC], MATH)
    if dt_bias is not None:
        bias = _load_channels(dt_bias + first * bias_c, c, left, bias_c, MATH)
    if GRADIENT:
        dy += row * dy_b + first * dy_c
        C += row * C_b + group * C_g
        if z is not None:
            z += row * z_b + first * z_c
    state = tl.zeros([1, N, BC], MATH)
    gradient = tl.zeros([1, N, BC], MATH)
    passed = tl.full([1, N, BC], 1, MATH)  # of the state that enters the chunk, what is left
    total = tl.zeros([BC], MATH)
    for start in range(0, count, T):
        step = chunk * Q + start + position
        valid = step < length
        frame = _frame_of(step, begin, length, REVERSE)
        values, _, time, decay = _inputs(
            x, dt, bias, rate, frame, valid, c, left, WHOLE, x_t, x_c, dt_t, dt_c, SOFTPLUS, MATH
        )
        B_tile = _load_rows(B, frame, n, valid, dstate, divides(N, dstate), B_t, B_n, MATH)
        kept, after = _states(decay, (time * values)[:, None, :] * B_tile[:, :, None], position, state, passed)
        state = _at(after, position, T - 1)
        total += pairwise_sum(tl.trans(time))
        if GRADIENT:
            upstream, _ = _gradient_of_gate(dy, z, frame, valid, c, left, WHOLE, dy_t, dy_c, z_t, z_c, MATH)
            C_tile = _load_rows(C, frame, n, valid, dstate, divides(N, dstate), C_t, C_n, MATH)
            gradient += tl.sum(kept * (C_tile[:, :, None] * upstream[:, None, :]), 0, keep_dims=True)
            passed = _at(kept, position, T - 1)
    own = states + slot * channels * dstate + first
    _store_state(own, n, c, left, dstate, channels, 1, state)
    if GRADIENT:
        own += tl.full([], channels * dstate, tl.int64) * slots
        _store_state(own, n, c, left, dstate, channels, 1, gradient)
    tl.store(time_of + slot * channels + first + c, total, mask=c < left)


@triton.jit
def pass_states(
    states, time_of, A, initial, dlast, bounds, frames, slots, A_c, A_n, initial_s, initial_c, initial_n,
    dlast_s, dlast_c, dlast_n, channels: tl.constexpr, dstate: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr, MATH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """In the place of what each chunk makes of zero, what enters it: of gradients, from behind it.

    initial, dlast (sequences, channels, dstate): what enters the first chunk, or the last one; zero if None.
    """
    size: tl.constexpr = channels * dstate
    blocks: tl.constexpr = (size + BLOCK - 1) // BLOCK
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    kept = element < size
    gradient = tl.program_id(1).to(tl.int64)
    row, begin, length = frames_of(sequence, bounds, frames, KIND)
    chunks = ((length + Q - 1) // Q).to(tl.int32)
    slot = first_slot(sequence, bounds, tl.maximum(frames, 1), Q, KIND)
    c = (element % channels).to(tl.int64)
    n = (element // channels).to(tl.int64)
    rate = tl.load(A + c * A_c + n * A_n, mask=kept, other=0).to(MATH) * LOG2_E
    # By comparing elements: combined with a scalar's comparison, masks are integers in the interpreter of Triton 3.9.
    of_states = element < tl.where(gradient == 0, size, 0)
    of_gradients = element < tl.where(gradient == 0, 0, size)
    state = tl.zeros([BLOCK], MATH)
    if initial is not None:
        pointer = initial + sequence * initial_s + c * initial_c + n * initial_n
        state += tl.load(pointer, mask=of_states, other=0).to(MATH)
    if dlast is not None:
        pointer = dlast + sequence * dlast_s + c * dlast_c + n * dlast_n
        state += tl.load(pointer, mask=of_gradients, other=0).to(MATH)
    states += (gradient * slots + slot) * size + element
    time_of += slot * channels + c
    for i in tl.range(0, chunks, num_stages=STAGES):
        chunk = tl.where(gradient == 0, i, chunks - 1 - i).to(tl.int64)
        made = tl.load(states + chunk * size, mask=kept, other=0)
        time = tl.load(time_of + chunk * channels, mask=kept, other=0)
        tl.store(states + chunk * size, state, mask=kept)
        state = tl.fma(state, _decays(time * rate, tl.float32 == MATH), made)


@triton.jit
def _entering(
    states, given, slot, sequence, count, first, n, c, left, s_s, s_c, s_n, channels: tl.constexpr,
    dstate: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """What enters a chunk: what the pass left of `states`, or, of a sequence's only chunk, what is given, if it is."""
    state = tl.zeros([1, n.shape[0], c.shape[0]], MATH)
    if states is not None:
        # Nothing was passed to chunks without a step.
        there = tl.where(count > 0, left, 0)
        state = _load_state(states + slot * channels * dstate + first, n, c, there, dstate, channels, 1, MATH)
    if given is not None:
        if states is None:
            state = _load_state(given + sequence * s_s + first * s_c, n, c, left, dstate, s_n, s_c, MATH)
        else:
            there = tl.where(count > 0, 0, left)
            state += _load_state(given + sequence * s_s + first * s_c, n, c, there, dstate, s_n, s_c, MATH)
    return state


# ---- Forward


@triton.jit
def scan(
    x, dt, A, B, C, D, z, dt_bias, states, initial, y, last, bounds, frames, sequences,
    x_b, x_t, x_c, dt_b, dt_t, dt_c, A_c, A_n, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, D_c, z_b, z_t, z_c, bias_c,
    initial_s, initial_c, initial_n,
    channels: tl.constexpr, group_channels: tl.constexpr, dstate: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """y (batch, L, channels) and the last states (sequences, channels, dstate), from the states that enter chunks."""
    WHOLE: tl.constexpr = divides(BC, group_channels)
    slot = tl.program_id(0).to(tl.int64)
    sequence, row, begin, length, chunk = _chunk_of(slot, bounds, frames, sequences, Q, KIND)
    count = _steps_of(chunk, length, Q)
    group, block, first, c = _channels_of(group_channels, BC)
    left = group_channels - block * BC
    n = tl.arange(0, N)
    position = tl.arange(0, T)
    x += row * x_b + first * x_c
    dt += row * dt_b + first * dt_c
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    y += row * frames * channels + first
    rate = _load_state(A + first * A_c, n, c, left, dstate, A_n, A_c, MATH) * LOG2_E
    bias = tl.zeros([BC], MATH)
    if dt_bias is not None:
        bias = _load_channels(dt_bias + first * bias_c, c, left, bias_c, MATH)
    if D is not None:
        skip = _load_channels(D + first * D_c, c, left, D_c, MATH)
    if z is not None:
        z += row * z_b + first * z_c
    state = _entering(
        states, initial, slot, sequence, count, first, n, c, left, initial_s, initial_c, initial_n, channels, dstate,
        MATH,
    )  # fmt: skip
    for start in range(0, count, T):
        step = chunk * Q + start + position
        valid = step < length
        frame = _frame_of(step, begin, length, REVERSE)
        values, _, time, decay = _inputs(
            x, dt, bias, rate, frame, valid, c, left, WHOLE, x_t, x_c, dt_t, dt_c, SOFTPLUS, MATH
        )
        B_tile = _load_rows(B, frame, n, valid, dstate, divides(N, dstate), B_t, B_n, MATH)
        C_tile = _load_rows(C, frame, n, valid, dstate, divides(N, dstate), C_t, C_n, MATH)
        _, after = _states(decay, (time * values)[:, None, :] * B_tile[:, :, None], position, state)
        state = _at(after, position, T - 1)
        result = tl.sum(C_tile[:, :, None] * after, 1)
        if D is not None:
            result = tl.fma(skip[None, :], values, result)
        if z is not None:
            gate = _load_rows(z, frame, c, valid, left, WHOLE, z_t, z_c, MATH)
            result *= gate * sigmoid(gate)
        stored = step < frames if KIND == "seq_lens" else valid
        _store_rows(y, frame, c, stored, left, WHOLE, channels, tl.where(valid[:, None], result, 0))
    if KIND == "seq_lens":
        zeros = tl.zeros([T, BC], MATH)
        for start in range((count + T - 1) // T * T, _steps_of(chunk, frames, Q), T):
            step = chunk * Q + start + position
            _store_rows(y, step, c, step < frames, left, WHOLE, channels, zeros)
    if ((chunk + 1) * Q >= length) & ((chunk == 0) | (count > 0)):
        _store_state(last + (sequence * channels + first) * dstate, n, c, left, dstate, 1, dstate, state)


# ---- Backward


@triton.jit
def differentiate(
    dy, x, dt, A, B, C, D, z, dt_bias, states, initial, dlast, dx, ddt, dz, dA, dB, dC, dD, dbias, dinitial,
    bounds, frames, sequences, slots,
    dy_b, dy_t, dy_c, x_b, x_t, x_c, dt_b, dt_t, dt_c, A_c, A_n, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, D_c,
    z_b, z_t, z_c, bias_c, initial_s, initial_c, initial_n, dlast_s, dlast_c, dlast_n,
    channels: tl.constexpr, group_channels: tl.constexpr, dstate: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, N: tl.constexpr, BC: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Gradients of x, dt, z and the first states; parts of those of A, B, C, D and dt_bias.

    dA (slots, channels, dstate), dD and dbias (slots, channels); dB, dC (blocks of a group's channels, batch, L,
    groups, dstate). The states that enter a chunk's tiles come first; they stay in registers for the way back.
    """
    WHOLE: tl.constexpr = divides(BC, group_channels)
    TILES: tl.constexpr = Q // T
    slot = tl.program_id(0).to(tl.int64)
    sequence, row, begin, length, chunk = _chunk_of(slot, bounds, frames, sequences, Q, KIND)
    count = _steps_of(chunk, length, Q)
    tiles = (count + T - 1) // T
    group, block, first, c = _channels_of(group_channels, BC)
    left = group_channels - block * BC
    groups: tl.constexpr = channels // group_channels
    batch = 1 if KIND == "cu_seqlens" else sequences
    n = tl.arange(0, N)
    position = tl.arange(0, T)
    index = tl.arange(0, TILES)
    x += row * x_b + first * x_c
    dt += row * dt_b + first * dt_c
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    dy += row * dy_b + first * dy_c
    dx += row * frames * channels + first
    ddt += row * frames * channels + first
    part = ((block * batch + row) * frames * groups + group) * dstate
    dB += part
    dC += part
    rate = _load_state(A + first * A_c, n, c, left, dstate, A_n, A_c, MATH) * LOG2_E
    bias = tl.zeros([BC], MATH)
    if dt_bias is not None:
        bias = _load_channels(dt_bias + first * bias_c, c, left, bias_c, MATH)
    skip = tl.zeros([BC], MATH)
    if D is not None:
        skip = _load_channels(D + first * D_c, c, left, D_c, MATH)
    if z is not None:
        z += row * z_b + first * z_c
        dz += row * frames * channels + first
    if KIND == "seq_lens":
        zeros = tl.zeros([T, BC], MATH)
        of_group = tl.zeros([T, N], MATH)
        for start in range(tiles * T, _steps_of(chunk, frames, Q), T):
            step = chunk * Q + start + position
            there = step < frames
            _store_rows(dx, step, c, there, left, WHOLE, channels, zeros)
            _store_rows(ddt, step, c, there, left, WHOLE, channels, zeros)
            if z is not None:
                _store_rows(dz, step, c, there, left, WHOLE, channels, zeros)
            _store_rows(dB, step, n, there, dstate, divides(N, dstate), groups * dstate, of_group)
            _store_rows(dC, step, n, there, dstate, divides(N, dstate), groups * dstate, of_group)
    state = _entering(
        states, initial, slot, sequence, count, first, n, c, left, initial_s, initial_c, initial_n, channels, dstate,
        MATH,
    )  # fmt: skip
    starts = tl.where((index == 0)[:, None, None], state, 0)
    for i in range(1, tiles):
        step = chunk * Q + (i - 1) * T + position
        valid = step < length
        frame = _frame_of(step, begin, length, REVERSE)
        values, _, time, decay = _inputs(
            x, dt, bias, rate, frame, valid, c, left, WHOLE, x_t, x_c, dt_t, dt_c, SOFTPLUS, MATH
        )
        B_tile = _load_rows(B, frame, n, valid, dstate, divides(N, dstate), B_t, B_n, MATH)
        _, after = _states(decay, (time * values)[:, None, :] * B_tile[:, :, None], position, state)
        state = _at(after, position, T - 1)
        starts = tl.where((index == i)[:, None, None], state, starts)
    other = states
    if states is not None:
        other += tl.full([], channels * dstate, tl.int64) * slots
    gradient = _entering(
        other, dlast, slot, sequence, count, first, n, c, left, dlast_s, dlast_c, dlast_n, channels, dstate, MATH
    )
    of_rates = tl.zeros([1, N, BC], MATH)
    of_skip = tl.zeros([BC], MATH)
    of_bias = tl.zeros([BC], MATH)
    for j in range(0, tiles):
        i = tiles - 1 - j
        step = chunk * Q + i * T + position
        valid = step < length
        frame = _frame_of(step, begin, length, REVERSE)
        stored = step < frames if KIND == "seq_lens" else valid
        values, raw, time, decay = _inputs(
            x, dt, bias, rate, frame, valid, c, left, WHOLE, x_t, x_c, dt_t, dt_c, SOFTPLUS, MATH
        )
        B_tile = _load_rows(B, frame, n, valid, dstate, divides(N, dstate), B_t, B_n, MATH)
        C_tile = _load_rows(C, frame, n, valid, dstate, divides(N, dstate), C_t, C_n, MATH)
        upstream, of_gate = _gradient_of_gate(dy, z, frame, valid, c, left, WHOLE, dy_t, dy_c, z_t, z_c, MATH)
        added = time * values
        # What a step keeps of the state before it is what its decay is differentiated by.
        from_start = tl.where((position == 0)[:, None, None], decay * _at(starts, index, i), 0)
        _, after, _, kept = tl.associative_scan(
            (decay, tl.fma(added[:, None, :], B_tile[:, :, None], from_start), decay, from_start), 0, _then_showing
        )
        of_C = tl.sum(upstream[:, None, :] * after, 2)
        _store_rows(dC, frame, n, stored, dstate, divides(N, dstate), groups * dstate, of_C)
        if z is not None:
            result = tl.fma(skip[None, :], values, tl.sum(C_tile[:, :, None] * after, 1))
            _store_rows(dz, frame, c, stored, left, WHOLE, channels, tl.where(valid[:, None], of_gate * result, 0))
        # Against time: of the gradient of the state behind a step and what C gives, the step keeps its decay.
        behind = tl.where((position == T - 1)[:, None, None], gradient, 0)
        given = tl.fma(C_tile[:, :, None], upstream[:, None, :], behind)
        # A scan in reverse would turn round what is in other threads too.
        decay, given = tl.flip(decay, 0), tl.flip(given, 0)
        _, before, _, of_state = tl.associative_scan(
            (decay, decay * given, tl.full([T, N, BC], 1, MATH), given), 0, _then_showing
        )
        gradient = _at(before, position, T - 1)
        of_state = tl.flip(of_state, 0)
        of_B = tl.sum(of_state * added[:, None, :], 2)
        _store_rows(dB, frame, n, stored, dstate, divides(N, dstate), groups * dstate, of_B)
        through_state = tl.sum(of_state * B_tile[:, :, None], 1)
        of_exponent = of_state * kept
        through_decay = tl.sum(of_exponent * rate, 1) * LN_2
        of_rates += tl.sum(of_exponent * time[:, None, :], 0, keep_dims=True)
        of_x = tl.fma(time, through_state, skip[None, :] * upstream)
        of_dt = tl.fma(values, through_state, through_decay)
        if SOFTPLUS:
            of_dt *= sigmoid(raw)
        of_dt = tl.where(valid[:, None], of_dt, 0)
        of_skip += tl.sum(upstream * values, 0)
        of_bias += tl.sum(of_dt, 0)
        _store_rows(dx, frame, c, stored, left, WHOLE, channels, tl.where(valid[:, None], of_x, 0))
        _store_rows(ddt, frame, c, stored, left, WHOLE, channels, of_dt)
    _store_state(dA + (slot * channels + first) * dstate, n, c, left, dstate, 1, dstate, of_rates)
    at = slot * channels + first + c
    if D is not None:
        tl.store(dD + at, of_skip, mask=c < left)
    if dt_bias is not None:
        tl.store(dbias + at, of_bias, mask=c < left)
    if dinitial is not None:
        there = tl.where(chunk == 0, left, 0)
        _store_state(dinitial + (sequence * channels + first) * dstate, n, c, there, dstate, 1, dstate, gradient)


@triton.jit
def _sum(parts, out, count, size, block, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = the sum of parts (count, size), both contiguous."""
    column, sums = column_sums(parts, count, size, block, PARTS, COLUMNS)
    tl.store(out + column, sums.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def sum_parts(
    dA_parts, dB_parts, dC_parts, dD_parts, dbias_parts, dA, dB, dC, dD, dbias, slots, blocks, A_size, B_size, D_size,
    bias_size, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of gradients that chunks or channels share, in a fixed order."""
    program = tl.program_id(0)
    of_A = (A_size + COLUMNS - 1) // COLUMNS
    of_B = (B_size + COLUMNS - 1) // COLUMNS
    of_D = (D_size + COLUMNS - 1) // COLUMNS
    if program < of_A:
        _sum(dA_parts, dA, slots, A_size, program, PARTS, COLUMNS)
    elif program < of_A + of_B:
        _sum(dB_parts, dB, blocks, B_size, program - of_A, PARTS, COLUMNS)
    elif program < of_A + 2 * of_B:
        _sum(dC_parts, dC, blocks, B_size, program - of_A - of_B, PARTS, COLUMNS)
    elif program < of_A + 2 * of_B + of_D:
        _sum(dD_parts, dD, slots, D_size, program - of_A - 2 * of_B, PARTS, COLUMNS)
    else:
        _sum(dbias_parts, dbias, slots, bias_size, program - of_A - 2 * of_B - of_D, PARTS, COLUMNS)
