// Backward scan: the states are computed again, then one sweep against time carries the gradient of the state; or, chunk by
// chunk, with both in memory.
//
// States are held transposed, (headdim, dstate), so that every product below has its vectors along adjacent memory.
// The gradient of the log decay a_t = dt_t A telescopes: it is that of step t + 1, plus what row t of the output gained
// from all steps before, less what step t gave to all rows behind it.
#pragma once

#include <initializer_list>

#include "ssd/states.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
class Backward : public BackwardStates<T> {
 public:
  Backward(const SsdBackwardArgs& args, SsdStage stage)
      : BackwardStates<T>(args), whole_(stage == SsdStage::kWhole), arena_(bytes()) {
    for (T** rows : {&B_, &C_, &dB_, &dC_, &product_}) *rows = arena_.template take<T>(kQ * states_);
    B_by_state_ = arena_.template take<T>(states_ * kQ);
    for (T** square : {&scores_, &weights_, &dscores_, &dweights_}) *square = arena_.template take<T>(kQ * kQ);
    for (T** rows : {&x_, &scaled_, &dx_}) *rows = arena_.template take<T>(kQ * width_);
    dy_at_step_ = arena_.template take<T>((kQ + 1) * width_);
    dy_ = dy_at_step_ + args.shifted * width_;
    for (T** columns : {&x_by_column_, &dx_by_column_}) *columns = arena_.template take<T>(width_ * kQ);
    dstate_ = arena_.template take<T>(own_states());
    saved_ = arena_.template take<T>(longest_chunks() * own_states());
    result_.set_scratch(arena_.template take<T>(result_.scratch_size()));
  }

  void run(SsdStage stage, int64_t index) {
    switch (stage) {
      case SsdStage::kWhole: return whole(Task(args_, index));
      case SsdStage::kAdded: return added(Task(args_, index, args_.states, +1));
      case SsdStage::kGradientsAdded: return gradients_added(Task(args_, index, args_.dstates, -1));
      case SsdStage::kResults: return results(Task(args_, index, args_.dstates, -1));
      default: __builtin_trap();
    }
  }

 private:
  using Base = BackwardStates<T>;
  using Sums = typename Base::Sums;
  using Base::args_, Base::width_, Base::states_, Base::result_;
  using Base::leaves, Base::read_state, Base::sums_of, Base::write_group_row, Base::write_state, Base::write_sums, Base::zero_padding;

  int64_t state_size() const { return int64_t(width_) * states_; }
  int64_t own_states() const { return whole_ ? args_.head_block * state_size() : 0; }
  int64_t longest_chunks() const { return args_.chunks_of(args_.longest()); }
  size_t bytes() const {
    return 6 * Arena::bytes<T>(kQ * states_) + 4 * Arena::bytes<T>(kQ * kQ) + 6 * Arena::bytes<T>((kQ + 1) * width_) +
           Arena::bytes<T>(own_states()) + Arena::bytes<T>(longest_chunks() * own_states()) +
           Arena::bytes<T>(result_.scratch_size());
  }

  void whole(const Task& task) {
    const int64_t length = args_.length(task.sequence), frames = length + args_.padding(task.sequence);
    for (int d = 0; d < task.directions; ++d) {
      const int direction = task.first_direction + d;
      const Steps steps(args_, task.sequence, direction);
      Sums sums[kSsdBackwardHeads];
      save_states(task, direction, steps);
      for (int h = 0; h < task.heads; ++h) read_state({task, h, width_}, args_.dfinal_states, dstate_ + h * state_size());
      for (int64_t c = steps.chunks() - 1; c >= 0; --c) {
        Sums of_chunk[kSsdBackwardHeads];  // added up as where a task takes one chunk
        chunk(task, direction, steps, c, of_chunk);
        for (int h = 0; h < task.heads; ++h) sums[h] += of_chunk[h];
      }
      for (int h = 0; h < task.heads; ++h) {
        write_sums(task.sequence, direction, task.head + h, sums[h]);
        write_state({task, h, width_}, dstate_ + h * state_size());
      }
      zero_padding(task, direction, length, frames);
    }
    result_.finish(task, 0, frames);
  }

