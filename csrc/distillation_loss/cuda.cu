// The distillation losses on CUDA.
//
// A team of whole warps takes one row of both sides. Of hidden states it holds all in registers, kHeld columns of a side a
// thread, so that each row is read once; a row of more than kHeld * kThreads columns is read again in each pass. Of
// logits it goes through the columns once.
//
// Layers lie in a table in the launch itself: nothing is copied to the device first, and a CUDA graph can hold it all.
#include <algorithm>
#include <tuple>

#include "common/cuda.h"
#include "distillation_loss/arguments.h"

namespace linconv {
namespace {

using Optional = std::optional<Tensor>;

constexpr int kVector = 4, kThreads = 256;
constexpr int kFrames = 16;  // of a block
template <class T>
constexpr int kRuns = 32 / sizeof(T);  // of kVector columns, that a thread holds of each side
template <class T>
constexpr int kHeld = kRuns<T> * kVector;

// An element of a tagged tensor, by a call: the code of each type for each of the up to 64 elements that a thread has in
// a pass would take longer to compile than all else.
template <class T>
__device__ __noinline__ T read_tagged(const void* data, DType dtype, int64_t index) {
  return load_element<Tagged, T>(data, dtype, index);
}
template <class T>
__device__ __noinline__ void write_tagged(void* data, DType dtype, int64_t index, T value) {
  store_element<Tagged>(data, dtype, index, value);
}

// N runs of columns of a row, the first at `own`, each `stride` behind the one before. Columns that are not there are zeros.
template <class S, class T, int N>
__device__ __forceinline__ void read_runs(const Frames& frames, int64_t row, int64_t t, int64_t own, int64_t stride,
                                          int64_t width, T (&out)[N][kVector]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t c = own + i * stride;
    const Column<T, S, kVector> run(frames, 0, row, c, present<kVector>(c, width));
    if constexpr (run.kTagged) {
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        out[i][j] = j < run.n ? read_tagged<T>(run.start, run.dtype, t * run.time + j * run.stride) : T(0);
    } else {
      run.read(t, out[i]);
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void write_run(const Frames& frames, int64_t row, int64_t t, int64_t c, int64_t width,
                                          const T (&in)[kVector]) {
  const Column<T, S, kVector> run(frames, 0, row, c, present<kVector>(c, width));
  if constexpr (run.kTagged) {
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (j < run.n) write_tagged(run.start, run.dtype, t * run.time + j * run.stride, in[j]);
  } else {
    run.write(t, in);
  }
}

// A gradient, contiguous in memory that is aligned to 16 bytes.
__device__ __forceinline__ Frames contiguous(void* data, DType dtype, int64_t frames, int64_t width) {
  const int64_t bits = width * element_size(dtype) | 16;
  return {data, dtype, 0, frames * width, width, 1, static_cast<int>(bits & -bits)};
}

// Which of (batch, L) rows count: those of a mask (batch, L) of bytes, or those within each sequence.
struct Rows {
  const uint8_t* mask;
  int64_t batch, frame;  // strides of the mask
  Sequences sequences;

  __device__ __forceinline__ bool counts(int64_t row, int64_t t) const {
    if (mask != nullptr) return mask[row * batch + t * frame] != 0;
    return t < sequences.sequence(row).end;
  }
};

// How many of them count, at least 1: on the device where a mask tells, else `all`.
struct Number {
  const double* counted;
  int64_t all;

  __device__ __forceinline__ double operator()() const {
    return counted != nullptr ? *counted : all > 1 ? static_cast<double>(all) : 1.0;
  }
};

// Upstream gradients, float32 or float64.
__device__ __forceinline__ double factor(const View<1>& of, int64_t i) { return load_element<Tagged, double>(of.data, of.dtype, i * of.stride[0]); }

// A thread's place among the teams of its block.
struct Place {
  int threads, team, teams, member;

  __device__ explicit Place(int threads)
      : threads(threads), team(threadIdx.x / threads), teams(blockDim.x / threads), member(threadIdx.x % threads) {}
};

// ---- Sums over rows ----

struct CountArguments {
  Rows rows;
  int64_t batch, frames;
  double* out;
};

__global__ void __launch_bounds__(kThreads) count_rows(const CountArguments a) {
  double sum[1] = {};
  if (a.rows.mask != nullptr) {
    for (int64_t i = threadIdx.x; i < a.batch * a.frames; i += blockDim.x) sum[0] += a.rows.counts(i / a.frames, i % a.frames);
  } else {
    for (int64_t row = threadIdx.x; row < a.batch; row += blockDim.x) sum[0] += static_cast<double>(a.rows.sequences.sequence(row).end);
  }
  sum_over_team(blockDim.x, sum);
  if (threadIdx.x == 0) *a.out = sum[0] > 1 ? sum[0] : 1;
}

// The sums of `values` sets of parts (batch, blocks) over how many rows count: the first half of them into out[0], the
// others into out[1], or all into out[0] where there is no other.
struct MeanArguments {
  const double* parts;
  int64_t value, row, block;  // strides of the parts
  int64_t batch, blocks, each;
  void* out[2];
  DType dtype;
  Number number;
};

// A thread's parts are those of places in the batch and in the sequence that only these decide: parts of 0 at a sequence's
// end change nothing.
__global__ void __launch_bounds__(kThreads) mean_over_rows(const MeanArguments a) {
  const double* parts = a.parts + blockIdx.x * a.value;
  double sum[1] = {};
  const int64_t threads = blockDim.x;
  for (int64_t row = 0; row < a.batch; ++row)
    for (int64_t i = (threadIdx.x + row) % threads; i < a.blocks; i += threads) sum[0] += parts[row * a.row + i * a.block];
  sum_over_team(blockDim.x, sum);
  if (threadIdx.x == 0)
    store_element<Tagged>(a.out[blockIdx.x / a.each], a.dtype, blockIdx.x % a.each, sum[0] / a.number());
}

// ---- Hidden states ----

struct Layer {
  Frames student, teacher;
  void *grad_student, *grad_teacher;  // contiguous; null where not wanted
  int64_t width;
  int32_t index;  // among all layers
  int32_t team;   // threads of one
};

constexpr int kLayers = 26;  // of a launch: what 4 KiB of arguments hold
struct LayerArguments {
  Layer layers[kLayers];
  Rows rows;
  int64_t frames, row_blocks;
  double* partial;  // (2, layers, batch, row_blocks): sums over kFrames frames of mean squared errors, and of cosines
  int64_t other;    // from the one to the other
  View<1> upstream;
  Number number;
};
static_assert(sizeof(LayerArguments) <= 4096);

// What a thread holds of a row of both sides.
template <class T, class S>
struct RowPair {
  const Layer& layer;
  int64_t row, t, own, stride;
  T mean_s = 0, mean_t = 0;
  bool centred = false;
  T s[kRuns<T>][kVector], u[kRuns<T>][kVector];  // the student's, the teacher's

  __device__ RowPair(const Layer& layer, const Place& place, int64_t row, int64_t t)
      : layer(layer), row(row), t(t), own(place.member * kVector), stride(place.threads * kVector) {}

  __device__ __forceinline__ void load(int64_t first) {
    read_runs<S>(layer.student, row, t, first + own, stride, layer.width, s);
    read_runs<S>(layer.teacher, row, t, first + own, stride, layer.width, u);
    if (centred) subtract_means(first);
  }

  // From here on values are about the means, and 0 past the end.
  __device__ __forceinline__ void centre(T of_student, T of_teacher) {
    mean_s = of_student, mean_t = of_teacher, centred = true;
    if (stride * kRuns<T> >= layer.width) subtract_means(0);  // else they are loaded again
  }

  // Calls f(c, s, u) for every run of columns c on. What is past the end is 0.
  template <class F>
  __device__ __forceinline__ void each_run(F&& f) {
    const int64_t span = stride * kRuns<T>;
    for (int64_t first = 0; first < layer.width; first += span) {
      if (span < layer.width) load(first);
#pragma unroll
      for (int i = 0; i < kRuns<T>; ++i) f(first + own + i * stride, s[i], u[i]);
    }
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    each_run([&](int64_t, const T(&a)[kVector], const T(&b)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) f(a[i], b[i]);
    });
  }

 private:
  __device__ __forceinline__ void subtract_means(int64_t first) {
#pragma unroll
    for (int i = 0; i < kRuns<T>; ++i) {
      const int n = present<kVector>(first + own + i * stride, layer.width);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        s[i][j] = j < n ? s[i][j] - mean_s : T(0);
        u[i][j] = j < n ? u[i][j] - mean_t : T(0);
      }
    }
  }
};

template <class T>
__device__ __forceinline__ T inverse_deviation(T squares, T width) {
  return inverse_root(squares / width + T(1e-5));  // the eps of layer norms
}

// A frame of a block in turn for each team: calls f(t, there, counts); no thread is left out.
template <class F>
__device__ __forceinline__ void each_frame(const LayerArguments& a, const Place& place, int64_t row, int64_t begin, F&& f) {
  const int64_t end = begin + kFrames < a.frames ? begin + kFrames : a.frames;
  const int64_t steps = ceil_div(end - begin, place.teams);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t t = begin + step * place.teams + place.team;
    f(t, t < end, t < end && a.rows.counts(row, t));
  }
}

constexpr int kLayerSums = 5;
// Blocks that registers are to be left for, of the layers' forward pass with a norm: elsewhere two would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kNormBlocks = 2;
#else
constexpr int kNormBlocks = 1;
#endif

template <class T, class S, bool kNorm>
__global__ void __launch_bounds__(kThreads, kNorm || sizeof(T) == 8 ? kNormBlocks : 2) layers_forward(const __grid_constant__ LayerArguments a) {
  const Layer& layer = a.layers[blockIdx.y];
  const Place place(layer.team);
  const int64_t row = blockIdx.x / a.row_blocks, block = blockIdx.x % a.row_blocks, begin = block * kFrames;
  const T width = static_cast<T>(layer.width);
  // Of each frame its error and its cosine, behind what sums over teams take.
  double* found = shared_memory<double>() + kLayerSums * (blockDim.x / kWarp);
  each_frame(a, place, row, begin, [&](int64_t t, bool there, bool counts) {
    RowPair<T, S> pair(layer, place, row, t);
    T sums[kNorm ? 5 : 4] = {};
    if (counts) {
      pair.load(0);
      pair.each([&](T s, T u) {
        sums[0] += s * s;
        sums[1] += u * u;
        sums[2] += s * u;
        if constexpr (kNorm) sums[3] += s, sums[4] += u;
        else sums[3] += (s - u) * (s - u);
      });
    }
    sum_over_team(place.threads, sums);
    T error = sums[3];
    if constexpr (kNorm) {
      T squares[2] = {}, errors[1] = {};
      if (counts) {
        pair.centre(sums[3] / width, sums[4] / width);
        pair.each([&](T s, T u) {
          squares[0] = fused_of(s, s, squares[0]);
          squares[1] = fused_of(u, u, squares[1]);
        });
      }
      sum_over_team(place.threads, squares);
      if (counts) {
        const T scale_s = inverse_deviation(squares[0], width), scale_t = inverse_deviation(squares[1], width);
        pair.each([&](T s, T u) {
          const T e = product_of(s, scale_s) - product_of(u, scale_t);
          errors[0] += e * e;
        });
      }
      sum_over_team(place.threads, errors);
      error = errors[0];
    }
    if (place.member != 0 || !there) return;
    constexpr double least = 1e-8;  // that of torch's cosine_similarity
    const double norm_s = std::sqrt(static_cast<double>(sums[0])), norm_t = std::sqrt(static_cast<double>(sums[1]));
    found[2 * (t - begin)] = counts ? static_cast<double>(error) / static_cast<double>(layer.width) : 0;
    found[2 * (t - begin) + 1] =
        counts ? static_cast<double>(sums[2]) / ((norm_s < least ? least : norm_s) * (norm_t < least ? least : norm_t)) : 0;
  });
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = 0;
  for (int64_t i = 0; i < kFrames && begin + i < a.frames; ++i) sum += found[2 * i + threadIdx.x];
  a.partial[threadIdx.x * a.other + layer.index * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
}

// With e = xs - xt the difference of the normalised rows: ds = scale_s g (e - xs mean(e xs)), mean(e) being 0; the
// teacher's is the same with both signs of e turned. Not normalised: g e and -g e.
template <class T, class S, bool kNorm>
__global__ void __launch_bounds__(kThreads, kNorm || std::is_same_v<S, Tagged> ? 1 : 2) layers_backward(const __grid_constant__ LayerArguments a) {
  const Layer& layer = a.layers[blockIdx.y];
  const Place place(layer.team);
  const int64_t row = blockIdx.x / a.row_blocks, begin = blockIdx.x % a.row_blocks * kFrames;
  const T width = static_cast<T>(layer.width);
  const T g = static_cast<T>(2 * factor(a.upstream, layer.index) / (a.number() * static_cast<double>(layer.width)));
  const bool of_student = layer.grad_student != nullptr, of_teacher = layer.grad_teacher != nullptr;
  const Frames to_student = contiguous(layer.grad_student, layer.student.dtype, a.frames, layer.width);
  const Frames to_teacher = contiguous(layer.grad_teacher, layer.teacher.dtype, a.frames, layer.width);
  each_frame(a, place, row, begin, [&](int64_t t, bool there, bool counts) {
    RowPair<T, S> pair(layer, place, row, t);
    if (counts) pair.load(0);
    T scale_s = 1, scale_t = 1, k_s = 0, k_t = 0;
    if constexpr (kNorm) {
      T sums[2] = {};
      if (counts) pair.each([&](T s, T u) { sums[0] += s, sums[1] += u; });
      sum_over_team(place.threads, sums);
      // Sums of squares, and of a (a - b) and b (b - a) with a and b the values about their means: nothing cancels there
      // that does not cancel in e, and equal rows give exactly 0.
      T about[4] = {};
      if (counts) {
        pair.centre(sums[0] / width, sums[1] / width);
        pair.each([&](T s, T u) {
          const T apart = s - u;
          about[0] = fused_of(s, s, about[0]);
          about[1] = fused_of(u, u, about[1]);
          about[2] = fused_of(s, apart, about[2]);
          about[3] = fused_of(u, -apart, about[3]);
        });
      }
      sum_over_team(place.threads, about);
      scale_s = inverse_deviation(about[0], width), scale_t = inverse_deviation(about[1], width);
      const T apart = scale_s - scale_t;
      k_s = scale_s * (apart * about[0] + scale_t * about[2]) / width;
      k_t = scale_t * (scale_s * about[3] - apart * about[1]) / width;
    }
    if (!there) return;
    const T zeros[kVector] = {}, g_s = scale_s * g, g_t = scale_t * g;
    if (!counts) {
      for (int64_t c = pair.own; c < layer.width; c += pair.stride) {
        if (of_student) write_run<S>(to_student, row, t, c, layer.width, zeros);
        if (of_teacher) write_run<S>(to_teacher, row, t, c, layer.width, zeros);
      }
      return;
    }
    pair.each_run([&](int64_t c, const T(&s)[kVector], const T(&u)[kVector]) {
      T ds[kVector], dt[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const T x = kNorm ? product_of(s[i], scale_s) : s[i], y = kNorm ? product_of(u[i], scale_t) : u[i];
        ds[i] = (x - y - (kNorm ? x * k_s : T(0))) * g_s;
        dt[i] = (y - x - (kNorm ? y * k_t : T(0))) * g_t;
      }
      if (of_student) write_run<S>(to_student, row, t, c, layer.width, ds);
      if (of_teacher) write_run<S>(to_teacher, row, t, c, layer.width, dt);
    });
  });
}

// ---- Logits ----

struct LogitArguments {
  Frames student, teacher;
  Rows rows;
  int64_t batch, frames, classes;
  int team;
  double temperature;
  const double* before;  // (rows, kStatistics) of the classes before these, or null
  double* statistics;    // (rows, kStatistics)
  void *grad_student, *grad_teacher;  // contiguous; null where not wanted
  View<1> upstream;                   // one for all rows, its stride being 0, or one for each
  Number number;
};

template <class T>
constexpr int kStep = kRuns<T> / 2;  // runs of logits at a time

// Logits over the temperature: -inf where there are none.
template <class S, class T>
__device__ __forceinline__ void read_logits(const LogitArguments& a, const Frames& side, int64_t row, int64_t t, int64_t own,
                                            int64_t stride, T (&out)[kStep<T>][kVector]) {
  const T inverse = static_cast<T>(1 / a.temperature);
  read_runs<S>(side, row, t, own, stride, a.classes, out);
#pragma unroll
  for (int i = 0; i < kStep<T>; ++i) {
    const int n = present<kVector>(own + i * stride, a.classes);
#pragma unroll
    for (int j = 0; j < kVector; ++j) out[i][j] = j < n ? product_of(out[i][j], inverse) : static_cast<T>(-__builtin_inf());
  }
}

template <class T>
__device__ __forceinline__ T largest(const T (&x)[kStep<T>][kVector]) {
  T out = x[0][0];
#pragma unroll
  for (int i = 0; i < kStep<T>; ++i)
#pragma unroll
    for (int j = 0; j < kVector; ++j) out = x[i][j] > out || out != out ? x[i][j] : out;
  return out;
}

// Each thread has softmaxes of its own columns; at the end all rise to the team's largest, and are added.
template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1) logits_forward(const __grid_constant__ LogitArguments a) {
  const Place place(a.team);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * place.teams + place.team;
  const bool there = index < a.batch * a.frames;
  const int64_t row = index / a.frames, t = index % a.frames;
  const bool counts = there && a.rows.counts(row, t);
  Softmaxes sums;
  if (counts) {
    if (a.before != nullptr && place.member == 0) sums = load_softmaxes(a.before + index * kStatistics);
    const int64_t stride = place.threads * kVector;
    for (int64_t own = place.member * kVector; own < a.classes; own += stride * kStep<T>) {
      T s[kStep<T>][kVector], u[kStep<T>][kVector];
      read_logits<S>(a, a.student, row, t, own, stride, s);
      read_logits<S>(a, a.teacher, row, t, own, stride, u);
      raise(sums, static_cast<double>(largest<T>(s)), static_cast<double>(largest<T>(u)));
      const T shift_s = static_cast<T>(shift(sums.s)), shift_t = static_cast<T>(shift(sums.t));
      T sum_s = 0, sum_t = 0, w = 0;
#pragma unroll
      for (int i = 0; i < kStep<T>; ++i)
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const T x = s[i][j] - shift_s, y = u[i][j] - shift_t, e = exp_of(y);
          sum_s = sum_of(sum_s, exp_of(x));
          sum_t = sum_of(sum_t, e);
          w += e == T(0) ? T(0) : e * (y - x);
        }
      sums.s.total += static_cast<double>(sum_s);
      sums.t.total += static_cast<double>(sum_t);
      sums.w += static_cast<double>(w);
    }
  }
  double most[2] = {sums.s.largest, sums.t.largest};
  combine_over_team(place.threads, most, [](double x, double y) { return x > y ? x : y; });
  raise(sums, most[0], most[1]);
  double totals[3] = {sums.s.total, sums.t.total, sums.w};
  sum_over_team(place.threads, totals);
  if (!there || place.member != 0) return;
  double* to = a.statistics + index * kStatistics;
  if (counts) {
    store_statistics(to, {{most[0], totals[0]}, {most[1], totals[1]}, totals[2]});
  } else {
    for (int i = 0; i < kStatistics; ++i) to[i] = 0;
  }
}

