"""Triton kernels of the distillation losses.

A row of hidden states, or of logits, is one program's or shares one with its neighbours. What a row gives does not
depend on the others, sums over rows are in float64 and begin anew with each sequence: padding changes no bit. They are
to be compiled without fused multiply-adds: a product on one side of a difference that is not rounded as the one on the
other side is would keep equal inputs from giving exactly 0.

Of a row of logits the six numbers of csrc/distillation_loss/kernel.h are kept.
"""

import triton
import triton.language as tl

from linconv.ops.triton_numbers import number_of


@triton.jit
def _of_layer(layer, values):
    """The layer's own of `values`, which hold one for each layer, or one for all."""
    own = values[0]
    for i in tl.static_range(1, len(values)):
        own = tl.where(layer == i, values[i], own)
    return own


@triton.jit
def _counts(mask, batch, frame, inside, m_b, m_t):
    """Which rows count: all of `inside`, those of a mask, or those within a sequence's length."""
    if mask is None:
        return inside
    elif mask.dtype.element_ty == tl.uint8:
        return inside & (tl.load(mask + batch * m_b + frame * m_t, mask=inside, other=0) != 0)
    else:
        return inside & (frame < tl.load(mask + batch * m_b, mask=inside, other=0))


@triton.jit
def _number(counted, rows):
    """How many rows count, at least 1, in float64."""
    if counted is None:
        return tl.maximum(tl.full([], rows, tl.int64), 1).to(tl.float64)
    else:
        return tl.maximum(tl.load(counted), 1).to(tl.float64)


@triton.jit
def _load(pointer, rows, column, stride, there, fill, MATH: tl.constexpr):
    return tl.load(pointer + (rows[:, None] + column[None, :] * stride), mask=there, other=fill).to(MATH)


