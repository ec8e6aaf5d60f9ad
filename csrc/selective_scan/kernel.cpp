// The selective scan as its recurrence. A task's channels lie side by side in vectors, and the states of a vector of channels
// stay in registers, a few of the dstate at a time, while a chunk of steps goes by.
//
// The gradients of a chunk need the states before each of its steps. Forward saves none: a first sweep saves those that enter
// each chunk, and in the sweep against time each chunk's own are computed again, into the cache.
#include "selective_scan/kernel.h"

#include <initializer_list>

#include "common/arena.h"
#include "common/vec.h"

namespace linconv::LINCONV_ISA {
namespace {

constexpr int kSteps = 32;  // of a chunk
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr int kTile = 8;    // states of a channel that are in registers at once

// Calls f(n, count) for every tile of states, count a constant.
template <int I>
struct Count {
  static constexpr int value = I;
};
template <class F>
LINCONV_INLINE void each_tile(int64_t states, F f) {
  int64_t n = 0;
  for (; n + kTile <= states; n += kTile) f(n, Count<kTile>{});
  for (; n + 2 <= states; n += 2) f(n, Count<2>{});
  if (n < states) f(n, Count<1>{});
}

// Some channels of one group of one sequence.
struct Task {
  int64_t sequence, group, block, channel, channels;

  Task(const SelectiveScanArgs& args, int64_t index) {
    block = index % args.group_blocks();
    index /= args.group_blocks();
    group = index % args.groups;
    sequence = index / args.groups;
    channel = group * args.group_channels() + block * args.block;
    const int64_t left = args.group_channels() - block * args.block;
    channels = left < args.block ? left : args.block;
  }
};

// The frames of a sequence in the order in which its state goes over them.
struct Steps {
  int64_t row, begin, end, length;
  bool reverse;

  Steps(const SelectiveScanArgs& args, int64_t sequence)
      : row(args.spans[sequence].row), begin(args.spans[sequence].begin), end(args.spans[sequence].end), length(end - begin),
        reverse(args.reverse) {}
  int64_t frame(int64_t step) const { return reverse ? end - 1 - step : begin + step; }
  // From the frame of a step to that of the next one.
  int64_t stride(const View<4>& rows) const { return reverse ? -rows.stride[2] : rows.stride[2]; }
  int64_t chunks() const { return (length + kSteps - 1) / kSteps; }
  int count(int64_t chunk) const {
    const int64_t left = length - chunk * kSteps;
    return left < kSteps ? static_cast<int>(left) : kSteps;
  }
};

// What both passes hold of a task and of one of its chunks: rows of `width` channels, or of dstate numbers.
template <class T>
class Scan {
 protected:
  explicit Scan(const SelectiveScanArgs& args, size_t own_bytes)
      : args_(args), states_(args.dstate), width_((args.block + kWidth<T> - 1) / kWidth<T> * kWidth<T>),
        arena_(own_bytes + 4 * Arena::bytes<T>(kSteps * width_) + 2 * Arena::bytes<T>(kSteps * states_) +
               2 * Arena::bytes<T>(states_ * width_) + 2 * Arena::bytes<T>(width_)) {
    for (T** rows : {&dt_, &x_, &added_, &y_}) *rows = take(kSteps * width_);
    for (T** rows : {&B_, &C_}) *rows = take(kSteps * states_);
    for (T** by_state : {&A_, &state_}) *by_state = take(states_ * width_);
    for (T** row : {&bias_, &skip_}) *row = take(width_);
  }
  T* take(int64_t n) { return arena_.template take<T>(n); }

  void read_parameters(const Task& task) {
    for (int64_t c = 0; c < width_; ++c) bias_[c] = skip_[c] = 0;
    if (args_.dt_bias.data)
      load_row(at(args_.dt_bias, task.channel), args_.dt_bias.dtype, args_.dt_bias.stride[0], task.channels, bias_);
    if (args_.D.data) load_row(at(args_.D, task.channel), args_.D.dtype, args_.D.stride[0], task.channels, skip_);
    for (int64_t n = 0; n < states_; ++n) {
      load_row(at(args_.A, task.channel, n), args_.A.dtype, args_.A.stride[0], task.channels, A_ + n * width_);
      for (int64_t c = 0; c < width_; ++c) A_[n * width_ + c] = c < task.channels ? A_[n * width_ + c] * T(kLog2E) : 0;
    }
  }

