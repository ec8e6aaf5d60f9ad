// What every csrc/<op>/cuda.cu needs of CUDA: launching on torch's stream, storage types, reading and writing channels.
//
// The same sources compile for the host too, against tests/csrc/cuda_on_host.h, which runs kernels thread by thread: that
// is how they are tested where there is no GPU. So kernels use only what that header has, and take dynamic shared memory
// by shared_memory().
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#define LINCONV_CUDA_KEY CUDA  // the dispatch key of cuda.cu
#else
#include "cuda_on_host.h"
#endif

#include "common/sequences.h"
#include "common/tensor.h"

namespace linconv {

constexpr int kWarp = 32;

// ---- Launching ----

#if defined(__CUDACC__)

// Makes a tensor's device the current one for as long as it lives, and launches on torch's current stream of it.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // A grid without blocks is not launched.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, const Arguments&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    constexpr int64_t kWithoutAsking = 48 << 10;
    if (shared_bytes > kWithoutAsking)
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
    kernel<<<grid, threads, shared_bytes, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 bytes[];
  return reinterpret_cast<T*>(bytes);
}

#endif

// A count of blocks as a dimension of the grid.
inline unsigned grid_dim(int64_t blocks, int64_t limit, const char* what) {
  require(blocks <= limit, "there are ", blocks, " blocks of ", what, ", at most ", limit, " can be launched");
  return static_cast<unsigned>(blocks);
}
constexpr int64_t kGridX = (int64_t(1) << 31) - 1, kGridY = 65535;

LINCONV_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The sequences of a batch of `rows` rows; shapes and dtypes are checked, values are not read.
inline Sequences sequences_of(const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& cu_seqlens, int64_t rows,
                              int64_t frames) {
  require(!(seq_lens && cu_seqlens), "seq_lens and cu_seqlens are both given, wanted at most one");
  Sequences out{};
  out.frames = frames;
  out.count = rows;
  if (!seq_lens && !cu_seqlens) return out;
  const char* name = seq_lens ? "seq_lens" : "cu_seqlens";
  const Tensor& bounds = seq_lens ? *seq_lens : *cu_seqlens;
  require_strided(bounds, 1, name);
  const ScalarType type = bounds.scalar_type();
  require(type == ScalarType::Int || type == ScalarType::Long, name, " has dtype ", torch::headeronly::toString(type),
          ", wanted Int or Long");
  require(seq_lens || rows == 1, "cu_seqlens wants a batch of 1, got ", rows);
  require(!seq_lens || bounds.size(0) == rows, "seq_lens has ", bounds.size(0), " elements, wanted ", rows);
  require(seq_lens || bounds.size(0) >= 1, "cu_seqlens is empty, wanted (sequences + 1,) elements");
  out.bounds = bounds.data_ptr();
  out.stride = bounds.stride(0);
  out.wide = type == ScalarType::Long;
  out.packed = cu_seqlens.has_value();
  if (out.packed) out.count = bounds.size(0) - 1;
  return out;
}

// ---- Storage types ----

// A tensor whose storage type a kernel learns at run time only: one kernel for every mix of them.
struct Tagged {};

#if defined(__CUDACC__)

template <class T, class S>
__device__ __forceinline__ T to_math(S x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return static_cast<T>(__uint_as_float(static_cast<uint32_t>(x.bits) << 16));
  } else if constexpr (std::is_same_v<S, Float16>) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return static_cast<T>(value);
  } else {
    return static_cast<T>(x);
  }
}

template <class S, class T>
__device__ __forceinline__ S to_storage(T x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(static_cast<float>(x)));
    return {bits};
  } else if constexpr (std::is_same_v<S, Float16>) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(static_cast<float>(x)));
    return {bits};
  } else {
    return static_cast<S>(x);
  }
}

// 2, 4, 8 or 16 bytes that no thread of the kernel writes.
template <class Bits>
__device__ __forceinline__ Bits read_only(const Bits* p) {
  return __ldg(p);
}

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
// 2^x, of float to a relative 2^-22.
__device__ __forceinline__ float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float inverse_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

// The same address in global memory, which the compiler then holds: it would rather work it out anew wherever it is used,
// 64-bit products and all.
template <class T>
__device__ __forceinline__ T* held(T* address) {
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
}

