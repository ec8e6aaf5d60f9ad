// What states, and results, need besides products: to go in and out, from chunk to chunk where a task takes one, and to be
// finished. Nothing here has scratch of its own.
#pragma once

#include "ssd/chunk.h"

namespace linconv::LINCONV_ISA {
namespace {

// Some rows of one head's state, as it is padded: all of them, or a task that passes them from chunk to chunk.
struct StateRows {
  int64_t sequence;
  int direction = 0, head, column, columns;  // columns: of headdim
  int row, rows;

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
    sequence = states.first_sequence() + index / states.ways;
  }
};

// The state that enters a chunk, of one head; of gradients, that leaves it.
template <class T>
inline T* entering(const SsdStates& states, const Task& task, int direction, int64_t chunk, int head) {
  return static_cast<T*>(states.entering) + states.at(task.sequence, chunk, direction, head) * states.size;
}
template <class T>
inline T& decay_of(const SsdStates& states, const Task& task, int direction, int64_t chunk, int head) {
  return static_cast<T*>(states.decays)[states.at(task.sequence, chunk, direction, head)];
}

// That which enters a task's next chunk or head, to be asked for ahead: behind a sequence's last chunk, the next one's first.
template <class T>
inline Ahead next_state(const SsdStates& states, const Task& task, int direction, const Next& next, int rows, int columns) {
  const int64_t place = states.starts[task.sequence] + next.chunk, row = columns * sizeof(T);
  if (place < states.first || place >= states.first + states.count) return {};
  return {entering<T>(states, task, direction, next.chunk, next.head), row, rows, row};
}

// Rows of a state on their way from chunk to chunk.
template <class T>
class PassedRows {
 public:
  PassedRows(const SsdStates& states, const StateRows& part, int columns)
      : states_(states), part_(part), first_(int64_t(part.row) * columns), n_(part.rows * columns) {}

  T* data() { return state_; }
  void carry_in() { __builtin_memcpy(state_, static_cast<const T*>(states_.carried_in) + carried(), n_ * sizeof(T)); }
  void carry_out() const { __builtin_memcpy(static_cast<T*>(states_.carried_out) + carried(), state_, n_ * sizeof(T)); }

  // In place of what a chunk adds, the state that enters it; this becomes the one that leaves it, if anything was added.
  void pass(int64_t chunk, bool added) {
    const int64_t at = states_.at(part_.sequence, chunk, part_.direction, part_.head);
    T* to = static_cast<T*>(states_.entering) + at * states_.size + first_;
    if (!added) {
      __builtin_memcpy(to, state_, n_ * sizeof(T));
      return;
    }
    const Vec<T> decay = splat(static_cast<const T*>(states_.decays)[at]);
    for (int j = 0; j < n_; j += kWidth<T>) {
      const Vec<T> adds = load(to + j), before = load(state_ + j);
      store(to + j, before);
      store(state_ + j, add_product(adds, decay, before));
    }
  }

 private:
  static constexpr int kMostColumns = 256;  // of headdim and dstate
  static_assert(SsdStates::kRows % kPad<T> == 0 && kMostColumns % kPad<T> == 0);

  int64_t carried() const { return states_.at(part_.direction, part_.head) * states_.size + first_; }

  const SsdStates& states_;
  const StateRows& part_;
  const int64_t first_;
  const int n_;
  alignas(64) T state_[SsdStates::kRows * kMostColumns];
};

// Of the forward pass, with stages that take no scratch. Rows of a state are those of dstate.
template <class T>
class ForwardStates {
 public:
  explicit ForwardStates(const SsdForwardArgs& args)
      : args_(args), width_(round_up(args.column_block, kPad<T>)), states_(round_up(args.dstate, kPad<T>)),
        result_(args, args.y, width_) {}

  void run(SsdStage stage, int64_t index) {
    if (stage == SsdStage::kPassed) passed(StateRows(args_, args_.states, states_, index));
    if (stage == SsdStage::kFinished) finished(Task(args_, index, args_.pieces, +1));
  }

 protected:
  void passed(const StateRows& part) {
    const SsdStates& states = args_.states;
    const int64_t chunks = Steps(args_, part.sequence, part.direction).chunks(), end = states.end(part.sequence);
    PassedRows<T> rows(states, part, width_);
    states.begins(part.sequence) ? read_state(part, rows.data()) : rows.carry_in();
    for (int64_t c = states.begin(part.sequence); c < end && c < chunks; ++c)
      rows.pass(c, c + 1 < chunks || args_.final_states);
    states.ends(part.sequence) ? write_state(part, rows.data()) : rows.carry_out();
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
    if (stage == SsdStage::kFinished) finished(Task(args_, index, args_.pieces, +1));
  }

 protected:
  struct Sums {
    double A = 0, D = 0, dt_bias = 0;

    void operator+=(const Sums& other) { A += other.A, D += other.D, dt_bias += other.dt_bias; }
  };

  // The states of all chunks are in memory, so that none is carried in or out.
  void passed(const StateRows& part) {
    const int64_t chunks = Steps(args_, part.sequence, part.direction).chunks();
    PassedRows<T> rows(args_.states, part, states_);
    read_state(part, args_.initial_states, rows.data());
    for (int64_t c = 0; c < chunks; ++c) rows.pass(c, c + 1 < chunks);
  }

  void gradients_passed(const StateRows& part) {
    const SsdStates& states = args_.dstates;
    const int64_t chunks = Steps(args_, part.sequence, part.direction).chunks(), end = states.end(part.sequence);
    PassedRows<T> rows(states, part, states_);
    states.ends(part.sequence) ? read_state(part, args_.dfinal_states, rows.data()) : rows.carry_in();
    for (int64_t c = (end < chunks ? end : chunks) - 1; c >= states.begin(part.sequence); --c) rows.pass(c, leaves(c));
    states.begins(part.sequence) ? write_state(part, rows.data()) : rows.carry_out();
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
          const double* of_chunk = sums_of(task.sequence, c, direction, task.head + h);
          sums += {of_chunk[0], of_chunk[1], of_chunk[2]};
        }
        write_sums(task.sequence, direction, task.head + h, sums);
      }
    }
    result_.finish(task, begin, end);
  }

  // Whether the gradient of the state that enters a chunk is wanted.
  bool leaves(int64_t c) const { return c > 0 || args_.dinitial_states; }

  double* sums_of(int64_t sequence, int64_t chunk, int direction, int head) const {
    const int64_t place = args_.states.starts[sequence] + chunk;
    return args_.sums + ((place * args_.directions + direction) * args_.heads + head) * 3;
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
