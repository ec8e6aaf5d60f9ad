// The short convolution on CUDA: what kernel.cpp computes, in its order of operations for each frame.
//
// A warp walks over kSliceFrames frames of one batch row, a thread over V channels of them, with the last taps' rows in
// registers. A block's kSlices warps take neighbouring slices, so that the rows that two slices both read are in L1.
#include <tuple>

#include "common/cuda.h"
#include "short_conv/kernel.h"

namespace linconv {
namespace {

constexpr int kSlices = 8, kSliceFrames = 32, kThreads = kSlices * kWarp;
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // that registers are to be left for
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kUnrollLess = true;  // there the compiler holds more of each frame, and would spill
#else
constexpr bool kUnrollLess = false;
#endif

struct Arguments {
  int64_t directions, channels, width, lookahead;
  bool reverse, silu, shared;
  Sequences sequences;
  int64_t row_blocks;  // blocks of kSlices * kSliceFrames frames that a row has
  Frames x, y, grad_y, grad_x;
  View<3> weight, grad_weight;
  View<2> bias, grad_bias;
  void* partial;  // (blocks, directions, width + 1, channels) in the math type: sums over each block's own frames
  int64_t blocks;
};

// One direction's filter at a thread's channels; tap j is of the frame `low` + j later.
template <class T, int W, int V>
struct Filter {
  T w[W][V], bias[V];
  int64_t low;

  __device__ __forceinline__ void load(const Arguments& a, int64_t direction, int64_t channel, int n) {
    const bool mirrored = a.reverse != (direction == 1);
    low = mirrored ? -a.lookahead : a.lookahead - (a.width - 1);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const void* weight = at(a.weight, direction, channel + v, mirrored ? a.width - 1 - j : j);
        w[j][v] = j < a.width && v < n ? load_element<Tagged, T>(weight, a.weight.dtype, 0) : T(0);
      }
      bias[v] = a.bias.data && v < n ? load_element<Tagged, T>(at(a.bias, direction, channel + v), a.bias.dtype, 0) : T(0);
    }
  }

  // x holds the taps' rows. A row whose tap is not in the filter is another frame's, and not to be multiplied by zero.
  __device__ __forceinline__ void apply(const T (&x)[W][V], int width, T (&pre)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) pre[v] = bias[v];
#pragma unroll
    for (int j = 0; j < W; ++j)
      if (j < width) {
#pragma unroll
        for (int v = 0; v < V; ++v) pre[v] += w[j][v] * x[j][v];
      }
  }
};

// What a thread is to do.
template <int V>
struct Place {
  int lane, slice, n;  // n of its V channels are there
  int64_t channel, direction, row, begin, end;

  __device__ explicit Place(const Arguments& a) {
    lane = threadIdx.x % kWarp;
    slice = threadIdx.x / kWarp;
    channel = (static_cast<int64_t>(blockIdx.y) * kWarp + lane) * V;
    n = static_cast<int>(channel >= a.channels ? 0 : a.channels - channel < V ? a.channels - channel : V);
    direction = blockIdx.z;
    row = blockIdx.x / a.row_blocks;
    begin = (blockIdx.x % a.row_blocks * kSlices + slice) * kSliceFrames;
    const int64_t frames = a.sequences.frames;
    if (begin > frames) begin = frames;
    end = begin + kSliceFrames < frames ? begin + kSliceFrames : frames;
  }
};

template <int W, int V, class T>
__device__ __forceinline__ void shift(T (&rows)[W][V]) {  // forgets rows[0]
#pragma unroll
  for (int j = 0; j + 1 < W; ++j)
#pragma unroll
    for (int v = 0; v < V; ++v) rows[j][v] = rows[j + 1][v];
}

template <int V, class Column, class T>
__device__ __forceinline__ void read_inside(const Column& column, const Span& span, int64_t t, T (&out)[V]) {
  if (span.begin <= t && t < span.end) {
    column.read(t, out);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = 0;
  }
}

