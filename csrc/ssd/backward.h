// Backward scan: the states are computed again, then one sweep against time carries the gradient of the state.
//
// States are held transposed, (headdim, dstate), so that every product below has its vectors along adjacent memory.
// The gradient of the log decay a_t = dt_t A telescopes: it is that of step t + 1, plus what row t of the output gained
// from all steps before, less what step t gave to all rows behind it.
#pragma once

#include <initializer_list>

#include "ssd/chunk.h"

namespace linconv::LINCONV_ISA {
namespace {

template <class T>
class Backward {
 public:
  explicit Backward(const SsdBackwardArgs& args)
      : args_(args), width_(round_up(args.headdim, kPad<T>)), states_(round_up(args.dstate, kPad<T>)),
        result_(args, args.dx, width_), arena_(bytes()) {
    for (T** rows : {&B_, &C_, &dB_, &dC_, &product_}) *rows = arena_.template take<T>(kQ * states_);
    B_by_state_ = arena_.template take<T>(states_ * kQ);
    for (T** square : {&scores_, &weights_, &dscores_, &dweights_}) *square = arena_.template take<T>(kQ * kQ);
    for (T** rows : {&x_, &scaled_, &dx_}) *rows = arena_.template take<T>(kQ * width_);
    dy_at_step_ = arena_.template take<T>((kQ + 1) * width_);
    dy_ = dy_at_step_ + args.shifted * width_;
    for (T** columns : {&x_by_column_, &dx_by_column_}) *columns = arena_.template take<T>(width_ * kQ);
    dstate_ = arena_.template take<T>(args.head_block * state_size());
    saved_ = arena_.template take<T>(longest_chunks() * args.head_block * state_size());
    result_.set_scratch(arena_.template take<T>(result_.scratch_size()));
  }

  void run(const Task& task) {
    const ResultRows<T> rows = result_.rows(task);
    for (int d = 0; d < task.directions; ++d) {
      const int direction = task.first_direction + d;
      const Steps steps(args_, task.sequence, direction);
      for (int h = 0; h < task.heads; ++h) sums_[h] = {};
      save_states(task, direction, steps);
      for (int h = 0; h < task.heads; ++h) read_state(task, h, args_.dfinal_states, dstate_ + h * state_size());
      for (int64_t c = steps.chunks() - 1; c >= 0; --c) chunk(task, direction, steps, c, d > 0, rows);
      write_sums(task, direction);
      zero_padding(task, direction);
      for (int h = 0; h < task.heads; ++h) write_state(task, h, dstate_ + h * state_size());
    }
    result_.finish(task);
  }

 private:
  struct Sums {
    double A, D, dt_bias;
  };

  int64_t state_size() const { return int64_t(width_) * states_; }
  int64_t longest_chunks() const { return (args_.longest() + kQ - 1) / kQ; }
  size_t bytes() const {
    return 6 * Arena::bytes<T>(kQ * states_) + 4 * Arena::bytes<T>(kQ * kQ) + 6 * Arena::bytes<T>((kQ + 1) * width_) +
           Arena::bytes<T>(args_.head_block * state_size()) +
           Arena::bytes<T>(longest_chunks() * args_.head_block * state_size()) + Arena::bytes<T>(result_.scratch_size());
  }
  T* saved(int64_t chunk, int h) { return saved_ + (chunk * args_.head_block + h) * state_size(); }

  // The state that enters each chunk: S_{c+1} = e^{p_last} S_c + X^T diag(e^{p_last - p} dt) B.
  void save_states(const Task& task, int direction, const Steps& steps) {
    for (int h = 0; h < task.heads && steps.length > 0; ++h) read_state(task, h, args_.initial_states, saved(0, h));
    for (int64_t c = 0; c + 1 < steps.chunks(); ++c) {
      read_rows(args_.B, steps, direction, task.group, c * kQ, kQ, kQ, 0, args_.dstate, states_, B_);
      for (int h = 0; h < task.heads; ++h) {
        decays_.read(args_, steps, direction, task.head + h, c * kQ, kQ);
        read_rows(args_.x, steps, direction, task.head + h, c * kQ, kQ, kQ, 0, args_.headdim, width_, x_);
        scale_rows(kQ, decays_.end_dt, x_);
        const Next next(task, c, h, +1);
        gemm<T, Update::kDecay, Triangle::kNone>(width_, states_, kQ, {scaled_, 1, width_}, B_, states_, saved(c + 1, h),
                                                 states_, next_x(steps, direction, next),
                                                 {.old = saved(c, h), .decay = decays_.whole});
      }
    }
  }