  // In place of the state that enters each chunk, what it adds to the one that leaves it.
  void added(const Task& task) {
    const int direction = task.first_direction;
    const Steps steps(args_, task.sequence, direction);
    const int64_t c = task.chunk;
    if (c + 1 >= steps.chunks()) return;
    read_rows(args_.B, steps, direction, task.group, c * kQ, kQ, kQ, 0, args_.dstate, states_, B_);
    for (int h = 0; h < task.heads; ++h) {
      T* state = entering<T>(args_.states, task, direction, c, task.head + h);
      add_to_state<Update::kStore>(task, direction, steps, c, h, nullptr, state);
      decay_of<T>(args_.states, task, direction, c, task.head + h) = decays_.whole;
    }
  }

  void gradients_added(const Task& task) {
    const int direction = task.first_direction;
    const Steps steps(args_, task.sequence, direction);
    const int64_t c = task.chunk;
    if (c >= steps.chunks() || !leaves(c)) return;
    const int count = steps.count(c);
    read_rows(args_.C, steps, direction, task.group, c * kQ, count, round_up(count, kTileRows), 0, args_.dstate, states_, C_);
    for (int h = 0; h < task.heads; ++h) {
      decays_.read(args_, steps, direction, task.head + h, c * kQ, count);
      read_dy(task, direction, steps, c, h);
      add_to_gradient<Update::kStore>(count, entering<T>(args_.dstates, task, direction, c, task.head + h));
      decay_of<T>(args_.dstates, task, direction, c, task.head + h) = decays_.whole;
    }
  }

  void results(const Task& task) {
    const int direction = task.first_direction;
    const Steps steps(args_, task.sequence, direction);
    if (task.chunk >= steps.chunks()) return;
    Sums sums[kSsdBackwardHeads];
    chunk(task, direction, steps, task.chunk, sums);
    for (int h = 0; h < task.heads; ++h) {
      double* to = sums_of(task.sequence, task.chunk, direction, task.head + h);
      to[0] = sums[h].A, to[1] = sums[h].D, to[2] = sums[h].dt_bias;
    }
  }

  T* saved(const Task& task, int direction, int64_t chunk, int h) const {
    if (whole_) return saved_ + (chunk * args_.head_block + h) * state_size();
    return entering<T>(args_.states, task, direction, chunk, task.head + h);
  }
  T* gradient(const Task& task, int direction, int64_t chunk, int h) const {
    if (whole_) return dstate_ + h * state_size();
    return entering<T>(args_.dstates, task, direction, chunk, task.head + h);
  }

  void save_states(const Task& task, int direction, const Steps& steps) {
    for (int h = 0; h < task.heads && steps.length > 0; ++h)
      read_state({task, h, width_}, args_.initial_states, saved(task, direction, 0, h));
    for (int64_t c = 0; c + 1 < steps.chunks(); ++c) {
      read_rows(args_.B, steps, direction, task.group, c * kQ, kQ, kQ, 0, args_.dstate, states_, B_);
      for (int h = 0; h < task.heads; ++h)
        add_to_state<Update::kDecay>(task, direction, steps, c, h, saved(task, direction, c, h), saved(task, direction, c + 1, h));
    }
  }

  // S = X^T diag(e^{p_last - p} dt) B, plus e^{p_last} of an older S where it is kDecay; of a whole chunk whose B is read.
  template <Update update>
  void add_to_state(const Task& task, int direction, const Steps& steps, int64_t c, int h, const T* old, T* state) {
    decays_.read(args_, steps, direction, task.head + h, c * kQ, kQ);
    read_rows(args_.x, steps, direction, task.head + h, c * kQ, kQ, kQ, 0, args_.headdim, width_, x_);
    scale_rows(kQ, decays_.end_dt, x_);
    gemm<T, update, Triangle::kNone>(width_, states_, kQ, {scaled_, 1, width_}, B_, states_, state, states_,
                                     next_x(steps, direction, Next(task, c, h, +1)), {.old = old, .decay = decays_.whole});
  }