// Rounded as written, never fused with what is before or after: for what must be equal on two sides of a difference.
__device__ __forceinline__ float product_of(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product_of(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float sum_of(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum_of(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float fused_of(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a b + c
__device__ __forceinline__ double fused_of(double a, double b, double c) { return __fma_rn(a, b, c); }

#endif

template <class T>
__device__ __forceinline__ T sigmoid_of(T x) {
  return T(1) / (T(1) + exp_of(-x));
}
// log(1 + e^x): nothing overflows, and neither end loses accuracy.
template <class T>
__device__ __forceinline__ T softplus_of(T x) {
  return (x > 0 ? x : T(0)) + log1p_of(exp_of(x > 0 ? -x : x));
}

// One element of a tensor of storage type S, or of the tagged one.
template <class S, class T>
__device__ __forceinline__ T load_element(const void* data, [[maybe_unused]] DType dtype, int64_t index) {
  if constexpr (std::is_same_v<S, Tagged>) {
    T out = 0;
    with_storage(dtype, [&](auto storage) {
      out = to_math<T>(static_cast<const typename decltype(storage)::type*>(data)[index]);
    });
    return out;
  } else {
    return to_math<T>(static_cast<const S*>(data)[index]);
  }
}
template <class S, class T>
__device__ __forceinline__ void store_element(void* data, [[maybe_unused]] DType dtype, int64_t index, T value) {
  if constexpr (std::is_same_v<S, Tagged>) {
    with_storage(dtype, [&](auto storage) {
      using Stored = typename decltype(storage)::type;
      static_cast<Stored*>(data)[index] = to_storage<Stored>(value);
    });
  } else {
    static_cast<S*>(data)[index] = to_storage<S>(value);
  }
}

// ---- Frames of channels ----

// A tensor (directions, batch, L, channels) as kernels walk over it.
struct Frames {
  void* data;
  DType dtype;
  int64_t direction, batch, time, channel;  // strides in elements; that of a direction or batch of one is 0
  int alignment;  // bytes, up to 16, that every frame's channels are aligned to where they are contiguous; else 0
};

inline Frames frames_of(const View<4>& view) {
  const auto stride = [&](int i) { return view.size[i] > 1 ? view.stride[i] : 0; };
  Frames out{view.data, view.dtype, stride(0), stride(1), stride(2), view.stride[3], 0};
  const int64_t bytes = element_size(view.dtype);
  if (view.stride[3] != 1 && view.size[3] > 1) return out;
  int64_t bits = reinterpret_cast<int64_t>(view.data) | 16;
  for (int i = 0; i < 3; ++i) bits |= stride(i) * bytes;
  out.alignment = static_cast<int>(bits & -bits);
  return out;
}

// How many of the V channels from c on there are.
template <int V>
__device__ __forceinline__ int present(int64_t c, int64_t size) {
  return static_cast<int>(c >= size ? 0 : size - c < V ? size - c : V);
}

// V values that lie together.
template <class S, int V>
struct Pack {
  S item[V];
};

// The frames of a batch row at a thread's own V channels, of which n are there.
template <class T, class S, int V>
struct Column {
  static constexpr bool kTagged = std::is_same_v<S, Tagged>;

  void* start;
  DType dtype;
  int64_t time, stride;
  int n;
  bool whole;  // all V channels, in one piece of memory

  __device__ __forceinline__ Column(const Frames& frames, int64_t direction, int64_t row, int64_t channel, int n)
      : start(offset(frames.data, frames.dtype, direction * frames.direction + row * frames.batch + channel * frames.channel)),
        dtype(frames.dtype),
        time(frames.time),
        stride(frames.channel),
        n(n),
        whole(false) {
    if constexpr (!kTagged) {
      constexpr int kBytes = V * static_cast<int>(sizeof(S));
      whole = n == V && channel % V == 0 && frames.alignment >= (kBytes < 16 ? kBytes : 16);
    }
  }

  // Values that are not there are zeros.
  __device__ __forceinline__ void read(int64_t t, T (&out)[V]) const {
    if constexpr (!kTagged) {
      if (whole) {
        const S* from = static_cast<const S*>(start) + t * time;
        Pack<S, V> pack;
        using Bits = std::conditional_t<sizeof(pack) >= 16, uint4,
                     std::conditional_t<sizeof(pack) == 8, uint2, std::conditional_t<sizeof(pack) == 4, uint32_t, uint16_t>>>;
        Bits piece[sizeof(pack) / sizeof(Bits)];
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(pack) / sizeof(Bits)); ++i) piece[i] = read_only(reinterpret_cast<const Bits*>(from) + i);
        memcpy(&pack, piece, sizeof(pack));
#pragma unroll
        for (int i = 0; i < V; ++i) out[i] = to_math<T>(pack.item[i]);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = i < n ? load_element<S, T>(start, dtype, t * time + i * stride) : T(0);
  }

  __device__ __forceinline__ void write(int64_t t, const T (&in)[V]) const {
    if constexpr (!kTagged) {
      if (whole) {
        S* to = static_cast<S*>(start) + t * time;
        Pack<S, V> pack;
#pragma unroll
        for (int i = 0; i < V; ++i) pack.item[i] = to_storage<S>(in[i]);
        using Bits = std::conditional_t<sizeof(pack) >= 16, uint4,
                     std::conditional_t<sizeof(pack) == 8, uint2, std::conditional_t<sizeof(pack) == 4, uint32_t, uint16_t>>>;
        Bits piece[sizeof(pack) / sizeof(Bits)];
        memcpy(piece, &pack, sizeof(pack));
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(pack) / sizeof(Bits)); ++i) reinterpret_cast<Bits*>(to)[i] = piece[i];
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < n) store_element<S>(start, dtype, t * time + i * stride, in[i]);
  }

  __device__ __forceinline__ void clear(int64_t t) const {
    const T zeros[V] = {};
    write(t, zeros);
  }
};

// ---- Teams ----

// A block's threads are teams, each of a power of two of whole warps: the fewest, `most` threads at most, that hold a row of
// `size` elements, `held` a thread.
inline int team_size(int64_t size, int held, int most) {
  int team = kWarp;
  while (team < most && static_cast<int64_t>(team) * held < size) team *= 2;
  return team;
}

// Bytes of shared memory that combine_over_team() takes of N values in a block, from its begin.
template <class T, int N>
constexpr int64_t team_bytes(int threads) {
  return N * (threads / kWarp) * static_cast<int64_t>(sizeof(T));
}

// Each of N values combined over a team of `team` threads, in a fixed order. Every thread of the block calls it.
template <int N, class T, class F>
__device__ void combine_over_team(int team, T (&values)[N], F combine) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) values[i] = combine(values[i], __shfl_xor_sync(0xffffffff, values[i], lane));
  const int warps = team / kWarp;
  if (warps == 1) return;
  T* shared = shared_memory<T>();  // (N, warps of the block)
  const int all = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // what was combined before is read
  if (threadIdx.x % kWarp == 0)
    for (int i = 0; i < N; ++i) shared[i * all + warp] = values[i];
  __syncthreads();
  const int first = threadIdx.x / team * warps;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    T all_of = shared[i * all + first];
    for (int w = 1; w < warps; ++w) all_of = combine(all_of, shared[i * all + first + w]);
    values[i] = all_of;
  }
}

template <int N, class T>
__device__ void sum_over_team(int team, T (&values)[N]) {
  combine_over_team(team, values, [](T a, T b) { return a + b; });
}

// ---- Sums of parts ----

// parts[b * columns + column] over b < blocks, in an order that only `blocks` decides. A block of (kWarp, kSumRows) threads
// calls it for kWarp columns, each row of threads with the same ones; the result is there in row 0. Where column >= columns
// it is zero.
constexpr int kSumRows = 16;
template <class T>
__device__ T sum_of_parts(const T* parts, int64_t blocks, int64_t columns, int64_t column) {
  T* rows = shared_memory<T>();  // (kSumRows, kWarp)
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t share = ceil_div(blocks, kSumRows), begin = row * share, end = begin + share < blocks ? begin + share : blocks;
  T sum = 0;
  if (column < columns)
    for (int64_t b = begin; b < end; ++b) sum += parts[b * columns + column];
  rows[row * kWarp + lane] = sum;
  __syncthreads();
  if (row == 0)
    for (int i = 1; i < kSumRows; ++i) sum += rows[i * kWarp + lane];
  return sum;
}

}  // namespace linconv
