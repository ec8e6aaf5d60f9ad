#include "distillation_loss/kernel.h"

#include "common/rows.h"

namespace linconv::LINCONV_ISA {
namespace {

// v as it is, rounded: a product that the compiler may not fuse into a later sum on one side of a difference only, or
// what is equal on both sides would differ.
template <class V>
LINCONV_INLINE V rounded(V v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+w"(v));
#endif
  return v;
}

// ---- Hidden states

// Calls step(c, load, store) for every vector of n elements; those of the last, partial one touch its own lanes only,
// and read 0 in the others.
template <class T, class Step>
LINCONV_INLINE void each_vector(int64_t n, Step step) {
  int64_t c = 0;
  for (; c + kWidth<T> <= n; c += kWidth<T>)
    step(c, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  if (const int rest = static_cast<int>(n - c); rest > 0)
    step(c, [=](const T* p) { return load(p, rest); }, [=](T* p, Vec<T> v) { store(p, v, rest); });
}

// Frame t of a batch row: where it is, if it can be used there, else a copy in the math type.
template <class T>
LINCONV_INLINE const T* read(const View<3>& view, int64_t row, int64_t t, T* buffer) {
  const void* p = at(view, row, t);
  if (view.stride[2] == 1 && view.dtype == kMathDType<T>) return static_cast<const T*>(p);
  load_row(p, view.dtype, view.stride[2], view.size[2], buffer);
  return buffer;
}

// Where the row after t is, if it will be read in place, else `here`.
template <class T>
LINCONV_INLINE const T* next(const View<3>& view, const Block& block, int64_t t, const T* here) {
  const bool there = t + 1 < block.end && view.stride[2] == 1 && view.dtype == kMathDType<T>;
  return there ? static_cast<const T*>(at(view, block.row, t + 1)) : here;
}

// Past the caches: a result larger than they are is not read from memory only to be overwritten. p is a multiple of the
// vector's size.
LINCONV_INLINE void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
LINCONV_INLINE void stream(double* p, Vec<double> v) { store(p, v); }

LINCONV_INLINE void end_of_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// A row of both sides, and what brings each to mean 0 and variance 1.
template <class T>
struct RowPair {
  const T *s, *t;
  int64_t d;
  T mean_s = 0, mean_t = 0, scale_s = 1, scale_t = 1;
  T k_s = 0, k_t = 0;  // with e the difference of the normalised rows: mean(e xs) and mean(-e xt), for gradients
};

template <class T>
LINCONV_INLINE T inverse_deviation(T squares, int64_t d) {
  constexpr T eps = T(1e-5);  // that of layer norms
  const T variance = squares / d + eps;
  return T(1) / (sizeof(T) == 8 ? __builtin_sqrt(variance) : __builtin_sqrtf(variance));
}

// Means first, then squares about them: the variance of values far from 0 keeps its digits. The memory at `next` is
// asked for meanwhile: a row that is gone through several times would else leave the memory idle.
//
// k_s and k_t come from sums of a (a - b) and b (b - a), with a and b the values about their means: nothing cancels
// there that does not cancel in e, and equal rows give exactly 0.
template <class T>
LINCONV_INLINE void normalize(RowPair<T>& r, const T* next_s, const T* next_t) {
  Vec<T> sum_s{}, sum_t{};
  each_vector<T>(r.d, [&](int64_t c, auto load, auto) { sum_s += load(r.s + c), sum_t += load(r.t + c); });
  r.mean_s = sum(sum_s) / r.d, r.mean_t = sum(sum_t) / r.d;
  Vec<T> squares_s{}, squares_t{}, apart_s{}, apart_t{};
  const auto add = [&](Vec<T> a, Vec<T> b) {
    const Vec<T> apart = a - b;
    squares_s += a * a, squares_t += b * b, apart_s += a * apart, apart_t -= b * apart;
  };
  int64_t c = 0;
  for (; c + kWidth<T> <= r.d; c += kWidth<T>) {
    add(load(r.s + c) - r.mean_s, load(r.t + c) - r.mean_t);
    __builtin_prefetch(next_s + c), __builtin_prefetch(next_t + c);
  }
  for (; c < r.d; ++c) {  // in one lane, the others adding 0
    Vec<T> a{}, b{};
    a[0] = r.s[c] - r.mean_s, b[0] = r.t[c] - r.mean_t;
    add(a, b);
  }
  const T total_s = sum(squares_s), total_t = sum(squares_t);
  r.scale_s = inverse_deviation(total_s, r.d), r.scale_t = inverse_deviation(total_t, r.d);
  const T apart = r.scale_s - r.scale_t;
  r.k_s = r.scale_s * (apart * total_s + r.scale_t * sum(apart_s)) / r.d;
  r.k_t = r.scale_t * (-apart * total_t + r.scale_s * sum(apart_t)) / r.d;
}

// Calls step(c, s, t, store) with both sides' values, normalised by normalize(). Lanes past the end hold what 0 gives.
template <class T, class Step>
LINCONV_INLINE void each_normalized(const RowPair<T>& r, Step step) {
  const T *row_s = r.s, *row_t = r.t;
  const T mean_s = r.mean_s, mean_t = r.mean_t, scale_s = r.scale_s, scale_t = r.scale_t;
  each_vector<T>(r.d, [=](int64_t c, auto load, auto store) {
    step(c, rounded((load(row_s + c) - mean_s) * scale_s), rounded((load(row_t + c) - mean_t) * scale_t), store);
  });
}

// The sum over a row of f(normalised s, normalised t).
template <class T, class F>
LINCONV_INLINE T sum_normalized(const RowPair<T>& r, F f) {
  Vec<T> even{}, odd{};
  int64_t c = 0;
  const auto at = [&](int64_t i) {
    return f(rounded((load(r.s + i) - r.mean_s) * r.scale_s), rounded((load(r.t + i) - r.mean_t) * r.scale_t));
  };
  for (; c + 2 * kWidth<T> <= r.d; c += 2 * kWidth<T>) even += at(c), odd += at(c + kWidth<T>);
  for (; c + kWidth<T> <= r.d; c += kWidth<T>) even += at(c);
  T rest = 0;
  for (; c < r.d; ++c)
    rest += f(rounded(splat((r.s[c] - r.mean_s) * r.scale_s)), rounded(splat((r.t[c] - r.mean_t) * r.scale_t)))[0];
  return sum(even + odd) + rest;
}

template <class T>
double cosine(const RowPair<T>& r) {
  Vec<T> ss{}, tt{}, st{};
  each_vector<T>(r.d, [&](int64_t c, auto load, auto) {
    const Vec<T> s = load(r.s + c), t = load(r.t + c);
    ss += s * s, tt += t * t, st += s * t;
  });
  constexpr double least = 1e-8;  // that of torch's cosine_similarity
  const double norm_s = __builtin_sqrt(static_cast<double>(sum(ss)));
  const double norm_t = __builtin_sqrt(static_cast<double>(sum(tt)));
  return sum(st) / ((norm_s < least ? least : norm_s) * (norm_t < least ? least : norm_t));
}

LINCONV_INLINE bool counts(const uint8_t* valid, int64_t row, int64_t frames, int64_t t) {
  return valid == nullptr || valid[row * frames + t] != 0;
}

template <class T>
void forward(const LayerArgs& a, T* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const LayerPair& layer = a.layers[task / a.block_count];
    const Block& block = a.blocks[task % a.block_count];
    const int64_t frames = layer.student.size[1], d = layer.student.size[2];
    double error = 0, cosines = 0;
    for (int64_t t = block.begin; t < block.end; ++t) {
      if (!counts(a.valid, block.row, frames, t)) continue;
      RowPair<T> r{read(layer.student, block.row, t, scratch), read(layer.teacher, block.row, t, scratch + d), d};
      cosines += cosine(r);
      if (a.layer_norm) normalize(r, next(layer.student, block, t, r.s), next(layer.teacher, block, t, r.t));
      const auto squared = [](Vec<T> s, Vec<T> u) { return (s - u) * (s - u); };
      error += static_cast<double>(sum_normalized(r, squared)) / d;
    }
    a.partial[2 * task] = error;
    a.partial[2 * task + 1] = cosines;
  }
}

// Where the gradient of one side of one row goes.
template <class T>
struct Target {
  void* place;
  DType dtype;
  int64_t stride, n;
  T* row;  // written here first

