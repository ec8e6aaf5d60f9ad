// Sums of partial results into tensors, on torch's threads. For cpu.cpp.
#pragma once

#include "common/parts.h"
#include "common/tasks.h"
#include "common/tensor.h"

namespace linconv {

// Throws unless a tensor is computed in the math dtype of x, in which partial gradients are kept.
inline void require_math(const Tensor& tensor, DType math, const char* name) {
  require(math_type(dtype_of(tensor, name)) == math, "of ", name, " and x one is float64, wanted both or neither");
}

// A tensor shaped as `like`: the sum of parts in its math type, as PartsArgs says.
inline Tensor sum_of_parts(const Tensor& parts, const Tensor& like, const char* name, int64_t outer, int64_t outer_stride,
                           int64_t inner = 1, int64_t inner_stride = 0) {
  const DType dtype = dtype_of(like, name);
  Tensor out = empty_as(like, dtype);
  const PartsArgs args{parts.data_ptr(), outer, outer_stride, inner, inner_stride, out.mutable_data_ptr(), dtype};
  const auto sum = [&](int64_t begin, int64_t end) {
    LINCONV_PICK(sum_parts)(args, math_type(dtype) == DType::kFloat64, begin, end);
  };
  run({like.numel(), sum, 4 * outer * inner * like.numel()});
  return out;
}

}  // namespace linconv
