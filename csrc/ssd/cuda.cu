// The scan as its recurrence, one frame after another with the state in registers: the decode step of a causal model,
// where reading and writing the state is all there is to do. It takes any length, but a long one is the chunked scan's.
#include <tuple>

#include "common/cuda.h"

namespace linconv {
namespace {

// A block takes kBlockRows rows of one head's state (headdim, dstate), a warp kRows of them, a lane every 32nd column.
constexpr int kWarps = 4, kRows = 4, kBlockRows = kWarps * kRows, kThreads = kWarps * kWarp;

struct Arguments {
  View<4> x, B, C, y;
  View<3> dt;
  View<1> A, D, dt_bias;                // D and dt_bias may be absent
  View<4> initial_states, final_states;  // (sequences, heads, headdim, dstate); the first may be absent
  bool dt_softplus, reverse;
  double dt_min, dt_max;
  Sequences sequences;
  int64_t heads, heads_per_group;
  int headdim, dstate;
};

template <class T, class... Index, int N>
__device__ __forceinline__ T element(const View<N>& view, Index... index) {
  return load_element<Tagged, T>(at(view, index...), view.dtype, 0);
}

template <class T, int K>  // columns of a lane: dstate <= K * kWarp
__global__ void __launch_bounds__(kThreads, 1) recur(const Arguments a) {
  const int lane = threadIdx.x % kWarp, row = (blockIdx.y * kWarps + threadIdx.x / kWarp) * kRows;
  const int64_t index = blockIdx.x / a.heads, head = blockIdx.x % a.heads, group = head / a.heads_per_group;
  const Span span = a.sequences.sequence(index);
  T h[kRows][K];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int n = k * kWarp + lane;
      const bool there = a.initial_states.data && row + r < a.headdim && n < a.dstate;
      h[r][k] = there ? element<T>(a.initial_states, index, head, row + r, n) : T(0);
    }
  const T rate = element<T>(a.A, head), skip = a.D.data ? element<T>(a.D, head) : T(0);
  for (int64_t i = span.begin; i < span.end; ++i) {
    const int64_t t = a.reverse ? span.end - 1 - (i - span.begin) : i;
    T dt = element<T>(a.dt, span.row, t, head);
    if (a.dt_bias.data) dt += element<T>(a.dt_bias, head);
    if (a.dt_softplus) dt = softplus_of(dt);
    dt = dt < static_cast<T>(a.dt_min) ? static_cast<T>(a.dt_min) : dt > static_cast<T>(a.dt_max) ? static_cast<T>(a.dt_max) : dt;
    const T decay = exp_of(dt * rate);
    T B[K], C[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int n = k * kWarp + lane;
      B[k] = n < a.dstate ? dt * element<T>(a.B, span.row, t, group, n) : T(0);
      C[k] = n < a.dstate ? element<T>(a.C, span.row, t, group, n) : T(0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T x = row + r < a.headdim ? element<T>(a.x, span.row, t, head, row + r) : T(0);
      T y = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        h[r][k] = decay * h[r][k] + B[k] * x;
        y += C[k] * h[r][k];
      }
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) y += __shfl_xor_sync(0xffffffff, y, mask);
      if (a.D.data) y += skip * x;
      if (lane == r && row + r < a.headdim) store_element<Tagged>(at(a.y, span.row, t, head, row + r), a.y.dtype, 0, y);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int n = k * kWarp + lane;
      if (row + r < a.headdim && n < a.dstate)
        store_element<Tagged>(at(a.final_states, index, head, row + r, n), a.final_states.dtype, 0, h[r][k]);
    }
  if (a.sequences.packed && index + 1 < a.sequences.count) return;
  for (int64_t t = span.end; t < a.sequences.frames; ++t)  // padding
    if (lane < kRows && row + lane < a.headdim) store_element<Tagged>(at(a.y, span.row, t, head, row + lane), a.y.dtype, 0, T(0));
}

std::tuple<Tensor, Tensor> ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, std::optional<Tensor> D,
                               std::optional<Tensor> dt_bias, bool dt_softplus, double dt_min, double dt_max,
                               std::optional<Tensor> initial_states, std::optional<Tensor> seq_lens,
                               std::optional<Tensor> cu_seqlens, bool reverse) {
  const Launcher launch(x);
  Arguments a{};
  a.x = view<4>(x, "x");
  a.dt = view<3>(dt, "dt");
  a.A = view<1>(A, "A");
  a.B = view<4>(B, "B");
  a.C = view<4>(C, "C");
  a.D = view<1>(D, "D");
  a.dt_bias = view<1>(dt_bias, "dt_bias");
  a.initial_states = view<4>(initial_states, "initial_states");
  const auto [batch, length, heads, headdim] = a.x.size;
  const int64_t groups = a.B.size[2], dstate = a.B.size[3];
  require(1 <= headdim && headdim <= 256, "headdim is ", headdim, ", wanted 1 to 256");
  require(1 <= dstate && dstate <= 256, "dstate is ", dstate, ", wanted 1 to 256");
  require(groups > 0 && heads % groups == 0, "B has ", groups, " groups, wanted a divisor of the ", heads, " heads of x");
  require_sizes(a.dt, {batch, length, heads}, "dt");
  require_sizes(a.A, {heads}, "A");
  require_sizes(a.B, {batch, length, groups, dstate}, "B");
  require_sizes(a.C, {batch, length, groups, dstate}, "C");
  if (D) require_sizes(a.D, {heads}, "D");
  if (dt_bias) require_sizes(a.dt_bias, {heads}, "dt_bias");
  const DType math = math_type(a.x.dtype);
  a.sequences = sequences_of(seq_lens, cu_seqlens, batch, length);
  const int64_t sequences = a.sequences.count;
  if (initial_states) require_sizes(a.initial_states, {sequences, heads, headdim, dstate}, "initial_states");
  a.dt_softplus = dt_softplus;
  a.reverse = reverse;
  a.dt_min = dt_min;
  a.dt_max = dt_max;
  a.heads = heads;
  a.heads_per_group = heads / groups;
  a.headdim = static_cast<int>(headdim);
  a.dstate = static_cast<int>(dstate);
  Tensor y = empty({batch, length, heads, headdim}, a.x.dtype);
  if (sequences == 0) torch::stable::zero_(y);  // no block has it
  Tensor final_states = empty({sequences, heads, headdim, dstate}, math);
  a.y = view<4>(y, "y");
  a.final_states = view<4>(final_states, "final_states");
  const dim3 grid(grid_dim(sequences * heads, kGridX, "sequences and heads"), grid_dim(ceil_div(headdim, kBlockRows), kGridY, "rows"));
  const bool narrow = dstate <= 4 * kWarp;
  if (math == DType::kFloat64) {
    launch(narrow ? recur<double, 4> : recur<double, 8>, grid, kThreads, 0, a);
  } else {
    launch(narrow ? recur<float, 4> : recur<float, 8>, grid, kThreads, 0, a);
  }
  return {y, final_states};
}

}  // namespace
}  // namespace linconv

STABLE_TORCH_LIBRARY_IMPL(linconv, LINCONV_CUDA_KEY, m) { m.impl("ssd", TORCH_BOX(&linconv::ssd)); }
