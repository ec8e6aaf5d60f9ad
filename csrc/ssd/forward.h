// Forward scan: one sweep over the chunks of a sequence, with the states of a few heads in cache; or, chunk by chunk, with
// the states of all in memory.
#pragma once

#include "ssd/states.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
class Forward : public ForwardStates<T> {
 public:
  Forward(const SsdForwardArgs& args, SsdStage stage)
      : ForwardStates<T>(args), whole_(stage == SsdStage::kWhole), arena_(bytes()) {
    B_ = arena_.template take<T>(kQ * states_);
    C_ = arena_.template take<T>(kQ * states_);
    B_by_state_ = arena_.template take<T>(states_ * kQ);
    scores_ = arena_.template take<T>(kQ * kQ);
    weights_ = arena_.template take<T>(kQ * kQ);
    x_ = arena_.template take<T>((kQ + 1) * width_);
    weighted_x_ = arena_.template take<T>(kQ * width_);
    y_ = arena_.template take<T>(kQ * width_);
    state_ = arena_.template take<T>(own_states() * state_size());
    result_.set_scratch(arena_.template take<T>(result_.scratch_size()));
  }

  void run(SsdStage stage, int64_t index) {
    switch (stage) {
      case SsdStage::kWhole: return whole(Task(args_, index));
      case SsdStage::kAdded: return added(Task(args_, index, args_.states, +1));
      case SsdStage::kResults: return results(Task(args_, index, args_.states, +1));
      default: __builtin_trap();
    }
  }

 private:
  using ForwardStates<T>::args_, ForwardStates<T>::width_, ForwardStates<T>::states_, ForwardStates<T>::result_;
  using ForwardStates<T>::read_state, ForwardStates<T>::write_state;

  int64_t own_states() const { return whole_ ? args_.head_block : 0; }
  int64_t state_size() const { return int64_t(states_) * width_; }
  size_t bytes() const {
    return 3 * Arena::bytes<T>(kQ * states_) + 2 * Arena::bytes<T>(kQ * kQ) + 3 * Arena::bytes<T>((kQ + 1) * width_) +
           Arena::bytes<T>(own_states() * state_size()) + Arena::bytes<T>(result_.scratch_size());
  }

  void whole(const Task& task) {
    for (int d = 0; d < task.directions; ++d) {
      const int direction = task.first_direction + d;
      const Steps steps(args_, task.sequence, direction);
      for (int h = 0; h < task.heads; ++h) read_state({task, h, states_}, state_ + h * state_size());
      for (int64_t c = 0; c < steps.chunks(); ++c) chunk(task, direction, steps, c);
      for (int h = 0; h < task.heads; ++h) write_state({task, h, states_}, state_ + h * state_size());
    }
    result_.finish(task, 0, args_.length(task.sequence) + args_.padding(task.sequence));
  }

  // In place of the state that enters each chunk, what it adds to the one that leaves it.
  void added(const Task& task) {
    const int direction = task.first_direction;
    const Steps steps(args_, task.sequence, direction);
    const int64_t c = task.chunk;
    if (!adds(steps, c)) return;
    const int count = steps.count(c);
    read_rows(args_.B, steps, direction, task.group, c * kQ, count, round_up(count, kTileRows), 0, args_.dstate, states_, B_);
    for (int h = 0; h < task.heads; ++h) {
      const int head = task.head + h;
      decays_.read(args_, steps, direction, head, c * kQ, count);
      read_rows(args_.x, steps, direction, head, c * kQ, count, count, task.column, task.columns, width_, x_);
      add<Update::kStore>(count, entering<T>(args_.states, task, direction, c, head), next_x(task, direction, steps, c, h));
      decay_of<T>(args_.states, task, direction, c, head) = decays_.whole;
    }
  }

  void results(const Task& task) {
    const Steps steps(args_, task.sequence, task.first_direction);
    if (task.chunk < steps.chunks()) chunk(task, task.first_direction, steps, task.chunk);
  }

  bool adds(const Steps& steps, int64_t c) const {
    return c + 1 < steps.chunks() || (c < steps.chunks() && args_.final_states != nullptr);
  }

