// Enough of CUDA to run csrc/*/cuda.cu on the host, for tests: the kernels and the code that launches them are compiled
// as they stand, by the C++ compiler. Its operators take CPU tensors (they are registered under the CPU's key).
//
// A block's threads are fibers, which run one after another up to the next barrier or exchange within a warp. What a GPU
// would leave to chance is made strict:
//   - a barrier that some threads of a block (for a warp's exchange, of the warp) do not reach is an error;
//   - shared memory is filled with NaN before each block;
//   - with LINCONV_HOST_ORDER=backward blocks, warps and the lanes of a warp run last to first: a result that differs then
//     comes from a race;
//   - cp.async copies only when it is waited for.
// Blocks run one at a time, so `__shared__` is `static`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "common/vec.h"  // storage types

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define LINCONV_CUDA_KEY CPU

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(4) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cuda_on_host {

struct Thread {
  dim3 thread, block, grid, block_dim;
  void* shared;
};
Thread& current();

void run(dim3 grid, int threads, int64_t shared_bytes, const std::function<void()>& kernel);
void block_barrier();
// Every lane of the warp gives a value of up to 32 bytes; the result is the table of all of them, one each 32 bytes, until
// the next exchange but one.
const char* exchange(const void* value, int bytes);

// One lane's share of D += A B: m16n8k16 of the storage type, fp32 sums.
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);
// ldmatrix of four 8 x 8 matrices of 16-bit values, whose rows are at the lanes' addresses; transposed or not.
void ldmatrix(uint32_t (&out)[4], const void* row, bool transposed);

// cp.async: 16 bytes, of which the last 16 - `bytes` are zeros instead.
void copy_later(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int groups_left);

template <class T>
T shuffle_xor(T value, int mask) {
  T out;
  std::memcpy(&out, exchange(&value, sizeof(value)) + ((current().thread.x % 32) ^ mask) * 32, sizeof(out));
  return out;
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::current().thread)
#define blockIdx (::cuda_on_host::current().block)
#define gridDim (::cuda_on_host::current().grid)
#define blockDim (::cuda_on_host::current().block_dim)

static inline void __syncthreads() { cuda_on_host::block_barrier(); }
static inline void __syncwarp() { cuda_on_host::exchange("", 1); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_host::shuffle_xor(value, mask);
}

namespace linconv {

using LINCONV_ISA::to_math;
using LINCONV_ISA::to_storage;

template <class Bits>
Bits read_only(const Bits* p) {
  Bits out;
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Bits) != 0) __builtin_trap();  // as the GPU does
  std::memcpy(&out, p, sizeof(out));
  return out;
}

template <class T>
T exp_of(T x) {
  return std::exp(x);
}
template <class T>
T exp2_of(T x) {
  return std::exp2(x);
}
template <class T>
T log1p_of(T x) {
  return std::log1p(x);
}
template <class T>
T inverse_root(T x) {
  return T(1) / std::sqrt(x);
}

template <class T>
T* held(T* address) {
  return address;
}

// x, rounded: the compiler knows nothing of it, so fuses nothing with it.
template <class T>
T rounded(T x) {
  volatile T out = x;
  return out;
}
template <class T>
T product_of(T a, T b) {
  return rounded(a * b);
}
template <class T>
T sum_of(T a, T b) {
  return rounded(a + rounded(b));
}
template <class T>
T fused_of(T a, T b, T c) {
  return std::fma(a, b, c);
}

class Launcher {
 public:
  template <class Tensor>
  explicit Launcher(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, const Arguments&... arguments) const {
    cuda_on_host::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  }
};

template <class T>
T* shared_memory() {
  return static_cast<T*>(cuda_on_host::current().shared);
}

}  // namespace linconv