  // dS = dY^T diag(e^p) C, plus e^{p_last} dS where it is kDecay.
  template <Update update>
  void add_to_gradient(int count, T* dstate) {
    scale_rows(count, decays_.start, dy_);
    gemm<T, update, Triangle::kNone>(width_, states_, count, {scaled_, 1, width_}, C_, states_, dstate, states_, {},
                                     {.old = dstate, .decay = decays_.whole});
  }

  // The shifted output of a step lies one step later, and that of the last step nowhere.
  void read_dy(const Task& task, int direction, const Steps& steps, int64_t c, int h) {
    const int count = steps.count(c);
    const int outputs = args_.shifted && steps.length - c * kQ > count ? count + 1 : count;
    read_rows(args_.dy, steps, direction, task.head + h, c * kQ, outputs, kQ + 1, 0, args_.headdim, width_, dy_at_step_);
  }

  // What one chunk's frames get, and what it adds to the sums of each head.
  void chunk(const Task& task, int direction, const Steps& steps, int64_t c, Sums* sums) {
    const ResultRows<T> rows = result_.rows(task);
    const bool summed = args_.summed && direction > 0;  // to what the other direction left there
    const int count = steps.count(c), tiled = round_up(count, kTileRows);
    const int64_t first = c * kQ;
    const bool entered = c > 0 || args_.initial_states;                      // the state entering may not be zero
    const bool left = c + 1 < steps.chunks() || args_.dfinal_states;         // the gradient coming in may not be zero
    read_rows(args_.B, steps, direction, task.group, first, count, tiled, 0, args_.dstate, states_, B_);
    read_rows(args_.C, steps, direction, task.group, first, count, tiled, 0, args_.dstate, states_, C_);
    transpose(B_, states_, kQ, states_, B_by_state_, kQ);
    gemm<T, Update::kStore, Triangle::kResult>(tiled, kQ, states_, {C_, states_, 1}, B_by_state_, kQ, scores_, kQ);
    zero(dscores_, kQ * kQ);
    zero(dB_, kQ * states_);
    zero(dC_, kQ * states_);
    for (int h = 0; h < task.heads; ++h) {
      const int head = task.head + h;
      T* dstate = gradient(task, direction, c, h);
      const T* state = saved(task, direction, c, h);
      decays_.read(args_, steps, direction, head, first, count);
      read_rows(args_.x, steps, direction, head, first, count, kQ, 0, args_.headdim, width_, x_);
      read_dy(task, direction, steps, c, h);
      const Next next(task, c, h, -1);
      transpose(x_, width_, kQ, width_, x_by_column_, kQ);
      gemm<T, Update::kStore, Triangle::kResult>(tiled, kQ, args_.headdim, {dy_, width_, 1}, x_by_column_, kQ, dweights_, kQ,
                                                 whole_ ? rows.ahead(h, steps, c, task.columns)
                                                        : next_state<T>(args_.dstates, task, direction, next, width_, states_));
      const T skip = skip_of<T>(args_, direction, head);
      const double skip_gradient = weigh(count, args_.direction[direction].strict, args_.shifted ? T(0) : skip);
      sums[h].D += args_.shifted ? dot(x_, dy_at_step_, count * width_) : skip_gradient;

      // dX^T = dS^T B^T diag(e^{p_last - p} dt) + dY^T weights
      const Strided<T> dy_by_column{dy_, 1, width_};
      if (left) {
        gemm<T, Update::kStore, Triangle::kNone>(width_, kQ, args_.dstate, {dstate, states_, 1}, B_by_state_, kQ,
                                                 dx_by_column_, kQ, next_x(steps, direction, next));
        for (int p = 0; p < width_; ++p)
          for (int j = 0; j < kQ; ++j) dx_by_column_[p * kQ + j] *= decays_.end_dt[j];
        gemm<T, Update::kAdd, Triangle::kRight>(width_, kQ, count, dy_by_column, weights_, kQ, dx_by_column_, kQ,
                                                rows_ahead(args_.dy, steps, direction, next.head, next.chunk, 0, args_.headdim));
      } else {
        gemm<T, Update::kStore, Triangle::kRight>(width_, kQ, count, dy_by_column, weights_, kQ, dx_by_column_, kQ);
      }
      transpose(dx_by_column_, kQ, width_, kQ, dx_, width_);
      if (args_.shifted) add_scaled(skip, dy_at_step_, count * width_, dx_);
      for (int i = 0; i < count; ++i) rows.put(summed, h, steps.frame(first + i), dx_ + i * width_, task.columns);

      // What the states gave: dC += diag(e^p) dY S^T, dB += diag(e^{p_last - p} dt) X dS^T, and both against C and B.
      from_state(entered, count, tiled, dy_, state, C_, decays_.start, dC_, from_C_, next_saved(task, direction, next));
      from_state(left, count, tiled, x_, dstate, B_, decays_.end_dt, dB_, from_B_, next_BC(args_, task, steps, direction, c - 1, h));
      const T carried = entered && left ? decays_.whole * dot(state, dstate, state_size()) : 0;
      gradient_of_steps(task, direction, steps, first, count, h, carried, sums[h]);

      if (whole_ && leaves(c)) add_to_gradient<Update::kDecay>(count, dstate);
    }
    gemm<T, Update::kAdd, Triangle::kLeft>(tiled, states_, count, {dscores_, kQ, 1}, B_, states_, dC_, states_);
    gemm<T, Update::kAdd, Triangle::kTransposed>(tiled, states_, count, {dscores_, 1, kQ}, C_, states_, dB_, states_);
    for (int i = 0; i < count; ++i) {
      write_group_row(args_.dB, task, steps.at(args_.dB, direction, task.group, first + i), dB_ + i * states_);
      write_group_row(args_.dC, task, steps.at(args_.dC, direction, task.group, first + i), dC_ + i * states_);
    }
  }

