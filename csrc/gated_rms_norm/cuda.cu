// The gated norm on CUDA.
//
// A team of whole warps takes one group of channels of a frame, kHeld channels a thread, held in registers between the
// two passes; a group of more than kHeld * kLargestTeam channels is read again in the second. A block's teams take its frames in
// turn. Directions of a frame are taken by the same team, so an x or z that they share is read once.
#include <tuple>

#include "common/cuda.h"
#include "gated_rms_norm/kernel.h"

namespace linconv {
namespace {

constexpr int kHeld = 4, kThreads = 256, kLargestTeam = 512;
constexpr int kFrames = 16;  // of a block

struct Arguments {
  int64_t directions, channels, group_size;
  double eps;
  Sequences sequences;
  int64_t row_blocks, blocks;
  int team;
  bool shared_x, shared_z;
  Frames x, z, y, grad_y, grad_x, grad_z;
  View<2> weight;
  void* grad_weight;
  DType grad_weight_dtype;
  void* partial;  // (blocks, directions, channels) in the math type: sums over each block's own frames
};

// A thread's place among the teams of its block.
struct Place {
  int threads, team, teams, member;
  int64_t group, row, begin, end, steps;

  __device__ explicit Place(const Arguments& a) {
    threads = a.team;
    team = threadIdx.x / threads;
    teams = blockDim.x / threads;
    member = threadIdx.x % threads;
    group = blockIdx.y;
    row = blockIdx.x / a.row_blocks;
    begin = blockIdx.x % a.row_blocks * kFrames;
    end = begin + kFrames < a.sequences.frames ? begin + kFrames : a.sequences.frames;
    steps = ceil_div(end - begin, teams);
  }
};

template <class T>
__device__ void load_weight(const Arguments& a, int64_t direction, int64_t channel, int n, T (&out)[kHeld]) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    out[i] = i < n ? load_element<Tagged, T>(at(a.weight, direction, channel + i), a.weight.dtype, 0) : T(0);
}

template <class T, class S>
__device__ __forceinline__ void gate(const Arguments& a, int64_t direction, int64_t row, int64_t t, int64_t channel, int n,
                                     T (&gated)[kHeld]) {
  T x[kHeld], z[kHeld];
  Column<T, S, kHeld>(a.x, a.shared_x ? 0 : direction, row, channel, n).read(t, x);
  Column<T, S, kHeld>(a.z, a.shared_z ? 0 : direction, row, channel, n).read(t, z);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) gated[i] = x[i] * (z[i] * sigmoid_of(z[i]));
}

template <class T, class S>
__global__ void __launch_bounds__(kLargestTeam, 1) normalize(const Arguments a) {
  const Place place(a);
  const int64_t origin = place.group * a.group_size, stride = static_cast<int64_t>(place.threads) * kHeld;
  const int64_t own = static_cast<int64_t>(place.member) * kHeld;
  for (int64_t step = 0; step < place.steps; ++step) {
    const int64_t t = place.begin + step * place.teams + place.team;
    const bool there = t < place.end && t < a.sequences.holding(place.row, t).end;
    for (int64_t direction = 0; direction < a.directions; ++direction) {
      T squares[1] = {}, held[kHeld];
      if (there)
        for (int64_t c = own; c < a.group_size; c += stride) {
          T gated[kHeld];
          gate<T, S>(a, direction, place.row, t, origin + c, present<kHeld>(c, a.group_size), gated);
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            squares[0] += gated[i] * gated[i];
            if (c == own) held[i] = gated[i];
          }
        }
      sum_over_team(place.threads, squares);
      if (t >= place.end) continue;
      const T r = inverse_root(squares[0] / static_cast<T>(a.group_size) + static_cast<T>(a.eps));
      for (int64_t c = own; c < a.group_size; c += stride) {
        const int n = present<kHeld>(c, a.group_size);
        const Column<T, S, kHeld> y(a.y, direction, place.row, origin + c, n);
        if (!there) {
          y.clear(t);
          continue;
        }
        T weight[kHeld];
        load_weight(a, direction, origin + c, n, weight);
        if (c != own) gate<T, S>(a, direction, place.row, t, origin + c, n, held);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held[i] = held[i] * r * weight[i];
        y.write(t, held);
      }
    }
  }
}