  // (channels, dstate) of a sequence, held by state; zero where the tensor is absent.
  void read_states(const View<3>& states, const Task& task, T* out) {
    for (int64_t i = 0; i < states_ * width_; ++i) out[i] = 0;
    for (int64_t n = 0; n < states_ && states.data; ++n)
      load_row(at(states, task.sequence, task.channel, n), states.dtype, states.stride[1], task.channels, out + n * width_);
  }
  void write_states(const View<3>& states, const Task& task, const T* from) {
    for (int64_t n = 0; n < states_; ++n)
      store_row(at(states, task.sequence, task.channel, n), states.dtype, states.stride[1], task.channels, from + n * width_);
  }

  void read_rows(const View<4>& rows, int64_t lead, const Steps& steps, int64_t chunk, int64_t column, int64_t columns,
                 int64_t width, T* out) const {
    const int count = steps.count(chunk);
    load_rows(at(rows, lead, steps.row, steps.frame(chunk * kSteps), column), rows.dtype, steps.stride(rows), rows.stride[3],
              count, columns, out, width);
    for (int s = 0; s < count && columns < width; ++s)
      for (int64_t c = columns; c < width; ++c) out[s * width + c] = 0;
  }
  void read_channels(const View<4>& rows, const Task& task, const Steps& steps, int64_t chunk, T* out) const {
    read_rows(rows, 0, steps, chunk, task.channel, task.channels, width_, out);
  }
  void write_channels(const View<4>& rows, const Task& task, const Steps& steps, int64_t chunk, const T* from) const {
    store_rows(at(rows, 0, steps.row, steps.frame(chunk * kSteps), task.channel), rows.dtype, steps.stride(rows), rows.stride[3],
               steps.count(chunk), task.channels, from, width_);
  }
  void clear_padding(const View<4>& rows, const Task& task) const {
    const T zeros[kSelectiveChannels] = {};
    each_padded_frame(task, [&](int64_t row, int64_t t) {
      store_row(at(rows, 0, row, t, task.channel), rows.dtype, rows.stride[3], task.channels, zeros);
    });
  }
  template <class F>
  void each_padded_frame(const Task& task, F f) const {
    const Span span = args_.spans[task.sequence];
    if (args_.packed) return;  // packed sequences leave no frame out
    for (int64_t t = span.end; t < args_.frames; ++t) f(span.row, t);
  }

  template <class F>
  void each_vector(int64_t rows, F f) const {
    for (int64_t i = 0; i < rows * width_; i += kWidth<T>) f(i);
  }

  // x, dt as the scan takes it, what each step adds to the state, and B. `before`, if any, is dt before softplus.
  void read_inputs(const Task& task, const Steps& steps, int64_t chunk, T* before) {
    const int count = steps.count(chunk);
    read_channels(args_.dt, task, steps, chunk, dt_);
    read_channels(args_.x, task, steps, chunk, x_);
    for (int s = 0; s < count; ++s)
      for (int64_t c = 0; c < width_; c += kWidth<T>) {
        const int64_t i = s * width_ + c;
        const Vec<T> raw = load(dt_ + i) + load(bias_ + c), dt = args_.dt_softplus ? softplus(raw) : raw;
        if (before) store(before + i, raw);
        store(dt_ + i, dt);
        store(added_ + i, dt * load(x_ + i));
      }
    read_rows(args_.B, task.group, steps, chunk, 0, states_, states_, B_);
  }

  // The states of a vector of channels at `c` over a chunk. visit(s, decays, states before, states after) sees each step.
  template <int I, class Visit>
  LINCONV_INLINE void walk(int count, int64_t c, int64_t n, T* state, Visit visit) const {
    Vec<T> h[I];
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) h[i] = load(state + (n + i) * width_ + c);
    for (int s = 0; s < count; ++s) {
      const Vec<T> dt = load(dt_ + s * width_ + c), added = load(added_ + s * width_ + c);
      Vec<T> decay[I], before[I];
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) {
        decay[i] = exp2(dt * load(A_ + (n + i) * width_ + c));
        before[i] = h[i];
        h[i] = decay[i] * h[i] + added * splat(B_[s * states_ + n + i]);
      }
      visit(s, decay, before, h);
    }
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) store(state + (n + i) * width_ + c, h[i]);
  }

  // Adds C h to y.
  template <int I>
  LINCONV_INLINE void read_out(int s, int64_t c, int64_t n, const Vec<T> (&h)[I]) {
    Vec<T> y = load(y_ + s * width_ + c);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) y += splat(C_[s * states_ + n + i]) * h[i];
    store(y_ + s * width_ + c, y);
  }

  // y = D x
  void start_outputs(int count) {
    for (int s = 0; s < count; ++s)
      for (int64_t c = 0; c < width_; c += kWidth<T>)
        store(y_ + s * width_ + c, load(skip_ + c) * load(x_ + s * width_ + c));
  }

  const SelectiveScanArgs& args_;
  const int64_t states_, width_;
  T *dt_, *x_, *added_, *y_;  // (kSteps, width)
  T *B_, *C_;                 // (kSteps, dstate)
  T *A_, *state_;             // (dstate, width); A over ln 2, for powers of two
  T *bias_, *skip_;           // (width,)

 private:
  Arena arena_;
};