  Ahead next_x(const Steps& steps, int direction, const Next& next) const {
    return rows_ahead(args_.x, steps, direction, next.head, next.chunk, 0, args_.headdim);
  }
  Ahead next_saved(const Task& task, int direction, const Next& next) const {
    if (!whole_) return next_state<T>(args_.states, task, direction, next, width_, states_);
    if (next.chunk < 0) return {};
    const int64_t row = states_ * sizeof(T);
    return {saved(task, direction, next.chunk, next.h), row, width_, row};
  }

  double gave_at(int j) const {
    const int lane = j % kWidth<T>;
    return gave_[j / kWidth<T>].part[lane / kWidth<double>][lane % kWidth<double>];
  }

  // From dweights: the weights themselves, dscores, and what each row gained and each column gave through the decays.
  // Returns the sum of the diagonal of dweights, the gradient of a skip that stands there.
  double weigh(int count, bool strict, T skip) {
    for (auto& gave : gave_) gave = {};
    double diagonal = 0;
    for (int i = 0; i < count; ++i) {
      const int visible = strict ? i : i + 1;
      Wide<T> gained;
      int j = 0;
      for (; j < visible; j += kWidth<T>) {
        const int64_t at = i * kQ + j;
        const Vec<T> decay = decay_between(decays_, i, j), dt = load(decays_.dt + j), score = load(scores_ + at);
        const Vec<T> flow = where_visible<T>(j, visible, decay * load(dweights_ + at));
        const Vec<T> through = where_visible<T>(j, visible, flow * score);
        store(weights_ + at, where_visible<T>(j, visible, decay * dt * score));
        store(dscores_ + at, load(dscores_ + at) + flow * dt);
        gave_[j / kWidth<T>].add(through);
        gained.add(through * dt);
      }
      for (; j < kQ; j += kWidth<T>) store(weights_ + i * kQ + j, Vec<T>{});
      gained_[i] = gained.sum();
      weights_[i * kQ + i] += skip;
      diagonal += dweights_[i * kQ + i];
    }
    return diagonal;
  }