// With q, p the student's and the teacher's probabilities: ds = g (q - p) / T, dt = g p (log(p / q) - KL) / T.
template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1) logits_backward(const __grid_constant__ LogitArguments a) {
  const Place place(a.team);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * place.teams + place.team;
  if (index >= a.batch * a.frames) return;
  const int64_t row = index / a.frames, t = index % a.frames;
  const bool counts = a.rows.counts(row, t), of_student = a.grad_student != nullptr, of_teacher = a.grad_teacher != nullptr;
  const Frames to_student = contiguous(a.grad_student, a.student.dtype, a.frames, a.classes);
  const Frames to_teacher = contiguous(a.grad_teacher, a.teacher.dtype, a.frames, a.classes);
  Softmaxes known;
  double kl = 0, g = 0;
  if (counts) {
    known = load_softmaxes(a.statistics + index * kStatistics);
    kl = a.statistics[index * kStatistics + kStatistics - 1];
    g = factor(a.upstream, index) / a.number() / a.temperature;
  }
  const T shift_s = static_cast<T>(shift(known.s)), shift_t = static_cast<T>(shift(known.t));
  const T part_s = static_cast<T>(1 / known.s.total), part_t = static_cast<T>(1 / known.t.total), scale = static_cast<T>(g);
  const T log_ratio = of_teacher ? static_cast<T>(std::log(known.s.total) - std::log(known.t.total) - kl) : T(0);
  const int64_t stride = place.threads * kVector, span = stride * kStep<T>;
  for (int64_t own = blockIdx.y * span + place.member * kVector; own < a.classes; own += gridDim.y * span) {
    T s[kStep<T>][kVector] = {}, u[kStep<T>][kVector] = {};
    if (counts) {
      read_logits<S>(a, a.student, row, t, own, stride, s);
      read_logits<S>(a, a.teacher, row, t, own, stride, u);
    }
#pragma unroll
    for (int i = 0; i < kStep<T>; ++i) {
      T ds[kVector] = {}, dt[kVector] = {};
      if (counts) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const T x = s[i][j] - shift_s, y = u[i][j] - shift_t;
          const T q = product_of(exp_of(x), part_s), p = product_of(exp_of(y), part_t);
          ds[j] = (q - p) * scale;
          dt[j] = p == T(0) ? T(0) : p * (y - x + log_ratio) * scale;
        }
      }
      if (of_student) write_run<S>(to_student, row, t, own + i * stride, a.classes, ds);
      if (of_teacher) write_run<S>(to_teacher, row, t, own + i * stride, a.classes, dt);
    }
  }
}

