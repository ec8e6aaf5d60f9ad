#include "short_conv/kernel.h"

#include "common/rows.h"

// A direction with taps at offsets low, low + 1, ... from a frame: tap j of a causal one is weight[j], of a mirrored one
// weight[width - 1 - j]. From there on both are the same code:
//   pre[t] = bias + sum_j w[j] x[t + low + j],   y = silu(pre)
//   dx[t] = sum_j w[j] dpre[t - low - j],        dw[j] = sum_t dpre[t] x[t + low + j]
// Rows outside the sequence are read as zeros, so that a frame's arithmetic does not depend on what stands around it.
namespace linconv::LINCONV_ISA {
namespace {

constexpr int kFrames = 4;        // that a step computes at once: they share their taps' loads
constexpr int kTile = 2 * kFrames;  // frames between two updates of the weights' gradient

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

alignas(64) constexpr double kZeros[kConvChannels] = {};

// One direction's filter over the task's channels.
template <class T>
struct alignas(64) Filter {
  T w[kMaxConvWidth][kConvChannels];
  T bias[kConvChannels];
  int64_t low;  // offset of tap 0

  void load(const ConvArgs& a, int64_t direction, int64_t channel, int n) {
    const bool mirrored = a.reverse != (direction == 1);
    low = mirrored ? -a.lookahead : a.lookahead - (a.width - 1);
    for (int64_t j = 0; j < a.width; ++j)
      load_row(at(a.weight, direction, channel, mirrored ? a.width - 1 - j : j), a.weight.dtype, a.weight.stride[1], n, w[j]);
    if (a.bias.data) {
      load_row(at(a.bias, direction, channel), a.bias.dtype, a.bias.stride[1], n, bias);
    } else {
      for (int i = 0; i < kConvChannels; ++i) bias[i] = 0;
    }
  }
};

// bias + sum_j w[j] x[i + j] for the kFrames frames i; x holds the rows from the first tap of frame 0 on.
template <class T, int width>
LINCONV_INLINE void filter(const Filter<T>& f, const T* const* x, int c, Vec<T> (&pre)[kFrames]) {
  Vec<T> in[kFrames + width - 1];
#pragma GCC unroll 16
  for (int i = 0; i < kFrames + width - 1; ++i) in[i] = load(x[i] + c);
  const Vec<T> bias = load(f.bias + c);
#pragma GCC unroll 4
  for (int i = 0; i < kFrames; ++i) pre[i] = bias;
#pragma GCC unroll 8
  for (int j = 0; j < width; ++j) {
    const Vec<T> w = load(f.w[j] + c);
#pragma GCC unroll 4
    for (int i = 0; i < kFrames; ++i) pre[i] += w * in[i + j];
  }
}

// y = act(pre) of kFrames frames.
template <class T, int width, bool silu_>
void convolve(const Filter<T>& f, const T* const* x, int n, T* const* y) {
  for (int c = 0; c < n; c += kWidth<T>) {
    Vec<T> pre[kFrames];
    filter<T, width>(f, x, c, pre);
#pragma GCC unroll 4
    for (int i = 0; i < kFrames; ++i) store(y[i] + c, silu_ ? silu(pre[i]) : pre[i]);
  }
}

// dpre = dy * act'(pre) of kFrames frames, pre computed again.
template <class T, int width, bool silu_>
void gradient(const Filter<T>& f, const T* const* x, const T* const* dy, int n, T* const* dpre) {
  for (int c = 0; c < n; c += kWidth<T>) {
    Vec<T> pre[kFrames];
    if constexpr (silu_) filter<T, width>(f, x, c, pre);
#pragma GCC unroll 4
    for (int i = 0; i < kFrames; ++i) {
      Vec<T> d = load(dy[i] + c);
      if constexpr (silu_) {
        const Vec<T> s = sigmoid(pre[i]);
        d *= s + pre[i] * s * (splat<T>(1) - s);
      }
      store(dpre[i] + c, d);
    }
  }
}

// dx[i] = sum over directions and j of w[j] dpre[i + width - 1 - j] of kFrames frames; dpre holds the rows from the one
// that the last tap of frame 0 turns to.
template <class T, int width, int directions>
void input_gradient(const Filter<T>* f, const T* const* const* dpre, int n, T* const* dx) {
  for (int c = 0; c < n; c += kWidth<T>) {
    Vec<T> sum[kFrames] = {};
#pragma GCC unroll 2
    for (int d = 0; d < directions; ++d) {
      Vec<T> in[kFrames + width - 1];
#pragma GCC unroll 16
      for (int i = 0; i < kFrames + width - 1; ++i) in[i] = load(dpre[d][i] + c);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) {
        const Vec<T> w = load(f[d].w[j] + c);
#pragma GCC unroll 4
        for (int i = 0; i < kFrames; ++i) sum[i] += w * in[i + width - 1 - j];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kFrames; ++i) store(dx[i] + c, sum[i]);
  }
}

// sums[j] += sum_i dpre[i] x[i + j] over the kTile frames of a tile; sums[width] += sum_i dpre[i].
template <class T, int width>
void weight_gradient(const T* const* dpre, const T* const* x, int n, T (*sums)[kConvChannels]) {
  for (int c = 0; c < n; c += kWidth<T>) {
    Vec<T> acc[width + 1];
#pragma GCC unroll 9
    for (int j = 0; j <= width; ++j) acc[j] = load(sums[j] + c);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const Vec<T> d = load(dpre[i] + c);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) acc[j] += d * load(x[i + j] + c);
      acc[width] += d;
    }
#pragma GCC unroll 9
    for (int j = 0; j <= width; ++j) store(sums[j] + c, acc[j]);
  }
}