template <class T>
class Forward : Scan<T> {
  using Base = Scan<T>;
  using Base::args_, Base::C_, Base::state_, Base::states_, Base::width_, Base::x_, Base::y_;

 public:
  explicit Forward(const SelectiveScanArgs& args) : Base(args, 0) {}

  void run(const Task& task) {
    const Steps steps(args_, task.sequence);
    this->read_parameters(task);
    this->read_states(args_.initial_states, task, state_);
    for (int64_t chunk = 0; chunk < steps.chunks(); ++chunk) {
      const int count = steps.count(chunk);
      this->read_inputs(task, steps, chunk, nullptr);
      this->read_rows(args_.C, task.group, steps, chunk, 0, states_, states_, C_);
      this->start_outputs(count);
      for (int64_t c = 0; c < width_; c += kWidth<T>)
        each_tile(states_, [&](int64_t n, auto tile) {
          this->template walk<tile.value>(count, c, n, state_, [&](int s, auto&, auto&, auto& h) { this->read_out(s, c, n, h); });
        });
      if (args_.z.data) {
        this->read_channels(args_.z, task, steps, chunk, x_);
        this->each_vector(count, [&](int64_t i) { store(y_ + i, load(y_ + i) * silu(load(x_ + i))); });
      }
      this->write_channels(args_.y, task, steps, chunk, y_);
    }
    this->write_states(args_.final_states, task, state_);
    this->clear_padding(args_.y, task);
  }
};

template <class T>
class Backward : Scan<T> {
  using Base = Scan<T>;
  using Base::args_, Base::A_, Base::added_, Base::B_, Base::bias_, Base::C_, Base::dt_, Base::skip_, Base::state_,
      Base::states_, Base::width_, Base::x_, Base::y_;

 public:
  explicit Backward(const SelectiveScanArgs& args) : Base(args, bytes(args)) {
    for (T** rows : {&before_softplus_, &dy_, &gate_, &through_state_, &through_decay_}) *rows = this->take(kSteps * width_);
    for (T** by_state : {&dstate_, &dA_}) *by_state = this->take(states_ * width_);
    for (T** vectors : {&dB_, &dC_}) *vectors = this->take(kSteps * states_ * kWidth<T>);
    for (T** tile : {&decays_, &befores_}) *tile = this->take(kSteps * kTile * kWidth<T>);
    for (T** row : {&dskip_, &dbias_}) *row = this->take(width_);
    saved_ = this->take(longest_chunks(args) * states_ * width_);
  }

  void run(const Task& task) {
    const Steps steps(args_, task.sequence);
    this->read_parameters(task);
    for (int64_t i = 0; i < states_ * width_; ++i) dA_[i] = 0;
    for (int64_t c = 0; c < width_; ++c) dskip_[c] = dbias_[c] = 0;
    save_states(task, steps);
    this->read_states(args_.dfinal_states, task, dstate_);
    for (int64_t chunk = steps.chunks() - 1; chunk >= 0; --chunk) differentiate(task, steps, chunk);
    if (args_.dinitial_states.data) this->write_states(args_.dinitial_states, task, dstate_);
    write_sums(task);
    for (const View<4>* rows : {&args_.dx, &args_.ddt, &args_.dz})
      if (rows->data) this->clear_padding(*rows, task);
    this->each_padded_frame(task, [&](int64_t row, int64_t t) {
      for (T* part : {dB_of(task, row, t), dC_of(task, row, t)})
        for (int64_t n = 0; n < states_; ++n) part[n] = 0;
    });
  }

