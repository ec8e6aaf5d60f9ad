// What states, and results, need besides products: to go in and out, from chunk to chunk where a task takes one, and to be
// finished. Nothing here has scratch of its own.
#pragma once

#include "ssd/chunk.h"

namespace linconv::LINCONV_ISA {
namespace {

// Some rows of one head's state, as it is padded: all of them, or a task that passes them from chunk to chunk.
struct StateRows {
  int64_t sequence;
  int head, column, columns;  // columns: of headdim
  int row, rows;
  int direction = 0;
  int64_t at = 0;  // see SsdStates

  StateRows(const Task& task, int h, int rows)
      : sequence(task.sequence), head(task.head + h), column(task.column), columns(task.columns), row(0), rows(rows) {}
  StateRows(const SsdArgs& args, const SsdStates& states, int all, int64_t index) : column(0), columns(args.headdim) {
    const int parts = SsdStates::parts(all);
    row = index % parts * SsdStates::kRows;
    rows = all - row < SsdStates::kRows ? all - row : SsdStates::kRows;
    index /= parts;
    head = index % args.heads;
    index /= args.heads;
    direction = states.first_direction + index % states.ways;
    sequence = index / states.ways;
    at = states.at(sequence, direction, args.heads, head);
  }
};

// The state that enters a chunk, of one head.
template <class T>
inline T* entering(const SsdStates& states, int64_t at, int64_t chunk) {
  return static_cast<T*>(states.entering) + (at * states.chunks + chunk - states.first) * states.size;
}
template <class T>
inline T* carried(const SsdStates& states, int64_t at) {
  return static_cast<T*>(states.carried) + at * states.size;
}
template <class T>
inline T& decay_of(const SsdStates& states, int64_t at, int64_t chunk) {
  return static_cast<T*>(states.decays)[at * states.chunks + chunk - states.first];
}

// From what each chunk adds to a state the one that enters it, in place, `chunks` of them onward from the one that the
// carried state enters. What leaves the last one is carried on, unless nothing was added for it.
template <class T>
inline void pass_states(const SsdStates& states, const StateRows& part, int columns, int64_t chunks, int onward,
                        bool added_by_last) {
  const int64_t first = part.row * columns;
  const int n = part.rows * columns;
  T* state = carried<T>(states, part.at) + first;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t chunk = states.first + (onward > 0 ? i : chunks - 1 - i);
    T* to = entering<T>(states, part.at, chunk) + first;
    if (i + 1 == chunks && !added_by_last) {
      __builtin_memcpy(to, state, n * sizeof(T));
      return;
    }
    const Vec<T> decay = splat(decay_of<T>(states, part.at, chunk));
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> added = load(to + j), before = load(state + j);
      store(to + j, before);
      store(state + j, add_product(added, decay, before));
    }
  }
}

// That which enters a task's next chunk or head, to be asked for ahead.
template <class T>
inline Ahead next_state(const SsdArgs& args, const SsdStates& states, const Task& task, int direction, const Next& next,
                        int rows, int columns) {
  const int64_t chunk = next.chunk - states.first, row = columns * sizeof(T);
  if (chunk < 0 || chunk >= states.chunks) return {};
  const int64_t at = states.at(task.sequence, direction, args.heads, next.head) * states.chunks + chunk;
  return {static_cast<const T*>(states.entering) + at * states.size, row, rows, row};
}

// Of the forward pass, with stages that take no scratch. Rows of a state are those of dstate.
template <class T>
class ForwardStates {
 public:
  explicit ForwardStates(const SsdForwardArgs& args)
      : args_(args), width_(round_up(args.column_block, kPad<T>)), states_(round_up(args.dstate, kPad<T>)),
        result_(args, args.y, width_) {}

  void run(SsdStage stage, int64_t index) {
    if (stage == SsdStage::kPassed) passed(StateRows(args_, args_.states, states_, index));
    if (stage == SsdStage::kFinished) finished(Task(args_, index, args_.states, +1));
  }

 protected:
  void passed(const StateRows& part) {
    const SsdStates& states = args_.states;
    const int64_t chunks = Steps(args_, part.sequence, part.direction).chunks();
    T* state = carried<T>(states, part.at) + part.row * width_;
    if (states.first == 0) read_state(part, state);
    pass_states<T>(states, part, width_, states.of(chunks), +1, !states.last_of(chunks) || args_.final_states);
    if (states.last_of(chunks)) write_state(part, state);
  }

  void finished(const Task& task) const {
    const int64_t frames = args_.length(task.sequence) + args_.padding(task.sequence), begin = task.chunk * kQ;
    result_.finish(task, begin, begin + kQ < frames ? begin + kQ : frames);
  }

  int64_t state_at(const StateRows& part, int p) const {
    return ((part.sequence * args_.heads + part.head) * args_.headdim + part.column + p) * args_.dstate;
  }
  // What pads a state is zero.
  void read_state(const StateRows& part, T* state) {
    const T* from = static_cast<const T*>(args_.initial_states);
    for (int64_t i = 0; i < int64_t(part.rows) * width_; ++i) state[i] = 0;
    for (int p = 0; p < part.columns && from; ++p)
      for (int n = 0; n < part.rows && part.row + n < args_.dstate; ++n)
        state[n * width_ + p] = from[state_at(part, p) + part.row + n];
  }
  void write_state(const StateRows& part, const T* state) {
    T* to = static_cast<T*>(args_.final_states);
    for (int p = 0; p < part.columns && to; ++p)
      for (int n = 0; n < part.rows && part.row + n < args_.dstate; ++n)
        to[state_at(part, p) + part.row + n] = state[n * width_ + p];
  }

  const SsdForwardArgs& args_;
  const int width_, states_;  // columns of x and of B, padded
  Result<T> result_;
};

