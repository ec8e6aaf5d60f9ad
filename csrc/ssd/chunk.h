// What forward and backward share: reading a chunk of frames in a direction's own order, its decays, and its scores.
#pragma once

#include "common/arena.h"
#include "common/gemm.h"
#include "common/transpose.h"
#include "ssd/kernel.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
constexpr DType math_dtype() {
  return sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
}

// Scratch is padded so that products run on whole tiles: rows to kTileRows, columns to the vector width.
template <class T>
constexpr int kPad = kTileRows > kWidth<T> ? kTileRows : kWidth<T>;

constexpr int kQ = kSsdChunk;

// One task: some heads of one group, in all frames of one sequence or in one chunk of them.
struct Task {
  int64_t sequence, chunk = 0;
  int first_direction, directions;
  int group, head, heads;  // heads head … head + heads - 1
  int block;               // which block of heads of the group
  int column, columns;     // of headdim

  Task(const SsdArgs& args, int64_t index) {
    index = take_block(args, index);
    directions = args.summed ? args.directions : 1;
    const int ways = args.directions / directions;
    first_direction = index % ways;
    sequence = index / ways;
  }
  // Tasks of one block follow each other as chunks do: upwards, or downwards where onward is -1.
  Task(const SsdArgs& args, int64_t index, const SsdRange& range, int onward) : directions(1) {
    const int64_t i = index % range.count, place = range.first + (onward > 0 ? i : range.count - 1 - i);
    sequence = range.sequence_of(place);
    chunk = place - range.starts[sequence];
    first_direction = range.first_direction + int(take_block(args, index / range.count));
  }

 private:
  int64_t take_block(const SsdArgs& args, int64_t index) {
    const int column_block = index % args.column_blocks();
    index /= args.column_blocks();
    block = index % args.head_blocks();
    index /= args.head_blocks();
    group = index % args.groups;
    const int group_heads = args.group_heads(), first = block * args.head_block;
    head = group * group_heads + first;
    heads = group_heads - first < args.head_block ? group_heads - first : args.head_block;
    column = column_block * args.column_block;
    columns = args.headdim - column < args.column_block ? args.headdim - column : args.column_block;
    return index / args.groups;
  }
};

// The frames of one sequence in one direction's own order: step 0 is where its state starts.
struct Steps {
  int64_t row, first, length;  // first: the frame of step 0
  int sign;

  Steps(const SsdArgs& args, int64_t sequence, int direction)
      : row(args.spans[sequence].row), length(args.length(sequence)), sign(args.direction[direction].reversed ? -1 : 1) {
    first = sign < 0 ? args.spans[sequence].end - 1 : args.spans[sequence].begin;
  }
  int64_t frame(int64_t step) const { return sign < 0 ? length - 1 - step : step; }
  int64_t chunks() const { return (length + kQ - 1) / kQ; }
  int count(int64_t chunk) const { return length - chunk * kQ < kQ ? int(length - chunk * kQ) : kQ; }
  int64_t at(const SsdTensor& t, int direction, int64_t head, int64_t step) const {
    return t.at(direction, row, first + sign * step, head);
  }
};

// Rows of `columns` elements for `count` steps from `step` on; what is left of `width` and of `total` rows is zero.
template <class T>
inline void read_rows(const SsdTensor& t, const Steps& steps, int direction, int64_t head, int64_t step, int count,
                      int total, int column, int columns, int width, T* out) {
  const int64_t from = steps.at(t, direction, head, step) + column * t.column, stride = steps.sign * t.time;
  load_rows(offset(t.data, t.dtype, from), t.dtype, stride, t.column, count, columns, out, width);
  for (int i = 0; i < count && columns < width; ++i)
    for (int j = columns; j < width; ++j) out[i * width + j] = 0;
  for (int i = count * width; i < total * width; ++i) out[i] = 0;
}