  Target(const View<3>& view, int64_t b, int64_t t, T* buffer)
      : place(view.data == nullptr ? nullptr : at(view, b, t)),
        dtype(view.dtype),
        stride(view.stride[2]),
        n(view.size[2]) {
    const bool in_place = stride == 1 && dtype == kMathDType<T>;
    row = place == nullptr ? nullptr : in_place ? static_cast<T*>(place) : buffer;
  }
  // Whether it can be streamed: in place, in whole vectors.
  bool aligned() const {
    return row != nullptr && row == place && n % kWidth<T> == 0 && reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0;
  }
  void put(int64_t column, int64_t count, const T* values) const {
    store_row(offset(place, dtype, column * stride), dtype, stride, count, values);
  }
  void done() const {
    if (row != nullptr && row != place) put(0, n, row);
  }
  void clear() const {
    const T zeros[64] = {};
    for (int64_t c = 0; place != nullptr && c < n; c += 64) put(c, min<int64_t>(64, n - c), zeros);
  }
};

// With e = xs - xt the difference of the normalised rows: ds = scale_s g (e - xs mean(e xs)), mean(e) being 0; the
// teacher's is the same with both signs of e turned.
template <class T>
void backward(const LayerArgs& a, T* scratch, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const LayerPair& layer = a.layers[task / a.block_count];
    const Block& block = a.blocks[task % a.block_count];
    const int64_t frames = layer.student.size[1], d = layer.student.size[2];
    const T g = static_cast<T>(layer.scale);
    for (int64_t t = block.begin; t < block.end; ++t) {
      const Target<T> ds(layer.grad_student, block.row, t, scratch + 2 * d);
      const Target<T> dt(layer.grad_teacher, block.row, t, scratch + 3 * d);
      if (!counts(a.valid, block.row, frames, t)) {
        ds.clear(), dt.clear();
        continue;
      }
      RowPair<T> r{read(layer.student, block.row, t, scratch), read(layer.teacher, block.row, t, scratch + d), d};
      if (!a.layer_norm && a.stream && ds.aligned() && dt.row == nullptr) {
        for (int64_t c = 0; c < d; c += kWidth<T>) stream(ds.row + c, (load(r.s + c) - load(r.t + c)) * g);
      } else if (!a.layer_norm) {
        each_vector<T>(d, [&](int64_t c, auto load, auto store) {
          const Vec<T> e = (load(r.s + c) - load(r.t + c)) * g;
          if (ds.row != nullptr) store(ds.row + c, e);
          if (dt.row != nullptr) store(dt.row + c, -e);
        });
      } else {
        normalize(r, next(layer.student, block, t, r.s), next(layer.teacher, block, t, r.t));
        if (ds.row != nullptr) {
          T* out = ds.row;  // copies: what is stored must not be taken for a change of them
          const T k = r.k_s, scale = r.scale_s * g;
          if (a.stream && ds.aligned())
            each_normalized(r, [=](int64_t c, Vec<T> s, Vec<T> u, auto) { stream(out + c, (s - u - s * k) * scale); });
          else
            each_normalized(
                r, [=](int64_t c, Vec<T> s, Vec<T> u, auto store) { store(out + c, (s - u - s * k) * scale); });
        }
        if (dt.row != nullptr) {
          T* out = dt.row;
          const T k = r.k_t, scale = r.scale_t * g;
          each_normalized(
              r, [=](int64_t c, Vec<T> s, Vec<T> u, auto store) { store(out + c, (u - s - u * k) * scale); });
        }
      }
      ds.done(), dt.done();
    }
  }
  if (a.stream) end_of_streams();
}

// ---- Logits

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// n columns of a row in the math type; past them -inf up to a whole number of vectors.
template <class T>
LINCONV_INLINE const T* columns(const View<3>& view, const void* row, int64_t column, int64_t n, T* buffer) {
  const void* p = offset(row, view.dtype, column * view.stride[2]);
  if (view.stride[2] == 1 && view.dtype == kMathDType<T> && n % kWidth<T> == 0) return static_cast<const T*>(p);
  load_row(p, view.dtype, view.stride[2], n, buffer);
  for (int64_t i = n; i % kWidth<T> != 0; ++i) buffer[i] = -kInfinity<T>;
  return buffer;
}

template <class T>
void forward(const LogitArgs& a, T* scratch, int64_t begin, int64_t end) {
  const int64_t frames = a.student.size[1], classes = a.student.size[2];
  const T inverse = static_cast<T>(1 / a.temperature);
  T *s_buffer = scratch, *t_buffer = scratch + kLossColumns + 64;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / frames, f = index % frames;
    double* out = a.statistics + index * kStatistics;
    if (!counts(a.valid, b, frames, f)) {
      for (int64_t i = 0; i < kStatistics; ++i) out[i] = 0;
      continue;
    }
    Softmaxes sums;
    if (a.before != nullptr) sums = load_softmaxes(a.before + index * kStatistics);
    const void *s_row = at(a.student, b, f), *t_row = at(a.teacher, b, f);
    for (int64_t c = 0; c < classes; c += kLossColumns) {
      const int64_t n = min<int64_t>(kLossColumns, classes - c);
      const T *sp = columns(a.student, s_row, c, n, s_buffer), *tp = columns(a.teacher, t_row, c, n, t_buffer);
      Vec<T> s_max = splat(-kInfinity<T>), t_max = s_max;
      for (int64_t i = 0; i < n; i += kWidth<T>) s_max = max(s_max, load(sp + i)), t_max = max(t_max, load(tp + i));
      raise(sums, static_cast<double>(greatest(s_max) * inverse), static_cast<double>(greatest(t_max) * inverse));
      const T s_shift = static_cast<T>(shift(sums.s)), t_shift = static_cast<T>(shift(sums.t));
      Vec<T> s_sum{}, t_sum{}, w_sum{};
      for (int64_t i = 0; i < n; i += kWidth<T>) {
        const Vec<T> u = rounded(load(sp + i) * inverse) - s_shift, v = rounded(load(tp + i) * inverse) - t_shift;
        const Vec<T> e = rounded(exp(v));
        s_sum += rounded(exp(u));
        t_sum += e;
        w_sum += e == T(0) ? Vec<T>{} : e * (v - u);
      }
      sums.s.total += static_cast<double>(sum(s_sum));
      sums.t.total += static_cast<double>(sum(t_sum));
      sums.w += static_cast<double>(sum(w_sum));
    }
    store_statistics(out, sums);
  }
}