// D directions that share x.
template <class T, class S, int W, int V, int D>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) convolve(const Arguments a) {
  const Place<V> place(a);
  if (place.n == 0) return;
  Filter<T, W, V> filter[D];
#pragma unroll
  for (int i = 0; i < D; ++i) filter[i].load(a, place.direction + i, place.channel, place.n);
  const int width = static_cast<int>(a.width);
  const Column<T, S, V> x(a.x, place.direction, place.row, place.channel, place.n);
  const Column<T, S, V> first(a.y, place.direction, place.row, place.channel, place.n),
      last(a.y, place.direction + D - 1, place.row, place.channel, place.n);
  for (int64_t begin = place.begin; begin < place.end;) {
    const Span span = a.sequences.holding(place.row, begin);
    if (span.end <= begin) {
      for (; begin < place.end; ++begin) {
        first.clear(begin);
        if (D > 1) last.clear(begin);
      }
      break;
    }
    const int64_t end = span.end < place.end ? span.end : place.end;
    T taps[D][W][V];
#pragma unroll
    for (int i = 0; i < D; ++i)
#pragma unroll
      for (int j = 0; j + 1 < W; ++j) read_inside(x, span, begin + filter[i].low + j, taps[i][j + 1]);
#pragma unroll(kUnrollLess && (D == 2 || W > 4) ? 1 : D == 2 ? 2 : 4)
    for (int64_t t = begin; t < end; ++t) {
#pragma unroll
      for (int i = 0; i < D; ++i) {
        shift(taps[i]);
        read_inside(x, span, t + filter[i].low + W - 1, taps[i][W - 1]);
        T pre[V];
        filter[i].apply(taps[i], width, pre);
        if (a.silu) {
#pragma unroll
          for (int v = 0; v < V; ++v) pre[v] *= sigmoid_of(pre[v]);
        }
        (i == 0 ? first : last).write(t, pre);
      }
    }
    begin = end;
  }
}

// dx, and each block's sums for the gradients of weight and bias. At step t a direction's new pre-activation is that of
// frame u = t - low, whose taps are the frames t, t + 1, ... whatever the direction: with dpre[j] that of frame u - j,
//   dx[t] = sum_j w[j] dpre[j],   dw[j] += dpre[0] x[t + j].
// Steps are a slice's own frames, after the few that fill dpre. Every u of a sequence is new at one step of one slice: low
// is never positive, and the steps before a sequence's first frame are of the slice that holds it.
template <class T, class S, int W, int V, int D>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) differentiate(const Arguments a) {
  const Place<V> place(a);
  Filter<T, W, V> filter[D];
#pragma unroll
  for (int i = 0; i < D; ++i) filter[i].load(a, place.direction + i, place.channel, place.n);
  const int width = static_cast<int>(a.width);
  const Column<T, S, V> x(a.x, place.direction, place.row, place.channel, place.n),
      dx(a.grad_x, place.direction, place.row, place.channel, place.n),
      dy_first(a.grad_y, place.direction, place.row, place.channel, place.n),
      dy_last(a.grad_y, place.direction + D - 1, place.row, place.channel, place.n);
  T sums[D][W + 1][V] = {};
  for (int64_t begin = place.begin; begin < place.end;) {
    const Span span = a.sequences.holding(place.row, begin);
    if (span.end <= begin) {
      for (; begin < place.end; ++begin) dx.clear(begin);
      break;
    }
    const int64_t end = span.end < place.end ? span.end : place.end;
    const int64_t counted = begin == span.begin ? begin - (width - 1) : begin;
    T taps[W][V], dpre[D][W][V] = {};
#pragma unroll
    for (int j = 0; j + 1 < W; ++j) read_inside(x, span, begin - (width - 1) + j, taps[j + 1]);
#pragma unroll(kUnrollLess ? 1 : 2)
    for (int64_t t = begin - (width - 1); t < end; ++t) {
      shift(taps);
      read_inside(x, span, t + W - 1, taps[W - 1]);
      T result[V] = {};
#pragma unroll
      for (int i = 0; i < D; ++i) {
#pragma unroll
        for (int j = W - 1; j > 0; --j)
#pragma unroll
          for (int v = 0; v < V; ++v) dpre[i][j][v] = dpre[i][j - 1][v];
        const int64_t u = t - filter[i].low;
        const bool inside = span.begin <= u && u < span.end;
        read_inside(i == 0 ? dy_first : dy_last, span, u, dpre[i][0]);
        if (inside && a.silu) {
          T pre[V];
          filter[i].apply(taps, width, pre);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const T s = sigmoid_of(pre[v]);
            dpre[i][0][v] *= s + pre[v] * s * (T(1) - s);
          }
        }
#pragma unroll
        for (int j = 0; j < W; ++j)
          if (j < width) {
#pragma unroll
            for (int v = 0; v < V; ++v) result[v] += filter[i].w[j][v] * dpre[i][j][v];
          }
        if (inside && t >= counted) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
#pragma unroll
            for (int j = 0; j < W; ++j)
              if (j < width) sums[i][j][v] += dpre[i][0][v] * taps[j][v];
            sums[i][W][v] += dpre[i][0][v];
          }
        }
      }
      if (t >= begin) dx.write(t, result);
    }
    begin = end;
  }
  // The slices' sums, added in their order.
  constexpr int kRow = kWarp * V, kRows = D * (W + 1);
  T* shared = shared_memory<T>();  // (slices, D, W + 1, kRow)