// A chunk's rows, to be asked for ahead; none where the chunk is not there. Elements apart from each other, each on a
// line of its own, are not worth it.
inline Ahead rows_ahead(const SsdTensor& t, const Steps& steps, int direction, int64_t head, int64_t chunk, int column,
                        int columns) {
  if (t.column != 1 || chunk < 0 || chunk >= steps.chunks()) return {};
  const int64_t size = element_size(t.dtype);
  return {offset(static_cast<const void*>(t.data), t.dtype, steps.at(t, direction, head, chunk * kQ) + column),
          steps.sign * t.time * size, steps.count(chunk), columns * size};
}

// What a task works on after head h in chunk c, where chunks go by in steps of `onward`.
struct Next {
  int64_t chunk;
  int h, head;  // among the task's own heads, and among all

  Next(const Task& task, int64_t c, int h, int onward)
      : chunk(h + 1 == task.heads ? c + onward : c), h(h + 1 == task.heads ? 0 : h + 1), head(task.head + this->h) {}
};

// B or C of a task's next chunk, to be asked for while it is at head h: the last two heads ask for one each.
inline Ahead next_BC(const SsdArgs& args, const Task& task, const Steps& steps, int direction, int64_t next_chunk, int h) {
  if (h + 2 < task.heads) return {};
  return rows_ahead(h + 1 == task.heads ? args.B : args.C, steps, direction, task.group, next_chunk, 0, args.dstate);
}

// Where a task's result goes, by its own heads and the frames of its sequence: the tensor itself, or scratch in the math
// dtype that is rounded into the tensor once, where several terms are summed. Columns are adjacent in both.
template <class T>
struct ResultRows {
  void* data;
  DType dtype;
  int64_t origin, head, time;

  int64_t at(int h, int64_t frame) const { return origin + h * head + frame * time; }
  void store(int h, int64_t frame, const T* values, int n) const {
    store_row(offset(data, dtype, at(h, frame)), dtype, 1, n, values);
  }
  // Only where dtype is the math dtype.
  void add(int h, int64_t frame, const T* values, int n) const {
    T* to = static_cast<T*>(data) + at(h, frame);
    for (int i = 0; i < n; ++i) to[i] += values[i];
  }
  void put(bool added, int h, int64_t frame, const T* values, int n) const {
    added ? add(h, frame, values, n) : store(h, frame, values, n);
  }
  // A chunk's rows, to be asked for ahead.
  Ahead ahead(int h, const Steps& steps, int64_t chunk, int n) const {
    const int64_t size = element_size(dtype);
    return {offset(static_cast<const void*>(data), dtype, at(h, steps.frame(chunk * kQ))), steps.sign * time * size,
            steps.count(chunk), n * size};
  }
  const T* row(int h, int64_t frame) const { return static_cast<const T*>(data) + at(h, frame); }
};

// A tensor shaped as x that directions or skips are summed into.
template <class T>
class Result {
 public:
  Result(const SsdArgs& args, const SsdTensor& tensor, int width)
      : args_(args), tensor_(tensor), width_(width), staged_(args.staged(tensor.dtype)) {}
  int64_t scratch_size() const {
    return staged_ && args_.summed_in == nullptr ? args_.longest() * args_.head_block * width_ : 0;
  }
  void set_scratch(T* scratch) { scratch_ = scratch; }

  ResultRows<T> rows(const Task& task) const {
    ResultRows<T> rows = final_rows(task);
    if (!staged_) return rows;
    if (args_.summed_in == nullptr) return {scratch_, math_dtype<T>(), 0, width_, int64_t(task.heads) * width_};
    rows.data = args_.summed_in;
    rows.dtype = math_dtype<T>();
    return rows;
  }
  // Rounds what was summed in scratch, and zeroes the padding, in frames begin … end - 1.
  void finish(const Task& task, int64_t begin, int64_t end) const {
    const ResultRows<T> to = final_rows(task), from = rows(task);
    const int64_t length = args_.length(task.sequence);
    int64_t t = begin;
    for (; t < length && t < end; ++t)
      for (int h = 0; h < task.heads && staged_; ++h) to.store(h, t, from.row(h, t), task.columns);
    for (; t < end; ++t)
      for (int h = 0; h < task.heads; ++h)
        __builtin_memset(offset(to.data, to.dtype, to.at(h, t)), 0, task.columns * element_size(to.dtype));
  }