// With u = dy weight: d gated = r u - r^3 mean(u gated) gated, and from there through the gate.
template <class T, class S, int D>
__global__ void __launch_bounds__(kThreads, 1) differentiate(const Arguments a) {
  const Place place(a);
  const int64_t origin = place.group * a.group_size, stride = static_cast<int64_t>(place.threads) * kHeld;
  T* partial = static_cast<T*>(a.partial) + static_cast<int64_t>(blockIdx.x) * D * a.channels + origin;
  for (int64_t first = 0; first < a.group_size; first += stride) {  // one pass unless the group is very large
    const int64_t own = first + static_cast<int64_t>(place.member) * kHeld;
    const int own_n = present<kHeld>(own, a.group_size);
    T sums[D][kHeld] = {};
    for (int64_t step = 0; step < place.steps; ++step) {
      const int64_t t = place.begin + step * place.teams + place.team;
      const bool there = t < place.end && t < a.sequences.holding(place.row, t).end;
      T dx_sum[kHeld] = {}, dz_sum[kHeld] = {};
#pragma unroll
      for (int direction = 0; direction < D; ++direction) {
        const int64_t x_direction = a.shared_x ? 0 : direction, z_direction = a.shared_z ? 0 : direction;
        T both[2] = {};  // sums of gated^2 and u gated
        if (there)
          for (int64_t c = static_cast<int64_t>(place.member) * kHeld; c < a.group_size; c += stride) {
            const int n = present<kHeld>(c, a.group_size);
            T gated[kHeld], dy[kHeld], weight[kHeld];
            gate<T, S>(a, direction, place.row, t, origin + c, n, gated);
            Column<T, S, kHeld>(a.grad_y, direction, place.row, origin + c, n).read(t, dy);
            load_weight(a, direction, origin + c, n, weight);
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
              both[0] += gated[i] * gated[i];
              both[1] += dy[i] * weight[i] * gated[i];
            }
          }
        sum_over_team(place.threads, both);
        if (!there) continue;
        const T size = static_cast<T>(a.group_size);
        const T r = inverse_root(both[0] / size + static_cast<T>(a.eps)), k = r * r * r * (both[1] / size);
        T x[kHeld], z[kHeld], dy[kHeld], weight[kHeld];
        Column<T, S, kHeld>(a.x, x_direction, place.row, origin + own, own_n).read(t, x);
        Column<T, S, kHeld>(a.z, z_direction, place.row, origin + own, own_n).read(t, z);
        Column<T, S, kHeld>(a.grad_y, direction, place.row, origin + own, own_n).read(t, dy);
        load_weight(a, direction, origin + own, own_n, weight);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          const T s = sigmoid_of(z[i]), silu = z[i] * s, gated = x[i] * silu;
          const T d = r * dy[i] * weight[i] - k * gated;
          const T dx = d * silu, dz = d * x[i] * (s + silu * (T(1) - s));
          sums[direction][i] += dy[i] * gated * r;
          dx_sum[i] = a.shared_x ? dx_sum[i] + dx : dx;
          dz_sum[i] = a.shared_z ? dz_sum[i] + dz : dz;
        }
        // What directions share is complete, and rounded, after the last one.
        if (!a.shared_x || direction == D - 1) Column<T, S, kHeld>(a.grad_x, x_direction, place.row, origin + own, own_n).write(t, dx_sum);
        if (!a.shared_z || direction == D - 1) Column<T, S, kHeld>(a.grad_z, z_direction, place.row, origin + own, own_n).write(t, dz_sum);
      }
      if (!there && t < place.end) {
        for (int direction = 0; direction < D; ++direction) {
          if (!a.shared_x || direction == 0) Column<T, S, kHeld>(a.grad_x, direction, place.row, origin + own, own_n).clear(t);
          if (!a.shared_z || direction == 0) Column<T, S, kHeld>(a.grad_z, direction, place.row, origin + own, own_n).clear(t);
        }
      }
    }
    // The teams' sums, added in their order.
    T* shared = shared_memory<T>();  // (threads of the block, kHeld), one direction after the other
#pragma unroll
    for (int direction = 0; direction < D; ++direction) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kHeld; ++i) shared[i * blockDim.x + threadIdx.x] = sums[direction][i];
      __syncthreads();
      if (place.team != 0) continue;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        T sum = 0;
        for (int team = 0; team < place.teams; ++team) sum += shared[i * blockDim.x + team * place.threads + place.member];
        if (i < own_n) partial[direction * a.channels + own + i] = sum;
      }
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kWarp* kSumRows) reduce(const Arguments a) {
  const int64_t columns = a.directions * a.channels;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const T sum = sum_of_parts(static_cast<const T*>(a.partial), a.blocks, columns, column);
  if (threadIdx.x < kWarp && column < columns) store_element<Tagged>(a.grad_weight, a.grad_weight_dtype, column, sum);
}

// ---- Launching ----