  // product = rows state; into += diag(scale) product; against[i] = row i of product . row i of factor.
  void from_state(bool nonzero, int count, int tiled, const T* rows, const T* state, const T* factor, const T* scale, T* into,
                  T* against, Ahead ahead) {
    zero(against, kQ);
    if (!nonzero) return;
    gemm<T, Update::kStore, Triangle::kNone>(tiled, states_, args_.headdim, {rows, width_, 1}, state, states_, product_, states_,
                                             ahead);
    for (int i = 0; i < count; ++i) {
      const Vec<T> factor_scale = splat(scale[i]);
      Vec<T> total{};
      for (int n = i * states_; n < (i + 1) * states_; n += kWidth<T>) {
        const Vec<T> product = load(product_ + n);
        total += product * load(factor + n);
        store(into + n, load(into + n) + factor_scale * product);
      }
      against[i] = sum(total);
    }
  }

  // In double, as the sums gained and gave: what is rounded off log_decay at one step would be missing from the gradients
  // of all steps before it, and what one row gained, columns gave.
  void gradient_of_steps(const Task& task, int direction, const Steps& steps, int64_t first, int count, int h, T carried,
                         Sums& sums) {
    double log_decay = carried;
    for (int i = 0; i < count; ++i) log_decay += double(decays_.end_dt[i]) * from_B_[i];
    for (int i = count - 1; i >= 0; --i) {
      const double gained = gained_[i] + double(decays_.start[i]) * from_C_[i], gave = gave_at(i);
      log_decay += gained - decays_.dt[i] * gave - double(decays_.end_dt[i]) * from_B_[i];
      sums.A += decays_.dt[i] * log_decay;
      T gradient = T(gave + decays_.end[i] * from_B_[i] + decays_.A * log_decay);
      if (decays_.free[i] != decays_.dt[i]) gradient = 0;  // clamped
      if (args_.dt_softplus) gradient *= sigmoid(decays_.raw[i]);
      sums.dt_bias += gradient;
      static_cast<T*>(args_.ddt.data)[steps.at(args_.ddt, direction, task.head + h, first + i)] = gradient;
    }
  }

  void scale_rows(int count, const T* scales, const T* rows) {
    for (int i = 0; i < count; ++i)
      for (int p = 0; p < width_; ++p) scaled_[i * width_ + p] = scales[i] * rows[i * width_ + p];
  }
  static T dot(const T* a, const T* b, int64_t n) {
    Vec<T> total{};
    for (int64_t i = 0; i < n; i += kWidth<T>) total += load(a + i) * load(b + i);
    return sum(total);
  }
  static void zero(T* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(T)); }

  const bool whole_;
  Arena arena_;
  Decays<T> decays_;
  T *B_, *C_, *dB_, *dC_, *product_;                 // (kQ, states)
  T* B_by_state_;                                    // (states, kQ)
  T *scores_, *weights_, *dscores_, *dweights_;      // (kQ, kQ)
  T *x_, *scaled_, *dx_;                             // (kQ, width)
  T *dy_at_step_, *dy_;                              // (kQ + 1, width): of each frame; of each step's own result
  T *x_by_column_, *dx_by_column_;                   // (width, kQ)
  T *dstate_, *saved_;  // (head_block, width, states); the same per chunk: where a task takes all frames
  alignas(64) T from_C_[kQ], from_B_[kQ];
  double gained_[kQ];          // see gradient_of_steps
  Wide<T> gave_[kQ / kWidth<T>];  // likewise, frame by frame
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