// ---- Launching ----

Frames frames_of(const View<3>& view) {
  View<4> out{view.data, view.dtype, {1, view.size[0], view.size[1], view.size[2]}, {0, view.stride[0], view.stride[1], view.stride[2]}};
  return linconv::frames_of(out);
}

Rows rows_of(const Optional& mask, int64_t batch, int64_t frames, const char* name) {
  Rows rows{};
  if (mask && is_bool(*mask)) {
    require_bool_mask(*mask, batch, frames, name);
    rows.mask = static_cast<const uint8_t*>(mask->data_ptr());
    rows.batch = mask->stride(0), rows.frame = mask->stride(1);
  } else {
    rows.sequences = sequences_of(mask, std::nullopt, batch, frames);
  }
  return rows;
}

// How many rows count, for the kernels launched while it lives.
class Counted {
 public:
  Counted(const Launcher& launch, const Rows& rows, bool masked, int64_t batch, int64_t frames)
      : memory_(empty({masked ? 1 : 0}, DType::kFloat64)) {
    number = {nullptr, batch * frames};
    if (!masked) return;
    auto* out = static_cast<double*>(memory_.data_ptr());
    launch(count_rows, dim3(1), kThreads, team_bytes<double, 1>(kThreads), CountArguments{rows, batch, frames, out});
    number.counted = out;
  }
  Number number;