  void chunk(const Task& task, int direction, const Steps& steps, int64_t c, bool add, const ResultRows<T>& rows) {
    const int count = steps.count(c), tiled = round_up(count, kTileRows);
    const int64_t first = c * kQ;
    const bool entered = c > 0 || args_.initial_states;                      // the state entering may not be zero
    const bool left = c + 1 < steps.chunks() || args_.dfinal_states;         // the gradient coming in may not be zero
    const bool leaves = c > 0 || args_.dinitial_states;                      // the gradient going out is wanted
    read_rows(args_.B, steps, direction, task.group, first, count, tiled, 0, args_.dstate, states_, B_);
    read_rows(args_.C, steps, direction, task.group, first, count, tiled, 0, args_.dstate, states_, C_);
    transpose(B_, states_, kQ, states_, B_by_state_, kQ);
    gemm<T, Update::kStore, Triangle::kResult>(tiled, kQ, states_, {C_, states_, 1}, B_by_state_, kQ, scores_, kQ);
    zero(dscores_, kQ * kQ);
    zero(dB_, kQ * states_);
    zero(dC_, kQ * states_);
    // The shifted output of a step lies one step later, and that of the last step nowhere.
    const int outputs = args_.shifted && steps.length - first > count ? count + 1 : count;
    for (int h = 0; h < task.heads; ++h) {
      const int head = task.head + h;
      T* dstate = dstate_ + h * state_size();
      const T* state = saved(c, h);
      decays_.read(args_, steps, direction, head, first, count);
      read_rows(args_.x, steps, direction, head, first, count, kQ, 0, args_.headdim, width_, x_);
      read_rows(args_.dy, steps, direction, head, first, outputs, kQ + 1, 0, args_.headdim, width_, dy_at_step_);
      const Next next(task, c, h, -1);
      transpose(x_, width_, kQ, width_, x_by_column_, kQ);
      gemm<T, Update::kStore, Triangle::kResult>(tiled, kQ, args_.headdim, {dy_, width_, 1}, x_by_column_, kQ, dweights_, kQ,
                                                 rows.ahead(h, steps, c, task.columns));
      const T skip = skip_of<T>(args_, direction, head);
      const double skip_gradient = weigh(count, args_.direction[direction].strict, args_.shifted ? T(0) : skip);
      sums_[h].D += args_.shifted ? dot(x_, dy_at_step_, count * width_) : skip_gradient;

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
      for (int i = 0; i < count; ++i) rows.put(add, h, steps.frame(first + i), dx_ + i * width_, task.columns);

      // What the states gave: dC += diag(e^p) dY S^T, dB += diag(e^{p_last - p} dt) X dS^T, and both against C and B.
      from_state(entered, count, tiled, dy_, state, C_, decays_.start, dC_, from_C_, next_state(next));
      from_state(left, count, tiled, x_, dstate, B_, decays_.end_dt, dB_, from_B_, next_BC(args_, task, steps, direction, c - 1, h));
      const T carried = entered && left ? decays_.whole * dot(state, dstate, state_size()) : 0;
      gradient_of_steps(task, direction, steps, first, count, h, carried);

      if (!leaves) continue;
      // dS = e^{p_last} dS + C^T diag(e^p) dY
      scale_rows(count, decays_.start, dy_);
      gemm<T, Update::kDecay, Triangle::kNone>(width_, states_, count, {scaled_, 1, width_}, C_, states_, dstate, states_,
                                               {}, {.old = dstate, .decay = decays_.whole});
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
  Ahead next_state(const Next& next) {
    if (next.chunk < 0) return {};
    const int64_t row = states_ * sizeof(T);
    return {saved(next.chunk, next.h), row, width_, row};
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
  void gradient_of_steps(const Task& task, int direction, const Steps& steps, int64_t first, int count, int h, T carried) {
    double log_decay = carried;
    for (int i = 0; i < count; ++i) log_decay += double(decays_.end_dt[i]) * from_B_[i];
    for (int i = count - 1; i >= 0; --i) {
      const double gained = gained_[i] + double(decays_.start[i]) * from_C_[i], gave = gave_at(i);
      log_decay += gained - decays_.dt[i] * gave - double(decays_.end_dt[i]) * from_B_[i];
      sums_[h].A += decays_.dt[i] * log_decay;
      T gradient = T(gave + decays_.end[i] * from_B_[i] + decays_.A * log_decay);
      if (decays_.free[i] != decays_.dt[i]) gradient = 0;  // clamped
      if (args_.dt_softplus) gradient *= sigmoid(decays_.raw[i]);
      sums_[h].dt_bias += gradient;
      static_cast<T*>(args_.ddt.data)[steps.at(args_.ddt, direction, task.head + h, first + i)] = gradient;
    }
  }

  void write_sums(const Task& task, int direction) {
    for (int h = 0; h < task.heads; ++h) {
      const int64_t at = (task.sequence * args_.directions + direction) * args_.heads + task.head + h;
      static_cast<T*>(args_.dA)[at] = T(sums_[h].A);
      if (args_.dD) static_cast<T*>(args_.dD)[at] = T(sums_[h].D);
      if (args_.ddt_bias) static_cast<T*>(args_.ddt_bias)[at] = T(sums_[h].dt_bias);
    }
  }

  void write_group_row(const SsdTensor& tensor, const Task& task, int64_t at, const T* row) {
    T* to = static_cast<T*>(tensor.data) + task.block * args_.dBC_block + at;
    if (row) __builtin_memcpy(to, row, args_.dstate * sizeof(T));
    else __builtin_memset(to, 0, args_.dstate * sizeof(T));
  }

  void zero_padding(const Task& task, int direction) {
    const Span span = args_.spans[task.sequence];
    for (int64_t t = span.end; t < span.end + args_.padding(task.sequence); ++t) {
      for (const SsdTensor* tensor : {&args_.dB, &args_.dC})
        write_group_row(*tensor, task, tensor->at(direction, span.row, t, task.group), nullptr);
      for (int h = 0; h < task.heads; ++h)
        static_cast<T*>(args_.ddt.data)[args_.ddt.at(direction, span.row, t, task.head + h)] = 0;
    }
  }

  void read_state(const Task& task, int h, const void* states, T* state) {
    zero(state, state_size());
    if (states == nullptr) return;
    const T* from = static_cast<const T*>(states) + (task.sequence * args_.heads + task.head + h) * args_.headdim * args_.dstate;
    for (int p = 0; p < args_.headdim; ++p) __builtin_memcpy(state + p * states_, from + p * args_.dstate, args_.dstate * sizeof(T));
  }
  void write_state(const Task& task, int h, const T* state) {
    if (args_.dinitial_states == nullptr) return;
    T* to = static_cast<T*>(args_.dinitial_states) + (task.sequence * args_.heads + task.head + h) * args_.headdim * args_.dstate;
    for (int p = 0; p < args_.headdim; ++p) __builtin_memcpy(to + p * args_.dstate, state + p * states_, args_.dstate * sizeof(T));
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

  const SsdBackwardArgs& args_;
  const int width_, states_;  // headdim and dstate, padded
  Result<T> result_;
  Arena arena_;
  Decays<T> decays_;
  Sums sums_[kSsdBackwardHeads];
  T *B_, *C_, *dB_, *dC_, *product_;                 // (kQ, states)
  T* B_by_state_;                                    // (states, kQ)
  T *scores_, *weights_, *dscores_, *dweights_;      // (kQ, kQ)
  T *x_, *scaled_, *dx_;                             // (kQ, width)
  T *dy_at_step_, *dy_;                              // (kQ + 1, width): of each frame; of each step's own result
  T *x_by_column_, *dx_by_column_;                   // (width, kQ)
  T *dstate_, *saved_;                               // (head_block, width, states); the same per chunk
  alignas(64) T from_C_[kQ], from_B_[kQ];
  double gained_[kQ];          // see gradient_of_steps
  Wide<T> gave_[kQ / kWidth<T>];  // likewise, frame by frame
};

}  // namespace
}  // namespace linconv::LINCONV_ISA
