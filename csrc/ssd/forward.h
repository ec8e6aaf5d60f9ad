// Forward scan: one sweep over the chunks of a sequence, with the states of a few heads in cache.
#pragma once

#include "ssd/chunk.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
class Forward {
 public:
  explicit Forward(const SsdForwardArgs& args)
      : args_(args), width_(round_up(args.column_block, kPad<T>)), states_(round_up(args.dstate, kPad<T>)),
        result_(args, args.y, width_), arena_(bytes()) {
    B_ = arena_.template take<T>(kQ * states_);
    C_ = arena_.template take<T>(kQ * states_);
    B_by_state_ = arena_.template take<T>(states_ * kQ);
    scores_ = arena_.template take<T>(kQ * kQ);
    weights_ = arena_.template take<T>(kQ * kQ);
    x_ = arena_.template take<T>((kQ + 1) * width_);
    weighted_x_ = arena_.template take<T>(kQ * width_);
    y_ = arena_.template take<T>(kQ * width_);
    state_ = arena_.template take<T>(args.head_block * states_ * width_);
    result_.set_scratch(arena_.template take<T>(result_.scratch_size()));
  }

  void run(const Task& task) {
    const ResultRows<T> rows = result_.rows(task);
    for (int d = 0; d < task.directions; ++d) sweep(task, task.first_direction + d, d > 0, rows);
    result_.finish(task);
  }

 private:
  size_t bytes() const {
    return 3 * Arena::bytes<T>(kQ * states_) + 2 * Arena::bytes<T>(kQ * kQ) + 3 * Arena::bytes<T>((kQ + 1) * width_) +
           Arena::bytes<T>(args_.head_block * states_ * width_) + Arena::bytes<T>(result_.scratch_size());
  }

  void sweep(const Task& task, int direction, bool add, const ResultRows<T>& rows) {
    const Steps steps(args_, task.sequence, direction);
    bool entered = args_.initial_states != nullptr;  // whether the state may differ from zero
    for (int h = 0; h < task.heads; ++h) read_state(task, h);
    for (int64_t c = 0; c < steps.chunks(); ++c) {
      const int count = steps.count(c), tiled = round_up(count, kTileRows);
      read_rows(args_.B, steps, direction, task.group, c * kQ, count, tiled, 0, args_.dstate, states_, B_);
      read_rows(args_.C, steps, direction, task.group, c * kQ, count, tiled, 0, args_.dstate, states_, C_);
      transpose(B_, states_, kQ, states_, B_by_state_, kQ);
      gemm<T, Update::kStore, Triangle::kResult>(tiled, kQ, states_, {C_, states_, 1}, B_by_state_, kQ, scores_, kQ);
      const bool leaves = args_.final_states != nullptr || c + 1 < steps.chunks();
      for (int h = 0; h < task.heads; ++h) {
        const int head = task.head + h;
        T* state = state_ + h * states_ * width_;
        decays_.read(args_, steps, direction, head, c * kQ, count);
        // A shifted result lands one step later, on the skip of that step: one more frame is needed.
        const T skip = skip_of<T>(args_, direction, head);
        const int64_t remaining = steps.length - c * kQ;
        const int with_next = args_.shifted && remaining > count ? count + 1 : count;
        read_rows(args_.x, steps, direction, head, c * kQ, with_next, kQ + 1, task.column, task.columns, width_, x_);
        weigh_scores(count, args_.direction[direction].strict, args_.shifted ? T(0) : skip);
        // Y = diag(e^p) C S + weights X
        const Strided<T> weights{weights_, kQ, 1};
        const Next next(task, c, h, +1);
        if (entered) {
          gemm<T, Update::kScaleRows, Triangle::kNone>(tiled, width_, states_, {C_, states_, 1}, state, width_, y_, width_,
                                                       rows.ahead(h, steps, c, task.columns), {.rows = decays_.start});
          gemm<T, Update::kAdd, Triangle::kLeft>(tiled, width_, count, weights, x_, width_, y_, width_,
                                                 next_BC(args_, task, steps, direction, c + 1, h));
        } else {
          gemm<T, Update::kStore, Triangle::kLeft>(tiled, width_, count, weights, x_, width_, y_, width_);
        }
        if (args_.shifted) {
          add_scaled(skip, x_ + width_, (with_next - 1) * width_, y_);
          if (c == 0) {
            for (int p = 0; p < width_; ++p) weighted_x_[p] = skip * x_[p];
            rows.put(add, h, steps.frame(0), weighted_x_, task.columns);
          }
        }
        for (int i = 0; i < with_next - args_.shifted; ++i)
          rows.put(add, h, steps.frame(c * kQ + i + args_.shifted), y_ + i * width_, task.columns);
        if (!leaves) continue;
        // S = e^{p_last} S + B^T diag(e^{p_last - p} dt) X
        for (int i = 0; i < count; ++i)
          for (int p = 0; p < width_; ++p) weighted_x_[i * width_ + p] = decays_.end_dt[i] * x_[i * width_ + p];
        gemm<T, Update::kDecay, Triangle::kNone>(states_, width_, count, {B_, 1, states_}, weighted_x_, width_, state, width_,
                                                 rows_ahead(args_.x, steps, direction, next.head, next.chunk, task.column,
                                                            task.columns),
                                                 {.old = state, .decay = decays_.whole});
      }
      entered = true;
    }
    if (args_.final_states)
      for (int h = 0; h < task.heads; ++h) write_state(task, h);
  }

  // weights[i][j] = e^{p_i - p_j} dt_j scores[i][j] for the steps j that step i sees, and the skip on the diagonal.
  void weigh_scores(int count, bool strict, T skip) {
    for (int i = 0; i < count; ++i) {
      const int visible = strict ? i : i + 1;
      T* weights = weights_ + i * kQ;
      int j = 0;
      for (; j < visible; j += kWidth<T>) {
        const Vec<T> weight = decay_between(decays_, i, j) * load(decays_.dt + j) * load(scores_ + i * kQ + j);
        store(weights + j, where_visible<T>(j, visible, weight));
      }
      for (; j < kQ; j += kWidth<T>) store(weights + j, Vec<T>{});
      weights[i] += skip;
    }
  }

  int64_t state_at(const Task& task, int h, int p) const {
    return ((task.sequence * args_.heads + task.head + h) * args_.headdim + task.column + p) * args_.dstate;
  }
  void read_state(const Task& task, int h) {
    T* state = state_ + h * states_ * width_;
    const T* from = static_cast<const T*>(args_.initial_states);
    for (int64_t i = 0; i < int64_t(states_) * width_; ++i) state[i] = 0;
    for (int p = 0; p < task.columns && from; ++p)
      for (int n = 0; n < args_.dstate; ++n) state[n * width_ + p] = from[state_at(task, h, p) + n];
  }
  void write_state(const Task& task, int h) {
    const T* state = state_ + h * states_ * width_;
    T* to = static_cast<T*>(args_.final_states);
    for (int p = 0; p < task.columns; ++p)
      for (int n = 0; n < args_.dstate; ++n) to[state_at(task, h, p) + n] = state[n * width_ + p];
  }

  const SsdForwardArgs& args_;
  const int width_, states_;  // columns of x and of B, padded
  Result<T> result_;
  Arena arena_;
  Decays<T> decays_;
  T *B_, *C_, *B_by_state_;  // (kQ, states) twice, (states, kQ)
  T *scores_, *weights_;     // (kQ, kQ): C B^T; with the decays of one head
  T *x_, *weighted_x_, *y_;  // (kQ, width); x_ has one row more
  T* state_;                 // (head_block, states, width)
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