template <class T>
struct Steps {  // the above for one width and activation
  void (*convolve)(const Filter<T>&, const T* const*, int, T* const*);
  void (*gradient)(const Filter<T>&, const T* const*, const T* const*, int, T* const*);
  void (*input_gradient[2])(const Filter<T>*, const T* const* const*, int, T* const*);  // by directions - 1
  void (*weight_gradient)(const T* const*, const T* const*, int, T (*)[kConvChannels]);
};

template <class T, int width>
Steps<T> steps_of(bool silu_) {
  return {silu_ ? convolve<T, width, true> : convolve<T, width, false>,
          silu_ ? gradient<T, width, true> : gradient<T, width, false>,
          {input_gradient<T, width, 1>, input_gradient<T, width, 2>},
          weight_gradient<T, width>};
}

template <class T>
Steps<T> steps(const ConvArgs& a) {
  switch (a.width) {
    case 2: return steps_of<T, 2>(a.silu);
    case 3: return steps_of<T, 3>(a.silu);
    case 4: return steps_of<T, 4>(a.silu);
    case 5: return steps_of<T, 5>(a.silu);
    case 6: return steps_of<T, 6>(a.silu);
    case 7: return steps_of<T, 7>(a.silu);
    default: return steps_of<T, 8>(a.silu);
  }
}

// The last N rows put, N a power of 2. Pointers stand twice, so that any N of them in a row are contiguous.
template <class T, int N>
struct alignas(64) Ring {
  T buffer[N][kConvChannels];
  const T* row[2 * N];

  T* slot(int64_t t) { return buffer[t & (N - 1)]; }
  void put(int64_t t, const T* p) { row[t & (N - 1)] = row[(t & (N - 1)) + N] = p; }
  const T* const* from(int64_t t) const { return row + (t & (N - 1)); }  // rows t, t + 1, ...
};

template <class T>
struct Pass {  // one task: what it is of, and the directions that share an input
  const ConvArgs& a;
  const Block& block;
  int64_t index, channel;
  int n;
  Steps<T> step;

  Pass(const ConvArgs& a, int64_t task)
      : a(a),
        block(a.blocks[task / a.channel_blocks]),
        index(task / a.channel_blocks),
        channel(task % a.channel_blocks * kConvChannels),
        n(min(kConvChannels, a.channels - channel)),
        step(steps<T>(a)) {}

  Rows<T> rows(const View<4>& view, int64_t direction) const {
    Rows<T> rows(view, direction, block.row, channel, n);
    rows.in_place = rows.in_place && n % kWidth<T> == 0;  // the steps touch whole vectors
    return rows;
  }
  int64_t end() const { return min(block.end, block.last); }  // of the frames that are not padding
  bool inside(int64_t t) const { return block.first <= t && t < block.last; }
  const T* zeros() const { return reinterpret_cast<const T*>(kZeros); }

  void clear_padding(const Rows<T>& rows) const {
    for (int64_t t = max(block.begin, block.last); t < block.end; ++t)
      rows.clear(t);
  }

  template <int N>
  void fetch(const Rows<T>& rows, Ring<T, N>& ring, int64_t& next, int64_t end) const {
    for (; next < end; ++next) ring.put(next, inside(next) ? rows.read(next, ring.slot(next)) : zeros());
  }

  // Where a step puts its kFrames frames; those past the end, which the last step has too, are dropped.
  struct Targets {
    const Rows<T>& rows;
    int64_t t, count;
    T* row[kFrames];

    Targets(const Pass& pass, const Rows<T>& rows, int64_t t, T (*buffer)[kConvChannels])
        : rows(rows), t(t), count(min<int64_t>(kFrames, pass.end() - t)) {
      for (int i = 0; i < kFrames; ++i) row[i] = i < count ? rows.target(t + i, buffer[i]) : buffer[i];
    }
    void written() const {
      for (int i = 0; i < count; ++i) rows.written(t + i, row[i]);
    }
  };

  void forward(int64_t direction, int64_t count) const {
    Filter<T> f[2];
    Ring<T, 32> x;  // frames of a step and a span on both sides
    alignas(64) T results[kFrames][kConvChannels];
    const Rows<T> source = rows(a.x, direction), target[2] = {rows(a.y, direction), rows(a.y, direction + count - 1)};
    int64_t low = 0, high = 0;
    for (int i = 0; i < count; ++i) {
      f[i].load(a, direction + i, channel, n);
      low = min(low, f[i].low);
      high = max(high, f[i].low + a.width - 1);
    }
    int64_t next = block.begin + low;
    for (int64_t t = block.begin; t < end(); t += kFrames) {
      fetch(source, x, next, t + kFrames + high);
      for (int i = 0; i < count; ++i) {
        const Targets y(*this, target[i], t, results);
        step.convolve(f[i], x.from(t + f[i].low), n, y.row);
        y.written();
      }
    }
    for (int i = 0; i < count; ++i) clear_padding(target[i]);
  }