// Of the backward pass, likewise. Rows of a state are those of headdim.
template <class T>
class BackwardStates {
 public:
  explicit BackwardStates(const SsdBackwardArgs& args)
      : args_(args), width_(round_up(args.headdim, kPad<T>)), states_(round_up(args.dstate, kPad<T>)),
        result_(args, args.dx, width_) {}

  void run(SsdStage stage, int64_t index) {
    if (stage == SsdStage::kPassed) passed(StateRows(args_, args_.states, width_, index));
    if (stage == SsdStage::kGradientsPassed) gradients_passed(StateRows(args_, args_.dstates, width_, index));
    if (stage == SsdStage::kFinished) finished(Task(args_, index, args_.dstates, +1));
  }

 protected:
  struct Sums {
    double A = 0, D = 0, dt_bias = 0;

    void operator+=(const Sums& other) { A += other.A, D += other.D, dt_bias += other.dt_bias; }
  };

  void passed(const StateRows& part) {
    const SsdStates& states = args_.states;
    if (states.first == 0) read_state(part, args_.initial_states, carried<T>(states, part.at) + part.row * states_);
    const int64_t chunks = Steps(args_, part.sequence, part.direction).chunks();
    pass_states<T>(states, part, states_, states.of(chunks), +1, !states.last_of(chunks));
  }

  void gradients_passed(const StateRows& part) {
    const SsdStates& states = args_.dstates;
    T* state = carried<T>(states, part.at) + part.row * states_;
    const int64_t chunks = Steps(args_, part.sequence, part.direction).chunks();
    if (states.last_of(chunks)) read_state(part, args_.dfinal_states, state);
    pass_states<T>(states, part, states_, states.of(chunks), -1, leaves(states.first));
    if (states.first == 0) write_state(part, state);
  }

  void finished(const Task& task) {
    const int64_t frames = args_.length(task.sequence) + args_.padding(task.sequence), begin = task.chunk * kQ;
    const int64_t end = begin + kQ < frames ? begin + kQ : frames;
    for (int d = 0; d < (args_.summed ? args_.directions : 1); ++d) {
      const int direction = task.first_direction + d;
      zero_padding(task, direction, begin, end);
      const int64_t chunks = Steps(args_, task.sequence, direction).chunks();
      for (int h = 0; h < task.heads && task.chunk == 0; ++h) {
        Sums sums;
        for (int64_t c = chunks - 1; c >= 0; --c) {
          const double* of_chunk = sums_of(task.sequence, direction, task.head + h, c);
          sums += {of_chunk[0], of_chunk[1], of_chunk[2]};
        }
        write_sums(task.sequence, direction, task.head + h, sums);
      }
    }
    result_.finish(task, begin, end);
  }

  // Whether the gradient of the state that enters a chunk is wanted.
  bool leaves(int64_t c) const { return c > 0 || args_.dinitial_states; }

  double* sums_of(int64_t sequence, int direction, int64_t head, int64_t chunk) const {
    return args_.sums + (((sequence * args_.directions + direction) * args_.heads + head) * args_.chunks + chunk) * 3;
  }

  void write_sums(int64_t sequence, int direction, int head, const Sums& sums) {
    const int64_t at = (sequence * args_.directions + direction) * args_.heads + head;
    static_cast<T*>(args_.dA)[at] = T(sums.A);
    if (args_.dD) static_cast<T*>(args_.dD)[at] = T(sums.D);
    if (args_.ddt_bias) static_cast<T*>(args_.ddt_bias)[at] = T(sums.dt_bias);
  }

  void write_group_row(const SsdTensor& tensor, const Task& task, int64_t at, const T* row) {
    T* to = static_cast<T*>(tensor.data) + task.block * args_.dBC_block + at;
    if (row) __builtin_memcpy(to, row, args_.dstate * sizeof(T));
    else __builtin_memset(to, 0, args_.dstate * sizeof(T));
  }

  // Of frames begin … end - 1, what lies behind the sequence.
  void zero_padding(const Task& task, int direction, int64_t begin, int64_t end) {
    const Span span = args_.spans[task.sequence];
    const int64_t length = args_.length(task.sequence);
    for (int64_t t = begin > length ? begin : length; t < end; ++t) {
      for (const SsdTensor* tensor : {&args_.dB, &args_.dC})
        write_group_row(*tensor, task, tensor->at(direction, span.row, span.begin + t, task.group), nullptr);
      for (int h = 0; h < task.heads; ++h)
        static_cast<T*>(args_.ddt.data)[args_.ddt.at(direction, span.row, span.begin + t, task.head + h)] = 0;
    }
  }

  int64_t state_at(const StateRows& part, int row) const {
    return ((part.sequence * args_.heads + part.head) * args_.headdim + part.row + row) * args_.dstate;
  }
  int rows_of(const StateRows& part) const {
    return part.row + part.rows > args_.headdim ? args_.headdim - part.row : part.rows;
  }
  // What pads a state is zero.
  void read_state(const StateRows& part, const void* states, T* state) {
    __builtin_memset(state, 0, int64_t(part.rows) * states_ * sizeof(T));
    for (int p = 0; p < rows_of(part) && states; ++p)
      __builtin_memcpy(state + p * states_, static_cast<const T*>(states) + state_at(part, p), args_.dstate * sizeof(T));
  }
  void write_state(const StateRows& part, const T* state) {
    if (args_.dinitial_states == nullptr) return;
    for (int p = 0; p < rows_of(part); ++p)
      __builtin_memcpy(static_cast<T*>(args_.dinitial_states) + state_at(part, p), state + p * states_, args_.dstate * sizeof(T));
  }

  const SsdBackwardArgs& args_;
  const int width_, states_;  // headdim and dstate, padded
  Result<T> result_;
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
