#include "gated_rms_norm/kernel.h"

#include "common/rows.h"

namespace linconv::LINCONV_ISA {
namespace {

// Calls step(c, load, store) for every vector of n channels; those of the last, partial one touch its own lanes only.
template <class T, class Step>
LINCONV_INLINE void each_vector(int64_t n, Step step) {
  int64_t c = 0;
  for (; c + kWidth<T> <= n; c += kWidth<T>)
    step(c, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  if (const int rest = static_cast<int>(n - c); rest > 0)
    step(c, [=](const T* p) { return load(p, rest); }, [=](T* p, Vec<T> v) { store(p, v, rest); });
}

template <class T>
T inverse_root(T sum_of_squares, int64_t n, T eps) {
  return T(1) / (sizeof(T) == 8 ? __builtin_sqrt(sum_of_squares / n + eps) : __builtin_sqrtf(sum_of_squares / n + eps));
}

// One group of channels of one frame. y is the result's place and holds the gated values in between.
template <class T>
void normalize(const T* x, const T* z, const T* weight, int64_t n, T eps, T* y) {
  Vec<T> squares{};
  each_vector<T>(n, [&](int64_t c, auto load, auto store) {
    const Vec<T> gated = load(x + c) * silu(load(z + c));
    squares += gated * gated;
    store(y + c, gated);
  });
  const T r = inverse_root(sum(squares), n, eps);
  each_vector<T>(n, [&](int64_t c, auto load, auto store) { store(y + c, load(y + c) * r * load(weight + c)); });
}

template <class T>
struct Gradients {
  T *x, *z, *weight;   // results of one group; weight is added to
  bool add_x, add_z;   // an input that directions share: its second direction
  T *gated, *sigmoid;  // scratch
};

// With u = dy weight: d gated = r u - r^3 mean(u gated) gated, and from there through the gate.
template <class T>
void differentiate(const T* x, const T* z, const T* dy, const T* weight, int64_t n, T eps, const Gradients<T>& g) {
  Vec<T> squares{}, dots{};
  each_vector<T>(n, [&](int64_t c, auto load, auto store) {
    const Vec<T> gate = load(z + c), s = sigmoid(gate), gated = load(x + c) * (gate * s);
    squares += gated * gated;
    dots += load(dy + c) * load(weight + c) * gated;
    store(g.gated + c, gated);
    store(g.sigmoid + c, s);
  });
  const T r = inverse_root(sum(squares), n, eps), k = r * r * r * (sum(dots) / n);
  each_vector<T>(n, [&](int64_t c, auto load, auto store) {
    const Vec<T> upstream = load(dy + c), gated = load(g.gated + c), gate = load(z + c), s = load(g.sigmoid + c);
    const Vec<T> d = r * upstream * load(weight + c) - k * gated;
    const Vec<T> silu_ = gate * s;
    const Vec<T> dx = d * silu_, dz = d * load(x + c) * (s + silu_ * (T(1) - s));
    store(g.weight + c, load(g.weight + c) + upstream * gated * r);
    store(g.x + c, g.add_x ? load(g.x + c) + dx : dx);
    store(g.z + c, g.add_z ? load(g.z + c) + dz : dz);
  });
}

template <class T>
void load_weights(const NormArgs& a, T* to) {
  for (int64_t i = 0; i < a.directions; ++i)
    load_row(at(a.weight, i), a.weight.dtype, a.weight.stride[1], a.channels, to + i * a.channels);
}

template <class T>
void forward(const NormArgs& a, T* scratch, int64_t begin, int64_t end) {
  const int64_t d = a.channels;
  T *weights = scratch, *x_buffer = weights + a.directions * d, *z_buffer = x_buffer + d, *y_buffer = z_buffer + d;
  load_weights(a, weights);
  for (int64_t index = begin; index < end; ++index) {
    const Block& block = a.blocks[index];
    for (int64_t t = block.begin; t < block.end; ++t) {
      const T *x = nullptr, *z = nullptr;
      for (int64_t i = 0; i < a.directions; ++i) {
        const Rows<T> rows(a.y, i, block.row, 0, d);
        if (t >= block.last) {
          rows.clear(t);
          continue;
        }
        if (i < a.x.size[0]) x = Rows<T>(a.x, i, block.row, 0, d).read(t, x_buffer);
        if (i < a.z.size[0]) z = Rows<T>(a.z, i, block.row, 0, d).read(t, z_buffer);
        T* y = rows.target(t, y_buffer);
        for (int64_t c = 0; c < d; c += a.group_size)
          normalize(x + c, z + c, weights + i * d + c, a.group_size, static_cast<T>(a.eps), y + c);
        rows.written(t, y);
      }
    }
  }
}

template <class T>
void backward(const NormArgs& a, T* scratch, int64_t begin, int64_t end) {
  const int64_t d = a.channels;
  T *weights = scratch, *sums = weights + a.directions * d, *x_buffer = sums + a.directions * d, *z_buffer = x_buffer + d,
    *dy_buffer = z_buffer + d, *dx_buffer = dy_buffer + d, *dz_buffer = dx_buffer + d, *gated = dz_buffer + d,
    *sigmoid = gated + d;
  load_weights(a, weights);
  for (int64_t index = begin; index < end; ++index) {
    const Block& block = a.blocks[index];
    for (int64_t c = 0; c < a.directions * d; ++c) sums[c] = 0;
    for (int64_t t = block.begin; t < block.end; ++t) {
      const T *x = nullptr, *z = nullptr;
      T *dx = nullptr, *dz = nullptr;
      for (int64_t i = 0; i < a.directions; ++i) {
        const bool own_x = i < a.x.size[0], own_z = i < a.z.size[0];
        const Rows<T> x_target(a.grad_x, own_x ? i : 0, block.row, 0, d), z_target(a.grad_z, own_z ? i : 0, block.row, 0, d);
        if (t >= block.last) {
          if (own_x) x_target.clear(t);
          if (own_z) z_target.clear(t);
          continue;
        }
        if (own_x) x = Rows<T>(a.x, i, block.row, 0, d).read(t, x_buffer), dx = x_target.target(t, dx_buffer);
        if (own_z) z = Rows<T>(a.z, i, block.row, 0, d).read(t, z_buffer), dz = z_target.target(t, dz_buffer);
        const T* dy = Rows<T>(a.grad_y, i, block.row, 0, d).read(t, dy_buffer);
        for (int64_t c = 0; c < d; c += a.group_size) {
          const Gradients<T> g{dx + c, dz + c, sums + i * d + c, !own_x, !own_z, gated, sigmoid};
          differentiate(x + c, z + c, dy + c, weights + i * d + c, a.group_size, static_cast<T>(a.eps), g);
        }
        // What directions share is complete, and rounded, after the last one.
        if (a.x.size[0] > 1 || i + 1 == a.directions) x_target.written(t, dx);
        if (a.z.size[0] > 1 || i + 1 == a.directions) z_target.written(t, dz);
      }
    }
    T* partial = static_cast<T*>(a.partial) + index * a.directions * d;
    for (int64_t c = 0; c < a.directions * d; ++c) partial[c] = sums[c];
  }
}

template <class T>
void reduce(const NormArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 256;
  for (int64_t i = 0; i < a.directions; ++i)
    for (int64_t c = begin; c < end; c += kColumns) {
      const int64_t n = min(kColumns, end - c);
      T sums[kColumns] = {};
      for (int64_t b = 0; b < a.block_count; ++b) {
        const T* partial = static_cast<const T*>(a.partial) + (b * a.directions + i) * a.channels + c;
        for (int64_t k = 0; k < n; ++k) sums[k] += partial[k];
      }
      store_row(at(a.grad_weight, i, c), a.grad_weight.dtype, a.grad_weight.stride[1], n, sums);
    }
}

}  // namespace

void gated_rms_norm_forward(const NormArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.x.dtype == DType::kFloat64 ? forward(a, static_cast<double*>(scratch), begin, end)
                               : forward(a, static_cast<float*>(scratch), begin, end);
}

void gated_rms_norm_backward(const NormArgs& a, void* scratch, int64_t begin, int64_t end) {
  a.x.dtype == DType::kFloat64 ? backward(a, static_cast<double*>(scratch), begin, end)
                               : backward(a, static_cast<float*>(scratch), begin, end);
}

void gated_rms_norm_reduce(const NormArgs& a, int64_t begin, int64_t end) {
  a.x.dtype == DType::kFloat64 ? reduce<double>(a, begin, end) : reduce<float>(a, begin, end);
}

}  // namespace linconv::LINCONV_ISA