  void chunk(const Task& task, int direction, const Steps& steps, int64_t c) {
    const ResultRows<T> rows = result_.rows(task);
    const bool summed = args_.summed && direction > 0;             // to what the other direction left there
    const bool entered = c > 0 || args_.initial_states != nullptr;  // whether the state may differ from zero
    const int count = steps.count(c), tiled = round_up(count, kTileRows);
    read_rows(args_.B, steps, direction, task.group, c * kQ, count, tiled, 0, args_.dstate, states_, B_);
    read_rows(args_.C, steps, direction, task.group, c * kQ, count, tiled, 0, args_.dstate, states_, C_);
    transpose(B_, states_, kQ, states_, B_by_state_, kQ);
    gemm<T, Update::kStore, Triangle::kResult>(tiled, kQ, states_, {C_, states_, 1}, B_by_state_, kQ, scores_, kQ);
    for (int h = 0; h < task.heads; ++h) {
      const int head = task.head + h;
      T* state = whole_ ? state_ + h * state_size() : entering<T>(args_.states, task, direction, c, head);
      decays_.read(args_, steps, direction, head, c * kQ, count);
      // A shifted result lands one step later, on the skip of that step: one more frame is needed.
      const T skip = skip_of<T>(args_, direction, head);
      const int64_t remaining = steps.length - c * kQ;
      const int with_next = args_.shifted && remaining > count ? count + 1 : count;
      read_rows(args_.x, steps, direction, head, c * kQ, with_next, kQ + 1, task.column, task.columns, width_, x_);
      weigh_scores(count, args_.direction[direction].strict, args_.shifted ? T(0) : skip);
      // Y = diag(e^p) C S + weights X
      const Strided<T> weights{weights_, kQ, 1};
      if (entered) {
        gemm<T, Update::kScaleRows, Triangle::kNone>(tiled, width_, states_, {C_, states_, 1}, state, width_, y_, width_,
                                                     whole_ ? rows.ahead(h, steps, c, task.columns)
                                                            : next_x(task, direction, steps, c, h),
                                                     {.rows = decays_.start});
        gemm<T, Update::kAdd, Triangle::kLeft>(
            tiled, width_, count, weights, x_, width_, y_, width_,
            whole_ ? next_BC(args_, task, steps, direction, c + 1, h)
                   : next_state<T>(args_.states, task, direction, Next(task, c, h, +1), states_, width_));
      } else {
        gemm<T, Update::kStore, Triangle::kLeft>(tiled, width_, count, weights, x_, width_, y_, width_);
      }
      if (args_.shifted) {
        add_scaled(skip, x_ + width_, (with_next - 1) * width_, y_);
        if (c == 0) {
          for (int p = 0; p < width_; ++p) weighted_x_[p] = skip * x_[p];
          rows.put(summed, h, steps.frame(0), weighted_x_, task.columns);
        }
      }
      for (int i = 0; i < with_next - args_.shifted; ++i)
        rows.put(summed, h, steps.frame(c * kQ + i + args_.shifted), y_ + i * width_, task.columns);
      if (whole_ && adds(steps, c)) add<Update::kDecay>(count, state, next_x(task, direction, steps, c, h));
    }
  }

  // S = B^T diag(e^{p_last - p} dt) X, plus e^{p_last} S where it is kDecay
  template <Update update>
  void add(int count, T* state, Ahead ahead) {
    for (int i = 0; i < count; ++i)
      for (int p = 0; p < width_; ++p) weighted_x_[i * width_ + p] = decays_.end_dt[i] * x_[i * width_ + p];
    gemm<T, update, Triangle::kNone>(states_, width_, count, {B_, 1, states_}, weighted_x_, width_, state, width_, ahead,
                                     {.old = state, .decay = decays_.whole});
  }

  Ahead next_x(const Task& task, int direction, const Steps& steps, int64_t c, int h) const {
    const Next next(task, c, h, +1);
    return rows_ahead(args_.x, steps, direction, next.head, next.chunk, task.column, task.columns);
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

  const bool whole_;
  Arena arena_;
  Decays<T> decays_;
  T *B_, *C_, *B_by_state_;  // (kQ, states) twice, (states, kQ)
  T *scores_, *weights_;     // (kQ, kQ): C B^T; with the decays of one head
  T *x_, *weighted_x_, *y_;  // (kQ, width); x_ has one row more
  T* state_;                 // (head_block, states, width), where a task takes all frames
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