 private:
  Tensor memory_;
};

void take_mean(const Launcher& launch, const MeanArguments& mean, int64_t values) {
  launch(mean_over_rows, dim3(grid_dim(values, kGridX, "values")), kThreads, team_bytes<double, 1>(kThreads), mean);
}

// Calls f(T, S): pairs of one dtype have kernels of their own, all others share one.
template <class F>
void with_types(bool in_double, DType student, DType teacher, F&& f) {
  if (in_double) return f(double{}, Tagged{});
  if (student == teacher && student == DType::kFloat32) return f(float{}, float{});
  if (student == teacher && student == DType::kBFloat16) return f(float{}, BFloat16{});
  if (student == teacher && student == DType::kFloat16) return f(float{}, Float16{});
  f(float{}, Tagged{});
}

struct HiddenStates {
  std::vector<LayerPair> layers;
  int64_t batch = 0, frames = 0, row_blocks = 0;
  bool double_math = false;
  LayerArguments args{};

  HiddenStates(const Tensors& student, const Tensors& teacher, const Optional& mask) : layers(read_layers(student, teacher)) {
    if (layers.empty()) return;
    batch = layers[0].student.size[0], frames = layers[0].student.size[1];
    double_math = in_double(layers);
    row_blocks = ceil_div(frames, kFrames);
    args.rows = rows_of(mask, batch, frames, "mask");
    args.frames = frames;
    args.row_blocks = row_blocks;
  }
  DType math() const { return double_math ? DType::kFloat64 : DType::kFloat32; }