#pragma unroll
  for (int i = 0; i < D; ++i)
#pragma unroll
    for (int j = 0; j <= W; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) shared[(place.slice * kRows + i * (W + 1) + j) * kRow + place.lane * V + v] = sums[i][j][v];
  __syncthreads();
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * kRow;
  for (int k = threadIdx.x; k < kRows * kRow; k += kThreads) {
    const int i = k / kRow / (W + 1), j = k / kRow % (W + 1), c = k % kRow;
    if (tile + c >= a.channels || (j < W && j >= width)) continue;
    T sum = 0;
    for (int slice = 0; slice < kSlices; ++slice) sum += shared[slice * kRows * kRow + k];
    const int64_t direction = place.direction + i, tap = j == W ? width : j;
    static_cast<T*>(a.partial)[((blockIdx.x * a.directions + direction) * (width + 1) + tap) * a.channels + tile + c] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kWarp* kSumRows) reduce(const Arguments a) {
  const int64_t columns = a.directions * (a.width + 1) * a.channels;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const T sum = sum_of_parts(static_cast<const T*>(a.partial), a.blocks, columns, column);
  if (threadIdx.x >= kWarp || column >= columns) return;
  const int64_t channel = column % a.channels, j = column / a.channels % (a.width + 1), direction = column / a.channels / (a.width + 1);
  const bool mirrored = a.reverse != (direction == 1);
  if (j == a.width) {
    store_element<Tagged>(at(a.grad_bias, direction, channel), a.grad_bias.dtype, 0, sum);
  } else {
    store_element<Tagged>(at(a.grad_weight, direction, channel, mirrored ? a.width - 1 - j : j), a.grad_weight.dtype, 0, sum);
  }
}

// ---- Launching ----

Arguments arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool silu, bool reverse,
                    int64_t lookahead, const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens) {
  Arguments a{};
  const View<4> x_view = view<4>(x, "x");
  a.weight = view<3>(weight, "weight");
  a.bias = view<2>(bias, "bias");
  a.directions = a.weight.size[0];
  a.channels = a.weight.size[1];
  a.width = a.weight.size[2];
  a.lookahead = lookahead;
  a.reverse = reverse;
  a.silu = silu;
  a.shared = x_view.size[0] == 1;
  const int64_t batch = x_view.size[1], frames = x_view.size[2];
  require(a.directions == 1 || a.directions == 2, "weight has ", a.directions, " directions, wanted 1 or 2");
  require(a.width >= 2 && a.width <= kMaxConvWidth, "weight has width ", a.width, ", wanted 2 to ", kMaxConvWidth);
  require(lookahead >= 0 && lookahead < a.width, "lookahead is ", lookahead, ", wanted 0 to width - 1 = ", a.width - 1);
  require_sizes(x_view, {a.shared ? 1 : a.directions, batch, frames, a.channels}, "x");
  if (bias) require_sizes(a.bias, {a.directions, a.channels}, "bias");
  a.x = frames_of(x_view);
  a.sequences = sequences_of(seq_lens, cu_seqlens, batch, frames);
  a.row_blocks = ceil_div(frames, kSlices * kSliceFrames);
  a.blocks = batch * a.row_blocks;
  return a;
}