 private:
  static int64_t longest_chunks(const SelectiveScanArgs& args) { return (args.longest() + kSteps - 1) / kSteps; }
  static size_t bytes(const SelectiveScanArgs& args) {
    const int64_t width = (args.block + kWidth<T> - 1) / kWidth<T> * kWidth<T>, states = args.dstate;
    return 5 * Arena::bytes<T>(kSteps * width) + 2 * Arena::bytes<T>(states * width) +
           2 * Arena::bytes<T>(kSteps * states * kWidth<T>) + 2 * Arena::bytes<T>(kSteps * kTile * kWidth<T>) +
           2 * Arena::bytes<T>(width) + Arena::bytes<T>(longest_chunks(args) * states * width);
  }

  // The states that enter each chunk.
  void save_states(const Task& task, const Steps& steps) {
    this->read_states(args_.initial_states, task, state_);
    for (int64_t chunk = 0; chunk < steps.chunks(); ++chunk) {
      __builtin_memcpy(saved_ + chunk * states_ * width_, state_, states_ * width_ * sizeof(T));
      if (chunk + 1 == steps.chunks()) break;
      this->read_inputs(task, steps, chunk, nullptr);
      for (int64_t c = 0; c < width_; c += kWidth<T>)
        each_tile(states_, [&](int64_t n, auto tile) {
          this->template walk<tile.value>(steps.count(chunk), c, n, state_, [](int, auto&, auto&, auto&) {});
        });
    }
  }