  // Calls run(T, S, grid) with up to kLayers layers in args.layers, all of one kernel.
  template <class F>
  void each_launch(F&& run) {
    const auto kernel = [&](const LayerPair& layer) {
      const DType s = layer.student.dtype;
      return double_math || s != layer.teacher.dtype ? -1 : static_cast<int>(s);
    };
    std::vector<size_t> order(layers.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return kernel(layers[i]) < kernel(layers[j]); });
    for (size_t begin = 0, end; begin < order.size(); begin = end) {
      const LayerPair& first = layers[order[begin]];
      for (end = begin; end < order.size() && end - begin < kLayers && kernel(layers[order[end]]) == kernel(first); ++end) {
        const LayerPair& pair = layers[order[end]];
        const int64_t width = pair.student.size[2];
        args.layers[end - begin] = {frames_of(pair.student), frames_of(pair.teacher), pair.grad_student.data, pair.grad_teacher.data,
                                    width, static_cast<int32_t>(order[end]),
                                    team_size(width, double_math ? kHeld<double> : kHeld<float>, kThreads)};
      }
      const dim3 grid(grid_dim(batch * row_blocks, kGridX, "frames"), static_cast<unsigned>(end - begin));
      with_types(double_math, first.student.dtype, first.teacher.dtype, [&](auto math, auto storage) { run(math, storage, grid); });
    }
  }
};