// Calls f(T, S, W, V) as types: the storage types that models use have kernels of their own for widths up to 4; anything
// else shares one, which is told each tensor's type at run time.
template <int kFast, class F>
void with_types(const Arguments& a, bool one_dtype, F&& f) {
  const auto fast = [&](auto storage) { f(float{}, storage, std::integral_constant<int, 4>{}, std::integral_constant<int, kFast>{}); };
  constexpr std::integral_constant<int, kMaxConvWidth> kAny{};
  constexpr std::integral_constant<int, 1> kOne{};
  if (a.x.dtype == DType::kFloat64) return f(double{}, Tagged{}, kAny, kOne);
  if (one_dtype && a.width <= 4) {
    if (a.x.dtype == DType::kFloat32) return fast(float{});
    if (a.x.dtype == DType::kBFloat16) return fast(BFloat16{});
    if (a.x.dtype == DType::kFloat16) return fast(Float16{});
  }
  f(float{}, Tagged{}, kAny, kOne);
}

// Directions with an input of their own are launched side by side, those that share one are one thread's.
dim3 grid(const Arguments& a, int channels_of_block) {
  return {grid_dim(a.blocks, kGridX, "frames"), grid_dim(ceil_div(a.channels, channels_of_block), kGridY, "channels"),
          a.shared ? 1u : static_cast<unsigned>(a.directions)};
}

Tensor short_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, bool silu, bool reverse, int64_t lookahead,
                  std::optional<Tensor> seq_lens, std::optional<Tensor> cu_seqlens) {
  const Launcher launch(x);
  Arguments a = arguments(x, weight, bias, silu, reverse, lookahead, seq_lens, cu_seqlens);
  Tensor y = empty({a.directions, x.size(1), x.size(2), a.channels}, a.x.dtype);
  a.y = frames_of(view<4>(y, "y"));
  const auto run = [&](auto directions) {
    constexpr int D = directions;
    with_types<D == 2 ? 2 : 4>(a, true, [&](auto math, auto storage, auto width, auto channels) {
      constexpr int W = width, V = channels;
      launch(convolve<decltype(math), decltype(storage), W, V, D>, grid(a, kWarp * V), kThreads, 0, a);
    });
  };
  if (a.shared && a.directions == 2) run(std::integral_constant<int, 2>{});
  else run(std::integral_constant<int, 1>{});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> short_conv_backward(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                       bool silu, bool reverse, int64_t lookahead,
                                                       std::optional<Tensor> seq_lens, std::optional<Tensor> cu_seqlens) {
  const Launcher launch(x);
  Arguments a = arguments(x, weight, bias, silu, reverse, lookahead, seq_lens, cu_seqlens);
  const View<4> grad_view = view<4>(grad, "grad");
  require_sizes(grad_view, {a.directions, x.size(1), x.size(2), a.channels}, "grad");
  a.grad_y = frames_of(grad_view);
  Tensor grad_x = empty({x.size(0), x.size(1), x.size(2), a.channels}, a.x.dtype);
  Tensor grad_weight = empty({a.directions, a.channels, a.width}, a.weight.dtype);
  Tensor grad_bias = empty({a.directions, a.channels}, bias ? a.bias.dtype : a.weight.dtype);
  Tensor partial = empty({a.blocks, a.directions, a.width + 1, a.channels}, math_type(a.x.dtype));
  a.grad_x = frames_of(view<4>(grad_x, "grad_x"));
  a.grad_weight = view<3>(grad_weight, "grad_weight");
  a.grad_bias = view<2>(grad_bias, "grad_bias");
  a.partial = partial.data_ptr();
  with_types<2>(a, grad_view.dtype == a.x.dtype, [&](auto math, auto storage, auto width, auto channels) {
    using T = decltype(math);
    using S = decltype(storage);
    constexpr int W = width, V = channels;
    const int directions = a.shared && a.directions == 2 ? 2 : 1;
    launch(directions == 2 ? differentiate<T, S, W, V, 2> : differentiate<T, S, W, V, 1>, grid(a, kWarp * V), kThreads,
           kSlices * directions * (W + 1) * kWarp * V * sizeof(T), a);
    const dim3 columns(grid_dim(ceil_div(a.directions * (a.width + 1) * a.channels, kWarp), kGridX, "channels"));
    launch(reduce<T>, columns, kWarp * kSumRows, kWarp * kSumRows * sizeof(T), a);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) {
  m.impl("short_conv", TORCH_BOX(&linconv::short_conv));
  m.impl("short_conv_backward", TORCH_BOX(&linconv::short_conv_backward));
}