  void backward(int64_t direction, int64_t count) const {
    Filter<T> f[2];
    Ring<T, 32> x;        // frames of a tile and a span on both sides
    Ring<T, 16> dpre[2];  // and on one side
    alignas(64) T sums[2][kMaxConvWidth + 1][kConvChannels] = {};
    alignas(64) T results[kFrames][kConvChannels];
    const int64_t span = a.width - 1;
    const int64_t before = round_up(span, kFrames);  // frames whose dpre the first tile wants of the block before
    const Rows<T> source = rows(a.x, direction), target = rows(a.grad_x, direction),
                  upstream[2] = {rows(a.grad_y, direction), rows(a.grad_y, direction + count - 1)};
    int64_t next_x = block.begin - before, next[2];
    for (int i = 0; i < count; ++i) {
      f[i].load(a, direction + i, channel, n);
      next[i] = block.begin - f[i].low - before;
    }
    for (int64_t tile = block.begin; tile < end(); tile += kTile) {
      fetch(source, x, next_x, tile + kTile + span);
      for (int i = 0; i < count; ++i) {
        for (; next[i] < tile + kTile - f[i].low; next[i] += kFrames) {
          const T* dy[kFrames];
          T* d[kFrames];
          for (int k = 0; k < kFrames; ++k) {
            const int64_t t = next[i] + k;
            dy[k] = inside(t) ? upstream[i].read(t, results[k]) : zeros();
            d[k] = dpre[i].slot(t);
            dpre[i].put(t, inside(t) ? d[k] : zeros());
          }
          step.gradient(f[i], x.from(next[i] + f[i].low), dy, n, d);
        }
        // Frames of the tile past the block's end are past the sequence's: zeros.
        step.weight_gradient(dpre[i].from(tile), x.from(tile + f[i].low), n, sums[i]);
      }
      for (int64_t t = tile; t < min(tile + kTile, end()); t += kFrames) {
        const T* const* turned[2] = {dpre[0].from(t - f[0].low - span), dpre[count - 1].from(t - f[count - 1].low - span)};
        const Targets dx(*this, target, t, results);
        step.input_gradient[count - 1](f, turned, n, dx.row);
        dx.written();
      }
    }
    clear_padding(target);
    T* partial = static_cast<T*>(a.partial) + (index * a.directions + direction) * (a.width + 1) * a.channels + channel;
    for (int i = 0; i < count; ++i)
      for (int64_t j = 0; j <= a.width; ++j, partial += a.channels)
        for (int c = 0; c < n; ++c) partial[c] = sums[i][j][c];
  }
};

template <class T>
void reduce(const ConvArgs& a, int64_t task) {
  const int64_t channel = task * kConvChannels;
  const int n = min(kConvChannels, a.channels - channel);
  for (int64_t direction = 0; direction < a.directions; ++direction) {
    const bool mirrored = a.reverse != (direction == 1);
    for (int64_t j = 0; j <= a.width; ++j) {
      alignas(64) T sum[kConvChannels] = {};
      for (int64_t b = 0; b < a.block_count; ++b) {
        const T* part =
            static_cast<const T*>(a.partial) + ((b * a.directions + direction) * (a.width + 1) + j) * a.channels + channel;
        for (int c = 0; c < n; ++c) sum[c] += part[c];
      }
      if (j == a.width) {
        store_row(at(a.grad_bias, direction, channel), a.grad_bias.dtype, a.grad_bias.stride[1], n, sum);
      } else {
        store_row(at(a.grad_weight, direction, channel, mirrored ? a.width - 1 - j : j), a.grad_weight.dtype,
                  a.grad_weight.stride[1], n, sum);
      }
    }
  }
}

template <class T>
void forward(const ConvArgs& a, int64_t task) {
  const Pass<T> pass(a, task);
  if (a.shared) return pass.forward(0, a.directions);
  for (int64_t direction = 0; direction < a.directions; ++direction) pass.forward(direction, 1);
}

template <class T>
void backward(const ConvArgs& a, int64_t task) {
  const Pass<T> pass(a, task);
  if (a.shared) return pass.backward(0, a.directions);
  for (int64_t direction = 0; direction < a.directions; ++direction) pass.backward(direction, 1);
}

}  // namespace

void short_conv_forward(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) a.x.dtype == DType::kFloat64 ? forward<double>(a, task) : forward<float>(a, task);
}

void short_conv_backward(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    a.x.dtype == DType::kFloat64 ? backward<double>(a, task) : backward<float>(a, task);
}

void short_conv_reduce(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) a.x.dtype == DType::kFloat64 ? reduce<double>(a, task) : reduce<float>(a, task);
}

}  // namespace linconv::LINCONV_ISA