struct Logits {
  LogitArguments args{};
  bool double_math = false;
  DType student = DType::kFloat32, teacher = DType::kFloat32;
  bool any = false, masked = false;

  Logits(const Optional& student_logits, const Optional& teacher_logits, const Optional& mask, double temperature) {
    struct {
      View<3> student, teacher;
      double temperature;
    } read{};
    any = linconv::read_logits(read, student_logits, teacher_logits, temperature);
    if (!any) return;
    double_math = in_double(read.student, read.teacher);
    student = read.student.dtype, teacher = read.teacher.dtype;
    args.student = frames_of(read.student);
    args.teacher = frames_of(read.teacher);
    args.batch = read.student.size[0], args.frames = read.student.size[1], args.classes = read.student.size[2];
    args.rows = rows_of(mask, args.batch, args.frames, "logits_mask");
    masked = mask.has_value();
    args.team = team_size(args.classes, double_math ? kHeld<double> / 2 : kHeld<float> / 2, kThreads);
    args.temperature = temperature;
    args.number = {nullptr, rows()};
  }
  int64_t rows() const { return args.batch * args.frames; }
  DType math() const { return double_math ? DType::kFloat64 : DType::kFloat32; }
  unsigned blocks() const { return grid_dim(ceil_div(rows(), kThreads / args.team), kGridX, "rows"); }

