// Storage types of tensors. Kernels compute in a math type, float or double; what a tensor is stored as is a run-time tag.
#pragma once

#include <cstdint>

// Of functions that CUDA kernels call too.
#if defined(__CUDACC__)
#define LINCONV_HOST_DEVICE __host__ __device__
#else
#define LINCONV_HOST_DEVICE
#endif

namespace linconv {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Two bfloat16 numbers, the one that comes first in memory in the low bits.
enum class BFloat16Pair : uint32_t {};

// Functions in headers that kernel.cpp includes are static: an inline one could be merged by the linker across ISAs.

LINCONV_HOST_DEVICE static inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The address of an element, counted from `data` in elements.
LINCONV_HOST_DEVICE static inline void* offset(void* data, DType dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}
LINCONV_HOST_DEVICE static inline const void* offset(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

template <class S>
struct Type {
  using type = S;
};

// Calls f with Type<S>{} for the storage type S behind the tag.
template <class F>
LINCONV_HOST_DEVICE static inline void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(Type<float>{});
    case DType::kFloat64: return f(Type<double>{});
    case DType::kBFloat16: return f(Type<BFloat16>{});
    case DType::kFloat16: return f(Type<Float16>{});
  }
}

}  // namespace linconv