  void differentiate(const Task& task, const Steps& steps, int64_t chunk) {
    const int count = steps.count(chunk);
    const bool gated = args_.z.data != nullptr;
    this->read_inputs(task, steps, chunk, before_softplus_);
    this->read_rows(args_.C, task.group, steps, chunk, 0, states_, states_, C_);
    this->read_channels(args_.dy, task, steps, chunk, dy_);
    if (gated) {
      this->start_outputs(count);
      this->read_channels(args_.z, task, steps, chunk, gate_);
    }
    if (gated)  // from here on dy is the gradient before the gate, and `gate` what dz is of y
      this->each_vector(count, [&](int64_t i) {
        const Vec<T> z = load(gate_ + i), s = sigmoid(z), upstream = load(dy_ + i);
        store(dy_ + i, upstream * z * s);
        store(gate_ + i, upstream * (s + z * s * (T(1) - s)));
      });
    this->each_vector(count, [&](int64_t i) {
      store(through_state_ + i, Vec<T>{});
      store(through_decay_ + i, Vec<T>{});
    });
    for (int64_t i = 0; i < count * states_ * kWidth<T>; ++i) dB_[i] = dC_[i] = 0;
    T* state = saved_ + chunk * states_ * width_;
    for (int64_t c = 0; c < width_; c += kWidth<T>)
      each_tile(states_, [&](int64_t n, auto tile) {
        constexpr int I = tile.value;
        this->template walk<I>(count, c, n, state, [&](int s, auto& decay, auto& before, auto& h) {
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i) {
            store(decays_ + (s * I + i) * kWidth<T>, decay[i]);
            store(befores_ + (s * I + i) * kWidth<T>, before[i]);
          }
          if (gated) this->read_out(s, c, n, h);
        });
        walk_back<I>(count, c, n);
      });
    finish(count);
    this->write_channels(args_.dx, task, steps, chunk, x_);
    this->write_channels(args_.ddt, task, steps, chunk, dt_);
    if (gated) this->write_channels(args_.dz, task, steps, chunk, y_);
    for (int s = 0; s < count; ++s) {
      const int64_t t = steps.frame(chunk * kSteps + s);
      T *dB = dB_of(task, steps.row, t), *dC = dC_of(task, steps.row, t);
      for (int64_t n = 0; n < states_; ++n) {
        dB[n] = sum(load(dB_ + (s * states_ + n) * kWidth<T>));
        dC[n] = sum(load(dC_ + (s * states_ + n) * kWidth<T>));
      }
    }
  }

  // The gradient g of the state, against time: g_t = C_t dy_t + decay_{t+1} g_{t+1}.
  template <int I>
  LINCONV_INLINE void walk_back(int count, int64_t c, int64_t n) {
    Vec<T> g[I], dA[I];
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      g[i] = load(dstate_ + (n + i) * width_ + c);
      dA[i] = Vec<T>{};
    }
    for (int s = count - 1; s >= 0; --s) {
      const Vec<T> dy = load(dy_ + s * width_ + c), dt = load(dt_ + s * width_ + c), added = load(added_ + s * width_ + c);
      Vec<T> through_state = load(through_state_ + s * width_ + c), through_decay = load(through_decay_ + s * width_ + c);
#pragma GCC unroll 8
      for (int i = 0; i < I; ++i) {
        const int64_t k = s * states_ + n + i;
        const Vec<T> decay = load(decays_ + (s * I + i) * kWidth<T>), B = splat(B_[k]);
        const Vec<T> kept = decay * load(befores_ + (s * I + i) * kWidth<T>), h = kept + added * B;
        g[i] += splat(C_[k]) * dy;
        store(dC_ + k * kWidth<T>, load(dC_ + k * kWidth<T>) + dy * h);
        store(dB_ + k * kWidth<T>, load(dB_ + k * kWidth<T>) + g[i] * added);
        through_state += g[i] * B;
        const Vec<T> of_exponent = g[i] * kept;  // the gradient of dt A
        through_decay += of_exponent * load(A_ + (n + i) * width_ + c);
        dA[i] += of_exponent * dt;
        g[i] *= decay;
      }
      store(through_state_ + s * width_ + c, through_state);
      store(through_decay_ + s * width_ + c, through_decay);
    }
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      T* total = dA_ + (n + i) * width_ + c;
      store(total, load(total) + dA[i]);
      store(dstate_ + (n + i) * width_ + c, g[i]);
    }
  }

  // Leaves dx in x, ddt in dt and dz in y.
  void finish(int count) {
    for (int64_t c = 0; c < width_; c += kWidth<T>) {
      Vec<T> dskip{}, dbias{};
      for (int s = 0; s < count; ++s) {
        const int64_t i = s * width_ + c;
        const Vec<T> dy = load(dy_ + i), x = load(x_ + i), dt = load(dt_ + i), through_state = load(through_state_ + i);
        Vec<T> ddt = through_state * x + load(through_decay_ + i) * T(kLn2);
        if (args_.dt_softplus) ddt *= sigmoid(load(before_softplus_ + i));
        dskip += dy * x;
        dbias += ddt;
        store(x_ + i, load(skip_ + c) * dy + dt * through_state);
        store(dt_ + i, ddt);
        if (args_.z.data) store(y_ + i, load(y_ + i) * load(gate_ + i));
      }
      store(dskip_ + c, load(dskip_ + c) + dskip);
      store(dbias_ + c, load(dbias_ + c) + dbias);
    }
  }

  void write_sums(const Task& task) {
    const int64_t first = task.sequence * args_.channels + task.channel;
    for (int64_t c = 0; c < task.channels; ++c) {
      for (int64_t n = 0; n < states_; ++n) static_cast<T*>(args_.dA)[(first + c) * states_ + n] = dA_[n * width_ + c];
      if (args_.dD) static_cast<T*>(args_.dD)[first + c] = dskip_[c];
      if (args_.ddt_bias) static_cast<T*>(args_.ddt_bias)[first + c] = dbias_[c];
    }
  }

  T* of_frame(void* parts, const Task& task, int64_t row, int64_t t) const {
    const int64_t batch = args_.B.size[1];
    return static_cast<T*>(parts) + (((task.block * batch + row) * args_.frames + t) * args_.groups + task.group) * states_;
  }
  T* dB_of(const Task& task, int64_t row, int64_t t) const { return of_frame(args_.dB, task, row, t); }
  T* dC_of(const Task& task, int64_t row, int64_t t) const { return of_frame(args_.dC, task, row, t); }

  T *before_softplus_, *dy_, *gate_;       // (kSteps, width)
  T *through_state_, *through_decay_;      // the same: gradients of dt x and, by way of the decay, of dt
  T *dstate_, *dA_;                        // (dstate, width)
  T *dB_, *dC_;                            // (kSteps, dstate, vector): summed over the task's vectors
  T *decays_, *befores_;                   // (kSteps, tile, vector)
  T *dskip_, *dbias_;                      // (width,)
  T* saved_;                               // (chunks, dstate, width): states that enter each chunk
};

template <class Pass>
void run(const SelectiveScanArgs& args, int64_t begin, int64_t end) {
  Pass pass(args);
  for (int64_t index = begin; index < end; ++index) pass.run(Task(args, index));
}

}  // namespace

void selective_scan_forward(const SelectiveScanArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == DType::kFloat64 ? run<Forward<double>>(args, begin, end) : run<Forward<float>>(args, begin, end);
}

void selective_scan_backward(const SelectiveScanArgs& args, int64_t begin, int64_t end) {
  args.x.dtype == DType::kFloat64 ? run<Backward<double>>(args, begin, end) : run<Backward<float>>(args, begin, end);
}

}  // namespace linconv::LINCONV_ISA