  Tensor forward(const Launcher& launch) {
    Tensor statistics = empty({rows(), kStatistics}, DType::kFloat64);
    args.statistics = static_cast<double*>(statistics.data_ptr());
    if (!any) return statistics;
    with_types(double_math, student, teacher, [&](auto math, auto storage) {
      launch(logits_forward<decltype(math), decltype(storage)>, dim3(blocks()), kThreads, team_bytes<double, 3>(kThreads), args);
    });
    return statistics;
  }
  void backward(const Launcher& launch) const {
    if (args.grad_student == nullptr && args.grad_teacher == nullptr) return;
    const int64_t span = args.team * (double_math ? kHeld<double> / 2 : kHeld<float> / 2);
    const dim3 grid(blocks(), static_cast<unsigned>(std::min(ceil_div(args.classes, span), kGridY)));
    with_types(double_math, student, teacher, [&](auto math, auto storage) {
      launch(logits_backward<decltype(math), decltype(storage)>, grid, kThreads, 0, args);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> distillation_loss(Tensors student, Tensors teacher, Optional mask, bool layer_norm,
                                                             Optional student_logits, Optional teacher_logits,
                                                             Optional logits_mask, double temperature) {
  require(!student.empty() || student_logits.has_value(), "student has 0 tensors and student_logits is absent, wanted some of one");
  const Launcher launch(student.empty() ? *student_logits : student[0]);
  HiddenStates hidden(student, teacher, mask);
  Logits logits(student_logits, teacher_logits, logits_mask, temperature);
  const int64_t layers = static_cast<int64_t>(hidden.layers.size()), parts = hidden.batch * hidden.row_blocks;
  Tensor errors = empty({layers}, hidden.math()), cosines = empty({layers}, hidden.math());
  Tensor partial = empty({2, layers, parts}, DType::kFloat64);
  hidden.args.partial = static_cast<double*>(partial.data_ptr());
  hidden.args.other = layers * parts;
  hidden.each_launch([&](auto math, auto storage, dim3 grid) {
    using T = decltype(math);
    using S = decltype(storage);
    const int64_t bytes = team_bytes<double, kLayerSums>(kThreads) + 2 * kFrames * static_cast<int64_t>(sizeof(double));
    launch(layer_norm ? layers_forward<T, S, true> : layers_forward<T, S, false>, grid, kThreads, bytes, hidden.args);
  });
  if (layers > 0) {
    const Counted counted(launch, hidden.args.rows, mask.has_value(), hidden.batch, hidden.frames);
    take_mean(launch, {hidden.args.partial, parts, hidden.row_blocks, 1, hidden.batch, hidden.row_blocks, layers,
                       {errors.data_ptr(), cosines.data_ptr()}, hidden.math(), counted.number}, 2 * layers);
  }
  Tensor kd = empty({1}, logits.math()), statistics = logits.forward(launch);
  const Counted counted(launch, logits.args.rows, logits.masked, logits.args.batch, logits.args.frames);
  take_mean(launch, {logits.args.statistics + kStatistics - 1, 0, logits.args.frames * kStatistics, kStatistics, logits.args.batch,
                     logits.args.frames, 1, {kd.data_ptr(), nullptr}, logits.math(), counted.number}, 1);
  return {errors, cosines, kd, statistics};
}

std::tuple<Tensors, Tensors, Tensor, Tensor> distillation_loss_backward(
    Tensor grad_errors, Tensor grad_kd, Tensors student, Tensors teacher, Optional mask, bool layer_norm, Optional student_logits,
    Optional teacher_logits, Optional logits_mask, double temperature, Tensor statistics, bool of_student, bool of_teacher,
    bool of_student_logits, bool of_teacher_logits) {
  const Launcher launch(grad_errors);
  HiddenStates hidden(student, teacher, mask);
  Logits logits(student_logits, teacher_logits, logits_mask, temperature);
  hidden.args.upstream = read_factors(grad_errors, static_cast<int64_t>(hidden.layers.size()), "grad_errors");
  logits.args.upstream = read_factors(grad_kd, 1, "grad_kd");
  logits.args.upstream.stride[0] = 0;
  Tensors student_gradients, teacher_gradients;
  for (size_t i = 0; i < hidden.layers.size(); ++i) {
    LayerPair& layer = hidden.layers[i];
    student_gradients.push_back(gradient(of_student, layer.student, student[i], layer.grad_student));
    teacher_gradients.push_back(gradient(of_teacher, layer.teacher, teacher[i], layer.grad_teacher));
  }
  if (!hidden.layers.empty() && (of_student || of_teacher)) {
    const Counted counted(launch, hidden.args.rows, mask.has_value(), hidden.batch, hidden.frames);
    hidden.args.number = counted.number;
    hidden.each_launch([&](auto math, auto storage, dim3 grid) {
      using T = decltype(math);
      using S = decltype(storage);
      launch(layer_norm ? layers_backward<T, S, true> : layers_backward<T, S, false>, grid, kThreads, team_bytes<T, 4>(kThreads), hidden.args);
    });
  }
  Tensor student_gradient = empty({0}, logits.student), teacher_gradient = empty({0}, logits.teacher);
  if (logits.any) {
    if (of_student_logits) student_gradient = empty_as(*student_logits, logits.student), logits.args.grad_student = student_gradient.data_ptr();
    if (of_teacher_logits) teacher_gradient = empty_as(*teacher_logits, logits.teacher), logits.args.grad_teacher = teacher_gradient.data_ptr();
    logits.args.statistics = read_statistics(statistics, logits.rows(), "statistics");
    const bool wanted = of_student_logits || of_teacher_logits;
    const Counted counted(launch, logits.args.rows, logits.masked && wanted, logits.args.batch, logits.args.frames);
    logits.args.number = counted.number;
    logits.backward(launch);
  }
  return {student_gradients, teacher_gradients, student_gradient, teacher_gradient};
}

// The same for a tile of (rows, classes) logits: what is known of each row after these classes too.
Tensor kd_statistics(Tensor student, Tensor teacher, Optional before, double temperature) {
  const Launcher launch(student);
  Logits logits(torch::stable::unsqueeze(student, 0), torch::stable::unsqueeze(teacher, 0), std::nullopt, temperature);
  if (before) logits.args.before = read_statistics(*before, logits.rows(), "before");
  return logits.forward(launch);
}

// The gradient of scale[row] * KL of each row by the student's logits, given the statistics over all classes.
Tensor kd_gradient(Tensor student, Tensor teacher, Tensor statistics, Tensor scale, double temperature) {
  const Launcher launch(student);
  Logits logits(torch::stable::unsqueeze(student, 0), torch::stable::unsqueeze(teacher, 0), std::nullopt, temperature);
  logits.args.statistics = read_statistics(statistics, logits.rows(), "statistics");
  logits.args.upstream = read_factors(scale, logits.rows(), "scale");
  logits.args.number = {nullptr, 1};
  Tensor out = empty_as(student, logits.student);
  logits.args.grad_student = out.data_ptr();
  logits.backward(launch);
  return out;
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) {
  m.impl("distillation_loss", TORCH_BOX(&linconv::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&linconv::distillation_loss_backward));
  m.impl("kd_statistics", TORCH_BOX(&linconv::kd_statistics));
  m.impl("kd_gradient", TORCH_BOX(&linconv::kd_gradient));
}