// With q, p the student's and the teacher's probabilities: ds = g (q - p) / T, dt = g p (log(p / q) - KL) / T.
template <class T>
void backward(const LogitArgs& a, T* scratch, int64_t begin, int64_t end) {
  const int64_t frames = a.student.size[1], classes = a.student.size[2];
  const T inverse = static_cast<T>(1 / a.temperature);
  T *s_buffer = scratch, *t_buffer = s_buffer + kLossColumns + 64, *ds_buffer = t_buffer + kLossColumns + 64,
    *dt_buffer = ds_buffer + kLossColumns + 64;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / frames, f = index % frames;
    const Target<T> ds_row(a.grad_student, b, f, ds_buffer), dt_row(a.grad_teacher, b, f, dt_buffer);
    if (!counts(a.valid, b, frames, f)) {
      ds_row.clear(), dt_row.clear();
      continue;
    }
    const double* in = a.statistics + index * kStatistics;
    const auto [s, t, w] = load_softmaxes(in);
    const T s_shift = static_cast<T>(shift(s)), t_shift = static_cast<T>(shift(t));
    const T s_part = static_cast<T>(1 / s.total), t_part = static_cast<T>(1 / t.total);
    // Two logarithms count on a short row, and only teachers' gradients take them.
    const bool of_teacher = dt_row.row != nullptr;
    const T offset_ = of_teacher ? static_cast<T>(__builtin_log(s.total) - __builtin_log(t.total) - in[5]) : T(0);
    const T g = static_cast<T>(a.scale[index * a.scale_stride] / a.temperature);
    const void *s_row = at(a.student, b, f), *t_row = at(a.teacher, b, f);
    for (int64_t c = 0; c < classes; c += kLossColumns) {
      const int64_t n = min<int64_t>(kLossColumns, classes - c);
      const T *sp = columns(a.student, s_row, c, n, s_buffer), *tp = columns(a.teacher, t_row, c, n, t_buffer);
      // In place just where a whole number of vectors fits.
      const bool fits = n % kWidth<T> == 0;
      T* ds = ds_row.row == nullptr ? nullptr : fits && ds_row.row == ds_row.place ? ds_row.row + c : ds_buffer;
      T* dt = dt_row.row == nullptr ? nullptr : fits && dt_row.row == dt_row.place ? dt_row.row + c : dt_buffer;
      for (int64_t i = 0; i < n; i += kWidth<T>) {
        const Vec<T> u = rounded(load(sp + i) * inverse) - s_shift, v = rounded(load(tp + i) * inverse) - t_shift;
        const Vec<T> q = rounded(exp(u) * s_part), p = rounded(exp(v) * t_part);
        if (ds != nullptr) store(ds + i, (q - p) * g);
        if (dt != nullptr) store(dt + i, p == T(0) ? Vec<T>{} : p * (v - u + offset_) * g);
      }
      if (ds != nullptr && ds == ds_buffer) ds_row.put(c, n, ds);
      if (dt != nullptr && dt == dt_buffer) dt_row.put(c, n, dt);
    }
  }
}

template <class Args, class F>
LINCONV_INLINE void in_math_type(const Args& a, void* scratch, F f) {
  if (a.in_double) f(static_cast<double*>(scratch));
  else f(static_cast<float*>(scratch));
}

}  // namespace

#define LINCONV_ENTRY(name, Args, function)                                                 \
  void name(const Args& args, void* scratch, int64_t begin, int64_t end) {                  \
    in_math_type(args, scratch, [&](auto* typed) { function(args, typed, begin, end); });   \
  }
LINCONV_ENTRY(layers_forward, LayerArgs, forward)
LINCONV_ENTRY(layers_backward, LayerArgs, backward)
LINCONV_ENTRY(logits_forward, LogitArgs, forward)
LINCONV_ENTRY(logits_backward, LogitArgs, backward)
#undef LINCONV_ENTRY

}  // namespace linconv::LINCONV_ISA
