// What a kernel sees of a tensor and of the sequences in a batch: plain structs, filled by cpu.cpp or cuda.cu (common/tensor.h).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace linconv {

// A tensor of N dimensions, any strides (in elements, 64-bit, possibly 0 or negative). data is null for an absent one.
template <int N>
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t size[N] = {};
  int64_t stride[N] = {};
};

// The address of the element with the given leading indices; the rest are 0.
template <int N, class... Index>
LINCONV_HOST_DEVICE static inline void* at(const View<N>& view, Index... index) {
  int64_t elements = 0;
  int dim = 0;
  ((elements += index * view.stride[dim++]), ...);
  return offset(view.data, view.dtype, elements);
}

// One sequence: frames begin <= t < end of a batch row. What lies outside every span is padding: never read.
struct Span {
  int64_t row, begin, end;
};

// Frames begin <= t < end of a batch row, all of one sequence first <= t < last or padding behind it: one task's share.
struct Block {
  int64_t row, first, last, begin, end;
};

}  // namespace linconv