Arguments arguments(const Tensor& x, const Tensor& z, const Tensor& weight, double eps, int64_t group_size,
                    const std::optional<Tensor>& seq_lens) {
  Arguments a{};
  const View<4> x_view = view<4>(x, "x"), z_view = view<4>(z, "z");
  a.weight = view<2>(weight, "weight");
  a.directions = a.weight.size[0];
  a.channels = a.weight.size[1];
  a.group_size = group_size;
  a.eps = eps;
  a.shared_x = x_view.size[0] == 1;
  a.shared_z = z_view.size[0] == 1;
  const int64_t batch = x_view.size[1], frames = x_view.size[2];
  require(a.directions == 1 || a.directions == 2, "weight has ", a.directions, " directions, wanted 1 or 2");
  require(group_size >= 1 && a.channels % group_size == 0, "group_size is ", group_size, ", wanted a divisor of ", a.channels);
  require_sizes(x_view, {a.shared_x ? 1 : a.directions, batch, frames, a.channels}, "x");
  require_sizes(z_view, {a.shared_z ? 1 : a.directions, batch, frames, a.channels}, "z");
  a.x = frames_of(x_view);
  a.z = frames_of(z_view);
  a.sequences = sequences_of(seq_lens, std::nullopt, batch, frames);
  a.row_blocks = ceil_div(frames, kFrames);
  a.blocks = batch * a.row_blocks;
  return a;
}

dim3 grid(const Arguments& a) {
  return {grid_dim(a.blocks, kGridX, "frames"), grid_dim(a.channels / a.group_size, kGridY, "groups")};
}

// Calls f(T, S): the storage types that models use have kernels of their own, any mix of types shares one.
template <class F>
void with_types(DType dtype, bool one_dtype, F&& f) {
  if (dtype == DType::kFloat64) return f(double{}, Tagged{});
  if (one_dtype && dtype == DType::kFloat32) return f(float{}, float{});
  if (one_dtype && dtype == DType::kBFloat16) return f(float{}, BFloat16{});
  if (one_dtype && dtype == DType::kFloat16) return f(float{}, Float16{});
  f(float{}, Tagged{});
}

Tensor gated_rms_norm(Tensor x, Tensor z, Tensor weight, double eps, int64_t group_size, std::optional<Tensor> seq_lens) {
  const Launcher launch(x);
  Arguments a = arguments(x, z, weight, eps, group_size, seq_lens);
  // In memory (batch, L, directions, channels): a frame's directions side by side, as one projection of both reads them.
  Tensor y = empty({x.size(1), x.size(2), a.directions, a.channels}, a.x.dtype);
  y = torch::stable::transpose(torch::stable::transpose(y, 1, 2), 0, 1);
  a.y = frames_of(view<4>(y, "y"));
  a.team = team_size(group_size, kHeld, kLargestTeam);
  const int threads = a.team > kThreads ? a.team : kThreads;
  with_types(a.x.dtype, a.z.dtype == a.x.dtype, [&](auto math, auto storage) {
    launch(normalize<decltype(math), decltype(storage)>, grid(a), threads, team_bytes<decltype(math), 1>(threads), a);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_backward(Tensor grad, Tensor x, Tensor z, Tensor weight, double eps,
                                                           int64_t group_size, std::optional<Tensor> seq_lens) {
  const Launcher launch(x);
  Arguments a = arguments(x, z, weight, eps, group_size, seq_lens);
  const View<4> grad_view = view<4>(grad, "grad");
  require_sizes(grad_view, {a.directions, x.size(1), x.size(2), a.channels}, "grad");
  a.grad_y = frames_of(grad_view);
  Tensor grad_x = empty({x.size(0), x.size(1), x.size(2), a.channels}, a.x.dtype);
  Tensor grad_z = empty({z.size(0), z.size(1), z.size(2), a.channels}, a.z.dtype);
  Tensor grad_weight = empty({a.directions, a.channels}, a.weight.dtype);
  Tensor partial = empty({a.blocks, a.directions, a.channels}, math_type(a.x.dtype));
  a.grad_x = frames_of(view<4>(grad_x, "grad_x"));
  a.grad_z = frames_of(view<4>(grad_z, "grad_z"));
  a.grad_weight = grad_weight.data_ptr();
  a.grad_weight_dtype = a.weight.dtype;
  a.partial = partial.data_ptr();
  a.team = team_size(group_size, kHeld, kThreads);
  with_types(a.x.dtype, a.z.dtype == a.x.dtype && a.grad_y.dtype == a.x.dtype, [&](auto math, auto storage) {
    using T = decltype(math);
    using S = decltype(storage);
    launch(a.directions == 2 ? differentiate<T, S, 2> : differentiate<T, S, 1>, grid(a), kThreads, kThreads * kHeld * sizeof(T), a);
    launch(reduce<T>, dim3(grid_dim(ceil_div(a.directions * a.channels, kWarp), kGridX, "channels")), kWarp * kSumRows,
           kWarp * kSumRows * sizeof(T), a);
  });
  return {grad_x, grad_z, grad_weight};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&linconv::gated_rms_norm));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&linconv::gated_rms_norm_backward));
}