@triton.jit
def mean_over_rows(
    parts, out, counted, rows, batch, blocks, p_v, p_b, p_k, BATCH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[v] = the sum of parts[v] (batch, blocks) over how many rows count.

    A sequence's parts are summed by their place in it, sequences by theirs in the batch: parts of 0 at a sequence's end
    change nothing.
    """
    value = tl.program_id(0).to(tl.int64)
    parts += value * p_v
    total = tl.full((1,), 0, tl.float64)
    for b in range(0, batch, BATCH):
        row = (b + tl.arange(0, BATCH)).to(tl.int64)
        own = tl.full((BATCH, BLOCKS), 0, tl.float64)
        for k in range(0, blocks, BLOCKS):
            block = (k + tl.arange(0, BLOCKS)).to(tl.int64)
            there = (row < batch)[:, None] & (block < blocks)[None, :]
            own += tl.load(parts + (row[:, None] * p_b + block[None, :] * p_k), mask=there, other=0)
        total += tl.sum(tl.sum(own, 1), 0)
    mean = total / _number(counted, rows)
    tl.store(out + value + tl.arange(0, 1), mean.to(out.dtype.element_ty))


# ---- Hidden states


@triton.jit
def _columns(
    held, pointer, rows, stride, valid, step, width, BD: tl.constexpr, STEPS: tl.constexpr, MATH: tl.constexpr
):
    """BD columns of the rows: those held in registers, if they are all there are. Zeros where none are."""
    if STEPS == 1:
        return held
    else:
        column = step * BD + tl.arange(0, BD).to(tl.int64)
        return _load(pointer, rows, column, stride, valid[:, None] & (column < width)[None, :], 0, MATH)


@triton.jit
def _first_columns(pointer, rows, stride, valid, width, BD: tl.constexpr, MATH: tl.constexpr):
    column = tl.arange(0, BD).to(tl.int64)
    return _load(pointer, rows, column, stride, valid[:, None] & (column < width)[None, :], 0, MATH)


@triton.jit
def _normalizers(
    s_held, t_held, student, teacher, s_rows, t_rows, s_c, t_c, valid, width,
    BR: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Means and inverse deviations of both sides; mean(e xs) and mean(-e xt), e the difference of the normalised rows.

    The latter come from sums of a (a - b) and b (b - a), with a and b the values about their means: nothing cancels
    there that does not cancel in e, and equal rows give exactly 0.
    """
    s_sum = tl.full((BR,), 0, MATH)
    t_sum = tl.full((BR,), 0, MATH)
    for step in range(0, STEPS):
        s = _columns(s_held, student, s_rows, s_c, valid, step, width, BD, STEPS, MATH)
        t = _columns(t_held, teacher, t_rows, t_c, valid, step, width, BD, STEPS, MATH)
        s_sum += tl.sum(s, 1)
        t_sum += tl.sum(t, 1)
    d = width.to(MATH)
    s_mean = s_sum / d
    t_mean = t_sum / d
    s_squares = tl.full((BR,), 0, MATH)
    t_squares = tl.full((BR,), 0, MATH)
    s_apart = tl.full((BR,), 0, MATH)
    t_apart = tl.full((BR,), 0, MATH)
    for step in range(0, STEPS):
        s = _columns(s_held, student, s_rows, s_c, valid, step, width, BD, STEPS, MATH)
        t = _columns(t_held, teacher, t_rows, t_c, valid, step, width, BD, STEPS, MATH)
        inside = (step * BD + tl.arange(0, BD) < width)[None, :]
        a = tl.where(inside, s - s_mean[:, None], 0)
        b = tl.where(inside, t - t_mean[:, None], 0)
        s_squares += tl.sum(a * a, 1)
        t_squares += tl.sum(b * b, 1)
        s_apart += tl.sum(a * (a - b), 1)
        t_apart += tl.sum(b * (b - a), 1)
    s_scale = 1 / tl.sqrt(s_squares / d + 1e-5)
    t_scale = 1 / tl.sqrt(t_squares / d + 1e-5)
    apart = s_scale - t_scale
    s_k = s_scale * (apart * s_squares + t_scale * s_apart) / d
    t_k = t_scale * (s_scale * t_apart - apart * t_squares) / d
    return s_mean, t_mean, s_scale, t_scale, s_k, t_k


@triton.jit
def layers_forward(
    student, teacher, widths, s_b, s_t, s_c, t_b, t_t, t_c, offsets, mask, m_b, m_t, parts, frames, blocks, batch,
    layers,
    NORM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """parts (2, layers, batch, blocks): sums over BR frames of each row's mean squared error and cosine.

    Student, teacher and what follows hold one value for each layer of the grid,
    or one for all; that layer's place among
    all layers is `offsets` further.
    """
    layer = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64)
    row, block = index // blocks, index % blocks
    frame = block * BR + tl.arange(0, BR)
    valid = _counts(mask, row + frame * 0, frame, frame < frames, m_b, m_t)
    width = tl.full([], _of_layer(layer, widths), tl.int64)
    s_rows = row * _of_layer(layer, s_b) + frame * _of_layer(layer, s_t)
    t_rows = row * _of_layer(layer, t_b) + frame * _of_layer(layer, t_t)
    own_s, own_t = _of_layer(layer, student), _of_layer(layer, teacher)
    s_column, t_column = _of_layer(layer, s_c), _of_layer(layer, t_c)
    s_held = _first_columns(own_s, s_rows, s_column, valid, width, BD, MATH)
    t_held = _first_columns(own_t, t_rows, t_column, valid, width, BD, MATH)
    if NORM:
        s_mean, t_mean, s_scale, t_scale, _, _ = _normalizers(
            s_held, t_held, own_s, own_t, s_rows, t_rows, s_column, t_column, valid, width, BR, BD, STEPS, MATH
        )
    error = tl.full((BR,), 0, MATH)
    ss = tl.full((BR,), 0, MATH)
    tt = tl.full((BR,), 0, MATH)
    st = tl.full((BR,), 0, MATH)
    for step in range(0, STEPS):
        s = _columns(s_held, own_s, s_rows, s_column, valid, step, width, BD, STEPS, MATH)
        t = _columns(t_held, own_t, t_rows, t_column, valid, step, width, BD, STEPS, MATH)
        ss += tl.sum(s * s, 1)
        tt += tl.sum(t * t, 1)
        st += tl.sum(s * t, 1)
        e = s - t
        if NORM:
            e = (s - s_mean[:, None]) * s_scale[:, None] - (t - t_mean[:, None]) * t_scale[:, None]
            e = tl.where((step * BD + tl.arange(0, BD) < width)[None, :], e, 0)
        error += tl.sum(e * e, 1)
    s_norm = tl.sqrt(ss.to(tl.float64))
    t_norm = tl.sqrt(tt.to(tl.float64))
    least = 1e-8  # that of torch's cosine_similarity
    s_norm = tl.where(s_norm < least, least, s_norm)
    t_norm = tl.where(t_norm < least, least, t_norm)
    errors = tl.where(valid, error.to(tl.float64) / width.to(tl.float64), 0)
    cosines = tl.where(valid, st.to(tl.float64) / (s_norm * t_norm), 0)
    place = (layer + _of_layer(layer, offsets)).to(tl.int64)
    to = parts + (place * batch + row) * blocks + block
    tl.store(to, tl.sum(errors, 0))
    tl.store(to + tl.full([], layers, tl.int64) * batch * blocks, tl.sum(cosines, 0))


@triton.jit
def layers_backward(
    student, teacher, ds, dt, widths, s_b, s_t, s_c, t_b, t_t, t_c, offsets, mask, m_b, m_t, upstream, u_l,
    counted, rows,
    frames, blocks,
    NORM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """ds = scale_s g (e - xs mean(e xs)), e = xs - xt, mean(e) being 0; dt the same with both signs of e turned.

    Not normalised: g e, and -g e. Gradients are contiguous; one that is not wanted is None.
    """
    layer = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64)
    row, block = index // blocks, index % blocks
    frame = block * BR + tl.arange(0, BR)
    inside = frame < frames
    valid = _counts(mask, row + frame * 0, frame, inside, m_b, m_t)
    width = tl.full([], _of_layer(layer, widths), tl.int64)
    s_rows = row * _of_layer(layer, s_b) + frame * _of_layer(layer, s_t)
    t_rows = row * _of_layer(layer, t_b) + frame * _of_layer(layer, t_t)
    d_rows = (row * frames + frame) * width
    own_s, own_t = _of_layer(layer, student), _of_layer(layer, teacher)
    s_column, t_column = _of_layer(layer, s_c), _of_layer(layer, t_c)
    s_held = _first_columns(own_s, s_rows, s_column, valid, width, BD, MATH)
    t_held = _first_columns(own_t, t_rows, t_column, valid, width, BD, MATH)
    if NORM:
        s_mean, t_mean, s_scale, t_scale, s_k, t_k = _normalizers(
            s_held, t_held, own_s, own_t, s_rows, t_rows, s_column, t_column, valid, width, BR, BD, STEPS, MATH
        )
    place = (layer + _of_layer(layer, offsets)).to(tl.int64)
    g = tl.load(upstream + place * u_l).to(tl.float64) * 2 / (_number(counted, rows) * width.to(tl.float64))
    g = g.to(MATH)
    for step in range(0, STEPS):
        s = _columns(s_held, own_s, s_rows, s_column, valid, step, width, BD, STEPS, MATH)
        t = _columns(t_held, own_t, t_rows, t_column, valid, step, width, BD, STEPS, MATH)
        column = step * BD + tl.arange(0, BD).to(tl.int64)
        there = inside[:, None] & (column < width)[None, :]
        to = d_rows[:, None] + column[None, :]
        if NORM:
            s = (s - s_mean[:, None]) * s_scale[:, None]
            t = (t - t_mean[:, None]) * t_scale[:, None]
        if ds is not None:
            own = _of_layer(layer, ds)
            e = (s - t) * g
            if NORM:
                e = (s - t - s * s_k[:, None]) * (s_scale * g)[:, None]
            tl.store(own + to, tl.where(valid[:, None], e, 0).to(own.dtype.element_ty), mask=there)
        if dt is not None:
            own = _of_layer(layer, dt)
            e = (t - s) * g
            if NORM:
                e = (t - s - t * t_k[:, None]) * (t_scale * g)[:, None]
            tl.store(own + to, tl.where(valid[:, None], e, 0).to(own.dtype.element_ty), mask=there)


# ---- Logits


@triton.jit
def _shift(largest):
    return tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf is NaN


@triton.jit
def _raise(largest, total, other, MATH: tl.constexpr):
    """A side's largest and total, of columns up to `other` too; the factor on what was summed; the shift's rise."""
    before = _shift(largest)
    largest = tl.where(other > largest, other, largest)
    rise = _shift(largest) - before
    # Where nothing was summed, all were -inf.
    factor = tl.where((rise == 0) | (total == 0), 1.0, tl.exp((-rise).to(MATH)).to(tl.float64))
    return largest, total * factor, factor, rise


@triton.jit(do_not_specialize=["inverse_bits"])
def logits_forward(
    student, teacher, s_b, s_t, s_c, t_b, t_t, t_c, mask, m_b, m_t, before, statistics, inverse_bits, rows, frames,
    classes,
    BR: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Six numbers of each row, (rows, 6) in float64, in one pass over its classes; zeros where it does not count.

    Args:
        before: the same of classes before these, or None.
        inverse_bits: `bits_of` 1 / temperature.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    batch, frame = row // frames, row % frames
    valid = _counts(mask, batch, frame, inside, m_b, m_t)
    inverse = number_of(inverse_bits, MATH)
    s_rows = batch * s_b + frame * s_t
    t_rows = batch * t_b + frame * t_t
    s_largest = tl.full((BR,), float("-inf"), tl.float64)
    t_largest = tl.full((BR,), float("-inf"), tl.float64)
    s_total = tl.full((BR,), 0, tl.float64)
    t_total = tl.full((BR,), 0, tl.float64)
    w = tl.full((BR,), 0, tl.float64)
    if before is not None:
        s_largest = tl.load(before + row * 6, mask=inside, other=0)
        s_total = tl.load(before + row * 6 + 1, mask=inside, other=0)
        t_largest = tl.load(before + row * 6 + 2, mask=inside, other=0)
        t_total = tl.load(before + row * 6 + 3, mask=inside, other=0)
        w = tl.load(before + row * 6 + 4, mask=inside, other=0)
    for c in range(0, classes, BV):
        column = (c + tl.arange(0, BV)).to(tl.int64)
        there = valid[:, None] & (column < classes)[None, :]
        s = _load(student, s_rows, column, s_c, there, float("-inf"), MATH) * inverse
        t = _load(teacher, t_rows, column, t_c, there, float("-inf"), MATH) * inverse
        s_largest, s_total, s_factor, s_rise = _raise(s_largest, s_total, tl.max(s, 1).to(tl.float64), MATH)
        t_before = t_total
        t_largest, t_total, t_factor, t_rise = _raise(t_largest, t_total, tl.max(t, 1).to(tl.float64), MATH)
        # Teacher's classes of a probability that underflows count for nothing, whatever the student gives them.
        w = tl.where((t_factor == 0) | (t_before == 0), 0.0, t_factor * (w - t_before * (t_rise - s_rise)))
        u = s - _shift(s_largest).to(MATH)[:, None]
        v = t - _shift(t_largest).to(MATH)[:, None]
        e = tl.exp(v)
        s_total += tl.sum(tl.exp(u), 1).to(tl.float64)
        t_total += tl.sum(e, 1).to(tl.float64)
        w += tl.sum(tl.where(e == 0, 0.0, e * (v - u)), 1).to(tl.float64)
    kl = w / t_total - tl.log(t_total) + tl.log(s_total)
    to = statistics + row * 6
    tl.store(to, tl.where(valid, s_largest, 0), mask=inside)
    tl.store(to + 1, tl.where(valid, s_total, 0), mask=inside)
    tl.store(to + 2, tl.where(valid, t_largest, 0), mask=inside)
    tl.store(to + 3, tl.where(valid, t_total, 0), mask=inside)
    tl.store(to + 4, tl.where(valid, w, 0), mask=inside)
    tl.store(to + 5, tl.where(valid, kl, 0), mask=inside)


@triton.jit(do_not_specialize=["inverse_bits"])
def logits_backward(
    student, teacher, ds, dt, s_b, s_t, s_c, t_b, t_t, t_c, mask, m_b, m_t, statistics, upstream, u_r, counted,
    counting,
    inverse_bits, rows, frames, classes,
    BR: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """With q, p the student's and the teacher's probabilities: ds = g (q - p) / T, dt = g p (log(p / q) - KL) / T.

    g is upstream over how many rows count. Gradients are contiguous; one that is not wanted is None.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    inside = row < rows
    batch, frame = row // frames, row % frames
    valid = _counts(mask, batch, frame, inside, m_b, m_t)
    there = valid[:, None] & (column < classes)[None, :]
    inverse = number_of(inverse_bits, MATH)
    s = _load(student, batch * s_b + frame * s_t, column, s_c, there, float("-inf"), MATH) * inverse
    t = _load(teacher, batch * t_b + frame * t_t, column, t_c, there, float("-inf"), MATH) * inverse
    s_largest = tl.load(statistics + row * 6, mask=valid, other=0)
    s_total = tl.load(statistics + row * 6 + 1, mask=valid, other=1)
    t_largest = tl.load(statistics + row * 6 + 2, mask=valid, other=0)
    t_total = tl.load(statistics + row * 6 + 3, mask=valid, other=1)
    kl = tl.load(statistics + row * 6 + 5, mask=valid, other=0)
    u = s - _shift(s_largest).to(MATH)[:, None]
    v = t - _shift(t_largest).to(MATH)[:, None]
    q = tl.exp(u) * (1 / s_total).to(MATH)[:, None]
    p = tl.exp(v) * (1 / t_total).to(MATH)[:, None]
    g = tl.load(upstream + row * u_r, mask=valid, other=0).to(tl.float64) / _number(counted, counting)
    g = (g * number_of(inverse_bits, tl.float64)).to(MATH)[:, None]
    to = row[:, None] * classes + column[None, :]
    there = inside[:, None] & (column < classes)[None, :]
    if ds is not None:
        d = tl.where(valid[:, None], (q - p) * g, 0)
        tl.store(ds + to, d.to(ds.dtype.element_ty), mask=there)
    if dt is not None:
        log_ratio = v - u + (tl.log(s_total) - tl.log(t_total) - kl).to(MATH)[:, None]
        d = tl.where(valid[:, None] & (p != 0), p * log_ratio * g, 0)
        tl.store(dt + to, d.to(dt.dtype.element_ty), mask=there)