 private:
  ResultRows<T> final_rows(const Task& task) const {
    const Span span = args_.spans[task.sequence];
    const int64_t origin = tensor_.at(args_.summed ? 0 : task.first_direction, span.row, span.begin, task.head);
    return {tensor_.data, tensor_.dtype, origin + task.column, tensor_.head, tensor_.time};
  }
  const SsdArgs& args_;
  const SsdTensor& tensor_;
  int width_;
  bool staged_;
  T* scratch_ = nullptr;
};

// The steps of one chunk of one head. Frames behind `count` have dt = 0, so they neither decay nor add.
template <class T>
struct Decays {
  alignas(64) T raw[kQ];      // dt + dt_bias
  alignas(64) T free[kQ];     // softplus of it, not yet clamped
  alignas(64) T dt[kQ];       // clamped
  alignas(64) T sum[kQ];      // inclusive prefix sum p of dt A
  alignas(64) T start[kQ];    // e^p: from the state entering the chunk to each step
  alignas(64) T end[kQ];      // e^{p_last - p}: from each step to the state leaving the chunk
  alignas(64) T end_dt[kQ];   // the same, times dt
  T whole;                    // e^{p_last}
  T A;

  void read(const SsdArgs& args, const Steps& steps, int direction, int head, int64_t step, int count) {
    A = static_cast<const T*>(args.A)[direction * args.heads + head];
    const T bias = args.dt_bias ? static_cast<const T*>(args.dt_bias)[direction * args.heads + head] : 0;
    const int64_t from = steps.at(args.dt, direction, head, step);
    load_row(offset(args.dt.data, args.dt.dtype, from), args.dt.dtype, steps.sign * args.dt.time, count, raw);
    for (int i = count; i < kQ; ++i) raw[i] = 0;
    const Vec<T> low = splat(T(args.dt_min)), high = splat(T(args.dt_max));
    for (int i = 0; i < kQ; i += kWidth<T>) {
      const Vec<T> biased = load(raw + i) + bias;
      const Vec<T> value = args.dt_softplus ? softplus(biased) : biased;
      store(raw + i, biased);
      store(free + i, value);
      store(dt + i, min(high, max(low, value)));
    }
    T running = 0;
    for (int i = 0; i < count; ++i) sum[i] = running += dt[i] * A;
    for (int i = count; i < kQ; ++i) sum[i] = running, dt[i] = 0;
    for (int i = 0; i < kQ; i += kWidth<T>) {
      const Vec<T> p = load(sum + i), to_end = exp(splat(running) - p);
      store(start + i, exp(p));
      store(end + i, to_end);
      store(end_dt + i, to_end * load(dt + i));
    }
    whole = start[kQ - 1];
  }
};

template <class T>
LINCONV_INLINE Vec<T> lane_numbers() {
  Vec<T> v;
  for (int i = 0; i < kWidth<T>; ++i) v[i] = T(i);
  return v;
}

// `value` for the steps j … j + width - 1 that are among the first `visible`, else zero. A select and not a product:
// behind the diagonal exponentials may be infinite, and what is left of another chunk may be NaN.
template <class T>
inline Vec<T> where_visible(int j, int visible, Vec<T> value) {
  return lane_numbers<T>() + T(j) < splat(T(visible)) ? value : Vec<T>{};
}

// e^{p_i - p_j} for the steps j … j + width - 1.
template <class T>
inline Vec<T> decay_between(const Decays<T>& decays, int i, int j) {
  return exp(splat(decays.sum[i]) - load(decays.sum + j));
}

// The skip of one head; zero where there is none.
template <class T>
inline T skip_of(const SsdArgs& args, int direction, int head) {
  return args.D ? static_cast<const T*>(args.D)[direction * args.heads + head] : T(0);
}

// to += factor * from, rows of n elements, a multiple of the vector width.
template <class T>
inline void add_scaled(T factor, const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kWidth<T>) store(to + i, load(to + i) + splat(factor) * load(from + i));
}

}  // namespace
}  // namespace linconv::LINCONV_ISA
